"""WHAT to do: frozen values, torch-free. See `plan.plan` for the Plan itself."""

from sagittal.plan.base import Frozen
from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.plan.fingerprint import ChannelIntensities, Fingerprint
from sagittal.plan.networks import NETWORKS, MedNeXtConfig, NetworkConfig, SegFormer3DConfig, network_config
from sagittal.plan.plan import Plan

__all__ = [
    "NETWORKS",
    "ChannelIntensities",
    "DatasetSpec",
    "Fingerprint",
    "Frozen",
    "Label",
    "MedNeXtConfig",
    "NetworkConfig",
    "Plan",
    "SegFormer3DConfig",
    "network_config",
]
