from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_predictor import FakePredictor, expected_labels
from known_network import scan_of, tiny_plan

from sagittal.data.dataset import parse_spec
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.inference import pipeline, run_report
from sagittal.inference.folder import Model, model_of, predict_folder
from sagittal.inference.run_report import CasePrediction, Choices, FolderResult
from sagittal.plan import DatasetSpec, Label
from sagittal.testing.plans import untrained_spec
from sagittal.volumes import Volume, read_labels, read_volume


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "imagesTs"
    for number in range(3):
        scan_of((9 + number, 10, 11), seed=number).write(folder / f"case_{number}_0000.nii.gz")
    return folder


@pytest.fixture
def predictor() -> FakePredictor:
    return FakePredictor(tiny_plan())


def model(predictor: FakePredictor, sha256: str = "a" * 64) -> Model:
    made = model_of(None, predictor.plan, "torch", ("cpu",))
    return Model(made.plan, "bundle", sha256, made.engine, made.devices, made.threshold)


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_becomes_label_maps_and_a_report(tmp_path: Path, scans: Path, predictor: FakePredictor) -> None:
    told: list[CasePrediction] = []
    out = tmp_path / "new" / "out"
    result = predict_folder(predictor, scans, out, choices=Choices(mirror=False, step=0.75), on_case=told.append)
    assert listing(out) == ["case_0.nii.gz", "case_1.nii.gz", "case_2.nii.gz", "dataset.json", "prediction.json"]
    for number in range(3):
        scan = read_volume(scans / f"case_{number}_0000.nii.gz")
        labels, geometry = read_labels(out / f"case_{number}.nii.gz")
        np.testing.assert_array_equal(labels, expected_labels(scan))
        assert geometry.affine.tobytes() == scan.affine.tobytes()
        assert told[number].volumes_ml["class_2"] == pytest.approx((labels == 2).sum() / 1000)
        assert str(told[number]).startswith(f"case_{number}: done in ") and "class_1" in str(told[number])
        assert set(told[number].phases_s) == {"reading", "network", "writing"}
    assert result.cases == tuple(told) and result.failures == ()
    written = FolderResult.read(out / "prediction.json")
    assert written.cases == result.cases and written.status == "finished" and written.versions["numpy"]
    assert [(call["mirror"], call["step"]) for call in predictor.calls] == [(False, 0.75)] * 3


@pytest.mark.parametrize("memory_gib", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_positive_number_is_refused_before_anything_is_written(
    tmp_path: Path, scans: Path, predictor: FakePredictor, memory_gib: float
) -> None:
    with pytest.raises(PlanError, match="above 0"):
        predict_folder(predictor, scans, tmp_path / "out", memory_gib=memory_gib)
    assert not (tmp_path / "out").exists()


def test_the_declaration_reads_back(tmp_path: Path, scans: Path) -> None:
    labels = (Label(name="whole", values=(1, 2)), Label(name="core", values=(2,)))
    spec = DatasetSpec(
        name="r",
        channel_names=("T1",),
        labels=labels,
        ignore_value=9,
        regions_class_order=(1, 2),
        file_ending=".nii.gz",
    )
    out = tmp_path / "out"
    predict_folder(FakePredictor(tiny_plan(spec)), scans, out)
    assert parse_spec(json.loads((out / "dataset.json").read_text()), "out", default_name="x") == spec


@pytest.mark.parametrize(("name", "output"), [("scan.nii.gz", "scan.nii.gz"), ("scan_0000.nii.gz", "scan.nii.gz")])
def test_one_file(tmp_path: Path, predictor: FakePredictor, name: str, output: str) -> None:
    scan_of((5, 6, 7)).write(tmp_path / "in" / name)
    result = predict_folder(predictor, tmp_path / "in" / name, tmp_path / "out")
    assert [case.output for case in result.cases] == [output]
    assert (tmp_path / "out" / output).is_file()


def test_nested_folders_keep_their_tree_and_the_output_within_is_not_searched(
    tmp_path: Path, predictor: FakePredictor
) -> None:
    for place in ("a/x", "b/x"):
        scan_of((5, 6, 7)).write(tmp_path / "in" / f"{place}_0000.nii.gz")
    out = tmp_path / "in" / "out"
    for _ in range(2):
        result = predict_folder(predictor, tmp_path / "in", out, choices=Choices(entropy=True, preview=True))
        assert [case.output for case in result.cases] == ["a/x.nii.gz", "b/x.nii.gz"]
    assert listing(out) == [
        *("a/x.nii.gz", "b/x.nii.gz", "dataset.json", "entropy/a/x.nii.gz", "entropy/b/x.nii.gz"),
        *("prediction.json", "previews/a/x.png", "previews/b/x.png"),
    ]


def test_bad_cases_are_reported_and_lose_nothing(tmp_path: Path, scans: Path, predictor: FakePredictor) -> None:
    bad = scans / "case_1_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-40])
    scan_of((4, 5, 6)).write(scans / "case_4_0000.nii.gz")
    array = np.ones((1, 4, 5, 6), np.float32)
    array[0, 1, 1, 1] = np.nan
    Volume(array, np.eye(4)).write(scans / "case_3_0000.nii.gz")
    result = predict_folder(predictor, scans, tmp_path / "out")
    assert [case.status for case in result.cases] == ["done", "failed", "done", "failed", "done"]
    assert [case.case for case in result.failures] == ["case_1", "case_3"]
    damaged, infinite = result.failures
    assert damaged.output is None and "case_1_0000.nii.gz" in str(damaged.message)
    assert infinite.code == "not_finite"
    assert str(damaged).startswith("case_1: failed, ")
    assert FolderResult.read(tmp_path / "out" / "prediction.json").failures == result.failures
    assert "case_1.nii.gz" not in listing(tmp_path / "out")


def test_a_missing_channel_and_a_vanishing_scan_fail_their_case_alone(tmp_path: Path) -> None:
    spec = untrained_spec(3, channels=2)
    for case in ("a", "b", "c"):
        for channel in range(2):
            scan_of((5, 6, 7)).write(tmp_path / "in" / f"{case}_000{channel}.nii.gz")
    (tmp_path / "in" / "a_0001.nii.gz").unlink()
    vanishing = tmp_path / "in" / "c_0001.nii.gz"
    first = FakePredictor(tiny_plan(spec))
    told: list[CasePrediction] = []

    def tell(case: CasePrediction) -> None:
        told.append(case)
        if case.case == "a":  # told before anything is read
            vanishing.unlink()

    result = predict_folder(first, tmp_path / "in", tmp_path / "out", on_case=tell)
    assert [(case.case, case.code) for case in result.failures] == [("a", "missing_channel"), ("c", "unreadable")]
    assert [case.case for case in result.cases if case.status == "done"] == ["b"]


def test_a_bug_fails_its_case_alone(tmp_path: Path, scans: Path) -> None:
    def stumble(count: int) -> None:
        if count == 2:
            raise IndexError("17")

    result = predict_folder(FakePredictor(tiny_plan(), stumble), scans, tmp_path / "out")
    (failure,) = result.failures
    assert failure.code == "bug" and "IndexError: 17" in str(failure.message)


def test_full_disk_ends_the_run_at_once_and_says_what_is_finished(
    tmp_path: Path, scans: Path, predictor: FakePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Volume.write

    def full_at_the_second(self: Volume, path: Path) -> Path:
        if Path(path).name == "case_1.nii.gz":
            raise ResourceError(f"{path}: can't be written ({errno.ENOSPC}).")
        return write(self, path)

    monkeypatch.setattr(Volume, "write", full_at_the_second)
    with pytest.raises(ResourceError, match=r"case_1\.nii\.gz.* 1 of 3 cases are finished"):
        predict_folder(predictor, scans, tmp_path / "out", model=model(predictor))
    assert listing(tmp_path / "out") == ["case_0.nii.gz", "dataset.json", "prediction.json"]
    report = FolderResult.read(tmp_path / "out" / "prediction.json")
    assert report.status == "ended early" and [case.case for case in report.cases] == ["case_0"]
    monkeypatch.undo()
    result = predict_folder(predictor, scans, tmp_path / "out", model=model(predictor))
    assert [case.finished_before for case in result.cases] == [True, False, False]


def test_finished_cases_are_left_alone(tmp_path: Path, scans: Path, predictor: FakePredictor) -> None:
    out, known = tmp_path / "out", model(predictor)
    predict_folder(predictor, scans, out, model=known)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("case*")}
    result = predict_folder(predictor, scans, out, model=known)
    assert len(predictor.calls) == 3 and all(case.finished_before for case in result.cases)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("case*")} == before
    assert "finished before" in str(result.cases[0])
    predict_folder(predictor, scans, out, model=known, overwrite=True)
    assert len(predictor.calls) == 6


@pytest.mark.parametrize(
    "change", ["scan", "output", "no output", "bundle", "choices", "extra", "report", "touched", "fewer extras"]
)
def test_what_differs_is_computed_again_and_nothing_else(
    tmp_path: Path, scans: Path, predictor: FakePredictor, change: str
) -> None:
    out, sha256, choices = tmp_path / "out", "a" * 64, Choices(entropy=change == "fewer extras")
    predict_folder(predictor, scans, out, choices=choices, model=model(predictor))
    again = {"scan": 1, "output": 1, "no output": 1, "touched": 0, "fewer extras": 0}.get(change, 3)
    path = out / "case_1.nii.gz"
    match change:
        case "scan":
            scan_of((10, 10, 11), seed=77).write(scans / "case_1_0000.nii.gz")
        case "output":
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(content)
        case "no output":
            path.unlink()
        case "bundle":
            sha256 = "b" * 64
        case "choices":
            choices = Choices(subset=("class_1",))
        case "extra":
            choices = Choices(entropy=True)
        case "fewer extras":
            choices = Choices()
        case "report":
            (out / "prediction.json").write_text('{"schema_version": 1}')
        case "touched":
            (scans / "case_1_0000.nii.gz").touch()
    predict_folder(predictor, scans, out, choices=choices, model=model(predictor, sha256))
    assert len(predictor.calls) == 3 + again
    expected = expected_labels(read_volume(scans / "case_1_0000.nii.gz"))
    expected[expected == 2] = 0 if change == "choices" else 2
    np.testing.assert_array_equal(read_labels(path)[0], expected)


def test_cases_of_another_folder_stay_in_the_report(tmp_path: Path, predictor: FakePredictor) -> None:
    for place in ("first", "second"):
        scan_of((5, 6, 7)).write(tmp_path / place / f"{place}.nii.gz")
        result = predict_folder(predictor, tmp_path / place, tmp_path / "out", model=model(predictor))
        assert [case.case for case in result.cases] == [place]
    assert [case.case for case in FolderResult.read(tmp_path / "out/prediction.json").cases] == ["first", "second"]


def test_without_a_bundle_nothing_counts_as_finished(tmp_path: Path, scans: Path, predictor: FakePredictor) -> None:
    for _ in range(2):
        predict_folder(predictor, scans, tmp_path / "out")
    assert len(predictor.calls) == 6


def test_what_a_killed_run_left_half_written_is_taken_away(
    tmp_path: Path, scans: Path, predictor: FakePredictor
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".case_1.nii.gz.k3j4.part").write_bytes(b"half")
    (out / ".other.nii.gz.k3j4.part").write_bytes(b"of somebody else")
    (out / "prediction.jsonl").write_text("")
    predict_folder(predictor, scans, out)
    assert [name for name in listing(out) if name.endswith(".part")] == [".other.nii.gz.k3j4.part"]


def test_a_scan_is_never_overwritten(tmp_path: Path, predictor: FakePredictor) -> None:
    path = scan_of((5, 6, 7)).write(tmp_path / "scan.nii.gz")
    before = path.read_bytes()
    with pytest.raises(DataError, match="would overwrite a scan"):
        predict_folder(predictor, path, tmp_path)
    assert listing(tmp_path) == ["scan.nii.gz"] and path.read_bytes() == before


def test_a_data_set_is_never_overwritten(tmp_path: Path, scans: Path, predictor: FakePredictor) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="looks like a data set") as caught:
        predict_folder(predictor, scans, tmp_path)
    assert caught.value.code == "overwrites"
    assert (tmp_path / "dataset.json").read_text() == "{}"


def test_a_folder_that_can_not_be_made(tmp_path: Path, scans: Path, predictor: FakePredictor) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="can't be written"):
        predict_folder(predictor, scans, tmp_path / "file" / "out")
    assert predictor.calls == []


def test_no_input(tmp_path: Path, predictor: FakePredictor) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent.nii.gz"):
        with pytest.raises(DataError):
            predict_folder(predictor, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_that_does_not_suffice_is_tried_alone_and_then_fails_the_case(tmp_path: Path, scans: Path) -> None:
    def want(count: int) -> None:
        if count in (2, 3, 4):
            raise ResourceError("too much", code="memory")

    predictor = FakePredictor(tiny_plan(), want)
    result = predict_folder(predictor, scans, tmp_path / "out", memory_gib=4.0)
    assert [case.code for case in result.failures] == ["memory"]
    assert [call["held"] for call in predictor.calls] == [True, True, False, True, False]
    # Alone, the network gets everything.
    assert predictor.calls[2]["memory_gib"] == 4.0 and predictor.calls[0]["memory_gib"] < 4.0


def test_a_tight_budget_holds_no_scan_and_reads_none_ahead(
    tmp_path: Path, scans: Path, predictor: FakePredictor
) -> None:
    result = predict_folder(predictor, scans, tmp_path / "out", memory_gib=1e-6)
    assert result.failures == () and not any(call["held"] for call in predictor.calls)


def test_the_next_scan_is_read_while_one_is_computed_and_the_last_is_written(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, wrote = threading.Event(), threading.Event()
    read_scans, write = pipeline.read_scans, Volume.write

    def watched_read(paths: Any) -> Any:
        if "case_2" in str(paths[0]):
            read.set()
        return read_scans(paths)

    def watched_write(self: Volume, path: Any) -> Path:
        done = write(self, path)
        if Path(path).name == "case_0.nii.gz":
            wrote.set()
        return done

    def during(count: int) -> None:
        if count == 2:
            assert read.wait(120) and wrote.wait(120)

    monkeypatch.setattr(pipeline, "read_scans", watched_read)
    monkeypatch.setattr(Volume, "write", watched_write)
    assert predict_folder(FakePredictor(tiny_plan(), during), scans, tmp_path / "out").failures == ()


def test_the_report_of_many_cases_is_not_written_after_each(
    tmp_path: Path, predictor: FakePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        scan_of((3, 4, 5)).write(tmp_path / "in" / f"c{number}.nii.gz")
    # Half a minute may pass even over these, where the machine halts.
    monkeypatch.setattr(run_report, "_AT_MOST_EVERY_S", 3600.0)
    written: list[Path] = []
    write = FolderResult.write
    monkeypatch.setattr(FolderResult, "write", lambda self, path: (written.append(path), write(self, path))[1])
    predict_folder(predictor, tmp_path / "in", tmp_path / "out")
    assert len(written) == 2


def test_values_from_before_a_repair_are_declared_and_counted(tmp_path: Path, scans: Path) -> None:
    class Original(FakePredictor):
        def predict(self, *given: Any, **options: Any) -> Volume:
            labels = super().predict(*given, **options)
            array = labels.array.astype(np.int32)
            array[array == 2] = -4
            return labels.with_array(array[0])

    spec = untrained_spec(3).replace(label_map=((2, -4),))
    result = predict_folder(Original(tiny_plan(spec)), scans, tmp_path / "out")
    expected = expected_labels(read_volume(scans / "case_0_0000.nii.gz"))
    assert result.cases[0].volumes_ml["class_2"] == pytest.approx((expected == 2).sum() / 1000)
    declared = parse_spec(json.loads((tmp_path / "out/dataset.json").read_text()), "out", "out")
    assert declared.label_map == ((2, -4),)


def test_quality_is_told_with_its_flag(tmp_path: Path, scans: Path, predictor: FakePredictor) -> None:
    result = predict_folder(predictor, scans, tmp_path / "out", choices=Choices(quality=True))
    case = result.cases[0]
    assert case.quality is not None and case.quality.agreement is not None and case.quality.agreement < 0.8
    assert "quality" in {flag.code for flag in case.flags}
    assert "look at case_0" in str(case) and result.flagged == result.cases


def test_what_is_written_beside_a_prediction_counts_into_the_memory(
    tmp_path: Path, scans: Path, predictor: FakePredictor
) -> None:
    plain = predict_folder(predictor, scans / "case_0_0000.nii.gz", tmp_path / "a", memory_gib=1.0)
    entropy = Choices(entropy=True, probabilities=True)
    rich = predict_folder(predictor, scans / "case_0_0000.nii.gz", tmp_path / "b", choices=entropy, memory_gib=1.0)
    assert plain.failures == rich.failures == ()
    first, second = (call["memory_gib"] for call in predictor.calls)
    assert first == 1.0 and first - second == pytest.approx(9 * 10 * 11 / 2**30)


def test_a_budget_that_the_entropy_uses_up_is_no_slip_of_the_users(tmp_path: Path, scans: Path) -> None:
    predictor = FakePredictor(tiny_plan())
    predict_folder(predictor, scans, tmp_path / "out", choices=Choices(entropy=True), memory_gib=1e-7)
    # What is left would be less than nothing, which the predictor takes for a number that was mistyped.
    assert all(call["memory_gib"] > 0 for call in predictor.calls)


def test_want_of_memory_is_no_bug(tmp_path: Path, scans: Path) -> None:
    def fail(count: int) -> None:
        raise MemoryError("Unable to allocate 8 GiB")

    result = predict_folder(FakePredictor(tiny_plan(), fail), scans, tmp_path / "out")
    assert {case.code for case in result.failures} == {"memory"} and len(result.failures) == 3
    assert all("--memory-gib" in str(case.message) and "bug" not in str(case.message) for case in result.failures)
