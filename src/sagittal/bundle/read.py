"""Read a bundle: everything is verified before anything is used."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from sagittal.bundle.manifest import (
    METRICS,
    PLAN,
    Manifest,
    read_manifest,
    read_verified,
    verify_files,
    weights_path,
)
from sagittal.errors import BundleError, PlanError
from sagittal.plan import Plan


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. Weights are read when asked for, and verified once more as they are.

    Attributes:
        path: the folder.
        manifest: its files and their hashes.
        plan: what the weights were made with, and what prediction does.
        metrics: how they were validated.
    """

    path: Path
    manifest: Manifest
    plan: Plan
    metrics: dict[str, Any]

    @property
    def weight_names(self) -> tuple[str, ...]:
        """`("all",)` or `("fold_0", ...)`."""
        return self.manifest.weight_names

    def weights(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays of the weights called `name`, by parameter name, in their stored dtype.

        Raises:
            BundleError: no such weights, or the file changed since the bundle was read.
        """
        if name not in self.weight_names:
            raise BundleError(f"{self.path}: has no weights '{name}'. It has {', '.join(self.weight_names)}.")
        relative = weights_path(name)
        content = read_verified(self.path / relative, self.manifest.files[relative])
        try:
            arrays: dict[str, np.ndarray[Any, Any]] = safetensors_numpy.load(content)
        except (SafetensorError, TypeError, ValueError, KeyError) as error:
            raise _unreadable(self.path / relative, error) from None
        return arrays


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read the bundle at `path` after verifying every byte of it.

    Raises:
        BundleError: not a bundle, newer than this version, a file missing, too many, changed or unreadable, or a link.
    """
    folder = Path(path)
    if not folder.exists() and previous_folder(folder).is_dir():
        raise BundleError(
            f"{folder}: does not exist; a run that was replacing it was stopped. The former bundle is intact: "
            f"rename {previous_folder(folder).name} to {folder.name}, or train again."
        )
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    for name in manifest.weight_names:
        _check_weights(folder / weights_path(name))
    return Bundle(folder, manifest, _read_plan(folder, manifest), _read_metrics(folder, manifest))


def previous_folder(folder: Path) -> Path:
    """Return where the former bundle waits while a new one takes its place."""
    return folder.with_name(f".{folder.name}.previous")


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not names:
        raise BundleError(f"{path}: holds no weights. Train again.")


def _unreadable(path: Path, error: Exception) -> BundleError:
    return BundleError(f"{path}: no readable safetensors file ({error}). Get the bundle from its maker again.")


def _read_plan(folder: Path, manifest: Manifest) -> Plan:
    content = read_verified(folder / PLAN, manifest.files[PLAN])
    try:
        return Plan.from_json(content, source=str(folder / PLAN))
    except PlanError as error:
        raise BundleError(
            f"{error.message} Expected a plan that this version of sagittal reads; the bundle was written by version "
            f"{manifest.sagittal_version}."
        ) from None


def _read_metrics(folder: Path, manifest: Manifest) -> dict[str, Any]:
    content = read_verified(folder / METRICS, manifest.files[METRICS])
    try:
        metrics = json.loads(content)
    except (ValueError, RecursionError):
        metrics = None
    if not isinstance(metrics, dict):
        raise BundleError(f"{folder / METRICS}: expected a JSON object. Get the bundle from its maker again.")
    return metrics
