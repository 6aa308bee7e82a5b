"""The page of a run: complete, closed in itself, and with pictures of the planes where most is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sagittal.report.curves import MAX_POINTS, progress_panels
from sagittal.report.cuts import Cut, CutCase, draw_cuts, largest_plane
from sagittal.report.training import ClassStanding, Final, TrainingPage, Warned, WorstCases, write_training_page


def series(steps: int) -> dict[str, np.ndarray]:
    step = np.arange(1, steps + 1, dtype=np.float64)
    return {
        "step": step,
        "loss": 1 / step,
        "learning_rate": 0.1 * (1 - step / steps),
        "seconds": 0.5 * step,
        "step_s": np.where(step == 1, 60.0, 0.5),
        "waited_s": np.full(steps, 0.05),
    }


def validation(step: int, one: float, two: float) -> dict[str, object]:
    return {
        "kind": "validation",
        "step": step,
        "elapsed_s": 0.5 * step,
        "mean_dice": (one + two) / 2,
        "dice": {"organ": one, "<b>lesion</b>": two},
    }


def cut_case() -> CutCase:
    rng = np.random.default_rng(0)
    shapes = {0: (22, 20), 1: (18, 20), 2: (18, 22)}
    cuts = []
    for axis, shape in shapes.items():
        reference, prediction = np.zeros((2, *shape), bool), np.zeros((2, *shape), bool)
        reference[0, 4:9, 5:12] = prediction[0, 5:10, 5:12] = reference[1, 12:15, 3:6] = True
        cuts.append(Cut(axis, 3, 20, rng.normal(size=shape).astype(np.float32), reference, prediction))
    return CutCase("case_<7>", {"organ": 0.8, "<b>lesion</b>": None}, tuple(cuts))


def page() -> TrainingPage:
    return TrainingPage(
        title="Spleen: mednext-s, fold 0",
        state="running",
        running=True,
        step=500,
        end=1000,
        elapsed="0:04:10",
        left="0:04:10",
        numbers={"seconds per step": "0.5"},
        mean_dice=0.4,
        best_dice=0.5,
        best_step=250,
        classes=[
            ClassStanding("organ", 0.8, 0.9, 250, 4),
            ClassStanding("<b>lesion</b>", 0.0, 0.1, 250, 4, alarm=True),
        ],
        series=series(500),
        validations=[validation(250, 0.9, 0.1), validation(500, 0.8, 0.0)],
        alarms=[Warned("lesion is lost", "Lower the rate.")],
        facts={"Plan": {"batch": 2}},
        worst=WorstCases(500, [cut_case()], (2.0, 1.2, 1.0)),
    )


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text = write_training_page(tmp_path / "p.html", page()).read_text()
    tags = Tags(text).found
    assert not any(tag in ("script", "link", "iframe", "img") for tag, _ in tags)
    for _, attributes in tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)
    assert "<b>lesion</b>" not in text and "&lt;b&gt;lesion" in text


def test_it_looks_again_only_while_the_run_goes_on(tmp_path: Path) -> None:
    def refreshes(shown: TrainingPage) -> bool:
        tags = Tags(write_training_page(tmp_path / "p.html", shown).read_text()).found
        return any(attributes.get("http-equiv") == "refresh" for tag, attributes in tags if tag == "meta")

    assert refreshes(page())
    assert not refreshes(replace(page(), running=False, state="finished"))


def test_a_run_that_was_evaluated_shows_its_final_dice_and_links_the_report(tmp_path: Path) -> None:
    final = Final(0.8765, "12 of 13 held-out cases", "report/report.html")
    over = replace(page(), running=False, state="finished", final=final)
    text = write_training_page(tmp_path / "p.html", over).read_text()
    links = [attributes.get("href") for tag, attributes in Tags(text).found if tag == "a"]
    assert links == ["report/report.html"] and "12 of 13 held-out cases" in text
    assert '<p class="figure num">0.876' in text and "<title>500/1000 · Dice 0.876" in text
    assert "Best on the way: 0.500 at step 250" in text and "Best so far" not in text
    undefined = replace(over, best_dice=None, mean_dice=None, final=replace(final, dice=None))
    assert "report/report.html" in write_training_page(tmp_path / "q.html", undefined).read_text()
    assert "<a " not in write_training_page(tmp_path / "r.html", page()).read_text()


def test_alarms_classes_and_pictures_are_told(tmp_path: Path) -> None:
    text = write_training_page(tmp_path / "p.html", page()).read_text()
    assert "lesion is lost." in text and "Lower the rate." in text and 'role="alert"' in text
    assert "Worst cases at step 500" in text and "case_&lt;7&gt;" in text
    alts = [attributes["aria-label"] or "" for tag, attributes in Tags(text).found if "aria-label" in attributes]
    assert any("case_<7>, axial plane 4 of 20, R on the left" in alt for alt in alts)
    assert sum(tag == "image" for tag, _ in Tags(text).found) == 3


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    empty = {name: values[:0] for name, values in series(1).items()}
    young = replace(page(), step=0, mean_dice=None, best_dice=None, best_step=None, series=empty, validations=[])
    text = write_training_page(tmp_path / "p.html", replace(young, worst=WorstCases(0), numbers={})).read_text()
    assert "No validation yet" in text and 'id="curves"' not in text
    over = replace(young, worst=WorstCases(0), numbers={}, state="finished", running=False)
    assert "No validation yet" not in write_training_page(tmp_path / "q.html", over).read_text()


def test_panels_show_dice_over_steps_and_over_time_and_leave_out_the_first_step_s_time() -> None:
    panels = {panel.title: panel for panel in progress_panels(series(500), [validation(250, 0.9, 0.1)], end=1000)}
    assert list(panels) == [
        "Validation Dice",
        "Validation Dice over time (min)",
        "Training loss",
        "Learning rate",
        "Seconds per step",
        "Waiting for data (% of the time)",
    ]
    assert panels["Validation Dice"].x.high == 1000
    ((x, _),) = panels["Validation Dice over time (min)"].lines[-1].points
    assert x == pytest.approx(50.0)
    assert panels["Seconds per step"].y.high < 5
    assert "10.0 %" not in panels["Seconds per step"].alt
    assert all(len(line.points) <= MAX_POINTS for panel in panels.values() for line in panel.lines)


def test_a_log_of_before_without_step_times_is_drawn_without_them() -> None:
    old = {**series(5), "step_s": np.full(5, np.nan)}
    assert "Seconds per step" not in [panel.title for panel in progress_panels(old, [], end=5)]


def test_pictures_keep_their_proportions_and_outline_both() -> None:
    view = draw_cuts(cut_case(), ["organ", "lesion"], (2.0, 1.2, 1.0), sides_known=True)
    axial = view.planes[0]
    assert axial.layout.name == "axial" and axial.image is not None
    # The margin of 20 mm reaches beyond the picture on every side.
    assert (axial.width_mm, axial.height_mm) == pytest.approx((20.0, 26.4))
    assert [(one.class_name, one.role) for one in axial.outlines] == [
        ("organ", "reference"),
        ("lesion", "reference"),
        ("organ", "prediction"),
    ]


def test_sides_that_are_not_known_are_not_claimed() -> None:
    plane = draw_cuts(cut_case(), ["organ", "lesion"], (2.0, 1.2, 1.0), sides_known=False).planes[0]
    assert plane.layout.name == "across D" and plane.layout.sides["left"] == "?"
    assert "sides not known" in plane.alt


def test_of_planes_equally_wrong_the_middle_one_is_shown() -> None:
    assert largest_plane(np.array([0, 3, 3, 3, 1])) == 2
