"""Which series of a DICOM study is each channel of a model, where nobody has named one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sagittal.errors import DataError
from sagittal.inference.run_report import Flag
from sagittal.volumes.dicom_catalogue import SeriesInfo, choose_series, list_series
from sagittal.volumes.dicom_files import split_series, with_series
from sagittal.volumes.dicom_parts import split_part
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
        DataError: several series fit a channel equally well, none does, or one series would be two channels.
    """
    chosen: list[Path] = []
    flags: list[Flag] = []
    taken: dict[tuple[Path, str], str] = {}
    for image, name in zip(images, channel_names, strict=True):
        if not is_dicom(image):
            chosen.append(image)
            continue
        path, info, more = _chosen(image, name)
        if info is not None:
            study, _ = split_series(image)
            key = (study.resolve(), info.series_uid)
            if key in taken:
                raise _twice(study, info, taken[key], name)
            taken[key] = name
        chosen.append(path)
        flags.extend(more)
    return tuple(chosen), tuple(flags)


def modality_of(channel_name: str) -> str | None:
    """Return the DICOM modality that a channel's name stands for, None where it stands for none."""
    word = channel_name.lower()
    return next((modality for modality, names in _MODALITIES.items() if word in names), None)


def _chosen(image: Path, channel: str) -> tuple[Path, SeriesInfo | None, list[Flag]]:
    """Return the path of a channel's series, what is known of it (None: reading it says what is wrong), and flags."""
    study, named = split_series(image)
    found = list_series(study)
    if named is not None:
        info = _named(found, named)
        return image, info, [] if info is None else _lossy(info)
    scans = [info for info in found if info.usable]
    if not scans:
        return image, None, []
    try:
        info = choose_series(found, modality_of(channel), channel)
    except DataError as error:
        raise DataError(f"{study}: {error.message}", code=error.code) from None
    if len(found) == 1:
        return image, info, _lossy(info)
    message = f"{study.name}: {_in_words(info)} was taken for {channel}, of {len(scans)} in it"
    flags = [Flag(code="series", message=message)] if len(scans) > 1 else []
    return with_series(study, info.series_uid), info, [*flags, *_lossy(info)]


def _named(found: Sequence[SeriesInfo], named: str) -> SeriesInfo | None:
    """Return the series that a path names by UID or number, `@2` for the second volume in it."""
    asked, part = split_part(named)
    for info in found:
        uid, number = split_part(info.series_uid)
        if asked in (uid, str(info.series_number)) and part in (None, number, 1 if number is None else number):
            return info
    return None


def _in_words(info: SeriesInfo) -> str:
    number = "" if info.series_number is None else f" {info.series_number}"
    return f"series{number} ({info.modality}, {' x '.join(map(str, info.shape or ()))})"


def _twice(study: Path, info: SeriesInfo, first: str, second: str) -> DataError:
    return DataError(
        f"{study}: {_in_words(info)} would be both {first} and {second}. Expected a series of its own for each "
        "channel. Add the one that is missing, or name one per channel, in the model's order: --series.",
        code="channel_count",
    )


def _lossy(info: SeriesInfo) -> list[Flag]:
    if not info.lossy:
        return []
    message = f"the voxels were compressed with loss ({info.transfer_syntax}): fine detail may be gone"
    return [Flag(code="lossy", message=message)]
