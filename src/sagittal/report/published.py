"""What the papers of MedNeXt and SegFormer3D publish: costs and Dice, each figure with where it stands.

Nothing here was measured by this package but the parameter counts that say so; the tests hold those to the code. Papers
round: a count in millions has as many digits as its source gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MEDNEXT_PAPER = "MedNeXt, arXiv 2303.09975"
SEGFORMER3D_PAPER = "SegFormer3D, arXiv 2404.10156"

Standing = Literal["published", "unconfirmed", "left out", "re-run"]
"""published: as the paper prints it. unconfirmed: copied from the paper once and not checked against a second source.
left out: known for this set and missing from the paper's table. re-run: somebody else's training of the network."""


@dataclass(frozen=True)
class PublishedCost:
    """A row of a paper's table of costs."""

    name: str
    paper: str
    parameters_millions: float
    giga_multiply_adds: float
    """Both papers call them FLOPs; their counts of known networks are multiply-adds."""
    input_shape: tuple[int, int, int, int]
    """C, D, H, W of the image that the row is compared at."""
    outputs: int
    """Classes that it is compared with; they hardly matter."""
    network: str | None
    """Its name in this package, or None where there is no implementation."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """How many parameters a network has, and who says so."""

    millions: float
    source: str
    counted_as: str | None = None
    """For counts of this package's own: the network's name in it."""


@dataclass(frozen=True)
class Score:
    """A network's mean Dice on one data set, in percent."""

    name: str
    dice: float
    standing: Standing
    source: str
    size: Size | None
    """None where no count is known, so that it cannot be drawn."""


@dataclass(frozen=True)
class ScoreSet:
    """The scores of one data set in one paper."""

    title: str
    paper: str
    subtitle: str
    channels: int
    """Of the image."""
    outputs: int
    """Classes with the background, or regions."""
    scores: tuple[Score, ...]

    @property
    def drawn(self) -> tuple[Score, ...]:
        """The scores whose parameters are known."""
        return tuple(score for score in self.scores if score.size is not None)

    @property
    def omitted(self) -> tuple[Score, ...]:
        """The scores that no parameter count is known for."""
        return tuple(score for score in self.scores if score.size is None)


NOTES = {
    "MACs": "MACs are multiply-adds of convolutions, linear layers and attention's two products, in one prediction. As "
    "published: if the network were computed the way its paper describes; for SegFormer3D, what runs here needs fewer.",
    "interpolation": "Interpolation is linear: 8 multiply-adds for each voxel and channel that it makes, not in MACs.",
    "activations": "Train, predict: a step holds this much beside weights and their gradients (and the optimiser's two "
    "moments): the image, activations and their gradients, with the network's own checkpointing, on PyTorch's own "
    "operators. Sagittal's CPU kernels keep less in training.",
    "multiply-adds": "The paper says GFlops; its figures are multiply-adds, at 1 x 128 x 128 x 128 and batch 1.",
    "dummy": "Official counts hold one scalar more, dummy_tensor, which computes nothing.",
    "synapse": "The paper's figure is of nnFormer's Synapse model; its BraTS and ACDC models have 37.6M and 37.2M.",
    "input": "The paper compares networks at different inputs: its competitors' figures are multiply-adds at "
    "1 x 64 x 128 x 128, SegFormer3D's is for another input, which it does not name.",
    "unetr": "UNETR's figure fits 1 x 96 x 96 x 96 (counted here: 73.2 G) better than this input.",
    "17.5": "The paper says 17.5 GFLOPs, which no counter reproduces. Computed as its text describes the network, at "
    "4 x 128 x 128 x 128.",
    "no implementation": "This package has no implementation; published figures only.",
}
"""Remarks on tables of costs, by the keys that `PublishedCost.notes` holds."""

_MEDNEXT_COSTS = {
    ("S", 3): (5.6, 130.0),
    ("S", 5): (5.9, 169.0),
    ("B", 3): (10.5, 170.0),
    ("B", 5): (11.0, 208.0),
    ("M", 3): (17.6, 248.0),
    ("M", 5): (18.3, 308.0),
    ("L", 3): (61.8, 500.0),
    ("L", 5): (63.0, 564.0),
}

_SYNAPSE_INPUT = (1, 64, 128, 128)
_SYNAPSE_OUTPUTS = 9


def _at_synapse(name: str, millions: float, giga: float, network: str | None, *notes: str) -> PublishedCost:
    return PublishedCost(
        name, SEGFORMER3D_PAPER, millions, giga, _SYNAPSE_INPUT, _SYNAPSE_OUTPUTS, network, ("input", *notes)
    )


PUBLISHED_COSTS = (
    *(
        PublishedCost(
            name=f"MedNeXt-{size} k{kernel}",
            paper=MEDNEXT_PAPER,
            parameters_millions=millions,
            giga_multiply_adds=giga,
            input_shape=(1, 128, 128, 128),
            outputs=3,
            network=f"mednext-{size.lower()}" + ("" if kernel == 3 else f"-k{kernel}"),
            notes=("multiply-adds", "dummy"),
        )
        for (size, kernel), (millions, giga) in _MEDNEXT_COSTS.items()
    ),
    _at_synapse("nnFormer", 150.5, 213.4, "nnformer-synapse", "synapse"),
    _at_synapse("TransUNet", 96.07, 88.91, None, "no implementation"),
    _at_synapse("UNETR", 92.49, 75.76, "unetr", "unetr"),
    _at_synapse("SwinUNETR", 62.83, 384.2, "swinunetr"),
    PublishedCost(
        "SegFormer3D", SEGFORMER3D_PAPER, 4.51, 17.5, (4, 128, 128, 128), 3, "segformer3d", ("input", "17.5")
    ),
)

_COUNTED_HERE = "counted on this package's {network} (1 channel, 3 classes)"


def _counted(millions: float, network: str) -> Size:
    return Size(millions, _COUNTED_HERE.format(network=network), network)


# MedNeXt's paper does not print its competitors' parameters. nnFormer has three models and it is not said which one was
# trained; of TransUNet there is no implementation here.
_SIZES_IN_MEDNEXT: dict[str, Size | None] = {
    "nnU-Net": _counted(31.2, "plainconvunet"),
    "UNETR": _counted(92.8, "unetr"),
    "TransUNet": None,
    "TransBTS": _counted(32.7, "transbts"),
    "nnFormer": None,
    "SwinUNETR": _counted(62.2, "swinunetr"),
    "3D UX-Net": _counted(53.0, "3d-uxnet"),
    **{
        f"MedNeXt-{size} k{kernel}": Size(millions, MEDNEXT_PAPER)
        for (size, kernel), (millions, _giga) in _MEDNEXT_COSTS.items()
    },
}

_MEDNEXT_SETS = (
    ("BTCV", "abdomen, CT, 13 organs, 30 cases", 1, 14),
    ("AMOS22", "abdomen, CT, 15 organs, 200 cases", 1, 16),
    ("KiTS19", "kidney and tumour, CT, 210 cases", 1, 3),
    ("BraTS21", "brain tumour, MR, 3 regions, 1251 cases", 4, 3),
)

_MEDNEXT_DICE = {
    "nnU-Net": (83.56, 88.88, 89.88, 91.23),
    "UNETR": (75.06, 81.98, 84.10, 89.65),
    "TransUNet": (76.72, 85.05, 80.82, 89.17),
    "TransBTS": (82.35, 86.52, 87.03, 90.66),
    "nnFormer": (80.76, 84.20, 89.09, 90.42),
    "SwinUNETR": (80.95, 86.83, 87.36, 90.48),
    "3D UX-Net": (80.76, 87.28, 88.39, 90.63),
    "MedNeXt-S k3": (83.90, 89.03, 90.45, 91.27),
    "MedNeXt-B k3": (84.01, 89.14, 91.02, 91.30),
    "MedNeXt-M k3": (84.31, 89.27, 90.78, 91.57),
    "MedNeXt-L k3": (84.57, 89.58, 90.61, 91.57),
    "MedNeXt-S k5": (83.92, 89.27, 90.08, 91.40),
    "MedNeXt-B k5": (84.23, 89.38, 90.30, 91.48),
    "MedNeXt-M k5": (84.41, 89.58, 90.87, 91.49),
    "MedNeXt-L k5": (84.82, 89.87, 90.71, 91.46),
}

_CONFIRMED = {
    ("nnU-Net", "AMOS22"),
    ("nnU-Net", "KiTS19"),
    ("UNETR", "AMOS22"),
    ("UNETR", "KiTS19"),
    ("MedNeXt-M k3", "AMOS22"),
    ("MedNeXt-M k3", "KiTS19"),
    ("MedNeXt-L k3", "BTCV"),
    ("MedNeXt-L k3", "AMOS22"),
    ("MedNeXt-B k5", "BTCV"),
}
"""Cells of MedNeXt's table that a second source gives as well."""


def _mednext_set(column: int) -> ScoreSet:
    title, subtitle, channels, outputs = _MEDNEXT_SETS[column]
    scores = tuple(
        Score(
            name,
            row[column],
            "published" if (name, title) in _CONFIRMED else "unconfirmed",
            f"{MEDNEXT_PAPER}, five-fold Dice",
            _SIZES_IN_MEDNEXT[name],
        )
        for name, row in _MEDNEXT_DICE.items()
    )
    return ScoreSet(title, MEDNEXT_PAPER, subtitle, channels, outputs, scores)


_TABLE_1 = f"{SEGFORMER3D_PAPER}, table 1"
_SEGFORMER3D_SIZES = {
    "SegFormer3D": Size(4.51, _TABLE_1),
    "UNETR": Size(92.49, _TABLE_1),
    "TransUNet": Size(96.07, _TABLE_1),
    "SwinUNETR": Size(62.83, _TABLE_1),
    "TransBTS": _counted(32.7, "transbts"),
}
_NNFORMER_SIZES = {
    "Synapse": Size(150.5, _TABLE_1),
    "BraTS": Size(37.6, "nnFormer's model for BraTS; the paper gives its Synapse model's 150.5M", "nnformer-tumour"),
    "ACDC": Size(37.2, "nnFormer's model for ACDC; the paper gives its Synapse model's 150.5M", "nnformer-acdc"),
}

_SEGFORMER3D_DICE = {
    "BraTS": {
        "nnFormer": 86.4,
        "SegFormer3D": 82.1,
        "UNETR": 71.1,
        "TransBTS": 69.6,
        "CoTr": 68.3,
        "CoTr w/o CNN": 64.4,
        "TransUNet": 64.4,
        "SETR MLA": 63.9,
        "SETR PUP": 63.8,
        "SETR NUP": 63.7,
    },
    "Synapse": {
        "nnFormer": 86.57,
        "SegFormer3D": 82.15,
        "MISSFormer": 81.96,
        "UNETR": 79.56,
        "Swin-UNet": 79.13,
        "LeViT-UNet-384": 78.53,
        "TransClaw U-Net": 78.09,
        "TransUNet": 77.48,
        "R50-ViT+CUP": 71.29,
        "ViT+CUP": 67.86,
    },
    "ACDC": {
        "nnFormer": 92.06,
        "SegFormer3D": 90.96,
        "LeViT-UNet-384": 90.32,
        "Swin-UNet": 90.00,
        "TransUNet": 89.71,
        "UNETR": 88.61,
        "R50-ViT-CUP": 87.57,
        "ViT-CUP": 81.45,
    },
}

_LEFT_OUT = "published; not in SegFormer3D's table"

_BESIDE = {
    "Synapse": (
        Score("UNETR++", 87.22, "left out", _LEFT_OUT, Size(42.96, "UNETR++, as published")),
        Score("SwinUNETR", 83.48, "left out", _LEFT_OUT, _SEGFORMER3D_SIZES["SwinUNETR"]),
    ),
    "ACDC": tuple(
        Score("SegFormer3D re-run", dice, "re-run", "independent re-run", _SEGFORMER3D_SIZES["SegFormer3D"])
        for dice in (89.42, 85.0)
    ),
}
"""What SegFormer3D's tables leave out and belongs beside them."""


def _segformer3d_set(title: str, subtitle: str, channels: int, outputs: int) -> ScoreSet:
    source = f"{SEGFORMER3D_PAPER}, {title} table, mean Dice"
    scores = tuple(
        Score(
            name,
            dice,
            "published",
            source,
            _NNFORMER_SIZES[title] if name == "nnFormer" else _SEGFORMER3D_SIZES.get(name),
        )
        for name, dice in _SEGFORMER3D_DICE[title].items()
    )
    return ScoreSet(title, SEGFORMER3D_PAPER, subtitle, channels, outputs, scores + _BESIDE.get(title, ()))


SCORE_SETS = (
    *(_mednext_set(column) for column in range(len(_MEDNEXT_SETS))),
    _segformer3d_set("BraTS", "brain tumour, MR, 3 regions (MSD)", 4, 3),
    _segformer3d_set("Synapse", "abdomen, CT, 8 organs", 1, _SYNAPSE_OUTPUTS),
    _segformer3d_set("ACDC", "heart, MR, 3 structures", 1, 4),
)
"""Every data set of both papers, in their order."""
