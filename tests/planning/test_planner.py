from __future__ import annotations

import pytest
from fingerprints import fingerprint_of, spec_of

from sagittal.data.dataset import read_dataset
from sagittal.data.fingerprint import extract_fingerprint
from sagittal.errors import PlanError, ResourceError
from sagittal.plan import Plan
from sagittal.planning import make_plan

SMALL = fingerprint_of(*[(36, 50, 35)] * 30)


@pytest.fixture(scope="module", params=["mednext-s", "segformer3d"])
def plan(request) -> Plan:
    return make_plan(SMALL, spec_of("left_lobe", "right_lobe"), request.param)


def test_a_plan_is_complete_and_exact_in_json(plan):
    assert Plan.from_json(plan.to_json()) == plan
    patch = {"mednext-s": (48, 64, 48), "segformer3d": (36, 52, 36)}
    assert plan.patch.size == patch[plan.network_name]
    assert plan.preprocessing.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.inference.mirror_axes == plan.training.augmentation.mirror_axes == (0, 1)
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


def test_less_memory_gives_a_smaller_patch():
    large = fingerprint_of(*[(150, 170, 140)] * 4)
    plan = make_plan(large, spec_of("lobe"), "mednext-s", memory_gib=2.0)
    assert plan.patch.size == (48, 48, 48)
    assert plan.training.batch_size == 2
    assert "of 2 GiB" in plan.reasons["patch.size"]


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ResourceError, match=r"two patches of 16x16x16 voxels needs 0\.\d+ GiB; 0\.01 GiB are allowed"):
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
