from __future__ import annotations

import pytest
from fingerprints import fingerprint_of, spec_of

from sagittal.errors import PlanError
from sagittal.plan import Plan
from sagittal.plan.plan import Patch
from sagittal.planning import make_plan, recipe
from sagittal.planning.budget import (
    ENOUGH_STEPS,
    FEWEST_STEPS,
    SMALLEST_AXIS,
    Timing,
    final_validation_s,
    fit_schedule,
    shrink_batch,
    shrink_patch,
)
from sagittal.planning.wishes import SET_BY_USER

TURNED = "training.augmentation.rotation_degrees"


@pytest.fixture(scope="module")
def plan() -> Plan:
    plan = make_plan(fingerprint_of(*[(20, 24, 18)] * 9), spec_of("lobe"), "segformer3d")
    return plan.replace(training=plan.training.replace(batch_size=8))


def test_the_schedule_fills_the_time_and_leaves_room_to_validate(plan):
    timing = Timing(left_s=1000.0, step_s=0.5, case_s=2.0, validation_cases=30)
    fitted = fit_schedule(plan, timing, budget_s=1200.0)
    schedule = fitted.schedule
    rounds = schedule.validations - 1
    validation_s = rounds * schedule.validation_cases * timing.case_s + final_validation_s(timing)
    assert 0.9 * timing.left_s < schedule.steps * timing.step_s + validation_s < timing.left_s
    assert rounds >= 1
    assert schedule.warmup_steps < schedule.steps
    assert (
        "--budget 1200 s" in fitted.reasons["schedule.steps"]
        and "0.500 s at best (measured)" in fitted.reasons["schedule.steps"]
    )
    assert fitted.replace(schedule=plan.schedule, reasons=plan.reasons) == plan


def test_without_held_out_cases_nothing_is_validated(plan):
    timing = Timing(left_s=1000.0, step_s=0.5, case_s=2.0, validation_cases=0)
    assert fit_schedule(plan, timing, budget_s=1000.0).schedule.validations == 0
    assert final_validation_s(timing) == 0


def test_at_least_one_held_out_case_is_validated_at_the_end():
    timing = Timing(left_s=100.0, step_s=0.5, case_s=50.0, validation_cases=30)
    assert 50 < final_validation_s(timing) < 100
    assert final_validation_s(timing.replace(left_s=1e6)) > 30 * timing.case_s


def test_a_budget_without_ten_steps_is_refused(plan):
    timing = Timing(left_s=9.0, step_s=1.0, case_s=0.1, validation_cases=0)
    with pytest.raises(PlanError, match=r"leaves 9 s for training, 8 steps of 1\.00 s") as caught:
        fit_schedule(plan, timing, budget_s=60.0)
    assert caught.value.code == "budget_too_small"


@pytest.mark.parametrize(
    ("left_s", "batch"),
    [
        (8.0 * ENOUGH_STEPS, 8),
        (5.0 * ENOUGH_STEPS, 4),
        (1.0, 2),
    ],
)
def test_the_batch_is_halved_until_enough_steps_fit(plan, left_s, batch):
    fitted = shrink_batch(plan, step_s=8.0, left_s=left_s, budget_s=left_s)
    assert fitted.training.batch_size == batch
    assert (fitted is plan) == (batch == 8)
    assert ("--budget" in fitted.reasons["training.batch_size"]) == (batch < 8)


@pytest.mark.parametrize(
    ("left_s", "size"),
    [
        (1.0 * FEWEST_STEPS, (64, 96, 64)),
        (0.6 * FEWEST_STEPS, (64, 48, 64)),
        (0.3 * FEWEST_STEPS, (32, 48, 64)),
        (1.0, (32, 48, 32)),
    ],
)
def test_the_patch_is_halved_along_its_longest_axis_until_enough_steps_fit(plan, left_s, size):
    fitted = shrink_patch(plan.replace(patch=Patch(size=(64, 96, 64))), step_s=1.0, left_s=left_s, budget_s=left_s)
    assert fitted.patch.size == size
    assert min(size) >= SMALLEST_AXIS
    assert ("--budget" in fitted.reasons["patch.size"]) == (size != (64, 96, 64))


@pytest.mark.parametrize(
    ("size", "degrees"),
    [((28, 240, 256), (180.0, 30.0)), ((16, 256, 256), (180.0, 30.0)), ((64, 96, 64), (30.0, 30.0))],
)
def test_a_flat_patch_that_is_halved_to_a_block_is_turned_by_any_angle_no_longer(plan, size, degrees):
    augmentation, why = recipe.augmentation(plan.dataset, size)
    flat = plan.replace(
        patch=Patch(size=size),
        training=plan.training.replace(augmentation=augmentation),
        reasons={**plan.reasons, TURNED: why["rotation_degrees"]},
    )
    assert flat.training.augmentation.rotation_degrees == degrees[0]
    fitted = shrink_patch(flat, step_s=1.0, left_s=1.0, budget_s=1.0)
    assert max(fitted.patch.size) <= 3 * min(fitted.patch.size)
    assert fitted.training.augmentation.rotation_degrees == degrees[1]
    assert fitted.reasons[TURNED] == recipe.rotation_degrees(fitted.patch.size)[1]


def test_a_long_slice_that_is_halved_to_a_square_is_turned_by_any_angle():
    plan = make_plan(fingerprint_of(*[(20, 128, 64)] * 9), spec_of("lobe"), "segformer3d", configuration="2d")
    assert (plan.patch.size, plan.training.augmentation.rotation_degrees) == ((1, 128, 64), 15.0)
    fitted = shrink_patch(plan, step_s=1.0, left_s=0.6 * FEWEST_STEPS, budget_s=180.0)
    assert (fitted.patch.size, fitted.training.augmentation.rotation_degrees) == ((1, 64, 64), 180.0)


def test_an_angle_that_was_set_stays_whatever_the_patch(plan):
    kept = plan.replace(
        patch=Patch(size=(28, 240, 256)),
        training=plan.training.replace(augmentation=plan.training.augmentation.replace(rotation_degrees=180.0)),
        reasons={**plan.reasons, TURNED: SET_BY_USER},
    )
    assert shrink_patch(kept, step_s=1.0, left_s=1.0, budget_s=1.0).training.augmentation.rotation_degrees == 180.0
