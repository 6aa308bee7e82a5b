"""What the doctor says: one finding per fault, errors first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "fact"]

LEVELS: tuple[Level, ...] = ("error", "warning", "fact")
NAMED_CASES = 5


@dataclass(frozen=True)
class Finding:
    """One thing found: what it is, where, and what to do.

    Attributes:
        level: errors are what training refuses, warnings what a person should look at, facts describe the whole.
        code: the kind of thing, short and stable, for machines.
        case: empty where the whole data set is meant.
        message: what is wrong, with the numbers.
        fix: what to do.
        look_at: cases to show in a picture, `case` first; not in the JSON.
        channel: image to show; not in the JSON.
        label: name of the label that it is about, where that matters to a picture; not in the JSON.
    """

    level: Level
    code: str
    case: str
    message: str
    fix: str = ""
    look_at: tuple[str, ...] = ()
    channel: int = 0
    label: str = ""

    @property
    def shown_cases(self) -> tuple[str, ...]:
        """The cases that a picture of it shows."""
        return self.look_at or ((self.case,) if self.case else ())

    def as_dict(self) -> dict[str, str]:
        """Return `{"level", "code", "case", "message", "fix"}`."""
        return {name: getattr(self, name) for name in ("level", "code", "case", "message", "fix")}


@dataclass(frozen=True)
class Diagnosis:
    """All findings: errors first, then warnings, then facts."""

    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Diagnosis:
        """Return the findings in order of their level, otherwise in the order given."""
        return cls(tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))))

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What training refuses."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What a person should look at."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    @property
    def facts(self) -> tuple[Finding, ...]:
        """What describes the whole."""
        return tuple(finding for finding in self.findings if finding.level == "fact")

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def as_dict(self) -> dict[str, object]:
        """Return `{"ok": bool, "findings": [{"level", "code", "case", "message", "fix"}]}`."""
        return {"ok": self.ok, "findings": [finding.as_dict() for finding in self.findings]}

    def to_json(self) -> str:
        """Return `as_dict` as indented JSON."""
        return json.dumps(self.as_dict(), indent=2)


def named(cases: Sequence[str]) -> str:
    """Return the first names, and that there are more."""
    return ", ".join(cases[:NAMED_CASES]) + (", ..." if len(cases) > NAMED_CASES else "")


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return '1 case', '2 cases'."""
    return f"{number} {one if number == 1 else many or one + 's'}"
