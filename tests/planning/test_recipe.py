from __future__ import annotations

import pytest
from fingerprints import fingerprint_of, spec_of

from sagittal.plan import MedNeXtConfig, network_config
from sagittal.plan.optimizers import SGD, AdamW
from sagittal.planning import make_plan, recipe

MEDNEXT = network_config("mednext-b")
SEGFORMER = network_config("segformer3d")


def test_mednexts_recipe():
    assert recipe.optimizer(MEDNEXT)[0] == AdamW(learning_rate=1e-3, weight_decay=3e-5, eps=1e-8)
    schedule, _ = recipe.schedule(MEDNEXT)
    assert (schedule.steps, schedule.warmup_steps, schedule.power) == (250_000, 0, 0.9)
    weights = recipe.loss(MEDNEXT)[0].deep_supervision_weights
    assert weights == pytest.approx((0.5161, 0.2581, 0.1290, 0.0645, 0.0323), abs=5e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mednext_in_fp16_is_planned_with_the_eps_that_keeps_it_from_nan(precision):
    settings = {"training.precision": precision, "patch.size": [16, 16, 16], "training.batch_size": 2}
    plan = make_plan(fingerprint_of((20, 20, 20)), spec_of("lobe"), "mednext-s", settings=settings)
    assert plan.training.optimizer == AdamW(
        learning_rate=1e-3, weight_decay=3e-5, eps=1e-4 if precision == "fp16" else 1e-8
    )
    assert "fp16" in plan.reasons["training.optimizer.eps"]
    chosen = make_plan(
        fingerprint_of((20, 20, 20)),
        spec_of("lobe"),
        "mednext-s",
        settings={**settings, "training.optimizer.eps": 1e-6},
    )
    assert chosen.training.optimizer.eps == 1e-6


def test_segformer3ds_recipe():
    optimizer, _ = recipe.optimizer(SEGFORMER)
    assert (optimizer.learning_rate, optimizer.weight_decay) == (4e-4, 0.01)
    schedule, _ = recipe.schedule(SEGFORMER)
    assert (schedule.steps, schedule.warmup_steps) == (250_000, 5_000)
    assert schedule.warmup_start_factor * optimizer.learning_rate == pytest.approx(4e-6)
    assert recipe.loss(SEGFORMER)[0].deep_supervision_weights == (1.0,)


@pytest.mark.parametrize("name", ["nnformer-synapse", "nnformer-tumour", "nnformer-acdc"])
def test_nnformers_recipe(name):
    network = network_config(name)
    optimizer, reasons = recipe.optimizer(network)
    assert optimizer == SGD(learning_rate=0.01, weight_decay=3e-5, momentum=0.99)
    assert set(reasons) == {"learning_rate", "weight_decay", "momentum"}
    schedule, reasons = recipe.schedule(network)
    assert (schedule.steps, schedule.warmup_steps, schedule.power) == (250_000, 0, 0.9)
    assert "nnFormer" in reasons["power"]
    assert recipe.loss(network)[0].deep_supervision_weights == (1.0,)


def test_transbtss_recipe():
    network = network_config("transbts")
    assert recipe.optimizer(network)[0] == AdamW(learning_rate=4e-4, weight_decay=1e-5)
    schedule, reasons = recipe.schedule(network)
    assert (schedule.steps, schedule.warmup_steps, schedule.power) == (250_000, 0, 0.9)
    assert "TransBTS" in reasons["power"]


@pytest.mark.parametrize("name", ["plainconvunet", "resencunet"])
def test_nnunets_recipe(name):
    network = network_config(name)
    optimizer, reasons = recipe.optimizer(network)
    assert optimizer == SGD(learning_rate=0.01, weight_decay=3e-5, momentum=0.99)
    assert set(reasons) == {"learning_rate", "weight_decay", "momentum"}
    schedule, _ = recipe.schedule(network)
    assert (schedule.steps, schedule.warmup_steps, schedule.power) == (250_000, 0, 0.9)
    loss, reasons = recipe.loss(network)
    assert len(loss.deep_supervision_weights) == 5
    assert "the coarsest, which nnU-Net gives no weight" in reasons["deep_supervision_weights"]
    assert recipe.loss(network.single_scale())[0].deep_supervision_weights == (1.0,)


@pytest.mark.parametrize(
    ("name", "decay", "warmup"), [("unetr", 1e-5, 2500), ("swinunetr", 1e-5, 2500), ("3d-uxnet", 0.01, 0)]
)
def test_recipes_of_unetr_swin_unetr_and_ux_net(name, decay, warmup):
    network = network_config(name)
    assert recipe.optimizer(network)[0] == AdamW(learning_rate=1e-4, weight_decay=decay)
    schedule, reasons = recipe.schedule(network)
    assert (schedule.steps, schedule.warmup_steps, schedule.power) == (250_000, warmup, 0.9)
    assert {"steps", "power", "warmup_fraction"} == set(reasons)
    assert recipe.loss(network)[0].deep_supervision_weights == (1.0,)


def test_without_deep_supervision_there_is_one_weight():
    assert recipe.loss(MedNeXtConfig(deep_supervision=False))[0].deep_supervision_weights == (1.0,)


def test_left_and_right_are_mirrored_with_their_labels_swapped():
    augmentation, reasons = recipe.augmentation(spec_of("left_kidney", "right_kidney"), (48, 64, 48))
    assert augmentation.mirror_axes == (0, 1, 2)
    assert augmentation.swapped_labels == ((2, 1, 2),)
    assert "'left_kidney' and 'right_kidney'" in reasons["mirror_axes"]
    assert "mirror images" in reasons["swapped_labels"]
    augmentation, reasons = recipe.augmentation(spec_of("kidney"), (48, 64, 48))
    assert (augmentation.mirror_axes, augmentation.swapped_labels) == ((0, 1, 2), ())
    assert reasons["swapped_labels"].startswith("no two labels")


def test_slices_swap_only_what_is_mirrored_in_their_plane():
    spec = spec_of("left_kidney", "right_kidney")
    sagittal, reasons = recipe.augmentation(spec, (1, 64, 48), transpose=(2, 0, 1), sees_slices=True)
    assert (sagittal.mirror_axes, sagittal.swapped_labels) == ((1, 2), ())
    assert reasons["swapped_labels"].startswith("no two labels")
    coronal, _ = recipe.augmentation(spec, (1, 64, 48), transpose=(1, 0, 2), sees_slices=True)
    assert coronal.swapped_labels == ((2, 1, 2),)


def test_every_reason_is_of_a_field():
    augmentation, reasons = recipe.augmentation(spec_of("left_kidney", "right_kidney"), (48, 64, 48))
    assert set(reasons) <= set(type(augmentation).model_fields)
    assert augmentation.elastic_probability == 0 and "off" in reasons["elastic_probability"]


@pytest.mark.parametrize(("patch", "degrees"), [((48, 64, 48), 30.0), ((32, 96, 96), 30.0), ((16, 64, 64), 180.0)])
def test_a_flat_patch_is_turned_in_its_plane_by_any_angle(patch, degrees):
    value, reason = recipe.rotation_degrees(patch)
    assert value == degrees
    assert ("plane" in reason) == (degrees == 180.0)


@pytest.mark.parametrize(("patch", "degrees"), [((1, 64, 48), 180.0), ((1, 64, 40), 15.0), ((1, 96, 96), 180.0)])
def test_slices_are_turned_and_mirrored_in_their_plane(patch, degrees):
    augmentation, reasons = recipe.augmentation(spec_of("lobe"), patch, sees_slices=True)
    assert augmentation.rotation_degrees == degrees
    assert augmentation.mirror_axes == (1, 2)
    assert "the axes of a slice" in reasons["mirror_axes"] and "slice" in reasons["rotation_degrees"]


@pytest.mark.parametrize(
    ("configuration", "coverage", "batch_dice"),
    [("3d", 1.2, False), ("3d", 0.13, False), ("3d", 0.12, True), ("3d-low", 0.05, False), ("2d", 1.0, True)],
)
def test_dice_is_taken_over_the_batch_where_a_patch_shows_little(configuration, coverage, batch_dice):
    loss, reasons = recipe.loss(MEDNEXT, configuration, coverage)
    assert loss.batch_dice == batch_dice
    assert reasons["batch_dice"].startswith("nnU-Net's")
