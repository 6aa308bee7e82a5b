"""KiTS19 and KiTS23: data/case_00000/imaging.nii.gz and segmentation.nii.gz (KiTS23: dataset/case_00000/...)."""

from __future__ import annotations

from collections.abc import Mapping

from sagittal.data.catalogue import Protocol
from sagittal.data.convert.conversion import Conversion
from sagittal.data.convert.files import find, paired, unlabelled
from sagittal.data.convert.source import Source

_KITS19: Mapping[str, int | list[int]] = {"background": 0, "kidney": 1, "tumour": 2}
# What the challenge scores: kidney with all masses, all masses, tumours. Written as 1 kidney, 3 cyst, 2 tumour.
_KITS23: Mapping[str, int | list[int]] = {
    "background": 0,
    "kidney and masses": [1, 2, 3],
    "masses": [2, 3],
    "tumour": 2,
}
_KITS23_ORDER = (1, 3, 2)
FIRST_TEST_CASE_19 = 210


def read_kits(source: Source, name: str, protocol: Protocol | None) -> Conversion:
    """Return what becomes of the files of `kits19` (two classes) or `kits23` (the challenge's three regions).

    Scans of KiTS19's unlabelled test cases go to imagesTs; single annotations (instances) are left out.

    Raises:
        DataError: files are missing.
    """
    images = find(source, r"(?P<case>case_\d{5})/imaging\.nii(\.gz)?")
    labels = find(source, r"(?P<case>case_\d{5})/segmentation\.nii(\.gz)?")
    is_19 = name == "kits19"
    tests = {
        case: file
        for case, file in images.items()
        if is_19 and int(case[5:]) >= FIRST_TEST_CASE_19 and case not in labels
    }
    training = paired(
        {case: file for case, file in images.items() if case not in tests},
        labels,
        "case_00000/imaging.nii.gz and segmentation.nii.gz beside it",
    )
    return Conversion(
        ("CT",),
        _KITS19 if is_19 else _KITS23,
        training,
        unlabelled(tests),
        regions_class_order=() if is_19 else _KITS23_ORDER,
    )
