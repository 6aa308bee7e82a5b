"""8-bit networks: made by NNCF where it is installed; kept, found and refused wherever they come from."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest

from sagittal.bundle import Bundle, read_bundle
from sagittal.data.label_index import label_index
from sagittal.errors import BundleError, DataError, PlanError, ResourceError
from sagittal.inference.engines import openvino_int8
from sagittal.inference.engines.choice import load_engine
from sagittal.inference.engines.int8_folder import REPORT, read_report
from sagittal.inference.engines.openvino_int8 import folder_of, load, quantize
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.datasets import write_tiny_dataset
from sagittal.testing.plans import untrained_plan, untrained_spec

SMALL: dict[str, Any] = {
    "network.embed_dims": [4, 4, 4, 4],
    "network.num_heads": [1, 1, 1, 1],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 4,
}
WINDOW = (16, 16, 20)
FOLDS = ("fold_0", "fold_1")


class FakeNNCF(SimpleNamespace):
    """NNCF, but for what it does: networks come back as they are."""

    QuantizationPreset = SimpleNamespace(MIXED="mixed")
    ModelType = SimpleNamespace(TRANSFORMER="transformer")
    AdvancedSmoothQuantParameters = AdvancedQuantizationParameters = SimpleNamespace
    Dataset = list

    def __init__(self) -> None:
        super().__init__(windows=[])

    def quantize(self, model: openvino.Model, windows: list[Any], **options: Any) -> openvino.Model:
        assert options["subset_size"] == len(windows)
        assert options["model_type"] == "transformer"
        self.windows.append(windows)
        return model


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    plan = untrained_plan("segformer3d", untrained_spec(3), patch_size=WINDOW, settings=SMALL)
    return read_bundle(write_random_bundle(tmp_path / "b", plan, folds=FOLDS))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("d"), cases=3)


@pytest.fixture
def nncf(monkeypatch: pytest.MonkeyPatch) -> FakeNNCF:
    fake = FakeNNCF()
    monkeypatch.setattr(openvino_int8, "_nncf", lambda: fake)
    return fake


def losing(points: float) -> Callable[..., tuple[float, float]]:
    return lambda *_: (90.0, 90.0 - points)


def test_made_measured_and_used(bundle: Bundle, dataset: Path, nncf: FakeNNCF) -> None:
    said: list[str] = []
    report = quantize(bundle, dataset, say=said.append)
    assert folder_of(bundle) == bundle.path.with_name("b.int8")
    assert report == read_report(folder_of(bundle))
    assert (report.calibration_cases, report.scored_cases) == (2, 1)
    # What was given back is what was taken, so nothing is lost but by rounding.
    assert abs(report.points_lost) < 0.1
    assert "1 cases" in said[0]
    assert len(nncf.windows) == len(FOLDS)
    assert {window.shape for window in nncf.windows[0]} == {(1, 1, *WINDOW)}
    engine = load_engine(bundle, "cpu", precision="int8")
    assert (engine.precision, engine.name, engine.head) == ("int8", "openvino", None)
    # They were made with their heads and last interpolations in them, unlike the network in float32.
    assert load_engine(bundle, "cpu", "openvino").coarse_stride((16, 16, 32)) == 4
    assert engine.coarse_stride((16, 16, 32)) == 1
    window = np.random.default_rng(0).standard_normal((2, 1, *WINDOW)).astype(np.float32)
    exact = load_engine(bundle, "cpu", "openvino").logits(window)
    np.testing.assert_allclose(engine.logits(window), exact, atol=1e-4)
    assert engine.memory(WINDOW).per_window_bytes > 0


def test_a_bundle_without_them_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ResourceError, match="Make them with 'sagittal quantize"):
        load_engine(bundle, "cpu", precision="int8")


@pytest.mark.usefixtures("nncf")
def test_those_of_another_bundle_are_refused(bundle: Bundle, dataset: Path, tmp_path: Path) -> None:
    quantize(bundle, dataset)
    other = read_bundle(write_random_bundle(tmp_path / "other", bundle.plan, folds=FOLDS[:1]))
    with pytest.raises(BundleError, match="made of another bundle"):
        load(other, folder=folder_of(bundle))


@pytest.mark.usefixtures("nncf")
def test_files_that_changed_are_refused(bundle: Bundle, dataset: Path, tmp_path: Path) -> None:
    quantize(bundle, dataset)
    changed = shutil.copytree(folder_of(bundle), tmp_path / "changed")
    numbers = changed / "fold_1.bin"
    numbers.write_bytes(numbers.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match="fold_1"):
        load(bundle, folder=changed)
    report = json.loads((changed / REPORT).read_text())
    del report["files"]["fold_0.xml"]
    (changed / REPORT).write_text(json.dumps(report))
    with pytest.raises(BundleError, match=r"lists no fold_0\.xml"):
        load(bundle, folder=changed)
    (changed / REPORT).write_text("{}")
    with pytest.raises(PlanError):
        load(bundle, folder=changed)


@pytest.mark.usefixtures("nncf")
def test_more_than_half_a_point_is_refused(bundle: Bundle, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_int8, "_mean_dice", losing(0.51))
    with pytest.raises(ResourceError, match="nothing was written"):
        quantize(bundle, dataset)
    assert {path.name for path in bundle.path.parent.iterdir()} == {"b"}
    monkeypatch.setattr(openvino_int8, "_mean_dice", losing(0.49))
    assert quantize(bundle, dataset).points_lost == pytest.approx(0.49)
    assert quantize(bundle, dataset, cases=2).scored_cases == 1


@pytest.mark.usefixtures("nncf")
def test_one_case_is_too_few(bundle: Bundle, dataset: Path) -> None:
    with pytest.raises(DataError, match="at least 2"):
        quantize(bundle, dataset, cases=1)


def test_without_nncf(bundle: Bundle, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ResourceError, match=r"sagittal\[int8\]"):
        quantize(bundle, dataset)


@pytest.mark.usefixtures("nncf")
def test_networks_without_an_openvino_form_are_refused(bundle: Bundle, dataset: Path) -> None:
    plan = untrained_plan("unetr", untrained_spec(3), patch_size=(16, 16, 16))
    other = Bundle(bundle.path, bundle.manifest, plan, {})
    with pytest.raises(ResourceError, match="8-bit"):
        quantize(other, dataset)


def test_dice_of_the_classes_that_the_reference_has() -> None:
    spec = untrained_spec(4).replace(ignore_value=9, label_map=((2, -1),))
    reference = np.array([[[1, 1, 2, 0, 4]]], np.uint8)
    predicted = np.array([[[1, 0, -1, 3, 1]]], np.int32)
    found = list(openvino_int8._class_dice(predicted, reference, label_index(spec)))
    # Class 1: one of two voxels, what lies in the ignored one apart. Class 2: its original value. Class 3 is absent.
    assert found == [pytest.approx(2 / 3), 1.0]


@pytest.mark.slow
def test_with_nncf(bundle: Bundle, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf")
    monkeypatch.setattr(openvino_int8, "_mean_dice", losing(0))
    quantize(bundle, dataset)
    text = (folder_of(bundle) / "fold_0.xml").read_text()
    assert "FakeQuantize" in text
    window = np.random.default_rng(0).standard_normal((1, 1, *WINDOW)).astype(np.float32)
    exact = load_engine(bundle, "cpu", "openvino").logits(window)
    apart = np.abs(load(bundle).logits(window) - exact).max()
    assert 0 < apart < 0.3 * np.abs(exact).max()


@pytest.mark.usefixtures("nncf")
def test_a_folder_of_something_else_is_never_replaced(
    bundle: Bundle, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_int8, "_mean_dice", losing(0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    with pytest.raises(ResourceError, match="holds no 8-bit networks"):
        quantize(bundle, dataset, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "the only copy"
    quantize(bundle, dataset, out=tmp_path / "new" / "int8")
    assert quantize(bundle, dataset, out=tmp_path / "new" / "int8") == read_report(tmp_path / "new" / "int8")


@pytest.mark.usefixtures("nncf")
def test_a_disk_that_fills_up_leaves_the_former_networks(
    bundle: Bundle, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_int8, "_mean_dice", losing(0))
    before = quantize(bundle, dataset)

    def full(*arguments: object, **options: object) -> None:
        raise RuntimeError("Can't open bin file")

    monkeypatch.setattr(openvino_int8.openvino, "save_model", full)
    with pytest.raises(ResourceError, match="fold_0 can't be written there") as caught:
        quantize(bundle, dataset)
    assert caught.value.code == "disk" and read_report(folder_of(bundle)) == before
    assert {path.name for path in bundle.path.parent.iterdir()} == {"b", "b.int8"}


@pytest.mark.usefixtures("nncf")
def test_networks_that_were_put_aside_are_found(bundle: Bundle, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_int8, "_mean_dice", losing(0))
    quantize(bundle, dataset)
    folder_of(bundle).rename(bundle.path.with_name(".b.int8.previous"))
    assert load(bundle).precision == "int8"
