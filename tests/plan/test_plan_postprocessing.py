from __future__ import annotations

import json

import pytest
from example_plan import PLAN
from pydantic import ValidationError

from sagittal.errors import PlanError
from sagittal.plan import Plan
from sagittal.plan.overrides import override, parse_settings
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume, in_words

RULES = (
    LargestComponent(),
    LargestComponent(labels=("artery", "vein")),
    MinimumVolume(label="vein", volume_ml=0.25),
    FillHoles(label="artery"),
)


def test_a_plan_without_rules_keeps_its_text_and_one_with_rules_comes_back():
    assert "postprocessing" not in json.loads(PLAN.to_json())
    plan = PLAN.replace(postprocessing=RULES)
    assert Plan.from_json(plan.to_json()) == plan


def test_rules_can_be_set_from_the_command_line():
    text = json.dumps([{"kind": "minimum_volume", "label": "vein", "volume_ml": 2.5}])
    plan = override(PLAN, parse_settings([f"postprocessing={text}"]), origin="--set")
    assert plan.postprocessing == (MinimumVolume(label="vein", volume_ml=2.5),)
    assert plan.reasons["postprocessing"] == "--set"


def test_a_label_that_is_not_there_is_refused_with_the_closest_one():
    with pytest.raises(ValidationError, match=r"no label is called 'vain'\. Did you mean 'vein'"):
        PLAN.replace(postprocessing=(FillHoles(label="vain"),))
    with pytest.raises(PlanError, match="arterie"):
        override(PLAN, {"postprocessing": [{"kind": "largest_component", "labels": ["arterie"]}]}, origin="--set")


def test_a_volume_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        MinimumVolume(label="vein", volume_ml=0.0)


def test_rules_are_told_in_words():
    assert [in_words(rule) for rule in RULES] == [
        "keep only the largest component of all foreground together",
        "keep only the largest component of artery and vein",
        "remove components of vein below 0.25 mL",
        "fill holes of artery",
    ]
