from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagittal.bundle import hash_case, read_bundle, write_bundle
from sagittal.bundle.replacement import previous_folder
from sagittal.errors import BundleError, ResourceError
from sagittal.plan import Plan

OTHER = {"all": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_layout_and_return_value(bundle_path: Path) -> None:
    assert listing(bundle_path) == ["MODEL_CARD.md", "manifest.json", "metrics.json", "plan.json", "weights"]
    assert listing(bundle_path / "weights") == ["fold_0.safetensors", "fold_1.safetensors"]
    assert listing(bundle_path.parent) == ["model"]
    assert bundle_path.stat().st_mode & 0o777 == 0o755
    tree = json.loads((bundle_path / "manifest.json").read_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", tree["created"])


def test_the_licence_of_the_data_stands_in_the_card(tmp_path: Path, plan: Plan) -> None:
    written = write_bundle(tmp_path / "b", plan=plan, weights=OTHER, metrics={}, data_license="CC BY 4.0")
    bundle = read_bundle(written)
    assert bundle.data_license == "CC BY 4.0"
    (written / "MODEL_CARD.md").write_text("- Licence of the data: free for all\n")
    with pytest.raises(BundleError):
        _ = bundle.data_license


def test_an_empty_folder_is_filled(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "b").mkdir()
    assert read_bundle(write_bundle(tmp_path / "b", plan=plan, weights=OTHER, metrics={})).weight_names == ("all",)
    assert listing(tmp_path) == ["b"]


def test_a_bundle_is_replaced_whole(bundle_path: Path, plan: Plan) -> None:
    write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert read_bundle(bundle_path).weight_names == ("all",)
    assert listing(bundle_path / "weights") == ["all.safetensors"]
    assert listing(bundle_path.parent) == ["model"]


def test_writing_through_a_link_keeps_the_link(bundle_path: Path, tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "latest").symlink_to(bundle_path, target_is_directory=True)
    write_bundle(tmp_path / "latest", plan=plan, weights=OTHER, metrics={})
    assert (tmp_path / "latest").is_symlink()
    assert read_bundle(bundle_path).weight_names == ("all",)


def test_transposed_arrays_keep_their_values(tmp_path: Path, plan: Plan) -> None:
    array = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)
    path = write_bundle(tmp_path / "b", plan=plan, weights={"all": {"w": array, "one": np.array(3)}}, metrics={})
    read = read_bundle(path).weights("all")
    np.testing.assert_array_equal(read["w"], array)
    assert read["one"].shape == ()


@pytest.mark.parametrize("content", ["file", "folder"])
def test_something_else_is_never_overwritten(tmp_path: Path, plan: Plan, content: str) -> None:
    target = tmp_path / "thesis"
    if content == "file":
        target.write_text("years of work")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(target, plan=plan, weights=OTHER, metrics={})
    kept = target if content == "file" else target / "thesis.tex"
    assert kept.read_text() == "years of work"
    assert listing(tmp_path) == ["thesis"]


def test_a_bundle_with_foreign_files_is_not_replaced(bundle_path: Path, plan: Plan) -> None:
    (bundle_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"also holds notes\.txt"):
        write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert (bundle_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdtemp"])
@pytest.mark.parametrize("replaces", [True, False])
def test_full_disk_leaves_nothing_half_written(
    tmp_path: Path, plan: Plan, weights: Any, monkeypatch: pytest.MonkeyPatch, call: str, replaces: bool
) -> None:
    target = tmp_path / "model"
    if replaces:
        write_bundle(target, plan=plan, weights=weights, metrics={})
    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", full_disk)
        elif call == "rename":
            patch.setattr(Path, "rename", full_disk)
        else:
            patch.setattr("tempfile.mkdtemp", full_disk)
        with pytest.raises(ResourceError, match=r"model: .*No space left.*Free space") as caught:
            write_bundle(target, plan=plan, weights=OTHER, metrics={})
    assert caught.value.code == "disk_full"
    assert listing(tmp_path) == (["model"] if replaces else [])
    if replaces:
        assert read_bundle(target).weight_names == ("fold_0", "fold_1")


def test_a_second_rename_that_fails_brings_the_old_bundle_back(
    bundle_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def only_the_new_one_fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", only_the_new_one_fails)
        with pytest.raises(ResourceError, match="Input/output error") as caught:
            write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert caught.value.code == "resource"
    assert read_bundle(bundle_path).weight_names == ("fold_0", "fold_1")
    assert listing(bundle_path.parent) == ["model"]


def test_a_killed_replacement_is_put_right(bundle_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    rename = Path.rename

    def killed_between_the_renames(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise KilledError
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_between_the_renames)
        with pytest.raises(KilledError):
            write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert not bundle_path.exists()
    assert read_bundle(previous_folder(bundle_path)).weight_names == ("fold_0", "fold_1")
    # The next run restores it first, so that a failure of its own can't lose it.
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(ResourceError):
            write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert read_bundle(bundle_path).weight_names == ("fold_0", "fold_1")


def test_leftovers_of_killed_runs_go(bundle_path: Path, plan: Plan, weights: Any) -> None:
    parent = bundle_path.parent
    write_bundle(parent / ".model.previous", plan=plan, weights=weights, metrics={})
    for name, age_s in ((".model.abc.part", 7200.0), (".model.new.part", 0.0), (".other.abc.part", 7200.0)):
        (parent / name).mkdir()
        os.utime(parent / name, (time.time() - age_s,) * 2)
    write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert listing(parent) == [".model.new.part", ".other.abc.part", "model"]


def test_a_former_bundle_that_was_half_deleted_bars_nothing(bundle_path: Path, plan: Plan, weights: Any) -> None:
    previous = write_bundle(previous_folder(bundle_path), plan=plan, weights=weights, metrics={})
    (previous / "manifest.json").unlink()
    write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert listing(bundle_path.parent) == ["model"] and read_bundle(bundle_path).weight_names == ("all",)


def test_previous_is_kept_while_something_else_has_its_name(bundle_path: Path, plan: Plan) -> None:
    previous = previous_folder(bundle_path)
    bundle_path.rename(previous)
    bundle_path.mkdir()
    (bundle_path / "x").write_text("x")
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(bundle_path, plan=plan, weights=OTHER, metrics={})
    assert read_bundle(previous).weight_names == ("fold_0", "fold_1")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "needs weights"),
        ({"all": {}}, "hold no array"),
        ({"best": {"w": np.ones(1)}}, "no name for weights"),
        ({"all": {"w": np.array(["x"])}}, "Expected numbers"),
        ({"all": {"w": np.array([1.0, np.nan])}}, "NaN or infinity"),
        ({"fold_1": {"w": np.array([np.inf], np.float16)}}, "NaN or infinity"),
    ],
)
def test_weights_that_can_not_be_kept(tmp_path: Path, plan: Plan, weights: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "b", plan=plan, weights=weights, metrics={})
    assert listing(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1, 2}])
def test_metrics_that_json_lacks(tmp_path: Path, plan: Plan, value: object) -> None:
    with pytest.raises(BundleError, match="Give None for what is not defined"):
        write_bundle(tmp_path / "b", plan=plan, weights=OTHER, metrics={"dice": {"class_1": value}})


def test_names_with_glob_letters(tmp_path: Path, plan: Plan) -> None:
    stale = tmp_path / ".a[1]*.x.part"
    stale.mkdir()
    os.utime(stale, (0, 0))
    write_bundle(tmp_path / "a[1]*", plan=plan, weights=OTHER, metrics={})
    assert listing(tmp_path) == ["a[1]*"]


def test_hash_case_hides_the_name() -> None:
    assert re.fullmatch(r"[0-9a-f]{12}", hash_case("patient_007"))
    assert hash_case("patient_007") != hash_case("patient_008")
