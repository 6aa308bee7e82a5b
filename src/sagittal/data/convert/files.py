"""What the layouts share: finding files by pattern, pairing images with labels, and taking cases apart by a split."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from sagittal.data.convert.conversion import Scan
from sagittal.data.convert.source import Source
from sagittal.data.splits import Fold
from sagittal.errors import DataError


def find(source: Source, pattern: str) -> dict[str, str]:
    """Return the files whose path ends with `pattern`, by their case: the group `case`, sorted.

    The pattern begins at the start of a folder's or a file's name, so that it does not matter how deep the archive's
    own folder is.

    Raises:
        DataError: two files are of the same case.
    """
    compiled = re.compile(rf"(?:.*/)?{pattern}")
    found: dict[str, str] = {}
    for name in source.names:
        match = compiled.fullmatch(name)
        if match is not None:
            case = match["case"]
            if case in found:
                raise DataError(f"{name}: the same case as {found[case]}. Expected every case once. Leave one out.")
            found[case] = name
    return dict(sorted(found.items()))


def paired(images: Mapping[str, str], labels: Mapping[str, str], what: str) -> tuple[Scan, ...]:
    """Return the cases, each with its label map.

    Raises:
        DataError: there is none, or an image without labels or the other way round; `what` says where it should be.
    """
    if not images and not labels:
        raise DataError(f"no case found. Expected {what}. Is this the data set that was named?", code="other_layout")
    alone = sorted(set(images) ^ set(labels))
    if alone:
        missing = "label map" if alone[0] in images else "image"
        raise DataError(
            f"{alone[0]}{f' and {len(alone) - 1} more cases' if len(alone) > 1 else ''}: the {missing} is missing. "
            f"Expected {what}. Fetch the data set again, or wait until all of it is there.",
            code="incomplete",
        )
    return tuple(Scan(case, (image,), labels[case]) for case, image in images.items())


def unlabelled(images: Mapping[str, str]) -> tuple[Scan, ...]:
    """Return cases without label maps."""
    return tuple(Scan(case, (image,)) for case, image in images.items())


def take_apart(
    scans: Sequence[Scan],
    validation: Collection[str],
    testing: Collection[str],
    *,
    whose: str,
    unit: Callable[[str], str] = str,
) -> tuple[tuple[Scan, ...], tuple[Scan, ...], Fold]:
    """Return training and testing cases, and the one fold of the former, as a paper split them.

    Args:
        scans: all cases.
        validation, testing: which of them, by `unit`; the others train.
        whose: whose split it is, for messages.
        unit: from a case id to what is split, for example its patient.

    Raises:
        DataError: something of the split is missing.
    """
    there = {unit(scan.id) for scan in scans}
    missing = sorted({*validation, *testing} - there)
    if missing:
        raise DataError(
            f"{missing[0]}{f' and {len(missing) - 1} more cases' if len(missing) > 1 else ''}: not there, but in "
            f"{whose} split. Expected the whole data set. Leave --protocol out, or fetch what is missing.",
            code="incomplete",
        )
    training = tuple(scan for scan in scans if unit(scan.id) not in testing)
    rest = tuple(scan for scan in scans if unit(scan.id) in testing)
    train = tuple(scan.id for scan in training if unit(scan.id) not in validation)
    return training, rest, Fold(train, tuple(scan.id for scan in training if unit(scan.id) in validation))
