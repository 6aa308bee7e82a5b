"""`sagittal view`: what is shown of local files, to whom, and how it looks in a browser."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from phantom import NAMES, Body, write_phantom
from PIL import Image
from serving import PATIENCE_S, until

from browser import Browser
from sagittal.cli import run
from sagittal.cli.dicom import declared
from sagittal.errors import DataError
from sagittal.report.colours import class_colour
from sagittal.serve.viewing import Viewing, prepare, shown_labels, volumes_of
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.volume import read_labels

from dicom_scans import write_series  # isort: skip - beside the tests of the readers


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Body:
    folder = tmp_path_factory.mktemp("body")
    labels = {"background": 0, **{name: value for value, name in enumerate(NAMES, 1)}}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return write_phantom(folder, scale=0.5)


@pytest.fixture(scope="module")
def server(body: Body, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    spec, _ = declared(body.image.parent / "dataset.json")
    folder = tmp_path_factory.mktemp("shown")
    server = Viewing(prepare(body.image, [body.labels, body.other], spec, folder, compare=True))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def status(url: str, host: str | None = None) -> int:
    request = urllib.request.Request(url, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_only_who_has_the_token_and_names_this_machine_sees_anything(server: Viewing) -> None:
    assert status(server.url) == status(f"{server.url}files.json") == status(f"{server.url}data/image.nii") == 200
    assert status(server.url.replace(server.token, "guessed")) == 404
    assert status(f"http://127.0.0.1:{server.server_port}/") == 404
    assert status(server.url, host="evil.example") == 403
    for path in ("data/../dataset.json", "data/%2e%2e/dataset.json", "static/../viewing.py", "data/nothing"):
        assert status(server.url + path) == 404


def test_what_is_shown_is_what_the_readers_read(server: Viewing, body: Body) -> None:
    listing = server.showing.listing
    shown, read = read_volume(server.showing.folder / "image.nii"), read_volume(body.image)
    assert np.array_equal(shown.array, read.array) and np.allclose(shown.affine, read.affine, atol=1e-4)
    labels, geometry = read_labels(body.labels)
    voxel_ml = float(np.prod(geometry.spacing_mm)) / 1000
    (first, second) = listing["sets"]
    assert first["volumes_ml"] == {
        name: pytest.approx(int((labels == value).sum()) * voxel_ml, abs=1e-3) for value, name in enumerate(NAMES, 1)
    }
    assert listing["is_ct"] and listing["compare"] and second["name"] == body.other.name


def test_dicom_and_undeclared_values_are_shown_and_an_image_instead_of_labels_is_refused(
    body: Body, tmp_path: Path
) -> None:
    scan = read_volume(body.image)
    series = write_series(tmp_path / "series", scan.with_array(scan.array.astype(np.int16)), modality="CT")
    (tmp_path / "out").mkdir()
    listing = prepare(series, [body.labels], None, tmp_path / "out").listing
    assert [label["name"] for label in listing["sets"][0]["labels"]] == [f"label {value}" for value in range(1, 5)]
    with pytest.raises(DataError, match="image instead of the labels"):
        prepare(body.image, [body.image], None, tmp_path / "out")
    oblique = Volume(np.full((1, 2, 3, 4), 300, np.uint16), np.diag([2.0, 3, 5, 1]))
    shown = shown_labels(oblique.array[0], None, Path("x"))
    assert volumes_of(oblique.array[0], oblique.geometry, shown) == {"label 300": pytest.approx(24 * 30 / 1000)}


def _is_outlined(picture: bytes, place: list[int]) -> bool:
    """Whether within a place of a picture the first class has an outline and no more."""
    shown = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB").crop(place)).astype(int)
    blue = [int(class_colour(0)[at : at + 2], 16) for at in (1, 3, 5)]
    rows, columns = np.nonzero(np.abs(shown - blue).max(axis=-1) < 25)
    # Hundreds of points around a middle that is none of it.
    if len(rows) <= 200:
        return False
    middle = round(float(rows.mean())), round(float(columns.mean()))
    around = shown[middle[0] - 12 : middle[0] + 12, middle[1] - 12 : middle[1] + 12]
    # Grey but for the cross, whose lines pass there.
    return bool((np.ptp(around, axis=-1) < 12).mean() > 0.75)


@pytest.mark.slow
def test_two_label_sets_are_outlined_and_stand_side_by_side(browser: Browser, server: Viewing, body: Body) -> None:
    browser.open(server.url, width=1280)
    browser.until("import('./static/page.js').then(p => p.viewer.isReady && document.getElementById('loading').hidden)")
    browser.until("document.getElementById('labels').tBodies[0].rows.length === 4")
    assert browser.value("document.getElementById('compare-words').textContent") == (
        f"Solid: {body.labels.name}. Dashed: {body.other.name}."
    )
    viewer = "(await import('./static/page.js')).viewer"
    browser.value(f"(async () => {{ const v = {viewer}; v.setView('axial'); v.zoom(0); }})()")
    browser.value("[...document.querySelectorAll('#labels button')].find(e => e.textContent === 'liver').click()")
    place = browser.value(
        f"(async () => {{ const v = {viewer}; const b = v.main.canvas.getBoundingClientRect();"
        "return [b.left, b.top, b.right, b.bottom].map(Math.round) })()"
    )
    # Looked for until it is there: what is drawn comes to the screen some time later.
    until(lambda: _is_outlined(browser.picture(), place) or None)
    browser.value(
        "{ const how = document.getElementById('how'); how.value = 'side'; how.dispatchEvent(new Event('change')); }"
    )
    browser.until("document.querySelectorAll('.pane').length === 2")
    browser.until("import('./static/page.js').then(p => p.viewer.panes[1]?.nv.volumes.length === 2)")
    moved = browser.value(
        f"(async () => {{ const v = {viewer}; v.step(2, 1);"
        "return v.panes.map(({nv}) => [...nv.frac2mm(nv.scene.crosshairPos)].slice(0, 3)) })()"
    )
    assert np.allclose(moved[0], moved[1], atol=1e-3)
    assert browser.complaints == []
    assert all(asked.startswith((server.url, "data:", "blob:")) for asked in browser.requests)


def test_the_verb_prints_its_address_serves_and_ends_with_ctrl_c(body: Body) -> None:
    command = [sys.executable, "-m", "sagittal", "view", str(body.image), str(body.labels), "--no-browser"]
    # A shell without job control lets what it starts in the background ignore Ctrl-C, and that is inherited.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeded) as process,
        ExitStack() as at_last,
    ):
        at_last.callback(process.kill)
        assert process.stderr is not None
        told = ""
        while "Ctrl-C" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", told)
        assert found
        with urllib.request.urlopen(f"{found[0]}files.json", timeout=PATIENCE_S) as answer:
            names = [label["name"] for label in json.load(answer)["sets"][0]["labels"]]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    assert names == list(NAMES)


def test_a_missing_scan_and_a_taken_port_are_told(
    body: Body, server: Viewing, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["view", "nowhere.nii.gz", "--no-browser"]) == 1
    assert run(["view", str(body.image), "--no-browser", "--port", str(server.server_port)]) == 1
    assert "Choose another" in capsys.readouterr().err
