"""The service's page over local files: what `sagittal view` shows, and the small server that it shows it with.

The server is one of the standard library, so that pictures can be looked at where nothing of [serve] is installed. It
listens on loopback and answers only below a random token and only to its own names: no other user of the machine and no
page of another site reads a scan.
"""

from __future__ import annotations

import hmac
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import numpy as np

from sagittal.errors import DataError
from sagittal.plan.dataset import DatasetSpec
from sagittal.report.colours import class_colour
from sagittal.serve.models import written_values
from sagittal.serve.page_files import HEADERS, INDEX, page_files
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.geometry import Geometry
from sagittal.volumes.volume import read_labels

HOST = "127.0.0.1"
MOST_LABELS = 65_535
_IMAGE = "image.nii"
_CT_AIR = -500
_SMALL = np.iinfo(np.int16)


@dataclass(frozen=True)
class ShownLabel:
    """A label as the page lists it.

    Attributes:
        name: of the class or region.
        value: in the label map.
        color: `#rrggbb`.
    """

    name: str
    value: int
    color: str


@dataclass(frozen=True)
class Showing:
    """What the page shows.

    Attributes:
        listing: of the image and the label sets, as the page reads it.
        folder: holds the files that it names.
    """

    listing: Mapping[str, object]
    folder: Path


def prepare(
    image: Path,
    label_maps: Sequence[Path],
    spec: DatasetSpec | None,
    folder: Path,
    *,
    compare: bool = False,
    series_uid: str | None = None,
) -> Showing:
    """Convert an image and label maps of any readable format into a folder, for the page to read.

    Args:
        image: a scan.
        label_maps: of it, on any grid.
        spec: names of the values; None: `label 1` and so on for those that are there.
        folder: that is there and empty.
        compare: show the first two label maps upon one another from the start.
        series_uid: of a DICOM study with several series.

    Raises:
        DataError: a file can't be read, or a label map holds negative or too large values.
        ResourceError: the folder can't be written.
    """
    volume = read_volume(image, series_uid=series_uid)
    spacing = " × ".join(f"{value:.3g}" for value in volume.spacing_mm)
    listing = {
        "title": image.name,
        "words": f"{' × '.join(map(str, volume.geometry.shape))} voxels of {spacing} mm (D, H, W)",
        "image": f"data/{_IMAGE}",
        "is_ct": bool(volume.array.min() <= _CT_AIR),
        "compare": compare,
        "sets": [_set_of(path, spec, folder / f"labels-{number}.nii.gz") for number, path in enumerate(label_maps)],
    }
    _compact(volume).write(folder / _IMAGE)
    return Showing(listing, folder)


def shown_labels(labels: np.ndarray, spec: DatasetSpec | None, path: Path) -> tuple[ShownLabel, ...]:
    """Return the labels of a label map, with a colour each: those declared, then values that nothing was declared for.

    Args:
        labels: (D, H, W), whole numbers.
        spec: what was declared.
        path: for messages.

    Raises:
        DataError: negative or too large values.
    """
    # Plane by plane: sorting a whole scan's voxels takes more memory than the scan.
    found = sorted({int(value) for plane in labels for value in np.unique(plane)} - {0})
    if found and (found[0] < 0 or found[-1] > MOST_LABELS):
        raise DataError(
            f"{path}: holds values from {found[0]} to {found[-1]}. Expected labels from 0 to {MOST_LABELS}. Is this "
            "the image instead of the labels?",
            code="labels",
        )
    names = {value: name for name, value in written_values(spec).items() if value} if spec is not None else {}
    named = [*names.items(), *((value, f"label {value}") for value in found if value not in names)]
    return tuple(ShownLabel(name, value, class_colour(number)) for number, (value, name) in enumerate(named))


def volumes_of(labels: np.ndarray, geometry: Geometry, shown: Sequence[ShownLabel]) -> dict[str, float]:
    """Return mL by name of the voxels that have exactly a label's value."""
    counts = np.zeros(MOST_LABELS + 1, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=MOST_LABELS + 1)
    voxel_ml = abs(float(np.linalg.det(geometry.affine[:3, :3]))) / 1000
    return {label.name: round(int(counts[label.value]) * voxel_ml, 4) for label in shown}


class Viewing(ThreadingHTTPServer):
    """Shows files on this machine until it is closed.

    Args:
        showing: what `prepare` made.
        port: to listen on; 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, showing: Showing, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        self.showing = showing
        super().__init__((HOST, port), _Answers)

    @property
    def url(self) -> str:
        """The page's address; whoever has it sees the files."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a browser that closes a connection is no error of ours."""


class _Answers(BaseHTTPRequestHandler):
    """Answers GET below the token: the page, its files, the listing, the data."""

    server: Viewing
    server_version, sys_version = "sagittal", ""
    protocol_version = "HTTP/1.1"
    _INDEX: ClassVar[tuple[bytes, bytes]] = (b'data-mode="service"', b'data-mode="files"')

    def do_GET(self) -> None:
        port = self.server.server_port
        if self.headers.get("Host", "") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._send(b"another host", "text/plain", HTTPStatus.FORBIDDEN)
            return
        token, _, rest = urlsplit(self.path).path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._send(b"no such address", "text/plain", HTTPStatus.NOT_FOUND)
            return
        kind, _, name = rest.rpartition("/")
        if rest in ("", INDEX):
            index = page_files()[INDEX]
            self._send(index.content.replace(*self._INDEX), index.media_type)
        elif rest == "files.json":
            self._send(json.dumps(self.server.showing.listing).encode(), "application/json")
        elif kind == "static" and name in page_files():
            self._send(page_files()[name].content, page_files()[name].media_type)
        elif kind == "data" and name in {path.name for path in self.server.showing.folder.iterdir()}:
            self._send_file(self.server.showing.folder / name)
        else:
            self._send(b"no such address", "text/plain", HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *values: object) -> None:
        """Write nothing down: addresses hold the token."""

    def _send(self, content: bytes, media_type: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._head(len(content), media_type, status)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_file(self, path: Path) -> None:
        with path.open("rb") as file:
            self._head(path.stat().st_size, "application/octet-stream", HTTPStatus.OK)
            if self.command != "HEAD":
                shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _head(self, size: int, media_type: str, status: HTTPStatus) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "cache-control": "no-store"}.items():
            self.send_header(name, value)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(size))
        self.end_headers()


def _set_of(path: Path, spec: DatasetSpec | None, target: Path) -> dict[str, object]:
    labels, geometry = read_labels(path)
    shown = shown_labels(labels, spec, path)
    small = labels.astype(np.uint8 if int(labels.max(initial=0)) < 256 else np.uint16)
    Volume.on(geometry, small).write(target)
    return {
        "name": path.name,
        "href": f"data/{target.name}",
        "labels": [asdict(label) for label in shown],
        "volumes_ml": volumes_of(small, geometry, shown),
    }


def _compact(volume: Volume) -> Volume:
    """Return whole numbers as int16 where they fit, half the size for the same picture."""
    array = volume.array
    if array.min() < _SMALL.min or array.max() > _SMALL.max:
        return volume
    if any(np.any(plane != np.rint(plane)) for plane in array[0]):
        return volume
    return volume.with_array(array.astype(np.int16))
