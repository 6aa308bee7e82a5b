"""`--set network.kernel_size=5`: a new plan from an old one, with the origin of each changed value written down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.base import EVERY_FIELD, describe_validation_error
from sagittal.plan.networks import NetworkConfig
from sagittal.plan.plan import Plan

_NO_SETTINGS = ("reasons", "schema_version")


def parse_settings(
    texts: Sequence[str], *, option: str = "--set", example: str = "patch.size=96,96,96"
) -> dict[str, Any]:
    """Parse `FIELD=VALUE` texts into dotted names and values.

    A value is JSON where it parses as JSON (`5`, `1e-3`, `true`, `[1, 2]`), a list where it holds commas (`96,96,96`),
    else text. `option` and `example` are for the message where it is none of these.

    Raises:
        PlanError: a text without `=` or with an empty side, or a field set twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        name = name.strip()
        if not separator or not name or not value.strip():
            raise PlanError(f"{option} {text}: expected FIELD=VALUE, for example {example}.", code="bad_setting")
        if name in settings:
            raise PlanError(f"{option} {name}: given twice. Give each field once.", code="bad_setting")
        settings[name] = _parse_value(value.strip())
    return settings


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [_parse_value(part.strip()) for part in text.split(",")] if "," in text else text


def require_known_fields(names: Iterable[str]) -> None:
    """Refuse dotted names that no plan has, whatever its network, before there is a plan.

    Raises:
        PlanError: an unknown field, with the closest known one.
    """
    for name in names:
        groups: tuple[type[BaseModel], ...] = (Plan,)
        walked: list[str] = []
        for part in name.split("."):
            known = {field: None for group in groups for field in group.model_fields if field not in _NO_SETTINGS}
            _require_known(name, part, known, walked)
            groups = tuple(
                inner
                for group in groups
                if part in group.model_fields
                for inner in _groups_of(group.model_fields[part].annotation)
            )
            walked.append(part)


def _groups_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the groups of fields that a field may hold; those in a list have no names to be set by."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not tuple:
        for part in get_args(annotation):
            yield from _groups_of(part)


def override(plan: Plan, settings: Mapping[str, Any], *, origin: str) -> Plan:
    """Return `plan` with `settings` (dotted name -> JSON value) applied and `origin` recorded as their reason.

    A group that has several forms, such as `training.optimizer`, may be set as a whole, by a value with its `kind`.

    Raises:
        PlanError: an unknown field (with the closest known one) or a value that does not fit.
    """
    if not settings:
        return plan
    tree = plan.model_dump(mode="json", context=EVERY_FIELD)
    for name, value in settings.items():
        _assign(tree, name, value)
    tree["reasons"] = {**_reasons_beside(tree["reasons"], settings), **dict.fromkeys(settings, origin)}
    _refit_deep_supervision(tree, settings)
    try:
        return Plan.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise PlanError(describe_validation_error(error, ", ".join(settings))) from None


def override_network(network: NetworkConfig, settings: Mapping[str, Any]) -> NetworkConfig:
    """Return a network's configuration with those of `settings` applied whose names begin with `network.`.

    Raises:
        PlanError: as for `override`.
    """
    chosen = {name: value for name, value in settings.items() if name.startswith("network.")}
    if not chosen:
        return network
    tree = {"network": network.model_dump(mode="json", context=EVERY_FIELD)}
    for name, value in chosen.items():
        _assign(tree, name, value)
    try:
        changed: NetworkConfig = TypeAdapter(NetworkConfig).validate_json(json.dumps(tree["network"]))
    except ValidationError as error:
        raise PlanError(describe_validation_error(error, ", ".join(chosen))) from None
    return changed


def _reasons_beside(reasons: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the reasons but those of fields inside of a group that is set as a whole."""
    groups = tuple(f"{name}." for name, value in settings.items() if isinstance(value, dict))
    return {name: reason for name, reason in reasons.items() if not name.startswith(groups)}


def _assign(tree: dict[str, Any], name: str, value: Any) -> None:
    node: Any = tree
    *parents, last = name.split(".")
    walked: list[str] = []
    for part in [*parents, last]:
        known = [key for key in node if key not in _NO_SETTINGS] if isinstance(node, dict) else []
        _require_known(name, part, known, walked)
        walked.append(part)
        if part is not last or len(walked) <= len(parents):
            node = node[part]
    if isinstance(node[last], dict) and not (isinstance(value, dict) and parents and "kind" in node[last]):
        raise PlanError(f"{name}: is a group of fields; set one of {', '.join(node[last])}.", code="unknown_field")
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(node[last], float):
        value = float(value)
    node[last] = value


def _require_known(name: str, part: str, known: Iterable[str], walked: Sequence[str]) -> None:
    known = list(known)
    if part not in known:
        where = ".".join(walked) or "a plan"
        raise PlanError(f"{name}: {where} has no field '{part}'.{did_you_mean(part, known)}", code="unknown_field")


def _refit_deep_supervision(tree: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Keep the number of loss weights equal to the number of outputs where only the network was changed."""
    changes_network = any(name.startswith("network.") for name in settings)
    if not changes_network or "training.loss.deep_supervision_weights" in settings:
        return
    try:
        network: NetworkConfig = TypeAdapter(NetworkConfig).validate_json(json.dumps(tree["network"]))
    except ValidationError:
        return  # the plan as a whole is validated next, and says what is wrong
    loss = tree["training"]["loss"]
    if len(loss["deep_supervision_weights"]) != network.scales:
        loss["deep_supervision_weights"] = list(deep_supervision_weights(network.scales))


def deep_supervision_weights(outputs: int) -> tuple[float, ...]:
    """Return 1, 1/2, 1/4, ... scaled to sum to one: MedNeXt's five are 0.5161, 0.2581, 0.1290, 0.0645, 0.0323."""
    raw = [0.5**level for level in range(outputs)]
    return tuple(weight / sum(raw) for weight in raw)
