"""model.json: everything before and after the network, in numbers that a reader in any language can follow.

docs/export.md explains each field; `templates/read_model.py` is a program that follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from sagittal.bundle.manifest import FileEntry, Sha256
from sagittal.data.label_index import label_index
from sagittal.data.mirroring import output_swaps
from sagittal.errors import PlanError
from sagittal.inference.copies import mirrors_of
from sagittal.inference.postprocessing import target_of
from sagittal.plan import Frozen, Plan
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.plan import Normalization
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume, Rule, labels_named

Format = Literal["onnx", "openvino", "torch"]
FILE = "model.json"
INPUT, OUTPUT = "image", "logits"
_SIGMA_SHARE = 0.125


class Network(Frozen):
    """One set of weights; the logits of all networks are averaged."""

    name: str
    """`all` or `fold_N`, as in the bundle."""
    file: str
    """The graph; an OpenVINO graph has its weights in the .bin file beside it."""
    sizes: Literal["open", "fixed"]
    """Whether N, D, H, W may be anything (about 33 voxels or more per axis), or must be 1 and `windows.size`."""
    largest_difference: float
    """From the bundle's network on noise, as a share of the largest logit; measured when exported, at `windows.size`
    and, where sizes are open, with two images of another size at once."""


class Channel(Frozen):
    """One channel of the image, in the network's order."""

    name: str
    normalization: Normalization


class ImagePreprocessing(Frozen):
    """From scan to image, in the order of the fields."""

    orientation: Literal["RAS", "stored"]
    """Array axes D, H, W towards head, front, right; or as the file stores them (NIfTI's k, j, i)."""
    transpose: Triple
    """Which of those axes are the first, second and third of the network's arrays; all that follows is along these."""
    crop_to_nonzero: bool
    """Cut to the smallest box outside of which all channels are 0."""
    spacing_mm: TripleMm
    """What the image is resampled to after `channels[*].normalization`."""
    anisotropy_threshold: float
    """Above this ratio of the largest to the smallest spacing, of the scan or else of `spacing_mm`, the one coarsest
    axis is resampled apart from the plane."""
    spline_order: Literal[3] = 3
    """Of the resampling, clamped to the channel's range; with an axis apart, each plane to its own."""
    spline_order_apart: Literal[0] = 0
    """Along the axis that is resampled apart."""


class Mirror(Frozen):
    """One mirrored copy of a window."""

    axes: tuple[int, ...]
    """Of D, H, W."""
    outputs: tuple[int, ...]
    """After mirroring the logits back: output i is taken from output `outputs[i]` (left and right change places)."""


class Windows(Frozen):
    """How the network moves over the image."""

    size: Triple
    overlap: float
    """Share of the window's edge that neighbours have in common at least."""
    sigma_share: float = _SIGMA_SHARE
    """Standard deviation of the Gaussian weight of a window's voxels, as a share of the window's size."""
    mirrors: tuple[Mirror, ...]
    """The logits of all of these copies are averaged; the first is the unmirrored one, enough where time is short."""


class Output(Frozen):
    """One channel of the logits."""

    name: str
    value: int
    """What the label map holds where this output decides."""


class Decision(Frozen):
    """From logits to the label map."""

    spline_order: Literal[1] = 1
    """Of the resampling of the logits to the grid of the cropped scan, along all axes alike."""
    rule: Literal["largest", "above_zero"]
    """The output with the largest logit; or, for regions, every output above zero in turn, later over earlier."""
    dtype: str


class PostProcessing(Frozen):
    """One rule on the label map, in the scan's axis order."""

    kind: Literal["largest_component", "minimum_volume", "fill_holes"]
    values: tuple[int, ...]
    """Of the label map, whose union the rule is about."""
    becomes: dict[int, int] = Field(default_factory=dict)
    """What each value becomes where a component is removed."""
    volume_ml: float | None = None
    """Components smaller than this are removed (minimum_volume)."""
    filled: int | None = None
    """What a hole becomes (fill_holes)."""
    fillable: tuple[int, ...] = ()
    """Values of a hole that are filled."""


class ExportedModel(Frozen):
    """The whole file."""

    format: Literal["sagittal-export"] = "sagittal-export"
    schema_version: Literal[1] = 1
    sagittal_version: str
    bundle_sha256: Sha256
    """Of the bundle that was exported: `manifest_sha256` of its manifest.json."""
    intended_use: str = "For research use. Not a medical device."
    dataset: str
    """Name of the data set."""
    network: str
    """Name of the network."""
    runtime: Format
    input: Literal["image"] = "image"
    """Name of the graph's input, float32 (N, C, D, H, W)."""
    output: Literal["logits"] = "logits"
    """Name of the graph's output, float32 (N, K, D, H, W)."""
    networks: Annotated[tuple[Network, ...], Field(min_length=1)]
    channels: tuple[Channel, ...]
    preprocessing: ImagePreprocessing
    windows: Windows
    outputs: tuple[Output, ...]
    decision: Decision
    post_processing: tuple[PostProcessing, ...]
    files: dict[str, FileEntry]
    """Size and SHA-256 of every other file of the folder."""


def describe(
    plan: Plan,
    *,
    runtime: Format,
    networks: tuple[Network, ...],
    files: Mapping[str, FileEntry],
    bundle_sha256: str,
    sagittal_version: str,
) -> ExportedModel:
    """Return what model.json says of a plan and its exported networks.

    Raises:
        PlanError: the plan is one of slices (`require_volumes`).
    """
    require_volumes(plan)
    steps = plan.preprocessing
    return ExportedModel(
        sagittal_version=sagittal_version,
        bundle_sha256=bundle_sha256,
        dataset=plan.dataset.name,
        network=plan.network_name,
        runtime=runtime,
        networks=networks,
        channels=tuple(
            Channel(name=name, normalization=rule)
            for name, rule in zip(plan.dataset.channel_names, steps.normalization, strict=True)
        ),
        preprocessing=ImagePreprocessing(
            orientation=steps.orientation,
            transpose=steps.transpose,
            crop_to_nonzero=steps.crop_to_nonzero,
            spacing_mm=steps.network_spacing_mm,
            anisotropy_threshold=steps.anisotropy_threshold,
        ),
        windows=Windows(size=plan.patch.size, overlap=plan.inference.overlap, mirrors=_mirrors(plan)),
        outputs=_outputs(plan),
        decision=Decision(
            rule="above_zero" if plan.dataset.has_regions else "largest",
            dtype=str(label_index(plan.dataset).values_of_classes().dtype),
        ),
        post_processing=tuple(_rule(rule, plan) for rule in plan.postprocessing),
        files=dict(files),
    )


def require_volumes(plan: Plan) -> None:
    """Refuse a plan whose network sees slices.

    Raises:
        PlanError: it does.
    """
    if plan.configuration == "2d" or plan.preprocessing.keeps_slices:
        raise PlanError(
            f"configuration {plan.configuration}: a network of slices, which model.json does not describe. Expected "
            "one of volumes. Train with '--config 3d', or predict with 'sagittal predict'.",
            code="not_exportable",
        )


def _mirrors(plan: Plan) -> tuple[Mirror, ...]:
    swaps = output_swaps(plan.dataset, plan.training.augmentation)
    same = tuple(range(plan.dataset.num_outputs))
    mirrors = mirrors_of(plan.inference.mirror_axes, swaps)
    return tuple(Mirror(axes=mirror.axes, outputs=mirror.outputs or same) for mirror in mirrors)


def _outputs(plan: Plan) -> tuple[Output, ...]:
    names = [label.name for label in plan.dataset.labels]
    values = [int(value) for value in label_index(plan.dataset).values_of_classes()]
    if not plan.dataset.has_regions:
        names = ["background", *names]
    return tuple(Output(name=name, value=value) for name, value in zip(names, values, strict=True))


def _rule(rule: Rule, plan: Plan) -> PostProcessing:
    target = target_of(plan.dataset, labels_named(rule))
    match rule:
        case LargestComponent():
            return PostProcessing(kind=rule.kind, values=target.values, becomes=dict(target.removed))
        case MinimumVolume():
            return PostProcessing(
                kind=rule.kind, values=target.values, becomes=dict(target.removed), volume_ml=rule.volume_ml
            )
        case FillHoles():
            return PostProcessing(kind=rule.kind, values=target.values, filled=target.filled, fillable=target.fillable)
