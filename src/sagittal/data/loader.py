"""Training batches in the order of their steps, made ahead in threads where that helps.

A batch is a pure function of plan, cache and step (`make_batch`), so neither the number of threads nor a stop and
resume can change what is trained on. Threads, not processes: torch lets go of the interpreter's lock while it computes,
memory-mapped cases are shared, and nothing has to be pickled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float32, Int16, Int64
from torch import Tensor

from sagittal.data.augmentation import augment, masked_channels, spatial_draw
from sagittal.data.cache import Cache
from sagittal.data.sampling import PatchDraw, draw_patches
from sagittal.data.spatial import box_size
from sagittal.errors import ResourceError, SagittalError
from sagittal.plan.base import Triple
from sagittal.plan.plan import Plan

AHEAD = 3
"""Batches that are ready or in the making while one is trained on."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one optimiser step sees."""

    step: int
    images: Float32[Tensor, "N C D H W"]
    labels: Int64[Tensor, "N D H W"]
    cases: tuple[str, ...]
    """Case of each sample."""


def make_batch(
    cache: Cache, cases: Sequence[int], plan: Plan, step: int, *, device: torch.device | str = "cpu"
) -> Batch:
    """Draw, read and augment the patches of one step; images and labels come out on `device`.

    Raises:
        ResourceError: a cached case can't be read; the message names the case.
    """
    config, patch_size, spacing_mm = plan.training.augmentation, plan.patch.size, plan.preprocessing.network_spacing_mm
    draws = draw_patches(cache, cases, plan, step)
    images, labels = [], []
    for draw in draws:
        size = box_size(spatial_draw(draw.seed, config, patch_size), patch_size, spacing_mm)
        image, label = _read_box(cache, draw, patch_size, size)
        images.append(torch.from_numpy(image).to(device))
        labels.append(torch.from_numpy(label).to(device))
    patches, targets = augment(
        images,
        labels,
        config,
        patch_size,
        [draw.seed for draw in draws],
        spacing_mm=spacing_mm,
        masked_channels=masked_channels(plan.preprocessing),
    )
    return Batch(step, patches, targets, tuple(cache.case_ids[draw.case] for draw in draws))


def _read_box(
    cache: Cache, draw: PatchDraw, patch_size: Triple, size: Triple
) -> tuple[Float32[np.ndarray, "C d h w"], Int16[np.ndarray, "d h w"]]:
    """Return the box around a patch as float32 (C, d, h, w) and int16 (d, h, w); 0 beyond the case."""
    try:
        image, labels = cache.image(draw.case), cache.labels(draw.case)
        box = np.zeros((image.shape[0], *size), dtype=np.float32)
        target = np.zeros(size, dtype=np.int16)
        inside, source = [], []
        for axis, extent in enumerate(labels.shape):
            first = draw.start[axis] - (size[axis] - patch_size[axis]) // 2
            low, high = max(first, 0), min(first + size[axis], extent)
            inside.append(slice(low - first, max(high, low) - first))
            source.append(slice(low, max(high, low)))
        box[(slice(None), *inside)] = image[(slice(None), *source)]
        target[tuple(inside)] = labels[tuple(source)]
    except (OSError, ValueError, MemoryError) as error:
        raise ResourceError(
            f"{cache.case_ids[draw.case]}: its cached voxels can't be read ({type(error).__name__}: {error}). Expected "
            "the files that preprocessing wrote. Free memory, or delete the cache folder so that it is made anew.",
            code="unreadable_cache",
        ) from error
    return box, target


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch's operations on one thread: a patch is too small to share, and other threads only spin and wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TrainingBatches:
    """Iterate over the batches of a training run, from `start_step` to the plan's last step.

    Attributes:
        waited_s: seconds that the consumer has waited for batches so far.

    An error while a batch is made is raised in its turn where the batch would have come: the same exception, with its
    step noted and its whole traceback. Close it, or use it as a context manager, to end the threads early.
    """

    def __init__(
        self,
        cache: Cache,
        case_indices: Sequence[int],
        plan: Plan,
        *,
        start_step: int = 0,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start making batches.

        Args:
            cache: preprocessed cases.
            case_indices: which of them to train on.
            plan: seed, patch, augmentation and number of steps.
            start_step: first step, for a resumed run.
            workers: threads; 0 makes each batch when it is asked for. None takes 0 on the CPU, where training keeps
                all cores busy and threads only get in each other's way (torch's number of threads is one for the
                whole process), and 2 beside an accelerator.
            device: where batches are augmented and come out.
        """
        if not case_indices:
            raise ResourceError("no training cases. Expected at least one. Check the split and the data set.")
        self._cache, self._cases, self._plan = cache, tuple(case_indices), plan
        self._device = torch.device(device)
        self._next_step = start_step
        self.waited_s = 0.0
        threads = (0 if self._device.type == "cpu" else 2) if workers is None else workers
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sagittal-batches") if threads else None
        self._pending: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return self._take()
        finally:
            self.waited_s += time.perf_counter() - started

    def close(self) -> None:
        """Drop what is not yet made and wait for what is in the making; further iteration stops at once."""
        self._next_step = self._plan.schedule.steps
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainingBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> Batch:
        last = self._plan.schedule.steps
        if self._pool is None:
            if self._next_step >= last:
                raise StopIteration
            self._next_step += 1
            with _one_thread():
                return self._make(self._next_step - 1)
        while self._next_step < last and len(self._pending) <= AHEAD:
            self._pending.append(self._pool.submit(self._make, self._next_step))
            self._next_step += 1
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def _make(self, step: int) -> Batch:
        try:
            return make_batch(self._cache, self._cases, self._plan, step, device=self._device)
        except SagittalError:
            raise
        except Exception as error:
            error.add_note(f"while the batch of step {step} was made")
            raise
