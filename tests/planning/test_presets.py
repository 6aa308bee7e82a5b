from __future__ import annotations

from pathlib import Path

import pytest
from fingerprints import fingerprint_of, spec_of

from sagittal.plan.optimizers import SGD, AdamW
from sagittal.planning import PRESETS, make_plan

SMALL = fingerprint_of(*[(36, 50, 35)] * 30, spacings=((1.2, 1.0, 0.9),) * 30)
ROOMY = 64.0


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "nnunet"])
def test_a_preset_is_in_the_plan_with_its_name_as_the_reason(name):
    preset = PRESETS[name]
    plan = make_plan(SMALL, spec_of("lobe"), preset.network_name, preset=name, memory_gib=ROOMY)
    tree = plan.model_dump(mode="json")
    for field, value in preset.settings.items():
        found = tree
        for part in field.split("."):
            found = found[part]
        assert (found | value if isinstance(value, dict) else value) == found, field
        assert plan.reasons[field].startswith(f"preset {name}"), field
        assert preset.notes.get(field, "") in plan.reasons[field]
    assert "measured at" in plan.reasons["patch.size"]
    assert not any(reason.startswith("training.optimizer.") for reason in plan.reasons)
    assert set(preset.notes) <= set(preset.settings)


def test_mednexts_protocol():
    plan = make_plan(SMALL, spec_of("lobe"), "mednext-b", preset="mednext-paper", memory_gib=ROOMY)
    assert plan.preprocessing.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.preprocessing.transpose == (0, 1, 2)
    assert plan.patch.size == (128, 128, 128)
    assert plan.training.optimizer == AdamW(learning_rate=1e-3, weight_decay=3e-5, eps=1e-4)
    assert plan.training.loss.deep_supervision_weights == pytest.approx(
        (0.5161, 0.2581, 0.1290, 0.0645, 0.0323), abs=5e-5
    )


def test_a_setting_goes_before_the_preset():
    settings = {"training.optimizer.learning_rate": 1e-4, "patch.size": [64, 48, 80]}
    plan = make_plan(SMALL, spec_of("lobe"), "segformer3d", preset="segformer3d-paper", settings=settings)
    assert plan.training.optimizer == AdamW(learning_rate=1e-4, weight_decay=0.01)
    assert plan.reasons["training.optimizer.learning_rate"] == "set by the user with --set"
    assert plan.patch.size == (64, 48, 80)
    assert plan.reasons["patch.size"].startswith("set by the user with --set; a step of 4 was measured at")


def test_nnunets_own_way():
    stored = SMALL.replace(orientation="stored")
    plan = make_plan(stored, spec_of("lobe"), "mednext-s", preset="nnunet")
    assert plan.preprocessing.orientation == "stored"
    assert plan.training.optimizer == SGD(learning_rate=0.01, weight_decay=3e-5, momentum=0.99)
    weights = plan.training.loss.deep_supervision_weights
    assert weights == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15, 0.0))
    assert plan.reasons["training.loss.deep_supervision_weights"] == "preset nnunet, none for the coarsest output"
    one = make_plan(stored, spec_of("lobe"), "segformer3d", preset="nnunet")
    assert one.training.loss.deep_supervision_weights == (1.0,)


def test_a_preset_that_memory_does_not_allow_stays_and_warns():
    plan = make_plan(SMALL, spec_of("lobe"), "mednext-s", preset="mednext-paper", memory_gib=8.0)
    assert plan.patch.size == (128, 128, 128)
    assert plan.network.checkpointing == "expansion"
    assert " GiB in place of " in plan.reasons["network.checkpointing"]
    assert "of 8 GiB (warning: more than is allowed" in plan.reasons["patch.size"]


def test_every_preset_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    for name in PRESETS:
        assert f"| `{name}` |" in page
