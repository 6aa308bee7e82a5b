"""MedNeXt and SegFormer3D, exact to the official weights. Imports need torch and nothing else heavy."""

from sagittal.networks.ends import Ends, network_ends
from sagittal.networks.mednext import MedNeXt, create_mednext
from sagittal.networks.mednext_blocks import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from sagittal.networks.segformer3d import SegFormer3D, create_segformer3d
from sagittal.networks.transfer import transfer
from sagittal.networks.transfer_report import TransferReport
from sagittal.networks.upkern import upkern
from sagittal.networks.weights import LoadReport, load_official_weights
from sagittal.networks.weights_file import read_weights_file

__all__ = [
    "Ends",
    "LoadReport",
    "MedNeXt",
    "MedNeXtBlock",
    "MedNeXtDownBlock",
    "MedNeXtUpBlock",
    "SegFormer3D",
    "TransferReport",
    "create_mednext",
    "create_segformer3d",
    "load_official_weights",
    "network_ends",
    "read_weights_file",
    "transfer",
    "upkern",
]
