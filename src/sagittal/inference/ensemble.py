"""Several bundles as one model: the mean of their probabilities on the scan's own grid, as nnU-Net's ensembles.

Networks, spacings, windows and orders of axes may differ; channels and labels may not. The bundles run one after the
other (`averaging` has what lies between them), the first one last: it decides, in its own order of axes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from sagittal.bundle import Bundle, read_bundle
from sagittal.data.label_index import label_index
from sagittal.data.preprocessing import Frame, frame_of
from sagittal.errors import PlanError, ResourceError
from sagittal.inference import predictor as single
from sagittal.inference.averaging import WORK_BYTES, Adder, Decider, ShareSums
from sagittal.inference.consumers import SlabConsumer
from sagittal.inference.engines.choice import engine_named, load_engine
from sagittal.inference.engines.engine import Engine
from sagittal.inference.memory import GIB, budget_bytes
from sagittal.inference.missing import channels_given, preprocessing_of
from sagittal.inference.postprocessing import postprocess
from sagittal.inference.predictor import Predictor, Scan
from sagittal.inference.run_report import Choices
from sagittal.inference.scratch import disk_folder
from sagittal.inference.timings import Timings
from sagittal.inference.uncertainty import Disagreement
from sagittal.plan import Plan
from sagittal.volumes import Volume
from sagittal.volumes.volume import read_scans

__all__ = ["EnsemblePredictor", "Member", "load", "predictor_of", "require_alike"]

Given: TypeAlias = str | os.PathLike[str] | Bundle
KEPT_SHARE = 0.25
"""Of the memory that is allowed, for networks that wait for their next turn. Where they take more, they are loaded
again for each scan."""
_HELD_SHARE = 0.125
"""Of the memory that is allowed, for a scan that is read once for all bundles."""
_FLOAT_BYTES = 4
_LEAST_GIB = 1e-3


@dataclass(frozen=True, eq=False)
class Member:
    """One of the models: its plan, and what loads its networks, more than once where memory is short."""

    plan: Plan
    load: Callable[[], Engine]
    name: str = "a model"
    """What messages call it."""


class EnsemblePredictor:
    """Predicts with several models; make one with `load`. Its interface is that of `Predictor`.

    Args:
        members: the models. The first one's rules of post-processing are applied, and its order of axes is what
            consumers see.
        missing: names of channels that the scans lack, where every network was trained to do without.
        postprocessing: whether the first plan's rules are applied to label maps.
        scratch: folder for the sums of probabilities while a scan is predicted; None is the system's temporary folder,
            which on some systems is in main memory.

    Raises:
        PlanError: fewer than two models, or models of other channels or labels.
        DataError: channels can't be missing, or there are none of these names.

    Attributes:
        last_timings: where the time of the last `predict` went, all models together; None before the first.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        missing: Sequence[str] = (),
        postprocessing: bool = True,
        scratch: Path | None = None,
    ) -> None:
        require_alike([(member.name, member.plan) for member in members])
        self._members, self._missing = tuple(members), tuple(missing)
        self._postprocessing, self._scratch = postprocessing, scratch
        self._given = [channels_given(member.plan, missing) for member in members]
        crops = all(member.plan.preprocessing.crop_to_nonzero for member in members)
        first = members[0].plan
        # Where one network sees the whole scan, so do the sums.
        self.plan = first.replace(preprocessing=first.preprocessing.replace(crop_to_nonzero=crops))
        self.last_timings: Timings | None = None
        # Loaded at once, so that what does not load is known before the first scan.
        self._loaded = {number: self._load(number) for number in range(len(members))}
        self.engines: tuple[tuple[str, str, str], ...] = tuple(
            (each.engine.name, each.engine.precision, each.engine.device) for each in self._loaded.values()
        )
        """Name, precision and device of what computes each model."""

    def predict(
        self,
        scan: Scan | Sequence[Scan],
        *,
        mirror: bool = True,
        step: float | None = None,
        memory_gib: float | None = None,
        on_window: Callable[[int, int], None] | None = None,
        consumers: Sequence[SlabConsumer] = (),
        disagreement: Disagreement | None = None,
    ) -> Volume:
        """Return the label map of a scan, (1, D, H, W), on exactly the scan's grid; see `Predictor.predict`.

        Args:
            scan, mirror, step, memory_gib: as there.
            on_window: called with the number of windows done and in all, which begins anew with each model.
            consumers: get the logarithm of the mean probabilities (of regions, their logits) slab by slab, on the
                cropped grid of `plan`.
            disagreement: is shown what each model decides.

        Raises:
            DataError, PlanError: as there.
            ResourceError: the memory, or the disk for the sums of probabilities, does not suffice.
        """
        budget_bytes(memory_gib)
        timings = Timings()
        images = [scan] if isinstance(scan, str | os.PathLike | Volume) else list(scan)
        with timings.phase("reading"):
            volumes = [volume for image in images for volume in _read(image)]
        with timings.phase("preparing"):
            whole = self._frame(self.plan, volumes, 0)
            frames = [self._frame(member.plan, volumes, number) for number, member in enumerate(self._members)]
        geometry, held = volumes[0].geometry, sum(volume.array.nbytes for volume in volumes)
        if memory_gib is None or held <= _HELD_SHARE * memory_gib * GIB:
            images = list(volumes)
        del volumes
        spec, last = self.plan.dataset, len(self._members) - 1
        options = {"mirror": mirror, "step": step, "on_window": on_window}
        folder = self._scratch or Path(tempfile.gettempdir())
        with ShareSums(spec, whole, len(frames), folder, keeps_votes=disagreement is not None) as sums:
            for turn, number in enumerate(range(last, 0, -1)):
                adder = Adder(sums, turn, frames[number], timings)
                self._run(number, images, adder, _less(memory_gib, WORK_BYTES), options, timings)
            labels = np.zeros(whole.stored_shape, label_index(spec).values_of_classes().dtype)
            decider = Decider(sums, frames[0], whole.crop(labels), consumers, disagreement, timings)
            _, height, width = whole.cropped_shape
            plane = spec.num_outputs * height * width * _FLOAT_BYTES if consumers else 0
            allowed = _less(memory_gib, WORK_BYTES + labels.nbytes + plane)
            self._run(0, images, decider, allowed, options, timings)
            decider.finish()
        result = Volume.on(geometry, labels)
        if self._postprocessing:
            with timings.phase("finishing"):
                result = postprocess(result, self.plan)
        timings.stop()
        self.last_timings = timings
        return result

    def _frame(self, plan: Plan, volumes: Sequence[Volume], number: int) -> Frame:
        return frame_of(volumes, preprocessing_of(plan.preprocessing, self._given[number]))

    def _load(self, number: int) -> Predictor:
        member = self._members[number]
        return Predictor(member.plan, member.load(), missing=self._missing, postprocessing=False, scratch=self._scratch)

    def _run(
        self,
        number: int,
        images: Sequence[Scan],
        consumer: Adder | Decider,
        memory_gib: float | None,
        options: dict[str, Any],
        timings: Timings,
    ) -> None:
        """Show a scan to one of the models, alone in memory where it does not fit beside the others."""
        try:
            self._run_beside(self._waiting_bytes(number, memory_gib), number, images, consumer, memory_gib, options)
        except ResourceError as error:
            if error.code != "memory" or consumer.began or not set(self._loaded) - {number}:
                raise
            self._forget_all_but(number)
            self._run_beside(0, number, images, consumer, memory_gib, options)
        seen = self._loaded[number].last_timings
        for phase, seconds in (seen.seconds if seen is not None else {}).items():
            timings.add(phase, seconds)

    def _run_beside(
        self,
        waiting_bytes: int,
        number: int,
        images: Sequence[Scan],
        consumer: Adder | Decider,
        memory_gib: float | None,
        options: dict[str, Any],
    ) -> None:
        if number not in self._loaded:
            self._loaded[number] = self._load(number)
        allowed = _less(memory_gib, waiting_bytes)
        self._loaded[number].predict(images, memory_gib=allowed, consumers=(consumer,), **options)

    def _waiting_bytes(self, number: int, memory_gib: float | None) -> int:
        """Return what the networks of the other models take while they wait; those that take too much are let go of."""
        if memory_gib is None:
            return 0  # what is available is asked for when a prediction begins, and they are there already
        waiting = 0
        for other, predictor in self._loaded.items():
            if other != number:
                memory = predictor.engine.memory(self._members[other].plan.patch.size)
                waiting += memory.fixed_bytes + memory.per_window_bytes
        if waiting > KEPT_SHARE * memory_gib * GIB:
            self._forget_all_but(number)
            return 0
        return waiting

    def _forget_all_but(self, number: int) -> None:
        self._loaded = {number: self._loaded[number]} if number in self._loaded else {}


def require_alike(plans: Sequence[tuple[str, Plan]]) -> None:
    """Check that models can be averaged.

    Args:
        plans: what messages call each model, and its plan; the first one is what the others are compared with.

    Raises:
        PlanError: fewer than two, or channels or labels that are not the same.
    """
    if len(plans) < 2:
        raise PlanError(f"averaging needs two bundles or more; given: {len(plans)}.", code="options")
    (first, plan), *others = plans
    expected = _meaning(plan)
    for name, other in others:
        known = _meaning(other)
        for what in {**expected, **known}:
            if known.get(what) != expected.get(what):
                raise PlanError(
                    f"{name}: its {what} are {known.get(what, 'none')}; those of {first} are "
                    f"{expected.get(what, 'none')}. Bundles that are averaged need the same {what} in the same order. "
                    "Leave one of them out.",
                    code="options",
                )


def require_distinct(bundles: Sequence[tuple[str, Bundle]]) -> None:
    """Check that bundles can be averaged, by what messages call them; a single one needs nothing.

    Raises:
        PlanError: one was given twice, or channels or labels are not the same.
    """
    known: dict[str, str] = {}
    for name, bundle in bundles:
        digest = bundle.manifest.manifest_sha256
        if digest in known:
            raise PlanError(f"{name}: holds the same bundle as {known[digest]}. Leave one of them out.", code="options")
        known[digest] = name
    if len(bundles) > 1:
        require_alike([(name, bundle.plan) for name, bundle in bundles])


def predictor_of(
    bundles: Sequence[Bundle],
    choices: Choices,
    device: str = "auto",
    engine: str = "auto",
    *,
    cache_folder: Path | None = None,
    scratch: Path | None = None,
    threads: int | None = None,
) -> Predictor | EnsemblePredictor:
    """Return what predicts as was chosen with one bundle, or with the mean of several.

    Args:
        bundles: verified.
        choices: precision, missing channels and post-processing count here.
        device, engine, cache_folder: see `load`.
        scratch: see `EnsemblePredictor`.
        threads: see `load_engine`.

    Raises:
        SagittalError: see `EnsemblePredictor` and `load`.
    """
    members = _members(bundles, device, engine, choices.precision, cache_folder, threads)
    missing, rules = choices.missing, choices.postprocessing
    if len(members) == 1:
        return Predictor(members[0].plan, members[0].load(), missing=missing, postprocessing=rules, scratch=scratch)
    return EnsemblePredictor(members, missing=missing, postprocessing=rules, scratch=scratch)


def engines_of(predictor: Predictor | EnsemblePredictor) -> tuple[tuple[str, str, str], ...]:
    """Return name, precision and device of what computes each model, each once."""
    if isinstance(predictor, EnsemblePredictor):
        return tuple(dict.fromkeys(predictor.engines))
    engine = predictor.engine
    return ((engine.name, engine.precision, engine.device),)


def engines_named(bundles: Sequence[Bundle], devices: Sequence[str], engine: str, precision: str) -> str:
    """Return what will compute, before any network is loaded, as a report tells it: `openvino fp32`."""
    names = dict.fromkeys(engine_named(bundle, device, engine) for bundle in bundles for device in devices)
    return " + ".join(f"{name} {precision}" for name in names)


def computed_by(predictor: Predictor | EnsemblePredictor) -> str:
    """Return device and engine as a report tells them: `cpu (openvino)`, or `cpu (openvino) + cpu (torch)`."""
    return " + ".join(f"{device} ({name})" for name, _, device in engines_of(predictor))


@overload
def load(
    bundle: Given,
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "fp32",
    cache_folder: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> Predictor: ...


@overload
def load(
    bundle: list[Given] | tuple[Given, ...],
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "fp32",
    cache_folder: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> Predictor | EnsemblePredictor: ...


def load(
    bundle: Given | list[Given] | tuple[Given, ...],
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "fp32",
    cache_folder: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> Predictor | EnsemblePredictor:
    """Read and verify a bundle and return its predictor; several folds are averaged, and several bundles too.

    Args:
        bundle: the folder that `sagittal train` wrote or the file that `sagittal package` did; several of them, with
            the same channels and labels, predict the mean of their probabilities.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        engine: `torch`, `openvino`, or `auto`: OpenVINO on a CPU where it is installed and knows the network.
        precision: `fp32`; `bf16`, `fp16` and `int8` where the engine has them; see `engines.choice`.
        cache_folder: where OpenVINO keeps compiled networks for the next process, or None.
        scratch: folder for what windows share where memory is short, and for the sums of several bundles. None is the
            system's temporary folder (TMPDIR), or /var/tmp where that one is in main memory. Files there have no name
            and are gone with the prediction.

    Raises:
        BundleError: a bundle is damaged, or its weights do not fit its plan.
        PlanError: an unknown engine or precision, or bundles of other channels or labels.
        ResourceError: no such device, or an engine that is not installed.
    """
    if not isinstance(bundle, list | tuple):
        bundle = [bundle]
    if len(bundle) == 1:
        return single.load(
            bundle[0], device=device, engine=engine, precision=precision, cache_folder=cache_folder, scratch=scratch
        )
    read = [each if isinstance(each, Bundle) else read_bundle(each) for each in bundle]
    folder = disk_folder() if scratch is None else Path(scratch)
    return EnsemblePredictor(_members(read, device, engine, precision, cache_folder), scratch=folder)


def _members(
    bundles: Sequence[Bundle],
    device: str,
    engine: str,
    precision: str,
    cache_folder: str | os.PathLike[str] | None,
    threads: int | None = None,
) -> list[Member]:
    return [
        Member(
            bundle.plan,
            partial(load_engine, bundle, device, engine, precision, cache_folder=cache_folder, threads=threads),
            bundle.path.name,
        )
        for bundle in bundles
    ]


def _meaning(plan: Plan) -> dict[str, str]:
    """Return what the inputs and outputs of a network mean, in words for messages."""
    spec = plan.dataset
    labels = (f"{label.name} {'+'.join(map(str, label.values))}" for label in spec.labels)
    found = {"channels": ", ".join(spec.channel_names), "labels": ", ".join(labels)}
    if spec.regions_class_order is not None:
        found["regions' values"] = ", ".join(map(str, spec.regions_class_order))
    if spec.label_map:
        found["original values"] = ", ".join(f"{value} is {original}" for value, original in spec.label_map)
    return found


def _read(image: Scan) -> tuple[Volume, ...]:
    return (image,) if isinstance(image, Volume) else read_scans([image])


def _less(memory_gib: float | None, count: int) -> float | None:
    """Return what is left of a budget; never nothing, so that a prediction can tell what it needs."""
    return None if memory_gib is None else max(memory_gib - count / GIB, _LEAST_GIB)
