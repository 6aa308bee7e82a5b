"""ACDC: training/patient001/patient001_frame01.nii.gz and patient001_frame01_gt.nii.gz, two frames of each patient.

The frames are the end of diastole and of systole; patient001_4d.nii.gz holds all others, without labels, and is left
out. testing/ has the same form since the challenge is over.
"""

from __future__ import annotations

from sagittal.data.catalogue import Protocol
from sagittal.data.convert.conversion import Conversion
from sagittal.data.convert.files import find, paired, take_apart
from sagittal.data.convert.source import Source
from sagittal.data.splits import Fold

# nnFormer's split by patient (github.com/282857341/nnFormer, nnFormerTrainerV2_nnformer_acdc.py at 09cf58d): 70 of the
# 100 training patients train, 10 validate and 20 test, the sizes that SegFormer3D states.
_VALIDATION = (89, 90, 91, 93, 94, 96, 97, 98, 99, 100)
_TESTING = (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95)
_IMAGE = r"patient\d+/(?P<case>patient\d+_frame\d+)\.nii(\.gz)?"
_LABELS = r"patient\d+/(?P<case>patient\d+_frame\d+)_gt\.nii(\.gz)?"


def read_acdc(source: Source, name: str, protocol: Protocol | None) -> Conversion:
    """Return what becomes of ACDC's files.

    Protocol `nnformer`: nnFormer's split of the 100 training patients; its 20 test patients are in imagesTs.

    Raises:
        DataError: files are missing.
    """
    expected = "training/patient001/patient001_frame01.nii.gz and patient001_frame01_gt.nii.gz beside it"
    training = paired(find(source, f"training/{_IMAGE}"), find(source, f"training/{_LABELS}"), expected)
    tests = find(source, f"testing/{_IMAGE}"), find(source, f"testing/{_LABELS}")
    testing = paired(*tests, expected.replace("training", "testing")) if any(tests) else ()
    splits: tuple[Fold, ...] = ()
    notes: tuple[str, ...] = ()
    if protocol is not None:
        validation, held_out = ({f"patient{number:03d}" for number in numbers} for numbers in (_VALIDATION, _TESTING))
        training, testing, fold = take_apart(training, validation, held_out, whose="nnFormer's", unit=_patient)
        splits = (fold,)
        notes = ("nnFormer's split; its 20 test patients are in imagesTs, the challenge's own 50 are left out",)
    return Conversion(
        ("MR",),
        {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3},
        training,
        testing,
        patients={scan.id: _patient(scan.id) for scan in training},
        splits=splits,
        notes=notes,
    )


def _patient(case: str) -> str:
    return case.split("_")[0]
