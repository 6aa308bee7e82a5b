"""MedNeXt's configuration: options that came later, their checks, and what a plan's text and hash do not show."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sagittal.plan import MedNeXtConfig, network_config
from sagittal.plan.base import canonical_json

COARSE = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))
MIXED = ("none", "expansion", "block", "none", "none", "block", "none", "expansion", "block")


def test_what_is_not_used_does_not_show_in_the_text_that_hashes_are_taken_of():
    assert canonical_json(MedNeXtConfig()) == (
        '{"block_counts":[2,2,2,2,2,2,2,2,2],"channels":32,"checkpointing":false,"deep_supervision":true,'
        '"expansion_ratio":2,"grn":false,"kernel_size":3,"kind":"mednext","norm":"group","spatial_dims":3}'
    )
    assert '"checkpointing":true' in canonical_json(network_config("mednext-l"))
    used = MedNeXtConfig(
        decoder_kernel_size=5, block_residual=False, resampling_residual=False, strides=COARSE, flat_levels=(2, 0, 0)
    )
    text = canonical_json(used)
    assert all(
        f'"{name}"' in text
        for name in ("decoder_kernel_size", "block_residual", "resampling_residual", "strides", "flat_levels")
    )
    assert MedNeXtConfig().model_dump(exclude_defaults=True) == {}
    assert MedNeXtConfig(strides=COARSE).model_dump(exclude_defaults=True) == {"strides": COARSE}


@pytest.mark.parametrize(
    "config",
    [
        MedNeXtConfig(),
        MedNeXtConfig(decoder_kernel_size=5, checkpointing=True, resampling_residual=False),
        MedNeXtConfig(strides=COARSE, flat_levels=(2, 0, 0), checkpointing="expansion"),
        MedNeXtConfig(spatial_dims=2, strides=((1, 2),) * 4, flat_levels=(5, 0), checkpointing=MIXED),
    ],
)
def test_every_option_survives_its_text(config):
    assert MedNeXtConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("given", ["true", "false"])
def test_a_switch_of_checkpointing_stays_one(given):
    config = MedNeXtConfig.from_json(f'{{"kind": "mednext", "checkpointing": {given}}}')
    assert config.checkpointing is (given == "true")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_kernel_size": 4}, "Input should be 3, 5 or 7"),
        ({"spatial_dims": 1}, "Input should be 2 or 3"),
        ({"checkpointing": "all"}, "checkpointing"),
        ({"checkpointing": ("block",) * 8}, "checkpointing"),
        ({"strides": COARSE[:3]}, "strides"),
        ({"strides": ((2, 2, 3), *COARSE[1:])}, "Input should be 1 or 2"),
        ({"strides": ((2, 2),) * 4}, "strides must have 3 numbers"),
        ({"strides": COARSE, "spatial_dims": 2}, "strides must have 2 numbers"),
        ({"flat_levels": (0, 0)}, "flat_levels must have 3 numbers"),
        ({"flat_levels": (6, 0, 0)}, "less than or equal to 5"),
        ({"flat_levels": (1, 0, 0)}, "axis 0 can't be halved"),
        ({"flat_levels": (3, 0, 0), "strides": COARSE}, "axis 0 can't be halved"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValidationError, match=message):
        MedNeXtConfig().replace(**changes)


def test_multiples_follow_the_strides():
    assert MedNeXtConfig().multiples == (16, 16, 16)
    assert MedNeXtConfig(spatial_dims=2).multiples == (16, 16)
    assert MedNeXtConfig(strides=COARSE).multiples == (2, 16, 16)


def test_stages_of_a_unet_become_strides_and_flat_levels():
    strides = [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]
    kernels = [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    fitted = MedNeXtConfig(kernel_size=5).for_stages(strides, kernels)
    assert fitted == MedNeXtConfig(kernel_size=5, strides=COARSE, flat_levels=(2, 0, 0))


def test_a_unet_of_equal_axes_leaves_the_published_network():
    strides = [(1, 1, 1), *[(2, 2, 2)] * 5]
    assert MedNeXtConfig().for_stages(strides, [(3, 3, 3)] * 6) == MedNeXtConfig()


def test_short_unets_halve_less_often():
    fitted = MedNeXtConfig().for_stages([(1, 1, 1), (2, 2, 2), (1, 2, 2)], [(3, 3, 3)] * 3)
    assert fitted == MedNeXtConfig(strides=((2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1)))


def test_an_axis_that_is_halved_is_convolved_over():
    # nnU-Net halves a coarse axis that is the only long one, with a kernel that is still flat.
    fitted = MedNeXtConfig().for_stages([(1, 1, 1), (2, 1, 1)], [(1, 3, 3), (3, 3, 3)])
    assert fitted.flat_levels is None
    thin = MedNeXtConfig().for_stages([(1, 1, 1), *[(1, 2, 2)] * 4], [*[(1, 3, 3)] * 4, (3, 3, 3)])
    assert thin == MedNeXtConfig(strides=((1, 2, 2),) * 4, flat_levels=(4, 0, 0))


def test_slices_take_stages_of_two_axes():
    fitted = MedNeXtConfig(spatial_dims=2).for_stages([(1, 1), (1, 2), (2, 2)], [(1, 3), (3, 3), (3, 3)])
    assert fitted == MedNeXtConfig(spatial_dims=2, strides=((1, 2), (2, 2), (1, 1), (1, 1)), flat_levels=(1, 0))
