"""`sagittal dicom`: a label map, of whatever origin, as DICOM objects of the series it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from sagittal.plan.dataset import DatasetSpec
    from sagittal.volumes import Volume
    from sagittal.volumes.dicom_objects import Origin


def dicom(
    labels: Path,
    series: Path,
    /,
    *,
    out: Path,
    names: Annotated[Path | None, Parameter(name="--labels")] = None,
    kinds: Annotated[str, Parameter(name="--as")] = "seg",
    series_uid: str | None = None,
    nearest: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write a label map as DICOM: segmentation, contours, picture, volumes; each refers to the images of the series.

    Args:
        labels: the label map (.nii.gz, .nrrd, ...), on the grid of the series
        series: the DICOM series: folder, zip archive, DICOMDIR or file of many frames; STUDY#UID names one of several
        out: folder to write to; files are called like the label map
        names: what the values mean: a dataset.json or a bundle; by itself the dataset.json beside the label map
        kinds: what to write, with commas: seg, labelmap, rtstruct, overview, sr
        series_uid: which series to take where there are several
        nearest: take the nearest label where the label map lies on another grid than the series
    """
    from sagittal.errors import DataError
    from sagittal.inference.dicom_outputs import (
        OVERVIEW,
        dicom_paths,
        parse_kinds,
        require_writable_kinds,
        write_dicom_outputs,
    )
    from sagittal.inference.outputs import volumes_ml
    from sagittal.plan.base import require_writable
    from sagittal.volumes import Volume, read_labels, read_volume
    from sagittal.volumes.dicom_source import planes_of, read_source
    from sagittal.volumes.io import scan_files, scan_name

    wanted = parse_kinds(kinds, "--as")
    spec, origin = declared(names or labels.parent / "dataset.json")
    require_writable_kinds(wanted, spec, "--as")
    source = read_source(series, series_uid)
    array, geometry = read_labels(labels)
    read = Volume.on(geometry, array)
    if source.is_even:
        # On the series' own grid from here on, so that picture and volumes tell of what the objects hold.
        read = Volume.on(source.geometry, planes_of(read, source, labels.name, nearest=nearest))
    _require_declared(read, spec, labels)
    require_writable(out)
    places = dicom_paths(out, scan_name(labels))
    paths = {kind: places[kind] for kind in wanted}
    own = {path.resolve() for path in scan_files(series)}
    for path in paths.values():
        if path.resolve() in own:
            raise DataError(
                f"{path}: is a file of the study already. Expected a new one. Choose another folder.", code="overwrites"
            )
    scan = read_volume(series, series_uid=series_uid) if OVERVIEW in wanted and source.is_even else None
    written = write_dicom_outputs(paths, read, spec, source, scan, volumes_ml(read, spec), origin, nearest=nearest)
    for path in written:
        print(path)
    return 0


def declared(path: Path) -> tuple[DatasetSpec, Origin]:
    """Return what the values of a label map mean, and which model made it where a bundle says so."""
    from sagittal.bundle import is_package, read_bundle
    from sagittal.data.dataset import parse_spec
    from sagittal.errors import DataError
    from sagittal.volumes.dicom_objects import Origin

    if is_package(path) or (path.is_dir() and (path / "manifest.json").exists()):
        bundle = read_bundle(path)
        spec = bundle.plan.dataset
        return spec, Origin(spec.name, bundle.manifest.manifest_sha256[:16])
    if path.is_dir():
        path = path / "dataset.json"
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}). Expected what the values of the label map mean. Give a "
            "dataset.json or a bundle: --labels.",
            code="unreadable",
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Expected a dataset.json.", code="dataset_json") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: no object. Expected a dataset.json with labels.", code="dataset_json")
    # What the labels mean is all that counts here.
    known = {"channel_names": {"0": "image"}, "file_ending": ".nii.gz"}
    content = {**known, **{key: value for key, value in content.items() if key != "modality"}}
    return parse_spec(content, str(path), default_name=path.resolve().parent.name), Origin()


def _require_declared(labels: Volume, spec: DatasetSpec, path: Path) -> None:
    """Refuse a label map that holds values of which nothing is said: they would be left out without a word."""
    import numpy as np

    from sagittal.errors import DataError

    originals = dict(spec.label_map)
    known = {0, spec.ignore_value, *(originals.get(value, value) for value in spec.foreground_values)}
    known |= set(spec.regions_class_order or ())
    found = {int(value) for plane in labels.array[0] for value in np.unique(plane)}
    if found - known:
        shown = ", ".join(str(value) for value in sorted(found - known)[:10])
        raise DataError(
            f"{path}: holds {shown}, which no label has ({', '.join(label.name for label in spec.labels[:10])}). "
            "Give the dataset.json or bundle that it was made with: --labels.",
            code="unknown_values",
        )
