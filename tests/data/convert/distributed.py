"""Tiny data sets laid out as their publishers distribute them, and archives of them."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (5, 7, 6)
AFFINE = np.array([[-1.5, 0, 0, 20], [0, -1.5, 0, 30], [0, 0, 3.0, -40], [0, 0, 0, 1]])


def write_image(path: Path, seed: int, channels: int = 0) -> None:
    """Write noise, x y z or x y z channel."""
    shape = SHAPE if channels == 0 else (*SHAPE, channels)
    values = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    _save(path, values)


def write_labels(path: Path, values: Sequence[int]) -> None:
    """Write a label map in which each value has a slice of its own, or a row."""
    labels = np.zeros(SHAPE, np.uint8)
    for place, value in enumerate(values):
        labels[place % SHAPE[0], place // SHAPE[0]] = value
    _save(path, labels)


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def msd(root: Path, task: str = "Task04_Hippocampus", modality: Sequence[str] = ("MRI",), cases: int = 3) -> Path:
    """A task of the Decathlon, with the hidden files that macOS left in the archives."""
    folder, prefix = root / task, task[7:].lower() if task != "Task01_BrainTumour" else "BRATS"
    names = [f"{prefix}_{number:03d}" for number in range(1, cases + 1)]
    channels = len(modality) if len(modality) > 1 else 0
    for seed, name in enumerate(names):
        image, labels = (folder / part / f"{name}.nii.gz" for part in ("imagesTr", "labelsTr"))
        if seed < 4:
            write_image(image, seed, channels)
            write_labels(labels, (1, 2, 3))
        else:
            image.hardlink_to(image.with_name(f"{names[0]}.nii.gz"))
            labels.hardlink_to(labels.with_name(f"{names[0]}.nii.gz"))
        image.with_name(f"._{name}.nii.gz").write_bytes(b"junk")
    write_image(folder / "imagesTs" / f"{prefix}_900.nii.gz", 99, channels)
    declared = {
        "name": task,
        "modality": {str(number): name for number, name in enumerate(modality)},
        "labels": {"0": "background", "1": "one", "2": "two", "3": "three"},
        "numTraining": cases,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": [f"./imagesTs/{prefix}_900.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(declared))
    return folder


def brain_tumours(root: Path, cases: int = 3) -> Path:
    """Task 1, whose four channels are in one file."""
    return msd(root, "Task01_BrainTumour", ("FLAIR", "T1w", "t1gd", "T2w"), cases)


def acdc(root: Path, patients: Sequence[int] = (1, 2)) -> Path:
    """ACDC, with a test patient, Info.cfg and the 4D series."""
    folder = root / "database"
    for part, numbers in (("training", patients), ("testing", (101,))):
        for number in numbers:
            name = f"patient{number:03d}"
            for frame in (1, 9 + number % 3):
                stem = folder / part / name / f"{name}_frame{frame:02d}"
                write_image(stem.with_name(f"{stem.name}.nii.gz"), 100 * number + frame)
                write_labels(stem.with_name(f"{stem.name}_gt.nii.gz"), (1, 2, 3))
            write_image(folder / part / name / f"{name}_4d.nii.gz", number, 2)
            (folder / part / name / "Info.cfg").write_text("ED: 1\nES: 9\nGroup: DCM\n")
    (folder / "MANDATORY_CITATION.md").write_text("cite")
    return folder


def btcv(root: Path, cases: Sequence[int] = (1, 2, 5, 21)) -> Path:
    """BTCV, with a test scan."""
    folder = root / "RawData"
    for number in cases:
        write_image(folder / "Training" / "img" / f"img{number:04d}.nii.gz", number)
        write_labels(folder / "Training" / "label" / f"label{number:04d}.nii.gz", range(1, 14))
    write_image(folder / "Testing" / "img" / "img0061.nii.gz", 61)
    return folder


def amos(root: Path) -> Path:
    """AMOS22: CT and MR to train, CT to validate, CT and MR to test without labels."""
    folder = root / "amos22"
    for part, numbers in (("Tr", (1, 4, 500, 507, 600)), ("Va", (8, 508))):
        for number in numbers:
            write_image(folder / f"images{part}" / f"amos_{number:04d}.nii.gz", number)
            write_labels(folder / f"labels{part}" / f"amos_{number:04d}.nii.gz", range(1, 16))
    write_image(folder / "imagesTs" / "amos_0002.nii.gz", 2)
    (folder / "dataset.json").write_text("{}")
    (folder / "readme.md").write_text("ids")
    return folder


def kits(root: Path, top: str, values: Sequence[int], tests: Sequence[int] = ()) -> Path:
    """KiTS19 or KiTS23, with annotations of instances."""
    folder = root / "kits" / top
    for number in (0, 1, 209):
        write_image(folder / f"case_{number:05d}" / "imaging.nii.gz", number)
        write_labels(folder / f"case_{number:05d}" / "segmentation.nii.gz", values)
    for number in tests:
        write_image(folder / f"case_{number:05d}" / "imaging.nii.gz", number)
    write_labels(folder / "case_00000" / "instances" / "tumor_instance-1_annotation-1.nii.gz", (1,))
    return folder.parent


def kits19(root: Path) -> Path:
    """KiTS19 with an unlabelled test case."""
    return kits(root, "data", (1, 2), tests=(210,))


def kits23(root: Path) -> Path:
    """KiTS23."""
    return kits(root, "dataset", (1, 2, 3))


def brats2021(root: Path) -> Path:
    """BraTS 2021, with a case to validate that has no labels."""
    folder = root / "training"
    for number in (0, 2, 3):
        case = f"BraTS2021_{number:05d}"
        for seed, channel in enumerate(("flair", "t1", "t1ce", "t2")):
            write_image(folder / case / f"{case}_{channel}.nii.gz", 10 * number + seed)
        if number != 3:
            write_labels(folder / case / f"{case}_seg.nii.gz", (1, 2, 4))
    return folder


def lits(root: Path) -> Path:
    """LiTS, both batches unpacked, plain NIfTI."""
    for batch, numbers in (("Training Batch 1", (0, 1)), ("Training Batch 2", (28, 130))):
        for number in numbers:
            write_image(root / "lits" / batch / f"volume-{number}.nii", number)
            write_labels(root / "lits" / batch / f"segmentation-{number}.nii", (1, 2))
    write_image(root / "lits" / "test" / "test-volume-0.nii", 500)
    return root / "lits"


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "msd-task01": brain_tumours,
    "msd-task04": msd,
    "acdc": acdc,
    "btcv": btcv,
    "amos22": amos,
    "amos22-mr": amos,
    "kits19": kits19,
    "kits23": kits23,
    "brats2021": brats2021,
    "lits": lits,
}


def packed(folder: Path, suffix: str) -> Path:
    """Return an archive of the folder beside it, with the folder as its one entry."""
    path = folder.with_name(folder.name + suffix)
    files = sorted((file for file in folder.rglob("*") if file.is_file()), reverse=True)
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.relative_to(folder.parent).as_posix())
    else:
        with tarfile.open(path, "w:gz" if suffix != ".tar" else "w") as archive:
            for file in files:
                archive.add(file, "./" + file.relative_to(folder.parent).as_posix())
    return path
