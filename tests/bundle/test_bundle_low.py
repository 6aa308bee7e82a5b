"""A bundle may hold a second model, at a coarser spacing, under the same hashes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from sagittal.bundle import Bundle, Manifest, pack, read_bundle, write_bundle
from sagittal.bundle.manifest import make_manifest, read_manifest
from sagittal.errors import BundleError
from sagittal.testing.plans import untrained_plan, untrained_spec

SPEC = untrained_spec(3)
PLAN = untrained_plan("mednext-s", SPEC)
LOW = untrained_plan("mednext-s", SPEC, spacing_mm=(2.0, 2.0, 2.0)).replace(configuration="3d-low")
METRICS = {"validation": "made up"}


def _weights(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((2, 3), value, np.float32)}


@pytest.fixture
def both(tmp_path: Path) -> Bundle:
    low = write_bundle(tmp_path / "low", plan=LOW, weights={"fold_0": _weights(2), "fold_1": _weights(3)}, metrics={})
    main = tmp_path / "b"
    write_bundle(main, plan=PLAN, weights={"fold_0": _weights(1)}, metrics=METRICS, low=read_bundle(low))
    return read_bundle(main)


def test_both_models_are_read_each_with_its_plan_and_weights(both: Bundle) -> None:
    low = both.low
    assert low is not None and low.low is None
    assert both.plan == PLAN and low.plan == LOW
    assert both.weight_names == ("fold_0",) and low.weight_names == ("fold_0", "fold_1")
    assert both.weights("fold_0")["w"][0, 0] == 1 and low.weights("fold_1")["w"][0, 0] == 3
    assert (both.path / "low" / "weights" / "fold_1.safetensors").is_file()


def test_a_bundle_of_one_model_has_no_second(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", plan=PLAN, weights={"all": _weights(1)}, metrics=METRICS)
    assert read_bundle(tmp_path / "b").low is None
    assert not (tmp_path / "b" / "low").exists()


def test_a_package_carries_both(both: Bundle, tmp_path: Path) -> None:
    package = pack(both.path, tmp_path / "b.sagittal")
    unpacked = read_bundle(package)
    assert unpacked.low is not None and unpacked.low.weights("fold_0")["w"][0, 0] == 2


@pytest.mark.parametrize("name", ["low/plan.json", "low/weights/fold_0.safetensors"])
def test_a_changed_byte_of_the_second_model_is_refused(both: Bundle, name: str) -> None:
    content = bytearray((both.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (both.path / name).write_bytes(content)
    with pytest.raises(BundleError, match="changed"):
        read_bundle(both.path)


def test_half_a_second_model_and_files_without_a_place_are_refused(both: Bundle) -> None:
    manifest = read_manifest(both.path)
    for files, message in (
        ({name: entry for name, entry in manifest.files.items() if name != "low/plan.json"}, "without their plan"),
        (
            {name: entry for name, entry in manifest.files.items() if "low/weights" not in name},
            "without weights in low",
        ),
        ({**manifest.files, "low/metrics.json": manifest.files["metrics.json"]}, "has no place"),
        ({**manifest.files, "low/low/weights/all.safetensors": manifest.files["metrics.json"]}, "has no place"),
    ):
        with pytest.raises(ValidationError, match=message):
            make_manifest(files, sagittal_version="1", created="now")
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_two_models_of_different_data_are_refused(tmp_path: Path) -> None:
    other = untrained_plan("mednext-s", untrained_spec(4)).replace(configuration="3d-low")
    low = write_bundle(tmp_path / "low", plan=other, weights={"all": _weights(2)}, metrics={})
    with pytest.raises(BundleError, match="different channels or labels"):
        write_bundle(tmp_path / "b", plan=PLAN, weights={"all": _weights(1)}, metrics=METRICS, low=read_bundle(low))
    assert not (tmp_path / "b").exists()
    assert json.loads((low / "plan.json").read_text())["configuration"] == "3d-low"
