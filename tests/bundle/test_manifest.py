from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sagittal.bundle.manifest import (
    FileEntry,
    Manifest,
    entry_of,
    looks_like_bundle,
    make_manifest,
    read_manifest,
    read_verified,
    verify_files,
    weights_name,
    weights_path,
)
from sagittal.errors import BundleError
from sagittal.plan.base import canonical_json

FILES = ["plan.json", "metrics.json", "MODEL_CARD.md", "weights/all.safetensors"]


def manifest_of(names: list[str]) -> Manifest:
    entries = {name: entry_of(name.encode()) for name in names}
    return make_manifest(entries, sagittal_version="0.1.0", created="2025-01-02T03:04:05+00:00")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manifest = manifest_of(FILES)
    (tmp_path / "weights").mkdir()
    for name in FILES:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest as an attacker would: with a hash of itself that fits."""
    tree = {**json.loads((folder / "manifest.json").read_text()), **changes, "manifest_sha256": "0" * 64}
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    tree["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(tree, indent=2) + "\n")


def test_a_manifest_round_trips_and_verifies(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest == manifest_of(FILES)
    verify_files(folder, manifest)
    assert read_verified(folder / "plan.json", manifest.files["plan.json"]) == b"plan.json"


def test_rewriting_without_a_change_is_what_was_written(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    rewrite(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_no_byte_of_the_manifest_can_change(folder: Path) -> None:
    path = folder / "manifest.json"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(BundleError):
            read_manifest(folder)
    for changed in (good + b" ", good[:-1], b" " + good, good.replace(b"\n", b"\r\n")):
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=r"changed|JSON"):
            read_manifest(folder)


def test_own_hash_covers_the_listing() -> None:
    manifest = manifest_of(FILES)
    other = manifest.replace(files={**manifest.files, "plan.json": entry_of(b"other")})
    assert manifest_of(FILES).manifest_sha256 == manifest.manifest_sha256
    blank = manifest.replace(manifest_sha256="0" * 64)
    assert hashlib.sha256(canonical_json(blank).encode()).hexdigest() == manifest.manifest_sha256
    blank = other.replace(manifest_sha256="0" * 64)
    assert hashlib.sha256(canonical_json(blank).encode()).hexdigest() != manifest.manifest_sha256


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing") as caught:
        verify_files(folder, read_manifest(folder))
    assert caught.value.code == "missing_file"


@pytest.mark.parametrize("name", ["notes.txt", "weights/fold_3.safetensors", "weights/deep/model.pkl", ".hidden"])
def test_unlisted_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(BundleError, match="does not list it") as caught:
        verify_files(folder, read_manifest(folder))
    assert caught.value.code == "unlisted_file"


@pytest.mark.parametrize("name", FILES)
def test_changed_byte_and_changed_length_are_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(BundleError, match=f"{name}: changed since it was written"):
        verify_files(folder, read_manifest(folder))
    with pytest.raises(BundleError, match=f"{name}: changed since it was written"):
        read_verified(folder / name, entry_of(content))
    (folder / name).write_bytes(content + b"\n")
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("target", ["file", "folder"])
def test_symbolic_link_is_refused(folder: Path, target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    if target == "file":
        (elsewhere / "plan.json").write_bytes((folder / "plan.json").read_bytes())
        (folder / "plan.json").unlink()
        (folder / "plan.json").symlink_to(elsewhere / "plan.json")
    else:
        (folder / "weights").rename(elsewhere / "weights")
        (folder / "weights").symlink_to(elsewhere / "weights", target_is_directory=True)
    with pytest.raises(BundleError, match="symbolic link") as caught:
        verify_files(folder, read_manifest(folder))
    assert caught.value.code == "no_ordinary_file"


def test_linked_manifest_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "manifest.json"
    (folder / "manifest.json").rename(elsewhere)
    (folder / "manifest.json").symlink_to(elsewhere)
    with pytest.raises(BundleError, match=r"holds no manifest\.json"):
        read_manifest(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_is_refused_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(BundleError, match="no ordinary file"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.json",
        "/etc/passwd",
        "weights/../../outside.safetensors",
        "weights/../all.safetensors",
        "C:\\outside.json",
        "weights\\all.safetensors",
        "weights/fold_0.pkl",
        "weights/fold_01.safetensors",
        "weights/fold_٣.safetensors",
        "extra.json",
        "",
    ],
)
def test_path_without_a_place_in_a_bundle_is_refused(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    rewrite(folder, files={**files, name: files["plan.json"]})
    with pytest.raises(BundleError, match="has no place in a bundle"):
        read_manifest(folder)


@pytest.mark.parametrize("name", FILES)
def test_incomplete_listing_is_refused(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    del files[name]
    rewrite(folder, files=files)
    with pytest.raises(BundleError, match="lists no "):
        read_manifest(folder)


def test_newer_schema_says_what_to_do(folder: Path) -> None:
    rewrite(folder, schema_version=2, sagittal_version="9.0", unheard_of="field")
    with pytest.raises(
        BundleError, match=r"schema_version 2 is newer .*written by sagittal 9\.0.*Update sagittal"
    ) as e:
        read_manifest(folder)
    assert e.value.code == "bundle_too_new"


@pytest.mark.parametrize("version", [0, "1", None, 1.5])
def test_nonsense_schema_is_refused(folder: Path, version: object) -> None:
    rewrite(folder, schema_version=version)
    with pytest.raises(BundleError, match="schema_version"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "the format is None"),
        ("[" * 99999, "is not JSON"),
    ],
)
def test_no_manifest_at_all(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        read_manifest(folder)


def test_places_that_hold_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, message in [
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "file", "a file, not a folder"),
        (tmp_path, "holds no manifest"),
    ]:
        with pytest.raises(BundleError, match=message):
            read_manifest(path)


def test_looks_like_bundle_verifies_nothing(folder: Path) -> None:
    (folder / "plan.json").unlink()
    assert looks_like_bundle(folder)
    assert not looks_like_bundle(folder / "weights")
    (folder / "manifest.json").write_text("{}")
    assert not looks_like_bundle(folder)


def test_entry_refuses_a_malformed_hash() -> None:
    with pytest.raises(ValueError, match="sha256"):
        FileEntry(size_bytes=1, sha256="A" * 64)


def test_weight_names_are_ordered_by_number() -> None:
    names = [weights_path(f"fold_{number}") for number in (10, 2, 0)]
    assert manifest_of([*FILES[:3], *names]).weight_names == ("fold_0", "fold_2", "fold_10")


def test_weight_names() -> None:
    assert weights_path("all") == "weights/all.safetensors"
    assert weights_name("weights/fold_12.safetensors") == "fold_12"
    assert weights_name("plan.json") is None
    for name in ("fold_x", "../all", "ALL", "fold_", ""):
        with pytest.raises(BundleError, match="no name for weights"):
            weights_path(name)
