"""The page in a real browser, with a real service that computes: what a radiologist does, step by step."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from phantom import write_phantom
from PIL import Image
from serving import until
from test_service_for_real import Running, write_endless

from browser import Browser
from sagittal.report.colours import class_colour
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.volume import read_labels

from dicom_scans import write_series  # isort: skip - beside the tests of the readers

pytestmark = pytest.mark.slow
READY = "import('./static/page.js').then(page => page.viewer.isReady && document.getElementById('loading').hidden)"
VIEWER = "(await import('./static/page.js')).viewer"


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom"), scale=0.4, is_doll=True).image


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Callable[..., Running]]:
    opened: list[Running] = []

    def begin(*more: str) -> Running:
        folder = tmp_path_factory.mktemp("service")
        arguments = [str(tiny_bundle), "--folder", str(folder / "serve"), "--port", "0", "--device", "cpu", *more]
        opened.append(Running(arguments, folder / "log.txt"))
        return opened[-1]

    yield begin
    for running in opened:
        running.process.kill()
        running.process.wait()
        running.http.close()
        running._file.close()


@pytest.fixture(scope="module")
def service(start: Callable[..., Running]) -> Running:
    return start()


def address(service: Running) -> str:
    return f"{service.http.base_url}"


def visible(element: str) -> str:
    return f"document.getElementById('{element}')?.checkVisibility()"


def text(browser: Browser, element: str) -> str:
    return str(browser.value(f"document.getElementById('{element}').textContent"))


def asynchronously(browser: Browser, body: str) -> Any:
    return browser.value(f"(async () => {{ {body} }})()")


def open_page(browser: Browser, service: Running, **how: Any) -> None:
    # A page of the same address would only change its hash, and what another test kept must be gone.
    browser.open("about:blank", width=1280)
    browser.open(f"{address(service)}/", **{"width": 1280, **how})
    browser.until(visible("upload"))


def segment(browser: Browser, scan: Path) -> str:
    """Send a scan through the form, wait until its result is seen, and return the job's id."""
    browser.choose("#files", scan)
    browser.until("!document.getElementById('start').disabled")
    browser.value("document.getElementById('start').click()")
    browser.until(visible("result"))
    browser.until(READY)
    return str(browser.value("location.hash.slice(5)"))


def require_quiet(browser: Browser, service: Running) -> None:
    """Hold the page to no complaint, and to no request that leaves the service."""
    assert browser.complaints == []
    foreign = [
        asked for asked in browser.requests if not asked.startswith((address(service), "data:", "blob:", "about:"))
    ]
    assert foreign == []


def pixel(browser: Browser, voxel: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Return the colour (3) on the screen of the voxel (d, h, w) in the axial plane, two pixels beside the cross.

    What is drawn comes to the screen some time later, so it is asked for until it is as it should be.
    """
    x, y, z = (float(value) for value in (affine @ [*voxel, 1])[:3])
    place = asynchronously(
        browser,
        f"const viewer = {VIEWER}; viewer.setView('axial'); viewer.goToMm([{x}, {y}, {z}]);"
        "await new Promise(requestAnimationFrame); const {main} = viewer;"
        "const at = main.frac2canvasPos(main.scene.crosshairPos); const box = main.canvas.getBoundingClientRect();"
        "return [box.left + at[0] / main.uiData.dpr, box.top + at[1] / main.uiData.dpr]",
    )
    with Image.open(io.BytesIO(browser.picture())) as picture:
        shown = np.asarray(picture.convert("RGB")).astype(int)
    return shown[round(place[1]) + 2, round(place[0]) + 2]


def test_a_scan_is_sent_computed_and_seen_where_its_labels_are(
    browser: Browser, service: Running, scan: Path, tmp_path: Path
) -> None:
    open_page(browser, service)
    assert browser.value("document.querySelector('header .use').checkVisibility()")
    job = segment(browser, scan)
    found = service.job(job)
    assert found["state"] == "done"
    (tmp_path / "labels.nii.gz").write_bytes(service.http.get(found["results"][0]["href"]).content)
    labels, geometry = read_labels(tmp_path / "labels.nii.gz")
    # Where a cube of one label is, so that neither outline nor neighbour is meant.
    value, voxel = next(
        (int(labels[d, h, w]), (d, h, w))
        for d, h, w in np.argwhere(labels[2:-2, 4:-4, 4:-4] > 0) + np.array((2, 4, 4))
        if np.unique(labels[d, h - 3 : h + 4, w - 3 : w + 4]).size == 1
    )
    asynchronously(browser, f"{VIEWER}.setOpacity(1)")
    expected = [int(class_colour(value - 1)[at : at + 2], 16) for at in (1, 3, 5)]
    until(lambda: np.abs(pixel(browser, voxel, geometry.affine) - expected).max() <= 12 or None)
    asynchronously(browser, f"const v = {VIEWER}; v.showLabels(v.shown[0].labels.map(l => l.name), false)")
    # In vain where a hidden label is still seen.
    until(lambda: np.ptp(pixel(browser, voxel, geometry.affine)) <= 3 or None)
    assert [
        text.strip()
        for text in browser.value("[...document.querySelectorAll('#labels tbody .number')].map(c => c.textContent)")
    ]
    require_quiet(browser, service)


def test_a_reload_in_the_middle_keeps_the_job_and_a_download_works(
    browser: Browser, service: Running, scan: Path, tmp_path: Path
) -> None:
    open_page(browser, service)
    browser.choose("#files", scan)
    browser.until("!document.getElementById('start').disabled")
    browser.value("document.getElementById('start').click()")
    browser.until("location.hash.startsWith('#job=')")
    job = browser.value("location.hash.slice(5)")
    browser.reload()
    browser.until(visible("result"))
    assert browser.value("location.hash.slice(5)") == job
    browser.until(READY)
    browser.until(f"document.querySelector('#history a[href=\"#job={job}\"]')?.getAttribute('aria-current') === 'page'")
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.value("document.querySelector('#downloads a').click()")
    until(lambda: (tmp_path / "labels.nii.gz").exists() or None)
    result = service.job(job)["results"][0]
    assert (tmp_path / "labels.nii.gz").read_bytes() == service.http.get(result["href"]).content
    require_quiet(browser, service)


def test_a_folder_of_two_series_is_packed_and_one_of_them_chosen(
    browser: Browser, service: Running, scan: Path, tmp_path: Path
) -> None:
    volume = read_volume(scan)
    for number in (1, 2):
        part = Volume(volume.array[:, : 6 + number].astype(np.int16), volume.affine)
        write_series(tmp_path / f"s{number}", part, series_uid=f"1.2.3.{number}", modality="CT", change=_in_study)
    (tmp_path / "s1" / "DICOMDIR").write_bytes(b"refers to names that are not sent")
    open_page(browser, service)
    browser.choose("#files", *sorted(tmp_path.glob("s*/*")))
    browser.until("!document.getElementById('start').disabled")
    assert "15 DICOM files" in text(browser, "chosen")
    browser.value("document.getElementById('start').click()")
    browser.until("document.querySelectorAll('#series-list input').length")
    names = browser.value("[...document.querySelectorAll('#series-list label')].map(e => e.textContent)")
    assert len(names) == 2 and all("CT" in name for name in names)
    browser.value("[...document.querySelectorAll('#series-list input')].find(e => e.value.endsWith('.2')).click()")
    browser.value("document.getElementById('start').click()")
    browser.until(f"{visible('result')} || {visible('problem')} || {visible('job-error')}")
    browser.until(READY)
    job = service.job(browser.value("location.hash.slice(5)"))
    assert job["options"]["series_uid"] == "1.2.3.2"
    formats = browser.value("[...document.querySelectorAll('#downloads a')].map(e => e.textContent)")
    assert {"DICOM segmentation", "DICOM RTSTRUCT"} <= set(formats), job["flags"]
    require_quiet(browser, service)


def _in_study(data: Any, index: int) -> None:
    data.StudyInstanceUID = data.FrameOfReferenceUID = "1.2.3"


def test_a_failure_is_told_in_the_words_of_the_service(browser: Browser, service: Running, tmp_path: Path) -> None:
    (tmp_path / "broken.nii").write_bytes(b"no image at all" * 100)
    open_page(browser, service)
    browser.choose("#files", tmp_path / "broken.nii")
    browser.until("!document.getElementById('start').disabled")
    browser.value("document.getElementById('start').click()")
    browser.until(f"{visible('problem')} || {visible('job-error')}")
    said = text(browser, "problem") or text(browser, "job-error")
    refused = service.http.post("/api/v1/jobs", files={"image": b"no image at all" * 100})
    assert said == refused.json()["error"]["message"]
    assert browser.value("!document.getElementById('start').disabled")


def test_keyboard_alone_leads_through_everything(browser: Browser, service: Running, scan: Path) -> None:
    open_page(browser, service)
    browser.value("document.body.focus()")
    reached = []
    for _ in range(14):
        browser.press("Tab")
        reached.append(browser.value("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert browser.value(
            "(e => { const at = e.classList.contains('unseen') ? e.nextElementSibling : e;"
            " return getComputedStyle(at).outlineStyle !== 'none' || e === document.body })(document.activeElement)"
        ), reached
    assert [name for name in ("open-help", "new-scan", "files", "folder", "fast") if name not in reached] == [], reached
    browser.choose("#files", scan)
    browser.until("!document.getElementById('start').disabled")
    browser.value("document.getElementById('model').focus()")
    for _ in range(9):
        if browser.value("document.activeElement.id") == "start":
            break
        browser.press("Tab")
    browser.press("Enter")
    browser.until(visible("result"))
    browser.until(READY)
    browser.value("document.querySelector('.pane canvas').focus()")
    position = f"(async () => [...{VIEWER}.main.frac2vox({VIEWER}.main.scene.crosshairPos)])()"
    asynchronously(browser, f"{VIEWER}.setView('multi')")
    before = browser.value(position)
    browser.press("ArrowUp")
    assert browser.value(position) == [before[0], before[1], before[2] + 1]
    browser.press("PageDown")
    assert browser.value(position)[2] == max(0, before[2] - 9)
    browser.press("End")
    assert browser.value(position)[2] == browser.value(f"(async () => {VIEWER}.main.volumes[0].dimsRAS[3] - 1)()")
    browser.press("3")
    assert browser.value("document.querySelector('#views [aria-pressed=true]').textContent") == "Coronal"
    browser.press("l")
    browser.until("document.getElementById('announcer').textContent === 'Labels off'")
    browser.press("o")
    assert browser.value("document.getElementById('drawn').value") == "outlines"
    window = browser.value("document.getElementById('preset').value")
    browser.press("w")
    assert browser.value("document.getElementById('preset').value") != window
    browser.press("?")
    assert browser.value("document.getElementById('help').open")
    browser.press("Escape")
    assert not browser.value("document.getElementById('help').open")
    require_quiet(browser, service)


def test_a_scan_that_is_dropped_is_taken_and_sent(
    browser: Browser, service: Running, scan: Path, tmp_path: Path
) -> None:
    open_page(browser, service)
    content = base64.b64encode(scan.read_bytes()).decode()
    over, dropped = asynchronously(
        browser,
        f"const bytes = Uint8Array.from(atob('{content}'), c => c.charCodeAt());"
        "const dataTransfer = new DataTransfer(); dataTransfer.items.add(new File([bytes], 'dropped.nii.gz'));"
        "const event = kind => new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true});"
        "const place = document.getElementById('drop'); const over = event('dragover'), drop = event('drop');"
        "place.dispatchEvent(over); const marked = document.body.classList.contains('dragging');"
        "place.dispatchEvent(drop); return [marked && over.defaultPrevented, drop.defaultPrevented]",
    )
    assert over and dropped, "the browser would have opened the file instead"
    browser.until("!document.getElementById('start').disabled")
    assert not browser.value("document.body.classList.contains('dragging')")
    assert "dropped.nii.gz" in text(browser, "chosen")
    browser.value("document.getElementById('start').click()")
    browser.until("location.hash.startsWith('#job=')")
    job = service.ended(browser.value("location.hash.slice(5)"))
    assert job["state"] == "done", job
    (tmp_path / "image.nii.gz").write_bytes(service.http.get(job["results"][1]["href"]).content)
    assert np.array_equal(read_volume(tmp_path / "image.nii.gz").array, read_volume(scan).array)
    require_quiet(browser, service)


def test_a_folder_of_folders_is_dropped_from_the_desktop(browser: Browser, service: Running, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 900, (1, 60, 6, 7)).astype(np.int16)
    for number, part in enumerate(np.split(image, 2, axis=1)):
        folder = tmp_path / "study" / "deep" / str(number)
        write_series(folder, Volume(part, np.diag([1.0, 1, 1, 1])), series_uid=f"1.2.3.{number}", change=_in_study)
    (tmp_path / "study" / "readme.txt").write_text("no scan")
    open_page(browser, service)
    browser.drop("#drop", tmp_path / "study")
    browser.until("!document.getElementById('start').disabled")
    assert text(browser, "chosen").startswith("Chosen: 60 DICOM files")
    assert not browser.value("document.body.classList.contains('dragging')")
    browser.drop("#drop", tmp_path / "study" / "readme.txt", next((tmp_path / "study").glob("deep/0/*")))
    browser.until("document.getElementById('chosen').textContent.includes('1 DICOM file ')")
    require_quiet(browser, service)


def test_a_finger_goes_through_slices_and_moves_the_picture(browser: Browser, service: Running, scan: Path) -> None:
    done = service.http.get("/api/v1/jobs?state=done").json()["jobs"]
    job = done[0]["id"] if done else service.ended(service.send(scan.read_bytes()))["id"]
    browser.open(f"{address(service)}/#job={job}", width=820, height=1180, touch=True)
    browser.until(visible("result"))
    browser.until(READY)
    slices = f"(async () => {VIEWER}.slice())()"
    # The picture in space is slow to draw without a graphics card.
    asynchronously(browser, f"{VIEWER}.main.opts.multiplanarShowRender = 0; {VIEWER}.setView('multi')")
    window = browser.value("[document.getElementById('level').value, document.getElementById('width').value]")
    left, top, wide, high = asynchronously(
        browser,
        f"const {{main}} = {VIEWER}; const box = main.canvas.getBoundingClientRect(); const {{dpr}} = main.uiData;"
        "const [x, y, w, h] = main.screenSlices.find(tile => tile.axCorSag === 1).leftTopWidthHeight;"
        "return [box.left + x / dpr, box.top + y / dpr, w / dpr, h / dpr]",
    )
    seen = []
    for share in (0.8, 0.5, 0.2):
        browser.touch([(left + wide / 3, top + share * high)], [(left + wide / 3, top + share * high + 2)])
        asynchronously(browser, f"{VIEWER}.plane = 'axial'")
        seen.append(browser.value(slices)["index"])
    # Sooner after each other than a double tap, which means nothing here.
    assert seen[0] < seen[1] < seen[2], "a finger on the coronal picture chooses the axial slice"
    browser.touch([(left + wide / 3, top + high / 2)], [(left + wide / 3, top + high / 2 + 1)])
    assert browser.value(slices)["plane"] == "coronal" and text(browser, "slice-plane") == "Coronal"
    browser.value("document.querySelector('[data-view=axial]').click()")
    before, (x, y) = browser.value(slices), browser.middle("#slice")
    browser.touch([(x, y)], [(x + 60, y)], [(x + 400, y)])
    assert browser.value(slices)["index"] == before["count"] - 1 != before["index"]
    assert text(browser, "slice-value") == f"{before['count']} of {before['count']}"
    x, y = browser.middle(".pane canvas")
    shown = f"(async () => [...{VIEWER}.main.frac2mm({VIEWER}.main.canvasPos2frac([{{}}, {{}}]))])()"
    box = browser.value("(b => [b.left, b.top])(document.querySelector('.pane canvas').getBoundingClientRect())")
    under = [browser.value(shown.format(x + more - box[0], y - box[1])) for more in (0, 40)]
    browser.touch([(x, y)], [(x, y), (x + 80, y)], [(x - 80, y + 50), (x + 160, y + 50)])
    at = [browser.value(shown.format(x + more - box[0], y + 50 - box[1])) for more in (40, 100)]
    assert at[0] == pytest.approx(under[1], abs=0.5), "what was between the fingers is between them"
    assert at[1][0] - at[0][0] == pytest.approx((under[1][0] - under[0][0]) / 2, abs=0.5), "three times as large"
    assert browser.value("[document.getElementById('level').value, document.getElementById('width').value]") == window
    assert browser.value("[scrollX, scrollY, document.documentElement.scrollWidth, visualViewport.scale]") == [
        0,
        0,
        820,
        1,
    ]
    small = "e => e.checkVisibility() && Math.min(e.offsetWidth, e.offsetHeight) < 40"
    assert (
        browser.value(f"[...document.querySelectorAll('#toolbar button, #toolbar select, #slice')].filter({small})")
        == []
    )
    require_quiet(browser, service)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_and_every_control_has_a_name(
    browser: Browser, service: Running, scan: Path, width: int, dark: bool
) -> None:
    done = service.http.get("/api/v1/jobs?state=done").json()["jobs"]
    job = done[0]["id"] if done else service.ended(service.send(scan.read_bytes()))["id"]
    for place in ("", f"#job={job}"):
        browser.open("about:blank", width=width)
        browser.open(f"{address(service)}/{place}", width=width, dark=dark)
        browser.until("!document.getElementById('jobs').hidden")
        if place:
            browser.until(visible("result"))
            browser.until(READY)
        assert browser.value("document.documentElement.scrollWidth") <= width
        nameless = browser.value(
            "[...document.querySelectorAll('input,select,button,canvas:not([aria-hidden])')].filter(e => "
            "!(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map(e => e.outerHTML)"
        )
        assert nameless == []
        ground = browser.value("getComputedStyle(document.body.parentElement).backgroundColor")
        assert (sum(int(part) for part in ground[4:-1].split(",")) < 150) == dark
        require_quiet(browser, service)


def test_a_job_in_progress_is_cancelled(browser: Browser, service: Running, tmp_path: Path) -> None:
    large = write_endless(tmp_path)
    open_page(browser, service)
    browser.choose("#files", large)
    browser.until("!document.getElementById('start').disabled")
    browser.value("document.getElementById('start').click()")
    browser.until("document.getElementById('job-words').textContent.includes('computing')")
    job = browser.value("location.hash.slice(5)")
    assert service.job(job)["state"] == "running" and browser.value(visible("cancel"))
    browser.value("document.getElementById('cancel').click()")
    browser.until("document.getElementById('job-words').textContent === 'tiny: cancelled'")
    assert not browser.value(visible("cancel")) and not browser.value(visible("job-progress"))
    assert not browser.value(visible("problem")) and not browser.value(visible("job-error"))
    assert browser.value(visible("job"))
    browser.until(
        "document.querySelector('#history [aria-current=page] .cancelled')?.textContent.includes('cancelled')"
    )
    told = service.job(job)
    assert (told["state"], told["results"], told["error"]) == ("cancelled", [], None)
    require_quiet(browser, service)


def test_a_key_is_asked_for_kept_in_the_tab_and_sent_with_everything(
    browser: Browser, start: Callable[..., Running], scan: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("radiology: a-key-of-some-length-1\n")
    service = start("--api-key-file", str(tmp_path / "keys"))
    browser.open("about:blank", width=1280)
    browser.open(f"{address(service)}/", width=1280)
    browser.until(visible("key-form"))
    for key, ended in (("wrong-wrong-wrong-1", visible("problem")), ("a-key-of-some-length-1", visible("upload"))):
        browser.value(
            f"document.getElementById('key').value = '{key}'; document.querySelector('#key-form button').click()"
        )
        browser.until(ended)
    segment(browser, scan)
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.value("document.querySelector('#downloads a').click()")
    until(lambda: (tmp_path / "labels.nii.gz").exists() or None)
    assert service.http.get("/api/v1/jobs").status_code == 401
    with httpx.Client() as another:
        page = another.get(f"{address(service)}/")
    assert "a-key-of" not in page.text and not browser.value("localStorage.length")
