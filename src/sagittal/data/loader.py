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
from threading import Barrier
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt
from torch import Tensor

from sagittal.data.augmentation import augment, masked_channels, spatial_draw
from sagittal.data.cache import Cache
from sagittal.data.case_weights import CaseWeights
from sagittal.data.mirroring import label_swaps
from sagittal.data.sampling import CasePool, PatchDraw, case_pool, draw_patches, samples_of
from sagittal.data.spatial import box_size
from sagittal.errors import ResourceError, SagittalError
from sagittal.plan.base import Triple
from sagittal.plan.plan import Plan

AHEAD = 3
"""Batches that are ready or in the making while one is trained on; where there are more threads, one for each."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one optimiser step sees."""

    step: int
    images: Float32[Tensor, "N C D H W"]
    labels: Int64[Tensor, "N D H W"]
    cases: tuple[str, ...]
    """Case of each sample."""


def make_batch(
    pool: CasePool, plan: Plan, step: int, *, device: torch.device | str = "cpu", rank: int = 0, world: int = 1
) -> Batch:
    """Draw, read and augment the patches of one step; images and labels come out on `device`.

    Args:
        pool: cases to draw from.
        plan: seed, patch, augmentation, batch.
        step: which batch.
        device: where patches are augmented.
        rank: which share of the batch is made, where `world` processes make one together.
        world: how many shares there are. Put together in order, they are the batch of one process.

    Raises:
        ResourceError: a cached case can't be read, or memory is short; the message names step and cases.
        PlanError: there are more processes than samples.
    """
    training, patch_size, spacing_mm = plan.training, plan.patch.size, plan.preprocessing.network_spacing_mm
    where = torch.device(device)
    draws = draw_patches(pool, plan, step, samples_of(training.batch_size, rank, world))
    images, labels = [], []
    for draw in draws:
        size = box_size(spatial_draw(draw.seed, training.augmentation, patch_size), patch_size, spacing_mm)
        image, label = _read_box(pool.cache, draw, patch_size, size)
        images.append(_on_device(image, where))
        labels.append(_on_device(label, where))
    patches, targets = augment(
        images,
        labels,
        training.augmentation,
        patch_size,
        [draw.seed for draw in draws],
        spacing_mm=spacing_mm,
        masked_channels=masked_channels(plan.preprocessing),
        swaps=label_swaps(plan.dataset, training.augmentation),
    )
    return Batch(step, patches, targets, tuple(pool.cache.case_ids[draw.case] for draw in draws))


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the values on a device, in the type that they are stored in: half of the bytes that float32 would be."""
    tensor = torch.from_numpy(array if array.dtype != np.uint16 else array.astype(np.int32))
    if device.type != "cuda":
        return tensor.to(device)
    # From pageable memory a copy waits for all that the device has still to do, a whole training step.
    return tensor.pin_memory().to(device, non_blocking=True)


def _read_box(
    cache: Cache, draw: PatchDraw, patch_size: Triple, size: Triple
) -> tuple[Float[np.ndarray, "C d h w"], UInt[np.ndarray, "d h w"]]:
    """Return the box (C, d, h, w) around a patch and its labels (d, h, w) as they are stored; 0 beyond the case."""
    try:
        image, labels = cache.image(draw.case), cache.labels(draw.case)
        inside, source = [], []
        for axis, extent in enumerate(labels.shape):
            first = draw.start[axis] - (size[axis] - patch_size[axis]) // 2
            low, high = max(first, 0), min(first + size[axis], extent)
            inside.append(slice(low - first, max(high, low) - first))
            source.append(slice(low, max(high, low)))
        box = np.zeros((image.shape[0], *size), dtype=image.dtype)
        target = np.zeros(size, dtype=labels.dtype)
        box[(slice(None), *inside)] = image[(slice(None), *source)]
        target[tuple(inside)] = labels[tuple(source)]
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{cache.case_ids[draw.case]}: its cached voxels can't be read ({type(error).__name__}: {error}). Expected "
            "the files that preprocessing wrote. Delete the cache folder so that it is made anew.",
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
        last_wait_s: seconds that it waited for the last one.

    An error while a batch is made is raised in its turn where the batch would have come, with its step: one that a
    user can act on says it in its message, any other stays the same exception, with a note and its whole traceback.
    Close it, or use it as a context manager, to end the threads early.
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
        weights: CaseWeights | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Start making batches.

        Args:
            cache: preprocessed cases.
            case_indices: which of them to train on.
            plan: seed, patch, augmentation and number of steps.
            start_step: first step, for a resumed run.
            workers: threads; 0 makes each batch when it is asked for. None takes 0 on the CPU, where training keeps
                all cores busy and threads only get in each other's way, and 2 beside an accelerator.
            device: where batches are augmented and come out.
            weights: how often each case is drawn; None for equally often.
            rank: which share of every batch is made here, where `world` processes train together.
            world: how many processes there are.

        Raises:
            DataError: none of the cases has a weight above 0.
            PlanError: there are more processes than samples in a batch.
            ResourceError: there are no cases, or a cached one can't be read.
        """
        if not case_indices:
            raise ResourceError("no training cases. Expected at least one. Check the split and the data set.")
        samples_of(plan.training.batch_size, rank, world)
        self._cases, self._plan = case_pool(cache, case_indices, plan, weights), plan
        self._device, self._rank, self._world = torch.device(device), rank, world
        self._next_step = start_step
        self.waited_s = self.last_wait_s = 0.0
        threads = (0 if self._device.type == "cpu" else 2) if workers is None else workers
        self._pool, self._ahead = _single_threaded(threads) if threads else None, max(AHEAD, threads)
        self._pending: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return self._take()
        finally:
            self.last_wait_s = time.perf_counter() - started
            self.waited_s += self.last_wait_s

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
        while self._next_step < last and len(self._pending) <= self._ahead:
            self._pending.append(self._pool.submit(self._make, self._next_step))
            self._next_step += 1
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def _make(self, step: int) -> Batch:
        try:
            return make_batch(self._cases, self._plan, step, device=self._device, rank=self._rank, world=self._world)
        except SagittalError as error:
            raise type(error)(f"batch of step {step}: {error.message}", code=error.code) from error
        except Exception as error:
            if is_short_of_memory(error):
                raise self._out_of_memory(step, error) from error
            error.add_note(f"while the batch of step {step} was made of {self._drawn(step)}")
            raise

    def _out_of_memory(self, step: int, error: Exception) -> ResourceError:
        return ResourceError(
            f"batch of step {step}: out of memory on {self._device} while it was made of {self._drawn(step)} "
            f"({error}). Expected room for a few batches beside the network. Free memory, or make the plan with a "
            "smaller patch.size or training.batch_size.",
            code="memory",
        )

    def _drawn(self, step: int) -> str:
        """Return the cases of a batch in words, for a message."""
        pool, samples = self._cases, samples_of(self._plan.training.batch_size, self._rank, self._world)
        try:
            draws = draw_patches(pool, self._plan, step, samples)
        except Exception:
            # The message is of another error, and this one may have the same cause.
            return "cases that can't be told"
        return ", ".join(pool.cache.case_ids[draw.case] for draw in draws)


def is_short_of_memory(error: Exception) -> bool:
    """Tell whether an error of torch's or Python's is for want of memory, on the CPU or on an accelerator."""
    # On the CPU torch has no type of its own for it.
    said = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _compute_alone() -> None:
    # The first call in a thread takes over the number of the process, so one that sets it must not be the first.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _single_threaded(threads: int) -> ThreadPoolExecutor:
    """Return a pool whose threads each keep torch's operations to themselves.

    Shared out over several, a sum would round differently, and batches would depend on how they were made.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sagittal-batches", initializer=_compute_alone)
    everyone = Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(everyone.wait)
    everyone.wait()
    # A thread sets its own number, and with it the one that threads yet to come begin with.
    torch.set_num_threads(before)
    return pool
