"""Training that runs out of memory says where, for what, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sagittal.errors import ResourceError
from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training import cross_validation
from sagittal.training.memory import told_of_memory
from sagittal.training.run import train
from sagittal.training.stages import RunOptions

PLAN = untrained_plan("segformer3d", untrained_spec(2), patch_size=(32, 64, 32))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_an_error_for_want_of_memory_says_what_to_do(kind: type[Exception]) -> None:
    told = r"fold 0: out of memory on cpu .* 32 x 64 x 32 .*micro_batches"
    with (
        pytest.raises(ResourceError, match=told) as caught,
        told_of_memory(PLAN, torch.device("cpu"), "fold 0"),
    ):
        raise kind("tried to allocate 20 GiB\nand more")
    assert caught.value.code == "memory" and "and more" not in caught.value.message


def test_another_error_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="shapes"), told_of_memory(PLAN, torch.device("cpu"), "fold 0"):
        raise RuntimeError("shapes do not fit")


def test_training_that_runs_out_of_memory_is_told(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(cross_validation, "train_fold", short)
    settings = {**TINY_SETTINGS, "schedule.steps": 2}
    with pytest.raises(ResourceError, match=r"out of memory on cpu \(CUDA out of memory"):
        train(tiny_dataset, tmp_path / "b", settings=settings, options=RunOptions(device="cpu"))
