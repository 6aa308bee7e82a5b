"""How often each case is drawn in training: case_weights.csv, where some should come more often than others."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sagittal.errors import DataError
from sagittal.plan.training import Training

WEIGHTS_NAME = "case_weights.csv"
"""Its place is the data set's folder: a table with the columns `case` and `weight`."""


@dataclass(frozen=True)
class CaseWeights:
    """How often cases are drawn, relative to each other; a case that is not listed has the weight 1."""

    listed: Mapping[str, float]

    def of(self, case_id: str) -> float:
        """Return the weight of a case."""
        return self.listed.get(case_id, 1.0)

    @property
    def sha256(self) -> str:
        """Hash of cases and weights, whatever their order: what a plan, which names no case, keeps of them."""
        return hashlib.sha256(json.dumps(sorted(self.listed.items())).encode()).hexdigest()


def read_case_weights(path: Path, case_ids: Collection[str]) -> CaseWeights | None:
    """Return the weights in a table with the columns `case` and `weight`, None where a data set's folder has none.

    Args:
        path: the table, or the folder of a data set in which `case_weights.csv` lies if there is one.
        case_ids: every case of the data set.

    Raises:
        DataError: the file can't be read, a column is missing, a case is unknown or listed twice, or a weight is no
            finite number of 0 or more.
    """
    if path.is_dir():
        path = path / WEIGHTS_NAME
        if not path.exists():
            return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, f"can't be read ({error})") from None
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    if not {"case", "weight"} <= set(rows.fieldnames or ()):
        raise _wrong(path, f"columns {', '.join(rows.fieldnames or ()) or 'none'}")
    known, weights = frozenset(case_ids), dict[str, float]()
    for row in rows:
        case, told = ((row[column] or "").strip() for column in ("case", "weight"))
        where = f"line {rows.line_num}"
        if case not in known:
            raise _wrong(path, f"{where}: no case '{case}' in the data set")
        if case in weights:
            raise _wrong(path, f"{where}: {case} is listed above already")
        weight = _number(told)
        if weight is None:
            raise _wrong(path, f"{where}: the weight of {case} is '{told}'")
        weights[case] = weight
    return CaseWeights(weights)


def require_same_weights(training: Training, weights: CaseWeights | None) -> CaseWeights | None:
    """Return the weights that a plan trains with: those given if it was made with them, None if with none.

    Raises:
        DataError: the plan was made with weights, and there are none or others now.
    """
    wanted = training.case_weights_sha256
    if wanted is None:
        return None
    if weights is None or weights.sha256 != wanted:
        found = "there are none now" if weights is None else f"they are others now ({weights.sha256[:12]})"
        raise DataError(
            f"{WEIGHTS_NAME}: the plan was made with weights of cases (SHA-256 {wanted[:12]}), and {found}. Restore "
            "the file, or make a new plan.",
            code="other_case_weights",
        )
    return weights


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _wrong(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: {problem}. Expected a table with the columns 'case' and 'weight': ids of the data set, each at most "
        "once, and numbers of 0 or more; cases that are not listed weigh 1. Correct the file or remove it.",
        code="case_weights",
    )
