from __future__ import annotations

import errno
import os
import stat

import pytest
from example_plan import PLAN
from pydantic import ValidationError

from sagittal.errors import PlanError, ResourceError
from sagittal.plan import Plan, base
from sagittal.plan.base import Frozen, cannot_write, canonical_json, write_atomically


class Pair(Frozen):
    """A small value."""

    count: int = 1
    share: float = 0.5


def test_values_are_frozen_strict_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        Pair().count = 2
    for wrong in (
        {"count": "2"},
        {"count": 1.0},
        {"count": True},
        {"cuont": 2},
        {"share": float("nan")},
        {"share": float("inf")},
    ):
        with pytest.raises(ValidationError):
            Pair(**wrong)


def test_replace_validates_the_whole_and_leaves_the_old_value():
    first = Pair()
    assert first.replace(count=3) == Pair(count=3)
    assert first == Pair()
    with pytest.raises(ValidationError):
        first.replace(count="3")
    with pytest.raises(ValidationError, match="normalisations"):
        PLAN.replace(preprocessing=PLAN.preprocessing.replace(normalization=()))


def test_a_file_gives_the_same_value_back(tmp_path):
    path = PLAN.write(tmp_path / "deep" / "plan.json")
    assert Plan.read(path) == PLAN
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]


def test_every_offending_field_is_named_with_its_source():
    with pytest.raises(PlanError) as caught:
        Pair.from_json('{"count": "two", "shaer": 1}', source="pair.json")
    message = str(caught.value)
    assert message.startswith("pair.json: not valid. ")
    assert "count: " in message and "given 'two'" in message and "shaer: Extra inputs are not permitted" in message
    with pytest.raises(PlanError, match="the whole: Invalid JSON"):
        Pair.from_json("{")


def test_a_missing_file_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError, match=r"none\.json: can't be read"):
        Pair.read(tmp_path / "none.json")


def test_writing_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_hashes_are_taken_of_one_spelling():
    assert canonical_json(Pair()) == '{"count":1,"share":0.5}'
    assert canonical_json(Pair(share=0.25, count=2)) == canonical_json(Pair(count=2, share=0.25))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free space or choose another folder."),
        (errno.EDQUOT, "Free space or choose another folder."),
        (errno.EACCES, "Allow writing there or choose another folder."),
        (errno.EROFS, "Allow writing there or choose another folder."),
        (errno.ENOTDIR, "Check the disk and the path, or choose another folder."),
    ],
)
def test_what_cannot_be_written_is_told_with_what_helps(number, advice, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(base.os, "fsync", fail)
    with pytest.raises(ResourceError) as caught:
        write_atomically(tmp_path / "a.json", b"{}")
    assert caught.value.message == f"{tmp_path / 'a.json'}: can't be written ({os.strerror(number)}). {advice}"
    assert list(tmp_path.iterdir()) == []
    told = cannot_write("here", OSError(number, "no"), what="the bundle", note="More.", other="another", code="disk")
    assert told.message.startswith("here: the bundle can't be written (no). More. ") and told.code == "disk"


def test_the_name_of_a_new_file_is_kept_by_the_disk_where_it_can(tmp_path, monkeypatch):
    kept = []
    keep = os.fsync

    def watch(descriptor):
        kept.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if kept[-1]:
            assert (tmp_path / "a").exists()
        keep(descriptor)

    monkeypatch.setattr(base.os, "fsync", watch)
    write_atomically(tmp_path / "a", b"x")
    assert kept == [False, True]

    def refuse(*arguments):
        raise PermissionError(13, "folders can't be opened here")

    monkeypatch.setattr(base.os, "open", refuse)
    base.keep_name(tmp_path)
