from __future__ import annotations

import errno
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_network import tiny_plan

from sagittal.data.preprocessing import frame_of
from sagittal.errors import ResourceError
from sagittal.inference import probabilities
from sagittal.inference.probabilities import KEY, ProbabilityFile, shares_of
from sagittal.plan import DatasetSpec, Label
from sagittal.testing.plans import untrained_spec
from sagittal.volumes import Volume

REGIONS = DatasetSpec(
    name="r",
    channel_names=("a",),
    labels=(Label(name="whole", values=(1, 2)), Label(name="core", values=(2,))),
    regions_class_order=(1, 2),
    file_ending=".nii",
)
TURNED = np.array([[0, -2.0, 0, 0], [0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]])


def scan() -> Volume:
    array = np.zeros((1, 6, 7, 8), np.float32)
    array[0, 1:5, 2:6, 3:7] = 1
    return Volume(array, TURNED)


@pytest.mark.parametrize("spec", [untrained_spec(4), REGIONS], ids=["classes", "regions"])
def test_probabilities_lie_on_the_scans_grid_whatever_its_axes(tmp_path: Path, spec: DatasetSpec) -> None:
    volume = scan()
    frame = frame_of(volume, tiny_plan(spec, **{"preprocessing.crop_to_nonzero": True}).preprocessing)
    stored = np.random.default_rng(0).normal(size=(spec.num_outputs, 6, 7, 8)).astype(np.float32) * 4
    logits = np.stack([frame.crop(one) for one in stored])
    with ProbabilityFile(tmp_path / "deep" / "case.npz", spec, frame) as file:
        for start in range(0, logits.shape[1], 3):
            file(slice(start, min(start + 3, logits.shape[1])), np.ascontiguousarray(logits[:, start : start + 3]))
        path = file.finish()
    with np.load(path) as content:
        found = content[KEY]
    assert found.dtype == np.float16 and found.shape == (spec.num_outputs, 6, 7, 8)
    shares = 1 / (1 + np.exp(-stored)) if spec.has_regions else np.exp(stored) / np.exp(stored).sum(axis=0)
    outside = np.zeros_like(shares)
    outside[0] = 0 if spec.has_regions else 1
    np.testing.assert_allclose(found, np.where(volume.array > 0, shares, outside), atol=1e-3)
    assert [name.name for name in (tmp_path / "deep").iterdir()] == ["case.npz"]
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].compress_type == zipfile.ZIP_DEFLATED


def test_shares_do_not_overflow_and_sum_to_one() -> None:
    logits = np.array([-9e4, 0, 9e4, 3], np.float32).reshape(4, 1, 1, 1)
    assert shares_of(logits, has_regions=False).reshape(-1).tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(shares_of(logits, has_regions=True).reshape(-1), [0, 0.5, 1, 0.9526], atol=1e-3)


def test_memory_does_not_grow_with_the_number_of_classes(tmp_path: Path) -> None:
    array = np.ones((1, 40, 50, 60), np.float32)
    volume = Volume(array, np.eye(4)[:, [2, 1, 0, 3]])
    peaks = []
    for outputs in (4, 32):
        spec = untrained_spec(outputs)
        frame = frame_of(volume, tiny_plan(spec).preprocessing)
        with ProbabilityFile(tmp_path / f"{outputs}.npz", spec, frame) as file:
            slab = np.zeros((outputs, 1, 50, 60), np.float32)
            for row in range(40):
                file(slice(row, row + 1), slab)
            tracemalloc.start()
            file.finish()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_a_prediction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    frame = frame_of(scan(), tiny_plan().preprocessing)
    with pytest.raises(KeyError), ProbabilityFile(tmp_path / "case.npz", untrained_spec(3), frame):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = frame_of(scan(), tiny_plan().preprocessing)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ProbabilityFile(tmp_path / "case.npz", untrained_spec(3), frame) as file:
        file(slice(0, 8), np.zeros((3, *frame.cropped_shape), np.float32))
        monkeypatch.setattr(probabilities.np.lib.format, "write_array_header_1_0", full)
        with pytest.raises(ResourceError, match="No space left") as caught:
            file.finish()
    assert caught.value.code == "disk" and list(tmp_path.iterdir()) == []
