"""What the baselines' configurations refuse, and what follows from them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sagittal.plan import network_config
from sagittal.plan.baselines import BASELINES, PlainConvUNetConfig, SwinUNETRConfig, UNETRConfig, UXNetConfig

PLAIN = PlainConvUNetConfig()


@pytest.mark.parametrize("name", BASELINES)
def test_json_gives_back_an_equal_configuration(name):
    config = network_config(name)
    assert type(config).from_json(config.to_json()) == config


@pytest.mark.parametrize("name", ["plainconvunet", "resencunet"])
def test_a_u_net_has_an_output_for_each_stage_of_its_decoder(name):
    config = network_config(name)
    assert (config.scales, config.single_scale().scales) == (5, 1)
    assert config.divisors == (32, 32, 32)


@pytest.mark.parametrize("name", ["unetr", "swinunetr", "3d-uxnet"])
def test_the_others_have_one(name):
    config = network_config(name)
    assert config.scales == 1
    assert config.single_scale() == config


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (PLAIN, {"features_per_stage": (32, 64)}, "features_per_stage must have one value for each of the 6 strides"),
        (PLAIN, {"n_conv_per_stage": (2,) * 5}, "n_conv_per_stage must have one value for each"),
        (PLAIN, {"n_conv_per_stage_decoder": (2,) * 6}, r"one less for the decoder"),
        (PLAIN, {"n_conv_per_stage_decoder": (2, 2, 0, 2, 2)}, "at least 1"),
        (PLAIN, {"strides": ((2, 2, 2),) * 6}, "those of the first stage 1"),
        (PLAIN, {"strides": ((1, 1, 1), *((2, 0, 2),) * 5)}, "strides must be at least 1"),
        (PLAIN, {"strides": ((1, 1, 1),)}, "at least 2 stages, not 1"),
        (PLAIN, {"kernel_sizes": ((3, 3, 2),) * 6}, "kernel_sizes must be odd"),
        (network_config("resencunet"), {"n_blocks_per_stage": (1, 3)}, "n_blocks_per_stage must have one value"),
        (UNETRConfig(), {"input_size": (96, 96, 90)}, "multiples of 16"),
        (UNETRConfig(), {"num_heads": 7}, "768 can't be split into 7 heads"),
        (UNETRConfig(), {"mlp_dim": 0}, "at least 1"),
        (SwinUNETRConfig(), {"feature_size": 50}, "a multiple of 12, not 50"),
        (SwinUNETRConfig(), {"num_heads": (3, 6, 12, 25)}, "384 can't be split into 25 heads"),
        (SwinUNETRConfig(), {"depths": (2, 2, 0, 2)}, "at least 1"),
        (UXNetConfig(), {"depths": (2, 2, 0, 2)}, "at least 1"),
        (UXNetConfig(), {"kernel_size": 4}, "Input should be 3, 5, 7 or 9"),
    ],
)
def test_nonsense_is_refused(config, changes, message):
    with pytest.raises(ValidationError, match=message):
        config.replace(**changes)
