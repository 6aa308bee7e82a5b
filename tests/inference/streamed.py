"""An engine whose results are known, and a streamed prediction in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from sagittal.data.label_index import label_index
from sagittal.inference.copies import Copies, mirrors_of
from sagittal.inference.engines.engine import LinearHead, NetworkMemory, Precision
from sagittal.inference.memory import Choice
from sagittal.inference.streaming import Target, stream
from sagittal.inference.timings import Timings
from sagittal.inference.windows import tile
from sagittal.plan import DatasetSpec, Label
from sagittal.plan.base import Triple

Array = np.ndarray[Any, Any]


def classes(*values: int) -> DatasetSpec:
    labels = tuple(Label(name=f"v{value}", values=(value,)) for value in values)
    return DatasetSpec(name="d", channel_names=("a",), labels=labels, file_ending=".nii.gz")


def image_of(shape: Triple, channels: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((channels, *shape)).astype(np.float32)


class Known:
    """Mix the channels of a window with its own place in it, so that wrong weights, places and mirrors show.

    With `features`, logits are a linear head over as many of them. Counts what it was asked.
    """

    name: Literal["torch"] = "torch"
    device = "cpu"
    precision: Precision = "fp32"

    def __init__(self, outputs: int, features: int | None = None, identity: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(outputs + seed)
        self.num_outputs = outputs
        self.identity = identity
        width = features or outputs
        self.mix = rng.standard_normal((width, 3)).astype(np.float32)
        self.head: LinearHead | None = None
        if features is not None:
            weight = rng.standard_normal((outputs, features)).astype(np.float32)
            self.head = LinearHead(weight, rng.standard_normal(outputs).astype(np.float32))
        self.asked: set[str] = set()
        self.batches: list[int] = []

    def _mixed(self, windows: Array) -> Array:
        self.batches.append(len(windows))
        if self.identity:
            return windows.copy()
        first = windows[:, 0]
        ramp = np.linspace(-1, 1, first[0].size, dtype=np.float32).reshape(first.shape[1:])
        seen = np.stack([first, first * ramp, np.broadcast_to(ramp, first.shape)], axis=1)
        mixed: Array = np.einsum("fc,ncdhw->nfdhw", self.mix, seen).astype(np.float32)
        return np.ascontiguousarray(mixed)

    def logits(self, windows: Array) -> Array:
        self.asked.add("logits")
        mixed = self._mixed(windows)
        if self.head is None:
            return mixed
        logits: Array = np.einsum("kf,nfdhw->nkdhw", self.head.weight, mixed)
        return np.ascontiguousarray(logits + self.head.bias[:, None, None, None], np.float32)

    def features(self, windows: Array) -> Array:
        self.asked.add("features")
        return self._mixed(windows)

    def memory(self, window: Triple) -> NetworkMemory:
        return NetworkMemory(0, 0)


class KnownCoarse(Known):
    """The same, known at a fraction of the resolution and interpolated linearly to the window."""

    stride = 2

    def coarse_stride(self, window: Triple) -> int:
        return 1 if any(size % self.stride for size in window) else self.stride

    def coarse_logits(self, windows: Array) -> Array:
        self.asked.add("coarse")
        halves = [size // self.stride for size in windows.shape[2:]]
        blocks = windows.reshape(*windows.shape[:2], *(n for half in halves for n in (half, self.stride)))
        return self._mixed(np.ascontiguousarray(blocks.mean(axis=(3, 5, 7))))

    def logits(self, windows: Array) -> Array:
        if self.coarse_stride((windows.shape[2], windows.shape[3], windows.shape[4])) == 1:
            return super().logits(windows)
        coarse = torch.from_numpy(self.coarse_logits(windows))
        fine = nn.functional.interpolate(coarse, scale_factor=self.stride, mode="trilinear", align_corners=False)
        self.asked = {"logits"}
        return fine.numpy()


class Folds(KnownCoarse):
    """Several of them, averaged, which can be told apart."""

    def __init__(self, outputs: int, count: int, features: int | None = None, coarse: bool = False) -> None:
        kind = KnownCoarse if coarse else Known
        self.folds: Any = [kind(outputs, features, seed=seed) for seed in range(count)]
        self.num_outputs, self.num_members, self.is_coarse = outputs, count, coarse
        self.head, self.member_heads = None, None
        if features is not None:
            self.member_heads = tuple(fold.head for fold in self.folds)
            weight = np.concatenate([head.weight / np.float32(count) for head in self.member_heads], axis=1)
            self.head = LinearHead(weight, np.mean([head.bias for head in self.member_heads], axis=0))

    def coarse_stride(self, window: Triple) -> int:
        return super().coarse_stride(window) if self.is_coarse else 1

    def member_logits(self, windows: Array, *, coarse: bool = False) -> Array:
        return np.stack([(fold.coarse_logits if coarse else fold.logits)(windows) for fold in self.folds], axis=1)

    def logits(self, windows: Array) -> Array:
        return np.asarray(self.member_logits(windows).mean(axis=1))

    def coarse_logits(self, windows: Array) -> Array:
        return np.asarray(self.member_logits(windows, coarse=True).mean(axis=1))

    def features(self, windows: Array) -> Array:
        return np.concatenate([fold.features(windows) for fold in self.folds], axis=1)


class Slabs:
    """A consumer that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        self._logits: list[Array] = []

    def __call__(self, rows: slice, logits: Array) -> None:
        assert logits.shape[1] == rows.stop - rows.start and logits.dtype == np.float32
        self.rows.append((rows.start, rows.stop))
        self._logits.append(logits.copy())

    def whole(self) -> Array:
        return np.concatenate(self._logits, axis=1)


def run(
    engine: Known,
    image: Array,
    window: Triple,
    target: Triple,
    *,
    choice: Choice | None = None,
    overlap: float = 0.5,
    mirror_axes: Iterable[int] = (),
    mirror_swaps: Any = None,
    spec: DatasetSpec | None = None,
    labels: Array | None = None,
    **options: Any,
) -> Array:
    """Return the labels; class k has value k unless `spec` says otherwise."""
    choice = choice or Choice(1)
    index = label_index(spec or classes(*range(1, engine.num_outputs)))
    out = np.zeros(target, index.values_of_classes().dtype) if labels is None else labels
    copies = Copies(
        engine,
        mirrors_of(tuple(mirror_axes), mirror_swaps or {}),
        window,
        window_batch=choice.window_batch,
        kept_values=choice.kept_values,
        half=choice.half,
    )
    consumers = options.pop("consumers", ())
    tiling = tile((image.shape[1], image.shape[2], image.shape[3]), window, overlap)
    stream(image, copies, tiling, Target(index, out, consumers), choice, timings=Timings(), **options)
    return out
