"""What a run was asked for: which plan is made of it, and when a run's own plan is refused for it."""

from __future__ import annotations

from pathlib import Path

import pytest

import sagittal
from sagittal.data.dataset import read_dataset
from sagittal.errors import PlanError
from sagittal.inference.windows import tile
from sagittal.plan import Plan
from sagittal.planning import PRESETS
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.datasets import TINY_SETTINGS as TINY
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.choice import PlanChoice, refuse_other_plan
from sagittal.training.initialization import StartFrom
from sagittal.training.run import train
from sagittal.training.stages import RunOptions, find_plan
from sagittal.volumes import read_volume

pytestmark = pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")
FLAT = {**TINY, "patch.size": [1, 16, 16]}
FLAT_SEGFORMER = {
    "network.embed_dims": [4, 4, 8, 8],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    **{name: value for name, value in FLAT.items() if not name.startswith("network")},
}


@pytest.mark.parametrize(("network", "settings"), [("mednext-s", FLAT), ("segformer3d", FLAT_SEGFORMER)])
def test_slices_go_from_scans_to_a_bundle_that_predicts(
    tiny_dataset: Path, tmp_path: Path, network: str, settings: dict[str, object]
) -> None:
    options = RunOptions(device="cpu")
    result = train(
        tiny_dataset, tmp_path / "b", network=network, configuration="2d", settings=settings, options=options
    )
    assert result.complete
    plan = sagittal.read_bundle(tmp_path / "b").plan
    assert (plan.configuration, plan.patch.size, plan.network.dims) == ("2d", (1, 16, 16), 2)
    assert plan.preprocessing.keeps_slices
    scan = tiny_dataset / "imagesTs" / "case_test_0000.nii.gz"
    labels = sagittal.load(tmp_path / "b", device="cpu").predict(scan)
    assert labels.array.shape == read_volume(scan).array.shape
    assert set(labels.array.flat) <= {0, 1, 2}


def test_windows_of_slices_do_not_overlap_across_them() -> None:
    starts = tile((7, 40, 30), (1, 32, 32), 0.5).starts
    assert starts[0] == tuple(range(7))
    assert len(starts[1]) == 2


def test_a_run_goes_on_by_the_configuration_and_preset_that_it_began_with(tiny_dataset: Path, tmp_path: Path) -> None:
    data, options = read_dataset(tiny_dataset), RunOptions(device="cpu")
    small = {name: value for name, value in TINY.items() if not name.startswith("training")}
    settings = {**small, "training.batch_size": 4}
    choice = PlanChoice(preset="mednext-paper", settings=settings)
    plan, is_new = find_plan(data, None, choice, options)
    assert is_new
    assert plan.network_name == "mednext-s" and plan.preprocessing.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.reasons["training.optimizer"].startswith("preset mednext-paper")
    stored = plan.write(tmp_path / "plan.json")
    assert find_plan(data, stored, choice, options) == (plan, False)
    shorter = plan.replace(
        schedule=plan.schedule.replace(steps=2), reasons={**plan.reasons, "schedule.steps": "--budget 9 s: so many fit"}
    )
    refuse_other_plan(shorter, stored, PlanChoice(preset="mednext-paper", settings={"training.batch_size": 4}))
    with pytest.raises(PlanError, match=r"--config 2d: .* is for 3d"):
        refuse_other_plan(plan, stored, PlanChoice(configuration="2d"))
    with pytest.raises(PlanError, match=r"--preset nnunet: .* has other values"):
        refuse_other_plan(plan, stored, PlanChoice(preset="nnunet"))
    with pytest.raises(PlanError, match=r"--set patch\.size: .* has other values"):
        refuse_other_plan(plan, stored, PlanChoice(settings={"patch.size": [32, 32, 32]}))


@pytest.mark.parametrize("asked", [{"configuration": "2d"}, {"preset": "nnunet"}])
def test_a_plan_that_is_given_leaves_nothing_to_plan(tiny_dataset: Path, tmp_path: Path, asked: dict[str, str]) -> None:
    plan, _ = find_plan(read_dataset(tiny_dataset), None, PlanChoice(settings=TINY), RunOptions(device="cpu"))
    with pytest.raises(PlanError, match="exclude each other") as caught:
        PlanChoice(plan=plan, **asked).given_plan()
    assert caught.value.code == "options"
    assert PlanChoice(plan=plan).given_plan() is plan
    assert PlanChoice(plan=plan.write(tmp_path / "p.json")).given_plan() == Plan.read(tmp_path / "p.json")


def test_a_preset_names_a_network_and_an_axis_order(tiny_dataset: Path) -> None:
    for name, preset in PRESETS.items():
        assert PlanChoice(preset=name).network_name == preset.network_name
    assert PlanChoice().network_name == "mednext-s"
    assert PlanChoice(preset="nnunet", network="mednext-s").orientation() == "stored"
    chosen = PlanChoice(preset="nnunet", settings={"preprocessing.orientation": "RAS"})
    assert chosen.orientation() == "RAS"
    assert {"training.optimizer", "preprocessing.orientation"} <= chosen.decided
    settings = {name: value for name, value in TINY.items() if not name.startswith("network")}
    choice = PlanChoice(preset="nnunet", network="segformer3d", settings={**settings, "network.decoder_dim": 8})
    plan, _ = find_plan(read_dataset(tiny_dataset), None, choice, RunOptions(device="cpu"))
    assert plan.preprocessing.orientation == "stored"
    assert plan.reasons["preprocessing.orientation"] == "preset nnunet"


def test_a_warning_of_the_plan_is_said(tiny_dataset: Path) -> None:
    lines: list[str] = []
    options = RunOptions(device="cpu", memory_gib=0.001, say=lines.append)
    find_plan(read_dataset(tiny_dataset), None, PlanChoice(settings=TINY), options)
    assert any("patch.size: set by the user" in line and "warning: more than is allowed" in line for line in lines)


def test_the_weights_to_start_from_settle_what_a_patch_would(tiny_dataset: Path, tmp_path: Path) -> None:
    published = untrained_plan("mednext-s", untrained_spec(3), settings=TINY)
    bundle = sagittal.read_bundle(write_random_bundle(tmp_path / "source", published))
    data, options = read_dataset(tiny_dataset), RunOptions(device="cpu")
    own, _ = find_plan(data, None, PlanChoice(settings=TINY), options)
    assert own.network.strides is not None
    plan, _ = find_plan(data, None, PlanChoice(settings=TINY, start=StartFrom(bundle)), options)
    assert plan.network == published.network
    assert plan.reasons["network.strides"].startswith("--init-from")
    other = PlanChoice(network="segformer3d", settings={"patch.size": [16, 16, 16]}, start=StartFrom(bundle))
    with pytest.raises(PlanError, match="its network is mednext-s"):
        find_plan(data, None, other, options)
