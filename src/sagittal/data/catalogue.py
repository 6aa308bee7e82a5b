"""The public data sets of the MedNeXt and SegFormer3D papers and of the Medical Segmentation Decathlon.

What stands here was read in public sources on 22 November 2026; what could not be found there is in `unverified` and
left out otherwise. Licences change and publishers move files: the publisher's page is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sagittal.errors import DataError, did_you_mean

Protocol = Literal["nnformer"]
Access = Literal["fetch", "registration", "script"]


@dataclass(frozen=True)
class Download:
    """A file that anyone may fetch.

    Attributes:
        url: its address.
        name: what it is called here.
        md5: the checksum that the host publishes, None where none is known.
        md5_source: who publishes it.
    """

    url: str
    name: str
    md5: str | None = None
    md5_source: str = ""


@dataclass(frozen=True)
class PublicDataset:
    """A public data set: what it is, under which terms, how to get it, how it is laid out.

    Attributes:
        name: what it is called on the command line.
        title: what its publishers call it.
        modality: CT or MR, and the channels where there are several.
        labels: what is segmented.
        cases: labelled cases as published; volumes, of which ACDC has two of each patient.
        licence: as its publishers state it.
        address: the publisher's page.
        citation: what to cite.
        access: by `fetch`, after a registration, or by the publisher's own script.
        layout: the module of `sagittal.data.convert` that reads its files.
        downloads: what `fetch` gets.
        how: how to get it otherwise.
        protocols: other ways of using it than all cases in folds; see docs/datasets.md.
        unverified: what could not be confirmed in a public source.
    """

    name: str
    title: str
    modality: str
    labels: str
    cases: int
    licence: str
    address: str
    citation: str
    access: Access
    layout: str
    downloads: tuple[Download, ...] = ()
    how: str = ""
    protocols: tuple[Protocol, ...] = ()
    unverified: tuple[str, ...] = ()


_NO_SIZE = "the archive's size: the server tells it when the download begins"
_NO_CHECKSUM = "a checksum of the publisher's: the SHA-256 of the first download is recorded, and later ones compared"

_MSD_BUCKET = "https://msd-for-monai.s3-us-west-2.amazonaws.com"
_MSD_TASKS: tuple[tuple[str, str, str, str, int, str], ...] = (
    # folder, modality, labels, title, labelled cases, MD5 of the archive (MONAI's DecathlonDataset)
    (
        "Task01_BrainTumour",
        "MR (FLAIR, T1w, T1gd, T2w)",
        "oedema, non-enhancing and enhancing tumour",
        "Brain tumours",
        484,
        "240a19d752f0d9e9101544901065d872",
    ),
    ("Task02_Heart", "MR", "left atrium", "Heart", 20, "06ee59366e1e5124267b774dbd654057"),
    ("Task03_Liver", "CT", "liver, tumour", "Liver", 131, "a90ec6c4aa7f6a3d087205e23d4e6397"),
    (
        "Task04_Hippocampus",
        "MR",
        "anterior and posterior hippocampus",
        "Hippocampus",
        260,
        "9d24dba78a72977dbd1d2e110310f31b",
    ),
    (
        "Task05_Prostate",
        "MR (T2, ADC)",
        "peripheral and transition zone",
        "Prostate",
        32,
        "35138f08b1efaef89d7424d2bcc928db",
    ),
    ("Task06_Lung", "CT", "cancer", "Lung", 63, "8afd997733c7fc0432f71255ba4e52dc"),
    ("Task07_Pancreas", "CT", "pancreas, tumour", "Pancreas", 281, "4f7080cfca169fa8066d17ce6eb061e4"),
    ("Task08_HepaticVessel", "CT", "vessel, tumour", "Hepatic vessels", 303, "641d79e80ec66453921d997fbf12a29c"),
    ("Task09_Spleen", "CT", "spleen", "Spleen", 41, "410d4a301da4e5b2f6f86ec3ddba524e"),
    ("Task10_Colon", "CT", "cancer", "Colon", 126, "bad7a188931dc2f6acf72b08eb6202d0"),
)

_OTHER_COUNTS = {
    "04": ("that there are 260 cases: the paper counts 263",),
    "06": ("that there are 63 cases: the paper counts 64",),
}


def _msd(folder: str, modality: str, labels: str, title: str, cases: int, md5: str) -> PublicDataset:
    number = folder[4:6]
    return PublicDataset(
        name=f"msd-task{number}",
        title=f"Medical Segmentation Decathlon, task {int(number)}: {title}",
        modality=modality,
        labels=labels,
        cases=cases,
        licence="CC BY-SA 4.0",
        address="http://medicaldecathlon.com",
        citation="Antonelli et al. 2022, doi:10.1038/s41467-022-30695-9; Simpson et al. 2019, arXiv:1902.09063",
        access="fetch",
        layout="msd",
        downloads=(
            Download(
                f"{_MSD_BUCKET}/{folder}.tar",
                f"{folder}.tar",
                md5,
                "MONAI's DecathlonDataset, for the copy of the Decathlon on the Registry of Open Data on AWS",
            ),
        ),
        protocols=("nnformer",) if number == "01" else (),
        unverified=(_NO_SIZE, *_OTHER_COUNTS.get(number, ())),
    )


_OTHERS = (
    PublicDataset(
        name="btcv",
        title="BTCV / Synapse multi-organ: Multi-Atlas Labeling Beyond the Cranial Vault, abdomen",
        modality="CT",
        labels="13 organs and vessels of the abdomen",
        cases=30,
        licence="shown by the publisher at registration",
        address="https://www.synapse.org/Synapse:syn3193805/wiki/217789",
        citation="Landman et al. 2015, MICCAI Multi-Atlas Labeling Beyond the Cranial Vault, doi:10.7303/syn3193805",
        access="registration",
        layout="btcv",
        how="Register at synapse.org, join the challenge and accept its terms; download Abdomen's RawData.zip.",
        protocols=("nnformer",),
        unverified=("the licence's name", "the archive's size", "a checksum of the publisher's"),
    ),
    PublicDataset(
        name="acdc",
        title="ACDC: Automated Cardiac Diagnosis Challenge",
        modality="MR (cine, end of diastole and of systole)",
        labels="right ventricle, myocardium, left ventricle",
        cases=200,
        licence="CC BY-NC-SA 4.0, as a copy of the data set states; the publisher asks to be cited",
        address="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html",
        citation="Bernard et al. 2018, doi:10.1109/TMI.2018.2837502",
        access="fetch",
        layout="acdc",
        downloads=(
            Download(
                "https://humanheart-project.creatis.insa-lyon.fr/database/api/v1/folder/637218e573e9f0047faa00fc/download",
                "acdc.zip",
            ),
        ),
        protocols=("nnformer",),
        unverified=("the licence, on the publisher's own page", _NO_SIZE, _NO_CHECKSUM),
    ),
    *(
        PublicDataset(
            name=name,
            title=f"AMOS22: Abdominal Multi-Organ Segmentation, the {modality} scans",
            modality=modality,
            labels="15 abdominal organs",
            cases=cases,
            licence="CC BY 4.0, as copies of the Zenodo record state",
            address="https://zenodo.org/records/7262581",
            citation="Ji et al. 2022, arXiv:2206.08023",
            access="fetch",
            layout="amos",
            downloads=(Download("https://zenodo.org/record/7262581/files/amos22.zip", "amos22.zip"),),
            unverified=("the licence, on the publisher's own page", _NO_SIZE, _NO_CHECKSUM),
        )
        for name, modality, cases in (("amos22", "CT", 200), ("amos22-mr", "MR", 40))
    ),
    PublicDataset(
        name="kits19",
        title="KiTS19: Kidney Tumor Segmentation 2019",
        modality="CT",
        labels="kidney, tumour",
        cases=210,
        licence="CC BY-NC-SA 4.0, as users of the data state",
        address="https://github.com/neheller/kits19",
        citation="Heller et al. 2019, arXiv:1904.00445; Heller et al. 2021, doi:10.1016/j.media.2020.101821",
        access="script",
        layout="kits",
        how="git clone https://github.com/neheller/kits19, then 'python3 -m starter_code.get_imaging' in it; 20 GB.",
        unverified=("the licence, on the publisher's own page", "a checksum of the publisher's"),
    ),
    PublicDataset(
        name="kits23",
        title="KiTS23: Kidney Tumor Segmentation 2023",
        modality="CT",
        labels="kidney, tumour, cyst; as the challenge's three overlapping classes",
        cases=489,
        licence="CC BY-NC-SA",
        address="https://github.com/neheller/kits23",
        citation="Heller et al. 2023, arXiv:2307.01984",
        access="script",
        layout="kits",
        how="git clone https://github.com/neheller/kits23, 'pip install -e .' in it, then its 'kits23_download_data'.",
        unverified=("the version of the licence", "the number of cases", "the size", "a checksum of the publisher's"),
    ),
    PublicDataset(
        name="brats2021",
        title="RSNA-ASNR-MICCAI BraTS 2021, task 1: brain tumour segmentation",
        modality="MR (T1, T1ce, T2, FLAIR)",
        labels="whole tumour, tumour core, enhancing tumour (overlapping)",
        cases=1251,
        licence="shown by the publisher at registration",
        address="https://www.synapse.org/Synapse:syn25829067",
        citation="Baid et al. 2021, arXiv:2107.02314",
        access="registration",
        layout="brats",
        how="Register at synapse.org, join the challenge and accept its terms; download the training data.",
        unverified=("the licence's name", "the archive's size", "a checksum of the publisher's"),
    ),
    PublicDataset(
        name="lits",
        title="LiTS: Liver Tumor Segmentation Benchmark",
        modality="CT",
        labels="liver, tumour",
        cases=131,
        licence="shown by the publisher at registration",
        address="https://competitions.codalab.org/competitions/17094",
        citation="Bilic et al. 2023, doi:10.1016/j.media.2022.102680",
        access="registration",
        layout="lits",
        how="Register at codalab.org, join the competition; download both training batches. Open: msd-task03, whose "
        "publishers name LiTS as its source.",
        unverified=("the licence's name", "the archives' size", "a checksum of the publisher's"),
    ),
)

CATALOGUE: dict[str, PublicDataset] = {entry.name: entry for entry in (*(_msd(*task) for task in _MSD_TASKS), *_OTHERS)}


def public_dataset(name: str) -> PublicDataset:
    """Return the data set of this name, in any case.

    Raises:
        DataError: there is none.
    """
    entry = CATALOGUE.get(name.lower())
    if entry is None:
        raise DataError(f"{name}: not a data set of the catalogue.{did_you_mean(name, CATALOGUE)}", code="unknown_name")
    return entry
