"""Channels left out of training patches: as often as asked, never all, replayable, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from sagittal.data.augmentation import augment
from sagittal.data.draws import seeded
from sagittal.data.intensity import draw_dropout
from sagittal.plan.augmentation import Augmentation
from sagittal.testing.plans import untrained_plan, untrained_spec

PATCH = (6, 9, 7)
OFF = Augmentation(rotation_probability=0.0, scaling_probability=0.0)
ON = OFF.replace(channel_dropout=0.4)


def test_each_channel_is_left_out_as_often_as_asked_and_never_all() -> None:
    drawn = [draw_dropout(seeded(seed), ON, 3) for seed in range(2000)]
    assert max(map(len, drawn)) == 2
    for channel in range(3):
        share = sum(channel in dropped for dropped in drawn) / len(drawn)
        # 0.4, less the share of the samples in which all would be gone and this one is kept.
        assert share == pytest.approx(0.4 - 0.4**3 / 3, abs=0.03)
    assert [draw_dropout(seeded(seed), ON, 3) for seed in range(2000)] == drawn


@pytest.mark.parametrize("at_once", [False, True])
def test_a_left_out_channel_is_zero_and_the_others_are_as_without(at_once: bool) -> None:
    seeds = list(range(8))
    images = [torch.randn(3, *PATCH, generator=seeded(seed)) for seed in seeds]
    labels = [torch.zeros(PATCH, dtype=torch.int16) for _ in seeds]
    plain, _ = augment(images, labels, OFF, PATCH, seeds, spacing_mm=(1.0, 1.0, 2.0), at_once=at_once)
    found, _ = augment(images, labels, ON, PATCH, seeds, spacing_mm=(1.0, 1.0, 2.0), at_once=at_once)
    gone = (found == 0).flatten(2).all(dim=2)
    assert gone.sum() > 0 and not gone.all(dim=1).any()
    assert torch.equal(found[~gone], plain[~gone])


def test_a_plan_of_one_channel_has_none_to_leave_out() -> None:
    settings = {"training.augmentation.channel_dropout": 0.2}
    assert untrained_plan("mednext-s", untrained_spec(2, 2), settings=settings).training.augmentation.channel_dropout
    plan = untrained_plan("mednext-s", untrained_spec(2))
    augmentation = plan.training.augmentation.replace(channel_dropout=0.2)
    with pytest.raises(ValidationError, match="one channel, which is never left out"):
        plan.replace(training=plan.training.replace(augmentation=augmentation))
    with pytest.raises(ValidationError, match="less than 1"):
        Augmentation(channel_dropout=1.0)
