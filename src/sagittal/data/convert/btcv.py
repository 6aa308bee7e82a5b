"""BTCV, also called Synapse: RawData/Training/img/img0001.nii.gz, Training/label/label0001.nii.gz, Testing/img."""

from __future__ import annotations

from sagittal.data.catalogue import Protocol
from sagittal.data.convert.conversion import Conversion
from sagittal.data.convert.files import find, paired, take_apart, unlabelled
from sagittal.data.convert.source import Source
from sagittal.data.splits import Fold

# The twelve cases on which TransUNet, nnFormer and SegFormer3D report; the other 18 train.
_NNFORMER_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
_ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal vein and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)


def read_btcv(source: Source, name: str, protocol: Protocol | None) -> Conversion:
    """Return what becomes of BTCV's files; cases are called img0001.

    Protocol `nnformer`: 18 cases train, 12 validate. The papers that use it have no further test cases, and score 8 of
    the 13 structures.

    Raises:
        DataError: files are missing.
    """
    labels = find(source, r"(?:Training/)?label/label(?P<case>\d{4})\.nii(\.gz)?")
    images = find(source, r"img/img(?P<case>\d{4})\.nii(\.gz)?")
    tests = {f"img{case}": file for case, file in images.items() if "Testing/img/" in file}
    training = paired(
        {f"img{case}": file for case, file in images.items() if f"img{case}" not in tests},
        {f"img{case}": file for case, file in labels.items()},
        "Training/img/img0001.nii.gz and Training/label/label0001.nii.gz",
    )
    splits: tuple[Fold, ...] = ()
    notes: tuple[str, ...] = ()
    if protocol is not None:
        held_out = {f"img{number:04d}" for number in _NNFORMER_TEST}
        _, _, fold = take_apart(training, held_out, (), whose="nnFormer's")
        splits = (fold,)
        notes = ("nnFormer's split: the twelve cases it reports on validate, there is no other test",)
    return Conversion(
        ("CT",),
        {"background": 0, **{organ: number for number, organ in enumerate(_ORGANS, start=1)}},
        training,
        unlabelled(tests),
        splits=splits,
        notes=notes,
    )
