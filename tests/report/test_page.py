from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sagittal.errors import ResourceError
from sagittal.evaluation import (
    AGGREGATION_RULES,
    ALL_METRICS,
    CaseScore,
    ClassScore,
    ClassSet,
    Evaluation,
    EvaluationSettings,
    Failure,
    evaluate_case,
    metrics_of,
)
from sagittal.report import page as page_module
from sagittal.report.page import Page, environment, highlights, render_report, script_source, write_report
from sagittal.report.pictures import CaseView, view_case

CLASSES = ClassSet.of_mapping({"left & right": 1, "<b>tail</b>": 2})
HOSTILE = "<script>alert('x')</script>\"&"
SHAPE = (6, 9, 12)
WITHOUT_EXTRAS = tuple(name for name in ALL_METRICS if name != "cldice")
"""Metrics that need no package of an extra."""
VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}
VOID |= {"image", "rect", "line", "circle", "path", "polyline", "polygon"}


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
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", html)
    elements = Elements(html)
    assert not {tag for tag, _, _ in elements.found} & {"link", "iframe", "object", "embed", "base", "form"}
    ids = {attributes["id"] for _, attributes, _ in elements.found if "id" in attributes}
    for tag, attributes, _ in elements.found:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            value = attributes.get(name) or ""
            if name in attributes:
                assert value.startswith("data:image/jpeg;base64,") or (value[:1] == "#" and value[1:] in ids), (
                    tag,
                    value,
                )
        assert not [name for name in attributes if name.startswith("on")]
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= ids


def test_only_its_own_script_may_run(html: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script == script_source(environment())
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    elements = Elements(html)
    assert [tag for tag, _, _ in elements.found].count("script") == 1
    policy = [attributes["content"] for tag, attributes, _ in elements.found if attributes.get("http-equiv")]
    assert policy == [f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"]


def test_hostile_names_stay_text(html: str) -> None:
    assert html.count("<script") == 1
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
    # The gauge, outlines and error maps in three planes of three cases, volumes of two classes, three training curves.
    assert pictures == 1 + 2 * 3 * 3 + 2 + 3


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
    body = html[html.index('id="cases"') :].replace("<wbr>", "")
    rows = re.findall(r'<th class="name" scope="row">([^<]*)', body)
    assert rows[0].startswith("&lt;script&gt;")
    assert rows[2::2] == ["case_d", "case_c", "case_b"]
    assert rows[::2] == rows[1::2]
    assert len(rows) == 8


def test_long_tables_end_with_a_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_ROWS", 3)
    evaluation, _ = evaluation_of({"a": 0, "b": 1})
    html = render_report(evaluation)
    assert "Left out here: 1 further row of cases with better scores; metrics.csv has them all." in html
    assert html.count('<th class="name" scope="row">') == 3
    monkeypatch.setattr(page_module, "MAX_ROWS", 2)
    html = render_report(evaluation)
    assert "2 further rows" in html
    # A case whose row is left out is named without a link.
    assert '<a href="#case-1">b</a>' in html
    assert "<li>a<span>" in html


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


@pytest.mark.parametrize(
    "settings",
    [
        EvaluationSettings(metrics=("dice", "hd95_mm")),
        EvaluationSettings(metrics=("volume_error_ml",)),
        EvaluationSettings(metrics=("assd_mm", "nsd", "nsd_surfel"), tolerances_mm=(1.0, 2.0)),
        EvaluationSettings(metrics=WITHOUT_EXTRAS, class_tolerances_mm=(("left & right", 3.0),)),
    ],
)
def test_any_set_of_metrics_makes_a_page_with_all_their_definitions(settings: EvaluationSettings) -> None:
    scores = [evaluate_case(*maps(k), (3.0, 1.0, 1.0), CLASSES, case=str(k), settings=settings) for k in range(3)]
    html = render_report(Evaluation.of_cases(CLASSES, scores, settings=settings))
    elements = Elements(html)
    text = html.replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    for key, metric in metrics_of(settings).items():
        assert metric.definition in text, key
    heads = html[html.index('id="case-table"') :].split("</thead>")[0].count("<th ")
    assert heads == 4 + len(metrics_of(settings))
    ids = [attributes["id"] for _, attributes, _ in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_a_thousand_cases_of_ten_classes_make_a_page_that_opens() -> None:
    classes = ClassSet.of_mapping({f"class {number}": number for number in range(1, 11)})
    rng = np.random.default_rng(0)
    keys = metrics_of(EvaluationSettings())
    cases = []
    for number in range(1000):
        scores = {
            name: ClassScore(
                reference_ml=10.0, prediction_ml=float(rng.uniform(5, 15)), metrics=dict.fromkeys(keys, rng.random())
            )
            for name in classes.names
        }
        cases.append(CaseScore(case=f"case_{number}", shape=SHAPE, spacing_mm=(1.0, 1.0, 1.0), classes=scores))
    html = render_report(Evaluation.of_cases(classes, cases))
    assert len(html) < 8_000_000
    assert html.count("<") < 200_000
    # Every case is a point in every plot, though none is an element of its own.
    points = sum(path.count("M") for path in re.findall(r'class="dots[^"]*" d="([^"]*)"', html))
    assert points == 10_000 * (4 + 1)


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_can_be_read_on_every_ground_in_light_and_dark(html: str) -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1."""
    light, dark = re.findall(r":root \{([^}]*)\}", html)[:2]
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", scheme))
        pairs = [(text, ground) for text in ("ink", "soft", "faint", "accent") for ground in ("page", "card")]
        pairs += [
            ("warn", "warn-wash"),
            ("bad", "bad-wash"),
            ("ink", "warn-wash"),
            ("soft", "bad-wash"),
            ("floor", "card"),
        ]
        for text, ground in pairs:
            brightest, darkest = sorted((_luminance(colours[name]) for name in (text, ground)), reverse=True)
            assert (brightest + 0.05) / (darkest + 0.05) >= 4.5, (text, ground)


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
