"""What was measured of a data set: shapes, spacings and intensities, enough to plan from without its scans."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from sagittal.plan.base import Frozen, Triple, TripleMm
from sagittal.plan.volume_range import VolumeRange


class ChannelIntensities(Frozen):
    """Intensities of one channel inside the foreground, pooled over all cases (nnU-Net's sampling rule)."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


class Fingerprint(Frozen):
    """Measured properties of a data set's training cases, along D, H, W of `orientation`; it names no case."""

    schema_version: Literal[1] = 1
    orientation: Literal["RAS", "stored"] = "RAS"
    """Axis order of shapes and spacings: towards superior, anterior, right, or as the files store them."""
    content_sha256: str
    """Hash over dataset.json's meaning and every file's content: a changed data set has another."""
    shapes_vox: tuple[Triple, ...]
    """Shape of each case after the crop to its non-zero box."""
    spacings_mm: tuple[TripleMm, ...]
    intensities: tuple[ChannelIntensities, ...]
    """One entry per channel."""
    median_relative_size_after_crop: float
    """Median over cases of (voxels after the crop) / (voxels before)."""

    class_volumes_ml: tuple[float | None, ...] = ()
    """Of each foreground value, ascending: its median volume over the cases that have it; None where none has."""
    label_volumes: tuple[VolumeRange, ...] = ()
    """Of each label, class or region, in the order of the declaration: how large it is."""

    later_fields: ClassVar[tuple[str, ...]] = ("orientation", "class_volumes_ml", "label_volumes")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.shapes_vox or len(self.shapes_vox) != len(self.spacings_mm):
            raise ValueError("one shape and one spacing per case are needed, of at least one case")
        return self

    @property
    def num_cases(self) -> int:
        """Number of training cases."""
        return len(self.shapes_vox)
