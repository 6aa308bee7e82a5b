from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagittal.bundle import manifest, read_bundle, write_bundle
from sagittal.bundle.replacement import previous_folder
from sagittal.errors import BundleError
from sagittal.plan import Plan


def repack(bundle: Path, name: str, content: bytes) -> None:
    """Put other content into the bundle under hashes that fit: what a broken writer would do."""
    old = manifest.read_manifest(bundle)
    (bundle / name).write_bytes(content)
    files = {**old.files, name: manifest.entry_of(content)}
    new = manifest.make_manifest(files, sagittal_version=old.sagittal_version, created=old.created)
    (bundle / "manifest.json").write_text(new.to_json())


def test_what_was_written_is_read(
    bundle_path: Path, plan: Plan, weights: dict[str, Any], metrics: dict[str, Any]
) -> None:
    bundle = read_bundle(bundle_path)
    assert bundle.plan == plan
    assert bundle.metrics == metrics
    assert bundle.weight_names == ("fold_0", "fold_1")
    for name, arrays in weights.items():
        read = bundle.weights(name)
        assert read.keys() == arrays.keys()
        for key, array in arrays.items():
            assert read[key].dtype == array.dtype and read[key].shape == array.shape
            np.testing.assert_array_equal(read[key], array)


def test_a_link_to_the_whole_bundle_is_fine(bundle_path: Path, tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "latest").symlink_to(bundle_path, target_is_directory=True)
    assert read_bundle(tmp_path / "latest").plan == plan


@pytest.mark.parametrize(
    "name",
    ["plan.json", "metrics.json", "MODEL_CARD.md", "manifest.json", "weights/fold_0.safetensors"],
)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_changed_byte_is_refused_and_named(bundle_path: Path, name: str, where: str) -> None:
    content = bytearray((bundle_path / name).read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[where]] ^= 1
    (bundle_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=name) as caught:
        read_bundle(bundle_path)
    assert str(caught.value).endswith("Copy or download the bundle again.") or name == "manifest.json"


def test_weights_that_change_after_reading_are_refused(bundle_path: Path) -> None:
    bundle = read_bundle(bundle_path)
    path = bundle_path / "weights" / "fold_1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    bundle.weights("fold_0")
    with pytest.raises(BundleError, match=r"fold_1\.safetensors: changed"):
        bundle.weights("fold_1")
    path.unlink()
    with pytest.raises(BundleError, match="can't be read"):
        bundle.weights("fold_1")


def test_unknown_weights(bundle_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no weights 'all'\. It has fold_0, fold_1"):
        read_bundle(bundle_path).weights("all")


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_unreadable_safetensors_are_refused(bundle_path: Path, content: bytes) -> None:
    repack(bundle_path, "weights/fold_0.safetensors", content)
    with pytest.raises(BundleError, match=r"fold_0\.safetensors: no readable safetensors file"):
        read_bundle(bundle_path)


def test_empty_safetensors_are_refused(bundle_path: Path) -> None:
    repack(bundle_path, "weights/fold_0.safetensors", (2).to_bytes(8, "little") + b"{}")
    with pytest.raises(BundleError, match="holds no weights"):
        read_bundle(bundle_path)


def test_dtype_that_numpy_lacks_is_refused(bundle_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    repack(bundle_path, "weights/fold_0.safetensors", len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(BundleError, match="no readable safetensors file"):
        read_bundle(bundle_path).weights("fold_0")


def test_a_plan_that_is_none_is_refused(bundle_path: Path) -> None:
    repack(bundle_path, "plan.json", b"{}")
    with pytest.raises(BundleError, match=r"plan\.json: schema_version is None.*written by version"):
        read_bundle(bundle_path)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_metrics_that_are_none_are_refused(bundle_path: Path, content: bytes) -> None:
    repack(bundle_path, "metrics.json", content)
    with pytest.raises(BundleError, match=r"metrics\.json: expected a JSON object"):
        read_bundle(bundle_path)


def test_interrupted_replacement_is_explained(bundle_path: Path) -> None:
    bundle_path.rename(previous_folder(bundle_path))
    with pytest.raises(BundleError, match=r"rename \.model\.previous to model"):
        read_bundle(bundle_path)


def test_reading_and_writing_do_not_import_torch() -> None:
    code = "import sys, sagittal.bundle; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_weights(tmp_path: Path, plan: Plan) -> None:
    path = write_bundle(tmp_path / "b", plan=plan, weights={"all": {"w": np.ones((2, 3))}}, metrics={})
    np.testing.assert_array_equal(read_bundle(path).weights("all")["w"], np.ones((2, 3)))
