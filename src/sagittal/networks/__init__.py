"""MedNeXt and SegFormer3D, exact to the official weights. Imports need torch and nothing else heavy."""

from sagittal.networks.mednext import MedNeXt, create_mednext
from sagittal.networks.mednext_blocks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from sagittal.networks.segformer3d import SegFormer3D, create_segformer3d
from sagittal.networks.weights import load_official_weights

__all__ = [
    "MedNeXt",
    "MedNeXtBlock",
    "MedNeXtDownBlock",
    "MedNeXtUpBlock",
    "SegFormer3D",
    "create_mednext",
    "create_segformer3d",
    "load_official_weights",
]
