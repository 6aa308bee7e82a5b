"""Weights that another program trained become a bundle: what the file tells is read off it, the rest is stated.

A weights file holds tensors and their names: the network, its channels and its outputs follow. What it was trained on,
how scans were prepared and how good it is don't: a plan or a data set's declaration can say, else the network's own
protocol is assumed, and every assumption stands among the plan's reasons.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagittal.bundle import write_bundle
from sagittal.data.dataset import JSON_NAME, parse_spec
from sagittal.errors import BundleError, DataError, PlanError
from sagittal.networks.build import build_network
from sagittal.networks.ends import Axis, Ends, network_ends
from sagittal.networks.transfer_report import patterns
from sagittal.networks.weights import LoadReport, load_official_weights, official_tensors
from sagittal.networks.weights_file import read_weights_file
from sagittal.plan import DatasetSpec, Label, Plan, SegFormer3DConfig, network_config
from sagittal.plan.overrides import override
from sagittal.plan.plan import Inference, NoNormalization, Normalization, Patch, Preprocessing, RescaleToUnit, ZScore
from sagittal.plan.training import Training
from sagittal.planning import recipe
from sagittal.planning.wishes import SET_BY_USER
from sagittal.training.initialization import output_names

SPACING_MM = (1.0, 1.0, 1.0)
PATCH = (128, 128, 128)
NOT_MEASURED = "none: imported weights, on which nothing was measured here"
_SCALE = "network.attention_scale"
_HEADS = "network.deep_supervision"


@dataclass(frozen=True)
class Knowledge:
    """What is known of the weights besides the file.

    Attributes:
        network: name of the network; not needed beside a plan.
        plan: the plan that they were trained by, or its path.
        dataset: a data set's folder or its dataset.json, for the names of channels and labels.
        settings: fields of the plan by dotted name.
    """

    network: str | None = None
    plan: Plan | str | os.PathLike[str] | None = None
    dataset: str | os.PathLike[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """The bundle, its plan, and what of the file had no use or was missing."""

    bundle: Path
    plan: Plan
    report: LoadReport


def import_weights(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    known: Knowledge,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Imported:
    """Make a bundle of a weights file of MedNeXt, SegFormer3D or another network of `sagittal networks`.

    No code in the file is run: tensors are read, anything else is refused. The numbers of channels and outputs are read
    off the weights. Tensors may bear the official names or, of MedNeXt, MONAI's.

    Args:
        file: .pth, .pt, .model (nnU-Net v1) or .safetensors: a state dict, or a checkpoint that holds one.
        out: the bundle to write.
        known: the network, and what is known of its training.
        say: receives lines for a person: what was read, and what had to be assumed.

    Raises:
        PlanError: the file can't be read safely, its weights don't fit the network, the plan or the data set's
            declaration, or no network is named.
        DataError: no dataset.json, or one that makes no sense.
        BundleError: `out` holds something already.
        ResourceError: the disk is full or the folder can't be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out}: exists and is not empty; nothing was overwritten. Choose another --out.")
    draft = _draft(known)
    content = read_weights_file(file)
    ends = _ends(draft)
    tensors, naming = official_tensors(content, tuple({**ends.stems, **ends.heads}))
    channels = _count(tensors, ends.stems, draft, file, "input channels")
    outputs = _count(tensors, ends.heads, draft, file, "outputs")
    whose = "MONAI's names" if naming == "monai" else "official names"
    say(f"read: {len(tensors)} tensors under {whose}; {_of(channels, 'channel')}, {_of(outputs, 'output')}")
    plan = _plan(known, draft, channels, outputs)
    if draft.network.scales > 1 and _HEADS not in known.settings and not ends.heads.keys() <= tensors.keys():
        why = "read off the weights, which have no heads at the coarse scales"
        plan = override(plan, {_HEADS: False}, origin=why)
    with torch.random.fork_rng(devices=[]):
        network = build_network(plan.network, channels, outputs)
    report = load_official_weights(network, content)
    _tell(plan, report, known, say)
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    metrics = {
        "dice": {label.name: None for label in plan.dataset.labels},
        "mean_dice": None,
        "validation": NOT_MEASURED,
        "imported": {"file_sha256": _sha256(Path(file)), "tensors": len(tensors), "names": naming},
    }
    write_bundle(out, plan=plan, weights={"all": weights}, metrics=metrics)
    return Imported(out, plan, report)


def _draft(known: Knowledge) -> Plan:
    """Return the given plan, or one for a single channel and two outputs: its network is what counts so far."""
    if known.plan is not None:
        plan = known.plan if isinstance(known.plan, Plan) else Plan.read(known.plan)
        if known.network is not None and known.network.lower() != plan.network_name:
            raise PlanError(
                f"--network {known.network}: the plan is for {plan.network_name}. Leave one of them out.",
                code="plan_mismatch",
            )
        if known.dataset is not None:
            raise PlanError("--plan and --dataset exclude each other: a plan holds its data set's declaration.")
        return override(plan, known.settings, origin=SET_BY_USER)
    if known.network is None:
        raise PlanError(
            "import-weights: the weights don't say which network they are of. Name it with --network, for example "
            "mednext-s ('sagittal networks' lists them), or give the --plan that they were trained by."
        )
    network_settings = {name: value for name, value in known.settings.items() if name.startswith("network.")}
    return _assumed_plan(known, _generic_spec(1, 2), network_settings)


def _ends(plan: Plan) -> Ends:
    def build(channels: int, outputs: int) -> torch.nn.Module:
        return build_network(plan.network, channels, outputs)

    return network_ends(build, ("channel",), ("background", "class"))


def _count(
    tensors: Mapping[str, Tensor], axes: Mapping[str, Axis], plan: Plan, file: str | os.PathLike[str], what: str
) -> int:
    """Return the number of input channels or outputs that the weights are for."""
    found = {}
    for name, axis in axes.items():
        if name in tensors and tensors[name].ndim > axis.index:
            found[name] = (tensors[name].shape[axis.index] - axis.offset) / axis.per_item
    counts = set(found.values())
    if len(counts) == 1 and (count := counts.pop()) == int(count) and count >= 1:
        return int(count)
    told = ", ".join(f"{name}: {count:g}" for name, count in found.items()) or f"none of {', '.join(list(axes)[:4])}"
    raise PlanError(
        f"{file}: the number of {what} can't be read off its tensors ({told}). Expected the weights of "
        f"{plan.network_name}; the file begins with {', '.join(list(tensors)[:4])}. Name the network that they are of.",
        code="weights_mismatch",
    )


def _plan(known: Knowledge, draft: Plan, channels: int, outputs: int) -> Plan:
    if known.plan is not None:
        _require_counts(draft.dataset, channels, outputs, "the plan")
        return draft
    if known.dataset is None:
        return _assumed_plan(known, _generic_spec(channels, outputs), known.settings)
    spec = _read_spec(Path(known.dataset))
    _require_counts(spec, channels, outputs, str(known.dataset))
    return _assumed_plan(known, spec, known.settings)


def _require_counts(spec: DatasetSpec, channels: int, outputs: int, where: str) -> None:
    if (len(spec.channel_names), spec.num_outputs) != (channels, outputs):
        raise PlanError(
            f"{where} declares {_of(len(spec.channel_names), 'channel')} ({', '.join(spec.channel_names)}) and "
            f"{_of(spec.num_outputs, 'output')} ({', '.join(output_names(spec))}); the weights have "
            f"{_of(channels, 'channel')} and {_of(outputs, 'output')}. Give the declaration that they were trained by.",
            code="plan_mismatch",
        )


def _read_spec(path: Path) -> DatasetSpec:
    source = path / JSON_NAME if path.is_dir() else path
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{source}: can't be read ({error.strerror}). Expected a dataset.json.") from None
    except ValueError as error:
        raise DataError(f"{source}: is no JSON ({error}). Expected a dataset.json.") from None
    if not isinstance(content, dict):
        raise DataError(f"{source}: holds a {type(content).__name__}. Expected a dataset.json.")
    return parse_spec(content, str(source), default_name=source.resolve().parent.name)


def _generic_spec(channels: int, outputs: int) -> DatasetSpec:
    """Return a declaration with made-up names; a single output can only be a region, which needs no background."""
    values = range(1, max(outputs, 2))
    return DatasetSpec(
        name="imported",
        channel_names=tuple(f"channel_{number}" for number in range(channels)),
        labels=tuple(Label(name=f"class_{value}", values=(value,)) for value in values),
        regions_class_order=(1,) if outputs == 1 else None,
        file_ending=".nii.gz",
    )


def _assumed_plan(known: Knowledge, spec: DatasetSpec, settings: Mapping[str, Any]) -> Plan:
    assert known.network is not None
    network = network_config(known.network)
    optimizer, _ = recipe.optimizer(network)
    schedule, _ = recipe.schedule(network)
    loss, _ = recipe.loss(network)
    augmentation, why_augmentation = recipe.augmentation(spec, PATCH, "stored", (0, 1, 2))
    why_mirrored = why_augmentation["mirror_axes"]
    unknown = f"assumed: {known.network.lower()}'s recipe here; how these weights were trained is not known"
    names = (
        "read from the dataset.json given"
        if known.dataset is not None
        else "assumed: names made up; outputs taken as background and classes (overlapping regions: give --dataset)"
    )
    plan = Plan(
        network_name=known.network.lower(),
        dataset=spec,
        fingerprint_sha256="0" * 64,
        preprocessing=Preprocessing(
            orientation="stored",
            spacing_mm=SPACING_MM,
            normalization=tuple(_normalization(name) for name in spec.channel_names),
        ),
        patch=Patch(size=PATCH),
        network=network,
        training=Training(batch_size=2, optimizer=optimizer, loss=loss, augmentation=augmentation),
        schedule=schedule,
        inference=Inference(mirror_axes=augmentation.mirror_axes),
        reasons={
            "network": f"chosen by name, {known.network.lower()}; its channels and outputs read off the weights",
            "dataset": names,
            "preprocessing.spacing_mm": "assumed: 1 mm along each axis, MedNeXt's protocol and BraTS's scans",
            "preprocessing.normalization": _why_normalized(spec),
            "preprocessing.orientation": "assumed: as stored, for nnU-Net v1, where MedNeXt is from, turns no scan",
            "preprocessing.crop_to_nonzero": "assumed: nnU-Net's",
            "patch.size": "assumed: 128 voxels along each axis, the papers' protocol",
            "inference.overlap": "nnU-Net's, half a window",
            "inference.mirror_axes": f"assumed: the axes that training mirrored; {why_mirrored}",
            "training.optimizer": unknown,
            "schedule.steps": unknown,
        },
    )
    if isinstance(network, SegFormer3DConfig) and _SCALE not in settings:
        why = "assumed: what the released weights need; those of the repository since 2025-11-29 need head_dim"
        plan = override(plan, {_SCALE: "paper"}, origin=why)
    return override(plan, settings, origin=SET_BY_USER)


def _normalization(channel: str) -> Normalization:
    match channel.casefold():
        case "nonorm":
            return NoNormalization()
        case "rescale_to_0_1" | "rgb_to_0_1":
            return RescaleToUnit()
        case _:
            return ZScore()


def _why_normalized(spec: DatasetSpec) -> str:
    if any(name.casefold() == "ct" for name in spec.channel_names):
        return (
            "assumed: z-score of each scan, for the percentiles that nnU-Net clips CT by are not in the weights; give "
            "the --plan, or set preprocessing.normalization"
        )
    return "assumed: by channel name, z-score of each scan unless the name says otherwise"


def _tell(plan: Plan, report: LoadReport, known: Knowledge, say: Callable[[str], None]) -> None:
    for what, names in (("dropped", report.dropped), ("left fresh", report.fresh)):
        if names:
            say(f"{what}: {', '.join(patterns(names))}")
    if isinstance(plan.network, SegFormer3DConfig):
        why = plan.reasons.get(_SCALE, "the plan's")
        say(f"attention scale: {plan.network.attention_scale} ({why}); change it with --set {_SCALE}=head_dim or paper")
    assumed = {name: reason for name, reason in plan.reasons.items() if reason.startswith("assumed: ")}
    if assumed and known.plan is None:
        say("assumed, for weights don't tell; correct with --set FIELD=VALUE, --dataset or --plan:")
        for name, reason in assumed.items():
            say(f"  {name}: {reason.removeprefix('assumed: ')}")
    say("validation: nothing was measured; 'sagittal predict' and 'sagittal evaluate' on labelled scans will tell")


def _of(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
