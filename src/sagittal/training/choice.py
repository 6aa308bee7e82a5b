"""What the user asked a run for: a plan, or what to plan, and whether a run's own plan is that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagittal.data.fingerprint import Orientation
from sagittal.errors import PlanError
from sagittal.plan import Fingerprint, Plan, network_config
from sagittal.plan.base import EVERY_FIELD
from sagittal.plan.dataset import DatasetSpec
from sagittal.plan.overrides import override, require_known_fields
from sagittal.plan.plan import Configuration
from sagittal.planning import make_plan
from sagittal.planning.presets import preset_named
from sagittal.planning.topology import fitted_fields
from sagittal.planning.wishes import SET_BY_USER, wishes_for
from sagittal.training.initialization import StartFrom, refuse_other_start, with_initialization
from sagittal.training.split import SplitSources, as_settled, settle_split

_START = "training.initialization."
_BUDGET = "--budget"
"""How the reasons begin of fields that a budget fitted."""


@dataclass(frozen=True)
class PlanChoice:
    """What the user asked for: a plan, or what to plan; overrides of either by dotted name, and a start."""

    network: str | None = None
    plan: Plan | str | os.PathLike[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: StartFrom | None = None
    configuration: Configuration | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        # Before the data are looked at, which may take long.
        require_known_fields(self.settings)

    @property
    def early_settings(self) -> Mapping[str, Any]:
        """The overrides but those of the start, which a plan may not have yet."""
        return {name: value for name, value in self.settings.items() if not name.startswith(_START)}

    @property
    def decided(self) -> frozenset[str]:
        """The dotted names of the values that the user or the preset chose."""
        return frozenset(self.settings) | frozenset(preset_named(self.preset).settings if self.preset else ())

    @property
    def network_name(self) -> str:
        """The network to plan for where no plan is given: by default that of the weights, or of the preset."""
        if self.network is not None:
            return self.network
        if self.start is not None:
            return self.start.bundle.plan.network_name
        return "mednext-s" if self.preset is None else preset_named(self.preset).network_name

    def orientation(self) -> Orientation:
        """Return the axis order along which to measure a data set that is planned for.

        Raises:
            PlanError: something that was asked for makes no sense.
        """
        wishes = wishes_for(self.network_name, self.configuration or "3d", self.preset, self.early_settings)
        asked = wishes.orientation
        return "RAS" if asked is None else asked[0]

    def given_plan(self) -> Plan | None:
        """Return the plan that was given as it is, None where one is to be made.

        Raises:
            PlanError: it can't be read, or something was asked for that only a plan still to be made can follow.
        """
        if self.plan is None:
            return None
        for option, value in (("--config", self.configuration), ("--preset", self.preset)):
            if value is not None:
                raise PlanError(
                    f"--plan and {option} {value} exclude each other: the rest of a plan follows from it. Give one.",
                    code="options",
                )
        return self.plan if isinstance(self.plan, Plan) else Plan.read(self.plan)

    def make(self, fingerprint: Fingerprint, spec: DatasetSpec, *, memory_gib: float) -> Plan:
        """Plan what was asked for; `applied_to` adds the split and the start.

        Raises:
            PlanError, ResourceError: as for `make_plan`.
        """
        carried = self._of_the_start()
        plan = make_plan(
            fingerprint,
            spec,
            self.network_name,
            memory_gib=memory_gib,
            configuration=self.configuration or "3d",
            preset=self.preset,
            settings={**carried, **self.early_settings},
        )
        told = dict.fromkeys(carried, "--init-from, as in the network whose weights training starts from")
        return plan.replace(reasons={**plan.reasons, **told})

    def applied_to(self, plan: Plan, sources: SplitSources) -> Plan:
        """Return the plan with the overrides, the split and the start written into it, with their reasons.

        Raises:
            PlanError: an override or a start that makes no sense for this plan.
            DataError: the files that tell the split do not fit the cases.
        """
        if self.plan is not None:
            plan = override(plan, self.early_settings, origin=SET_BY_USER)
        plan = settle_split(plan, sources, self.settings, is_made=self.plan is None)
        if self.start is not None:
            plan = with_initialization(plan, self.start)
        late = {name: value for name, value in self.settings.items() if name not in self.early_settings}
        return override(plan, late, origin=SET_BY_USER)

    def _of_the_start(self) -> dict[str, Any]:
        """Return what follows from a patch otherwise, but is settled by the weights to start from, by dotted name."""
        if self.start is None:
            return {}
        source = self.start.bundle.plan.network
        dims = 2 if self.configuration == "2d" else 3
        if source.kind != network_config(self.network_name).kind or source.dims != dims:
            return {}
        values = source.model_dump(mode="json", context=EVERY_FIELD)
        names = {f"network.{name}": values[name] for name in fitted_fields(source)}
        return {name: value for name, value in names.items() if name not in self.settings}


def refuse_other_plan(plan: Plan, stored: Path, choice: PlanChoice) -> None:
    """Refuse to go on with a run's plan where something else was asked for than it was made by.

    Raises:
        PlanError: another plan, network, configuration, preset or start, or overrides with other values.
    """
    advice = f"Leave these options out to go on with it, or choose another --out, or remove {stored.parent}."
    if choice.start is not None:
        refuse_other_start(plan, choice.start, stored)
    given = choice.given_plan()
    if given is not None and _differs(given, plan, choice):
        raise PlanError(
            f"the plan given differs from {stored}, by which this run began. {advice}", code="plan_mismatch"
        )
    if choice.network is not None and choice.network.lower() != plan.network_name:
        raise PlanError(f"{choice.network}: {stored} is for {plan.network_name}. {advice}", code="plan_mismatch")
    if choice.configuration not in (None, plan.configuration):
        raise PlanError(
            f"--config {choice.configuration}: {stored} is for {plan.configuration}. {advice}", code="plan_mismatch"
        )
    left = _left_of_preset(plan, choice)
    for given_as, settings in ((f"--preset {choice.preset}", left), ("--set", choice.settings)):
        if override(plan, settings, origin="").replace(reasons={}) != plan.replace(reasons={}):
            # Fields that make sense only together may be refused one by one; such a field is named too.
            names = [name for name, value in settings.items() if _changes(plan, {name: value})]
            option = f"--set {', '.join(names)}" if given_as == "--set" else given_as
            raise PlanError(f"{option}: {stored} has other values. {advice}", code="plan_mismatch")


def _changes(plan: Plan, settings: Mapping[str, Any]) -> bool:
    """Return whether a plan with these settings is another, or is none."""
    try:
        return override(plan, settings, origin="").replace(reasons={}) != plan.replace(reasons={})
    except PlanError:
        return True


def _left_of_preset(plan: Plan, choice: PlanChoice) -> dict[str, Any]:
    """Return what of the preset neither the user nor a budget has replaced in a run's plan, by dotted name."""
    if choice.preset is None:
        return {}
    replaced = {name for name, reason in plan.reasons.items() if reason.startswith((_BUDGET, SET_BY_USER))}
    replaced |= set(choice.settings)
    return {
        name: value
        for name, value in preset_named(choice.preset).settings.items()
        if not any(other == name or other.startswith(f"{name}.") for other in replaced)
    }


def _differs(given: Plan, plan: Plan, choice: PlanChoice) -> bool:
    other_start = given.training.initialization not in (None, plan.training.initialization)
    given = override(_without_start(given), choice.early_settings, origin=SET_BY_USER)
    # What a budget fitted may differ, and the start is compared apart; everything else must be the same.
    fitted = {
        name: getattr(plan.schedule, name)
        for name in type(plan.schedule).model_fields
        if plan.reasons.get(f"schedule.{name}", "").startswith(_BUDGET)
    }
    training = as_settled(given.training, plan.training, choice.settings)
    given = given.replace(schedule=given.schedule.replace(**fitted), training=training, reasons={})
    return other_start or given != _without_start(plan).replace(reasons={})


def _without_start(plan: Plan) -> Plan:
    return plan.replace(training=plan.training.replace(initialization=None))
