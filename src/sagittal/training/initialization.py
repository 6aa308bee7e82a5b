"""Training that starts from trained weights: what of them the plan keeps, and how a fold's network gets them.

The plan holds the hashes of the weights, what their channels and outputs mean, and for how long the encoder is frozen;
everything here follows from it. The bundle itself is needed until a fold has its first checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sagittal.bundle import Bundle
from sagittal.bundle.manifest import weights_path
from sagittal.errors import PlanError
from sagittal.networks.build import build_network
from sagittal.networks.encoder import encoder_prefixes, set_encoder_frozen
from sagittal.networks.ends import Ends, network_ends
from sagittal.networks.transfer import transfer
from sagittal.networks.transfer_report import TransferReport
from sagittal.plan.base import write_atomically
from sagittal.plan.dataset import DatasetSpec
from sagittal.plan.plan import Plan
from sagittal.plan.training import Initialization
from sagittal.planning.recipe import STEPS_PER_EPOCH
from sagittal.training.split import same_split

REPORT = "initialization.txt"
MOST_FROZEN = 0.25
"""Share of the steps for which the encoder stays frozen at most where a budget cuts the schedule short."""
_FREEZE = "training.initialization.freeze_encoder_steps"
_MAY_DIFFER = ("kernel", "checkpoint", "deep_supervision")
"""Words in the names of a network's settings that may differ from the source's: weights are carried across these."""


@dataclass(frozen=True)
class StartFrom:
    """The bundle that training starts from, and for how many epochs the encoder stays as it is (None: not said)."""

    bundle: Bundle
    freeze_encoder_epochs: int | None = None


def with_initialization(plan: Plan, start: StartFrom) -> Plan:
    """Return the plan with what it starts from written into it.

    Raises:
        PlanError: the bundle's network can't give its weights to the plan's, the plan starts from other weights
            already, or the encoder would be frozen to the end.
    """
    made = _describe(plan, start)
    present = plan.training.initialization
    if present is not None:
        _refuse_other_source(made, present, start.bundle, "the plan")
        if start.freeze_encoder_epochs is None:
            made = present
    if made.freeze_encoder_steps >= plan.schedule.steps:
        raise PlanError(
            f"--freeze-encoder {start.freeze_encoder_epochs}: {made.freeze_encoder_steps} steps, and schedule.steps is "
            f"{plan.schedule.steps}, so the encoder would never be trained. Freeze it for fewer epochs of "
            f"{STEPS_PER_EPOCH} steps, or train for longer.",
            code="frozen_to_the_end",
        )
    reasons = {"training.initialization": _reason(plan, made)}
    if start.freeze_encoder_epochs is not None:
        reasons[_FREEZE] = f"--freeze-encoder {start.freeze_encoder_epochs}, epochs of {STEPS_PER_EPOCH} steps"
    return plan.replace(training=plan.training.replace(initialization=made), reasons={**plan.reasons, **reasons})


def with_frozen_steps(plan: Plan, steps: int, *, budget_s: float) -> Plan:
    """Return a plan whose schedule a budget has fitted, with `steps` frozen ones or as many as its share allows."""
    start = plan.training.initialization
    if start is None:
        return plan
    most = int(MOST_FROZEN * plan.schedule.steps)
    reasons = dict(plan.reasons)
    if steps > most:
        reasons[_FREEZE] = (
            f"--budget {budget_s:.0f} s: {MOST_FROZEN:.0%} of the {plan.schedule.steps} steps that fit, "
            f"instead of the {steps} asked for"
        )
    return plan.replace(
        training=plan.training.replace(initialization=start.replace(freeze_encoder_steps=min(steps, most))),
        reasons=reasons,
    )


def without_freezing(plan: Plan) -> Plan:
    """Return the plan with no frozen steps, so that a budget can fit any schedule."""
    start = plan.training.initialization
    if start is None:
        return plan
    return plan.replace(training=plan.training.replace(initialization=start.replace(freeze_encoder_steps=0)))


def refuse_other_start(plan: Plan, start: StartFrom, stored: Path) -> None:
    """Refuse to go on with a run from another bundle than it began with.

    Raises:
        PlanError: the run began from random weights, from others, or with the encoder frozen for another time.
    """
    present = plan.training.initialization
    advice = f"Leave the option out to go on, or choose another --out, or remove {stored.parent}."
    if present is None:
        raise PlanError(
            f"--init-from {start.bundle.path}: {stored}, by which this run began, starts from random weights. {advice}",
            code="initialization_mismatch",
        )
    _refuse_other_source(_describe(plan, start), present, start.bundle, str(stored))
    epochs = start.freeze_encoder_epochs
    capped = plan.reasons.get(_FREEZE, "").startswith("--budget")
    if epochs is not None and epochs * STEPS_PER_EPOCH != present.freeze_encoder_steps and not capped:
        raise PlanError(
            f"--freeze-encoder {epochs}: {stored}, by which this run began, freezes the encoder for "
            f"{present.freeze_encoder_steps} steps. {advice}",
            code="initialization_mismatch",
        )


def weights_for(initialization: Initialization, fold: str) -> str:
    """Return the name of the weights that a fold starts from: its own fold's, else `all`, else the first."""
    names = sorted(initialization.weights_sha256, key=lambda name: (len(name), name))
    own = f"fold_{fold}"
    return own if own in names else "all" if "all" in names else names[0]


def may_have_seen_held_out(plan: Plan, fold: str) -> bool:
    """Tell whether the weights that a fold starts from may have been trained on cases that it holds out."""
    start = plan.training.initialization
    if start is None or fold == "none":
        return False
    return not (start.held_out_unseen and weights_for(start, fold) == f"fold_{fold}")


def frozen_steps(plan: Plan) -> int:
    """Return for how many steps of the schedule the encoder is frozen."""
    start = plan.training.initialization
    return 0 if start is None else start.freeze_encoder_steps


def fill(network: torch.nn.Module, plan: Plan, bundle: Bundle, fold: str) -> TransferReport:
    """Carry the bundle's weights for this fold into a network that `plan` describes, in place.

    Raises:
        PlanError: a tensor does not fit; the message names it.
        BundleError: the bundle's weights changed since it was read.
    """
    assert plan.training.initialization is not None
    arrays = bundle.weights(weights_for(plan.training.initialization, fold))
    # A copy, since arrays over a file's bytes can't be written to.
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return transfer(network, tensors, target_ends=ends_of(plan), source_ends=ends_of(bundle.plan))


def try_fill(plan: Plan, bundle: Bundle, fold: str) -> None:
    """Find out whether the weights fit, before anything takes time.

    Raises:
        PlanError: a tensor does not fit, or the encoder is to be frozen and the network does not tell which part it is.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_network(plan.network, len(plan.dataset.channel_names), plan.dataset.num_outputs)
    fill(network, plan, bundle, fold)
    if frozen_steps(plan):
        encoder_prefixes(network)


def describe_start(plan: Plan, report: TransferReport, fold: str) -> list[str]:
    """Return what a person should know of the weights that a fold starts from, a line each."""
    start = plan.training.initialization
    assert start is not None
    name = weights_for(start, fold)
    lines = [
        f"init: fold {fold} starts from {name} of {start.network_name} "
        f"({start.weights_sha256[name][:12]}): {report.summary()}"
    ]
    if fold != "none" and name != f"fold_{fold}":
        lines.append(f"  warning: there is no fold_{fold} in that bundle, so {name} is taken{_seen(start)}")
    elif may_have_seen_held_out(plan, fold):
        lines.append(f"  note: {name} was trained on other cases or another split{_seen(start)}")
    if start.freeze_encoder_steps:
        lines.append(f"  the encoder stays as it is for the first {start.freeze_encoder_steps} steps")
    return lines


def _seen(start: Initialization) -> str:
    if start.held_out_unseen:
        return "; it was trained on cases that are held out here, so the validation will look too good"
    return "; where the two data sets share cases, it may have seen those held out here"


def write_report(folder: Path, plan: Plan, report: TransferReport, fold: str) -> Path:
    """Write the fate of every tensor into the fold's folder and return the file."""
    head = "\n".join(describe_start(plan, report, fold))
    return write_atomically(folder / REPORT, f"{head}\n\n{report.table()}\n".encode())


def ends_of(plan: Plan) -> Ends:
    """Return the ends of a plan's network."""

    def build(channels: int, outputs: int) -> torch.nn.Module:
        return build_network(plan.network, channels, outputs)

    return network_ends(build, plan.dataset.channel_names, output_names(plan.dataset))


def output_names(spec: DatasetSpec) -> tuple[str, ...]:
    """Return what each output of a network stands for, in order."""
    labels = tuple(label.name for label in spec.labels)
    return labels if spec.has_regions else ("background", *labels)


def _describe(plan: Plan, start: StartFrom) -> Initialization:
    source = start.bundle.plan
    _refuse_other_network(plan, start.bundle)
    epochs = start.freeze_encoder_epochs or 0
    if epochs < 0:
        raise PlanError(f"--freeze-encoder {epochs}: expected a number of epochs, 0 or more.")
    files = start.bundle.manifest.files
    return Initialization(
        network_name=source.network_name,
        channel_names=source.dataset.channel_names,
        outputs=output_names(source.dataset),
        weights_sha256={name: files[weights_path(name)].sha256 for name in start.bundle.weight_names},
        held_out_unseen=_held_out_unseen(plan, start.bundle),
        freeze_encoder_steps=epochs * STEPS_PER_EPOCH,
    )


def _held_out_unseen(plan: Plan, bundle: Bundle) -> bool:
    """Tell whether `fold_k` of the bundle never saw what fold k of the plan holds out: same scans, same split."""
    source = bundle.plan
    measured = source.fingerprint_sha256 != "0" * 64  # no scan was measured for imported weights
    one, other = plan.training, source.training
    return (
        measured
        and plan.fingerprint_sha256 == source.fingerprint_sha256
        and same_split(one, other)
        and not any(may_have_seen_held_out(source, name.removeprefix("fold_")) for name in bundle.weight_names)
    )


def _refuse_other_network(plan: Plan, bundle: Bundle) -> None:
    own, theirs = plan.network, bundle.plan.network
    named = f"--init-from {bundle.path}: its network is {bundle.plan.network_name}"
    if own.kind != theirs.kind:
        raise PlanError(
            f"{named}, a {theirs.kind}; the plan's is {plan.network_name}, a {own.kind}. Weights go from one network "
            f"to another of its kind. Choose --network {bundle.plan.network_name}, or leave --init-from out.",
            code="other_network",
        )
    differing = {
        name: (getattr(own, name), getattr(theirs, name))
        for name in type(own).model_fields
        if getattr(own, name) != getattr(theirs, name) and not any(word in name for word in _MAY_DIFFER)
    }
    if differing:
        told = "; ".join(
            f"{name} is {_short(value)} there, {_short(own)} here" for name, (own, value) in differing.items()
        )
        advice = " ".join(f"--set network.{name}={_short(value)}" for name, (_, value) in differing.items())
        raise PlanError(
            f"{named}, and it differs from the plan's {plan.network_name} in more than its kernels: {told}. "
            f"Plan for the same network: --network {bundle.plan.network_name}, or {advice}.",
            code="other_network",
        )


def _short(value: Any) -> str:
    """Return a setting as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _refuse_other_source(made: Initialization, present: Initialization, bundle: Bundle, where: str) -> None:
    if made.replace(freeze_encoder_steps=0) != present.replace(freeze_encoder_steps=0):
        hashes = [f"{name} {digest[:12]}..." for name, digest in list(present.weights_sha256.items())[:5]]
        raise PlanError(
            f"--init-from {bundle.path}: {where} starts from other weights, those of {present.network_name} with "
            f"SHA-256 {', '.join(hashes)}. Give that bundle, unchanged, or choose another --out and a plan of its own.",
            code="initialization_mismatch",
        )


def _reason(plan: Plan, start: Initialization) -> str:
    same_channels = tuple(map(str.casefold, start.channel_names)) == tuple(
        map(str.casefold, plan.dataset.channel_names)
    )
    parts = [
        "channels as there" if same_channels else f"channels matched by name with {', '.join(start.channel_names)}",
        "outputs as there" if start.outputs == output_names(plan.dataset) else "other outputs, so the heads are fresh",
    ]
    return f"--init-from, trained weights of {start.network_name}; {'; '.join(parts)}"


class Freezing:
    """Keeps the encoder frozen over the first steps of the schedule; a pure function of where in it a step stands."""

    def __init__(self, network: torch.nn.Module, steps: int, say: Callable[[str], None]) -> None:
        self._network, self._steps, self._say = network, steps, say
        self._frozen = False

    def obey(self, reached: float, step: int) -> None:
        """Freeze the encoder or let it go, as the place in the schedule that `step` has reached demands."""
        if reached < self._steps:
            # Each time anew: a validation puts the whole network back into train mode.
            set_encoder_frozen(self._network, True)
            self._frozen = True
        elif self._frozen:
            set_encoder_frozen(self._network, False)
            self._frozen = False
            self._say(f"step {step}: the encoder is trained from here on")
