"""The published figures: whole, plausible, and each with its source; own counts equal the code's."""

from __future__ import annotations

import pytest

from sagittal.plan.networks import NETWORKS
from sagittal.report.published import NOTES, PUBLISHED_COSTS, SCORE_SETS, Score, ScoreSet

SETS = {scores.title: scores for scores in SCORE_SETS}


def _score(scores: ScoreSet, name: str) -> Score:
    return next(score for score in scores.scores if score.name == name)


def test_costs_name_networks_and_notes_that_exist() -> None:
    assert len(PUBLISHED_COSTS) == 8 + 5
    for row in PUBLISHED_COSTS:
        assert row.network is None or row.network in NETWORKS
        assert all(note in NOTES for note in row.notes)
    assert {row.name for row in PUBLISHED_COSTS if row.network is None} == {"TransUNet"}


@pytest.mark.parametrize(
    ("title", "networks", "best"),
    [
        ("BTCV", 15, 84.82),
        ("AMOS22", 15, 89.87),
        ("KiTS19", 15, 91.02),
        ("BraTS21", 15, 91.57),
        ("BraTS", 10, 86.4),
        ("Synapse", 10 + 2, 87.22),
        ("ACDC", 8 + 2, 92.06),
    ],
)
def test_each_table_is_whole(title: str, networks: int, best: float) -> None:
    scores = SETS[title].scores
    assert len(scores) == networks
    assert max(score.dice for score in scores) == best
    assert all(60 < score.dice < 93 and score.source for score in scores)
    assert set(SETS[title].drawn) | set(SETS[title].omitted) == set(scores)


def test_only_what_a_second_source_gives_is_called_published_in_mednexts_sets() -> None:
    confirmed = {
        (scores.title, score.name): score.dice
        for scores in SCORE_SETS[:4]
        for score in scores.scores
        if score.standing == "published"
    }
    assert confirmed == {
        ("BTCV", "MedNeXt-L k3"): 84.57,
        ("BTCV", "MedNeXt-B k5"): 84.23,
        ("AMOS22", "nnU-Net"): 88.88,
        ("AMOS22", "UNETR"): 81.98,
        ("AMOS22", "MedNeXt-M k3"): 89.27,
        ("AMOS22", "MedNeXt-L k3"): 89.58,
        ("KiTS19", "nnU-Net"): 89.88,
        ("KiTS19", "UNETR"): 84.10,
        ("KiTS19", "MedNeXt-M k3"): 90.78,
    }


def test_nnformer_has_the_size_of_the_model_for_the_data_set() -> None:
    sizes = {title: _score(SETS[title], "nnFormer").size for title in ("BraTS", "Synapse", "ACDC", "BTCV")}
    assert [size and size.millions for size in sizes.values()] == [37.6, 150.5, 37.2, None]


def test_what_the_paper_leaves_out_stands_beside_its_table() -> None:
    assert [score.name for score in SETS["Synapse"].scores if score.standing == "left out"] == ["UNETR++", "SwinUNETR"]
    assert [score.dice for score in SETS["ACDC"].scores if score.standing == "re-run"] == [89.42, 85.0]
