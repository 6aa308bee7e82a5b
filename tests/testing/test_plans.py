from __future__ import annotations

import pytest

from sagittal.errors import PlanError
from sagittal.plan import NETWORKS, Plan
from sagittal.testing.plans import untrained_plan, untrained_spec


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_a_plan_that_round_trips(name: str) -> None:
    plan = untrained_plan(name, untrained_spec(4, channels=2))
    assert plan.network == NETWORKS[name]
    assert plan.patch.size == (128, 128, 128)
    assert plan.preprocessing.spacing_mm == (1.0, 1.0, 1.0)
    assert Plan.from_json(plan.to_json()) == plan


def test_outputs_are_classes_and_background() -> None:
    spec = untrained_spec(4)
    assert spec.num_outputs == 4
    assert [label.values for label in spec.labels] == [(1,), (2,), (3,)]


def test_settings_are_applied_and_recorded() -> None:
    plan = untrained_plan("mednext-s", untrained_spec(2), settings={"network.deep_supervision": False})
    assert plan.network.kind == "mednext" and not plan.network.deep_supervision
    assert plan.reasons["network.deep_supervision"] == "--set"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(PlanError, match="Did you mean 'mednext-s'"):
        untrained_plan("mednext-x", untrained_spec(2))
    with pytest.raises(PlanError, match="has no field"):
        untrained_plan("mednext-s", untrained_spec(2), settings={"network.kernel": 5})
