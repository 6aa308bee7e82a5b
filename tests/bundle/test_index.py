from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from sagittal.bundle import read_bundle
from sagittal.bundle.index import ModelEntry, ModelIndex, entry_of, parse_index, with_entry
from sagittal.bundle.publish import add_bundle
from sagittal.errors import BundleError, PlanError, ResourceError


def entry(**changes: Any) -> ModelEntry:
    fields: dict[str, Any] = {
        "name": "spleen",
        "version": "1",
        "file": "spleen-1.sagittal",
        "sha256": "0" * 64,
        "bytes": 7,
        "network": "mednext-s",
        "channels": ("CT",),
        "labels": ("spleen",),
    }
    return ModelEntry(**{**fields, **changes})


def test_a_bundle_is_packed_beside_the_list_and_listed_with_its_hash(bundle_path: Path, tmp_path: Path) -> None:
    index = tmp_path / "shared" / "models.json"
    added, package = add_bundle(bundle_path, index, version="2", licence="CC-BY 4.0")
    assert package == tmp_path / "shared" / "model-2.sagittal"
    assert added.sha256 == hashlib.sha256(package.read_bytes()).hexdigest()
    assert added.bytes == package.stat().st_size
    assert (added.network, added.channels, added.labels) == ("segformer3d", ("channel_0",), ("class_1", "class_2"))
    assert (added.dice, added.licence, added.file) == (0.875, "CC-BY 4.0", "model-2.sagittal")
    assert parse_index(index.read_bytes(), "models.json").models == (added,)
    assert read_bundle(package).manifest == read_bundle(bundle_path).manifest
    assert sorted(path.name for path in index.parent.iterdir()) == ["model-2.sagittal", "models.json"]


def test_a_package_is_added_as_it_is_and_the_newest_is_found_first(bundle_path: Path, tmp_path: Path) -> None:
    index = tmp_path / "models.json"
    _, package = add_bundle(bundle_path, index)
    second, copy = add_bundle(package, index, name="other", url="https://example.org/models/other.sagittal")
    assert copy.read_bytes() == package.read_bytes()
    assert second.file == "https://example.org/models/other.sagittal" and second.is_address
    third, _ = add_bundle(package, index, name="model", version="2")
    listed = parse_index(index.read_bytes(), "models.json")
    assert [str(one) for one in listed.models] == ["model 1", "other 1", "model 2"]
    assert listed.entry("model") == third
    assert listed.entry("model==1").version == "1"


def test_nothing_that_is_listed_is_replaced(bundle_path: Path, tmp_path: Path) -> None:
    index = tmp_path / "models.json"
    add_bundle(bundle_path, index)
    before = index.read_bytes()
    with pytest.raises(BundleError, match=r"MODEL 1: is in the list already.*--version"):
        add_bundle(bundle_path, index, name="MODEL")
    (tmp_path / "model-2.sagittal").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"model-2.sagittal: exists, and is not overwritten"):
        add_bundle(bundle_path, index, version="2")
    assert index.read_bytes() == before
    assert not list(tmp_path.glob(".adding*"))


def test_names_that_cannot_stand_in_a_list_are_refused(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"name: String should match.*given 'two words'"):
        add_bundle(bundle_path, tmp_path / "models.json", name="two words")
    with pytest.raises(BundleError, match="name: String should match"):
        add_bundle(bundle_path, tmp_path / "list" / "models.json", name="../out")
    assert {path.name for path in tmp_path.iterdir()} == {"models", "list"}
    with pytest.raises(ResourceError, match=r"absent: can't be read"):
        entry_of(read_bundle(bundle_path), tmp_path / "absent", name="a", version="1", file="a")


@pytest.mark.parametrize(
    "file",
    ["../a.sagittal", "/etc/a", "b/../../a", "a\\b", "C:/a", "file:///etc/a", "ftp://host/a", "NUL.sagittal", ""],
)
def test_an_entry_names_nothing_outside_the_folder_of_the_list(file: str) -> None:
    with pytest.raises(ValueError, match="file"):
        entry(file=file)


def test_entries_below_the_list_and_on_the_web_are_taken() -> None:
    assert entry(file="ct/spleen.sagittal").file_name == "spleen-1.sagittal"
    assert entry(file="https://example.org/get?file=3").file_name == "spleen-1"
    assert not entry(file="ct/spleen.sagittal").is_address


def test_unknown_models_and_versions_are_told_with_what_there_is() -> None:
    listed = ModelIndex(models=(entry(),))
    with pytest.raises(BundleError, match=r"'spleeen' is not in the list.*Did you mean 'spleen'"):
        listed.entry("spleeen")
    with pytest.raises(BundleError, match=r"no version '9'. Versions: 1"):
        listed.entry("spleen==9")
    with pytest.raises(BundleError, match="The list is empty"):
        ModelIndex().entry("spleen")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "newer than 1"),
        ({"format": "other"}, "not a list of models"),
        ({"models": [{"name": "a"}]}, "Field required"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_a_list_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    tree = {**json.loads(ModelIndex(models=(entry(),)).to_json()), **change}
    with pytest.raises(BundleError, match=message):
        parse_index(json.dumps(tree).encode(), "models.json")


def test_text_that_is_no_json_and_entries_listed_twice_are_refused() -> None:
    with pytest.raises(BundleError, match=r"models.json: not a list of models"):
        parse_index(b"<html>", "models.json")
    one = ModelIndex(models=(entry(),))
    with pytest.raises(BundleError, match="in the list already"):
        with_entry(one, entry(name="Spleen"))
    with pytest.raises(ValueError, match="listed twice: spleen 1"):
        one.replace(models=(entry(), entry(name="Spleen")))
    with pytest.raises(PlanError, match="listed twice"):
        ModelIndex.from_json(one.to_json().replace('"models": [', '"models": [' + entry().to_json() + ","))
