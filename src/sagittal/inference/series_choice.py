"""Which series of a DICOM study is each channel of a model, where nobody has named one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sagittal.errors import DataError
from sagittal.inference.run_report import Flag
from sagittal.volumes.dicom_catalogue import SeriesInfo, choose_series, list_series
from sagittal.volumes.dicom_files import split_series, with_series
from sagittal.volumes.dicom_parts import PART_MARK
from sagittal.volumes.io import is_dicom

_MODALITIES = {
    "CT": ("ct", "cbct", "cta", "hu"),
    "MR": ("mr", "mri", "t1", "t1c", "t1ce", "t1gd", "t1w", "t1n", "t2", "t2w", "t2f", "flair", "dwi", "adc", "pd"),
    "PT": ("pet", "pt", "suv"),
}


def series_of(images: Sequence[Path], channel_names: Sequence[str]) -> tuple[tuple[Path, ...], tuple[Flag, ...]]:
    """Return a path that names one series for each image that is a study of several, and what to know of the choice.

    Args:
        images: the channels' scans; those that are no DICOM, or name their series, come back as they are.
        channel_names: the model's, in the same order.

    Raises:
        DataError: several series fit a channel equally well, or none does.
    """
    chosen: list[Path] = []
    flags: list[Flag] = []
    for image, name in zip(images, channel_names, strict=True):
        if not is_dicom(image):
            chosen.append(image)
            continue
        path, more = _chosen(image, name)
        chosen.append(path)
        flags.extend(more)
    return tuple(chosen), tuple(flags)


def modality_of(channel_name: str) -> str | None:
    """Return the DICOM modality that a channel's name stands for, None where it stands for none."""
    word = channel_name.lower()
    return next((modality for modality, names in _MODALITIES.items() if word in names), None)


def _chosen(image: Path, channel: str) -> tuple[Path, list[Flag]]:
    study, named = split_series(image)
    found = list_series(study)
    if named is not None:
        uid = named.partition(PART_MARK)[0]
        fitting = [info for info in found if named == info.series_uid or uid == str(info.series_number)]
        return image, [flag for info in fitting[:1] for flag in _lossy(info)]
    scans = [info for info in found if info.usable]
    if not scans:
        return image, []  # reading it says what is wrong
    try:
        info = choose_series(found, modality_of(channel), channel)
    except DataError as error:
        raise DataError(f"{study}: {error.message}", code=error.code) from None
    if len(found) == 1:
        return image, _lossy(info)
    number = "" if info.series_number is None else f" {info.series_number}"
    size = " x ".join(map(str, info.shape or ()))
    message = f"{study.name}: series{number} ({info.modality}, {size}) was taken for {channel}, of {len(scans)} in it"
    flags = [Flag(code="series", message=message)] if len(scans) > 1 else []
    return with_series(study, info.series_uid), [*flags, *_lossy(info)]


def _lossy(info: SeriesInfo) -> list[Flag]:
    if not info.lossy:
        return []
    message = f"the voxels were compressed with loss ({info.transfer_syntax}): fine detail may be gone"
    return [Flag(code="lossy", message=message)]
