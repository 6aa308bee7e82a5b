"""A trained model of nnU-Net becomes a bundle that predicts as the network does; what does not fit is refused."""

from __future__ import annotations

import copy
import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_folder import (
    DECLARED,
    PATCH,
    PLANS,
    checkpoint,
    network_of,
    plans,
    residual_plans,
    with_arguments,
    write_model,
)

import sagittal
from sagittal.cli import run
from sagittal.errors import BundleError, DataError, PlanError
from sagittal.networks import MedNeXt
from sagittal.plan.baselines import PlainConvUNetConfig, ResEncUNetConfig
from sagittal.plan.mednext import MedNeXtConfig
from sagittal.plan.plan import CTNormalization, ZScore
from sagittal.plan.postprocessing import LargestComponent
from sagittal.training.import_nnunet import ImportedModel, Selection, import_nnunet

PLAN_FILES = ("plans.json", "dataset.json")


def bring(folder: Path, selection: Selection | None = None) -> tuple[ImportedModel, str]:
    """Import a model and return the result and what was said."""
    lines: list[str] = []
    return import_nnunet(folder, folder.parent / "bundle", selection, say=lines.append), "\n".join(lines)


def by_hand(network: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """Return logits of one window as nnU-Net does: the mean over the mirrored copies of axes 0 and 2."""
    window = torch.from_numpy(image[None])
    total = torch.zeros(())
    with torch.no_grad():
        for count in range(3):
            for axes in combinations((2, 4), count):
                total = total + network(window.flip(axes)).flip(axes)
    return (total / 4).numpy()[0]


def normalised(image: np.ndarray) -> np.ndarray:
    """Return the channels as PLANS say: CT by its percentiles, the other by its own z-score."""
    ct = (np.clip(image[0], -50, 90.5) - 10) / 20
    other = (image[1] - image[1].mean()) / image[1].std()
    return np.stack([ct, other]).astype(np.float32)


@pytest.mark.parametrize("content", [PLANS, residual_plans()], ids=["plain", "residual"])
def test_a_model_becomes_a_bundle_that_predicts_as_the_network_does(tmp_path: Path, content: dict[str, Any]) -> None:
    networks = [network_of(content, seed=seed) for seed in (0, 1)]
    folds = {str(fold): checkpoint(network) for fold, network in enumerate(networks)}
    result, said = bring(write_model(tmp_path / "model", content=content, folds=folds))
    assert "read: 3d_fullres by nnUNetTrainer, checkpoint_final.pth of fold_0, fold_1" in said
    bundle = sagittal.read_bundle(result.bundle)
    assert bundle.weight_names == ("fold_0", "fold_1")

    # Already at the plan's spacing and of a window's size, so that nothing but the mean of both networks counts.
    image = np.random.default_rng(0).normal(20, 40, size=(2, *PATCH)).astype(np.float32)
    expected = np.mean([by_hand(network, normalised(image)) for network in networks], axis=0).argmax(0)
    assert len(np.unique(expected)) == 3
    stored = image.transpose(0, 2, 3, 1)
    scans = [sagittal.Volume(channel[None], affine_of((1.25, 1.5, 3.0))) for channel in stored]
    predicted = sagittal.load(result.bundle, device="cpu").predict(scans).array[0]
    assert (predicted == expected.transpose(1, 2, 0)).mean() > 0.999


def affine_of(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Return the affine of a scan with D, H, W towards z, y, x."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing_mm, 1
    return affine


def test_the_plan_says_what_plans_json_says(tmp_path: Path) -> None:
    plan = bring(write_model(tmp_path / "model"))[0].plan
    assert plan.dataset.name == "Dataset007_Small" and plan.configuration == "3d"
    assert plan.preprocessing.orientation == "stored" and plan.preprocessing.transpose == (2, 0, 1)
    assert plan.preprocessing.network_spacing_mm == (3.0, 1.25, 1.5)
    assert plan.preprocessing.normalization == (
        CTNormalization(lower=-50, upper=90.5, mean=10, std=20),
        ZScore(nonzero_only=True),
    )
    assert plan.patch.size == tuple(PATCH) and plan.inference.overlap == 0.5
    assert plan.inference.mirror_axes == plan.training.augmentation.mirror_axes == (0, 2)
    assert not plan.training.augmentation.swapped_labels  # left and right, which nnU-Net does not exchange
    assert plan.training.batch_size == 3 and plan.training.loss.batch_dice
    network = plan.network
    assert isinstance(network, PlainConvUNetConfig) and network.scales == 2
    assert network.kernel_sizes[0] == (1, 3, 3) and network.n_conv_per_stage == (2, 1, 1)
    metrics = sagittal.read_bundle(tmp_path / "bundle").metrics
    assert metrics["mean_dice"] is None and metrics["imported"]["trainer"] == "nnUNetTrainer"
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "CC-BY 4.0" in card and str(tmp_path) not in card + json.dumps(metrics)


def test_the_bundle_keeps_every_head_and_can_be_trained_further(tmp_path: Path) -> None:
    network = network_of(PLANS)
    result, _ = bring(write_model(tmp_path / "model", folds={"all": checkpoint(network)}))
    weights = sagittal.read_bundle(result.bundle).weights("all")
    own = {id(tensor) for tensor in network.parameters()}
    assert len(weights) == len(own)
    heads = {name: tensor for name, tensor in network.state_dict().items() if "seg_layers" in name}
    assert len(heads) == 4
    for name, tensor in heads.items():
        assert np.array_equal(weights[name], tensor.numpy())


def test_without_deep_supervision_untrained_heads_are_left_out(tmp_path: Path) -> None:
    saved = checkpoint(network_of(PLANS), trainer_name="nnUNetTrainerNoDeepSupervision")
    result, _ = bring(write_model(tmp_path / "model", folds={"0": saved}))
    weights = sagittal.read_bundle(result.bundle).weights("fold_0")
    kept = {name for name in weights if "seg_layers" in name}
    assert kept == {"decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias"}
    assert result.plan.network.scales == 1


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, prefix: str) -> None:
    saved = checkpoint(network_of(PLANS))
    saved["network_weights"] = {prefix + name: tensor for name, tensor in saved["network_weights"].items()}
    result, _ = bring(write_model(tmp_path / "model", folds={"0": saved}))
    assert "encoder.stages.0.0.convs.0.all_modules.0.weight" in sagittal.read_bundle(result.bundle).weights("fold_0")


def test_a_mednext_is_told_by_its_tensors(tmp_path: Path) -> None:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {
        "channels": 2,
        "kernel_size": 5,
        "block_counts": (1, 2, 1, 1, 1, 1, 1, 1, 1),
        "expansion_ratio": (2, 3, 4, 4, 4, 4, 4, 3, 2),
        "grn": True,
        "deep_supervision": True,
    }
    network = MedNeXt(2, 3, **sizes).eval()
    saved = checkpoint(network, trainer_name="MedNeXtTrainer", inference_allowed_mirroring_axes=None)
    saved["network_weights"]["dummy_tensor"] = torch.zeros(1)
    result, said = bring(write_model(tmp_path / "model", content=plans(patch_size=[16, 16, 16]), folds={"0": saved}))
    config = result.plan.network
    assert isinstance(config, MedNeXtConfig) and result.plan.network_name == "mednext-s-k5"
    assert all(getattr(config, name) == value for name, value in sizes.items())
    assert "network.norm=group" in said and "MedNeXtTrainer is none of nnU-Net's" in said
    assert result.plan.inference.mirror_axes == ()
    weights = sagittal.read_bundle(result.bundle).weights("fold_0")
    assert all(np.array_equal(weights[name], tensor.numpy()) for name, tensor in network.state_dict().items())

    del saved["network_weights"]["bottleneck.0.conv2.weight"]
    with pytest.raises(PlanError, match=r"bottleneck\.0\.conv2\.weight.* is missing"):
        bring(write_model(tmp_path / "other" / "model", folds={"0": saved}))


def test_published_mednexts_keep_their_names() -> None:
    from sagittal.networks.build import build_network
    from sagittal.plan.mednext import MEDNEXT
    from sagittal.training.import_nnunet_networks import mednext_config, mednext_name

    for name in ("mednext-b", "mednext-m-k5", "mednext-v2-base"):
        with torch.device("meta"):
            tensors = build_network(MEDNEXT[name], 1, 2).state_dict()
        config = mednext_config(tensors, "a file")
        assert mednext_name(config) == name and config == MEDNEXT[name]


def test_folds_and_checkpoints_are_chosen_as_nnunet_does(tmp_path: Path) -> None:
    saved = checkpoint(network_of(PLANS))
    model = write_model(tmp_path / "model", folds={"1": saved, "all": saved})
    write_model(model, folds={"3": saved}, name="checkpoint_best.pth")
    assert names(model) == ("fold_1",)  # finished and numbered
    assert names(model, Selection("best")) == ("fold_3",)
    assert names(model, Selection(folds=["all"])) == ("all",)
    for fold in ("1", "all"):
        (model / f"fold_{fold}" / "checkpoint_final.pth").unlink()
    assert names(model) == ("fold_3",)
    with pytest.raises(PlanError, match=r"no fold 7; there are: 1, 3, all"):
        names(model, Selection(folds=["7"]))
    with pytest.raises(PlanError, match=r"no checkpoint_final\.pth or checkpoint_best\.pth in fold_1"):
        names(model, Selection(folds=["1"]))
    with pytest.raises(PlanError, match=r"no checkpoint_final\.pth in"):
        names(model, Selection("final"))


def names(model: Path, selection: Selection | None = None) -> tuple[str, ...]:
    """Import and return the weights in the bundle, which is deleted again."""
    result, _ = bring(model, selection)
    found = sagittal.read_bundle(result.bundle).weight_names
    for path in sorted(result.bundle.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return found


def test_folds_that_were_trained_otherwise_are_refused(tmp_path: Path) -> None:
    network = network_of(PLANS)
    folds = {"0": checkpoint(network), "1": checkpoint(network, trainer_name="nnUNetTrainerDA5")}
    with pytest.raises(PlanError, match=r"fold_1.*its trainer is nnUNetTrainerDA5, that of the fold before it nnUNet"):
        bring(write_model(tmp_path / "model", folds=folds))


def test_scores_and_rules_come_along(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    cases = [{"metrics": {"1": {"Dice": dice}, "2": {"Dice": float("nan")}}} for dice in (0.5, 0.75)]
    (model / "fold_0" / "validation").mkdir()
    (model / "fold_0" / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
    keep = "remove_all_but_largest_component_from_segmentation"
    rules = {"postprocessing_fns": [keep, keep], "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}, {}]}
    rules["postprocessing_kwargs"][1] = {"labels_or_regions": 2}
    home = model / "crossval_results_folds_0"
    home.mkdir()
    (home / "postprocessing.json").write_text(json.dumps(rules))
    result, said = bring(model)
    assert result.plan.postprocessing == (LargestComponent(), LargestComponent(labels=("right",)))
    assert "all foreground together; keep only the largest component of right" in said
    metrics = sagittal.read_bundle(result.bundle).metrics
    assert metrics["dice"] == {"left": 0.625, "right": None} and metrics["mean_dice"] is None
    assert "by nnU-Net" in metrics["validation"]


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"postprocessing_fns": ["fill"], "postprocessing_kwargs": [{}]}, "is fill"),
        ({"postprocessing_fns": [], "postprocessing_kwargs": [{}]}, "0 postprocessing_fns have 1"),
        ({"postprocessing_fns": ["KEEP"], "postprocessing_kwargs": [{"labels_or_regions": 9}]}, r"the labels \[9\]"),
        ({"postprocessing_fns": ["KEEP"], "postprocessing_kwargs": [{}]}, r"the labels \[\]"),
        ({"postprocessing_fns": ["KEEP"], "postprocessing_kwargs": [{"background_label": 3}]}, "has the options"),
        ({"postprocessing_fns": []}, "'postprocessing_kwargs' is missing"),
    ],
)
def test_rules_that_are_not_known_are_refused(tmp_path: Path, rules: dict[str, Any], told: str) -> None:
    model = write_model(tmp_path / "model")
    text = json.dumps(rules).replace("KEEP", "remove_all_but_largest_component_from_segmentation")
    (model / "postprocessing.json").write_text(text)
    with pytest.raises(PlanError, match=told):
        bring(model)
    assert not (tmp_path / "bundle").exists()


def test_pickled_rules_are_never_read(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "postprocessing.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    result, said = bring(model)
    assert (
        result.plan.postprocessing == () and "postprocessing.pkl is a pickle of functions, which is never read" in said
    )


def test_rules_of_other_folds_are_told_of(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "crossval_results_folds_0_1").mkdir()
    (model / "crossval_results_folds_0_1" / "postprocessing.json").write_text("{}")
    assert "crossval_results_folds_0_1 were chosen for other folds" in bring(model)[1]


class Evil:
    """Runs a command where it is read without a guard."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_a_checkpoint_with_anything_but_numbers_and_texts_is_refused(tmp_path: Path) -> None:
    saved = checkpoint(network_of(PLANS), logging={"evil": Evil()})
    with pytest.raises(PlanError, match=r"refused, for it holds (posix|nt)\.system.* four entries") as caught:
        bring(write_model(tmp_path / "model", folds={"0": saved}))
    assert caught.value.code == "unsafe_weights" and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"network_weights": None}, "'network_weights' is None"),
        ({"init_args": {}}, "'configuration' is missing"),
        ({"trainer_name": 3}, "'trainer_name' is 3, expected a str"),
        ({"inference_allowed_mirroring_axes": (0, 3)}, r"\(0, 3\), expected axes of 0, 1, 2"),
        ({"inference_allowed_mirroring_axes": "01"}, "expected axes"),
        ({"init_args": {"configuration": "3d_lowres"}}, "'3d_lowres' is not there"),
    ],
)
def test_checkpoints_without_what_is_needed_are_refused(tmp_path: Path, entries: dict[str, Any], told: str) -> None:
    saved = checkpoint(network_of(PLANS), **entries)
    with pytest.raises(PlanError, match=told):
        bring(write_model(tmp_path / "model", folds={"0": saved}))


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    network = network_of(PLANS)
    head, twin = "decoder.seg_layers.0.bias", "encoder.stages.0.0.convs.0.conv.weight"
    changes: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({head: None}, f"1 missing: {head}"),
        ({"encoder.extra.weight": torch.zeros(1)}, r"1 unexpected: encoder\.extra\.weight"),
        ({head: torch.zeros(7)}, r"seg_layers\.0\.bias \(7,\) where the network has \(3,\)"),
        ({twin: torch.zeros(2, 2, 1, 3, 3)}, "hold different values"),
        ({head: torch.zeros(3, dtype=torch.int64)}, r"is of torch\.int64"),
        ({head: torch.full((3,), float("nan"))}, "NaN"),
    ]
    for number, (change, told) in enumerate(changes):
        saved = checkpoint(network)
        for name, tensor in change.items():
            if tensor is None:
                del saved["network_weights"][name]
            else:
                saved["network_weights"][name] = tensor
        with pytest.raises((PlanError, BundleError), match=told):
            bring(write_model(tmp_path / str(number) / "model", folds={"0": saved}))
    with pytest.raises(PlanError, match="entry 'epoch' of the state dict is of type int"):
        bring(write_model(tmp_path / "x" / "model", folds={"0": checkpoint(network, network_weights={"epoch": 1})}))


def test_another_trainers_network_is_refused_by_the_trainers_name(tmp_path: Path) -> None:
    saved = checkpoint(torch.nn.Linear(2, 3), trainer_name="nnUNet_Primus_M_Trainer")
    with pytest.raises(PlanError, match=r"Does nnUNet_Primus_M_Trainer build another network than plans.json says"):
        bring(write_model(tmp_path / "model", folds={"0": saved}))


def test_regions_keep_their_order(tmp_path: Path) -> None:
    declared = {
        **DECLARED,
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": [3], "ignore": 4},
        "regions_class_order": [1, 2, 3],
    }
    model = write_model(tmp_path / "model", declared=declared)
    kwargs = [{"labels_or_regions": values} for values in ([2, 3], [[1, 2, 3], [2, 3], 3], [[2, 3], 3])]
    keep = ["remove_all_but_largest_component_from_segmentation"] * 3
    rules = {"postprocessing_fns": keep, "postprocessing_kwargs": kwargs}
    (model / "postprocessing.json").write_text(json.dumps(rules))
    result, said = bring(model)
    inner = LargestComponent(labels=("core", "rim"))
    assert result.plan.postprocessing == (inner, LargestComponent(), inner)
    assert "becomes the region around it" in said
    spec = result.plan.dataset
    assert [label.values for label in spec.labels] == [(1, 2, 3), (2, 3), (3,)]
    assert spec.regions_class_order == (1, 2, 3) and spec.ignore_value == 4


def test_folders_that_are_no_model_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        bring(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="is a file"):
        bring(tmp_path / "file")
    for name in PLAN_FILES:
        model = write_model(tmp_path / name / "model")
        (model / name).unlink()
        with pytest.raises(PlanError, match=f"lacks {name}"):
            bring(model)
    results = tmp_path / "results"
    write_model(results / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    with pytest.raises(PlanError, match="it holds nnUNetTrainer__nnUNetPlans__3d_fullres"):
        bring(results)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "plans.pkl").write_bytes(b"")
    with pytest.raises(PlanError, match=r"a model of nnU-Net v1.* import-weights"):
        bring(tmp_path / "v1")
    (model / name).write_text("[")
    with pytest.raises(PlanError, match="is no JSON"):
        bring(model)
    (model / name).write_text("[]")
    with pytest.raises(PlanError, match="holds a list"):
        bring(model)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    bring(model)
    with pytest.raises(BundleError, match="nothing was overwritten"):
        bring(model)


def test_v1_names_of_channels_are_taken_and_unreadable_files_refused(tmp_path: Path) -> None:
    declared = {**DECLARED, "modality": DECLARED["channel_names"]}
    del declared["channel_names"]
    result, _ = bring(write_model(tmp_path / "model", declared=declared))
    assert result.plan.dataset.channel_names == ("CT", "T1")
    with pytest.raises(DataError, match="file_ending"):
        bring(write_model(tmp_path / "tif" / "model", declared={**DECLARED, "file_ending": ".tif"}))


def test_settings_change_the_plan(tmp_path: Path) -> None:
    result, _ = bring(write_model(tmp_path / "model"), Selection(settings={"inference.overlap": 0.25}))
    assert result.plan.inference.overlap == 0.25 and result.plan.reasons["inference.overlap"].startswith(
        "set by the user"
    )


def test_the_command_imports_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    command = ["import-nnunet", str(model), "--out", str(tmp_path / "a"), "--fold", "0", "--checkpoint", "final"]
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "window 8 x 12 x 16 voxels; mirrored axes: 0, 2" in told and told.endswith(f"bundle: {tmp_path / 'a'}\n")
    assert run(["import-nnunet", str(tmp_path), "--out", str(tmp_path / "b")]) == 1
    assert "it holds model" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_old_plans_give_the_same_network(tmp_path: Path) -> None:
    content = copy.deepcopy(PLANS)
    configuration = content["configurations"]["3d_fullres"]
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "ResidualEncoderUNet",
        "UNet_base_num_features": 2,
        "unet_max_num_features": 6,
        "n_conv_per_stage_encoder": [1, 2, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    former = content.pop("foreground_intensity_properties_per_channel")
    content["foreground_intensity_properties_by_modality"] = former
    saved = checkpoint(network_of(with_arguments_of(residual_plans(), features_per_stage=[2, 4, 6])))
    network = bring(write_model(tmp_path / "model", content=content, folds={"0": saved}))[0].plan.network
    assert isinstance(network, ResEncUNetConfig)
    assert network.features_per_stage == (2, 4, 6) and network.n_blocks_per_stage == (1, 2, 1)


def with_arguments_of(content: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """Return plans with arguments of their network changed."""
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= arguments
    return content


def test_single_numbers_stand_for_every_stage(tmp_path: Path) -> None:
    content = with_arguments(kernel_sizes=3, n_conv_per_stage=1, n_conv_per_stage_decoder=1)
    network = bring(write_model(tmp_path / "model", content=content))[0].plan.network
    assert isinstance(network, PlainConvUNetConfig)
    assert network.kernel_sizes == ((3, 3, 3),) * 3 and network.n_conv_per_stage == (1, 1, 1)
