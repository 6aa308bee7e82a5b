"""Predict a prepared image window by window and write labels as soon as no further window touches a block.

Memory follows from what overlaps, never from classes x volume: see `blending` for what is kept between windows, `slabs`
for the way to the scan's grid, `labelling` for the decision and `copies` for mirrored windows. The whole-volume
computation that this equals, except for rounding, is `sliding_window.predict_logits` with `restore.labels_on_grid`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Integer

from sagittal.data.label_index import LabelIndex
from sagittal.inference.blending import Blender, Place, visiting_order, visits
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
    """

    index: LabelIndex
    labels: Integer[np.ndarray, "D H W"]
    consumers: Sequence[SlabConsumer] = ()

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
    """
    timings = timings or Timings()
    order = visiting_order(tiling, target.first_axis)
    channels = copies.outputs.channels
    blender = Blender(tiling, order, channels, np.float16 if choice.half else np.float32)
    finisher = _Finisher(image.shape[1:], tiling, order, copies, target, choice)
    done = 0

    def take(number: Triple, output: Float32[np.ndarray, "F d h w"]) -> None:
        with timings.phase("blending"):
            place, block = blender.add(number, output)
        with timings.phase("finishing"):
            finisher.finish(place, block, ends_layer=_is_last(number, tiling, order))

    for numbers, outputs in _computed(image, copies, tiling, order, choice, timings):
        for number in numbers:
            # Taken out of the list: nothing holds it while the next window is computed.
            take(number, outputs.pop(0))
        done += len(numbers)
        if on_window is not None:
            on_window(done, tiling.num_windows)


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


class _Finisher:
    """Bring finished blocks to the target: without padding, on its grid, as labels, and to the consumers."""

    def __init__(
        self, shape: tuple[int, ...], tiling: Tiling, order: Triple, copies: Copies, target: Target, choice: Choice
    ) -> None:
        own: Triple = (shape[0], shape[1], shape[2])
        d, h, w = target.labels.shape
        self._shape, self._tiling, self._outer = own, tiling, order[0]
        channels, head = copies.outputs.channels, copies.outputs.head
        self._resampler = BlockResampler(tiling, order, own, (d, h, w), channels)
        self._write = LabelWriter(target.index, head, target.labels)
        self._feed = None
        if target.consumers:
            rows = most_outputs(tiling, 0, own[0], d)
            self._feed = ConsumerFeed(target.consumers, head, (channels, rows, h, w), choice.slab_bytes)
        self._rows = max(1, choice.slab_bytes // row_bytes(channels, tiling.window, self._outer, own, (d, h, w)))

    def finish(self, place: Place, block: Float32[np.ndarray, "F a b c"], *, ends_layer: bool) -> None:
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
            if values.size == 0:
                continue
            self._write(there, values)
            if self._feed is not None:
                self._feed(there, values)
        if ends_layer and self._feed is not None:
            self._feed.end_layer()


def _is_last(number: Triple, tiling: Tiling, order: Triple) -> bool:
    """Return whether a window is the last one of its layer along the outermost axis."""
    return all(number[axis] + 1 == len(tiling.starts[axis]) for axis in order[1:])
