"""What networks cost, in tables: computed for one input, beside the papers' figures, and the points of the picture.

Torch-free: the figures are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sagittal.report.published import NOTES, PublishedCost, ScoreSet
from sagittal.report.text_table import Notes, TextTable

GIB = 2**30
_NOTHING = "–"


@dataclass(frozen=True)
class Cost:
    """What a network costs at a stated input, in batches of one."""

    parameters: int
    multiply_adds: int
    """Of convolutions, linear layers and attention's products, in one prediction."""
    multiply_adds_as_published: int
    """The same if the network were computed the way its paper describes."""
    interpolation_multiply_adds: int
    training_activation_bytes: int | None = None
    """None where it was not asked for."""
    inference_activation_bytes: int | None = None


Costs = Mapping[str, Cost | str]
"""Costs by the network's name, or why they could not be computed."""


def cost_table(costs: Costs, shape: Sequence[int], classes: int) -> TextTable:
    """Return a row for each network."""
    header = (
        "network",
        "params (M)",
        "MACs (G)",
        "as published (G)",
        "interpolation (G)",
        "train (GiB)",
        "predict (GiB)",
    )
    notes = Notes()
    notes.refer([NOTES[key] for key in ("MACs", "interpolation", "activations")])
    rows = []
    for name, cost in costs.items():
        if isinstance(cost, str):
            rows.append((f"{name} [{notes.refer([cost])}]", *[_NOTHING] * (len(header) - 1)))
            continue
        arithmetic = (cost.multiply_adds, cost.multiply_adds_as_published, cost.interpolation_multiply_adds)
        memory = (cost.training_activation_bytes, cost.inference_activation_bytes)
        rows.append((name, millions(cost.parameters), *map(giga, arithmetic), *map(_gibibytes, memory)))
    title = f"One image of {_sizes(shape)}, {classes} classes, without deep supervision, float32."
    return TextTable(title, header, tuple(rows), frozenset(header[1:]), notes.texts)


def paper_table(computed: Sequence[tuple[PublishedCost, Cost | str | None]]) -> TextTable:
    """Return the papers' figures, each beside what was computed for it; None where there is no implementation."""
    header = (
        "network",
        "input",
        "params (M)",
        "here (M)",
        "GFLOPs",
        "MACs (G)",
        "diff",
        "notes",
    )
    notes = Notes()
    rows = []
    for row, cost in computed:
        texts = [f"Published in {row.paper}.", *(NOTES[key] for key in row.notes)]
        ours = [_NOTHING] * 3
        if isinstance(cost, str):
            texts.append(cost)
        elif cost is not None:
            share = cost.multiply_adds_as_published / (row.giga_multiply_adds * 1e9) - 1
            ours = [
                millions(cost.parameters),
                giga(cost.multiply_adds_as_published),
                f"{100 * share:+.1f}%",
            ]
            if cost.multiply_adds != cost.multiply_adds_as_published:
                texts.append(f"What runs here has the same output for {giga(cost.multiply_adds)} G.")
        where = (row.name, "×".join(map(str, row.input_shape)))
        published = (f"{row.parameters_millions:g}", f"{row.giga_multiply_adds:g}")
        rows.append((*where, published[0], ours[0], published[1], *ours[1:], notes.refer(texts)))
    title = (
        "Published: params, GFLOPs. Computed at the same input, without deep supervision: parameters; MACs of the "
        "network as its paper describes it, and their difference from the published figure."
    )
    return TextTable(title, header, tuple(rows), frozenset(header[2:7]), notes.texts)


def score_table(sets: Sequence[ScoreSet]) -> TextTable:
    """Return every published Dice with the parameters it is drawn over, and where both are from."""
    header = ("data set", "network", "Dice (%)", "standing", "source", "parameters (M)", "source of the parameters")
    rows = []
    for scores in sets:
        for score in scores.scores:
            size = (f"{score.size.millions:g}", score.size.source) if score.size else (_NOTHING, "not known; not drawn")
            rows.append((scores.title, score.name, f"{score.dice:g}", score.standing, score.source, *size))
    title = "The points of the picture."
    return TextTable(title, header, tuple(rows), frozenset({"Dice (%)", "parameters (M)"}))


def millions(count: int) -> str:
    """Return a number of parameters in millions, two digits behind the point."""
    return f"{count / 1e6:.2f}"


def giga(count: int) -> str:
    """Return multiply-adds in 10^9: two digits behind the point, one from 100 on, nothing for none."""
    if count == 0:
        return _NOTHING
    return f"{count / 1e9:.1f}" if count >= 100e9 else f"{count / 1e9:.2f}"


def _gibibytes(count: int | None) -> str:
    return _NOTHING if count is None else f"{count / GIB:.2f}"


def _sizes(shape: Sequence[int]) -> str:
    channels, *axes = shape
    return f"{channels} channel{'s' if channels > 1 else ''} and {' × '.join(map(str, axes))} voxels (D × H × W)"
