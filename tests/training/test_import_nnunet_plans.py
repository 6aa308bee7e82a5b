"""plans.json is mapped entry by entry; what Sagittal does not compute as nnU-Net does is refused by its name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from nnunet_folder import PLANS, RESAMPLING, plans, with_arguments

from sagittal.errors import PlanError
from sagittal.plan.plan import CTNormalization, NoNormalization, Preprocessing, RescaleToUnit, ZScore
from sagittal.training.import_nnunet_networks import unet_config
from sagittal.training.import_nnunet_plans import Entries, configuration_of, patch_of, preprocessing_of


def prepared(content: dict[str, Any], name: str = "3d_fullres") -> Preprocessing:
    """Return what plans say of preparing scans."""
    entries = Entries(content, "plans.json")
    configuration = configuration_of(entries, name)
    unet_config(configuration, deep_supervision=True)
    patch_of(configuration)
    return preprocessing_of(entries, configuration, ("CT", "T1"))[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ZScoreNormalization", ZScore(nonzero_only=True)),
        ("NoNormalization", NoNormalization()),
        ("RescaleTo01Normalization", RescaleToUnit()),
        ("RGBTo01Normalization", CTNormalization(lower=0, upper=255, mean=0, std=255)),
        ("CTNormalization", CTNormalization(lower=-50, upper=90.5, mean=10, std=20)),
    ],
)
def test_normalisations(name: str, expected: object) -> None:
    changed = plans(normalization_schemes=["ZScoreNormalization", name], use_mask_for_norm=[False, True])
    assert prepared(changed).normalization == (ZScore(), expected)


def test_a_constant_foreground_has_a_smallest_spread() -> None:
    content = copy.deepcopy(PLANS)
    content["foreground_intensity_properties_per_channel"]["0"]["std"] = 0
    first = prepared(content).normalization[0]
    assert isinstance(first, CTNormalization) and first.std == 1e-8


@pytest.mark.parametrize(
    ("reader", "orientation"), [("NibabelIO", "stored"), ("NibabelIOWithReorient", "RAS"), ("SimpleITKIO", "stored")]
)
def test_readers_decide_on_the_orientation(reader: str, orientation: str) -> None:
    assert prepared({**PLANS, "image_reader_writer": reader}).orientation == orientation


def test_thresholds_of_anisotropy() -> None:
    assert prepared(PLANS).anisotropy_threshold == 3.0
    assert (
        prepared(plans(resampling_fn_data_kwargs={**RESAMPLING, "force_separate_z": False})).anisotropy_threshold > 99
    )
    given = {**RESAMPLING, "separate_z_anisotropy_threshold": 4}
    assert prepared(plans(resampling_fn_data_kwargs=given)).anisotropy_threshold == 4.0


def test_configurations_inherit() -> None:
    content = copy.deepcopy(PLANS)
    content["configurations"]["3d_wide"] = {"inherits_from": "3d_fullres", "spacing": [4, 2, 1]}
    content["configurations"]["3d_wider"] = {"inherits_from": "3d_wide", "batch_size": 9}
    assert prepared(content, "3d_wider").network_spacing_mm == (4.0, 2.0, 1.0)
    content["configurations"]["3d_fullres"]["inherits_from"] = "3d_wider"
    with pytest.raises(PlanError, match="inherits from itself"):
        prepared(content, "3d_wider")


REFUSED: list[tuple[dict[str, Any], str]] = [
    (plans(patch_size=[64, 64]), "a 2d configuration.*3d_fullres"),
    (plans(previous_stage="3d_lowres"), "second stage of a cascade.*3d_lowres predicted"),
    (plans(preprocessor_name="MyPreprocessor"), "preprocessor_name is MyPreprocessor"),
    (plans(resampling_fn_data="resample_torch_fornnunet"), "resampling_fn_data is resample_torch_fornnunet"),
    (plans(resampling_fn_probabilities="no_resampling"), "resampling_fn_probabilities is no_resampling"),
    (plans(resampling_fn_data_kwargs={**RESAMPLING, "order": 1}), "order is 1"),
    (plans(resampling_fn_data_kwargs={**RESAMPLING, "order_z": 1}), "order_z is 1"),
    (plans(resampling_fn_data_kwargs={**RESAMPLING, "force_separate_z": True}), "force_separate_z is true"),
    (plans(resampling_fn_data_kwargs={**RESAMPLING, "device": "cpu"}), "has the option device"),
    (plans(normalization_schemes=["MyScheme", "NoNormalization"]), "channel 0 is normalised by MyScheme"),
    ({**PLANS, "image_reader_writer": "Tiff3DIO"}, "scans are read by Tiff3DIO"),
    (with_arguments(norm_op="torch.nn.BatchNorm3d"), "norm_op is torch.nn.BatchNorm3d"),
    (with_arguments(dropout_op="torch.nn.Dropout3d"), "dropout_op is torch.nn.Dropout3d"),
    (with_arguments(nonlin="torch.nn.ReLU"), "nonlin is torch.nn.ReLU"),
    (with_arguments(squeeze_excitation=True), "has the argument squeeze_excitation"),
]


@pytest.mark.parametrize(("content", "told"), REFUSED)
def test_what_is_computed_otherwise_is_refused_by_name(content: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=f"(?s){told}.*nnU-Net itself") as caught:
        prepared(content)
    assert caught.value.code == "nnunet_unsupported"


@pytest.mark.parametrize("name", ["my.package.PlainConvUNet", "dynamic_network_architectures.a.ResidualUNet"])
def test_other_networks_are_refused_by_name(name: str) -> None:
    content = copy.deepcopy(PLANS)
    content["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = name
    with pytest.raises(PlanError, match=f"the network is a .*{name.rpartition('.')[2]}"):
        prepared(content)


def test_defaults_that_nnunet_never_leaves_out_are_refused() -> None:
    content = copy.deepcopy(PLANS)
    del content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op_kwargs"]
    with pytest.raises(PlanError, match="norm_op_kwargs left to a default"):
        prepared(content)


WRONG: list[tuple[dict[str, Any], str]] = [
    (plans(patch_size=[8, 8.5, 8]), "expected whole numbers"),
    (plans(patch_size=[8, 8, 8, 8]), "expected 3 numbers"),
    (plans(spacing=[1.0, 1.0]), "expected 3 numbers"),
    (plans(spacing=[1.0, 0.0, 1.0]), "greater than 0"),
    (plans(spacing="1"), "'spacing' is '1', expected a list"),
    (plans(normalization_schemes=["NoNormalization"]), "1 normalization_schemes and 2 use_mask_for_norm for 2"),
    ({**PLANS, "transpose_forward": [0, 0, 1]}, "expected the axes 0, 1, 2"),
    ({**PLANS, "transpose_backward": [0, 1, 2]}, "the way back"),
    ({**PLANS, "foreground_intensity_properties_per_channel": {}}, "'0' is missing"),
    ({**PLANS, "configurations": None}, "'configurations' is None"),
    (with_arguments(strides=[[1, 1, 1], [2, 2, 2]]), "must have one value for each"),
    (with_arguments(kernel_sizes=[2, 2, 2]), "must be odd"),
]


@pytest.mark.parametrize(("content", "told"), WRONG)
def test_plans_that_make_no_sense_are_refused(content: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        prepared(content)
