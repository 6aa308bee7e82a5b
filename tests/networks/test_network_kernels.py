"""Networks with the GPU kernels, here in Triton's interpreter, learn and predict what they do without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# The interpreter is chosen where a kernel is defined, so it has a process of its own; the program prints JSON.
PROGRAM = """
import json, sys
from unittest import mock
import torch
from torch import nn
from sagittal.kernels import gpu_block
from sagittal.kernels.choice import interpreted_on_cpu, use_kernels
from sagittal.networks import MedNeXtBlock

torch.set_num_threads(1)
STEPS = 10


def losses(dtype, mode):
    torch.manual_seed(0)
    # Small in everything, because the interpreter takes milliseconds for each tile.
    network = nn.Sequential(nn.Conv3d(1, 4, 1), MedNeXtBlock(4, 4, expansion_ratio=2), nn.Conv3d(4, 2, 1))
    image, labels = torch.randn(1, 1, 5, 6, 3), torch.randint(0, 2, (1, 5, 6, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    found = []
    with use_kernels(mode):
        for _ in range(STEPS):
            optimizer.zero_grad()
            # As under autocast: parameters in float32, everything else in dtype.
            parameters = {name: value.to(dtype) for name, value in network.named_parameters()}
            logits = torch.func.functional_call(network, parameters, (image.to(dtype),))
            loss = nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


dtype = getattr(torch, sys.argv[1])
with interpreted_on_cpu(), mock.patch.object(gpu_block, "backward", wraps=gpu_block.backward) as backward:
    ours, plain = losses(dtype, "on"), losses(dtype, "off")
assert backward.call_count == STEPS, "the kernels were passed by"
print(json.dumps([ours, plain]))
"""


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_ten_steps_with_and_without_kernels_have_the_same_losses(dtype: str, bound: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    ours, plain = json.loads(done.stdout)
    assert plain[-1] < 0.97 * plain[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True)) < bound


def test_segformer3d_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("gpu_segformer3d_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
