"""Predictions without references: each rule fires for what it is about, and the page tells it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.errors import DataError
from sagittal.evaluation import ClassSet
from sagittal.plan.volume_range import VolumeRange
from sagittal.report.qc import QualityCheck, check_predictions
from sagittal.report.qc_case import CaseMeasure, LabelMeasure, measure_case
from sagittal.report.qc_page import PageParts, Scale, render_page
from sagittal.report.qc_pictures import draw_case
from sagittal.report.qc_rules import RunFlag, flags_of, scores_of, suspicion_of, usual_of
from sagittal.volumes import Volume

SHAPE = (12, 14, 16)
AFFINE = np.array([[0, 0, 1.0, -9], [0, 1.2, 0, 5], [2.0, 0, 0, 7], [0, 0, 0, 1]])
CLASSES = ClassSet.of_mapping({"kidney_left": 1, "kidney_right": 2, "both": [1, 2]})
ML = 2.4 / 1000


def blocks(left: int = 4, right: int = 4) -> np.ndarray:
    """Two boxes inside of the scan, `left` and `right` slices thick."""
    array = np.zeros(SHAPE, np.uint8)
    array[2 : 2 + left, 3:7, 2:6] = 1
    array[2 : 2 + right, 3:7, 9:13] = 2
    return array


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(array[None], affine).write(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight cases that differ little, with what their values mean and what the run said of them."""
    out = tmp_path / "predicted"
    for number in range(8):
        write(out / f"case_{number}.nii.gz", blocks(4 + number % 2, 4 + (number + 1) % 2))
    declared = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "kidney_left": 1, "kidney_right": 2}}
    (out / "dataset.json").write_text(json.dumps(declared))
    return out


def codes(result: QualityCheck, case: str) -> dict[str, str | None]:
    return {flag.code: flag.label for check in result.cases if check.case == case for flag in check.flags}


def test_a_case_is_measured_in_ml_pieces_and_edges(tmp_path: Path) -> None:
    array = blocks(4, 10)
    array[10, 0, 0] = 1
    array[11, 12, 15] = 9
    write(tmp_path / "a.nii.gz", array)
    found = measure_case(tmp_path / "a.nii.gz", CLASSES)
    assert found.undeclared == (9,) and found.entropy is None
    left, right, both = (found.labels[name] for name in CLASSES.names)
    assert left == LabelMeasure(volume_ml=round(65 * ML, 6), pieces=2, edges=("back", "left"))
    assert right == LabelMeasure(volume_ml=round(160 * ML, 6), pieces=1, edges=("head",))
    assert both == LabelMeasure(volume_ml=round(225 * ML, 6), pieces=3, edges=("head", "back", "left"))


def test_edges_have_the_patients_names_in_any_order_of_axes(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.uint8)
    array[0, 5, 5] = 1
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])[[2, 0, 1, 3]]  # D to the back, H to the head, W to the right
    write(tmp_path / "a.nii.gz", array, flipped)
    assert measure_case(tmp_path / "a.nii.gz", CLASSES).labels["kidney_left"].edges == ("front",)


def test_specks_are_no_pieces(tmp_path: Path) -> None:
    array = np.zeros((30, 30, 31), np.uint8)
    array[2:22, 2:22, 2:22] = 1
    array[25, 25, 25:28:2] = 1
    write(tmp_path / "a.nii.gz", array)
    assert measure_case(tmp_path / "a.nii.gz", CLASSES).labels["kidney_left"].pieces == 1


def test_entropy_is_the_mean_over_what_was_found(folder: Path) -> None:
    entropy = np.where(blocks() > 0, 0.25, 0.75).astype(np.float32)
    write(folder / "entropy" / "case_1.nii.gz", entropy)
    array = blocks(4, 4)
    write(folder / "case_1.nii.gz", array)
    found = {check.case: check.measure.entropy for check in check_predictions(folder).cases}
    assert found["case_1"] == pytest.approx(0.25) and found["case_0"] is None


def measure(left: float = 100.0, right: float = 100.0, **changes: object) -> CaseMeasure:
    labels = {
        "kidney_left": LabelMeasure(volume_ml=left, pieces=int(left > 0)),
        "kidney_right": LabelMeasure(volume_ml=right, pieces=int(right > 0)),
    }
    return CaseMeasure(labels=labels).replace(**changes)


def flags(case: CaseMeasure, others: int = 9, training: dict[str, VolumeRange] | None = None) -> dict[str, str]:
    cases = [case, *(measure(95.0 + number, 105.0 - number) for number in range(others))]
    usual = usual_of(cases, training or {})
    return {flag.code: flag.reason for flag in flags_of(case, scores_of(case, usual), usual)}


TRAINING = {name: VolumeRange.of([80.0, 90.0, 100.0, 110.0, 120.0]) for name in ("kidney_left", "kidney_right")}


def test_volumes_out_of_the_ordinary_are_flagged_with_numbers() -> None:
    assert flags(measure()) == {}
    told = flags(measure(20.0, 20.0))
    assert set(told) == {"volume_small"}
    assert "kidney_left is unusually small: 20 mL" in told["volume_small"] and "this folder's cases" in str(told)
    assert "between 80 and 120 mL" in flags(measure(300.0, 300.0), 0, TRAINING)["volume_large"]
    assert "training cases" in str(flags(measure(300.0, 300.0), 0, TRAINING))


def test_training_has_a_range_beside_its_spread() -> None:
    wide = {name: VolumeRange.of([1.0, 10.0, 100.0, 1000.0, 2000.0]) for name in TRAINING}
    assert flags(measure(2400.0, 2400.0), 0, wide) == {}
    assert set(flags(measure(2600.0, 2600.0), 0, wide)) == {"volume_large"}
    assert set(flags(measure(0.79, 0.79), 0, wide)) == {"volume_small"}


def test_absence_counts_where_all_training_cases_have_the_class() -> None:
    told = flags(measure(0.0, 100.0), 0, TRAINING)
    assert told == {"absent": "kidney_left is absent; all 5 training cases have it."}
    some = {**TRAINING, "kidney_left": VolumeRange.of([80.0, 90.0, 100.0, 110.0, 120.0, 0.0])}
    assert flags(measure(0.0, 100.0), 0, some) == {
        "sides": "kidney_left is absent while kidney_right is there (100 mL)."
    }
    rare = {**TRAINING, "kidney_left": VolumeRange.of([80.0, 90.0, *[0.0] * 9])}
    assert flags(measure(0.0, 100.0), 0, rare) == {}
    assert "absent; 9 of 10 cases of this folder have it" in flags(measure(0.0, 100.0))["absent"]
    assert set(flags(measure(0.0, 0.0), 9, TRAINING)) == {"nothing_found"}


def test_sides_are_compared_with_what_is_usual() -> None:
    assert "differ by far: 250 and 100 mL; usual is 0.99 to 1" in flags(measure(250.0, 100.0))["sides"]
    lobes = {**TRAINING, "kidney_left": VolumeRange.of([160.0, 180.0, 200.0, 220.0, 240.0])}
    assert flags(measure(200.0, 100.0), 0, lobes) == {}
    assert "usual is 2 to 1" in flags(measure(82.0, 115.0), 0, lobes)["sides"]
    # Nothing is known of them: they may be unlike.
    assert flags(measure(300.0, 100.0), 0) == {}
    assert "usually they are alike" in flags(measure(500.0, 100.0), 0)["sides"]


def test_pieces_and_edges_are_compared_with_the_folder() -> None:
    labels = measure().labels
    broken = {**labels, "kidney_left": LabelMeasure(volume_ml=100.0, pieces=2)}
    assert "kidney_left is in 2 pieces; 1 is the median" in flags(measure(labels=broken))["pieces"]
    assert flags(measure(labels=broken), 2) == {}
    cut = {name: label.replace(edges=("head",)) for name, label in labels.items()}
    assert flags(measure(labels=cut))["cut_off"].startswith("kidney_left and kidney_right reach the edge of the scan")
    everyone = usual_of([measure(labels=cut)] * 6, {})
    assert flags_of(measure(labels=cut), {}, everyone) == ()


def test_unsure_cases_unknown_values_and_the_runs_own_flags_are_told() -> None:
    cases = [measure(entropy=0.1 + 0.001 * number) for number in range(9)]
    odd = measure(entropy=0.3, undeclared=(7, 300))
    usual = usual_of([*cases, odd], {})
    told = {
        flag.code: flag for flag in flags_of(odd, {}, usual, [RunFlag(code="quality", message="they agree little")])
    }
    assert set(told) == {"entropy", "undeclared", "run_quality"}
    assert "7, 300" in told["undeclared"].reason
    assert told["run_quality"].reason == "The prediction run: they agree little"
    assert flags_of(cases[8], {}, usual) == ()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=12), st.integers(0, 9))
def test_a_flagged_case_comes_before_any_that_is_not(volumes: list[float], others: int) -> None:
    cases = [measure(volume, volume / 2) for volume in volumes] + [measure()] * others
    usual = usual_of(cases, {})
    for case in cases:
        scores = scores_of(case, usual)
        found = flags_of(case, scores, usual)
        suspicion = suspicion_of(found, scores)
        assert suspicion >= 1 if found else 0 <= suspicion < 1
        assert all(flag.reason and 1 <= flag.points <= 10 for flag in found)


def test_the_worst_comes_first_and_three_files_agree(folder: Path, tmp_path: Path) -> None:
    write(folder / "case_3.nii.gz", blocks(1, 4))
    write(folder / "case_5.nii.gz", np.zeros(SHAPE, np.uint8))
    result = check_predictions(folder, tmp_path / "out")
    assert [check.case for check in result.cases[:2]] == ["case_5", "case_3"]
    assert codes(result, "case_3") == {"volume_small": "kidney_left", "sides": "kidney_left"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["qc.csv", "qc.html", "qc.json"]
    assert QualityCheck.read(tmp_path / "out" / "qc.json") == result
    rows = list(csv.DictReader((tmp_path / "out" / "qc.csv").read_text().splitlines()))
    assert len(rows) == 16 and rows[2]["case"] == "case_3" and rows[2]["flags"] == "volume_small sides"
    assert float(rows[2]["volume_ml"]) == pytest.approx(16 * ML)
    assert check_predictions(folder, workers=3) == result


def test_files_that_cannot_be_read_are_told_and_the_others_go_on(folder: Path) -> None:
    (folder / "case_2.nii.gz").write_bytes(b"nothing of the kind")
    result = check_predictions(folder)
    assert len(result.cases) == 7
    (failure,) = result.failures
    assert failure.case == "case_2" and "case_2.nii.gz" in failure.message and str(folder) not in failure.message


def test_what_the_run_said_is_read_from_its_report(folder: Path) -> None:
    write(folder / "p1" / "scan.nii.gz", blocks())
    write(folder.parent / "outside.nii.gz", blocks())
    entries = [
        {"case": "case_0", "status": "done", "output": "case_0.nii.gz", "quality": {"agreement": 0.9}},
        {"case": "case_1", "output": "case_1.nii.gz", "flags": [{"code": "size", "message": "too small"}]},
        {"case": "p1/scan", "status": "done", "output": "p1/scan.nii.gz"},
        {"case": "gone", "status": "done", "output": "gone.nii.gz"},
        {"case": "outside", "status": "done", "output": "../outside.nii.gz"},
        {"case": "bad", "status": "failed", "message": "no scan"},
    ]
    (folder / "prediction.json").write_text(json.dumps({"status": "ended early", "cases": entries}))
    result = check_predictions(folder)
    by_name = {check.case: check for check in result.cases}
    assert len(by_name) == 9 and "p1/scan" in by_name
    assert by_name["case_0"].agreement == 0.9
    assert "run_size" in codes(result, "case_1")
    assert {failure.case: failure.code for failure in result.failures} == {
        "gone": "missing",
        "outside": "missing",
        "bad": "not_predicted",
    }
    assert any("not finished" in warning for warning in result.warnings)


@pytest.mark.parametrize("text", ["{", "[]", '{"cases": [1]}', '{"cases": {"a": 1}}'])
def test_a_report_that_makes_no_sense_is_left_out_with_a_warning(folder: Path, text: str) -> None:
    (folder / "prediction.json").write_text(text)
    result = check_predictions(folder)
    assert len(result.cases) == 8
    assert any("prediction.json can't be used" in warning for warning in result.warnings)


def test_without_a_declaration_the_values_are_the_classes(folder: Path) -> None:
    (folder / "dataset.json").unlink()
    result = check_predictions(folder)
    assert result.classes.names == ("1", "2")
    assert any("No dataset.json" in warning for warning in result.warnings)


def test_a_few_cases_are_told_to_be_few(folder: Path) -> None:
    for number in range(3, 8):
        (folder / f"case_{number}.nii.gz").unlink()
    assert any("Fewer than 5 cases" in warning for warning in check_predictions(folder).warnings)


def test_what_is_no_folder_of_label_maps_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no label maps"):
        check_predictions(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file or folder"):
        check_predictions(tmp_path / "none")
    with pytest.raises(DataError, match="not a folder"):
        check_predictions(folder, images=tmp_path / "none")
    shutil.copy(folder / "case_0.nii.gz", folder / "case_0.nii")
    with pytest.raises(DataError, match="are both case 'case_0'"):
        check_predictions(folder)
    write(tmp_path / "nothing" / "a.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(DataError, match="there is nothing to check"):
        check_predictions(tmp_path / "nothing")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(str(given["id"]))
        for name in ("src", "href"):
            value = given.get(name) or ""
            if value.startswith("#"):
                self.links.append(value[1:])
            elif value and not value.startswith("data:"):
                self.outside.append(value)
        if tag == "svg" and not (given.get("aria-label") or given.get("aria-hidden")):
            self.silent += 1


def test_the_page_is_closed_in_itself_and_says_everything_in_words(folder: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    write(scans / "case_3_0000.nii.gz", np.random.default_rng(0).normal(40, 50, SHAPE).astype(np.float32))
    write(folder / "case_3.nii.gz", blocks(1, 4))
    write(folder / "<b>.nii.gz", blocks())
    check_predictions(folder, tmp_path / "out", images=scans)
    text = (tmp_path / "out" / "qc.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.outside == [] and page.silent == 0
    assert set(page.links) <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert str(tmp_path) not in text and "<b>.nii" not in text and "&lt;b&gt;" in text
    assert "kidney_left is unusually small" in text and "Left and right" in text
    assert text.count("data:image/jpeg") == 3 and "Outlined: kidney_left" in text
    assert "Shown without its scan: no file case_0_0000" in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_pictures_are_cut_through_what_is_flagged(tmp_path: Path) -> None:
    array = blocks(4, 10)
    array[2:6] *= array[2:6] == 1
    write(tmp_path / "a.nii.gz", array)
    shown = draw_case("a", tmp_path / "a.nii.gz", CLASSES, None, focus="kidney_left")
    assert 2 <= shown.planes[0].index < 6
    assert draw_case("a", tmp_path / "a.nii.gz", CLASSES, None, focus="kidney_right").planes[0].index >= 6
    assert {line.role for plane in shown.planes for line in plane.outlines} == {"reference"}
    assert set(shown.legend) == {"kidney_left", "kidney_right", "both"} and shown.size_bytes > 0


def test_a_scan_on_another_grid_and_a_file_that_vanished_are_told(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "scans" / "case_0.nii.gz", np.zeros((3, 4, 5), np.float32))
    shown = draw_case("case_0", folder / "case_0.nii.gz", CLASSES, tmp_path / "scans")
    assert "label map and scan: grids differ" in shown.note and len(shown.planes) == 3
    assert "No picture" in draw_case("case_0", folder / "gone.nii.gz", CLASSES, None).note


def test_a_page_of_thousands_of_cases_stays_small(folder: Path) -> None:
    result = check_predictions(folder)
    many = tuple(result.cases[number % 8].replace(case=f"case_{number}") for number in range(5000))
    text = render_page(PageParts.of(result.replace(cases=many), {}, {"Predictions": "predicted"}))
    assert len(text) < 2_500_000
    assert "3000 more cases are in qc.csv" in text and "case_1999" in text and "case_2000<" not in text
    assert text.count("<circle") <= 2 * 260


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e5), max_size=8))
def test_a_scale_keeps_all_volumes_on_it_and_in_order(volumes: list[float]) -> None:
    scale = Scale.around(volumes)
    places = [scale.percent(volume) for volume in sorted(volumes)]
    assert all(0 <= place <= 100 for place in places) and places == sorted(places)
