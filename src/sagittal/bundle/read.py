"""Read a bundle: everything is verified before anything is used."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from sagittal.bundle import unpacked
from sagittal.bundle.archive import extract_archive
from sagittal.bundle.card import data_license_in
from sagittal.bundle.manifest import (
    LOW,
    METRICS,
    MODEL_CARD,
    PLAN,
    Manifest,
    read_manifest,
    read_verified,
    verify_files,
    weights_path,
)
from sagittal.bundle.replacement import previous_folder
from sagittal.errors import BundleError, PlanError, ResourceError
from sagittal.plan import Plan


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. Weights are read when asked for, and verified once more as they are.

    Attributes:
        path: the folder; of a package, a temporary one that is there as long as this value is.
        manifest: its files and their hashes.
        plan: what the weights were made with, and what prediction does.
        metrics: how they were validated.
        low_plan: plan of the bundle's second model, which sees scans at a coarser spacing; None where it has none.
        whole: where this is the second model of a bundle, that bundle; see `low`.
    """

    path: Path
    manifest: Manifest
    plan: Plan
    metrics: dict[str, Any]
    low_plan: Plan | None = None
    whole: Bundle | None = None

    @property
    def low(self) -> Bundle | None:
        """The second model as a bundle of its own, which engines load as any other; None where there is none.

        Its metrics are those of the bundle, which tell in `fast` how it compares.
        """
        if self.low_plan is None:
            return None
        return Bundle(self.path, self.manifest, self.low_plan, self.metrics, whole=self)

    @property
    def data_license(self) -> str | None:
        """Licence of the data that it was trained with, as its card names it; None where unknown.

        Raises:
            BundleError: the card changed since the bundle was read.
        """
        content = read_verified(self.path / MODEL_CARD, self.manifest.files[MODEL_CARD])
        return data_license_in(content.decode("utf-8", "replace"))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """`("all",)` or `("fold_0", ...)`."""
        return self.manifest.weight_names if self.whole is None else self.manifest.low_weight_names

    def weights(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays of the weights called `name`, by parameter name, in their stored dtype.

        Raises:
            BundleError: no such weights, or the file changed since the bundle was read.
        """
        if name not in self.weight_names:
            raise BundleError(f"{self.path}: has no weights '{name}'. It has {', '.join(self.weight_names)}.")
        relative = weights_path(name) if self.whole is None else f"{LOW}{weights_path(name)}"
        content = read_verified(self.path / relative, self.manifest.files[relative])
        try:
            arrays: dict[str, np.ndarray[Any, Any]] = safetensors_numpy.load(content)
        except (SafetensorError, TypeError, ValueError, KeyError) as error:
            raise _unreadable(self.path / relative, error) from None
        return arrays


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read the bundle at `path`, a folder or a package (`bundle.package`), after verifying every byte of it.

    Raises:
        BundleError: not a bundle, newer than this version, a file missing, too many, changed or unreadable, or a link.
        ResourceError: the temporary folder has no room for what a package holds.
    """
    path = Path(path)
    return _read_package(path) if path.is_file() else _read_folder(path)


def _read_folder(folder: Path) -> Bundle:
    if not folder.exists() and previous_folder(folder).is_dir():
        raise BundleError(
            f"{folder}: does not exist; a run that was replacing it was stopped. The former bundle is intact: "
            f"rename {previous_folder(folder).name} to {folder.name}, or train again."
        )
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    for name in manifest.weight_names:
        _check_weights(folder / weights_path(name))
    for name in manifest.low_weight_names:
        _check_weights(folder / LOW / weights_path(name))
    plan = _read_plan(folder, manifest)
    return Bundle(folder, manifest, plan, _read_metrics(folder, manifest), _read_low_plan(folder, manifest, plan))


def _read_package(file: Path) -> Bundle:
    folder: Path | None = None
    try:
        folder = unpacked.new_folder()
        extract_archive(file, folder)
        bundle = _read_folder(folder)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ResourceError(
                f"{file}: can't be unpacked in {tempfile.gettempdir()} ({error.strerror}). Free space there, or unpack "
                "it elsewhere with 'sagittal package FILE --unpack FOLDER' and use the folder."
            ) from None
        if isinstance(error, BundleError):
            # The user gave the package and knows nothing of the folder.
            raise BundleError(error.message.replace(str(folder), str(file)), code=error.code) from None
        raise
    weakref.finalize(bundle, unpacked.hold(folder).remove)
    return bundle


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


def _read_low_plan(folder: Path, manifest: Manifest, plan: Plan) -> Plan | None:
    if not manifest.low_weight_names:
        return None
    low = _read_plan(folder, manifest, LOW + PLAN)
    if low.dataset != plan.dataset:
        raise BundleError(
            f"{folder}: its two models are for different channels or labels. Get the bundle from its maker again.",
            code="models_differ",
        )
    return low


def _read_plan(folder: Path, manifest: Manifest, name: str = PLAN) -> Plan:
    content = read_verified(folder / name, manifest.files[name])
    try:
        return Plan.from_json(content, source=str(folder / name))
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
