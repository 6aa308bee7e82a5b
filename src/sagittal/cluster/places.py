"""Where work of many machines is done: what a user says with `--on`, read and checked without Ray or SLURM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sagittal.errors import PlanError, did_you_mean

Kind = Literal["ray", "slurm"]

LOCAL = "local"
"""The address that starts Ray anew on this machine, whatever runs there already."""
_EXPECTED = "Expected ray, ray:local, ray:HOST:PORT, ray://HOST:PORT, slurm or slurm:NAME=VALUE,..."
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Place:
    """Where work is done.

    Attributes:
        kind: what carries it.
        address: of Ray: None for a cluster that runs on this machine already, else one that is started here; `local`
            always starts one; `HOST:PORT` joins the cluster whose head listens there; `ray://HOST:PORT` reaches one as
            a client, from a machine that is no part of it.
        settings: of SLURM, for example `{"partition": "gpu", "time": "8:00:00"}`.
    """

    kind: Kind
    address: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.kind == "slurm":
            given = ",".join(f"{name}={value}" for name, value in self.settings.items())
            return f"slurm:{given}" if given else "slurm"
        if self.address is None:
            return "ray"
        return self.address if self.address.startswith("ray://") else f"ray:{self.address}"


def parse_place(text: str) -> Place:
    """Return the place that a user named.

    Raises:
        PlanError: it is none.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind not in ("ray", "slurm"):
        raise PlanError(
            f"--on {text}: unknown place.{did_you_mean(kind, ('ray', 'slurm'))} {_EXPECTED}", code="options"
        )
    if not colon:
        return Place("slurm") if kind == "slurm" else Place("ray")
    if kind == "slurm":
        return Place("slurm", settings=_settings(rest, text))
    if rest == LOCAL:
        return Place("ray", LOCAL)
    found = _HOST_PORT.fullmatch(rest.removeprefix("//"))
    if found is None or not 0 < int(found["port"]) < 65536:
        raise PlanError(f"--on {text}: '{rest}' is no address of a cluster. {_EXPECTED}", code="options")
    return Place("ray", f"ray:{rest}" if rest.startswith("//") else rest)


def _settings(text: str, whole: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value or _NAME.fullmatch(name) is None:
            raise PlanError(
                f"--on {whole}: '{part}' is not NAME=VALUE. Expected, for example, "
                "slurm:partition=gpu,time=8:00:00,gpus=1.",
                code="options",
            )
        if name in settings:
            raise PlanError(f"--on {whole}: '{name}' is given twice. Give it once.", code="options")
        settings[name] = value
    return settings
