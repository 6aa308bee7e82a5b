"""The states of torch's random generators."""

from __future__ import annotations

import pytest
import torch

from sagittal.training.generators import generator_states, restore_generators

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_numbers_are_drawn_again_after_a_restore() -> None:
    torch.manual_seed(5)
    torch.rand(3)
    states = generator_states(CPU)
    assert set(states) == {"torch"}
    drawn = torch.rand(4)
    torch.rand(9)
    restore_generators(states, CPU)
    assert torch.equal(torch.rand(4), drawn)


def test_every_cuda_device_is_kept_and_those_that_are_gone_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [torch.tensor([number], dtype=torch.uint8) for number in (7, 8, 9)]
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: held)
    states = generator_states(CUDA)
    assert list(states) == ["torch", "cuda.0", "cuda.1", "cuda.2"]
    put: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, number: put.update({number: int(state)}))
    restore_generators(states, CUDA)
    assert put == {0: 7, 1: 8}
    restore_generators(generator_states(CPU), CUDA)
    assert put == {0: 7, 1: 8}, "a run that began on a CPU may go on on a GPU"
