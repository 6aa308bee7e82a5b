"""Classes that collapse, with scripted scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from sagittal.training import alarms

find_alarms = partial(alarms.find_alarms, steps=1000)


def validations(present: int = 5, **dice: list[float | None]) -> list[dict[str, Any]]:
    rows = [dict(zip(dice, values, strict=True)) for values in zip(*dice.values(), strict=True)]
    known = [[value for value in row.values() if value is not None] for row in rows]
    return [
        {
            "kind": "validation",
            "step": 200 * (number + 1),
            "dice": row,
            "mean_dice": sum(values) / max(len(values), 1),
            "present": dict.fromkeys(dice, present),
        }
        for number, (row, values) in enumerate(zip(rows, known, strict=True))
    ]


def test_a_class_that_is_never_found_is_an_alarm_at_the_third_validation() -> None:
    scores = validations(organ=[0.2, 0.5, 0.6], lesion=[0.0, 0.005, 0.0])
    assert find_alarms(scores[:2]) == ()
    (alarm,) = find_alarms(scores)
    assert (alarm.label, alarm.kind) == ("lesion", "never_found")
    assert "Dice below 0.01 in the last 3 validations" in alarm.text
    assert "class_balanced" in alarm.advice


def test_a_class_that_falls_to_a_tenth_of_its_best_is_an_alarm_at_once() -> None:
    scores = validations(organ=[0.5, 0.7, 0.7], lesion=[0.2, 0.41, 0.04])
    assert find_alarms(scores[:2]) == ()
    (alarm,) = find_alarms(scores)
    assert (alarm.label, alarm.kind) == ("lesion", "lost")
    assert alarm.text.startswith("lesion is lost: Dice 0.040, after 0.410 at step 400")
    assert "learning_rate" in alarm.advice


@pytest.mark.parametrize(
    "lesion",
    [
        [0.0, 0.0, 0.02],  # it has begun
        [0.2, 0.29, 0.02],  # it was never good
        [0.4, 0.5, 0.06],  # a bad validation, more than a tenth of the best
        [0.0, None, 0.0],  # in no case of one of the validations
    ],
)
def test_what_is_no_collapse_is_no_alarm(lesion: list[float | None]) -> None:
    scores = validations(organ=[0.5, 0.6, 0.7], lesion=lesion)
    if lesion[1] is None:
        scores[1]["present"]["lesion"] = 0
    assert find_alarms(scores) == ()


def test_a_class_that_no_reference_has_is_not_missed() -> None:
    scores = validations(organ=[0.5, 0.6, 0.7], ghost=[0.0, 0.0, 0.0])
    for record in scores:
        record["present"]["ghost"] = 0
    assert find_alarms(scores) == ()


def test_an_alarm_ends_when_the_class_is_found() -> None:
    scores = validations(organ=[0.5, 0.6, 0.7, 0.7], lesion=[0.0, 0.0, 0.0, 0.3])
    assert find_alarms(scores[:3]) and find_alarms(scores) == ()


def test_all_classes_at_once_are_one_alarm_about_the_run() -> None:
    (alarm,) = find_alarms(validations(organ=[0.8, 0.8, 0.0], lesion=[0.5, 0.5, 0.0]))
    assert (alarm.label, alarm.kind) == ("", "lost")
    assert "all classes" in alarm.text and "warm-up" in alarm.advice
    (alarm,) = find_alarms(validations(organ=[0.0] * 3, lesion=[0.0] * 3))
    assert alarm.kind == "never_found" and "none of the classes" in alarm.text


def test_one_class_alone_is_named() -> None:
    (alarm,) = find_alarms(validations(lesion=[0.0, 0.0, 0.0]))
    assert alarm.label == "lesion"
    assert find_alarms([]) == ()


@pytest.mark.parametrize(("steps", "found"), [(2000, ["lesion"]), (2001, []), (100_000, [])])
def test_a_class_is_not_missed_before_a_tenth_of_the_steps(steps: int, found: list[str]) -> None:
    scores = validations(organ=[0.8] * 3, lesion=[0.0] * 3)
    assert [alarm.label for alarm in alarms.find_alarms(scores, steps=steps)] == found


@pytest.mark.parametrize(("steps", "found"), [(6000, ["organ"]), (6001, [])])
def test_a_class_is_not_lost_before_a_tenth_of_the_steps_but_may_have_been_good_there(
    steps: int, found: list[str]
) -> None:
    scores = validations(organ=[0.8, 0.8, 0.0], lesion=[0.5] * 3)
    assert [alarm.label for alarm in alarms.find_alarms(scores, steps=steps)] == found


def test_a_run_of_a_few_steps_alarms_nobody() -> None:
    scores = [record | {"step": number + 97} for number, record in enumerate(validations(organ=[0.0] * 4))]
    assert alarms.find_alarms(scores[:3], steps=99) == ()
    assert alarms.find_alarms(scores, steps=100) == ()
    assert alarms.find_alarms([record | {"step": record["step"] + 3} for record in scores], steps=103)
