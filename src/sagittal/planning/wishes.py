"""What was asked for before anything is derived: a configuration, a preset, and values by dotted name.

Some of it decides on the rest of a plan (the spacing on the patch, the network's fields on the memory), so it is laid
down first; everything else is written over what the rules chose. What the user sets goes before what the preset says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from sagittal.errors import PlanError
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.networks import NETWORKS, NetworkConfig, network_config
from sagittal.plan.overrides import override, override_network
from sagittal.plan.plan import Configuration, Plan, as_triple
from sagittal.planning.presets import PRESETS, Preset, preset_named
from sagittal.planning.topology import Fixed, fitted_fields

SET_BY_USER = "set by the user with --set"
Orientation = Literal["RAS", "stored"]
CONFIGURATIONS: tuple[Configuration, ...] = ("3d", "3d-low", "2d")
T = TypeVar("T")
_TOLD_MORE = ("preprocessing.spacing_mm", "patch.size")
"""Fields whose reason tells more than where their value comes from."""
_MIRRORED = "training.augmentation.mirror_axes"


@dataclass(frozen=True)
class Wish:
    """A value that was asked for, and the reason that the plan gives for it."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Wishes:
    """All that was asked for; make one with `wishes_for`."""

    configuration: Configuration = "3d"
    preset_name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The user's own, dotted name to JSON value."""

    @property
    def preset(self) -> Preset | None:
        """The preset, where there is one."""
        return None if self.preset_name is None else preset_named(self.preset_name)

    def get(self, name: str) -> Wish | None:
        """Return what was asked for a field, None where nothing was."""
        if name in self.settings:
            return Wish(self.settings[name], SET_BY_USER)
        if self.preset is not None and name in self.preset.settings:
            return Wish(self.preset.settings[name], self._preset_origin(name))
        return None

    def read(self, name: str, parse: Callable[[Any], T | None], expected: str) -> tuple[T, str] | None:
        """Return a field's value as `parse` reads it and its reason, None where nothing was asked for.

        Raises:
            PlanError: `parse` finds no sense in the value.
        """
        wish = self.get(name)
        if wish is None:
            return None
        try:
            value = parse(wish.value)
        except (TypeError, ValueError):
            value = None
        if value is None:
            raise PlanError(f"--set {name}={wish.value}: expected {expected}.", code="bad_setting")
        return value, wish.origin

    @property
    def orientation(self) -> tuple[Orientation, str] | None:
        """Which axis order was asked for: the fingerprint is taken in it."""
        return self.read("preprocessing.orientation", _orientation, "RAS or stored")

    @property
    def spacing_mm(self) -> tuple[TripleMm, str] | None:
        """Which target spacing was asked for."""
        expected = "three lengths above 0 in mm, along D, H, W, for example 1.0,0.8,0.8"
        found = self.read("preprocessing.spacing_mm", _lengths, expected)
        if found is not None and self.configuration == "3d-low":
            raise PlanError(
                "--config 3d-low chooses preprocessing.spacing_mm itself. Leave the spacing out, or plan --config 3d "
                "with it.",
                code="bad_setting",
            )
        return found

    @property
    def transpose(self) -> tuple[Triple, str] | None:
        """Which order of axes was asked for."""
        return self.read("preprocessing.transpose", _permutation, "0, 1 and 2 in some order, for example 0,1,2")

    @property
    def patch_size(self) -> tuple[Triple, str] | None:
        """Which patch was asked for."""
        expected = "three numbers of voxels, for example 96,96,96"
        if self.configuration == "2d":
            expected += "; of a 2d plan the first is 1, for example 1,256,256"
        found = self.read("patch.size", _counts, expected)
        if found is not None and self.configuration == "2d" and found[0][0] != 1:
            raise PlanError(f"--set patch.size={list(found[0])}: expected {expected}.", code="bad_setting")
        return found

    @property
    def batch_size(self) -> tuple[int, str] | None:
        """Which batch was asked for."""
        return self.read("training.batch_size", _count, "a number of 1 or more")

    def network(self, named: NetworkConfig) -> tuple[NetworkConfig, Fixed]:
        """Return the network with what was asked of it, but for what else follows from its patch, and that apart.

        Raises:
            PlanError: a field that it does not have, or a value that does not fit.
        """
        if self.configuration == "2d":
            sliced = named.for_slices()
            if sliced is None:
                able = sorted(name for name, config in NETWORKS.items() if config.for_slices() is not None)
                raise PlanError(
                    f"--config 2d: a {named.kind} has no form for slices. Networks that have one: {', '.join(able)}.",
                    code="no_2d_form",
                )
            named = sliced
        every = {**(self.preset.settings if self.preset else {}), **self.settings}
        later = {f"network.{name}" for name in fitted_fields(named)}
        early = {name: value for name, value in every.items() if name not in later}
        return override_network(named, early), {name: every[name] for name in every if name in later}

    def applied_to(self, plan: Plan) -> Plan:
        """Return the plan that the rules made with everything that was asked for written into it.

        Raises:
            PlanError: a field that there is not, or a value that does not fit.
        """
        kept = {name: plan.reasons[name] for name in _TOLD_MORE}
        if self.preset is not None:
            plan = override(plan, self.preset.settings, origin="")
            origins = {name: self._preset_origin(name) for name in self.preset.settings}
            plan = plan.replace(reasons={**plan.reasons, **origins})
        mirrored = {name: self.settings[_MIRRORED] for name in ("inference.mirror_axes",) if _MIRRORED in self.settings}
        plan = override(plan, mirrored, origin="the axes that training mirrors")
        plan = override(plan, self.settings, origin=SET_BY_USER)
        return plan.replace(reasons={**plan.reasons, **kept})

    def _preset_origin(self, name: str) -> str:
        assert self.preset is not None
        note = self.preset.notes.get(name)
        return f"preset {self.preset_name}" + (f", {note}" if note else "")


def wishes_for(network_name: str, configuration: str, preset_name: str | None, settings: Mapping[str, Any]) -> Wishes:
    """Return what was asked for.

    Raises:
        PlanError: no such preset, or one for other networks or configurations.
    """
    known = next((name for name in CONFIGURATIONS if name == configuration), None)
    if known is None:
        raise PlanError(f"--config {configuration}: expected {', '.join(CONFIGURATIONS)}.", code="bad_setting")
    if preset_name is not None:
        preset, kind = preset_named(preset_name), network_config(network_name).kind
        if preset.kinds and kind not in preset.kinds:
            fitting = [name for name, other in PRESETS.items() if not other.kinds or kind in other.kinds]
            raise PlanError(
                f"--preset {preset_name} is for {', '.join(preset.kinds)}; {network_name} is a {kind}. Choose one of "
                f"{', '.join(fitting)}, or --network {preset.network_name}.",
                code="other_network",
            )
        if configuration not in preset.configurations:
            raise PlanError(
                f"--preset {preset_name} is a protocol for --config {' or '.join(preset.configurations)}, not "
                f"{configuration}. Leave one of them out.",
                code="bad_setting",
            )
    return Wishes(known, preset_name, settings)


def _orientation(value: Any) -> Orientation | None:
    return value if value in ("RAS", "stored") else None


def _lengths(value: Any) -> TripleMm | None:
    d, h, w = (float(length) for length in value)
    return (d, h, w) if min(d, h, w) > 0 else None


def _permutation(value: Any) -> Triple | None:
    axes = as_triple(list(value))
    return axes if sorted(axes) == [0, 1, 2] else None


def _counts(value: Any) -> Triple | None:
    size = as_triple(list(value))
    return size if all(_count(edge) is not None for edge in size) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None
