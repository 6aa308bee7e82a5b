"""Sagittal: labelled 3D medical scans in, a deployable segmentation model out.

The names below are the public surface. They load when first used: `import sagittal` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagittal.bundle import Bundle, read_bundle
    from sagittal.data.dataset import Dataset, read_dataset
    from sagittal.data.doctor import Diagnosis, diagnose
    from sagittal.data.fingerprint import extract_fingerprint
    from sagittal.errors import BundleError, DataError, PlanError, ResourceError, SagittalError, TrainingError
    from sagittal.evaluation import Evaluation
    from sagittal.inference.ensemble import load
    from sagittal.inference.predictor import Predictor
    from sagittal.plan import Plan
    from sagittal.planning import make_plan
    from sagittal.report.evaluation import evaluate
    from sagittal.training.run import TrainResult, train
    from sagittal.training.stages import RunOptions
    from sagittal.volumes import Volume, read_labels, read_volume

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "sagittal.bundle",
    "BundleError": "sagittal.errors",
    "DataError": "sagittal.errors",
    "Dataset": "sagittal.data.dataset",
    "Diagnosis": "sagittal.data.doctor",
    "Evaluation": "sagittal.evaluation",
    "Plan": "sagittal.plan",
    "PlanError": "sagittal.errors",
    "Predictor": "sagittal.inference.predictor",
    "ResourceError": "sagittal.errors",
    "RunOptions": "sagittal.training.stages",
    "SagittalError": "sagittal.errors",
    "TrainResult": "sagittal.training.run",
    "TrainingError": "sagittal.errors",
    "Volume": "sagittal.volumes",
    "diagnose": "sagittal.data.doctor",
    "evaluate": "sagittal.report.evaluation",
    "extract_fingerprint": "sagittal.data.fingerprint",
    "load": "sagittal.inference.ensemble",
    "make_plan": "sagittal.planning",
    "read_bundle": "sagittal.bundle",
    "read_dataset": "sagittal.data.dataset",
    "read_labels": "sagittal.volumes",
    "read_volume": "sagittal.volumes",
    "train": "sagittal.training.run",
}

__all__ = [
    "Bundle",
    "BundleError",
    "DataError",
    "Dataset",
    "Diagnosis",
    "Evaluation",
    "Plan",
    "PlanError",
    "Predictor",
    "ResourceError",
    "RunOptions",
    "SagittalError",
    "TrainResult",
    "TrainingError",
    "Volume",
    "__version__",
    "diagnose",
    "evaluate",
    "extract_fingerprint",
    "load",
    "make_plan",
    "read_bundle",
    "read_dataset",
    "read_labels",
    "read_volume",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its room."""
    if name in _HOMES:
        try:
            value = getattr(import_module(_HOMES[name]), name)
        except ImportError as error:
            from sagittal.errors import lacking_package

            if (lacking := lacking_package(error, f"sagittal.{name}")) is None:
                raise
            raise lacking from None
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sagittal' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
