"""Folders as nnU-Net v2 leaves them behind, made without nnU-Net: for tests of the import."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures import unet
from torch import nn

PATCH = [8, 12, 16]
ARGUMENTS: dict[str, Any] = {
    "n_stages": 3,
    "features_per_stage": [2, 4, 6],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 1, 1],
    "n_conv_per_stage_decoder": [1, 2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
DECLARED: dict[str, Any] = {
    "channel_names": {"0": "CT", "1": "T1"},
    "labels": {"background": 0, "left": 1, "right": 2},
    "numTraining": 7,
    "file_ending": ".nii.gz",
    "licence": "CC-BY 4.0",
}
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset007_Small",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [2, 0, 1],
    "transpose_backward": [1, 2, 0],
    "configurations": {
        "3d_fullres": {
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 3,
            "patch_size": PATCH,
            "spacing": [3.0, 1.25, 1.5],
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
            "use_mask_for_norm": [False, True],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": RESAMPLING,
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {**RESAMPLING, "order": 1},
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": ARGUMENTS,
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
            "batch_dice": True,
        }
    },
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
        str(channel): {"mean": 10.0, "std": 20.0, "percentile_00_5": -50, "percentile_99_5": 90.5} for channel in (0, 1)
    },
}


def plans(**configuration: Any) -> dict[str, Any]:
    """Return plans.json with entries of 3d_fullres changed."""
    content = copy.deepcopy(PLANS)
    content["configurations"]["3d_fullres"] |= configuration
    return content


def with_arguments(**arguments: Any) -> dict[str, Any]:
    """Return plans.json with arguments of the network changed."""
    content = copy.deepcopy(PLANS)
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= arguments
    return content


def residual_plans() -> dict[str, Any]:
    """Return plans.json of a ResidualEncoderUNet."""
    content = copy.deepcopy(PLANS)
    architecture = content["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    del architecture["arch_kwargs"]["n_conv_per_stage"]
    architecture["arch_kwargs"] |= {"n_blocks_per_stage": [1, 2, 1], "n_conv_per_stage_decoder": [1, 1]}
    return content


def network_of(content: dict[str, Any], *, channels: int = 2, outputs: int = 3, seed: int = 0) -> nn.Module:
    """Return the library's network, as nnU-Net builds it from plans, with random weights."""
    architecture = content["configurations"]["3d_fullres"]["architecture"]
    kind = getattr(unet, architecture["network_class_name"].rpartition(".")[2])
    classes = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU, "dropout_op": None}
    torch.manual_seed(seed)
    network: nn.Module = kind(
        channels, num_classes=outputs, deep_supervision=False, **(architecture["arch_kwargs"] | classes)
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        # Each output is the largest somewhere.
        logits = network.eval()(torch.randn(1, channels, *PATCH))
        network.get_parameter(f"decoder.seg_layers.{len(architecture['arch_kwargs']['strides']) - 2}.bias").sub_(
            logits.mean((0, 2, 3, 4))
        )
    return network


def checkpoint(network: nn.Module, **entries: Any) -> dict[str, Any]:
    """Return what nnU-Net 2.8 saves for a fold: numbers of numpy among its logs, a device among its arguments."""
    return {
        "network_weights": OrderedDict(network.state_dict()),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "params": [0, 1]}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.5), np.float64(1)]]},
        "_best_ema": np.float64(0.7),
        "current_epoch": 3,
        "init_args": {
            "plans": PLANS,
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": DECLARED,
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 2),
        **entries,
    }


def write_model(
    folder: Path,
    *,
    content: dict[str, Any] | None = None,
    declared: dict[str, Any] | None = None,
    folds: dict[str, dict[str, Any]] | None = None,
    name: str = "checkpoint_final.pth",
) -> Path:
    """Write a trained model's folder and return it; by default of one fold with random weights."""
    content = PLANS if content is None else content
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(DECLARED if declared is None else declared))
    for fold, saved in ({"0": checkpoint(network_of(content))} if folds is None else folds).items():
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(saved, folder / f"fold_{fold}" / name)
    return folder
