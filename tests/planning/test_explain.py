from __future__ import annotations

import json

import pytest
from fingerprints import fingerprint_of, spec_of

from sagittal.plan import network_config
from sagittal.planning import explain, make_plan
from sagittal.planning.explain import UNKNOWN, reason_of, warnings_of

THICK = fingerprint_of(*[(12, 50, 44)] * 30, spacings=((5.0, 1.0, 1.0),) * 30)


@pytest.mark.parametrize(
    ("network", "configuration"),
    [("mednext-s", "3d"), ("segformer3d", "2d"), ("plainconvunet", "3d"), ("transbts", "3d"), ("nnformer-acdc", "3d")],
)
def test_every_number_of_a_plan_has_a_reason(network, configuration):
    plan = make_plan(THICK, spec_of("lobe"), network, configuration=configuration)
    explained = explain(plan)
    assert [field.name for field in explained if field.reason == UNKNOWN] == []
    names = [field.name for field in explained]
    assert len(names) == len(set(names))
    assert {"configuration", "patch.size", "training.optimizer.kind", "preprocessing.keeps_slices"} <= set(names)
    assert {f"network.{name}" for name in type(network_config(network)).model_fields} <= set(names)
    assert not any(name.startswith("reasons") for name in names)
    values = {field.name: field.value for field in explained}
    assert json.loads(json.dumps(values)) == values
    assert values["patch.size"] == list(plan.patch.size)


def test_a_field_goes_by_its_own_reason_then_by_its_groups():
    plan = make_plan(THICK, spec_of("lobe"), "segformer3d")
    plan = plan.replace(reasons={"training": "a", "training.loss": "b", "training.loss.batch_dice": "c"})
    assert [reason_of(plan, f"training.{name}") for name in ("loss.batch_dice", "loss.dice_smooth", "seed")] == [*"cba"]
    assert reason_of(plan, "patch.size") == UNKNOWN


def test_warnings_are_found_with_their_fields():
    plan = make_plan(THICK, spec_of("lobe", channels=("ct_scan",)), "segformer3d")
    (warning,) = warnings_of(plan)
    assert warning.startswith("preprocessing.normalization: 'ct_scan'") and "name it 'CT'" in warning
    assert warnings_of(make_plan(THICK, spec_of("lobe"), "segformer3d")) == ()
