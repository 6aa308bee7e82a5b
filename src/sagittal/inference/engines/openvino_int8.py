"""A bundle's networks with products of 8-bit integers: made once, measured, and kept in a folder beside the bundle.

    BUNDLE.int8/
      int8.json               of which bundle, on how many cases, with which Dice, and every file's hash
      fold_N.xml, fold_N.bin  the network as OpenVINO's own file

Each tensor's range is taken from windows of cases with known labels (post-training quantization, by NNCF); other cases
tell what it costs. A bundle may hold nothing that its manifest does not list, and stays as its maker signed it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino
from jaxtyping import Float32, Integer, UInt

from sagittal.bundle import Bundle
from sagittal.bundle.manifest import entry_of, read_verified
from sagittal.data.dataset import Case, read_dataset
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.labelled_case import named, read_case
from sagittal.data.preprocessing import prepare
from sagittal.errors import BundleError, DataError, ResourceError
from sagittal.evaluation.overlap import dice
from sagittal.inference.engines.engine import Precision
from sagittal.inference.engines.int8_folder import REPORT, Int8Report, read_report, replacing, standing
from sagittal.inference.engines.openvino_core import core
from sagittal.inference.engines.openvino_engine import BUILDERS, OpenVINOEngine, supports
from sagittal.inference.engines.openvino_layers import Array
from sagittal.inference.predictor import Predictor
from sagittal.inference.windows import tile
from sagittal.plan import Plan
from sagittal.plan.base import Triple
from sagittal.volumes import Volume

MOST_POINTS_LOST = 0.5
"""Of the mean Dice, in points of a hundred."""
_WINDOWS_PER_CASE = 4
_LEAST_CASES = 2
_ENDINGS = (".xml", ".bin")


class Int8Engine(OpenVINOEngine):
    """A bundle's 8-bit networks on the CPU.

    Args:
        plan: what the weights were trained with.
        models: xml and bin of each fold, in the order of `folds`.
        folds: the arrays of each fold by name.
        threads: how many; None is one per core.
    """

    def __init__(
        self,
        plan: Plan,
        models: Sequence[tuple[bytes, bytes]],
        folds: Sequence[Mapping[str, Array]],
        *,
        threads: int | None = None,
    ) -> None:
        self._files = {id(fold): files for fold, files in zip(folds, models, strict=True)}
        # What is no 8-bit product stays in float32: with bfloat16 OpenVINO (2026.4) can't compile MedNeXt's.
        super().__init__(plan, folds, precision="fp32", threads=threads)
        self.precision: Precision = "int8"
        self.head = None

    def coarse_stride(self, window: Triple) -> int:
        """Return 1: the last interpolation is in the networks too."""
        return 1

    def _model(self, fold: Mapping[str, Array], window: Triple, *, with_head: bool) -> openvino.Model:
        assert with_head, "8-bit networks have their heads in them"
        text, numbers = self._files[id(fold)]
        model = core().read_model(text, numbers)
        model.reshape([1, len(self._plan.dataset.channel_names), *window])
        return model


def folder_of(bundle: Bundle) -> Path:
    """Return where a bundle's 8-bit networks are: beside it, by its name."""
    path = bundle.path.resolve()
    return path.with_name(f"{path.name}.int8")


def load(bundle: Bundle, *, folder: str | os.PathLike[str] | None = None, threads: int | None = None) -> Int8Engine:
    """Return the engine of a bundle's 8-bit networks.

    Args:
        bundle: verified.
        folder: where they are; None is beside the bundle.
        threads: how many; None is one per core.

    Raises:
        ResourceError: there are none.
        BundleError: they were made of another bundle, or a file changed.
    """
    where = standing(folder_of(bundle) if folder is None else Path(folder))
    report = read_report(where)
    if report.bundle_sha256 != bundle.manifest.manifest_sha256:
        raise BundleError(
            f"{where}: was made of another bundle than {bundle.path}. Run 'sagittal quantize' again.", code="int8"
        )
    models = []
    for name in bundle.weight_names:
        absent = [f"{name}{ending}" for ending in _ENDINGS if f"{name}{ending}" not in report.files]
        if absent:
            raise BundleError(f"{where / REPORT}: lists no {absent[0]}. Run 'sagittal quantize' again.", code="int8")
        text, numbers = (
            read_verified(where / f"{name}{ending}", report.files[f"{name}{ending}"]) for ending in _ENDINGS
        )
        models.append((text, numbers))
    folds = [bundle.weights(name) for name in bundle.weight_names]
    return Int8Engine(bundle.plan, models, folds, threads=threads)


def quantize(
    bundle: Bundle,
    dataset: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    cases: int = 16,
    say: Callable[[str], None] | None = None,
) -> Int8Report:
    """Make 8-bit networks of a bundle, measure what they cost, and keep them where they cost little.

    Args:
        bundle: verified.
        dataset: labelled cases; every other one of those taken calibrates, the others are scored.
        out: folder to write; None is beside the bundle. What it held is replaced, whole or not at all.
        cases: how many to take at most, spread evenly over the data set.
        say: told what was measured.

    Raises:
        DataError: fewer than two labelled cases, one that can't be read, or no class in those that are scored.
        ResourceError: NNCF is not installed, the network has no OpenVINO form, more than half a point is lost, or the
            folder holds something else.
    """
    nncf = _nncf()
    if (reason := supports(bundle.plan)) is not None:
        raise ResourceError(f"{reason}, so it has no 8-bit form either.", code="engine")
    calibrating, scored = _chosen(dataset, cases)
    windows = [window for case in calibrating for window in _windows(case, bundle.plan)]
    folds = [bundle.weights(name) for name in bundle.weight_names]
    with replacing(folder_of(bundle) if out is None else Path(out)) as folder:
        models = []
        for name, fold in zip(bundle.weight_names, folds, strict=True):
            quantized = _quantized(nncf, bundle.plan, fold, windows)
            models.append(_saved(quantized, folder, name))
        engines = (OpenVINOEngine(bundle.plan, folds), Int8Engine(bundle.plan, models, folds))
        before, after = _mean_dice(bundle.plan, engines, scored)
        report = Int8Report(
            bundle_sha256=bundle.manifest.manifest_sha256,
            openvino_version=openvino.__version__,
            calibration_cases=len(calibrating),
            scored_cases=len(scored),
            dice_fp32=before,
            dice_int8=after,
            files={path.name: entry_of(path.read_bytes()) for path in sorted(folder.iterdir())},
        )
        if say is not None:
            say(
                f"mean Dice of {len(scored)} cases: {before:.2f} in fp32, {after:.2f} in int8, "
                f"{-report.points_lost:+.2f} points"
            )
        _require_small_loss(report)
        report.write(folder / REPORT)
    return report


def _saved(model: openvino.Model, folder: Path, name: str) -> tuple[bytes, bytes]:
    """Write a network and return its two files as they lie on the disk."""
    try:
        openvino.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=False)
        text, numbers = ((folder / f"{name}{ending}").read_bytes() for ending in _ENDINGS)
    except (RuntimeError, OSError) as error:
        raise ResourceError(
            f"{folder.parent}: the 8-bit network {name} can't be written there ({error}). Nothing was replaced. Free "
            "space, or allow writing there.",
            code="disk",
        ) from None
    return text, numbers


def _require_small_loss(report: Int8Report) -> None:
    if report.points_lost > MOST_POINTS_LOST:
        raise ResourceError(
            f"8-bit networks lose {report.points_lost:.2f} points of mean Dice ({report.dice_fp32:.2f} to "
            f"{report.dice_int8:.2f} on {report.scored_cases} cases). At most {MOST_POINTS_LOST} are allowed, so "
            "nothing was written. Calibrate on more cases (--cases), or use --precision bf16.",
            code="int8_loss",
        )


def _nncf() -> Any:
    try:
        nncf = import_module("nncf")
    except ImportError as error:
        raise ResourceError(
            f"8-bit networks are made by NNCF, which can't be imported ({error}). Install it: "
            "pip install 'sagittal[int8]'.",
            code="missing_extra",
        ) from None
    nncf.set_log_level(logging.ERROR)
    return nncf


def _chosen(dataset: str | os.PathLike[str], count: int) -> tuple[list[Case], list[Case]]:
    """Return cases to calibrate on and cases to score."""
    labelled = [case for case in read_dataset(dataset).cases if case.labels is not None]
    if min(len(labelled), count) < _LEAST_CASES:
        raise DataError(
            f"{dataset}: {len(labelled)} labelled cases, of which {count} may be taken. Expected at least "
            f"{_LEAST_CASES}: some to calibrate on, others to measure the loss.",
            code="too_few_cases",
        )
    places = np.linspace(0, len(labelled) - 1, min(len(labelled), count)).round().astype(int)
    taken = [labelled[place] for place in places]
    return taken[::2], taken[1::2]


def _windows(case: Case, plan: Plan) -> Iterator[Float32[np.ndarray, "1 C D H W"]]:
    """Yield some windows of a case, as the network is given them."""
    with named(case):
        volumes, labels = read_case(case, label_index(plan.dataset))
        prepared = prepare(volumes, plan.preprocessing, labels)
    tiling = tile(prepared.image.shape[1:], plan.patch.size, plan.inference.overlap)
    edges = [(0, 0), *zip(tiling.before, tiling.after, strict=True)]
    image = np.pad(prepared.image, edges).astype(np.float32)
    starts = [(d, h, w) for d in tiling.starts[0] for h in tiling.starts[1] for w in tiling.starts[2]]
    size, count = tiling.window, min(len(starts), _WINDOWS_PER_CASE)
    # From the middle of equal parts of the volume: its first and last windows are mostly air.
    for part in range(count):
        d, h, w = starts[(2 * part + 1) * len(starts) // (2 * count)]
        yield np.ascontiguousarray(image[None, :, d : d + size[0], h : h + size[1], w : w + size[2]])


def _quantized(nncf: Any, plan: Plan, fold: Mapping[str, Array], windows: Sequence[Array]) -> openvino.Model:
    channels, network = len(plan.dataset.channel_names), plan.network
    model = BUILDERS[network.kind](network, fold, channels, plan.dataset.num_outputs, with_head=True)
    model.reshape([1, channels, *plan.patch.size])
    is_transformer = network.kind == "segformer3d"
    # Smoothing shifts the ranges of activations into weights. On SegFormer3D it did harm: 31 points of Dice were lost.
    off = nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
    quantized: openvino.Model = nncf.quantize(
        model,
        nncf.Dataset(list(windows)),
        subset_size=len(windows),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=off),
    )
    return quantized


class _Scores(NamedTuple):
    """Dice of every class of every case, per engine."""

    fp32: list[float]
    int8: list[float]


def _mean_dice(
    plan: Plan, engines: tuple[OpenVINOEngine, OpenVINOEngine], cases: Sequence[Case]
) -> tuple[float, float]:
    """Return the mean Dice of two engines over cases and classes, of a hundred points."""
    index, scores = label_index(plan.dataset), _Scores([], [])
    predictors = [Predictor(plan, engine) for engine in engines]
    for case in cases:
        with named(case):
            reference = read_case(case, index)[1]
        for predictor, found in zip(predictors, scores, strict=True):
            predicted: Volume = predictor.predict(case.images, mirror=False)
            found.extend(_class_dice(predicted.array[0], reference, index))
    if not scores.fp32:
        raise DataError("none of the cases that are scored has a class in it. Take more cases (--cases).")
    return 100 * float(np.mean(scores.fp32)), 100 * float(np.mean(scores.int8))


def _class_dice(
    predicted: Integer[np.ndarray, "D H W"], reference: UInt[np.ndarray, "D H W"], index: LabelIndex
) -> Iterator[float]:
    """Yield the Dice of each class or region that the reference has; `reference` holds indices, `predicted` values."""
    originals = dict(index.spec.label_map)
    counted = np.ones(reference.shape, bool) if index.ignore_index is None else reference != index.ignore_index
    for label in index.spec.labels:
        expected = np.isin(reference, [index.values.index(value) for value in label.values])
        if expected.any():
            found = np.isin(predicted, [originals.get(value, value) for value in label.values])
            score = dice(expected, found & counted)
            assert score is not None, "the reference has voxels"
            yield score
