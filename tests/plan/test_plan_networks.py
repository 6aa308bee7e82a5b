from __future__ import annotations

import pytest
from pydantic import ValidationError

from sagittal.errors import PlanError
from sagittal.plan import NETWORKS, MedNeXtConfig, SegFormer3DConfig, network_config
from sagittal.plan.networks import NNFormerConfig, TransBTSConfig


def test_the_names_that_users_know():
    sizes = [f"mednext-{size}" for size in "sbml"]
    names = [f"{name}{kernel}" for kernel in ("", "-k5", "-k7") for name in sizes]
    libraries = ["plainconvunet", "resencunet", "unetr", "swinunetr"]
    ours = ["3d-uxnet", "transbts", "nnformer-synapse", "nnformer-tumour", "nnformer-acdc"]
    assert set(NETWORKS) == {*names, "mednext-v2-base", "mednext-v2-wide", "segformer3d", *libraries, *ours}


def test_sizes_follow_the_published_table():
    assert network_config("mednext-s") == MedNeXtConfig()
    medium = network_config("MedNeXt-M-k5")
    assert isinstance(medium, MedNeXtConfig)
    assert (medium.kernel_size, sum(medium.block_counts), medium.checkpointing) == (5, 34, True)
    assert medium.expansion_ratio == (2, 3, 4, 4, 4, 4, 4, 3, 2)
    large = network_config("mednext-l-k7")
    assert isinstance(large, MedNeXtConfig)
    assert (large.kernel_size, sum(large.block_counts)) == (7, 54)
    assert isinstance(network_config("segformer3d"), SegFormer3DConfig)


@pytest.mark.parametrize(
    ("name", "suggestion"), [("mednext-bk5", "mednext-b-k5"), ("segformer", "segformer3d"), ("mednext_l", "mednext-l")]
)
def test_an_unknown_name_gets_a_suggestion(name, suggestion):
    with pytest.raises(PlanError, match=f"'{name}' is not a network. Did you mean '{suggestion}'") as caught:
        network_config(name)
    assert caught.value.code == "unknown_network"


def test_a_name_close_to_none_gets_the_list():
    with pytest.raises(PlanError, match=r"Known: 3d-uxnet, mednext-b, .*segformer3d, .*unetr\."):
        network_config("xyzzy")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MedNeXtConfig(), {"channels": 0}, "at least 1"),
        (MedNeXtConfig(), {"expansion_ratio": 0}, "at least 1"),
        (MedNeXtConfig(), {"block_counts": (2, 2, 2, 2, 0, 2, 2, 2, 2)}, "at least 1"),
        (MedNeXtConfig(), {"kernel_size": 4}, "Input should be 3, 5 or 7"),
        (SegFormer3DConfig(), {"depths": (2, 0, 2, 2)}, "at least 1"),
        (SegFormer3DConfig(), {"num_heads": (1, 2, 3, 8)}, "160 can't be split into 3 heads"),
        (NNFormerConfig(), {"windows": ((4, 4, 4), (4, 0, 4), (8, 8, 8), (4, 4, 4))}, "at least 1"),
        (NNFormerConfig(), {"embed_dim": 95}, "embed_dim must be even"),
        (NNFormerConfig(), {"num_heads": (6, 12, 25, 48)}, "768 can't be split into 25 heads"),
        (NNFormerConfig(), {"patch_size": (3, 4, 4)}, "Input should be 1, 2 or 4"),
        (NNFormerConfig(), {"strides": ((2, 2, 3), (2, 2, 2), (2, 2, 2))}, "Input should be 1 or 2"),
        (NNFormerConfig(), {"drop_path": 1.0}, "less than 1"),
        (TransBTSConfig(), {"depth": 0}, "at least 1"),
        (TransBTSConfig(), {"base_channels": 12}, "multiple of 8"),
        (TransBTSConfig(), {"num_heads": 7}, "512 can't be split into 7 heads"),
        (TransBTSConfig(), {"dropout": -0.1}, "greater than or equal to 0"),
    ],
)
def test_configurations_are_checked(config, changes, message):
    with pytest.raises(ValidationError, match=message):
        config.replace(**changes)
