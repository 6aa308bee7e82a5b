"""Fingerprints and declarations to plan from."""

from __future__ import annotations

from sagittal.plan import ChannelIntensities, DatasetSpec, Fingerprint, Label
from sagittal.plan.base import Triple, TripleMm

INTENSITIES = ChannelIntensities(
    mean=100.0, median=98.0, std=20.0, min=-50.0, max=300.0, percentile_00_5=-20.0, percentile_99_5=250.0
)


def spec_of(*names: str, channels: tuple[str, ...] = ("MR",)) -> DatasetSpec:
    """A data set of classes with these names."""
    labels = tuple(Label(name=name, values=(value,)) for value, name in enumerate(names, start=1))
    return DatasetSpec(name="small", channel_names=channels, labels=labels, file_ending=".nii.gz")


def fingerprint_of(
    *shapes: Triple,
    spacings: tuple[TripleMm, ...] | None = None,
    channels: int = 1,
    crop_share: float = 1.0,
) -> Fingerprint:
    """A fingerprint of cases with these shapes and spacings, 1 mm unless they are given."""
    return Fingerprint(
        content_sha256="0" * 64,
        shapes_vox=shapes,
        spacings_mm=spacings or ((1.0, 1.0, 1.0),) * len(shapes),
        intensities=(INTENSITIES,) * channels,
        median_relative_size_after_crop=crop_share,
    )
