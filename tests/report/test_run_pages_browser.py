"""The pages of real runs of `evaluate`, `compare` and `qc` in a browser: widths, light and dark, toggles, print."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from browser import Browser
from sagittal.cli import run
from sagittal.volumes import Volume, read_labels

CASES = 5
METHODS = ("nnU-Net ResEnc L, five folds", "MedNeXt_L_k5_without_any_pretraining", "SegFormer3D")
PAGES = ("evaluate", "compare", "qc")
PRINTED_PX = (718, 1045)
"""Width and height of A4 within the margins that Chromium prints with."""


@pytest.fixture(scope="module")
def pages(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by verb: predictions are the references moved, with a class missing in one case."""
    folder = tmp_path_factory.mktemp("runs")
    source, references = shared_data / "hippocampus", folder / "set"
    for part in ("labelsTr", "imagesTr"):
        (references / part).mkdir(parents=True)
    shutil.copy(source / "dataset.json", references)
    for number, path in enumerate(sorted((source / "labelsTr").iterdir())[:CASES]):
        shutil.copy(path, references / "labelsTr")
        scan = path.name.replace(".nii.gz", "_0000.nii.gz")
        shutil.copy(source / "imagesTr" / scan, references / "imagesTr")
        labels, grid = read_labels(path)
        for shift, name in enumerate(METHODS):
            moved = np.roll(labels, shift + number % 2, axis=shift)
            if number == 1 and name == METHODS[-1]:
                moved[moved == 2] = 0
            (folder / name).mkdir(exist_ok=True)
            Volume.on(grid, moved.astype(np.uint8)).write(folder / name / path.name)
    last, methods = str(folder / METHODS[-1]), [str(folder / name) for name in METHODS]
    assert run(["evaluate", last, str(references), "--out", str(folder / "evaluate")]) == 0
    assert run(["compare", *methods, "--reference", str(references), "--out", str(folder / "compare")]) == 0
    scans = str(references / "imagesTr")
    assert run(["qc", last, "--images", scans, "--out", str(folder / "qc")]) == 0
    names = ("evaluate/report.html", "compare/comparison.html", "qc/qc.html")
    return {verb: folder / name for verb, name in zip(PAGES, names, strict=True)}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("verb", PAGES)
def test_a_page_fits_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], verb: str, width: int, dark: bool
) -> None:
    browser.open(pages[verb], width=width, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [pages[verb].as_uri()]
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in ground[4:-1].split(",")) < 150) == dark
    outside = browser.value(
        "[...document.querySelectorAll('h1,h2,h3,p,li,dd,dt,summary,label,figcaption,.strip-head,.sides,.feet span')]"
        f".filter(e => {{ const box = e.getBoundingClientRect(); return box.width && (box.right > {width + 1} ||"
        " box.left < -1) && !e.closest('.scroll'); }).map(e => e.textContent.slice(0, 60))"
    )
    assert outside == []


def test_tables_of_a_comparison_need_no_scrolling_on_a_screen(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["compare"], width=1280)
    browser.value("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.value("document.querySelectorAll('.scroll').length") > 10
    assert browser.value(wide) == 0


def test_other_metrics_of_a_comparison_unfold(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["compare"], width=1280)
    shown = "[...document.querySelectorAll('table')].filter(e => e.checkVisibility()).length"
    before = browser.value(shown)
    browser.value("document.querySelector('details > summary').focus()")
    browser.press("Enter")
    assert browser.value(shown) == before + 8
    # Which metric a plot is of can be read where it stands.
    browser.value("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    headings = browser.value("[...document.querySelectorAll('#differences h3.metric')].map(e => e.textContent)")
    assert len(headings) == 8 and "HD95 (mm)" in headings


def test_the_list_of_a_quality_check_sorts_and_tells_so(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["qc"], width=1280)
    cells = "[...document.querySelectorAll('table.list tbody tr')].map(row => row.cells[{}].dataset.value)"
    assert browser.value("document.querySelectorAll('table.list button').length") == 4
    for column, name in ((3, "volume"), (1, "suspicion")):
        head = f"document.querySelectorAll('table.list thead th')[{column}]"
        for expected in ("descending", "ascending"):
            browser.value(f"{head}.querySelector('button').focus()")
            browser.press("Enter")
            told = browser.value(f"{head}.getAttribute('aria-sort')")
            found = [float(value) for value in browser.value(cells.format(column))]
            assert told == expected, name
            assert found == sorted(found, reverse=told == "descending"), name
    browser.value("document.querySelectorAll('table.list button')[0].click()")
    names = browser.value(cells.format(0))
    assert names == sorted(names) and len(names) == CASES
    assert browser.complaints == []


@pytest.mark.parametrize("verb", ["evaluate", "qc"])
def test_in_print_a_case_stays_with_its_heading(browser: Browser, pages: dict[str, Path], verb: str) -> None:
    width, height = PRINTED_PX
    browser.open(pages[verb], width=width)
    browser.call("Emulation.setEmulatedMedia", media="print")
    tall = browser.value("Math.max(...[...document.querySelectorAll('.case')].map(part => part.offsetHeight))")
    assert 200 < tall < height
    rules = "[...document.querySelectorAll('.case')].map(part => getComputedStyle(part).breakInside)"
    assert set(browser.value(rules)) == {"avoid"}
    # A rule that chains a case to the next one would have to be broken somewhere, and would be between the pictures.
    last = "[...document.querySelectorAll('.case')].map(part => getComputedStyle(part.lastElementChild).breakAfter)"
    assert set(browser.value(last)) == {"auto"}
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_pictures_show_millimetres_in_equal_lengths(browser: Browser, pages: dict[str, Path]) -> None:
    for verb in ("evaluate", "qc"):
        for width in (390, 1280):
            browser.open(pages[verb], width=width)
            off = browser.value(
                "[...document.querySelectorAll('.plane svg')].map(e => { const box = e.getBoundingClientRect(),"
                " view = e.viewBox.baseVal; return box.width / box.height / (view.width / view.height); })"
            )
            assert len(off) >= 15 and np.allclose(off, 1.0, atol=0.02)
