from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.evaluation import ClassSet, Evaluation, dice, hd95_mm
from sagittal.report.evaluation import Beside, draw_cases, evaluate
from sagittal.report.layout import CaseFiles
from sagittal.volumes import Volume, read_labels

SHAPE = (6, 9, 12)
AFFINE = np.diag([3.0, 0.8, 0.5, 1.0])[[2, 1, 0, 3]]  # (d, h, w) -> (x, y, z): spacing 3.0, 0.8, 0.5 mm


def labels(seed: int, *values: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    for number, value in enumerate(values):
        first = 1 + (seed + number) % 3
        array[first : first + 2, 2 + 2 * number : 4 + 2 * number, 3:9] = value
    return array


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(array[None], affine).write(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases in the layout of a data set; predictions are shifted by a slice."""
    references, predictions = tmp_path / "set" / "labelsTr", tmp_path / "predicted"
    for number, case in enumerate(("a", "b", "c")):
        write(references / f"{case}.nii.gz", labels(number, 1, 2))
        write(predictions / f"{case}.nii.gz", labels(number + (case != "b"), 1, 2))
    declaration = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "head": 1, "tail": 2, "both": [1, 2]}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(declaration))
    return predictions, references


def test_numbers_are_those_of_the_metrics_on_the_masks(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate(*folders)
    assert [case.case for case in evaluation.cases] == ["a", "b", "c"]
    assert evaluation.classes == ClassSet.of_mapping({"head": 1, "tail": 2, "both": [1, 2]})
    reference, prediction = labels(0, 1, 2), labels(1, 1, 2)
    for name, values in {"head": [1], "tail": [2], "both": [1, 2]}.items():
        masks = np.isin(reference, values), np.isin(prediction, values)
        found = evaluation.cases[0].classes[name].metrics
        assert tuple(found) == tuple(evaluation.metrics)
        assert found["dice"] == pytest.approx(dice(*masks))
        assert found["hd95_mm"] == pytest.approx(hd95_mm(*masks, (3.0, 0.8, 0.5)))
    assert evaluation.cases[1].mean_dice == 1.0
    assert not evaluation.failures
    assert not evaluation.warnings


def test_the_files_that_are_written_agree(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluation = evaluate(*folders, out)
    written = ["metrics.csv", "metrics.json", "report.html", "summary.csv", "tables.md", "tables.tex"]
    assert sorted(path.name for path in out.iterdir()) == written
    assert Evaluation.read(out / "metrics.json") == evaluation
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 9
    assert float(rows[0]["dice"]) == evaluation.cases[0].classes["head"].metrics["dice"]
    page = (out / "report.html").read_text()
    assert f"{evaluation.mean_dice:.3f}" in page
    assert str(tmp_path) not in page


def test_number_of_workers_does_not_change_the_result(folders: tuple[Path, Path]) -> None:
    assert evaluate(*folders, workers=1) == evaluate(*folders, workers=3)


def test_data_set_folder_stands_for_its_labels(folders: tuple[Path, Path]) -> None:
    assert evaluate(folders[0], folders[1].parent) == evaluate(*folders)


def test_two_files_are_one_case_whatever_their_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "other" / "name.nii.gz", labels(1, 1, 2))
    evaluation = evaluate(tmp_path / "other" / "name.nii.gz", folders[1] / "a.nii.gz")
    assert [case.case for case in evaluation.cases] == ["a"]


def test_missing_predictions_are_named_and_nothing_is_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[0] / "a.nii.gz").unlink()
    (folders[0] / "c.nii.gz").unlink()
    with pytest.raises(DataError, match="2 of 3 references have no prediction: a, c") as caught:
        evaluate(*folders, tmp_path / "out")
    assert caught.value.code == "missing_prediction"
    assert not (tmp_path / "out").exists()


def test_named_cases_may_be_a_part_of_the_references(folders: tuple[Path, Path]) -> None:
    (folders[0] / "a.nii.gz").unlink()
    assert [case.case for case in evaluate(*folders, beside=Beside(cases=["b", "c"])).cases] == ["b", "c"]
    with pytest.raises(DataError, match="no reference for z"):
        evaluate(*folders, beside=Beside(cases=["b", "z"]))


def test_prediction_without_reference_is_a_warning(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "z.nii.gz", labels(0, 1))
    evaluation = evaluate(*folders)
    assert evaluation.warnings == ("Predictions without a reference, not scored (1): z.",)
    assert len(evaluation.cases) == 3


def test_bad_case_is_told_with_numbers_and_the_others_are_scored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole = evaluate(*folders)
    moved = AFFINE.copy()
    moved[:3, 3] = (0, 0, 7)
    write(folders[0] / "a.nii.gz", labels(0, 1, 2), moved)
    (folders[0] / "c.nii.gz").write_bytes((folders[0] / "c.nii.gz").read_bytes()[:60])
    evaluation = evaluate(*folders, tmp_path / "out")
    assert [case.case for case in evaluation.cases] == ["b"]
    assert evaluation.cases[0] == whole.cases[1]
    assert [failure.case for failure in evaluation.failures] == ["a", "c"]
    assert "7 mm apart" in evaluation.failures[0].message
    assert evaluation.summary.failed == 2
    assert "7 mm apart" in (tmp_path / "out" / "report.html").read_text()


def test_all_cases_bad_still_gives_a_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for path in folders[0].iterdir():
        write(path, np.zeros((6, 9, 11), np.uint8))
    evaluation = evaluate(*folders, tmp_path / "out")
    assert evaluation.mean_dice is None
    assert len(evaluation.failures) == 3
    assert "could not be scored" in (tmp_path / "out" / "report.html").read_text()


def test_value_that_the_declaration_lacks_fails_the_reference_and_warns_for_the_prediction(
    folders: tuple[Path, Path],
) -> None:
    write(folders[1] / "a.nii.gz", labels(0, 1, 7))
    write(folders[0] / "b.nii.gz", labels(0, 1, 9))
    evaluation = evaluate(*folders)
    assert [(failure.case, failure.code) for failure in evaluation.failures] == [("a", "unknown_label")]
    assert "[7]" in evaluation.failures[0].message
    assert evaluation.warnings == (
        "b: the prediction has the values [9], which no class names; they count as background.",
    )


def test_classes_without_a_declaration_are_the_values_of_the_references(folders: tuple[Path, Path]) -> None:
    (folders[1].parent / "dataset.json").unlink()
    evaluation = evaluate(*folders)
    assert evaluation.classes.names == ("1", "2")
    assert evaluation.warnings == ("No dataset.json: the classes are the values in the references (1, 2).",)


def test_declaration_beside_the_predictions_serves(folders: tuple[Path, Path]) -> None:
    (folders[1].parent / "dataset.json").rename(folders[0] / "dataset.json")
    assert evaluate(*folders).classes.names == ("head", "tail", "both")


def test_given_labels_rule(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate(*folders, labels={"front": 1})
    assert evaluation.classes.names == ("front",)
    assert len(evaluation.warnings) == 1


def test_nothing_to_score_is_an_error(folders: tuple[Path, Path]) -> None:
    (folders[1].parent / "dataset.json").unlink()
    for path in folders[1].iterdir():
        write(path, np.zeros(SHAPE, np.uint8))
    with pytest.raises(DataError, match="nothing to score"):
        evaluate(*folders)


def scans(references: Path) -> Path:
    images = references.parent / "imagesTr"
    for case in ("a", "b", "c"):
        noise = np.random.default_rng(0).random(SHAPE).astype(np.float32)
        write(images / f"{case}_0000.nii.gz", noise)
    return images


def test_scans_beside_the_labels_are_under_the_outlines(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate(*folders, tmp_path / "without")
    scans(folders[1])
    evaluate(*folders, tmp_path / "with")
    counts = [(tmp_path / name / "report.html").read_text().count("data:image/jpeg") for name in ("without", "with")]
    # Three planes of each case, and of a and c, which are not perfect, three more where the errors are.
    assert counts == [0, 15]


def test_scan_on_another_grid_is_left_out_and_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write(scans(folders[1]) / "a_0000.nii.gz", np.zeros((6, 9, 10), np.float32))
    evaluation = evaluate(*folders, tmp_path / "out")
    assert len(evaluation.warnings) == 1
    assert "a is shown without its scan" in evaluation.warnings[0]
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/jpeg") == 9, "b and c are"


def test_images_that_are_no_folder_are_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        evaluate(*folders, tmp_path / "out", beside=Beside(images=tmp_path / "absent"))


def test_pictures_do_not_depend_on_the_order_in_which_a_scan_is_stored(tmp_path: Path) -> None:
    stored = Volume(labels(0, 1, 2)[None], AFFINE)
    affine = AFFINE.copy()
    affine[:, 2] *= -1  # the same scan, its columns stored from right to left
    affine[:3, 3] += AFFINE[:3, 2] * (SHAPE[2] - 1)
    mirrored = np.ascontiguousarray(stored.array[0, :, :, ::-1])
    turned = np.ascontiguousarray(mirrored.transpose(2, 0, 1))
    write(tmp_path / "one.nii.gz", stored.array[0])
    write(tmp_path / "two.nii.gz", turned, affine[:, [2, 0, 1, 3]])
    classes = ClassSet.of_mapping({"head": 1, "tail": 2})
    views = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.nii.gz"
        found, complaints = draw_cases({CaseFiles("x", path, path): None}, classes)
        assert not complaints
        views.append(found["x"])
    assert views[0] == views[1]


@pytest.mark.parametrize("beside", ["references", "predictions"])
def test_predictions_in_the_values_from_before_a_repair_are_scored(folders: tuple[Path, Path], beside: str) -> None:
    expected = evaluate(*folders)
    declaration = folders[1].parent / "dataset.json"
    content = json.loads(declaration.read_text())
    declaration.write_text(json.dumps({**content, "label_map": {"2": -9}}))
    if beside == "predictions":
        declaration.rename(folders[0] / "dataset.json")
    for path in folders[0].glob("*.nii.gz"):
        predicted, _ = read_labels(path)
        write(path, np.where(predicted == 2, -9, predicted.astype(np.int32)).astype(np.int32))
    found = evaluate(*folders)
    assert [case.mean_dice for case in found.cases] == [case.mean_dice for case in expected.cases]
    assert found.failures == () and found.warnings == expected.warnings


@pytest.mark.parametrize("wrong", [[], {"x": 1}, {"2": "a"}, {"2": 7.0}])
def test_a_label_map_that_makes_no_sense_is_told(folders: tuple[Path, Path], wrong: object) -> None:
    declaration = folders[1].parent / "dataset.json"
    declaration.write_text(json.dumps({**json.loads(declaration.read_text()), "label_map": wrong}))
    with pytest.raises(DataError, match="label_map"):
        evaluate(*folders)


def test_a_failure_names_its_case_once(tmp_path: Path) -> None:
    for folder, lowest in (("references", 0), ("predictions", -1)):
        labels = np.full((1, 4, 5, 6), lowest, np.int16)
        labels[0, 1:3, 1:3, 1:3] = 1
        (tmp_path / folder).mkdir()
        Volume(labels, np.eye(4)).write(tmp_path / folder / "a.nii.gz")
    (failure,) = evaluate(tmp_path / "predictions", tmp_path / "references").failures
    assert failure.case == "a" and failure.message.startswith("prediction has values from -1")
