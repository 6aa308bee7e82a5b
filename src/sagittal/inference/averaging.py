"""The mean of several networks' probabilities, with a main memory that grows neither with networks nor with classes.

Networks differ in spacing, window and order of axes, so they run one after the other, each from its own slabs to one
grid. What lies between them is on disk: for each voxel the sum of the probabilities so far. It is kept as uint16 in
equal steps of 1/65535 x networks, which costs as much as float16 and errs by 1.5e-5 for two networks; float16 errs by
up to 2.4e-4 above one half, where classes are decided, and float32 would take twice the disk. The last network's slabs
are added as they are and decided at once.

The file is read and written in pieces, not mapped: a full disk is then an error that can be told instead of a signal
that ends the process, and no page of it counts as this process's memory.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer, UInt16

from sagittal.data.label_index import label_index
from sagittal.data.preprocessing import Frame
from sagittal.errors import ResourceError
from sagittal.inference.consumers import SlabConsumer
from sagittal.inference.labelling import LabelWriter
from sagittal.inference.memory import gib
from sagittal.inference.probabilities import probabilities_of
from sagittal.inference.timings import Timings
from sagittal.inference.uncertainty import Disagreement, Votes, votes_of
from sagittal.plan.base import Triple, cannot_write
from sagittal.plan.dataset import DatasetSpec
from sagittal.volumes.crop import Box
from sagittal.volumes.geometry import Reorientation

SCRATCH = "scratch"
"""Code of the error that the disk has no room for the sums of a case; a smaller case may have it."""
_TILE = 1 << 20
"""Values that are worked on at a time."""
WORK_BYTES = 10 * 4 * _TILE
"""Memory for such tiles, their temporaries included."""
_LEVELS = 65535
_BITS = 16
_BYTES = 2
_LEAST_SHARE = 1e-30
_LEAST_REGION = 1e-7


class ShareSums:
    """Sums of probabilities on disk, on the cropped grid of a frame. Use it in a `with`.

    A fresh file of zeros says "background" everywhere: of classes, what is kept of the background is the rest to one.
    So a network whose crop is smaller needs to say nothing of what is outside of it.

    Args:
        spec: the classes or regions.
        frame: of the sums; the crop of every network lies within.
        networks: how many there are, the last one included, which is not added to the file.
        folder: for the file, which has no name on POSIX, so that a killed run leaves nothing.
        keeps_votes: whether each network's decisions are kept too.

    Raises:
        ResourceError: the disk has no room for the file, or the folder can't be written.
    """

    def __init__(self, spec: DatasetSpec, frame: Frame, networks: int, folder: Path, *, keeps_votes: bool) -> None:
        self.spec, self.frame, self.networks, self.keeps_votes = spec, frame, networks, keeps_votes
        self._folder, self._scale = folder, _LEVELS // networks
        self._vote_planes = math.ceil(spec.num_outputs / _BITS) if spec.has_regions else 1
        self._planes = spec.num_outputs + (self._vote_planes * (networks - 1) if keeps_votes else 0)
        _, self._height, self._width = frame.cropped_shape
        need = _BYTES * self._planes * math.prod(frame.cropped_shape)
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if need > free:
                raise ResourceError(
                    f"averaging {networks} bundles on this scan needs {gib(need)} of disk in {folder}, and "
                    f"{gib(free)} are free. Free space, choose another folder, or crop the scan.",
                    code=SCRATCH,
                )
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - `__exit__` closes it
            self._file.truncate(need)

    def __enter__(self) -> ShareSums:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the file away."""
        self._file.close()

    def pieces(self, lines: slice) -> Iterator[slice]:
        """Yield lines along H in pieces that are worked on at a time."""
        step = max(1, _TILE // (self._planes * self._width))
        for start in range(lines.start, lines.stop, step):
            yield slice(start, min(start + step, lines.stop))

    def add(self, network: int, row: int, lines: slice, columns: slice, logits: Float32[np.ndarray, "K h w"]) -> None:
        """Add a network's probabilities at a row of D, lines of H and columns of W."""
        outputs = self.spec.num_outputs
        block = self._read(row, lines)
        shares = probabilities_of(logits, has_regions=self.spec.has_regions)
        if not self.spec.has_regions:
            np.subtract(1, shares[0], out=shares[0])
        shares *= self._scale
        np.rint(shares, out=shares)
        block[:, :outputs, columns] += shares.astype(np.uint16).swapaxes(0, 1)
        if self.keeps_votes:
            first = outputs + network * self._vote_planes
            votes = votes_of(logits[:, None], None, None, has_regions=self.spec.has_regions)
            block[:, first : first + self._vote_planes, columns] = self._packed(votes).swapaxes(0, 1)
        with _explained(self._folder):
            self._seek(row, lines)
            rest = block.data.cast("B")
            while rest:
                rest = rest[self._file.write(rest) :]

    def totals(self, row: int, lines: slice) -> tuple[Float32[np.ndarray, "K h W"], list[Votes]]:
        """Return the sums of the probabilities that were added, and each network's decisions where they are kept."""
        outputs = self.spec.num_outputs
        block = self._read(row, lines).swapaxes(0, 1)
        totals = np.divide(block[:outputs], np.float32(self._scale), dtype=np.float32)
        if not self.spec.has_regions:
            np.subtract(self.networks - 1, totals[0], out=totals[0])
        packed = block[outputs:]
        votes = [
            self._unpacked(packed[first : first + self._vote_planes])
            for first in range(0, len(packed), self._vote_planes)
        ]
        return totals, votes

    def _read(self, row: int, lines: slice) -> UInt16[np.ndarray, "h planes W"]:
        block = np.empty((lines.stop - lines.start, self._planes, self._width), np.uint16)
        with _explained(self._folder):
            self._seek(row, lines)
            count = self._file.readinto(block.data.cast("B"))
        assert count == block.nbytes, "the file has its full length from the beginning"
        return block

    def _seek(self, row: int, lines: slice) -> None:
        self._file.seek((row * self._height + lines.start) * self._planes * self._width * _BYTES)

    def _packed(self, votes: Votes) -> UInt16[np.ndarray, "planes h w"]:
        """Return numbers of classes as they are, and masks of regions as bits."""
        if not self.spec.has_regions:
            return votes.astype(np.uint16)
        packed = np.zeros((self._vote_planes, *votes.shape[2:]), np.uint16)
        for output, mask in enumerate(votes):
            packed[output // _BITS] |= mask[0].astype(np.uint16) << np.uint16(output % _BITS)
        return packed

    def _unpacked(self, packed: UInt16[np.ndarray, "planes h w"]) -> Votes:
        if not self.spec.has_regions:
            return packed
        bits = [
            packed[output // _BITS] >> np.uint16(output % _BITS) & np.uint16(1)
            for output in range(self.spec.num_outputs)
        ]
        return np.stack(bits)[:, None].astype(bool)


class Adder:
    """Adds a network's probabilities to sums: a consumer of `Predictor.predict`.

    Args:
        sums: where they are added.
        network: its number among those that are added.
        frame: where its logits lie; its order of axes and its crop may differ from those of the sums.
        timings: gets the time that this takes.
    """

    def __init__(self, sums: ShareSums, network: int, frame: Frame, timings: Timings) -> None:
        self._sums, self._network, self._frame, self._timings = sums, network, frame, timings
        self.began = False
        """Whether anything was added."""

    def __call__(self, rows: slice, logits: Float32[np.ndarray, "K d H W"]) -> None:
        """Take in a slab: rows of the network's first axis of its cropped scan."""
        self.began = True
        with self._timings.phase("finishing"):
            depth, lines, columns = _place(rows, self._frame, self._sums.frame)
            turned = self._sums.frame.reorientation.apply(self._frame.reorientation.inverse().apply(logits))
            for row in range(depth.start, depth.stop):
                for part in self._sums.pieces(lines):
                    inside = slice(part.start - lines.start, part.stop - lines.start)
                    self._sums.add(self._network, row, part, columns, turned[:, row - depth.start, inside])


class Decider:
    """Adds the last network's probabilities and decides: a consumer of `Predictor.predict`, then call `finish`.

    Args:
        sums: of the other networks.
        frame: where its logits lie, with the axes of the sums' frame in their order; its crop may be smaller.
        labels: (D, H, W) of the sums' frame, any view of a label map.
        consumers: get the mean as logits, plane by plane of the sums' frame.
        disagreement: is shown what each network decides; the sums keep votes where it is given.
        timings: gets the time that this takes.
    """

    def __init__(
        self,
        sums: ShareSums,
        frame: Frame,
        labels: Integer[np.ndarray, "D H W"],
        consumers: Sequence[SlabConsumer],
        disagreement: Disagreement | None,
        timings: Timings,
    ) -> None:
        assert frame.reorientation == sums.frame.reorientation, "slabs have to come in the order of the sums"
        self._sums, self._frame, self._timings = sums, frame, timings
        self._write = LabelWriter(label_index(sums.spec), None, labels)
        self._consumers, self._disagreement = tuple(consumers), disagreement
        outputs, (self._depth, self._height, self._width) = sums.spec.num_outputs, sums.frame.cropped_shape
        self._plane = np.empty((outputs, 1, self._height, self._width), np.float32) if consumers else None
        self._done = 0

    @property
    def began(self) -> bool:
        """Whether anything was decided."""
        return self._done > 0

    def __call__(self, rows: slice, logits: Float32[np.ndarray, "K d H W"]) -> None:
        """Take in a slab: rows of the network's first axis of its cropped scan."""
        depth, lines, columns = _place(rows, self._frame, self._sums.frame)
        with self._timings.phase("finishing"):
            self._decide_without(depth.start)
            for row in range(depth.start, depth.stop):
                self._decide(row, lines, columns, logits[:, row - depth.start])

    def finish(self) -> None:
        """Decide what lies behind the last slab."""
        with self._timings.phase("finishing"):
            self._decide_without(self._depth)

    def _decide_without(self, stop: int) -> None:
        """Decide rows that lie outside of the last network's crop."""
        nothing = np.empty((self._sums.spec.num_outputs, 0, 0), np.float32)
        for row in range(self._done, stop):
            self._decide(row, slice(0, 0), slice(0, 0), nothing)

    def _decide(self, row: int, lines: slice, columns: slice, logits: Float32[np.ndarray, "K h w"]) -> None:
        """Decide a whole row of D; `logits` are those of the last network at `lines` and `columns`."""
        sums, has_regions = self._sums, self._sums.spec.has_regions
        for part in sums.pieces(slice(0, self._height)):
            totals, votes = sums.totals(row, part)
            shared = slice(max(part.start, lines.start), max(part.start, lines.start, min(part.stop, lines.stop)))
            own = logits[:, shared.start - lines.start : shared.stop - lines.start]
            there = (slice(shared.start - part.start, shared.stop - part.start), columns)
            shares = np.zeros_like(totals)
            # Outside of its crop the network saw nothing: background.
            shares[0] = 0 if has_regions else 1
            if own.size:
                shares[:, *there] = probabilities_of(own, has_regions=has_regions)
            totals += shares
            totals /= sums.networks
            place = (slice(row, row + 1), part, slice(0, self._width))
            self._write(place, totals[:, None] - np.float32(0.5) if has_regions else totals[:, None])
            if self._disagreement is not None:
                votes.append(self._votes(own, there, (1, *totals.shape[1:])))
                self._disagreement.count(votes, np.ones((1, *totals.shape[1:]), np.float32))
            if self._plane is not None:
                self._plane[:, 0, part] = logits_of(totals, has_regions=has_regions)
        for consumer in self._consumers:
            assert self._plane is not None
            consumer(slice(row, row + 1), self._plane)
        self._done = row + 1

    def _votes(self, own: Float32[np.ndarray, "K h w"], there: tuple[slice, slice], shape: Triple) -> Votes:
        has_regions, outputs = self._sums.spec.has_regions, self._sums.spec.num_outputs
        votes = np.zeros((outputs, *shape), bool) if has_regions else np.zeros(shape, np.uint16)
        if own.size:
            votes[..., *there] = votes_of(own[:, None], None, None, has_regions=has_regions)
        return votes


def logits_of(shares: Float32[np.ndarray, "K ..."], *, has_regions: bool) -> Float32[np.ndarray, "K ..."]:
    """Return logits whose softmax, or whose sigmoid for regions, these probabilities are."""
    if has_regions:
        inside = np.clip(shares, _LEAST_REGION, 1 - _LEAST_REGION)
        return np.asarray(np.log(inside) - np.log1p(-inside), np.float32)
    return np.asarray(np.log(np.maximum(shares, _LEAST_SHARE)), np.float32)


def _place(rows: slice, own: Frame, other: Frame) -> tuple[slice, slice, slice]:
    """Return where rows of the crop of a frame lie in the crop of another frame of the same scan."""
    start, stop = own.box.start, own.box.stop
    slab = Box((start[0] + rows.start, *start[1:]), (start[0] + rows.stop, *stop[1:]))
    stored = _turned(slab, own.reorientation.inverse(), own.reorientation.shape(own.stored_shape))
    found = _turned(stored, other.reorientation, other.stored_shape)
    d, h, w = (
        slice(first - edge, last - edge)
        for first, last, edge in zip(found.start, found.stop, other.box.start, strict=True)
    )
    return d, h, w


def _turned(box: Box, change: Reorientation, shape: Triple) -> Box:
    """Return a box of an array of `shape` in the order of axes that `change` makes of it."""
    spans = []
    for axis, flip in zip(change.permutation, change.flips, strict=True):
        first, last = box.start[axis], box.stop[axis]
        spans.append((shape[axis] - last, shape[axis] - first) if flip else (first, last))
    (a, d), (b, e), (c, f) = spans
    return Box((a, b, c), (d, e, f))


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        note = "Averaging bundles keeps their probabilities there for a while."
        raise cannot_write(folder, error, note=note, code="disk") from None
