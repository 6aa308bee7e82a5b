"""One scan, whatever file and axis order holds it: the same segmentation, voxel for voxel."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from dicom_scans import write_series

from sagittal.bundle import read_bundle
from sagittal.inference.engines.torch_engine import load as torch_engine
from sagittal.inference.predictor import Predictor
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.geometry import Reorientation, reorientation_to_ras

SETTINGS = {"network.channels": 2, "network.block_counts": [1] * 9, "network.expansion_ratio": 1}
WAYS = [Reorientation(axes, flips) for axes in permutations(range(3)) for flips in product((False, True), repeat=3)]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    plan = untrained_plan(
        "mednext-s", untrained_spec(4), patch_size=(16, 20, 18), spacing_mm=(1.5, 1.1, 1.0), settings=SETTINGS
    )
    bundle = read_bundle(write_random_bundle(tmp_path_factory.mktemp("model") / "bundle", plan))
    return Predictor(bundle.plan, torch_engine(bundle, "cpu"))


@pytest.fixture(scope="module")
def scan() -> Volume:
    """Return an oblique scan of int16 with voxels of three lengths."""
    array = np.random.default_rng(3).integers(1, 2000, (1, 14, 22, 19), dtype=np.int16)
    tilt = 0.1
    turn = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]])
    affine = np.eye(4)
    # Columns are the steps along D, H and W: up, to the front, to the right.
    affine[:3, :3] = turn @ np.array([[0, 0, 1.25], [0, 1.0, 0], [2.0, 0, 0]])
    affine[:3, 3] = (-30.0, 12.0, 7.0)
    return Volume(array, affine)


def anatomical(labels: Volume) -> np.ndarray:
    return reorientation_to_ras(labels.affine).apply(labels.array[0])


def test_all_48_axis_orders_give_the_same_segmentation(predictor: Predictor, scan: Volume) -> None:
    assert len(WAYS) == 48
    expected = anatomical(predictor.predict(scan, mirror=False))
    assert len(np.unique(expected)) > 1
    for way in WAYS:
        turned = Volume(
            np.ascontiguousarray(way.apply(scan.array)), way.affine(scan.affine, scan.geometry.shape), scan.header
        )
        labels = predictor.predict(turned, mirror=False)
        assert labels.array.shape == turned.array.shape
        np.testing.assert_array_equal(labels.affine, turned.affine)
        np.testing.assert_array_equal(anatomical(labels), expected)


def test_every_format_gives_the_same_segmentation(predictor: Predictor, scan: Volume, tmp_path: Path) -> None:
    expected = anatomical(predictor.predict(scan, mirror=False))
    files = [scan.write(tmp_path / f"scan{suffix}") for suffix in (".nii.gz", ".nii", ".nrrd", ".mha", ".mgz")]
    for path in (*files, write_series(tmp_path / "series", scan)):
        assert read_volume(path).array.shape[1:] == scan.array.shape[1:]
        np.testing.assert_array_equal(anatomical(predictor.predict(path, mirror=False)), expected, err_msg=path.name)
