"""A series that came, wherever it is, and the rule that says whether it is segmented."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sagittal.errors import PlanError, did_you_mean

_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_MAX_UID = 64
NO_SCANS = frozenset({"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SR", "PR", "KO", "DOC", "REG", "FID", "OT"})
"""Modalities of what is made of scans, our own objects among them; no rule may ask for them."""
EXAMPLE = "modality=CT,description~liver,model=NAME"
_TERM = re.compile(r"\s*([a-z-]+)\s*(=|~|>)\s*([^,]+?)\s*")
_TEXTS = {"description": "description", "study": "study_description", "body-part": "body_part"}
_KEYS = ("modality", *_TEXTS, "images", "model")


@dataclass(frozen=True)
class Arrival:
    """A series and what is known of it without its images.

    Attributes:
        series_uid, study_uid: its UIDs.
        modality: CT, MR and so on.
        description, study_description, body_part: as they were typed.
        instances: how many there are by now.
        mark: another text once an image came or grew; empty: the number says it.
    """

    series_uid: str
    study_uid: str
    modality: str
    description: str = ""
    study_description: str = ""
    body_part: str = ""
    instances: int = 0
    mark: str = ""

    @property
    def is_sound(self) -> bool:
        """Whether its UIDs are UIDs: they become parts of addresses and names of files."""
        return is_uid(self.series_uid) and is_uid(self.study_uid)


def is_uid(text: str) -> bool:
    """Whether a text is a DICOM UID."""
    return len(text) <= _MAX_UID and _UID.fullmatch(text) is not None


@dataclass(frozen=True)
class Term:
    """One condition on a text: all of it (`=`) or a part of it (`~`), whatever the case of letters."""

    field: str
    sign: str
    text: str

    def holds(self, arrival: Arrival) -> bool:
        """Whether a series fulfils it."""
        value, text = str(getattr(arrival, self.field)).casefold(), self.text.casefold()
        return text in value if self.sign == "~" else text == value


@dataclass(frozen=True)
class WatchRule:
    """Which series are segmented, and by which model.

    Attributes:
        modality: they must have.
        terms: that must hold, all of them.
        more_than: images that they must have.
        model: name of the model, None where one is served.
    """

    modality: str
    terms: tuple[Term, ...] = ()
    more_than: int = 0
    model: str | None = None

    def matches(self, arrival: Arrival) -> bool:
        """Whether a series is segmented."""
        return (
            arrival.modality == self.modality
            and arrival.modality not in NO_SCANS
            and arrival.instances > self.more_than
            and all(term.holds(arrival) for term in self.terms)
        )


def parse_rule(text: str) -> WatchRule:
    """Return the rule in a text such as `modality=CT,description~liver,images>20,model=liver`.

    Keys: modality (=), description, study and body-part (= or ~), images (>), model (=).

    Raises:
        PlanError: it can't be understood, or names no modality, or one that no scan has.
    """
    found: dict[str, tuple[str, str]] = {}
    terms: list[Term] = []
    for part in text.split(","):
        match = _TERM.fullmatch(part)
        if match is None:
            raise _unclear(text, f"'{part.strip()[:60]}' is no condition")
        key, sign, value = match.groups()
        if key not in _KEYS:
            raise _unclear(text, f"unknown key '{key}'.{did_you_mean(key, _KEYS)}".rstrip("."))
        if key in _TEXTS and sign in "=~":
            terms.append(Term(_TEXTS[key], sign, value))
            continue
        if key in found or sign != (">" if key == "images" else "="):
            raise _unclear(text, f"'{key}' comes twice, or with the wrong sign")
        found[key] = (sign, value)
    return _built(text, {key: value for key, (_, value) in found.items()}, tuple(terms))


def _built(text: str, found: Mapping[str, str], terms: tuple[Term, ...]) -> WatchRule:
    modality = found.get("modality", "").upper()
    if not modality or modality in NO_SCANS:
        raise _unclear(text, "it names no modality that scans have")
    images = found.get("images", "0")
    if not (images.isascii() and images.isdigit()):
        raise _unclear(text, f"images>{images[:20]}: no number")
    return WatchRule(modality, terms, int(images), found.get("model"))


def _unclear(text: str, cause: str) -> PlanError:
    return PlanError(f"--watch-rule {text[:200]}: {cause}. Write for example {EXAMPLE}.", code="watch_rule")
