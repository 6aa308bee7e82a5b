"""The models that a service has: verified once when it starts, and told of in its list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagittal.bundle import Bundle, read_bundle
from sagittal.bundle.archive import ENDING
from sagittal.errors import did_you_mean
from sagittal.plan.dataset import DatasetSpec
from sagittal.report.colours import class_colour
from sagittal.serve.refusals import RefusalError
from sagittal.serve.views import LabelView, ModelOptionsView, ModelView

INTENDED_USE = "For research use. Not a medical device."
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ServedModel:
    """A bundle and the name that requests give it.

    Attributes:
        name: unlike any other's.
        bundle: verified.
        license: of the data that it was trained with.
    """

    name: str
    bundle: Bundle
    license: str = "unknown"

    @property
    def spec(self) -> DatasetSpec:
        """Its channels and labels."""
        return self.bundle.plan.dataset

    def view(self) -> ModelView:
        """Return what the list of models says of it."""
        plan, metrics = self.bundle.plan, self.bundle.metrics
        mean = metrics.get("mean_dice")
        return ModelView(
            name=self.name,
            network=plan.network_name,
            channels=list(self.spec.channel_names),
            labels=[
                LabelView(name=name, value=value, color=class_colour(number))
                for number, (name, value) in enumerate(written_values(self.spec).items())
            ],
            license=self.license,
            mean_dice=float(mean) if isinstance(mean, int | float) else None,
            intended_use=INTENDED_USE,
            options=ModelOptionsView(fast=True, mirror=bool(plan.inference.mirror_axes)),
        )


class ServedModels(Mapping[str, ServedModel]):
    """The models by name, in the order that they were given.

    Args:
        bundles: with what messages call them; names are made of them.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self._models: dict[str, ServedModel] = {}
        for bundle in bundles:
            name = self._new_name(bundle.path.resolve().name)
            self._models[name] = _served(name, bundle)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> ServedModels:
        """Verify the bundles at `paths`, folders or packages.

        Raises:
            BundleError: one of them is damaged.
        """
        found = cls([])
        for path in paths:
            resolved = path.resolve()
            name = found._new_name(resolved.stem if resolved.suffix == ENDING else resolved.name)
            found._models[name] = _served(name, read_bundle(path))
        return found

    def __getitem__(self, name: str) -> ServedModel:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def named(self, name: str | None) -> ServedModel:
        """Return the model of a request; None is the only one.

        Raises:
            RefusalError: no such model (404), or several and none was named.
        """
        if name is None:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            raise RefusalError(
                f"no model named, and there are {len(self._models)}: {', '.join(self._models)}. Name one of them.",
                code="no_model",
                status=422,
            )
        if name not in self._models:
            raise RefusalError(
                f"no such model.{did_you_mean(name[:100], self._models)}", code="unknown_model", status=404
            )
        return self._models[name]

    def _new_name(self, wanted: str) -> str:
        base = _NOT_IN_NAMES.sub("-", wanted).strip(".-") or "model"
        name, number = base, 1
        while name in self._models:
            number += 1
            name = f"{base}-{number}"
        return name


def _served(name: str, bundle: Bundle) -> ServedModel:
    return ServedModel(name, bundle, bundle.data_license or "unknown")


def written_values(spec: DatasetSpec) -> dict[str, int]:
    """Return by name the value that each class or region has in a label map."""
    originals = dict(spec.label_map)
    values = spec.regions_class_order or tuple(label.values[0] for label in spec.labels)
    return {label.name: originals.get(value, value) for label, value in zip(spec.labels, values, strict=True)}


def summary(models: Mapping[str, ServedModel]) -> dict[str, Any]:
    """Return name -> hash of the bundle, for the log."""
    return {name: model.bundle.manifest.manifest_sha256 for name, model in models.items()}
