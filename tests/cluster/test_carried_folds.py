"""Folds on nodes that share only a store: the weights of one machine, also after a loss and after a stop."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sagittal
from sagittal.cluster import carried_folds, publisher
from sagittal.cluster.carried_folds import NAME_IN_STORE, CarriedFolds
from sagittal.cluster.carried_inputs import _add_scan
from sagittal.cluster.publisher import Publisher
from sagittal.cluster.shared import Store
from sagittal.errors import PlanError, ResourceError
from sagittal.testing.datasets import TINY_SETTINGS, write_tiny_dataset
from sagittal.training.cross_validation import FoldTask, Run, own_bundle
from sagittal.training.fold_process import report_of
from sagittal.training.run import TrainResult, train
from sagittal.training.side_by_side import Ending
from sagittal.training.signals import StopFlag
from sagittal.training.stages import RunOptions

pytest.importorskip("ray", reason="no Ray: pip install 'sagittal[ray]'")

SETTINGS = {
    **TINY_SETTINGS,
    "schedule.steps": 6,
    "schedule.validations": 0,
    "schedule.keep": "last",
    "training.folds": 2,
    "training.deterministic": True,
}


class _Lost(BaseException):
    """The node is gone: nothing of it is done any more."""


class _AtStep(StopFlag):
    """Does something once the fold has three steps behind it and a checkpoint of them is published."""

    def __init__(self, act: Callable[[StopFlag], None], store: Store, folder: Path) -> None:
        super().__init__()
        self._act, self._store, self._folder = act, store, folder

    def __bool__(self) -> bool:
        if self.reason is None and list(self._folder.glob("**/checkpoint_00000003.sha256")):
            until = time.monotonic() + 300
            while not any("attempts" in name and name.endswith("folder.json") for name in self._store.list()):
                assert time.monotonic() < until, "nothing was published"
                time.sleep(0.02)
            self._act(self)
        return self.reason is not None


class _Nodes:
    """Does in this process what Ray's nodes do, each with a TMPDIR of its own, while the driver's folder is away.

    Args:
        road: carries folds.
        root: with `driver`, the only folder that the driver uses beside the store.
        act: what happens to the first attempt at fold 0 after three steps.
    """

    def __init__(self, road: CarriedFolds, root: Path, act: Callable[[StopFlag], None] | None = None) -> None:
        self.road, self.root, self.act = road, root, act
        self.said: list[str] = []
        self.nodes = 0

    def __call__(self, run: Run, names: list[str], stop: StopFlag) -> Iterator[Ending]:
        self.road.begin(run, names, ())
        try:
            for name in names:
                report = self._trained(run, name)
                stop.reason = report.get("ended") if report.get("ended") == "interrupted" else None
                ending = self.road.home(Ending(name, report, 0))
                yield ending
                self.road.joined(ending)
                if stop:
                    return
        finally:
            self.road.end(lambda: ())

    def _trained(self, run: Run, name: str) -> dict[str, Any]:
        options = dataclasses.replace(run.options, carrier=None, say=_nobody)
        own = dataclasses.replace(run, out=own_bundle(run, name), options=options)
        for number in range(3):
            # Nothing of this process but what can travel.
            sent = pickle.dumps((FoldTask(own, name, 1, None), self.road.hand(name, number)))
            try:
                return self._on_node(sent)
            except _Lost:
                self.nodes += 1
        raise AssertionError("lost too often")

    def _on_node(self, sent: bytes) -> dict[str, Any]:
        task, hand = pickle.loads(sent)
        node = self.root / f"node{self.nodes}"
        node.mkdir(exist_ok=True)
        stop, act = StopFlag(), self.act
        if act is not None and task.name == "0":
            stop, self.act = _AtStep(act, Store(hand.url), node), None
        away = (self.root / "driver").rename(self.root / "away")

        def trained(task: FoldTask, as_told: Callable[[str], str]) -> dict[str, Any]:
            assert task.run.folder.is_relative_to(node) and task.run.data.folder.is_relative_to(node)
            return report_of(task, stop, lambda line: self.said.append(as_told(line)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(node))
            try:
                report: dict[str, Any] = hand.around(task, f"n{self.nodes}", stop, self.said.append, trained)
                return report
            finally:
                away.rename(self.root / "driver")


def _nobody(line: str) -> None:
    """Drop a line."""


def _lose(flag: StopFlag) -> None:
    raise _Lost


def _interrupt(flag: StopFlag) -> None:
    flag.reason = "interrupted"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver's folder, with the bundle `here` that one machine trains."""
    root = tmp_path_factory.mktemp("one") / "driver"
    write_tiny_dataset(root / "data", cases=6)
    (root / "data" / "patients.csv").write_text(
        "case,patient\n" + "".join(f"case_{number},p{number // 2}\n" for number in range(6))
    )
    _train(root, "here", fold="all")
    return root


@pytest.fixture
def root(here: Path, tmp_path: Path) -> Path:
    shutil.copytree(here, tmp_path / "driver")
    return tmp_path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(publisher, "FIRST_WAIT_S", 0.05)


def _train(
    driver: Path,
    out: str,
    carrier: _Nodes | None = None,
    *,
    fold: Any = "0",
    init_from: Path | None = None,
    **more: Any,
) -> TrainResult:
    options = RunOptions(
        device="cpu",
        cache=driver / "cache",
        known=driver / "known",
        workers=1,
        carrier=carrier,
        checkpoint_every_s=0.0,
        **more,
    )
    return train(driver / "data", driver / out, settings=SETTINGS, fold=fold, options=options, init_from=init_from)


def _same_weights(driver: Path, out: str) -> None:
    one, other = (sagittal.read_bundle(driver / name) for name in ("here", out))
    for name in other.weight_names:
        parts = [bundle.path / "weights" / f"{name}.safetensors" for bundle in (one, other)]
        assert parts[0].read_bytes() == parts[1].read_bytes()
    for name, entry in other.metrics["folds"].items():
        assert entry["scores"] == one.metrics["folds"][name]["scores"]


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_fold_goes_on_elsewhere_from_what_its_lost_node_published(
    kind: str, root: Path, request: pytest.FixtureRequest
) -> None:
    url = str(root / "store") if kind == "folder" else f"{request.getfixturevalue('s3')}/{root.name}"
    nodes, said = _Nodes(CarriedFolds(url), root, _lose), list[str]()
    _train(root / "driver", "there", nodes, say=said.append, fold="all" if kind == "folder" else "0")
    _same_weights(root / "driver", "there")
    assert nodes.nodes == 1 and any("goes on after step" in line for line in nodes.said)
    # The lost node, and the next one for both folds.
    assert sum("parts of the data from the store" in line for line in nodes.said) == 2
    assert any(f"report: {root / 'driver' / 'there.run' / 'fold_0'}" in line for line in nodes.said)
    there, alone = (
        {path.relative_to(fold).as_posix() for path in fold.rglob("*") if path.is_file()}
        for fold in (root / "driver" / f"{name}.run" / "fold_0" for name in ("there", "here"))
    )
    assert there == alone
    assert Store(url).list() == [] and not (root / "driver" / "there.run" / NAME_IN_STORE).exists()
    assert not any("stays there" in line for line in said)
    assert not list(root.glob("node1/sagittal-*/run-*")), "a fold left its copy behind"


@pytest.mark.parametrize("lost", ["the driver's copy", "the store"])
def test_a_stopped_fold_goes_on_from_the_store_or_from_what_came_here(lost: str, root: Path) -> None:
    url, said = str(root / "store"), list[str]()
    result = _train(root / "driver", "there", _Nodes(CarriedFolds(url), root, _interrupt), say=said.append)
    assert result.ended == "interrupted"
    assert any("stays there for --resume" in line for line in said) and Store(url).list()
    fold = root / "driver" / "there.run" / "fold_0"
    assert list(fold.glob("checkpoint_*.sha256"))
    shutil.rmtree(root / "store" if lost == "the store" else fold)
    nodes = _Nodes(CarriedFolds(url), root)
    assert _train(root / "driver", "there", nodes, resume=True).complete
    assert any("goes on after step" in line for line in nodes.said)
    _same_weights(root / "driver", "there")
    assert Store(url).list() == []


def test_one_fold_fails_and_another_starts_from_carried_weights_through_a_store_that_falters(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(flag: StopFlag) -> None:
        raise ResourceError("the disk of that node is full")

    publish, calls = Store.publish, list[str]()

    def falters(store: Store, name: str, *rest: Any) -> Any:
        calls.append(name)
        if len(calls) < 3:
            raise ResourceError("no network", code="store")
        return publish(store, name, *rest)

    monkeypatch.setattr(Store, "publish", falters)
    nodes, driver = _Nodes(CarriedFolds(str(root / "store")), root, fail), root / "driver"
    with pytest.raises(sagittal.TrainingError, match="1 of 2 folds failed"):
        _train(driver, "there", nodes, fold="all", init_from=driver / "here")
    assert any("tried again: no network" in line for line in nodes.said)
    bundle = sagittal.read_bundle(driver / "there")
    assert bundle.weight_names == ("fold_1",) and "started_from" in bundle.metrics["folds"]["1"]
    left = Store(root / "store").list()
    assert any("/folds/0/" in name for name in left) and not any("/folds/1/" in name for name in left)
    assert list((driver / "there.run" / "fold_0").glob("checkpoint_*.sha256"))


def test_what_can_not_be_published_at_the_end_fails_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "LAST_S", 2.0)
    folder = tmp_path / "sagittal-train-0-n" / "run-a-0" / "fold_1"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("{}")
    store = Store(tmp_path / "store")

    def fails(*_: Any) -> None:
        raise ResourceError("no network", code="store")

    monkeypatch.setattr(Store, "publish", fails)
    said: list[str] = []
    with Publisher(store, "x", folder, lambda: True, said.append) as sending:
        pass
    with pytest.raises(ResourceError, match=r"no network.*go on with --resume") as told:
        sending.last()
    kept = tmp_path / "sagittal-kept-0-n-run-a-0" / "fold_1"
    assert str(kept) in told.value.message and (kept / "log.jsonl").read_text() == "{}"
    assert told.value.code == "not_published" and said


def test_an_attempt_that_does_not_count_any_more_publishes_nothing(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "run" / "fold_0"
    folder.mkdir(parents=True)
    counts = [True]
    with Publisher(store, "x", folder, lambda: counts[0], _nobody) as sending:
        (folder / "checkpoint_00000001.safetensors").write_bytes(b"1")
        (folder / "checkpoint_00000001.sha256").write_bytes(b"1")
        until = time.monotonic() + 300
        while store.published("x") is None and time.monotonic() < until:
            time.sleep(0.01)
        assert store.published("x") is not None
        counts[0] = False
    (folder / "log.jsonl").write_bytes(b"later")
    sending.last()
    published = store.published("x")
    assert published is not None and set(published.files) == {
        "checkpoint_00000001.safetensors",
        "checkpoint_00000001.sha256",
    }


def test_of_a_fold_the_newest_finished_checkpoint_and_copies_of_its_logs_are_set_aside(tmp_path: Path) -> None:
    folder, aside = tmp_path / "fold_0", tmp_path / "aside"
    (folder / "tensorboard").mkdir(parents=True)
    aside.mkdir()
    for name in (
        "checkpoint_00000001.safetensors",
        "checkpoint_00000001.sha256",
        "checkpoint_00000002.safetensors",
        "checkpoint_00000002.sha256",
        "checkpoint_00000003.safetensors",
        "best_00000001.safetensors",
        "log.jsonl",
        ".log.x.part",
        "tensorboard/events",
    ):
        (folder / name).write_bytes(name.encode())
    assert publisher.set_aside(folder, aside) == "checkpoint_00000002"
    assert {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()} == {
        "checkpoint_00000002.safetensors",
        "checkpoint_00000002.sha256",
        "best_00000001.safetensors",
        "log.jsonl",
        "tensorboard/events",
    }
    with (folder / "log.jsonl").open("ab") as log:
        log.write(b"more")
    (folder / "checkpoint_00000002.safetensors").unlink()
    assert (aside / "log.jsonl").read_bytes() == b"log.jsonl"
    assert (aside / "checkpoint_00000002.safetensors").read_bytes() == b"checkpoint_00000002.safetensors"


def test_scans_keep_their_places_and_those_from_elsewhere_get_one(tmp_path: Path) -> None:
    data, files = tmp_path / "data", dict[str, Path]()
    for path in (data / "imagesTr" / "a_0000.mhd", tmp_path / "other" / "b.mhd"):
        path.parent.mkdir(parents=True)
        fields = "ObjectType = Image", "NDims = 3", "DimSize = 2 3 4", "ElementType = MET_UCHAR"
        path.write_text("\n".join((*fields, "BinaryData = True", f"ElementDataFile = {path.stem}.raw")))
        path.with_suffix(".raw").write_bytes(bytes(24))
    assert _add_scan(files, data, data / "imagesTr" / "a_0000.mhd", 0) == "imagesTr/a_0000.mhd"
    there = _add_scan(files, data, tmp_path / "other" / "b.mhd", 7)
    assert there.startswith("elsewhere/7/") and there.endswith("/b.mhd")
    assert set(files) == {
        "data/imagesTr/a_0000.mhd",
        "data/imagesTr/a_0000.raw",
        f"data/{there}",
        f"data/{there.removesuffix('.mhd')}.raw",
    }


def test_mlflow_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(options=RunOptions(trackers=("mlflow",)))
    with pytest.raises(PlanError, match="one database for all folds"):
        CarriedFolds(str(tmp_path / "store")).begin(run, ["0"], ())
    assert Store(tmp_path / "store").list() == []


def test_a_run_keeps_its_name_in_the_store(tmp_path: Path) -> None:
    name = carried_folds._name_in_store(tmp_path)
    assert carried_folds._name_in_store(tmp_path) == name
    (tmp_path / NAME_IN_STORE).write_text("../../elsewhere")
    assert carried_folds._name_in_store(tmp_path) != name
