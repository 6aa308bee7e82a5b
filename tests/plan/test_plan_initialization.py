"""What a plan keeps of the weights that training starts from, and that plans without any read and hash as ever."""

from __future__ import annotations

import json

import pytest
from example_plan import PLAN
from pydantic import ValidationError

from sagittal.plan import Plan
from sagittal.plan.base import canonical_json
from sagittal.plan.overrides import override
from sagittal.plan.training import Initialization

START = Initialization(
    network_name="mednext-s",
    channel_names=("CT", "T1"),
    outputs=("background", "artery", "vein"),
    weights_sha256={"fold_0": "ab" * 32, "all": "01" * 32},
    held_out_unseen=True,
    freeze_encoder_steps=250,
)


def _starting(start: Initialization | None) -> Plan:
    return PLAN.replace(training=PLAN.training.replace(initialization=start))


def test_a_plan_of_random_weights_is_written_and_hashed_as_before_there_was_anything_else():
    assert "initialization" not in json.loads(PLAN.to_json())["training"]
    assert "initialization" not in canonical_json(PLAN)
    assert Plan.from_json(PLAN.to_json()) == PLAN == _starting(None)
    tree = json.loads(PLAN.to_json())
    tree["training"]["initialization"] = None
    assert Plan.from_json(json.dumps(tree)) == PLAN


def test_a_start_survives_the_round_trip_and_changes_the_hash():
    plan = _starting(START)
    assert Plan.from_json(plan.to_json()) == plan
    assert canonical_json(plan) != canonical_json(PLAN)
    frozen = override(plan, {"training.initialization.freeze_encoder_steps": 10}, origin="--set")
    assert frozen.training.initialization == START.replace(freeze_encoder_steps=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: START.replace(weights_sha256={}), "at least 1 item"),
        (lambda: START.replace(weights_sha256={"all": "xyz"}), "match pattern"),
        (lambda: START.replace(freeze_encoder_steps=-1), "greater than or equal to 0"),
        (
            lambda: _starting(START.replace(freeze_encoder_steps=1000)),
            r"freeze_encoder_steps is 1000 and schedule\.steps 1000: the encoder would never be trained",
        ),
    ],
)
def test_every_validation_fires(change, message):
    with pytest.raises(ValidationError, match=message):
        change()
