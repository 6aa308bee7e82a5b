"""The same bits from the same run: what a CUDA device must be told for it. On the CPU training always is so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_SETTING = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Without it cuBLAS may share a workspace between streams, and sum in another order (NVIDIA's cuBLAS documentation)."""


@contextmanager
def deterministic_operations(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Let torch use only operations that give the same bits again while the block runs; nothing where not `wanted`.

    An operation that has no such form then raises torch's own error. cuBLAS reads its setting when it is first used:
    in a process that has computed on CUDA before, set CUBLAS_WORKSPACE_CONFIG=:4096:8 beforehand.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault(*CUBLAS_SETTING)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
