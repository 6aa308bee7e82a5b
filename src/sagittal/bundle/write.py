"""Write a bundle as a whole or not at all: build it beside its place, then rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from sagittal.bundle.card import model_card
from sagittal.bundle.manifest import (
    LOW,
    MANIFEST,
    METRICS,
    MODEL_CARD,
    PLAN,
    entry_of,
    looks_like_bundle,
    make_manifest,
    read_manifest,
    walk_files,
    weights_path,
)
from sagittal.bundle.read import Bundle, read_bundle
from sagittal.bundle.replacement import replacing, tidy
from sagittal.errors import BundleError
from sagittal.plan import Plan
from sagittal.plan.base import cannot_write

Arrays = Mapping[str, np.ndarray[Any, Any]]

_ABANDONED_AFTER_S = 3600.0
_NOT_TRAINED = (".running_mean", ".running_var")


def hash_case(case_id: str) -> str:
    """Return the twelve hexadecimal digits that stand for a case in a bundle, which may name none."""
    return hashlib.sha256(case_id.encode()).hexdigest()[:12]


def write_bundle(
    path: str | os.PathLike[str],
    *,
    plan: Plan,
    weights: Mapping[str, Arrays],
    metrics: Mapping[str, Any],
    data_license: str | None = None,
    low: Bundle | None = None,
) -> Path:
    """Write a bundle and return its folder.

    A bundle that is already there is replaced: it is renamed to `.NAME.previous`, the new one takes its name, then it
    is deleted. So an intact bundle exists at every moment, and what a killed run left behind is put right by the next.

    Args:
        path: the folder; its parents are made.
        plan: the plan that the weights belong to.
        weights: arrays by parameter name, under `all` or `fold_0`, `fold_1`, ...
        metrics: values that JSON can hold; see `card.model_card` for the names that the card shows. It must name no
            case (see `hash_case`) and no path.
        data_license: licence of the data, for the card.
        low: a bundle whose plan and weights become the second model, which sees scans at a coarser spacing.

    Raises:
        BundleError: the folder holds something else than a bundle, or weights or metrics that can't be kept.
        ResourceError: the disk is full or the folder can't be written. A bundle already there is untouched.
    """
    folder = Path(os.path.realpath(path))
    files = _contents(plan, weights, metrics, data_license, low)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder, looks_like_bundle, abandoned_after_s=_ABANDONED_AFTER_S)
        _refuse_to_overwrite(folder)
        with replacing(folder) as new:
            _fill(new, files)
            read_bundle(new)
    except OSError as error:
        full = "disk_full" if error.errno == errno.ENOSPC else None
        raise cannot_write(folder, error, what="the bundle", code=full) from None
    return Path(path)


def _contents(
    plan: Plan,
    weights: Mapping[str, Arrays],
    metrics: Mapping[str, Any],
    data_license: str | None,
    low: Bundle | None,
) -> dict[str, bytes]:
    """Return every file of the bundle by its relative path, the manifest last."""
    if not weights:
        raise BundleError("a bundle needs weights, under 'all' or 'fold_N'.")
    files = {weights_path(name): _serialise(name, arrays) for name, arrays in weights.items()}
    try:
        files[METRICS] = (json.dumps(dict(metrics), indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"metrics can't be kept as JSON ({error}). Give None for what is not defined.") from None
    files[PLAN] = plan.to_json().encode()
    if low is not None:
        files[LOW + PLAN] = low.plan.to_json().encode()
        for name in low.weight_names:
            files[LOW + weights_path(name)] = _serialise(name, low.weights(name))
    parameters = _count(next(iter(weights.values())))
    files[MODEL_CARD] = model_card(plan, metrics, parameters=parameters, data_license=data_license).encode()
    manifest = make_manifest(
        {name: entry_of(content) for name, content in sorted(files.items())},
        sagittal_version=_own_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return {**files, MANIFEST: manifest.to_json().encode()}


def _own_version() -> str:
    try:
        return version("sagittal")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


def _serialise(name: str, arrays: Arrays) -> bytes:
    if not arrays:
        raise BundleError(f"weights '{name}' hold no array.")
    for key, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise BundleError(f"weights '{name}': {key} has dtype {array.dtype}. Expected numbers.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BundleError(f"weights '{name}': {key} holds NaN or infinity. Training went wrong; lower its rate.")
    # safetensors writes an array's memory as it lies; a transposed view has to be laid out in order first.
    content: bytes = safetensors_numpy.save({key: np.asarray(array, order="C") for key, array in arrays.items()})
    return content


def _count(arrays: Arrays) -> int:
    return sum(
        array.size for name, array in arrays.items() if array.dtype.kind == "f" and not name.endswith(_NOT_TRAINED)
    )


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _refuse_to_overwrite(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not looks_like_bundle(folder):
        raise BundleError(f"{folder}: exists and is not a bundle. Choose another folder; nothing was overwritten.")
    foreign = set(walk_files(folder)) - {MANIFEST, *read_manifest(folder).files}
    if foreign:
        raise BundleError(
            f"{folder}: a bundle that also holds {', '.join(sorted(foreign)[:3])}, which replacing it would delete. "
            "Move these files elsewhere, or choose another folder."
        )
