"""Predict a prepared image window by window and write labels as soon as no further window touches a block.

Memory follows from what overlaps, never from classes x volume: see `blending` for what is kept between windows, `slabs`
for the way to the scan's grid, `labelling` for the decision and `copies` for mirrored windows. The whole-volume
computation that this equals, except for rounding, is `sliding_window.predict_logits`, interpolated linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Integer

from sagittal.data.label_index import LabelIndex
from sagittal.inference.blending import Blender, Place, visiting_order, visits
from sagittal.inference.coarse import CoarseBlender
from sagittal.inference.consumers import SlabConsumer
from sagittal.inference.copies import Copies
from sagittal.inference.labelling import ConsumerFeed, LabelWriter
from sagittal.inference.memory import Choice, row_bytes
from sagittal.inference.slabs import BlockResampler, most_outputs
from sagittal.inference.timings import Timings
from sagittal.inference.windows import Tiling
from sagittal.plan.base import Triple

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Target:
    """Where a prediction goes.

    Attributes:
        index: what the outputs mean.
        labels: (D, H, W) of the cropped scan in the network's axis order; any view of a label map.
        consumers: get the logits too.
        scratch: folder for a file, where `Choice.levels_in_file` asks for one.
    """

    index: LabelIndex
    labels: Integer[np.ndarray, "D H W"]
    consumers: Sequence[SlabConsumer] = ()
    scratch: Path | None = None

    @property
    def first_axis(self) -> int | None:
        """The axis that has to be the outermost one, if any: consumers get slabs along D."""
        return 0 if self.consumers else None


def stream(
    image: Float[np.ndarray, "C D H W"],
    copies: Copies,
    tiling: Tiling,
    target: Target,
    choice: Choice,
    *,
    timings: Timings | None = None,
    on_window: Progress | None = None,
) -> None:
    """Predict an image and write its labels into `target`.

    Args:
        image: normalised, on the network's grid, of any floating type.
        copies: the engine.
        tiling: the windows over the image.
        target: where labels and logits go; its grid covers the same space as the image's.
        choice: what to compute with.
        timings: gets the seconds of each phase.
        on_window: called with the number of windows done and in all.

    Raises:
        DataError: the network's output is not finite, or float16 does not hold it where `choice` asks for that.
        ResourceError: a file is asked for and can't be written.
    """
    timings = timings or Timings()
    order = visiting_order(tiling, target.first_axis)
    sink = _Sink(tiling, image.shape[1:], copies, target, choice)
    done = 0
    with ExitStack() as stack:
        take = _taker(tiling, order, sink, choice, timings, stack)
        for numbers, outputs in _computed(image, copies, tiling, order, choice, timings):
            for number in numbers:
                # Taken out of the list: nothing holds it while the next window is computed.
                take(number, outputs.pop(0))
                if _is_last(number, tiling, order):
                    sink.end_layer()
            done += len(numbers)
            if on_window is not None:
                on_window(done, tiling.num_windows)


def _taker(
    tiling: Tiling, order: Triple, sink: _Sink, choice: Choice, timings: Timings, stack: ExitStack
) -> Callable[[Triple, np.ndarray], None]:
    """Return what takes each window's output, in the order of `visits`, until `stack` ends."""
    dtype = np.float16 if choice.half else np.float32
    outputs = sink.outputs
    if outputs.stride > 1:
        coarse = CoarseBlender(tiling, order, outputs.stride, sink.grids, dtype)

        def interpolate(number: Triple, output: np.ndarray) -> None:
            with timings.phase("finishing"):
                coarse.add(number, output, sink.write, bound=sink.bound)

        return interpolate
    blender = stack.enter_context(
        closing(
            Blender(
                tiling,
                order,
                outputs.channels,
                dtype,
                scratch=sink.scratch,
                levels_in_file=choice.levels_in_file,
            )
        )
    )
    finisher = _Finisher(tiling, order, outputs.channels, sink, choice)

    def blend(number: Triple, output: np.ndarray) -> None:
        with timings.phase("blending"):
            place, block = blender.add(number, output)
        with timings.phase("finishing"):
            finisher.finish(place, block)

    return blend


def _computed(
    image: np.ndarray, copies: Copies, tiling: Tiling, order: Triple, choice: Choice, timings: Timings
) -> Iterator[tuple[list[Triple], list[np.ndarray]]]:
    """Yield the windows' numbers and outputs in order; the next ones are computed meanwhile where `choice` says so."""
    every = visits(tiling, order)
    size = max(1, choice.window_batch // copies.per_window)
    groups = [every[start : start + size] for start in range(0, len(every), size)]

    def compute(numbers: list[Triple]) -> list[np.ndarray]:
        return copies([cut(image, tiling, number) for number in numbers], timings)

    if not choice.ahead or len(groups) == 1:
        for numbers in groups:
            yield numbers, compute(numbers)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="network") as pool:
        pending = pool.submit(compute, groups[0])
        for position, numbers in enumerate(groups):
            outputs = pending.result()
            if position + 1 < len(groups):
                pending = pool.submit(compute, groups[position + 1])
            yield numbers, outputs


def cut(image: Float[np.ndarray, "C D H W"], tiling: Tiling, number: Triple) -> Float32[np.ndarray, "C d h w"]:
    """Return one window of the image as float32, with zeros where it exceeds the image."""
    window = np.zeros((len(image), *tiling.window), np.float32)
    source, there = [], []
    for axis in range(3):
        start = tiling.starts[axis][number[axis]] - tiling.before[axis]
        first, stop = max(start, 0), min(start + tiling.window[axis], image.shape[axis + 1])
        source.append(slice(first, stop))
        there.append(slice(first - start, stop - start))
    window[:, *there] = image[:, *source]
    return window


class _Sink:
    """Take finished values on the target's grid: labels are written, and consumers fed."""

    def __init__(self, tiling: Tiling, shape: tuple[int, ...], copies: Copies, target: Target, choice: Choice) -> None:
        d, h, w = target.labels.shape
        self.grids: tuple[Triple, Triple] = ((shape[0], shape[1], shape[2]), (d, h, w))
        self.outputs = outputs = copies.outputs
        self.scratch = target.scratch
        self._label = LabelWriter(target.index, outputs.head, target.labels)
        self._feed = None
        if target.consumers:
            rows = most_outputs(tiling, 0, shape[0], d)
            self._feed = ConsumerFeed(target.consumers, outputs.head, (outputs.channels, rows, h, w), choice.slab_bytes)

    @property
    def bound(self) -> float | None:
        """Below which outputs may be left out (`CoarseBlender.add`): consumers get all."""
        return self._label.bound if self._feed is None else -np.inf

    def write(self, place: Place, values: np.ndarray, outputs: np.ndarray | None = None) -> None:
        """Take values, or only those of some outputs."""
        self._label(place, values, outputs)
        if self._feed is not None:
            self._feed(place, values)

    def end_layer(self) -> None:
        """Hand the slab on: no voxel of it is missing."""
        if self._feed is not None:
            self._feed.end_layer()


class _Finisher:
    """Bring finished blocks to the target's grid, without padding, a few rows at a time."""

    def __init__(self, tiling: Tiling, order: Triple, channels: int, sink: _Sink, choice: Choice) -> None:
        self._tiling, self._outer, self._sink = tiling, order[0], sink
        shape, target = sink.grids
        self._shape = shape
        self._resampler = BlockResampler(tiling, order, shape, target, channels)
        self._rows = max(1, choice.slab_bytes // row_bytes(channels, tiling.window, self._outer, shape, target))

    def finish(self, place: Place, block: Float32[np.ndarray, "F a b c"]) -> None:
        """Take a block at its place in the padded volume."""
        inside, kept = [], []
        for axis in range(3):
            # Where there is padding, one window spans the axis.
            before = self._tiling.before[axis]
            start, stop = max(place[axis].start - before, 0), min(place[axis].stop - before, self._shape[axis])
            kept.append(slice(start, stop))
            inside.append(slice(start + before - place[axis].start, stop + before - place[axis].start))
        block, layer = block[:, *inside], kept[self._outer]
        for start in range(layer.start, layer.stop, self._rows):
            rows = slice(start, min(start + self._rows, layer.stop))
            kept[self._outer] = rows
            part = [slice(None)] * 4
            part[self._outer + 1] = slice(rows.start - layer.start, rows.stop - layer.start)
            there, values = self._resampler.resample((kept[0], kept[1], kept[2]), block[tuple(part)], layer.start)
            if values.size:
                self._sink.write(there, values)


def _is_last(number: Triple, tiling: Tiling, order: Triple) -> bool:
    """Return whether a window is the last one of its layer along the outermost axis."""
    return all(number[axis] + 1 == len(tiling.starts[axis]) for axis in order[1:])
