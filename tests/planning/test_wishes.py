from __future__ import annotations

import pytest

from sagittal.errors import PlanError
from sagittal.plan import network_config
from sagittal.planning.presets import PRESETS
from sagittal.planning.wishes import SET_BY_USER, Wishes, wishes_for


def test_what_the_user_sets_goes_before_what_the_preset_says():
    wishes = Wishes("3d", "mednext-paper", {"patch.size": [96, 80, 64]})
    assert wishes.patch_size == ((96, 80, 64), SET_BY_USER)
    assert wishes.batch_size == (2, "preset mednext-paper")
    spacing, origin = wishes.spacing_mm
    assert spacing == (1.0, 1.0, 1.0)
    assert origin.startswith("preset mednext-paper, in training and in prediction")
    assert Wishes().patch_size is None and Wishes().orientation is None
    assert Wishes(preset_name="nnunet").orientation == ("stored", "preset nnunet")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preprocessing.orientation", "LPS"),
        ("preprocessing.spacing_mm", [1.0, 1.0]),
        ("preprocessing.spacing_mm", [1.0, 0.0, 1.0]),
        ("preprocessing.spacing_mm", "fine"),
        ("preprocessing.transpose", [0, 0, 1]),
        ("patch.size", [16, 16]),
        ("patch.size", [16, 16, 0]),
        ("patch.size", 16),
        ("training.batch_size", 0),
        ("training.batch_size", 2.5),
        ("training.batch_size", True),
    ],
)
def test_values_without_sense_are_refused(name, value):
    wishes = Wishes(settings={name: value})
    attribute = {"size": "patch_size"}.get(name.split(".")[1], name.split(".")[1])
    with pytest.raises(PlanError, match=f"--set {name}=.*: expected ") as caught:
        getattr(wishes, attribute)
    assert caught.value.code == "bad_setting"


def test_a_patch_of_slices_is_one_voxel_thick():
    assert Wishes("2d", settings={"patch.size": [1, 64, 80]}).patch_size == ((1, 64, 80), SET_BY_USER)
    with pytest.raises(PlanError, match="of a 2d plan the first is 1"):
        _ = Wishes("2d", settings={"patch.size": [16, 64, 64]}).patch_size


def test_3d_low_chooses_the_spacing_itself():
    with pytest.raises(PlanError, match=r"3d-low chooses preprocessing.spacing_mm itself"):
        _ = Wishes("3d-low", settings={"preprocessing.spacing_mm": [2, 2, 2]}).spacing_mm


def test_the_network_takes_what_is_asked_of_it_before_it_is_planned_for():
    network, fixed = Wishes(settings={"network.kernel_size": 5, "schedule.steps": 9}).network(
        network_config("mednext-s")
    )
    assert (network.kernel_size, fixed) == (5, {})
    sliced, fixed = Wishes("2d").network(network_config("mednext-s"))
    assert (sliced.dims, fixed) == (2, {})
    paper, fixed = Wishes(preset_name="segformer3d-paper").network(network_config("segformer3d"))
    assert (paper.attention_scale, fixed) == ("paper", {})
    narrow = {"network.features_per_stage": [4, 8], "network.deep_supervision": False}
    unet, fixed = Wishes(settings=narrow).network(network_config("plainconvunet"))
    assert not unet.deep_supervision and len(unet.features_per_stage) == 6
    assert fixed == {"network.features_per_stage": [4, 8]}
    with pytest.raises(PlanError, match="Did you mean 'kernel_size'"):
        Wishes(settings={"network.kernel_sice": 5}).network(network_config("mednext-s"))


@pytest.mark.parametrize("name", ["plainconvunet", "unetr", "nnformer-acdc", "transbts", "3d-uxnet", "swinunetr"])
def test_networks_without_a_form_for_slices_are_refused(name):
    with pytest.raises(PlanError, match=r"has no form for slices.*mednext-s, .*segformer3d") as caught:
        Wishes("2d").network(network_config(name))
    assert caught.value.code == "no_2d_form"


def test_presets_are_for_their_networks_and_configurations():
    with pytest.raises(PlanError, match="Did you mean 'mednext-paper'"):
        wishes_for("mednext-s", "3d", "mednext", {})
    with pytest.raises(
        PlanError, match=r"is for mednext; segformer3d is a segformer3d\. Choose one of segformer3d-paper"
    ):
        wishes_for("segformer3d", "3d", "mednext-paper", {})
    with pytest.raises(PlanError, match="protocol for --config 3d, not 2d"):
        wishes_for("mednext-s", "2d", "mednext-paper", {})
    with pytest.raises(PlanError, match="--config 4d: expected 3d, 3d-low, 2d"):
        wishes_for("mednext-s", "4d", None, {})
    for name, preset in PRESETS.items():
        for configuration in preset.configurations:
            assert wishes_for(preset.network_name, configuration, name, {}).preset is preset
