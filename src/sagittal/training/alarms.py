"""Classes that collapse: never found, or lost after they were found; and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

NOTHING = 0.01
"""A Dice below it is as good as none."""
GOOD = 0.3
"""A class that was this good is known to be learnable here."""
FALL = 0.1
"""What is left of its best after a fall."""
PATIENCE = 3
"""Validations in a row without the class before it counts as never found."""
EARLY_STEPS, EARLY_SHARE = 100, 0.1
"""Steps, and share of the schedule, before which a validation says nothing of a class: training has just begun."""

_NEVER = (
    "Set training.class_balanced=true or raise training.foreground_oversampling, so that more patches hold it; look at "
    "its labels with 'sagittal doctor'; give training more steps."
)
_FELL = (
    "Lower training.optimizer.learning_rate or training.gradient_clip_norm, and go on from an earlier state; "
    "schedule.keep=best keeps the weights of the best validation."
)
_ALL = (
    "Lower training.optimizer.learning_rate, make the warm-up longer, and check with 'sagittal doctor' that labels lie "
    "on their images."
)


@dataclass(frozen=True)
class Alarm:
    """One class, what is wrong with it, and advice."""

    label: str
    """Empty for all of them."""
    kind: Literal["never_found", "lost"]
    text: str
    advice: str


def find_alarms(validations: Sequence[Mapping[str, Any]], *, steps: int) -> tuple[Alarm, ...]:
    """Return what is wrong after the last of the validations.

    A class is `never_found` where its Dice was below `NOTHING` in the last `PATIENCE` validations and it was never
    better than `GOOD`; it is `lost` where its best Dice was above `GOOD` and a tenth of it, or less, is left. Classes
    that no reference of the last validation has are not looked at, nor are scores of the first steps, but as a class's
    best. All classes at once are one alarm.

    Args:
        validations: records of the log, in order: `dice` and `present` by label.
        steps: of the whole schedule.
    """
    early = max(EARLY_STEPS, EARLY_SHARE * steps)
    if not validations or validations[-1]["step"] < early:
        return ()
    last = validations[-1]
    there = [name for name, count in last["present"].items() if count > 0]
    found = [alarm for name in there if (alarm := _alarm(name, validations, early)) is not None]
    if len(there) > 1 and len(found) == len(there):
        kind: Literal["never_found", "lost"] = "lost" if any(alarm.kind == "lost" for alarm in found) else "never_found"
        told = "all classes are lost" if kind == "lost" else "none of the classes is found"
        return (Alarm("", kind, f"{told}: Dice {last['mean_dice']:.3f} at step {last['step']}", _ALL),)
    return tuple(found)


def _alarm(name: str, validations: Sequence[Mapping[str, Any]], early: float) -> Alarm | None:
    dice = [record["dice"].get(name) for record in validations]
    best, best_step = max(
        (value, -int(record["step"])) for record, value in zip(validations, dice, strict=True) if value is not None
    )
    now, cases = dice[-1] or 0.0, validations[-1]["present"][name]
    where = f"which is in {cases} of the references"
    if best > GOOD and now < FALL * best:
        text = f"{name} is lost: Dice {now:.3f}, after {best:.3f} at step {-best_step}; {where}"
        return Alarm(name, "lost", text, _FELL)
    recent = [record for record in validations if record["step"] >= early][-PATIENCE:]
    absent = all(
        record["present"].get(name, 0) > 0 and (record["dice"].get(name) or 0.0) < NOTHING for record in recent
    )
    if len(recent) == PATIENCE and absent:
        text = f"{name} is not found: Dice below {NOTHING} in the last {PATIENCE} validations; {where}"
        return Alarm(name, "never_found", text, _NEVER)
    return None
