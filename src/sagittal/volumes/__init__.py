"""A 3D image in the world, numpy only: reading, writing, axis order, crop, resampling weights."""

from sagittal.volumes.io import read_header
from sagittal.volumes.volume import Volume, read_channels, read_labels, read_scans, read_volume

__all__ = ["Volume", "read_channels", "read_header", "read_labels", "read_scans", "read_volume"]
