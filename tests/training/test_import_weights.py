"""A weights file becomes a bundle that predicts; what it does not tell is stated, what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sagittal
from sagittal.errors import BundleError, DataError, PlanError
from sagittal.networks import MedNeXt, SegFormer3D
from sagittal.plan.plan import NoNormalization, ZScore
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.import_weights import Imported, Knowledge, import_weights

BLOCKS = (1,) * 9
TINY: dict[str, Any] = {"network.channels": 2, "network.block_counts": [1] * 9, "patch.size": [16, 16, 16]}
SMALL: dict[str, Any] = {
    "network.embed_dims": [4, 4, 4, 4],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    "patch.size": [16, 16, 16],
}


def mednext(channels: int = 2, outputs: int = 3, *, deep_supervision: bool = False) -> MedNeXt:
    torch.manual_seed(5)
    network = MedNeXt(channels, outputs, channels=2, block_counts=BLOCKS, deep_supervision=deep_supervision)
    return network.eval()


def segformer() -> SegFormer3D:
    torch.manual_seed(6)
    sizes = {"embed_dims": (4, 4, 4, 4), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "decoder_dim": 8}
    return SegFormer3D(1, 2, attention_scale="paper", **sizes).eval()


def official(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {"dummy_tensor": torch.zeros(1), **network.state_dict()}


def bring(folder: Path, content: Any, known: Knowledge, *, name: str = "w.pth") -> tuple[Imported, str]:
    """Save `content`, import it, and return the result and what was said."""
    if name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        torch.save(content, folder / name)
    lines: list[str] = []
    return import_weights(folder / name, folder / "bundle", known, say=lines.append), "\n".join(lines)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.model", "w.safetensors"])
def test_a_file_becomes_a_bundle_that_predicts_as_the_network_does(tmp_path: Path, name: str) -> None:
    network = mednext()
    tensors = official(network)
    content = tensors if name.endswith("safetensors") else {"epoch": 9, "state_dict": tensors, "best": np.float64(1)}
    result, said = bring(tmp_path, content, Knowledge(network="mednext-s", settings=TINY), name=name)
    assert result.report.dropped == ("dummy_tensor",) and "dropped: dummy_tensor" in said
    assert f"{len(tensors)} tensors under official names; 2 channels, 3 outputs" in said
    plan = result.plan
    assert plan.network.scales == 1 and "no heads at the coarse scales" in plan.reasons["network.deep_supervision"]
    assert plan.dataset.channel_names == ("channel_0", "channel_1")
    assert [label.name for label in plan.dataset.labels] == ["class_1", "class_2"]

    image = np.random.default_rng(0).normal(size=(2, 12, 14, 16)).astype(np.float32)
    scans = [sagittal.Volume(channel[None], np.diag([1.0, 1, 1, 1])) for channel in image]
    predicted = sagittal.load(tmp_path / "bundle", device="cpu").predict(scans, mirror=False).array[0]
    with torch.no_grad():
        padded = np.zeros((1, 2, 16, 16, 16), np.float32)
        padded[0, :, 2:14, 1:15] = (image - image.mean((1, 2, 3), keepdims=True)) / image.std((1, 2, 3), keepdims=True)
        expected = network(torch.from_numpy(padded)).argmax(1).numpy()[0, 2:14, 1:15]
    assert (predicted == expected).mean() > 0.99

    metrics = sagittal.read_bundle(tmp_path / "bundle").metrics
    assert metrics["mean_dice"] is None and "nothing was measured" in metrics["validation"]
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "not measured" in card and str(tmp_path) not in json.dumps(metrics) + card


def test_heads_of_deep_supervision_in_the_file_are_kept(tmp_path: Path) -> None:
    known = Knowledge(network="mednext-s", settings=TINY)
    result, _ = bring(tmp_path, official(mednext(deep_supervision=True)), known)
    assert result.plan.network.scales == 5
    assert "out_4.conv_out.bias" in sagittal.read_bundle(tmp_path / "bundle").weights("all")


def test_every_assumption_is_told_and_stands_in_the_plan(tmp_path: Path) -> None:
    result, said = bring(tmp_path, official(mednext()), Knowledge(network="mednext-s", settings=TINY))
    assumed = {name for name, reason in result.plan.reasons.items() if reason.startswith("assumed: ")}
    assert assumed >= {"dataset", "preprocessing.spacing_mm", "preprocessing.normalization", "schedule.steps"}
    assert all(f"  {name}: " in said for name in assumed)
    assert "patch.size" not in assumed  # set by the user
    assert result.plan.preprocessing.spacing_mm == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("setting", [None, "paper", "head_dim"])
def test_the_attention_scale_is_told_and_can_be_set(tmp_path: Path, setting: str | None) -> None:
    settings = SMALL if setting is None else {**SMALL, "network.attention_scale": setting}
    result, said = bring(tmp_path, segformer().state_dict(), Knowledge(network="segformer3d", settings=settings))
    wanted = setting or "paper"
    assert result.plan.network.model_dump()["attention_scale"] == wanted
    assert f"attention scale: {wanted} ({'assumed' if setting is None else 'set by the user'}" in said
    assert not result.report.dropped + result.report.fresh


def test_names_come_from_a_data_set(tmp_path: Path) -> None:
    declared = {
        "name": "brains",
        "channel_names": {"0": "CT", "1": "noNorm"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "rim": [1]},
        "regions_class_order": [1, 2, 3],
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(declared))
    for dataset in (tmp_path, tmp_path / "dataset.json"):
        known = Knowledge(network="mednext-s", dataset=dataset, settings=TINY)
        result, said = bring(tmp_path, official(mednext()), known, name=f"{dataset.name[:3]}.pth")
        assert result.plan.dataset.name == "brains" and result.plan.dataset.has_regions
        assert result.plan.preprocessing.normalization == (ZScore(), NoNormalization())
        assert "percentiles that nnU-Net clips CT by are not in the weights" in said
        for path in sorted((tmp_path / "bundle").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(PlanError, match=r"declares 2 channels \(CT, noNorm\) and 3 outputs .* have 1 channel and 3"):
        bring(tmp_path, official(mednext(1)), Knowledge(network="mednext-s", dataset=tmp_path, settings=TINY))
    (tmp_path / "dataset.json").write_text("[")
    with pytest.raises(DataError, match="is no JSON"):
        bring(tmp_path, official(mednext()), Knowledge(network="mednext-s", dataset=tmp_path, settings=TINY))
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        bring(tmp_path, official(mednext()), Knowledge(network="mednext-s", dataset=tmp_path, settings=TINY))
    with pytest.raises(DataError, match="can't be read"):
        bring(tmp_path, official(mednext()), Knowledge(network="mednext-s", dataset=tmp_path / "x", settings=TINY))


def test_a_plan_says_everything(tmp_path: Path) -> None:
    plan = untrained_plan("mednext-s", untrained_spec(3, 2), spacing_mm=(2.0, 1.0, 1.0), settings=TINY)
    plan.write(tmp_path / "plan.json")
    result, said = bring(tmp_path, official(mednext()), Knowledge(plan=tmp_path / "plan.json"))
    assert result.plan.preprocessing == plan.preprocessing and "assumed" not in said
    assert result.plan.network.scales == 1
    with pytest.raises(PlanError, match=r"the plan declares 2 channels .* the weights have 1 channel and 4 outputs"):
        known = Knowledge(plan=plan, network="mednext-s")
        import_weights(save(tmp_path, mednext(1, 4)), tmp_path / "other", known)
    with pytest.raises(PlanError, match="the plan is for mednext-s"):
        import_weights(save(tmp_path, mednext()), tmp_path / "other", Knowledge(plan=plan, network="mednext-b"))
    with pytest.raises(PlanError, match="--plan and --dataset exclude each other"):
        import_weights(save(tmp_path, mednext()), tmp_path / "other", Knowledge(plan=plan, dataset=tmp_path))
    assert not (tmp_path / "other").exists()


def save(folder: Path, network: torch.nn.Module) -> Path:
    torch.save(network.state_dict(), folder / "saved.pth")
    return folder / "saved.pth"


def test_a_single_output_is_a_region(tmp_path: Path) -> None:
    result, _ = bring(tmp_path, official(mednext(1, 1)), Knowledge(network="mednext-s", settings=TINY))
    assert result.plan.dataset.has_regions and result.plan.dataset.num_outputs == 1


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    cases: list[tuple[Path, Knowledge, str]] = [
        (save(tmp_path, mednext()), Knowledge(), "the weights don't say which network"),
        (save(tmp_path, mednext()), Knowledge(network="mednext-x"), "Did you mean"),
        (save(tmp_path, mednext()), Knowledge(network="mednext-s"), "where the network has"),
        (save(tmp_path, mednext()), Knowledge(network="segformer3d"), "can't be read off its tensors"),
        (tmp_path / "missing.pth", Knowledge(network="mednext-s"), "does not exist"),
    ]
    for file, known, told in cases:
        with pytest.raises(PlanError, match=told):
            import_weights(file, out, known)
    tensors = official(mednext())
    tensors["out_0.conv_out.bias"] = torch.zeros(7)
    with pytest.raises(PlanError, match=r"out_0\.conv_out\.weight: 3, out_0\.conv_out\.bias: 7"):
        bring(tmp_path, tensors, Knowledge(network="mednext-s", settings=TINY))
    tensors["out_0.conv_out.bias"] = torch.full((3,), float("nan"))
    with pytest.raises(BundleError, match="NaN"):
        bring(tmp_path, tensors, Knowledge(network="mednext-s", settings=TINY))
    assert not out.exists()


def test_monai_weights_of_a_larger_size_are_refused_with_the_reason(tmp_path: Path) -> None:
    theirs = {}
    for name, tensor in mednext(1, 2).state_dict().items():
        head, _, rest = name.partition(".")
        kind, _, level = head.rpartition("_")
        coarse_first = {"up": "up_blocks", "dec_block": "dec_stages"}
        if kind in coarse_first:
            name = f"{coarse_first[kind]}.{3 - int(level)}.{rest}"
        elif kind in ("enc_block", "down"):
            name = f"{'enc_stages' if kind == 'enc_block' else 'down_blocks'}.{level}.{rest}"
        theirs[name] = tensor
    result, said = bring(tmp_path, theirs, Knowledge(network="mednext-s", settings=TINY))
    assert "MONAI's names" in said and result.report.naming == "monai"
    # Where MONAI's B, M and L differ: its down blocks have another ratio than the stage that they lead to.
    theirs["down_blocks.1.conv2.weight"] = torch.zeros(12, 4, 1, 1, 1)
    theirs["down_blocks.1.conv2.bias"] = torch.zeros(12)
    theirs["down_blocks.1.conv3.weight"] = torch.zeros(8, 12, 1, 1, 1)
    (tmp_path / "other").mkdir()
    with pytest.raises(PlanError, match="ratio of the stage before"):
        bring(tmp_path / "other", theirs, Knowledge(network="mednext-s", settings=TINY))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file, known = save(tmp_path, mednext()), Knowledge(network="mednext-s", settings=TINY)
    import_weights(file, tmp_path / "bundle", known)
    for out in (tmp_path / "bundle", file):
        with pytest.raises(BundleError, match="nothing was overwritten"):
            import_weights(file, out, known)
