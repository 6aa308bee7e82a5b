"""What the loop of one fold keeps and tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.training import fold as fold_module
from sagittal.training.checkpoint import save_checkpoint
from sagittal.training.run import train
from sagittal.training.stages import RunOptions

SETTINGS = {**TINY_SETTINGS, "schedule.steps": 3, "schedule.validations": 0}


def test_a_step_has_one_checkpoint(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Written once more, it would for a moment lie beside the hash of before: a kill then would leave none of the two.
    steps: list[int] = []

    def counted(folder: Path, state: Any, progress: Any, *, keep: int) -> Path:
        steps.append(progress.step)
        return save_checkpoint(folder, state, progress, keep=keep)

    monkeypatch.setattr(fold_module, "save_checkpoint", counted)
    options = RunOptions(device="cpu", checkpoint_every_s=0.0, keep_checkpoints=1)
    train(tiny_dataset, tmp_path / "b", settings=SETTINGS, fold="none", options=options)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("fold", "settings", "told"),
    [
        ("none", {"schedule.keep": "best"}, "schedule.keep=best"),
        ("none", {"schedule.early_stop_validations": 3, "schedule.validations": 4}, "early_stop_validations=3"),
        ("0", {"schedule.early_stop_validations": 3}, "early_stop_validations=3"),
        ("0", {"schedule.keep": "best"}, None),
    ],
)
def test_what_can_have_no_effect_is_told(
    tiny_dataset: Path, tmp_path: Path, fold: Any, settings: dict[str, Any], told: str | None
) -> None:
    lines: list[str] = []
    options = RunOptions(device="cpu", say=lines.append)
    train(tiny_dataset, tmp_path / "b", settings={**SETTINGS, **settings}, fold=fold, options=options)
    found = [line for line in lines if "has no effect" in line]
    assert [told in line for line in found] == [True] if told else not found
