from __future__ import annotations

from math import prod

import pytest
from fingerprints import fingerprint_of, spec_of

from sagittal.data.dataset import read_dataset
from sagittal.data.fingerprint import extract_fingerprint
from sagittal.errors import PlanError, ResourceError
from sagittal.plan import Plan, network_config
from sagittal.planning import make_plan

SMALL = fingerprint_of(*[(36, 50, 35)] * 30)


@pytest.fixture(scope="module", params=["mednext-s", "segformer3d"])
def plan(request) -> Plan:
    return make_plan(SMALL, spec_of("left_lobe", "right_lobe"), request.param)


def test_a_plan_is_complete_and_exact_in_json(plan):
    assert Plan.from_json(plan.to_json()) == plan
    patch = {"mednext-s": (48, 64, 48), "segformer3d": (72, 100, 72)}
    spacing_mm = {"mednext-s": 1.0, "segformer3d": 0.5}
    assert plan.patch.size == patch[plan.network_name]
    assert plan.preprocessing.spacing_mm == (spacing_mm[plan.network_name],) * 3
    assert plan.inference.mirror_axes == plan.training.augmentation.mirror_axes == (0, 1, 2)
    assert plan.training.precision == "fp32"


def test_every_reason_belongs_to_a_field_and_is_a_plain_sentence(plan):
    for name, reason in plan.reasons.items():
        value = plan
        for part in name.split("."):
            value = getattr(value, part)
        assert 3 < len(reason) < 600 and "\n" not in reason and not reason.endswith("."), name
    rules = ["preprocessing.spacing_mm", "preprocessing.normalization", "patch.size", "training.batch_size"]
    assert {*rules, "schedule.steps", "training.optimizer.learning_rate"} <= set(plan.reasons)
    assert "30 cases" in plan.reasons["preprocessing.spacing_mm"]
    assert "of 8 GiB" in plan.reasons["patch.size"]


def test_planning_is_a_pure_function_and_knows_its_fingerprint():
    first = make_plan(SMALL, spec_of("lobe"), "segformer3d")
    assert first == make_plan(SMALL, spec_of("lobe"), "SegFormer3D")
    other = make_plan(fingerprint_of(*[(36, 50, 35)] * 31), spec_of("lobe"), "segformer3d")
    assert other.fingerprint_sha256 != first.fingerprint_sha256


def test_less_memory_gives_a_smaller_patch_and_checkpointing():
    large = fingerprint_of(*[(150, 170, 140)] * 4)
    plan = make_plan(large, spec_of("lobe"), "mednext-s", memory_gib=2.0)
    assert plan.patch.size == (64, 64, 64)
    assert plan.network.checkpointing == "expansion"
    assert "a patch of 64x64x64 fits with batch 2, in place of 48x48x48" in plan.reasons["network.checkpointing"]
    assert plan.training.batch_size == 2
    assert "of 2 GiB" in plan.reasons["patch.size"]


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ResourceError, match=r"2 patches of 16x16x16 voxels needs 0\.\d+ GiB; 0\.01 GiB are allowed"):
        make_plan(SMALL, spec_of("lobe"), "mednext-s", memory_gib=0.01)


def test_wrong_requests_are_refused():
    with pytest.raises(PlanError, match="Did you mean 'mednext-s'"):
        make_plan(SMALL, spec_of("lobe"), "mednext_s")
    with pytest.raises(PlanError, match=r"fingerprint has 1 channels.* declares 2 \(T1, T2\)"):
        make_plan(SMALL, spec_of("lobe", channels=("T1", "T2")), "segformer3d")
    for memory_gib in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="expected more than 0"):
            make_plan(SMALL, spec_of("lobe"), "segformer3d", memory_gib=memory_gib)


def test_real_lesions_in_four_channels(shared_data):
    dataset = read_dataset(shared_data / "ms_lesions")
    plan = make_plan(extract_fingerprint(dataset, workers=2), dataset.spec, "segformer3d")
    assert len(plan.preprocessing.normalization) == 4
    assert all(scheme.kind == "zscore" and scheme.nonzero_only for scheme in plan.preprocessing.normalization)
    assert plan.training.batch_size == 2


def test_few_thick_slices_give_mednext_other_strides_and_say_why():
    acdc = fingerprint_of(*[(10, 224, 224)] * 20, spacings=((10.0, 1.5, 1.5),) * 20)
    plan = make_plan(acdc, spec_of("lobe"), "mednext-s", memory_gib=16.0)
    assert plan.patch.size == (10, 224, 224)
    assert plan.network.strides == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))
    assert plan.network.flat_levels == (2, 0, 0)
    assert "10 voxels, too few for 4 halvings" in plan.reasons["network.strides"]
    kept = make_plan(acdc, spec_of("lobe"), "mednext-s", memory_gib=16.0, settings={"network.strides": None})
    assert kept.network == network_config("mednext-s")
    assert kept.patch.size[0] == 16
    assert kept.reasons["network.strides"] == "set by the user with --set"


def test_a_plan_of_slices():
    thick = fingerprint_of(*[(12, 50, 44)] * 30, spacings=((5.0, 1.0, 1.0),) * 30)
    plan = make_plan(thick, spec_of("left_lobe", "right_lobe"), "mednext-s", configuration="2d")
    assert (plan.configuration, plan.network.spatial_dims, plan.patch.size) == ("2d", 2, (1, 64, 48))
    assert plan.preprocessing.keeps_slices
    assert plan.preprocessing.target_mm((4.0, 0.9, 0.8)) == (4.0, 1.0, 1.0)
    assert 12 <= plan.training.batch_size <= round(0.05 * 30 * 12 * 50 * 44 / (64 * 48))
    assert plan.training.loss.batch_dice
    assert plan.training.augmentation.mirror_axes == plan.inference.mirror_axes == (1, 2)
    assert plan.training.augmentation.rotation_degrees == 180.0
    assert Plan.from_json(plan.to_json()) == plan
    text = make_plan(thick, spec_of("lobe"), "mednext-s").replace(reasons={}).to_json()
    assert "configuration" not in text and "keeps_slices" not in text


def test_a_coarser_plan_where_a_patch_shows_little():
    large = fingerprint_of(*[(200, 220, 210)] * 4)
    with pytest.raises(PlanError, match=r"--config 3d-low: the 3d patch of \d+x\d+x\d+ voxels covers \d+%"):
        make_plan(large, spec_of("lobe"), "segformer3d", memory_gib=8.0, configuration="3d-low")
    full = make_plan(large, spec_of("lobe"), "segformer3d", memory_gib=0.5)
    low = make_plan(large, spec_of("lobe"), "segformer3d", memory_gib=0.5, configuration="3d-low")
    assert full.training.loss.batch_dice and not low.training.loss.batch_dice
    edge = low.preprocessing.spacing_mm[0]
    assert low.preprocessing.spacing_mm == (edge,) * 3 and 1.3 < edge < 4
    d, h, w = low.patch.size
    assert 0.24 < d * h * w * edge**3 / (200 * 220 * 210) < 0.4
    assert low.reasons["preprocessing.spacing_mm"].startswith("3d-low, nnU-Net's rule")


def test_what_is_set_of_the_network_is_planned_with():
    large = fingerprint_of(*[(150, 170, 140)] * 4)
    shallow = {"network.block_counts": [1] * 9, "network.channels": 8, "network.expansion_ratio": 8}

    def planned(**settings):
        named = {name.replace("__", "."): value for name, value in settings.items()}
        return make_plan(large, spec_of("lobe"), "mednext-s", memory_gib=0.5, settings={**shallow, **named})

    own = planned()
    assert own.network.channels == 8 and own.network.checkpointing == "expansion"
    never = planned(network__checkpointing="none")
    assert never.network.checkpointing == "none"
    assert never.reasons["network.checkpointing"] == "set by the user with --set"
    assert prod(never.patch.size) <= 2 / 3 * prod(own.patch.size)
    many = planned(training__batch_size=8, network__deep_supervision=False)
    assert many.training.batch_size == 8 and prod(many.patch.size) < prod(own.patch.size)
    assert "a step of 8 was measured" in many.reasons["patch.size"]
    assert many.training.loss.deep_supervision_weights == (1.0,)


def test_what_is_set_decides_on_what_follows_from_it():
    settings = {"preprocessing.spacing_mm": [1.0, 1.0, 3.0], "training.augmentation.mirror_axes": [0]}
    plan = make_plan(SMALL, spec_of("lobe"), "segformer3d", settings=settings)
    assert plan.preprocessing.transpose == (2, 0, 1)
    assert plan.patch.size[0] == 16
    assert plan.inference.mirror_axes == (0,)
    assert plan.reasons["preprocessing.spacing_mm"] == "set by the user with --set"
    kept = make_plan(SMALL, spec_of("lobe"), "segformer3d", settings={**settings, "preprocessing.transpose": [0, 1, 2]})
    assert kept.patch.size == (36, 52, 16)


def test_a_fingerprint_along_other_axes_is_refused():
    with pytest.raises(
        PlanError, match=r"orientation is stored \(preset nnunet\), the fingerprint was taken along RAS"
    ):
        make_plan(SMALL, spec_of("lobe"), "segformer3d", preset="nnunet")
