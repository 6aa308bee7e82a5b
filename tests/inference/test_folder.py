from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_network import Threshold, scan_of, tiny_plan
from torch import nn

from sagittal.data.dataset import parse_spec
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.inference.folder import CasePrediction, FolderResult, predict_folder, volumes_ml
from sagittal.inference.predictor import Predictor
from sagittal.networks.build import build_network
from sagittal.plan import DatasetSpec, Label
from sagittal.testing.plans import untrained_spec
from sagittal.volumes import Volume, read_labels, read_volume


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "imagesTs"
    for number in range(3):
        scan_of((9 + number, 10, 11), seed=number).write(folder / f"case_{number}_0000.nii.gz")
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_becomes_label_maps_and_a_report(tmp_path: Path, scans: Path, thresholding: Predictor) -> None:
    told: list[CasePrediction] = []
    result = predict_folder(thresholding, scans, tmp_path / "new" / "out", mirror=False, on_case=told.append)
    out = tmp_path / "new" / "out"
    assert listing(out) == ["case_0.nii.gz", "case_1.nii.gz", "case_2.nii.gz", "dataset.json", "prediction.json"]
    for number in range(3):
        scan = read_volume(scans / f"case_{number}_0000.nii.gz")
        labels, geometry = read_labels(out / f"case_{number}.nii.gz")
        np.testing.assert_array_equal(labels, Threshold.expected(scan.array))
        assert geometry.affine.tobytes() == scan.affine.tobytes()
        assert told[number].volumes_ml["class_2"] == pytest.approx((labels == 2).sum() / 1000)
        assert str(told[number]).startswith(f"case_{number}: done in ") and "class_1" in str(told[number])
    assert result.cases == tuple(told) and result.failures == ()
    assert FolderResult.read(out / "prediction.json") == result


@pytest.mark.parametrize("memory_gib", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_positive_number_is_refused_before_anything_is_written(
    tmp_path: Path, scans: Path, thresholding: Predictor, memory_gib: float
) -> None:
    with pytest.raises(PlanError, match="above 0"):
        predict_folder(thresholding, scans, tmp_path / "out", memory_gib=memory_gib)
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

    class Two(nn.Module):
        def forward(self, x: Any) -> Any:
            return Threshold()(x)[:, 1:]

    out = tmp_path / "out"
    predict_folder(Predictor(tiny_plan(spec), (Two().eval(),), "cpu"), scans, out)
    assert parse_spec(json.loads((out / "dataset.json").read_text()), "out", default_name="x") == spec


@pytest.mark.parametrize(("name", "output"), [("scan.nii.gz", "scan.nii.gz"), ("scan_0000.nii.gz", "scan.nii.gz")])
def test_one_file(tmp_path: Path, thresholding: Predictor, name: str, output: str) -> None:
    scan_of((5, 6, 7)).write(tmp_path / "in" / name)
    result = predict_folder(thresholding, tmp_path / "in" / name, tmp_path / "out")
    assert [case.output for case in result.cases] == [output]
    assert (tmp_path / "out" / output).is_file()


def test_channel_files(tmp_path: Path) -> None:
    class Second(nn.Module):
        def forward(self, x: Any) -> Any:
            return Threshold()(x[:, 1:])

    files = [tmp_path / "t1.nii.gz", tmp_path / "flair.nii.gz"]
    for seed, path in enumerate(files):
        scan_of((5, 6, 7), seed=seed).write(path)
    predictor = Predictor(tiny_plan(untrained_spec(3, channels=2)), (Second().eval(),), "cpu")
    result = predict_folder(predictor, files, tmp_path / "out")
    labels, _ = read_labels(tmp_path / "out" / str(result.cases[0].output))
    np.testing.assert_array_equal(labels, Threshold.expected(scan_of((5, 6, 7), seed=1).array))


def test_one_bad_case_is_reported_and_loses_nothing(tmp_path: Path, scans: Path, thresholding: Predictor) -> None:
    bad = scans / "case_1_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-40])
    result = predict_folder(thresholding, scans, tmp_path / "out")
    assert listing(tmp_path / "out") == ["case_0.nii.gz", "case_2.nii.gz", "dataset.json", "prediction.json"]
    (failure,) = result.failures
    assert failure.case == "case_1" and failure.output is None and "case_1_0000.nii.gz" in str(failure.message)
    assert str(failure).startswith("case_1: failed, ")
    assert [case.status for case in result.cases] == ["done", "failed", "done"]
    assert FolderResult.read(tmp_path / "out" / "prediction.json").failures == (failure,)


def test_full_disk_ends_the_run_and_keeps_what_is_finished(
    tmp_path: Path, scans: Path, thresholding: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Volume.write

    def full_at_the_second(self: Volume, path: Path) -> Path:
        if Path(path).name == "case_1.nii.gz":
            raise ResourceError(f"{path}: can't be written ({errno.ENOSPC}).")
        return write(self, path)

    monkeypatch.setattr(Volume, "write", full_at_the_second)
    with pytest.raises(ResourceError, match=r"case_1\.nii\.gz"):
        predict_folder(thresholding, scans, tmp_path / "out")
    assert listing(tmp_path / "out") == ["case_0.nii.gz", "dataset.json", "prediction.json"]
    assert [case.case for case in FolderResult.read(tmp_path / "out" / "prediction.json").cases] == ["case_0"]


def test_finished_cases_are_computed_again(tmp_path: Path, scans: Path, thresholding: Predictor) -> None:
    out = tmp_path / "out"
    predict_folder(thresholding, scans, out)
    scan_of((9, 10, 11), seed=77).write(scans / "case_0_0000.nii.gz")
    predict_folder(thresholding, scans, out)
    labels, _ = read_labels(out / "case_0.nii.gz")
    np.testing.assert_array_equal(labels, Threshold.expected(scan_of((9, 10, 11), seed=77).array))


def test_a_scan_is_never_overwritten(tmp_path: Path, thresholding: Predictor) -> None:
    path = scan_of((5, 6, 7)).write(tmp_path / "scan.nii.gz")
    before = path.read_bytes()
    with pytest.raises(DataError, match="would overwrite a scan"):
        predict_folder(thresholding, path, tmp_path)
    assert listing(tmp_path) == ["scan.nii.gz"] and path.read_bytes() == before


def test_a_data_set_is_never_overwritten(tmp_path: Path, scans: Path, thresholding: Predictor) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="looks like a data set") as caught:
        predict_folder(thresholding, scans, tmp_path)
    assert caught.value.code == "overwrites"
    assert (tmp_path / "dataset.json").read_text() == "{}"


def test_a_folder_that_can_not_be_made(tmp_path: Path, scans: Path, thresholding: Predictor) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="can't be written"):
        predict_folder(thresholding, scans, tmp_path / "file" / "out")


def test_no_input(tmp_path: Path, thresholding: Predictor) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent.nii.gz"):
        with pytest.raises(DataError):
            predict_folder(thresholding, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_that_does_not_suffice_fails_the_case(tmp_path: Path, scans: Path) -> None:
    plan = tiny_plan()
    predictor = Predictor(plan, (build_network(plan.network, 1, 3).eval(),), "cpu")
    result = predict_folder(predictor, scans, tmp_path / "out", memory_gib=0.1)
    assert [case.code for case in result.failures] == ["memory"] * 3


def test_volumes_count_voxels_in_their_size() -> None:
    spec = DatasetSpec(
        name="r",
        channel_names=("a",),
        labels=(
            Label(name="whole", values=(1, 300)),
            Label(name="core", values=(300,)),
            Label(name="x", values=(999,)),
        ),
        regions_class_order=(1, 300, 999),
        file_ending=".nii",
    )
    array = np.zeros((1, 3, 4, 5), np.uint16)
    array[0, 0, 0] = 1
    array[0, 2, :, 1] = 300
    affine = np.diag([2.0, 0.5, 3.0, 1.0])[:, [2, 1, 0, 3]]
    # 3 mm3 per voxel.
    assert volumes_ml(Volume(array, affine), spec) == pytest.approx({"whole": 0.027, "core": 0.012, "x": 0.0})


def test_values_from_before_a_repair_are_written_declared_and_counted(tmp_path: Path, scans: Path) -> None:
    spec = untrained_spec(3).replace(label_map=((2, -4),))
    predictor = Predictor(tiny_plan(spec), (Threshold(),), "cpu")
    result = predict_folder(predictor, scans, tmp_path / "out", mirror=False)
    labels, _ = read_labels(tmp_path / "out/case_0.nii.gz")
    expected = Threshold.expected(read_volume(scans / "case_0_0000.nii.gz").array)
    np.testing.assert_array_equal(labels, np.where(expected == 2, -4, expected))
    assert result.cases[0].volumes_ml["class_2"] == pytest.approx((expected == 2).sum() / 1000)
    declared = parse_spec(json.loads((tmp_path / "out/dataset.json").read_text()), "out", "out")
    assert declared.label_map == ((2, -4),)
