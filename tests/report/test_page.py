from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sagittal.errors import ResourceError
from sagittal.evaluation import (
    AGGREGATION_RULES,
    CaseScore,
    ClassSet,
    Evaluation,
    EvaluationSettings,
    Failure,
    evaluate_case,
    metrics_of,
)
from sagittal.report import page as page_module
from sagittal.report.page import Page, highlights, render_report, summary_sentence, write_report
from sagittal.report.pictures import CaseView, view_case

CLASSES = ClassSet.of_mapping({"left & right": 1, "<b>tail</b>": 2})
HOSTILE = "<script>alert('x')</script>\"&"
SHAPE = (6, 9, 12)
VOID = {"meta", "img", "br", "hr", "link", "input", "image", "rect", "line", "circle", "path", "polyline", "polygon"}


def maps(shift: int) -> tuple[np.ndarray, np.ndarray]:
    reference = np.zeros(SHAPE, np.uint8)
    reference[1:4, 2:5, 3:9] = 1
    reference[1:4, 5:8, 3:9] = 2
    return reference, np.roll(reference, shift, axis=2)


def evaluation_of(shifts: dict[str, int]) -> tuple[Evaluation, dict[str, CaseView]]:
    scores: list[CaseScore] = []
    views = {}
    image = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    for case, shift in shifts.items():
        reference, prediction = maps(shift)
        scores.append(evaluate_case(reference, prediction, (3.0, 1.0, 1.0), CLASSES, case=case))
        views[case] = view_case(case, reference, prediction, (3.0, 1.0, 1.0), CLASSES, image=image)
    failures = [Failure(case=f"bad {HOSTILE}", code="grid", message=f"why {HOSTILE}")]
    return Evaluation.of_cases(CLASSES, scores, failures=failures, warnings=[f"careful {HOSTILE}"]), views


CURVE = (
    {"kind": "step", "step": 1, "loss": 1.0, "learning_rate": 0.1, "seconds": 1.0},
    {"kind": "validation", "step": 1, "dice": {HOSTILE: 0.5, "b": 0.4}, "mean_dice": 0.45},
)
FULL_PAGE = Page(
    title=f"Title {HOSTILE}",
    lead=f"Lead {HOSTILE}",
    floor=0.4321,
    floor_note=f"floor {HOSTILE}",
    notes=(f"Note {HOSTILE}",),
    facts={f"Section {HOSTILE}": {f"key {HOSTILE}": f"value {HOSTILE}", "steps": 600}},
    curve=CURVE,
)


@pytest.fixture(scope="module")
def html() -> str:
    evaluation, pictures = evaluation_of({HOSTILE: 3, "case_b": 0, "case_c": 1, "case_d": 2})
    return render_report(evaluation, page=FULL_PAGE, pictures=pictures)


class Elements(HTMLParser):
    """Every element with its attributes and those around it; complains about tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.hidden: list[bool] = []
        self._open: list[tuple[str, bool]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        hidden = any(state for _, state in self._open) or attributes.get("aria-hidden") == "true"
        self.found.append((tag, attributes, tuple(name for name, _ in self._open)))
        self.hidden.append(hidden)
        if tag not in VOID or (tag in {"path", "circle"} and not self.get_starttag_text().endswith("/>")):  # type: ignore[union-attr]
            self._open.append((tag, hidden))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        hidden = any(state for _, state in self._open)
        self.found.append((tag, dict(attrs), tuple(name for name, _ in self._open)))
        self.hidden.append(hidden)

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open.pop()[0] == tag


def test_page_is_one_file_that_asks_for_nothing(html: str) -> None:
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html)
    elements = Elements(html)
    assert not {tag for tag, _, _ in elements.found} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes, _ in elements.found:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:image/jpeg;base64,") or name not in attributes, (
                tag
            )
        assert not [name for name in attributes if name.startswith("on")]
    policy = [attributes["content"] for tag, attributes, _ in elements.found if attributes.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_hostile_names_stay_text(html: str) -> None:
    assert "<script" not in html
    assert "<b>tail" not in html
    assert html.count("&lt;script&gt;") >= 10


def test_every_picture_and_plot_has_a_text(html: str) -> None:
    elements = Elements(html)
    pictures = 0
    for (tag, attributes, around), hidden in zip(elements.found, elements.hidden, strict=True):
        if tag == "svg" and not hidden and "svg" not in around:
            pictures += 1
            assert attributes.get("role") == "img"
            assert attributes.get("aria-label")
    assert pictures == 1 + 3 * 3 + 3  # the gauge, three planes of three cases, three panels of the curve


def test_page_tells_numbers_rules_settings_and_failures(html: str) -> None:
    evaluation, _ = evaluation_of({HOSTILE: 3, "case_b": 0, "case_c": 1, "case_d": 2})
    text = re.sub(r"\s+", " ", html)
    for expected in (
        f"{evaluation.mean_dice:.3f}",
        "floor 0.432",
        "steps</dt><dd>600",
        "case_d",
        "why &lt;script",
        "careful &lt;script",
        "Note &lt;script",
        "numpy",
    ):
        assert expected in text, expected
    for metric in metrics_of(EvaluationSettings()).values():
        for rule in (
            metric.definition,
            metric.empty_reference,
            metric.empty_prediction,
            metric.both_empty,
            metric.source,
        ):
            assert rule.replace("'", "&#39;") in text
    for _, rule in AGGREGATION_RULES:
        assert rule in text


def test_table_has_every_case_and_class_lowest_first(html: str) -> None:
    body = html[html.index('id="cases"') :]
    rows = re.findall(r'<th class="name" scope="row">(?:<span class="sr">)?([^<]*)', body)
    assert rows[0].startswith("&lt;script&gt;")
    assert rows[2::2] == ["case_d", "case_c", "case_b"]
    assert rows[::2] == rows[1::2]
    assert len(rows) == 8


def test_long_tables_end_with_a_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_ROWS", 3)
    evaluation, _ = evaluation_of({"a": 0, "b": 1})
    html = render_report(evaluation)
    assert "1 more rows are in metrics.csv" in html
    assert html.count('<th class="name" scope="row">') == 3


def test_minimal_page_has_no_empty_sections() -> None:
    html = render_report(Evaluation.of_cases(CLASSES, []))
    Elements(html)
    for section in ("classes", "pictures", "training", "cases"):
        assert f'id="{section}"' not in html
    assert 'id="definitions"' in html
    assert "floor" not in html[html.index("<body>") :]


def test_highlights_are_worst_median_and_best() -> None:
    for count, roles in {
        0: {},
        1: {"The case": "a"},
        2: {"Worst case": "b", "Best case": "a"},
        3: {"Worst case": "c", "Median case": "b", "Best case": "a"},
        5: {"Worst case": "e", "Median case": "c", "Best case": "a"},
    }.items():
        evaluation, _ = evaluation_of({name: shift for shift, name in enumerate("abcde"[:count])})
        assert {item.role: item.score.case for item in highlights(evaluation)} == roles


def test_sentence_for_a_reader_in_a_hurry() -> None:
    evaluation, _ = evaluation_of({"a": 0})
    assert summary_sentence(evaluation, Page(floor=0.6, floor_note="the mean label map")) == (
        "1 case scored in 2 classes. The mean Dice is 0.400 above the floor of 0.600 (the mean label map). No "
        "structure was missed and there are no false alarms."
    )
    reference, prediction = maps(0)
    missed = evaluate_case(reference, np.where(prediction == 2, 0, prediction), (3.0, 1.0, 1.0), CLASSES, case="a")
    told = summary_sentence(Evaluation.of_cases(CLASSES, [missed]), Page(floor=0.6))
    assert "0.100 below the floor" in told
    assert "Strongest class: left & right (1.000). Weakest: <b>tail</b> (0.000)." in told
    assert "1 structure missed, 0 false alarms" in told
    assert "no mean Dice" in summary_sentence(Evaluation.of_cases(CLASSES, []), Page())


def test_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    evaluation, pictures = evaluation_of({"a": 0})
    path = write_report(tmp_path / "new" / "report.html", evaluation, pictures=pictures)
    assert path.read_text() == render_report(evaluation, pictures=pictures)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError):
        write_report(tmp_path / "file" / "report.html", evaluation)


def test_same_evaluation_gives_the_same_page() -> None:
    evaluation, pictures = evaluation_of({"a": 0, "b": 1})
    assert render_report(evaluation, pictures=pictures) == render_report(evaluation, pictures=dict(pictures))
