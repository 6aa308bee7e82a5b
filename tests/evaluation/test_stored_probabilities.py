from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.evaluation.calibration import calibrate
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.stored_probabilities import read_probabilities


def shares(dtype: type[np.floating] = np.float16) -> np.ndarray:
    return np.random.default_rng(0).random((3, 4, 5, 6)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_classes_come_one_after_the_other_as_often_as_asked(
    tmp_path: Path, dtype: type[np.floating], save: np.ufunc
) -> None:
    save(tmp_path / "a.npz", other=np.zeros(3), probabilities=shares(dtype))
    found = read_probabilities(tmp_path / "a.npz")
    assert (len(found), found.shape, found.dtype) == (3, (4, 5, 6), dtype)
    for _ in range(2):
        np.testing.assert_array_equal(np.stack(list(found)), shares(dtype))


def peak_of_calibration(folder: Path, outputs: int) -> int:
    random = np.random.default_rng(1)
    shape = (20, 60, 70)
    values = random.dirichlet(np.ones(outputs), shape).transpose(3, 0, 1, 2).astype(np.float16)
    reference = random.integers(0, outputs, shape).astype(np.uint8)
    np.savez_compressed(folder / "case.npz", probabilities=values)
    classes = ClassSet.of_values(range(outputs))
    stored = read_probabilities(folder / "case.npz")
    tracemalloc.start()
    found = calibrate(reference, stored, (5.0, 0.8, 0.5), classes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == calibrate(reference, values, (5.0, 0.8, 0.5), classes)
    return peak


def test_calibration_of_a_file_equals_that_of_the_array_and_holds_one_class_at_a_time(tmp_path: Path) -> None:
    one_class = 2 * 20 * 60 * 70
    assert peak_of_calibration(tmp_path, 20) < peak_of_calibration(tmp_path, 4) + 2 * one_class


def test_files_without_probabilities_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "key.npz", softmax=shares())
    np.savez(tmp_path / "shape.npz", probabilities=shares()[0])
    np.savez(tmp_path / "kind.npz", probabilities=np.zeros((2, 3, 4, 5), np.uint8))
    np.savez(tmp_path / "order.npz", probabilities=np.asfortranarray(shares()))
    np.savez(tmp_path / "object.npz", probabilities=np.array([None]))
    (tmp_path / "text.npz").write_text("no zip")
    for name, message in {
        "key": "no array 'probabilities'",
        "shape": r"float16 of shape \(4, 5, 6\)",
        "kind": "uint8",
        "order": "in Fortran order",
        "object": "object of shape",
        "text": "no array",
        "absent": "can't be read",
    }.items():
        with pytest.raises(DataError, match=message):
            read_probabilities(tmp_path / f"{name}.npz")


def test_a_damaged_file_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    np.savez(path, probabilities=np.tile(shares(), (1, 8, 8, 8)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    found = read_probabilities(path)
    with pytest.raises(DataError, match=r"case\.npz: is damaged"):
        list(found)


def test_an_array_that_is_shorter_than_its_header_says_is_told(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    content = io.BytesIO()
    np.save(content, shares())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("probabilities.npy", content.getvalue().replace(b"(3, 4, 5, 6)", b"(9, 4, 5, 6)"))
    with pytest.raises(DataError, match=r"case\.npz: ends early"):
        list(read_probabilities(path))
