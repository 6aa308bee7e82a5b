from __future__ import annotations

import json

import pytest
from example_plan import CLASSES, PLAN, REGIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sagittal.errors import PlanError
from sagittal.plan import NETWORKS, Plan, SegFormer3DConfig
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.loss import Loss
from sagittal.plan.optimizers import SGD, AdamW
from sagittal.plan.plan import Inference, NoNormalization, Patch, RescaleToUnit, as_triple
from sagittal.plan.schedule import Schedule

VARIANTS = [
    PLAN,
    PLAN.replace(network=SegFormer3DConfig(), training=PLAN.training.replace(loss=Loss())),
    PLAN.replace(
        dataset=REGIONS,
        preprocessing=PLAN.preprocessing.replace(normalization=(RescaleToUnit(),), orientation="stored"),
    ),
    PLAN.replace(training=PLAN.training.replace(optimizer=SGD(learning_rate=0.01, weight_decay=0.0))),
    PLAN.replace(preprocessing=PLAN.preprocessing.replace(normalization=(NoNormalization(),) * 2)),
]


@pytest.mark.parametrize("plan", VARIANTS)
def test_the_json_round_trip_is_exact(plan):
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_survives_the_round_trip(name):
    network = NETWORKS[name]
    loss = PLAN.training.loss if network.scales == PLAN.network.scales else Loss()
    plan = PLAN.replace(network=network, network_name=name, training=PLAN.training.replace(loss=loss))
    assert Plan.from_json(plan.to_json()) == plan


positive = st.floats(1e-300, 1e300)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(spacing=st.tuples(positive, positive, positive), rate=positive, seed=st.integers(-(2**63), 2**64))
def test_any_number_survives_the_round_trip(spacing, rate, seed):
    plan = PLAN.replace(
        preprocessing=PLAN.preprocessing.replace(spacing_mm=spacing),
        training=PLAN.training.replace(seed=seed, optimizer=AdamW(learning_rate=rate, weight_decay=rate)),
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_defaults_are_written_out():
    tree = json.loads(PLAN.to_json())
    assert tree["schema_version"] == 1
    assert tree["training"]["foreground_oversampling"] == 0.33
    assert tree["preprocessing"]["orientation"] == "RAS"


def test_a_plan_of_another_version_or_with_unknown_fields_is_refused():
    tree = json.loads(PLAN.to_json())
    for changes, message in (
        ({"schema_version": 2}, "schema_version 2 is newer than 1"),
        ({"patch_size": 3}, "patch_size: Extra inputs"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.from_json(json.dumps({**tree, **changes}), source="plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: PLAN.replace(dataset=CLASSES.replace(channel_names=("CT",))), "1 channels but 2 normalisations"),
        (lambda: PLAN.replace(network=SegFormer3DConfig()), "has 5 values; this network has 1 output"),
        (
            lambda: PLAN.replace(network=NETWORKS["mednext-s"].replace(deep_supervision=False)),
            "has 5 values; this network has 1 output",
        ),
        (lambda: PLAN.replace(training=PLAN.training.replace(loss=Loss())), "has 1 values; this network has 5 outputs"),
        (lambda: Patch(size=(0, 8, 8)), "greater than or equal to 1"),
        (lambda: PLAN.preprocessing.replace(spacing_mm=(1.0, 0.0, 1.0)), "greater than 0"),
        (lambda: PLAN.preprocessing.replace(orientation="LPS"), "'RAS' or 'stored'"),
        (lambda: PLAN.training.replace(batch_size=0), "greater than or equal to 1"),
        (lambda: PLAN.training.replace(foreground_oversampling=1.1), "less than or equal to 1"),
        (lambda: PLAN.training.replace(folds=0), "greater than or equal to 1"),
        (lambda: PLAN.training.replace(folds=1), "folds is 1, expected 2 to 5: only own splits"),
        (lambda: PLAN.training.replace(folds=6), "less than or equal to 5"),
        (lambda: PLAN.training.replace(split="by hand"), "'random', 'stratified' or 'own'"),
        (lambda: PLAN.training.replace(patient_pattern="(.*"), "is no regular expression"),
        (lambda: PLAN.training.replace(patient_pattern=".*"), "needs a group"),
        (lambda: PLAN.training.replace(patient_pattern="(.*)", patients_listed=True), "exclude each other"),
        (lambda: PLAN.training.replace(split_sha256="0"), "should match pattern"),
        (lambda: PLAN.training.replace(precision="fp8"), "'fp32', 'bf16'"),
        (lambda: AdamW(learning_rate=0.0, weight_decay=0.0), "greater than 0"),
        (lambda: AdamW(learning_rate=1.0, weight_decay=-1.0), "greater than or equal to 0"),
        (lambda: Augmentation(rotation_degrees=181.0), "less than or equal to 180"),
        (lambda: Augmentation(mirror_axes=(3,)), "Input should be 0, 1 or 2"),
        (lambda: Inference(overlap=1.0), "less than 1"),
        (lambda: Schedule(steps=20, warmup_fraction=1.0), "less than 1"),
    ],
)
def test_every_validation_fires(change, message):
    with pytest.raises(ValidationError, match=message):
        change()


def test_the_warm_up_is_a_share_of_the_steps():
    assert [Schedule(steps=steps, warmup_fraction=0.02).warmup_steps for steps in (10, 100, 250_000)] == [0, 2, 5_000]


def test_a_triple_has_three_numbers():
    assert as_triple([1, 2, 3]) == (1, 2, 3)
    with pytest.raises(ValueError, match="unpack"):
        as_triple([1, 2])


def test_slices_need_a_network_and_a_patch_of_slices():
    flat = PLAN.network.for_slices()
    sliced = PLAN.replace(configuration="2d", network=flat, patch=Patch(size=(1, 64, 80)))
    assert Plan.from_json(sliced.to_json()) == sliced
    assert PLAN.replace(configuration="3d-low").network.dims == 3
    for changes in ({"configuration": "2d"}, {"network": flat}):
        with pytest.raises(ValidationError, match="leave the network's axes as they were"):
            PLAN.replace(**changes)
    with pytest.raises(ValidationError, match=r"patch\.size must begin with 1, got \[48, 64, 80\]"):
        sliced.replace(patch=PLAN.patch)


def test_slices_keep_their_own_spacing_along_the_networks_first_axis():
    resampled = PLAN.preprocessing.replace(transpose=(2, 0, 1), spacing_mm=(2.0, 1.0, 5.0))
    assert resampled.target_mm((4.0, 0.9, 0.8)) == (5.0, 2.0, 1.0)
    assert resampled.replace(keeps_slices=True).target_mm((4.0, 0.9, 0.8)) == (4.0, 2.0, 1.0)


def test_only_some_networks_have_a_form_for_slices():
    able = {name for name, config in NETWORKS.items() if config.for_slices() is not None}
    assert able == {name for name in NETWORKS if name.startswith("mednext") or name == "segformer3d"}
    for name in able:
        flat = NETWORKS[name].for_slices()
        assert flat.dims == 2 and flat.for_slices() == flat
    thick = NETWORKS["mednext-s"].replace(strides=((1, 2, 2),) * 4, flat_levels=(4, 0, 0)).for_slices()
    assert (thick.strides, thick.flat_levels) == (((2, 2),) * 4, (0, 0))
