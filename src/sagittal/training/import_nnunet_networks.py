"""nnU-Net's networks in terms of ours: a U-Net from its plans, a MedNeXt from its tensors, and the weights fitted.

A plans.json names a U-Net by class and arguments. A MedNeXt trained in a fork of nnU-Net is built by that fork's
trainer instead, whatever the plans say, so it is told by its tensors, whose names and shapes hold all of its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sagittal.errors import PlanError
from sagittal.networks.weights import misfit
from sagittal.plan.base import describe_validation_error
from sagittal.plan.baselines import PlainConvUNetConfig, ResEncUNetConfig
from sagittal.plan.mednext import MEDNEXT, MedNeXtConfig
from sagittal.training.import_nnunet_plans import Entries

_UNETS: Mapping[str, tuple[type[PlainConvUNetConfig | ResEncUNetConfig], str]] = MappingProxyType(
    {
        "PlainConvUNet": (PlainConvUNetConfig, "n_conv_per_stage"),
        "ResidualEncoderUNet": (ResEncUNetConfig, "n_blocks_per_stage"),
    }
)
_PACKAGE = "dynamic_network_architectures"
_AS_BUILT: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "conv_op": ("torch.nn.modules.conv.Conv3d", "torch.nn.Conv3d"),
        "conv_bias": (True,),
        "norm_op": ("torch.nn.modules.instancenorm.InstanceNorm3d", "torch.nn.InstanceNorm3d"),
        "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
        "dropout_op": (None,),
        "dropout_op_kwargs": (None, {}),
        "nonlin": ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
        "nonlin_kwargs": ({"inplace": True}, {"inplace": True, "negative_slope": 0.01}, {}, None),
        "nonlin_first": (False,),
        "bottleneck_channels": (None,),
        "stem_channels": (None,),
    }
)
"""Arguments that a configuration has no field for, and the values that our networks are built with."""
_MUST_BE_TOLD = ("conv_op", "conv_bias", "norm_op", "norm_op_kwargs", "nonlin")
"""Of these, the ones whose defaults in nnU-Net's library are other than ours."""
_STAGES = (
    *(f"enc_block_{level}" for level in range(4)),
    "bottleneck",
    *(f"dec_block_{level}" for level in reversed(range(4))),
)
_TWIN_INDEX = MappingProxyType({"conv": 0, "norm": 1})
"""Where a convolution and its norm stand among `all_modules`, beside their other names."""


def unet_config(configuration: Entries, *, deep_supervision: bool) -> PlainConvUNetConfig | ResEncUNetConfig:
    """Return the U-Net that a configuration of plans.json describes, also in the form of nnU-Net before 2.5.

    Args:
        configuration: see `import_nnunet_plans.configuration_of`.
        deep_supervision: whether the heads at the coarse scales were trained.

    Raises:
        PlanError: another network, or an argument that ours is not built with, by its name.
    """
    if "architecture" in configuration.values:
        architecture = configuration.part("architecture")
        name = architecture.get("network_class_name", str)
        package, _, title = name.rpartition(".")
        title = title if package.startswith(_PACKAGE) else name
        arguments = architecture.part("arch_kwargs")
    else:
        title = configuration.get("UNet_class_name", str)
        arguments = _old_arguments(configuration)
    if title not in _UNETS:
        expected = f"{' or '.join(_UNETS)} of {_PACKAGE}, or the weights of a MedNeXt"
        raise configuration.refuse(f"the network is a {title}", expected)
    kind, blocks = _UNETS[title]
    _require_as_built(arguments, blocks)
    stages = arguments.get("n_stages", int)
    sizes = {
        "features_per_stage": _per_stage(arguments, "features_per_stage", stages),
        "strides": _triples(arguments, "strides", stages),
        "kernel_sizes": _triples(arguments, "kernel_sizes", stages),
        blocks: _per_stage(arguments, blocks, stages),
        "n_conv_per_stage_decoder": _per_stage(arguments, "n_conv_per_stage_decoder", stages - 1),
    }
    try:
        return kind.model_validate({**sizes, "deep_supervision": deep_supervision})
    except ValidationError as error:
        raise PlanError(describe_validation_error(error, arguments.where), code="nnunet_plans") from None


def is_mednext(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors, under their official names, are a MedNeXt's."""
    return "enc_block_0.0.conv1.weight" in tensors and "stem.weight" in tensors


def mednext_config(tensors: Mapping[str, Tensor], source: str) -> MedNeXtConfig:
    """Return the MedNeXt whose tensors these are, as far as names and shapes tell.

    They do not tell the kind of norm, nor whether a block's input is added to its output: both are taken as in the
    official networks.

    Args:
        tensors: by their official names.
        source: what messages call them.

    Raises:
        PlanError: tensors are missing, or there is no such MedNeXt.
    """
    try:
        counts = tuple(_count(tensors, stage) for stage in _STAGES)
        wide = [tensors[f"{stage}.0.conv2.weight"].shape for stage in _STAGES]
        kernel, inner = (tensors[f"{stage}.0.conv1.weight"].shape[-1] for stage in ("enc_block_0", "bottleneck"))
        channels = tensors["stem.weight"].shape[0]
        ratios = tuple(shape[0] // shape[1] for shape in wide)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise PlanError(
            f"{source}: tensors of a MedNeXt, but {error} is missing or has no such shape. Expected all of its five "
            "levels under their official names; this is another network, or a part of one.",
            code="weights_mismatch",
        ) from None
    grn: Any = "v2" if "down_0.grn_gamma" in tensors else "down_1.grn_gamma" in tensors
    values = {
        "channels": channels,
        "expansion_ratio": ratios[0] if len(set(ratios)) == 1 else ratios,
        "kernel_size": kernel,
        "decoder_kernel_size": None if inner == kernel else inner,
        "block_counts": counts,
        "deep_supervision": "out_1.conv_out.weight" in tensors,
        "grn": grn,
        "resampling_residual": "down_0.res_conv.weight" in tensors,
    }
    try:
        config = MedNeXtConfig.model_validate(values)
    except ValidationError as error:
        raise PlanError(describe_validation_error(error, source), code="weights_mismatch") from None
    published = MEDNEXT.get(mednext_name(config))
    return config if published is None else config.replace(checkpointing=published.checkpointing)


def mednext_name(config: MedNeXtConfig) -> str:
    """Return the name of the published MedNeXt that has these sizes; else that of the smallest with its kernel."""

    def bare(network: MedNeXtConfig) -> MedNeXtConfig:
        return network.replace(deep_supervision=False, checkpointing=False)

    fitting = [name for name, network in MEDNEXT.items() if bare(network) == bare(config)]
    return fitting[0] if fitting else "mednext-s" if config.kernel_size == 3 else f"mednext-s-k{config.kernel_size}"


def without_twins(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the tensors of nnU-Net's U-Net under one name each.

    nnU-Net's state dicts hold most tensors twice or four times: a convolution as `conv` and as `all_modules.0`, and the
    encoder again below the decoder.

    Args:
        tensors: by nnU-Net's names.
        source: what messages call them.

    Raises:
        PlanError: two names of one tensor hold different values.
    """
    single: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, tensor in tensors.items():
        own = _own_name(name)
        if own not in single:
            single[own], first[own] = tensor, name
        elif not (single[own].shape == tensor.shape and torch.equal(single[own], tensor)):
            raise PlanError(
                f"{source}: {first[own]} and {name} hold different values. Expected the same tensor under both names, "
                "as nnU-Net saves it. The file was changed; get it from its maker again.",
                code="weights_mismatch",
            )
    return single


def require_all(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, advice: str) -> None:
    """Check that tensors are exactly those of a network, in shape and kind.

    Raises:
        PlanError: any is missing, unexpected, of another shape, or not of floating-point numbers; each is named.
    """
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = {
        name: (tuple(tensors[name].shape), tuple(tensor.shape))
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    }
    if missing or unexpected or misshapen:
        what = f"{source}: the weights do not fit the network of plans.json"
        raise misfit(what, missing, unexpected, misshapen, advice=advice)
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point() or tensor.layout != torch.strided]
    if odd:
        raise PlanError(
            f"{source}: {odd[0]} is of {tensors[odd[0]].dtype}, {tensors[odd[0]].layout}. Expected floating-point "
            "numbers in dense tensors. Get the file from its maker again.",
            code="weights_mismatch",
        )


def without_coarse_heads(tensors: Mapping[str, Tensor], finest: int) -> dict[str, Tensor]:
    """Return the tensors of a U-Net without the heads that only training uses; `finest` is the one that is kept."""
    kept = f"decoder.seg_layers.{finest}."
    return {name: t for name, t in tensors.items() if not name.startswith("decoder.seg_layers.") or kept in name}


def _own_name(name: str) -> str:
    """Return the name that our network keeps for a tensor of nnU-Net's."""
    if name.startswith("decoder.encoder."):
        name = name.removeprefix("decoder.")
    module, _, parameter = name.rpartition(".")
    owner, _, field = module.rpartition(".")
    if field not in _TWIN_INDEX or not owner:
        return name
    return f"{owner}.all_modules.{_TWIN_INDEX[field]}.{parameter}"


def _old_arguments(configuration: Entries) -> Entries:
    """Return the network's arguments from plans of nnU-Net before 2.5, which have them in the configuration itself."""
    strides = configuration.get("pool_op_kernel_sizes", list)
    base, most = (configuration.get(name, int) for name in ("UNet_base_num_features", "unet_max_num_features"))
    residual = configuration.values.get("UNet_class_name") == "ResidualEncoderUNet"
    values = {name: choices[0] for name, choices in _AS_BUILT.items()}
    values |= {
        "n_stages": len(strides),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(len(strides))],
        "strides": strides,
        "kernel_sizes": configuration.get("conv_kernel_sizes", list),
        "n_blocks_per_stage" if residual else "n_conv_per_stage": configuration.get("n_conv_per_stage_encoder", list),
        "n_conv_per_stage_decoder": configuration.get("n_conv_per_stage_decoder", list),
    }
    return Entries(values, configuration.where)


def _require_as_built(arguments: Entries, blocks: str) -> None:
    sizes = {"n_stages", "features_per_stage", "strides", "kernel_sizes", blocks, "n_conv_per_stage_decoder"}
    for name, value in arguments.values.items():
        if name in sizes or name == "deep_supervision":
            continue
        if name not in _AS_BUILT:
            raise arguments.refuse(f"the network has the argument {name}", "nnU-Net's own")
        if value not in _AS_BUILT[name]:
            raise arguments.refuse(f"{name} is {value}", f"{_AS_BUILT[name][0]}, nnU-Net's own")
    untold = [name for name in _MUST_BE_TOLD if name not in arguments.values]
    if untold:
        raise arguments.refuse(
            f"{', '.join(untold)} left to a default", f"{_AS_BUILT[untold[0]][0]}, as nnU-Net writes it"
        )


def _per_stage(arguments: Entries, name: str, count: int) -> tuple[int, ...]:
    value = arguments.get(name, list, int)
    return (value,) * count if isinstance(value, int) else tuple(arguments.numbers(name))


def _triples(arguments: Entries, name: str, count: int) -> tuple[tuple[int, ...], ...]:
    value = arguments.get(name, list, int)
    every = [value] * count if isinstance(value, int) else value
    return tuple(tuple(one) if isinstance(one, Sequence) else (one,) * 3 for one in every)


def _count(tensors: Mapping[str, Tensor], stage: str) -> int:
    start = f"{stage}."
    return len({name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)})
