"""Training that starts from a bundle: what the plan keeps, what each fold gets, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sagittal
from sagittal.errors import PlanError
from sagittal.networks.build import build_network
from sagittal.networks.upkern import upkern
from sagittal.plan import Plan
from sagittal.plan.overrides import override
from sagittal.plan.training import Initialization
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.datasets import TINY_SETTINGS as TINY
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training import fold as fold_module
from sagittal.training import stages
from sagittal.training.choice import PlanChoice
from sagittal.training.initialization import (
    StartFrom,
    may_have_seen_held_out,
    weights_for,
    with_frozen_steps,
    with_initialization,
    without_freezing,
)
from sagittal.training.log import read_log
from sagittal.training.run import train
from sagittal.training.stages import Budget, RunOptions, fit_budget

pytestmark = pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")

STILL = {"training.optimizer.learning_rate": 1e-12, "training.optimizer.weight_decay": 0.0, "schedule.steps": 1}
"""Training in which nothing moves, so that the end shows the beginning."""
SMALL_SEGFORMER = {
    "network.embed_dims": [4, 4, 4, 4],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    **{name: value for name, value in TINY.items() if not name.startswith("network")},
}
FROZEN = "training.initialization.freeze_encoder_steps"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def plan_for(dataset: Path, network: str = "mednext-s", settings: Mapping[str, Any] = TINY) -> Plan:
    data = sagittal.read_dataset(dataset)
    return override(
        sagittal.make_plan(sagittal.extract_fingerprint(data, workers=1), data.spec, network), settings, origin="test"
    )


def source_for(
    dataset: Path, out: Path, network: str = "mednext-s", settings: Mapping[str, Any] = TINY, folds: Sequence[str] = ()
) -> Path:
    return write_random_bundle(out, plan_for(dataset, network, settings), folds=folds or ("fold_0",))


def elsewhere(out: Path, settings: Mapping[str, Any] = TINY) -> Path:
    """Write a bundle trained on other scans with as thick slices: two channels, three classes."""
    thick = {"network.strides": [[1, 2, 2], [2, 2, 2], [1, 1, 1], [1, 1, 1]], "network.flat_levels": [1, 0, 0]}
    return write_random_bundle(out, untrained_plan("mednext-s", untrained_spec(4, 2), settings={**settings, **thick}))


def test_only_the_kernel_differs_and_upkern_is_applied_by_itself(tiny_dataset: Path, tmp_path: Path) -> None:
    source = source_for(tiny_dataset, tmp_path / "k3", folds=("fold_0", "fold_1"))
    lines: list[str] = []
    result = train(
        tiny_dataset,
        tmp_path / "k5",
        network="mednext-s-k5",
        settings={**TINY, **STILL},
        init_from=source,
        options=RunOptions(device="cpu", say=lines.append),
    )
    wanted = build_network(result.plan.network, 1, 3)
    upkern(
        wanted, {name: torch.tensor(array) for name, array in sagittal.read_bundle(source).weights("fold_0").items()}
    )
    weights = sagittal.read_bundle(tmp_path / "k5").weights("fold_0")
    for name, tensor in wanted.state_dict().items():
        np.testing.assert_allclose(weights[name], tensor.numpy(), atol=1e-6)

    said = "\n".join(lines)
    assert "init: fold 0 starts from fold_0 of mednext-s (" in said
    assert "147 copied; 17 interpolated (enc_block_*.*.conv1.weight, " in said
    assert "  warning: " not in said and "  note: " not in said
    table = (tmp_path / "k5.run" / "fold_0" / "initialization.txt").read_text()
    assert "interpolated  up_0.conv1.weight" in table and "copied        stem.weight" in table
    start = result.plan.training.initialization
    assert start is not None and start.held_out_unseen and set(start.weights_sha256) == {"fold_0", "fold_1"}
    assert "--init-from" in result.plan.reasons["training.initialization"]
    assert result.metrics["folds"]["0"]["started_from"] == "fold_0 of mednext-s"
    assert result.metrics["validation"].endswith("never saw it")
    assert not any(str(source) in path.read_text(errors="ignore") for path in (tmp_path / "k5").rglob("*.json"))


def test_other_channels_and_labels_keep_the_heads_fresh_and_say_what_may_have_been_seen(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    source = elsewhere(tmp_path / "source")
    lines: list[str] = []
    result = train(
        tiny_dataset,
        tmp_path / "b",
        settings={**TINY, **STILL},
        init_from=sagittal.read_bundle(source),
        options=RunOptions(device="cpu", say=lines.append),
    )
    before, after = (
        sagittal.read_bundle(path).weights(name) for path, name in ((source, "all"), (tmp_path / "b", "fold_0"))
    )
    np.testing.assert_allclose(after["stem.weight"][:, 0], before["stem.weight"].mean(1), atol=1e-6)
    np.testing.assert_allclose(after["bottleneck.0.conv1.weight"], before["bottleneck.0.conv1.weight"], atol=1e-6)
    assert after["out_0.conv_out.bias"].shape == (3,)
    said = "\n".join(lines)
    assert "1 adapted (stem.weight); 10 fresh (out_*.conv_out.weight, out_*.conv_out.bias)" in said
    assert "warning: there is no fold_0 in that bundle, so all is taken; where the two data sets share cases" in said
    assert "may have seen it" in result.metrics["validation"]
    assert result.plan.network_name == "mednext-s"


def _losses(out: Path) -> list[float]:
    log = out.with_name(out.name + ".run") / "fold_0" / "log.jsonl"
    return [record["loss"] for record in read_log(log) if record["kind"] == "step"]


@pytest.mark.parametrize(("network", "settings"), [("mednext-s", TINY), ("segformer3d", SMALL_SEGFORMER)])
def test_a_frozen_encoder_resumes_exactly_before_and_after_the_boundary(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, settings: dict[str, Any]
) -> None:
    source = source_for(tiny_dataset, tmp_path / "source", network, settings)
    wanted = {**settings, "schedule.steps": 6, "schedule.validations": 3, FROZEN: 3}
    real = fold_module.train_on_batch

    def run(out: Path, *, stop_at: int | None, resume: bool = False) -> sagittal.TrainResult:
        def stopping(state: Any, batch: Any, plan: Plan, **more: Any) -> Any:
            if batch.step == stop_at:
                os.kill(os.getpid(), 2)
            return real(state, batch, plan, **more)

        monkeypatch.setattr(fold_module, "train_on_batch", stopping)
        more: dict[str, Any] = {} if resume else {"network": network, "settings": wanted, "init_from": source}
        return train(tiny_dataset, out, options=RunOptions(device="cpu", resume=resume), **more)

    run(tmp_path / "whole", stop_at=None)
    encoder = ("stem.", "enc_block_", "down_", "bottleneck.", "segformer_encoder.")
    cut = tmp_path / "cut"
    assert run(cut, stop_at=1).ended == "interrupted"
    before, frozen = sagittal.read_bundle(source).weights("fold_0"), sagittal.read_bundle(cut).weights("fold_0")
    inside = {name for name in before if name.startswith(encoder)}
    assert all(np.array_equal(before[name], frozen[name]) for name in inside)
    assert not all(np.array_equal(before[name], frozen[name]) for name in before.keys() - inside)
    run(cut, stop_at=4, resume=True)
    moved = sagittal.read_bundle(cut).weights("fold_0")
    assert not all(np.array_equal(before[name], moved[name]) for name in inside)
    assert run(cut, stop_at=None, resume=True).complete
    assert _losses(cut) == _losses(tmp_path / "whole")
    ends = [sagittal.read_bundle(out).weights("fold_0") for out in (cut, tmp_path / "whole")]
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_resumed_run_takes_the_same_bundle_or_none(tiny_dataset: Path, tmp_path: Path) -> None:
    source, other = source_for(tiny_dataset, tmp_path / "a"), elsewhere(tmp_path / "b")
    out, options = tmp_path / "out", RunOptions(device="cpu", resume=True)
    settings = {**TINY, "schedule.steps": 2}
    train(tiny_dataset, out, settings=settings, init_from=source, options=RunOptions(device="cpu"))
    assert train(tiny_dataset, out, settings=settings, init_from=source, options=options).complete
    assert train(tiny_dataset, out, options=options).complete
    plan = Plan.read(tmp_path / "out.run" / "plan.json")
    assert train(tiny_dataset, out, plan=plan, init_from=source, options=options).complete
    assert train(tiny_dataset, out, plan=plan, options=options).complete
    with pytest.raises(
        PlanError, match=r"starts from other weights, those of mednext-s with SHA-256 fold_0 [0-9a-f]{12}"
    ):
        train(tiny_dataset, out, init_from=other, options=options)
    with pytest.raises(PlanError, match=r"--freeze-encoder 1: .* freezes the encoder for 0 steps"):
        train(tiny_dataset, out, init_from=source, freeze_encoder_epochs=1, options=options)
    with pytest.raises(PlanError, match=r"fold 1 starts.*has no checkpoint yet.*--init-from"):
        train(tiny_dataset, out, fold="1", options=options)


def test_a_run_from_random_weights_takes_no_bundle_later(tiny_dataset: Path, tmp_path: Path) -> None:
    source = source_for(tiny_dataset, tmp_path / "a")
    train(tiny_dataset, tmp_path / "b", settings={**TINY, **STILL}, options=RunOptions(device="cpu"))
    with pytest.raises(PlanError, match="starts from random weights"):
        train(tiny_dataset, tmp_path / "b", init_from=source, options=RunOptions(device="cpu", resume=True))


def test_a_plan_that_starts_from_weights_needs_them(tiny_dataset: Path, tmp_path: Path) -> None:
    source = sagittal.read_bundle(source_for(tiny_dataset, tmp_path / "a"))
    plan = with_initialization(plan_for(tiny_dataset), StartFrom(source))
    with pytest.raises(PlanError, match=r"has no checkpoint yet\. Give their bundle"):
        train(tiny_dataset, tmp_path / "b", plan=plan, options=RunOptions(device="cpu"))
    with pytest.raises(PlanError, match="the plan starts from other weights"):
        train(
            tiny_dataset,
            tmp_path / "b",
            plan=plan,
            init_from=elsewhere(tmp_path / "c"),
            options=RunOptions(device="cpu"),
        )
    assert not (tmp_path / "b.run").exists()


@pytest.mark.parametrize(
    ("network", "settings", "told"),
    [
        (
            "segformer3d",
            {},
            r"its network is mednext-s, a mednext; the plan's is segformer3d.*Choose --network mednext-s",
        ),
        ("mednext-b", TINY, r"expansion_ratio is 2 there, \[2,3,4,.*--set network\.expansion_ratio=2"),
        ("mednext-s", {**TINY, "network.channels": 8}, r"channels is 4 there, 8 here\..*--set network\.channels=4"),
        ("mednext-s", {**TINY, "network.norm": "layer"}, "norm is group there, layer here"),
    ],
)
def test_another_network_is_refused_with_the_way_out(
    tiny_dataset: Path, tmp_path: Path, network: str, settings: dict[str, Any], told: str
) -> None:
    source = source_for(tiny_dataset, tmp_path / "a")
    with pytest.raises(PlanError, match=told):
        train(
            tiny_dataset,
            tmp_path / "b",
            network=network,
            settings=settings,
            init_from=source,
            options=RunOptions(device="cpu"),
        )
    assert not (tmp_path / "b.run").exists()


def test_freezing_that_makes_no_sense_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    source = source_for(tiny_dataset, tmp_path / "a")
    options = RunOptions(device="cpu")
    with pytest.raises(PlanError, match="--freeze-encoder 2: an encoder of random weights"):
        train(tiny_dataset, tmp_path / "b", settings=TINY, freeze_encoder_epochs=2, options=options)
    with pytest.raises(PlanError, match=r"--freeze-encoder 1: 250 steps, and schedule\.steps is 3"):
        train(tiny_dataset, tmp_path / "b", settings=TINY, init_from=source, freeze_encoder_epochs=1, options=options)
    with pytest.raises(PlanError, match=r"freeze_encoder_steps is 3 and schedule\.steps 3"):
        train(tiny_dataset, tmp_path / "b", settings={**TINY, FROZEN: 3}, init_from=source, options=options)
    with pytest.raises(PlanError, match="--freeze-encoder -1"):
        train(tiny_dataset, tmp_path / "b", settings=TINY, init_from=source, freeze_encoder_epochs=-1, options=options)
    assert not (tmp_path / "b.run").exists()


def _initialization(*names: str, held_out_unseen: bool = True, frozen: int = 0) -> Initialization:
    return Initialization(
        network_name="mednext-s",
        channel_names=("CT",),
        outputs=("background", "liver"),
        weights_sha256=dict.fromkeys(names, "0" * 64),
        held_out_unseen=held_out_unseen,
        freeze_encoder_steps=frozen,
    )


@pytest.mark.parametrize(
    ("held", "fold", "taken", "seen"),
    [
        (("fold_0", "fold_1"), "1", "fold_1", False),
        (("fold_0", "fold_1"), "2", "fold_0", True),
        (("all",), "0", "all", True),
        (("fold_0", "fold_3"), "none", "fold_0", False),
    ],
)
def test_a_fold_takes_the_weights_that_never_saw_its_cases(
    held: tuple[str, ...], fold: str, taken: str, seen: bool
) -> None:
    plan = untrained_plan("mednext-s", untrained_spec(3), settings={"schedule.steps": 9})
    start = _initialization(*held)
    assert weights_for(start, fold) == taken
    assert may_have_seen_held_out(plan.replace(training=plan.training.replace(initialization=start)), fold) is seen
    other = start.replace(held_out_unseen=False)
    assert may_have_seen_held_out(plan.replace(training=plan.training.replace(initialization=other)), fold) is (
        fold != "none"
    )


def test_weights_that_themselves_started_from_seen_cases_are_not_taken_for_unseen(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = plan_for(tiny_dataset)
    first = sagittal.read_bundle(write_random_bundle(tmp_path / "a", plan, folds=("all",)))
    second = sagittal.read_bundle(
        write_random_bundle(tmp_path / "b", with_initialization(plan, StartFrom(first)), folds=("fold_0",))
    )
    made = with_initialization(plan, StartFrom(second)).training.initialization
    assert made is not None and not made.held_out_unseen


def test_a_budget_caps_the_frozen_steps_and_gives_the_reason(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny_dataset, settings={name: value for name, value in TINY.items() if "schedule" not in name})
    plan = plan.replace(training=plan.training.replace(initialization=_initialization("all", frozen=2500)))
    monkeypatch.setattr(stages, "measure_step_s", lambda *arguments, **options: 0.1)
    monkeypatch.setattr(stages, "measure_case_s", lambda *arguments, **options: 0.01)
    monkeypatch.setattr(stages.time, "monotonic", lambda: 0.0)
    lines: list[str] = []
    fitted, _ = fit_budget(
        plan,
        None,  # type: ignore[arg-type]  # nothing is measured
        ((0, 1), (2,)),
        torch.device("cpu"),
        PlanChoice(),
        Budget(120.0, 100.0),
        folds=1,
        options=RunOptions(say=lines.append),
    )
    start = fitted.training.initialization
    assert start is not None and 200 < start.freeze_encoder_steps == fitted.schedule.steps // 4
    assert "--budget 120 s: 25% of" in fitted.reasons[FROZEN] and "instead of the 2500" in fitted.reasons[FROZEN]
    assert any("the encoder is frozen for" in line for line in lines)
    kept = with_frozen_steps(without_freezing(plan), 10, budget_s=1.0).training.initialization
    assert kept is not None and kept.freeze_encoder_steps == 10
    bare = plan.replace(training=plan.training.replace(initialization=None))
    assert with_frozen_steps(without_freezing(bare), 10, budget_s=1.0) == bare
