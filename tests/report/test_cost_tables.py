"""Tables of costs: units, what is missing, and the difference from what is published."""

from __future__ import annotations

import pytest

from sagittal.report.cost_tables import Cost, cost_table, giga, paper_table, score_table
from sagittal.report.published import PUBLISHED_COSTS, SCORE_SETS

COST = Cost(
    parameters=4_525_251,
    multiply_adds=9_410_707_456,
    multiply_adds_as_published=15_546_974_208,
    interpolation_multiply_adds=251_658_240,
    training_activation_bytes=3 * 2**29,
    inference_activation_bytes=2**28,
)
ROWS = {row.name: row for row in PUBLISHED_COSTS}


def test_costs_are_told_in_millions_thousand_millions_and_gibibytes() -> None:
    table = cost_table({"segformer3d": COST}, (4, 128, 128, 128), 3)
    assert table.rows == (("segformer3d", "4.53", "9.41", "15.55", "0.25", "1.50", "0.25"),)
    assert "4 channels and 128 × 128 × 128 voxels" in table.title
    assert any("8 multiply-adds" in note for note in table.notes)


def test_a_network_that_cannot_be_counted_says_why_in_a_note() -> None:
    table = cost_table({"unetr": "needs MONAI"}, (1, 32, 48, 64), 2)
    (row,) = table.rows
    assert row[0].startswith("unetr [")
    assert set(row[1:]) == {"–"}
    number = int(row[0].split("[")[1].rstrip("]"))
    assert table.notes[number - 1] == "needs MONAI"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "–"), (5_000_000, "0.01"), (99_990_000_000, "99.99"), (127_340_000_000, "127.3")]
)
def test_multiply_adds_have_as_many_digits_as_mean_something(count: int, text: str) -> None:
    assert giga(count) == text


def test_published_and_computed_figures_stand_side_by_side() -> None:
    table = paper_table([(ROWS["SegFormer3D"], COST), (ROWS["TransUNet"], None), (ROWS["UNETR"], "needs MONAI")])
    segformer3d, transunet, unetr = table.rows
    assert segformer3d[1:7] == ("4×128×128×128", "4.51", "4.53", "17.5", "15.55", "-11.2%")
    assert transunet[1:7] == ("1×64×128×128", "96.07", "–", "88.91", "–", "–")
    assert "What runs here has the same output for 9.41 G." in table.notes
    assert table.notes[int(unetr[-1].split(", ")[-1]) - 1] == "needs MONAI"
    assert any("no counter reproduces" in note for note in table.notes)
    assert "Published in SegFormer3D, arXiv 2404.10156." in table.notes


def test_every_published_score_is_listed_with_its_sources() -> None:
    rows = score_table(SCORE_SETS).rows
    assert len(rows) == sum(len(scores.scores) for scores in SCORE_SETS)
    assert ("BTCV", "MedNeXt-L k3", "84.57", "published") in {row[:4] for row in rows}
    assert ("Synapse", "MISSFormer", "81.96", "published") in {row[:4] for row in rows}
    assert all(all(cell for cell in row) for row in rows)
