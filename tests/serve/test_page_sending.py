"""What the page sends: a series for each channel, and one job however often the same is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import TINY, scan_bytes
from test_page_browser import open_page, text, visible
from test_service_for_real import Running

from browser import Browser
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.volumes import Volume

from dicom_scans import write_series  # isort: skip - beside the tests of the readers

pytestmark = pytest.mark.slow
TWO = "two-channels"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    other = write_untrained_bundle(folder / TWO, "mednext-s", 3, channels=2, settings=TINY)
    where = ["--folder", str(folder / "serve"), "--port", "0", "--device", "cpu"]
    running = Running([str(tiny_bundle), str(other), *where], folder / "log.txt")
    yield running
    running.process.kill()
    running.process.wait()
    running.http.close()
    running._file.close()


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scan")
    scan_bytes(folder=folder)
    return folder / "made.nii.gz"


def _in_study(data: Any, index: int) -> None:
    data.StudyInstanceUID = data.FrameOfReferenceUID = "1.2.3"


def test_every_channel_gets_a_series_of_its_own(browser: Browser, service: Running, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in (1, 2, 3):
        part = Volume(rng.integers(0, 900, (1, 6, 12, 10)).astype(np.int16), np.diag([1.0, 1, 1, 1]))
        write_series(tmp_path / f"s{number}", part, series_uid=f"1.2.3.{number}", change=_in_study)
    chosen = "[...document.querySelectorAll('#series-list input:checked')].map(e => e.name + '=' + e.value)"

    def use(model: str) -> None:
        browser.value(
            f"(e => {{ e.value = '{model}'; e.dispatchEvent(new Event('change', {{bubbles: true}})) }})"
            "(document.getElementById('model'))"
        )

    def choose(channel: int, series: int) -> None:
        browser.value(f"document.querySelector('[name=series-{channel}][value$=\".{series}\"]').click()")

    def begin() -> str:
        browser.value("document.getElementById('start').click()")
        browser.until(f"{visible('problem')} || location.hash.startsWith('#job=')")
        return text(browser, "problem")

    open_page(browser, service)
    browser.choose("#files", *sorted(tmp_path.glob("s*/*")))
    browser.until("!document.getElementById('start').disabled")
    browser.value("document.getElementById('start').click()")
    browser.until("document.querySelectorAll('#series-list input').length === 3")
    assert browser.value(chosen) == ["series-0=1.2.3.1"]
    use(TWO)
    assert browser.value("document.querySelectorAll('#series-list input').length") == 6
    assert browser.value(chosen) == []
    assert begin() == "Choose a series for channel_0."
    choose(0, 2)
    choose(1, 2)
    assert begin() == "One series stands for two channels. Choose another for each."
    choose(1, 3)
    assert begin() == ""
    job = service.job(browser.value("location.hash.slice(5)"))
    assert (job["model"], job["options"]["series_uid"]) == (TWO, "1.2.3.2,1.2.3.3")


_DEAF = """
(() => {
  const send = XMLHttpRequest.prototype.send;
  window.sent = [];
  XMLHttpRequest.prototype.send = function (form) {
    const asked = new XMLHttpRequest();
    asked.open('POST', 'api/v1/jobs');
    asked.setRequestHeader('Idempotency-Key', this.mark);
    asked.onload = () => { sent.push(JSON.parse(asked.responseText).id); this.dispatchEvent(new Event('error')); };
    send.call(asked, form);
  };
  const set = XMLHttpRequest.prototype.setRequestHeader;
  XMLHttpRequest.prototype.setRequestHeader = function (name, value) {
    if (name === 'Idempotency-Key') this.mark = value;
    set.call(this, name, value);
  };
})()
"""
"""Has the service take each form, and the page hear of a broken connection."""


def test_what_is_sent_again_after_a_broken_connection_makes_one_job(
    browser: Browser, service: Running, scan: Path
) -> None:
    open_page(browser, service)
    browser.value(_DEAF)

    def begin() -> list[str]:
        count = browser.value("sent.length")
        browser.until("!document.getElementById('start').disabled")
        browser.value("document.getElementById('start').click()")
        browser.until(f"sent.length > {count} && {visible('problem')} && !document.getElementById('start').disabled")
        assert "it makes one job only" in text(browser, "problem")
        return list(browser.value("sent"))

    browser.choose("#files", scan)
    begin()
    first, again = begin()
    assert first == again
    browser.value("document.getElementById('mirror').click()")
    *_, other = begin()
    assert other != first
    browser.choose("#files", scan)
    *_, anew = begin()
    assert anew not in (first, other)
