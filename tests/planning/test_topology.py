from __future__ import annotations

import pytest
from fingerprints import fingerprint_of, spec_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.errors import PlanError
from sagittal.plan import Plan, network_config
from sagittal.planning import make_plan
from sagittal.planning.budget import shrink_patch
from sagittal.planning.patch import patch_rule, patch_sizes
from sagittal.planning.topology import FittedStep, fitted_fields, network_for_patch, patch_multiples

ONE, TWO, THREE = (1, 1, 1), (2, 2, 2), (3, 3, 3)
PLAIN = network_config("plainconvunet")
MEDNEXT = network_config("mednext-s")
FLAT = MEDNEXT.for_slices()


@pytest.mark.parametrize("named", [PLAIN, MEDNEXT, FLAT], ids=["u-net", "mednext", "mednext of slices"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    spacing=st.tuples(*(st.floats(0.3, 8.0),) * 3),
    median=st.tuples(*(st.integers(4, 300),) * 3),
)
def test_every_patch_of_the_search_is_what_its_own_network_takes_unpadded(named, spacing, median):
    steps = FittedStep(named, spacing, 1, 2)
    sizes = patch_sizes(spacing, median, patch_rule(named), steps.multiples)
    for size in (*sizes[:3], *sizes[-3:]):
        network, _ = network_for_patch(named, spacing, size)
        assert all(edge % by == 0 for edge, by in zip(size, patch_multiples(network), strict=True))
        assert (size[0] == 1) == (named is FLAT)
    voxels = [d * h * w for d, h, w in sizes]
    assert voxels == sorted(set(voxels), reverse=True)


def test_a_u_net_gets_its_stages_and_says_why():
    network, reasons = network_for_patch(PLAIN, (3.6, 0.62, 0.62), (20, 320, 256))
    assert network.features_per_stage == (32, 64, 128, 256, 320, 320, 320)
    assert (network.n_conv_per_stage, network.n_conv_per_stage_decoder) == ((2,) * 7, (2,) * 6)
    assert network.scales == 6
    assert "20x320x256 voxels of 3.6x0.62x0.62 mm" in reasons["strides"]
    assert set(reasons) < set(type(network).model_fields)


def test_a_residual_encoder_gets_its_blocks():
    network, reasons = network_for_patch(network_config("resencunet"), (1.0, 1.0, 1.0), (32, 48, 64))
    assert network.strides == (ONE, TWO, TWO, TWO, (1, 1, 2))[: len(network.strides)]
    assert network.n_blocks_per_stage == (1, 3, 4, 6, 6)[: len(network.strides)]
    assert set(network.n_conv_per_stage_decoder) == {1}
    assert set(reasons) < set(type(network).model_fields)
    named = network_config("resencunet")
    assert network_for_patch(named, (1.0, 1.0, 1.0), (128, 128, 128))[0] == named
    assert network_for_patch(PLAIN, (1.0, 1.0, 1.0), (128, 128, 128))[0] == PLAIN


def test_mednext_on_few_thick_slices_halves_as_a_u_net_would():
    """ACDC: ten slices of 10 mm; the numbers are those of `MedNeXtConfig.for_stages`."""
    network, reasons = network_for_patch(MEDNEXT, (10.0, 1.5, 1.5), (10, 224, 224))
    assert network.strides == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))
    assert network.flat_levels == (2, 0, 0)
    assert patch_multiples(network) == (2, 16, 16)
    assert "D is 6.67 times coarser than the finest axis; D has 10 voxels, too few for 4" in reasons["strides"]
    assert set(reasons) == {"strides", "flat_levels"}


@pytest.mark.parametrize("size", [(48, 48, 48), (16, 32, 160), (128, 128, 128)])
def test_mednext_stays_as_published_where_no_axis_is_coarse_or_short(size):
    for spacing in ((1.0, 1.0, 1.0), (1.5, 0.8, 0.8)):
        assert network_for_patch(MEDNEXT, spacing, size) == (MEDNEXT, {})
    assert network_for_patch(FLAT, (9.0, 1.0, 1.0), (1, *size[1:])) == (FLAT, {})


def test_mednext_on_a_short_axis_keeps_something_to_see_there():
    network, reasons = network_for_patch(MEDNEXT, (1.0, 1.0, 1.0), (12, 64, 64))
    assert patch_multiples(network) == (2, 16, 16)
    assert network.flat_levels is None
    assert "D has 12 voxels" in reasons["strides"] and "coarser" not in reasons["strides"]
    network, _ = network_for_patch(FLAT, (5.0, 1.0, 3.0), (1, 64, 40))
    assert (network.strides, network.flat_levels) == (((2, 1), (2, 2), (2, 2), (2, 2)), (0, 1))
    assert patch_multiples(network) == (1, 16, 8)


def test_fields_that_the_user_chose_stay():
    for name in fitted_fields(MEDNEXT):
        fixed = {f"network.{name}": None}
        assert network_for_patch(MEDNEXT, (10.0, 1.5, 1.5), (10, 224, 224), fixed) == (MEDNEXT, {})
    fixed = {"network.features_per_stage": [8, 16, 24, 24]}
    network, reasons = network_for_patch(PLAIN, (1.0, 1.0, 1.0), (32, 32, 32), fixed)
    assert network.features_per_stage == (8, 16, 24, 24)
    assert len(network.strides) == 4 and "features_per_stage" not in reasons
    with pytest.raises(PlanError, match=r"for each of the 3 strides.*16x16x16 voxels 3 stages; set network\."):
        network_for_patch(PLAIN, (1.0, 1.0, 1.0), (16, 16, 16), fixed)
    whole = network_for_patch(PLAIN, (1.0, 1.0, 1.0), (16, 16, 16), {"network.strides": PLAIN.strides})
    assert whole == (PLAIN, {})
    unetr = network_config("unetr")
    asked = {"network.input_size": [32, 32, 48]}
    own = unetr.replace(input_size=(32, 32, 48))
    assert network_for_patch(unetr, (1.0, 1.0, 1.0), (64, 90, 48), asked) == (own, {})


@pytest.mark.parametrize("name", ["mednext-s", "plainconvunet", "resencunet", "unetr", "segformer3d"])
def test_the_fields_that_may_be_fitted_are_known(name):
    network = network_config(name)
    fitted, reasons = network_for_patch(network, (6.0, 1.0, 1.0), (12, 48, 48))
    changed = {field for field in type(network).model_fields if getattr(fitted, field) != getattr(network, field)}
    assert changed <= set(reasons) <= set(fitted_fields(network))
    assert bool(reasons) == (name != "segformer3d")


def test_a_network_as_it_is_has_its_multiples():
    uneven = PLAIN.replace(strides=(ONE, *[(1, 2, 2)] * 2, *[TWO] * 3))
    assert patch_multiples(uneven) == (8, 32, 32)
    assert patch_multiples(MEDNEXT) == (16, 16, 16)
    assert patch_multiples(FLAT) == (1, 16, 16)
    assert patch_multiples(network_config("segformer3d")) == (4, 4, 4)
    assert patch_multiples(network_config("segformer3d").for_slices()) == (1, 4, 4)
    assert patch_multiples(network_config("nnformer-synapse")) == (16, 16, 16)
    assert patch_multiples(network_config("nnformer-acdc")) == (20, 20, 20)
    assert patch_multiples(network_config("transbts")) == (8, 8, 8)
    assert patch_multiples(network_config("unetr")) == patch_multiples(network_config("3d-uxnet")) == (16, 16, 16)
    assert patch_multiples(network_config("swinunetr")) == (32, 32, 32)


def test_unetr_learns_positions_of_its_patch_and_others_stay():
    network, reasons = network_for_patch(network_config("unetr"), (1.0, 1.0, 1.0), (64, 90, 48))
    assert network.input_size == (64, 96, 48)
    assert "64x90x48" in reasons["input_size"]
    for name in ("mednext-s", "segformer3d", "swinunetr", "3d-uxnet", "transbts"):
        assert network_for_patch(network_config(name), (1.0, 1.0, 1.0), (64, 90, 48)) == (network_config(name), {})


def test_the_memory_of_a_patch_is_that_of_its_own_network():
    steps = FittedStep(PLAIN, (1.0, 1.0, 1.0), 1, 2)
    small, large = steps.for_patch((8, 8, 16)), steps.for_patch((16, 16, 32))
    assert len(small.network.encoder.stages) < len(large.network.encoder.stages)
    assert steps.for_patch((16, 16, 32)) is large
    assert steps.memory_bytes((8, 8, 16), 2) == small.memory_bytes((8, 8, 16), 2)


@pytest.mark.parametrize("name", ["plainconvunet", "resencunet"])
def test_a_plan_holds_the_network_of_its_patch(name):
    plan = make_plan(fingerprint_of(*[(20, 40, 33)] * 30), spec_of("lobe"), name)
    network, reasons = network_for_patch(network_config(name), (1.0, 1.0, 1.0), plan.patch.size)
    assert plan.network == network
    assert all(plan.reasons[f"network.{field}"] == reason for field, reason in reasons.items())
    assert Plan.from_json(plan.to_json()) == plan
    assert len(plan.training.loss.deep_supervision_weights) == network.scales


def test_a_budget_halves_the_patch_to_what_the_network_takes():
    plan = make_plan(fingerprint_of(*[(40, 96, 90)] * 30), spec_of("lobe"), "plainconvunet")
    smaller = shrink_patch(plan, step_s=1.0, left_s=1.0, budget_s=1.0)
    assert smaller.network == plan.network
    assert smaller.patch.size != plan.patch.size
    assert all(edge % by == 0 for edge, by in zip(smaller.patch.size, plan.network.divisors, strict=True))
