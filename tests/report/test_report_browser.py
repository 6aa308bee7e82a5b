"""The report in a real browser: narrow and wide, light and dark, by keyboard, in print and without its script."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from browser import Browser
from sagittal.evaluation import CaseScore, ClassSet, Evaluation, Failure, evaluate_case
from sagittal.report.page import Page, highlights, write_report
from sagittal.report.pictures import view_case

CLASSES = ClassSet.of_mapping({"liver": 1, "a class with quite a long name that has to be broken": 2})
SPACING = (3.0, 1.0, 1.0)
CASES = 12


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = np.random.default_rng(0).random((8, 20, 24)).astype(np.float32)
    scores: list[CaseScore] = []
    pairs = {}
    for number in range(CASES):
        reference = np.zeros(image.shape, np.uint8)
        reference[2:6, 3:9, 4:14], reference[2:6, 11:17, 4:14] = 1, 2
        prediction = np.roll(reference, number % 5, axis=2)
        if number == 3:
            prediction[prediction == 2] = 0
        case = f"case_{number}_of_a_hospital_with_a_long_name"
        pairs[case] = reference, prediction
        scores.append(evaluate_case(reference, prediction, SPACING, CLASSES, case=case))
    failure = Failure(case="broken", code="grid_mismatch", message="two grids " + "of_quite_different_spacing" * 6)
    evaluation = Evaluation.of_cases(CLASSES, scores, failures=[failure], warnings=["A warning."])
    shown = {item.score.case for item in highlights(evaluation)}
    views = {case: view_case(case, *pairs[case], SPACING, CLASSES, image=image) for case in shown}
    page = Page(title="A report", floor=0.4, facts={"Compared": {"Predictions": "a" * 90}})
    return write_report(tmp_path_factory.mktemp("report") / "report.html", evaluation, page=page, pictures=views)


def column(browser: Browser, number: int) -> list[str]:
    """The texts of a column of the table of cases, visible rows only."""
    cells = f"#case-table tbody tr:not([hidden]) > :nth-child({number})"
    found: list[str] = browser.value(f"[...document.querySelectorAll('{cells}')].map(cell => cell.textContent.trim())")
    return found


def enter(browser: Browser, element: str, value: str, event: str) -> None:
    """Give an element a value, as a person would."""
    found = f"document.getElementById('{element}')"
    browser.value(f"{found}.value = '{value}'; {found}.dispatchEvent(new Event('{event}'))")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_nothing_complains_or_leaves(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width=width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    for part in ("details", "#all-metrics"):
        browser.value(f"document.querySelectorAll('{part}').forEach(e => {{ e.open = true; e.checked = true; }})")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [report.as_uri()]
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in ground[4:-1].split(",")) < 150) == dark
    assert not browser.value("[...document.images].some(image => !image.complete)")


def test_nothing_that_is_text_is_cut_off_on_a_phone(browser: Browser, report: Path) -> None:
    browser.open(report, width=390)
    outside = browser.value(
        "[...document.querySelectorAll('h1,h2,h3,p,li,dd,dt,summary,label,figcaption,.strip-head')].filter(e => {"
        "const box = e.getBoundingClientRect(); return box.width && (box.right > 391 || box.left < -1)"
        " && !e.closest('.scroll'); }).map(e => e.textContent.slice(0, 60))"
    )
    assert outside == []


def test_table_sorts_by_keyboard_and_tells_so(browser: Browser, report: Path) -> None:
    browser.open(report, width=1280)
    before = column(browser, 3)
    head = "document.querySelectorAll('#case-table thead th')[2]"
    browser.value(f"{head}.querySelector('button').focus()")
    browser.press("Enter")
    assert browser.value(f"{head}.getAttribute('aria-sort')") == "ascending"
    rising = [float(text) for text in column(browser, 3)]
    assert rising == sorted(rising)
    assert sorted(column(browser, 3)) == sorted(before)
    browser.press(" ")
    assert browser.value(f"{head}.getAttribute('aria-sort')") == "descending"
    assert [float(text) for text in column(browser, 3)] == rising[::-1]
    browser.press("Tab")
    assert browser.value("document.activeElement.closest('th').cellIndex") == 3
    browser.press("Enter")
    assert browser.value(f"{head}.getAttribute('aria-sort')") is None
    browser.value("document.querySelector('#case-table thead button').click()")
    names = [int(name.split("_")[1]) for name in column(browser, 1)]
    assert names == sorted(names)
    assert browser.complaints == []


def test_undefined_values_are_last_whichever_way_the_table_is_sorted(browser: Browser, report: Path) -> None:
    browser.open(report, width=1280)
    browser.value("document.querySelector('#case-table tbody tr').cells[2].textContent = '–'")
    for _ in range(2):
        browser.value("document.querySelectorAll('#case-table thead button')[2].click()")
        assert column(browser, 3)[-1] == "–"


def test_filters_leave_the_rows_of_a_class_or_a_case(browser: Browser, report: Path) -> None:
    browser.open(report, width=1280)
    enter(browser, "class-choice", "liver", "change")
    assert set(column(browser, 2)) == {"liver"}
    assert browser.value("document.getElementById('case-told').textContent") == f"{CASES} rows"
    enter(browser, "case-search", "CASE_11", "input")
    assert [name[:8] for name in column(browser, 1)] == ["case_11_"]
    assert browser.value("document.getElementById('case-told').textContent") == "1 row"


def test_columns_beyond_the_main_ones_wait_for_a_click(browser: Browser, report: Path) -> None:
    browser.open(report, width=1280)
    shown = "[...document.querySelectorAll('#case-table thead th')].filter(e => e.offsetWidth).length"
    assert browser.value(shown) == 2 + 4
    browser.value("document.getElementById('all-metrics').click()")
    assert browser.value(shown) == 2 + 2 + 9


def test_links_lead_to_rows_and_definitions(browser: Browser, report: Path) -> None:
    browser.open(report, width=1280)
    broken = browser.value(
        "[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))"
        ".filter(href => href[0] !== '#' || !document.getElementById(href.slice(1)))"
    )
    assert broken == []


def test_whole_table_is_there_without_script(browser: Browser, report: Path) -> None:
    browser.open(report, width=390, script=False)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert len(column(browser, 1)) == 2 * CASES
    assert browser.value("document.querySelectorAll('#case-table button').length") == 0
    assert not browser.value("document.getElementById('case-tools').offsetWidth")


def test_many_rows_come_in_portions_and_a_link_leads_to_any_of_them(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    html = report.read_text(encoding="utf-8")
    body = html[html.index("<tbody>", html.index('id="case-table"')) + 7 :].partition("</tbody>")[0]
    copies = [body] + [body.replace('id="case-', f'id="more-{number}-') for number in range(10)]
    page = tmp_path / "many.html"
    page.write_text(html.replace(body, "".join(copies)), encoding="utf-8")
    browser.open(page, width=1280)
    assert len(column(browser, 1)) == 200
    assert browser.value("document.getElementById('case-told').textContent") == f"200 of {22 * CASES} rows"
    browser.value("location.hash = '#more-9-12'")
    browser.until("document.querySelector(':target')?.offsetHeight > 0")
    assert len(column(browser, 1)) == 22 * CASES
    enter(browser, "case-search", "case_1", "input")
    assert browser.value("document.getElementById('case-more').offsetHeight") == 0
    enter(browser, "case-search", "", "input")
    browser.value("document.getElementById('case-more').click()")
    assert len(column(browser, 1)) == 22 * CASES
    assert browser.complaints == []


def test_page_can_be_printed(browser: Browser, report: Path) -> None:
    browser.open(report, width=1280)
    assert browser.print().startswith(b"%PDF")
    assert browser.complaints == []
