"""Run `gpu_*_cases.py`: the Triton kernels in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

every_kernel = pytest.mark.parametrize(
    "cases", ["gpu_depthwise_cases.py", "gpu_block_cases.py", "gpu_block_whole_cases.py"]
)


def run_cases(cases: str, *, interpreted: bool) -> None:
    # The interpreter is chosen when Triton is imported, and other tests of this process may have done so.
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    path = Path(__file__).with_name(cases)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@every_kernel
def test_kernels_in_the_interpreter(cases: str) -> None:
    run_cases(cases, interpreted=True)


@every_kernel
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu(cases: str) -> None:
    run_cases(cases, interpreted=False)
