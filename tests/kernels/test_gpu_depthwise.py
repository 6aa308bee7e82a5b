"""Run `gpu_depthwise_cases.py`: the Triton depthwise convolutions, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = Path(__file__).with_name("gpu_depthwise_cases.py")


def run_cases(interpreter: str) -> None:
    # The interpreter is chosen when Triton is imported, and other tests of this process may have done so.
    environment = {**os.environ, "TRITON_INTERPRET": interpreter, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_convolutions_in_the_interpreter() -> None:
    run_cases("1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_convolutions_on_a_gpu() -> None:
    run_cases("0")
