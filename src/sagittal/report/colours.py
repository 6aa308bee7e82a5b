"""Colours of classes: the same in every picture, plot and table of a report.

After Okabe and Ito's palette, each moved to a middle lightness so that it reads on a black scan, a white page and a
dark page alike. No meaning rests on colour alone: a reference is drawn solid, a prediction dashed, and every class is
named beside its colour.
"""

from __future__ import annotations

CLASS_COLOURS = (
    "#2f8fe8",  # blue
    "#e6860a",  # orange
    "#14a87e",  # green
    "#d76cb4",  # pink
    "#a99312",  # olive
    "#e2503a",  # vermilion
    "#8f7bf0",  # violet
    "#3fb0c4",  # cyan
)

PREDICTION_COLOUR = "#ffb13d"
"""Colour of a prediction where there is one class only, so that hue is free to tell it from the reference."""


def class_colour(index: int) -> str:
    """Return the colour of the class at `index`; colours repeat after eight classes."""
    return CLASS_COLOURS[index % len(CLASS_COLOURS)]
