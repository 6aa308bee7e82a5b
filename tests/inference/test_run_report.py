from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from sagittal.errors import ResourceError
from sagittal.inference.run_report import JOURNAL, REPORT, CasePrediction, Choices, FolderResult, RunLog, known_cases


def head() -> FolderResult:
    return FolderResult(
        started="2026-01-01T00:00:00+00:00",
        seconds=0.0,
        bundle="b",
        bundle_sha256=None,
        network="mednext-s",
        engine="torch",
        devices=("cpu",),
        versions={},
        choices=Choices(),
        cases=(),
    )


def case(name: str) -> CasePrediction:
    return CasePrediction(case=name, status="done", seconds=1.0, output=f"{name}.nii.gz", choices=Choices())


def test_a_killed_runs_lines_are_read_but_for_one_that_was_cut_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path, head())
    log.__enter__()
    for name in ("a", "b"):
        log.add(case(name))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(case("c").model_dump_json()[:-20])
    assert FolderResult.read(tmp_path / REPORT).status == "running"
    assert set(known_cases(tmp_path)) == {"a", "b"}
    with RunLog(tmp_path, head(), known_cases(tmp_path).values()) as second:
        assert not (tmp_path / JOURNAL).exists()
        second.add(case("d"))
    report = FolderResult.read(tmp_path / REPORT)
    assert [one.case for one in report.cases] == ["a", "b", "d"] and report.status == "finished"
    assert [one.case for one in second.result.cases] == ["d"] and not (tmp_path / JOURNAL).exists()


def test_an_error_is_told_by_the_status(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLog(tmp_path, head()) as log:
        log.add(case("a"))
        raise KeyError
    assert FolderResult.read(tmp_path / REPORT).status == "ended early"


def test_the_first_error_stays_where_the_report_can_not_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError), RunLog(out, head()):
        (out / REPORT).unlink()
        out.rmdir()
        out.write_text("")
        raise KeyError
    with pytest.raises(ResourceError), RunLog(out, head()):
        pass


def test_a_journal_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    log = RunLog(tmp_path, head())
    (tmp_path / JOURNAL).mkdir()
    with pytest.raises(ResourceError, match="can't be written"):
        log.add(case("a"))


def test_nothing_is_known_of_a_folder_without_a_report_or_with_another_versions(tmp_path: Path) -> None:
    assert known_cases(tmp_path) == {}
    (tmp_path / REPORT).write_text('{"schema_version": 3}')
    assert known_cases(tmp_path) == {}


def test_more_extras_cover_fewer_and_nothing_covers_other_numbers() -> None:
    rich = Choices(preview=True, entropy=True)
    assert rich.covers(Choices()) and rich.covers(Choices(entropy=True)) and rich.covers(rich)
    assert not rich.covers(Choices(quality=True)) and not Choices().covers(rich)
    assert not rich.covers(Choices(mirror=False)) and not rich.covers(Choices(precision="bf16"))


def test_other_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        CasePrediction.model_validate({"case": "a", "status": "half", "seconds": 1.0})
