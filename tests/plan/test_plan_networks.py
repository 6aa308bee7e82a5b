from __future__ import annotations

import pytest
from pydantic import ValidationError

from sagittal.errors import PlanError
from sagittal.plan import NETWORKS, MedNeXtConfig, SegFormer3DConfig, network_config


def test_the_names_that_users_know():
    sizes = [f"mednext-{size}" for size in "sbml"]
    names = [f"{name}{kernel}" for kernel in ("", "-k5", "-k7") for name in sizes]
    assert set(NETWORKS) == {*names, "mednext-v2-base", "mednext-v2-wide", "segformer3d"}


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
    with pytest.raises(PlanError, match=r"Known: mednext-b, .*segformer3d\."):
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
    ],
)
def test_configurations_are_checked(config, changes, message):
    with pytest.raises(ValidationError, match=message):
        config.replace(**changes)
