"""Equal within a margin? And how many patients would show a difference as small as that?

Both stand on the spread of the paired differences: methods that err on the same cases need few cases to be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from scipy.special import nctdtr, stdtr, stdtrit

from sagittal.plan.base import Frozen

MARGIN = 0.005
"""Half a point of Dice: what reviewers take for no difference."""
ALPHA = 0.05
POWERS = (0.8, 0.9)
MOST_PATIENTS = 1_000_000
SIMULATIONS = 2000
_SIMULATED_VALUES = 1_000_000
"""Numbers drawn for one simulation at most: fewer simulations where each has many patients."""


class Equivalence(Frozen):
    """Two one-sided t tests: is the mean difference within the margin to both sides?"""

    margin: float
    p: float
    """The larger of the two one-sided p values."""
    low: float
    """Lower bound of the interval that belongs to the test: 90 % where alpha is 0.05."""
    high: float
    equivalent: bool
    """Whether p is below alpha, which is where the interval lies within the margin."""


class Needed(Frozen):
    """How many patients a test needs."""

    power: float
    patients: int | None
    """None where it would be more than a million."""
    simulated: float | None
    """Share of simulated studies of that many patients in which the test succeeded; None where none were simulated."""


class PowerAnalysis(Frozen):
    """What a study with paired differences of this spread could show."""

    difference: float
    """The true difference that is assumed: the margin."""
    standard_deviation: float
    """Of the paired differences between patients (n - 1)."""
    patients: int
    """Patients that the spread was measured on."""
    to_show: tuple[Needed, ...]
    """Patients with whom a two-sided paired t test shows a true difference of `difference`."""
    to_equal: tuple[Needed, ...]
    """Patients with whom two one-sided tests show equality within `difference` where there is no true difference."""
    smallest_shown: float | None
    """The true difference that as many patients as there are show with a power of 80 %."""


def equivalence_test(
    differences: Float64[np.ndarray, " patients"], margin: float, *, alpha: float = ALPHA
) -> Equivalence | None:
    """Return the two one-sided t tests (TOST) of a mean difference within `margin`; None with fewer than two patients.

    Source: D. J. Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    assert margin > 0
    known = differences[~np.isnan(differences)]
    n = len(known)
    if n < 2:
        return None
    mean, error = float(known.mean()), float(known.std(ddof=1)) / math.sqrt(n)
    reach = float(stdtrit(n - 1, 1 - alpha)) * error
    if error > 0:
        p = max(float(stdtr(n - 1, -(mean + margin) / error)), float(stdtr(n - 1, (mean - margin) / error)))
    else:
        p = 0.0 if abs(mean) < margin else 1.0
    return Equivalence(margin=margin, p=p, low=mean - reach, high=mean + reach, equivalent=p < alpha)


def power_to_show(patients: int, effect: float, *, alpha: float = ALPHA) -> float:
    """Return the power of a two-sided paired t test.

    Args:
        patients: in the study.
        effect: true mean difference in standard deviations of the differences.
        alpha: level of the test.

    Source: the noncentral t distribution; J. Cohen, Statistical Power Analysis (1988), chapter 2.
    """
    df, shift = patients - 1, abs(effect) * math.sqrt(patients)
    critical = float(stdtrit(df, 1 - alpha / 2))
    return float(1 - nctdtr(df, shift, critical) + nctdtr(df, shift, -critical))


def power_to_equal(patients: int, effect: float, *, alpha: float = ALPHA) -> float:
    """Return the power of two one-sided t tests where there is no true difference; `effect` is the margin in SDs.

    A lower bound (the chance that both tests succeed is at least the sum of the chances of each minus one), nearly
    exact where the power is above one half.

    Source: K. F. Phillips, Journal of Pharmacokinetics and Biopharmaceutics 18 (1990).
    """
    df = patients - 1
    critical = float(stdtrit(df, 1 - alpha))
    return max(0.0, 2 * float(1 - nctdtr(df, abs(effect) * math.sqrt(patients), critical)) - 1)


def patients_needed(power_of: Callable[[int], float], power: float) -> int | None:
    """Return the least number of patients (2 or more) of which `power_of` is at least `power`; it must not fall."""
    high = 2
    while power_of(high) < power:
        if high >= MOST_PATIENTS:
            return None
        high = min(2 * high, MOST_PATIENTS)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if middle >= 2 and power_of(middle) >= power:
            high = middle
        else:
            low = middle
    return high


def analyse_power(
    differences: Float64[np.ndarray, " patients"],
    margin: float,
    *,
    alpha: float = ALPHA,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> PowerAnalysis | None:
    """Return how many patients would show a difference of `margin`, and equality within it.

    By the t formula. With `simulations` other than 0 each number is confirmed: studies of that many patients are drawn
    from the differences that were found (moved to the assumed mean, their spread kept) and tested.

    Args:
        differences: one per patient, NaN where undefined.
        margin: the difference to show, above 0.
        alpha: level of the tests.
        simulations: studies to draw; fewer where they have many patients; 0 for none.
        seed: of the draws.

    Returns:
        None where there are fewer than two patients, or no spread between them to go by.
    """
    assert margin > 0
    known = differences[~np.isnan(differences)]
    spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    if spread <= 1e-12:
        return None
    effect, rng = margin / spread, np.random.default_rng(seed)
    # Drawn with replacement, differences spread by n, not n - 1: the assumed spread is the one of the formula.
    centred = (known - known.mean()) * math.sqrt(len(known) / (len(known) - 1))
    to_show, to_equal = [], []
    for power in POWERS:
        shown = patients_needed(lambda patients: power_to_show(patients, effect, alpha=alpha), power)
        equal = patients_needed(lambda patients: power_to_equal(patients, effect, alpha=alpha), power)
        confirmed = [
            _simulate(test, patients, simulations, rng)
            for test, patients in ((_shows(centred + margin, alpha), shown), (_equals(centred, margin, alpha), equal))
        ]
        to_show.append(Needed(power=power, patients=shown, simulated=confirmed[0]))
        to_equal.append(Needed(power=power, patients=equal, simulated=confirmed[1]))
    return PowerAnalysis(
        difference=margin,
        standard_deviation=spread,
        patients=len(known),
        to_show=tuple(to_show),
        to_equal=tuple(to_equal),
        smallest_shown=_smallest_shown(len(known), spread, alpha),
    )


Test = Callable[[int, int, np.random.Generator], np.ndarray]
"""(studies, patients, generator) -> whether the test succeeded in each study."""


def _simulate(test: Test, patients: int | None, simulations: int, rng: np.random.Generator) -> float | None:
    if patients is None or not simulations:
        return None
    studies = max(1, min(simulations, _SIMULATED_VALUES // patients))
    # With fewer studies than these the share says less than the formula does.
    return float(test(studies, patients, rng).mean()) if studies >= 200 else None


def _shows(values: Float64[np.ndarray, " n"], alpha: float) -> Test:
    def test(studies: int, patients: int, rng: np.random.Generator) -> np.ndarray:
        mean, error = _drawn(values, studies, patients, rng)
        found: np.ndarray = np.abs(mean) > float(stdtrit(patients - 1, 1 - alpha / 2)) * error
        return found

    return test


def _equals(values: Float64[np.ndarray, " n"], margin: float, alpha: float) -> Test:
    def test(studies: int, patients: int, rng: np.random.Generator) -> np.ndarray:
        mean, error = _drawn(values, studies, patients, rng)
        found: np.ndarray = np.abs(mean) + float(stdtrit(patients - 1, 1 - alpha)) * error < margin
        return found

    return test


def _drawn(
    values: Float64[np.ndarray, " n"], studies: int, patients: int, rng: np.random.Generator
) -> tuple[Float64[np.ndarray, " studies"], Float64[np.ndarray, " studies"]]:
    drawn = values[rng.integers(len(values), size=(studies, patients))]
    return drawn.mean(1), drawn.std(1, ddof=1) / math.sqrt(patients)


def _smallest_shown(patients: int, spread: float, alpha: float) -> float | None:
    low, high = 0.0, 1.0
    while power_to_show(patients, high, alpha=alpha) < POWERS[0]:
        high *= 2
        if high > 1e3:
            return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power_to_show(patients, middle, alpha=alpha) >= POWERS[0] else (middle, high)
    return high * spread
