"""Which of an evaluation's metrics stand in the first row: any set of them must give a page that fits on a phone."""

from __future__ import annotations

from collections.abc import Mapping

from sagittal.evaluation import Evaluation, Metric
from sagittal.report.colours import class_colour

DICE = "dice"
MAX_MAIN = 4
_VOLUMES = ("volume_error_ml", "volume_error_percent")


def headline_metric(metrics: Mapping[str, Metric]) -> str:
    """Return the metric that stands for the whole result: Dice where it was measured, else the first."""
    return DICE if DICE in metrics else next(iter(metrics))


def distance_metric(metrics: Mapping[str, Metric]) -> str | None:
    """Return the first metric that is an error in millimetres, HD95 before any other; None where there is none."""
    if "hd95_mm" in metrics:
        return "hd95_mm"
    distances = (key for key, metric in metrics.items() if metric.unit == "mm" and metric.higher_is_better is False)
    return next(distances, None)


def main_metrics(metrics: Mapping[str, Metric]) -> tuple[str, ...]:
    """Return the keys of at most four metrics to show first: the headline, a distance, an NSD and a volume error.

    Where one of these kinds is missing the next metric in order takes its place.
    """
    nsd = next((key for key in metrics if key.startswith("nsd")), None)
    volume = next((key for key in _VOLUMES if key in metrics), None)
    wanted = [key for key in (headline_metric(metrics), distance_metric(metrics), nsd, volume) if key is not None]
    others = [key for key in metrics if key not in wanted and key not in _VOLUMES]
    return tuple(dict.fromkeys([*wanted, *others]))[:MAX_MAIN]


def plotted_metrics(metrics: Mapping[str, Metric]) -> tuple[str, ...]:
    """Return the main metrics as they are plotted: volume errors in percent, for classes of all sizes on one axis."""
    percent = "volume_error_percent"
    shown = tuple(percent if key == "volume_error_ml" and percent in metrics else key for key in main_metrics(metrics))
    return tuple(dict.fromkeys(shown))


def class_colours(evaluation: Evaluation) -> dict[str, str]:
    """Return the colour of every class by its name."""
    return {name: class_colour(number) for number, name in enumerate(evaluation.classes.names)}


def in_words(value: float | None, metric: Metric) -> str:
    """Return a value with its unit, a dash where it is undefined."""
    return "–" if value is None else f"{value:.{metric.digits}f} {metric.unit}".rstrip()


def badness(value: float, metric: Metric) -> float:
    """Return a value that grows as `value` gets worse; of a signed error its size counts."""
    if metric.higher_is_better is None:
        return abs(value)
    return -value if metric.higher_is_better else value
