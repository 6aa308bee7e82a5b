from __future__ import annotations

import pytest
from fingerprints import fingerprint_of, spec_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.plan import Plan, network_config
from sagittal.planning import make_plan
from sagittal.planning.budget import shrink_patch
from sagittal.planning.patch import patch_multiples, patch_rule, patch_sizes
from sagittal.planning.topology import FittedStep, network_for_patch, unet_stages

ONE, TWO, THREE = (1, 1, 1), (2, 2, 2), (3, 3, 3)
PLAIN = network_config("plainconvunet")


def test_a_cube_is_halved_until_four_voxels_are_left():
    stages = unet_stages((1.0, 1.0, 1.0), (128, 128, 128))
    assert stages.strides == (ONE, *[TWO] * 5)
    assert stages.kernel_sizes == (THREE,) * 6


def test_thick_slices_are_halved_and_convolved_once_the_plane_is_as_coarse():
    """nnU-Net's own plan for the prostate (Task05): 20x320x256 voxels of 3.6 x 0.62 x 0.62 mm."""
    stages = unet_stages((3.6, 0.62, 0.62), (20, 320, 256))
    plane = (1, 2, 2)
    assert stages.strides == (ONE, plane, plane, TWO, TWO, plane, plane)
    assert stages.kernel_sizes == ((1, 3, 3), (1, 3, 3), *[THREE] * 5)


def test_an_axis_left_alone_needs_twelve_voxels():
    assert unet_stages((1.0, 1.0, 1.0), (7, 11, 7)).strides == (ONE, TWO)
    assert unet_stages((1.0, 1.0, 1.0), (7, 12, 7)).strides == (ONE, (1, 2, 1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    spacing=st.tuples(*(st.floats(0.3, 8.0),) * 3),
    median=st.tuples(*(st.integers(4, 300),) * 3),
)
def test_every_patch_of_the_search_is_what_its_own_u_net_takes_unpadded(spacing, median):
    sizes = patch_sizes(spacing, median, patch_rule(PLAIN))
    for size in (*sizes[:3], *sizes[-3:]):
        network, _ = network_for_patch(PLAIN, spacing, size)
        assert all(edge % by == 0 for edge, by in zip(size, patch_multiples(network), strict=True))
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
