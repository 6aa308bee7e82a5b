from __future__ import annotations

import copy
import gc
import hashlib
import io
import os
import random
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sagittal.bundle import archive as archive_module
from sagittal.bundle import is_package, pack, read_bundle, unpack
from sagittal.bundle.unpacked import Unpacked
from sagittal.errors import BundleError, ResourceError
from sagittal.plan import Plan


@pytest.fixture
def package(bundle_path: Path, tmp_path: Path) -> Path:
    return pack(bundle_path, tmp_path / "packages" / "model.sagittal")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that packages are unpacked in for reading."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sealed(archive: bytes) -> bytes:
    """Return the archive with the comment that a package ends with: what somebody who means harm can do too."""
    body = archive[:-2] + (84).to_bytes(2, "little")
    return body + b"sagittal-package-1 " + hashlib.sha256(body).hexdigest().encode()


Change = Callable[[zipfile.ZipInfo, bytes], tuple[zipfile.ZipInfo, bytes]]


def rewritten(package: Path, name: str, change: Change, *, method: int = zipfile.ZIP_STORED, times: int = 1) -> bytes:
    """Return the package with one entry changed and everything sealed again."""
    out = io.BytesIO()
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            count = 1
            if info.filename == name:
                info, content = change(info, content)
                info.compress_type = method
                count = times
            for _ in range(count):
                new.writestr(copy.copy(info), content)
    return sealed(out.getvalue())


def renamed(target: str) -> Change:
    def change(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        info.filename = target
        return info, content

    return change


def with_mode(mode: int) -> Change:
    def change(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        info.external_attr = mode << 16
        return info, content

    return change


def replaced(new: bytes) -> Change:
    return lambda info, content: (info, new)


def unchanged(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    return info, content


def refused(package: Path, content: bytes, tmp_path: Path) -> str:
    """Check that neither reading nor unpacking takes `content`, and that nothing is left; return the message."""
    package.write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(BundleError) as caught:
        read_bundle(package)
    with pytest.raises(BundleError):
        unpack(package, tmp_path / "unpacked")
    assert contents(tmp_path) == before and not (tmp_path / "unpacked").exists()
    assert str(package) in caught.value.message and "sagittal-package-" not in caught.value.message.replace("'", "")
    return caught.value.message


def test_a_package_unpacks_to_the_bundle_it_was_made_of(package: Path, bundle_path: Path, tmp_path: Path) -> None:
    assert is_package(package)
    folder = unpack(package, tmp_path / "deep" / "unpacked")
    assert contents(folder) == contents(bundle_path)
    assert read_bundle(folder).manifest == read_bundle(bundle_path).manifest
    assert [path.name for path in package.parent.iterdir()] == ["model.sagittal"]


def test_the_same_bundle_gives_the_same_bytes_and_any_zip_tool_opens_them(
    package: Path, bundle_path: Path, tmp_path: Path
) -> None:
    assert pack(package, tmp_path / "again.sagittal").read_bytes() == package.read_bytes()
    with zipfile.ZipFile(package) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "manifest.json"
        assert {name: archive.read(name) for name in archive.namelist()} == contents(bundle_path)


def test_a_package_is_read_in_place_of_its_folder(package: Path, plan: Plan, scratch: Path) -> None:
    bundle = read_bundle(package)
    assert bundle.plan == plan and bundle.weight_names == ("fold_0", "fold_1")
    assert np.isfinite(bundle.weights("fold_1")["stem.weight"]).all()
    assert list(scratch.iterdir()) == [bundle.path]
    del bundle
    gc.collect()
    assert list(scratch.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_the_files_to_its_parent(package: Path, scratch: Path) -> None:
    bundle = read_bundle(package)
    Unpacked(bundle.path, os.getpid() + 1, None).remove()
    assert bundle.path.is_dir()


def test_what_a_killed_process_unpacked_is_deleted_a_day_later(package: Path, scratch: Path) -> None:
    old, young, foreign = (scratch / name for name in ("sagittal-package-a", "sagittal-package-b", "other"))
    for folder in (old, young, foreign):
        (folder / "weights").mkdir(parents=True)
    for folder in (old, foreign):
        os.utime(folder, (0, 0))
    read_bundle(package)
    assert not old.exists() and young.is_dir() and foreign.is_dir()


def test_what_is_a_package(package: Path, bundle_path: Path, tmp_path: Path) -> None:
    assert is_package(package.rename(tmp_path / "model.zip"))
    assert not is_package(bundle_path) and not is_package(tmp_path / "absent.sagittal")
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        archive.writestr("1.dcm", b"")
    assert not is_package(tmp_path / "series.zip")


def test_targets_that_hold_something_are_left_alone(package: Path, bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path / "notes.txt", bundle_path):
        with pytest.raises(BundleError, match="exists and is no package"):
            pack(bundle_path, target)
        with pytest.raises(BundleError, match="exists and is no empty folder"):
            unpack(package, target)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert unpack(package, tmp_path / "empty") == tmp_path / "empty"
    assert pack(bundle_path, package) == package


def test_a_damaged_bundle_is_not_packed(bundle_path: Path, tmp_path: Path) -> None:
    (bundle_path / "MODEL_CARD.md").write_text("better")
    with pytest.raises(BundleError, match=r"MODEL_CARD\.md"):
        pack(bundle_path, tmp_path / "model.sagittal")
    assert not (tmp_path / "model.sagittal").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_can_not_be_written_is_named(package: Path, bundle_path: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="can't be written"):
        pack(bundle_path, locked / "model.sagittal")
    with pytest.raises(ResourceError, match="can't be written"):
        unpack(package, locked / "model")


def test_a_full_disk_is_named_and_leaves_nothing(
    package: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_module, "_write", full)
    with pytest.raises(ResourceError, match="No space left") as caught:
        unpack(package, tmp_path / "unpacked")
    assert caught.value.code == "disk_full"
    with pytest.raises(ResourceError, match="--unpack"):
        read_bundle(package)
    assert not (tmp_path / "unpacked").exists() and not list(scratch.iterdir())


def test_a_newer_package_says_what_to_do(package: Path) -> None:
    package.write_bytes(package.read_bytes().replace(b"sagittal-package-1", b"sagittal-package-2"))
    with pytest.raises(BundleError, match=r"version 2.*Update") as caught:
        read_bundle(package)
    assert caught.value.code == "bundle_too_new"


@pytest.mark.parametrize("content", [b"", b"PK", b"no package at all" * 20])
def test_other_files_are_no_packages(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.sagittal").write_bytes(content)
    with pytest.raises(BundleError, match="no package, or one that was cut short"):
        read_bundle(tmp_path / "model.sagittal")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name",
    [
        "../outside.json",
        "/outside.json",
        "weights/../../outside.json",
        "C:\\outside.json",
        "..\\outside.json",
        "plan.json/",
        "extra.json",
        "weights/fold_0.py",
        "metrics.json",
    ],
)
def test_other_names_than_the_manifests_are_refused(package: Path, tmp_path: Path, scratch: Path, name: str) -> None:
    message = refused(package, rewritten(package, "plan.json", renamed(name)), tmp_path)
    assert "entries are not those" in message or "no ordinary file" in message


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755, stat.S_IFIFO, 0])
def test_links_executables_and_folders_are_refused(package: Path, tmp_path: Path, scratch: Path, mode: int) -> None:
    message = refused(package, rewritten(package, "plan.json", with_mode(mode)), tmp_path)
    assert "a link, a folder, an executable or no ordinary file" in message


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused_before_they_swell(
    package: Path, tmp_path: Path, scratch: Path, method: int
) -> None:
    bomb = rewritten(package, "plan.json", replaced(b"\0" * (8 << 20)), method=method)
    assert len(bomb) < 1 << 17
    assert "is compressed or encrypted" in refused(package, bomb, tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_are_refused(package: Path, tmp_path: Path, scratch: Path) -> None:
    assert "or twice" in refused(package, rewritten(package, "plan.json", unchanged, times=2), tmp_path)


def test_other_content_of_another_or_the_same_size_is_refused(package: Path, tmp_path: Path, scratch: Path) -> None:
    original = package.read_bytes()
    content = zipfile.ZipFile(package).read("plan.json")
    message = refused(package, rewritten(package, "plan.json", replaced(content + b"\n")), tmp_path)
    assert "bytes, the manifest says" in message
    package.write_bytes(original)
    message = refused(package, rewritten(package, "plan.json", replaced(content[:-1] + b" ")), tmp_path)
    assert "changed since it was written" in message


def test_a_huge_manifest_is_refused_before_it_is_read(package: Path, tmp_path: Path, scratch: Path) -> None:
    message = refused(package, rewritten(package, "manifest.json", replaced(b" " * (2 << 20))), tmp_path)
    assert "of at most" in message


def test_entries_that_share_bytes_are_refused(package: Path, tmp_path: Path, scratch: Path) -> None:
    content = bytearray(package.read_bytes())
    directory = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", directory + 4)
    # The second entry begins where the first does.
    content[second + 42 : second + 46] = content[directory + 42 : directory + 46]
    assert "reaches into what follows" in refused(package, sealed(bytes(content[:-83])), tmp_path)


def test_something_before_the_first_entry_is_refused(package: Path, tmp_path: Path, scratch: Path) -> None:
    content = b"#!/bin/sh\n" + package.read_bytes()[:-83]
    assert "something stands before" in refused(package, sealed(content), tmp_path)


def test_every_flipped_byte_and_every_cut_is_refused(package: Path, tmp_path: Path, scratch: Path) -> None:
    whole = package.read_bytes()
    rng = random.Random(0)
    for number in range(120):
        content = bytearray(whole)
        if number % 3 == 0:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        refused(package, bytes(content), tmp_path)


def test_damage_that_was_sealed_again_is_refused_too(package: Path, tmp_path: Path, scratch: Path) -> None:
    whole = package.read_bytes()[:-83]
    directory = whole.index(b"PK\x01\x02")
    taken, rng = 0, random.Random(1)
    unharmed = contents(unpack(package, tmp_path / "unharmed"))
    shutil.rmtree(tmp_path / "unharmed")
    for number in range(300):
        content = bytearray(whole)
        # Two of three in the directory, where names, sizes and places are.
        where = rng.randrange(directory, len(content)) if number % 3 else rng.randrange(len(content))
        content[where] = rng.randrange(256)
        package.write_bytes(sealed(bytes(content)))
        try:
            bundle = read_bundle(package)
        except BundleError:
            assert not (tmp_path / "outside.json").exists()
            continue
        # A date, say: nobody looks at it, and the content is what the manifest says.
        taken += 1
        assert contents(bundle.path) == unharmed
    assert 0 < taken < 150
