"""AMOS22: amos22/imagesTr/amos_0001.nii.gz, labelsTr, imagesVa, labelsVa, imagesTs; CT and MR in the same folders."""

from __future__ import annotations

from sagittal.data.catalogue import Protocol
from sagittal.data.convert.conversion import Conversion
from sagittal.data.convert.files import find, paired
from sagittal.data.convert.source import Source

LAST_CT = 500
"""The readme says that ids below 500 are CT, and that there are 500 of these: the id 500 is one."""
_ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gall bladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate/uterus",
)


def read_amos(source: Source, name: str, protocol: Protocol | None) -> Conversion:
    """Return what becomes of AMOS22's files; of `amos22` the CT scans, of `amos22-mr` the MR scans.

    The labelled validation cases go to imagesTs and labelsTs; the unlabelled test cases are left out.

    Raises:
        DataError: files are missing.
    """
    wants_ct = name == "amos22"

    def files(folder: str) -> dict[str, str]:
        found = find(source, rf"{folder}/(?P<case>amos_\d{{4}})\.nii(\.gz)?")
        return {case: file for case, file in found.items() if (int(case[5:]) <= LAST_CT) == wants_ct}

    training = paired(files("imagesTr"), files("labelsTr"), "imagesTr/amos_0001.nii.gz and labelsTr/amos_0001.nii.gz")
    images, labels = files("imagesVa"), files("labelsVa")
    both = images or labels
    testing = paired(images, labels, "imagesVa/amos_0008.nii.gz and labelsVa/amos_0008.nii.gz") if both else ()
    return Conversion(
        ("CT" if wants_ct else "MR",),
        {"background": 0, **{organ: number for number, organ in enumerate(_ORGANS, start=1)}},
        training,
        testing,
        notes=("the validation cases of the challenge are in imagesTs, with labels; its test cases are left out",),
    )
