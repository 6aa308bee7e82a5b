"""One case after the other: what is told of how far it is, of its files, and of our own mistakes."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from known_network import scan_of

from sagittal.data.dataset import Case
from sagittal.inference.outputs import is_as_written
from sagittal.inference.pipeline import CasePipeline, Job
from sagittal.inference.predictor import Predictor
from sagittal.inference.run_report import CasePrediction, Choices


def case_in(folder: Path) -> Case:
    return Case("c0", (scan_of((9, 10, 11), seed=0).write(folder / "c0.nii.gz"),))


def test_windows_are_told_with_their_case(tmp_path: Path, thresholding: Predictor) -> None:
    told: list[CasePrediction] = []
    windows: list[tuple[str, int, int]] = []
    job = Job(tmp_path / "out", Choices())
    CasePipeline(thresholding, job, told.append, lambda *at: windows.append(at)).run([case_in(tmp_path)])
    assert [case.status for case in told] == ["done"]
    assert {case for case, _, _ in windows} == {"c0"} and windows[-1][1] == windows[-1][2] > 0


def test_probabilities_have_a_hash_as_every_file_has(tmp_path: Path, thresholding: Predictor) -> None:
    told: list[CasePrediction] = []
    folder = tmp_path / "out"
    CasePipeline(thresholding, Job(folder, Choices(probabilities=True)), told.append).run([case_in(tmp_path)])
    stamps = {Path(stamp.path).suffix: stamp for stamp in told[0].files}
    assert stamps[".npz"].sha256 == hashlib.sha256((folder / "c0.npz").read_bytes()).hexdigest()
    assert is_as_written(folder, stamps[".npz"])
    content = bytearray((folder / "c0.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "c0.npz").write_bytes(content)
    assert not is_as_written(folder, stamps[".npz"])


def test_where_a_mistake_of_ours_was_raised_is_written_to_the_log(
    tmp_path: Path, thresholding: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("shapes (3,) and (4,)")

    monkeypatch.setattr(Predictor, "predict", fail)
    told: list[CasePrediction] = []
    with caplog.at_level(logging.DEBUG, logger="sagittal"):
        CasePipeline(thresholding, Job(tmp_path / "out", Choices()), told.append).run([case_in(tmp_path)])
    assert told[0].code == "bug" and "--debug shows where" in str(told[0].message)
    (record,) = caplog.records
    assert record.getMessage() == "c0: ValueError" and "in fail" in caplog.text
