"""`sagittal convert`: a scan in another format, DICOM series included."""

from __future__ import annotations

from pathlib import Path


def convert(scan: Path, out: Path, /, *, resample_slices: bool = False, series_uid: str | None = None) -> int:
    """Write a scan in the format that the suffix of OUT names; its grid is kept, and its numbers.

    Whole numbers without a scale keep their type, all others become float32.

    Args:
        scan: an image file, or the folder or zip archive of a DICOM series
        out: file to write, for example scan.nii.gz
        resample_slices: bring DICOM slices with a gap, mixed spacings or a gantry tilt onto a regular grid
        series_uid: which DICOM series to take where there are several
    """
    from sagittal.errors import DataError
    from sagittal.volumes import Volume
    from sagittal.volumes.io import read_stored

    if out.exists() and scan.exists() and out.samefile(scan):
        raise DataError(f"{out}: is the scan itself. Expected another file. Choose another name.", code="overwrites")
    stored = read_stored(scan, resample_slices=resample_slices, series_uid=series_uid)
    keeps_type = stored.voxels.dtype.kind in "iu" and not stored.is_scaled
    volume = Volume.on(stored.geometry, stored.voxels if keeps_type else stored.image())
    print(f"{volume.write(out)}: {volume}")
    return 0
