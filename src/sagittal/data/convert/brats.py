"""BraTS as it was distributed until 2021: CASE/CASE_t1.nii.gz, CASE_t1ce, CASE_t2, CASE_flair and CASE_seg.

The label values 1 (necrotic core), 2 (oedema) and 4 (enhancing tumour) stay as they are; what is trained and scored
are the challenge's three overlapping regions.
"""

from __future__ import annotations

from sagittal.data.catalogue import Protocol
from sagittal.data.convert.conversion import Conversion, Scan
from sagittal.data.convert.files import find
from sagittal.data.convert.source import Source
from sagittal.errors import DataError

_CHANNELS = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}


def read_brats(source: Source, name: str, protocol: Protocol | None) -> Conversion:
    """Return what becomes of BraTS's files; cases without a label map go to imagesTs.

    Raises:
        DataError: files are missing.
    """
    channels = {channel: find(source, rf"(?P<case>[^/]+)_{channel}\.nii(\.gz)?") for channel in _CHANNELS}
    labels = find(source, r"(?P<case>[^/]+)_seg\.nii(\.gz)?")
    cases = sorted(set(labels).union(*channels.values()))
    missing = [f"{case}_{channel}" for case in cases for channel, files in channels.items() if case not in files]
    if missing or not labels:
        what = f"{missing[0]} is missing" if missing else "no CASE_seg.nii.gz found"
        raise DataError(
            f"{what}. Expected CASE_t1, CASE_t1ce, CASE_t2, CASE_flair and CASE_seg.nii.gz of every training case. "
            "Fetch the data set again; is it the one that was named?",
            code="incomplete" if missing else "other_layout",
        )
    scans = [Scan(case, tuple(files[case] for files in channels.values()), labels.get(case)) for case in cases]
    return Conversion(
        tuple(_CHANNELS.values()),
        {"background": 0, "whole tumour": [1, 2, 4], "tumour core": [1, 4], "enhancing tumour": 4},
        tuple(scan for scan in scans if scan.labels is not None),
        tuple(scan for scan in scans if scan.labels is None),
        regions_class_order=(2, 1, 4),
    )
