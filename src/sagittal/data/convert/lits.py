"""LiTS: volume-0.nii and segmentation-0.nii from two training batches, test-volume-0.nii."""

from __future__ import annotations

from sagittal.data.catalogue import Protocol
from sagittal.data.convert.conversion import Conversion
from sagittal.data.convert.files import find, paired, unlabelled
from sagittal.data.convert.source import Source


def read_lits(source: Source, name: str, protocol: Protocol | None) -> Conversion:
    """Return what becomes of LiTS's files; cases are called volume-0.

    Raises:
        DataError: files are missing.
    """
    images = find(source, r"volume-(?P<case>\d+)\.nii(\.gz)?")
    labels = find(source, r"segmentation-(?P<case>\d+)\.nii(\.gz)?")
    training = paired(
        {f"volume-{case}": file for case, file in images.items()},
        {f"volume-{case}": file for case, file in labels.items()},
        "volume-0.nii and segmentation-0.nii",
    )
    tests = find(source, r"(?P<case>test-volume-\d+)\.nii(\.gz)?")
    return Conversion(("CT",), {"background": 0, "liver": 1, "tumour": 2}, training, unlabelled(tests))
