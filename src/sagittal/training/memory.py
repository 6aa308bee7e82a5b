"""What a training that runs out of memory says instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sagittal.data.loader import is_short_of_memory
from sagittal.errors import ResourceError
from sagittal.plan.plan import Plan


@contextmanager
def told_of_memory(plan: Plan, device: torch.device, doing: str) -> Iterator[None]:
    """Turn torch's errors for want of memory into one that says what to do; others are passed on.

    Args:
        plan: what needs the memory.
        device: where it was short.
        doing: what was done then, for the message.

    Raises:
        ResourceError: memory was short while the block ran.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_short_of_memory(error):
            raise
        training = plan.training
        patch = " x ".join(map(str, plan.patch.size))
        parts = f" in {training.micro_batches} parts" if training.micro_batches > 1 else ""
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"{doing}: out of memory on {device} ({said}). Expected room for a step with {training.batch_size} patches "
            f"of {patch} voxels{parts}. Free memory, or plan into another --out with --memory-gib, --set "
            "training.micro_batches=2, or a smaller training.batch_size or patch.size; the last checkpoint is intact.",
            code="memory",
        ) from error
