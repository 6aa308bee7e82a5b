"""Small data sets to break: three sound cases of two channels, and sets of boxes with a side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sagittal.data.dataset import read_dataset
from sagittal.data.doctor import Diagnosis, Finding, diagnose
from sagittal.volumes import Volume

SHAPE = (6, 7, 8)
AFFINE = np.array([[0.0, 0, 0.8, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 30], [0, 0, 0, 1]])
MM = np.array([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
"""One mm in RAS order: D to the head, H to the front, W to the right."""


def an_image(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100.0, 20.0, shape).astype(np.float32)


def a_label_map() -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:3, 2:5, 3:6] = 1
    labels[3, 3, 3] = 2
    return labels


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    Volume(array[None], affine).write(path)


def declare(folder: Path, labels: Mapping[str, Any], channels: Sequence[str] = ("MR",), **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "file_ending": ".nii.gz",
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def write_sound_set(folder: Path) -> Path:
    declare(folder, {"tumour": 1, "cyst": 2}, ("T1", "FLAIR"), numTraining=3)
    for number, case in enumerate(("a", "b", "c")):
        for channel in range(2):
            write(folder / f"imagesTr/{case}_{channel:04d}.nii.gz", an_image(10 * number + channel))
        write(folder / f"labelsTr/{case}.nii.gz", a_label_map())
    return folder


def write_case(folder: Path, case: str, labels: np.ndarray, affine: np.ndarray = MM, seed: int | None = None) -> None:
    """Write a one-channel case; the noise depends on its name."""
    write(folder / f"imagesTr/{case}_0000.nii.gz", an_image(seed or sum(case.encode()), labels.shape), affine)
    write(folder / f"labelsTr/{case}.nii.gz", labels, affine)


def look(folder: Path, workers: int = 2) -> Diagnosis:
    return diagnose(read_dataset(folder), workers=workers)


def only(findings: Sequence[Finding]) -> Finding:
    (finding,) = findings
    return finding


def coded(diagnosis: Diagnosis, code: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.code == code]
