from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sagittal.cli import USAGE_CODES, run
from sagittal.cli.evaluation_options import declared_classes, evaluation_settings, listed_patients
from sagittal.errors import DataError, PlanError
from sagittal.evaluation import ClassSet, EvaluationSettings
from sagittal.evaluation.lesions import LesionRule
from sagittal.evaluation.protocols import PROTOCOLS
from sagittal.evaluation.settings import ALL_METRICS
from sagittal.volumes import Volume


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two cases, each a box that the prediction has shifted by a voxel."""
    affine = np.diag([3.0, 0.8, 0.5, 1.0])[[2, 1, 0, 3]]
    for number, case in enumerate(("a", "b")):
        for side in (0, 1):
            labels = np.zeros((6, 9, 12), np.uint8)
            labels[1:4, 2:6, 2 + side : 7 + side + number] = 1
            path = tmp_path / ("references", "predictions")[side] / f"{case}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            Volume(labels[None], affine).write(path)
    return [str(tmp_path / "predictions"), str(tmp_path / "references")]


def test_options_become_settings() -> None:
    assert evaluation_settings("sagittal", None) == EvaluationSettings()
    settings = evaluation_settings(
        "sagittal", ["1,2", "liver=3"], metrics=["dice,nsd", "kappa"], lesion_rules=["minimum_iou=0.1"]
    )
    assert settings.tolerances_mm == (1.0, 2.0) and settings.class_tolerances_mm == (("liver", 3.0),)
    assert settings.metrics == ("dice", "nsd", "kappa") and settings.lesions == LesionRule(minimum_iou=0.1)
    assert evaluation_settings("sagittal", None, lesions=True).lesions == LesionRule()
    assert evaluation_settings("nnunet", None).protocol == "nnunet"


@pytest.mark.parametrize(
    ("protocol", "options", "told"),
    [
        ("nnunt", {}, "nnunet"),
        ("sagittal", {"metrics": ["dise"]}, "dice"),
        ("sagittal", {"tolerances": ["two"]}, "--tolerance-mm two"),
        ("sagittal", {"tolerances": ["-1"]}, "positive"),
        ("sagittal", {"lesion_rules": ["minimum_iou=2"]}, "minimum_iou"),
        ("sagittal", {"lesion_rules": ["overlap=1"]}, "overlap"),
        ("sagittal", {"lesion_rules": ["minimum_ml"]}, "--lesion-rule minimum_ml: expected"),
        ("sagittal", {"metrics": [""]}, "--metrics: no name"),
        ("sagittal", {"tolerances": ["=3"]}, "--tolerance-mm =3: expected a class"),
        ("nnunet", {"metrics": ["dice"]}, "metrics of its own"),
        ("nnunet", {"tolerances": ["3"]}, "nnunet has no tolerances"),
        ("monai", {"tolerances": ["liver=3"]}, "one tolerance for all classes"),
    ],
)
def test_options_that_make_no_sense_are_slips_of_usage(protocol: str, options: dict[str, list[str]], told: str) -> None:
    tolerances = options.pop("tolerances", None)
    with pytest.raises(PlanError, match=told) as caught:
        evaluation_settings(protocol, tolerances, **options)
    assert caught.value.code in USAGE_CODES


def test_tolerances_that_a_protocol_looks_at_are_taken() -> None:
    assert evaluation_settings("monai", ["3"]).tolerances_mm == (3.0,)
    assert evaluation_settings("msd", ["liver=7"]).class_tolerances_mm == (("liver", 7.0),)


def test_a_given_tolerance_counts_where_it_is_our_default_too() -> None:
    spleen = ClassSet.of_mapping({"spleen": 1})
    settle = PROTOCOLS["msd"].settings
    given = settle(evaluation_settings("msd", ["2"]), spleen)
    assert (given.tolerances_mm, given.class_tolerances_mm) == ((2.0,), ())
    assert settle(evaluation_settings("msd", None), spleen).class_tolerances_mm == (("spleen", 3.0),)
    with pytest.raises(PlanError, match="one tolerance for each class, and several are given"):
        evaluation_settings("msd", ["2,3"])


def test_errors_of_settings_are_told_without_their_machinery() -> None:
    with pytest.raises(PlanError) as caught:
        evaluation_settings("sagittal", None, metrics=["dise"])
    assert caught.value.message == "metric 'dise' is unknown. Did you mean 'dice'?"


@pytest.mark.parametrize("option", ["--tolerance-mm", "--workers"])
def test_slips_are_told_once_and_exit_with_2(
    folders: list[str], capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run(["evaluate", *folders, option, {"--tolerance-mm": "2=3", "--workers": "0"}[option]]) == 2
    told = capsys.readouterr()
    assert "failed" not in told.out and ("'2'" in told.err or "--workers" in told.err)


def test_cases_can_be_named(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(folders[0]) / "b.nii.gz").unlink()
    assert run(["evaluate", *folders]) == 1
    assert "(--cases)" in capsys.readouterr().err
    names = tmp_path / "names.txt"
    names.write_text("a\n\n")
    for given in ("a", str(names)):
        assert run(["evaluate", *folders, "--cases", given, "--json", "--out", str(tmp_path / "out")]) == 0
        assert [case["case"] for case in json.loads(capsys.readouterr().out)["cases"]] == ["a"]
    assert "the 1 that were named" in (tmp_path / "out" / "report.html").read_text()
    assert run(["evaluate", *folders, "--cases", " , "]) == 2
    assert run(["evaluate", *folders, "--cases", "c"]) == 1
    assert "no reference for c" in capsys.readouterr().err


def test_a_folder_that_takes_no_result_is_refused_before_the_work(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagittal.report.evaluation.score_all", lambda *_: pytest.fail("it was scored"))
    (tmp_path / "file").write_text("")
    assert run(["evaluate", *folders, "--out", str(tmp_path / "file")]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_all_metrics_can_be_asked_for() -> None:
    assert evaluation_settings("sagittal", None, metrics=["all"]).metrics == ALL_METRICS


def test_results_are_printed_without_a_folder(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", *folders]) == 0
    printed = capsys.readouterr().out
    assert "NSD" in printed and "mean dice 0.8" in printed and "report" not in printed


def test_json_is_the_whole_result(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "patients.csv").write_text("case,patient\na,one\nb,one\n")
    options = ["--patients", str(tmp_path / "patients.csv"), "--metrics", "dice,hd_mm", "--tolerance-mm", "1"]
    assert run(["evaluate", *folders, *options, "--json", "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert printed["settings"]["metrics"] == ["dice", "hd_mm"]
    assert {case["patient"] for case in printed["cases"]} == {"one"}
    assert printed["summary"]["low"]["dice"] is None, "one patient is too few for an interval"


def test_another_protocol_scores_by_its_own_metrics(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", *folders, "--protocol", "nnunet", "--json"]) == 0
    case = json.loads(capsys.readouterr().out)["cases"][0]
    assert case["classes"]["1"]["metrics"]["dice"] == pytest.approx(0.8)


def test_patients_and_probabilities_are_wanted_for_every_case(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "patients.csv").write_text("case,patient\na,one\n")
    assert run(["evaluate", *folders, "--patients", str(tmp_path / "patients.csv")]) == 1
    assert "1 of 2 cases (b)" in capsys.readouterr().err
    assert run(["evaluate", *folders, "--probabilities", str(tmp_path)]) == 1
    assert "2 of 2 cases (a, b)" in capsys.readouterr().err
    with pytest.raises(DataError, match="no rows"):
        (tmp_path / "empty.csv").write_text("case,patient\n")
        listed_patients(tmp_path / "empty.csv")


def test_labels_are_read_from_the_file_that_is_named(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "named.json").write_text(json.dumps({"labels": {"background": 0, "box": 1}}))
    found = declared_classes(tmp_path / "named.json")
    assert found is not None and found.names == ("box",)
    assert declared_classes(None) is None and listed_patients(None) is None
