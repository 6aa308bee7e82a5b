"""What a worker does on its node and what is refused before it begins, without a cluster."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sagittal.bundle import read_bundle
from sagittal.cluster import predict
from sagittal.cluster.evaluate import ScoringHand
from sagittal.cluster.pool import Told
from sagittal.cluster.predict import Crew, _ByStore, _SameFolders, device_on, needs_of
from sagittal.cluster.predict_hand import PredictHand, Task
from sagittal.cluster.ray_session import Needs, Node
from sagittal.cluster.shared import Store
from sagittal.data.dataset import Case
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.evaluation import ClassSet
from sagittal.evaluation.settings import EvaluationSettings
from sagittal.inference.outputs import input_state
from sagittal.inference.pipeline import Job
from sagittal.inference.processes import Loading
from sagittal.inference.run_report import CasePrediction, Choices, FileStamp, FolderResult
from sagittal.report.scoring import Job as ScoringJob
from sagittal.report.scoring import Outcome
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.volumes import Volume
from sagittal.volumes.volume import read_volume

pytest.importorskip("openvino", reason="OpenVINO starts faster than PyTorch")
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]


class Nodes:
    """A session as far as sizes go."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.nodes = tuple(Node(str(number), "n", cpus, gpus) for number, (cpus, gpus) in enumerate(sizes))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"network.channels": 4, "network.block_counts": [1] * 9, "patch.size": [16, 16, 16]}
    return write_untrained_bundle(tmp_path_factory.mktemp("b") / "bundle", "mednext-s", 3, settings=settings)


def write_scan(path: Path, seed: int = 0) -> Case:
    scan = np.random.default_rng(seed).normal(size=(1, 14, 18, 16)).astype(np.float32)
    return Case(path.name.removesuffix(".nii.gz"), (Volume(scan, AFFINE).write(path),))


def job_in(folder: Path, bundle: Path) -> Job:
    """A job whose output folder has the report of a run that began."""
    read = read_bundle(bundle)
    FolderResult(
        status="running",
        started="2020-01-01T00:00:00+00:00",
        seconds=0.0,
        bundle="b",
        bundle_sha256=None,
        network="n",
        engine="e",
        devices=("cpu",),
        versions={},
        choices=Choices(mirror=False),
        cases=(),
    ).write(folder / "prediction.json")
    return Job(folder, Choices(mirror=False), read.manifest.manifest_sha256)


def task_of(bundle: Path, job: Job, sample: Case) -> Task:
    return _SameFolders().task(Crew(), Needs(), Loading(bundle, "openvino"), job, sample)


def test_workers_take_gpus_where_there_are_any_and_fit_the_smallest_node() -> None:
    cpus, mixed = Nodes((2, 0), (16, 0)), Nodes((32, 0), (12, 4), (96, 8))
    assert device_on(cpus, "auto") == "cpu" and device_on(mixed, "auto") == "cuda"  # type: ignore[arg-type]
    assert device_on(mixed, "cpu") == "cpu"  # type: ignore[arg-type]
    assert needs_of(cpus, Crew()) == Needs(2) and needs_of(Nodes((64, 0)), Crew()) == Needs(8)  # type: ignore[arg-type]
    assert needs_of(mixed, Crew("cuda")) == Needs(3, 1)  # type: ignore[arg-type]
    assert needs_of(mixed, Crew("cuda", cpus=10)) == Needs(10, 1)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="cuda:1: on a cluster each worker has a device of its own"):
        device_on(mixed, "cuda:1")  # type: ignore[arg-type]


def test_a_worker_predicts_what_it_holds_one_behind_the_other(tmp_path: Path, bundle: Path) -> None:
    cases = [write_scan(tmp_path / "in" / f"c{number}.nii.gz", number) for number in range(4)]
    (tmp_path / "in" / "c1.nii.gz").write_bytes(b"no scan")
    hand = PredictHand(task_of(bundle, job_in(tmp_path / "out", bundle), cases[0]))
    assert hand.open(2) == "cpu (openvino)"
    with ThreadPoolExecutor(4) as pool:
        told = [CasePrediction.from_json(text) for text in pool.map(hand.do, map(_SameFolders().brief, cases))]
    later = CasePrediction.from_json(hand.do(_SameFolders().brief(cases[2])))
    hand.close()
    assert [(case.case, case.status) for case in told] == [
        ("c0", "done"),
        ("c1", "failed"),
        ("c2", "done"),
        ("c3", "done"),
    ]
    assert later.files == told[2].files, "computed twice, a case has the same bytes"
    assert (tmp_path / "out" / "c0.nii.gz").is_file() and told[0].device == "cpu (openvino)"


def test_what_ends_a_worker_reaches_all_who_wait_and_who_come(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(folder: Path, path: Path) -> FileStamp:
        raise ResourceError("the disk is full", code="disk")

    monkeypatch.setattr("sagittal.inference.pipeline.stamp_output", is_full)
    case = write_scan(tmp_path / "in" / "c0.nii.gz")
    hand = PredictHand(task_of(bundle, job_in(tmp_path / "out", bundle), case))
    hand.open(1)
    for _ in range(2):
        with pytest.raises(ResourceError, match="the disk is full"):
            hand.do(_SameFolders().brief(case))


def test_a_model_that_does_not_load_is_told_when_the_worker_opens(tmp_path: Path, bundle: Path) -> None:
    case = write_scan(tmp_path / "in" / "c0.nii.gz")
    task = task_of(bundle, job_in(tmp_path / "out", bundle), case)
    with pytest.raises(PlanError, match="nothing"):
        PredictHand(replace(task, loading=replace(task.loading, engine="nothing"))).open(1)


@pytest.mark.parametrize("lacks", ["out", "scans", "bundle", "other run"])
def test_a_node_that_does_not_see_the_folders_says_which(lacks: str, tmp_path: Path, bundle: Path) -> None:
    case = write_scan(tmp_path / "in" / "c0.nii.gz")
    task = task_of(bundle, job_in(tmp_path / "out", bundle), case)
    match lacks:
        case "out":
            shutil.rmtree(tmp_path / "out")
        case "scans":
            shutil.rmtree(tmp_path / "in")
        case "bundle":
            task = replace(task, loading=replace(task.loading, bundle=tmp_path / "elsewhere"))
        case _:
            task = replace(task, run="2021-01-01T00:00:00+00:00")
    expected = {"scans": "the scans", "bundle": "the bundle"}.get(lacks, "the output folder")
    with pytest.raises(ResourceError, match=f"does not see {expected}.*--store") as told:
        PredictHand(task).open(1)
    assert told.value.code == "not_shared"


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "file"])
def test_by_a_store_scans_go_and_results_come_and_nothing_stays(tmp_path: Path, bundle: Path, packed: bool) -> None:
    case = write_scan(tmp_path / "in" / "c0.nii.gz")
    if packed:
        from sagittal.bundle.package import pack

        bundle = pack(bundle, tmp_path / "model.sagittal")
    job = replace(Job(tmp_path / "out", Choices(mirror=False, preview=True), "0" * 64), memory_gib=2.0)
    store = Store(tmp_path / "store")
    road = _ByStore(store, job)
    task = road.task(Crew(store=store.url), Needs(), Loading(bundle, "openvino"), job, case)
    hand = PredictHand(task)
    hand.open(1)
    told = road.home(case, CasePrediction.from_json(hand.do(road.brief(case))))
    assert told.status == "done", told.message
    assert told.input is not None and told.input.state == input_state(case)
    assert [stamp.path for stamp in told.files] == ["c0.nii.gz", "previews/c0.png"]
    assert all((tmp_path / "out" / stamp.path).stat().st_size == stamp.size_bytes for stamp in told.files)
    assert hand._scratch is not None and hand._scratch.is_dir()
    assert hand._scratch.name.startswith(f"sagittal-{task.prefix}-"), "by which the run's end finds it on each node"
    hand.close()
    road.end()
    assert store.list() == [] and not hand._scratch.exists()


def test_handing_out_again_does_not_send_a_scan_twice(tmp_path: Path) -> None:
    case = write_scan(tmp_path / "in" / "c0.nii.gz")
    road = _ByStore(Store(tmp_path / "store"), Job(tmp_path / "out", Choices()))
    first = road.brief(case)
    case.images[0].unlink()
    assert road.brief(case) == first


def fetched(road: _ByStore, case: Case, folder: Path) -> list[Path]:
    """The scans of a case as a node has them."""
    hand = PredictHand(road.task(Crew(), Needs(), Loading(Path(__file__), "openvino"), road._job, case))
    hand._store = road._store
    images = json.loads(road.brief(case))["images"]
    return [hand._fetched(image, folder / str(number)) for number, image in enumerate(images)]


def by_store(folder: Path) -> _ByStore:
    return _ByStore(Store(folder / "store"), Job(folder / "out", Choices()))


@pytest.mark.parametrize("name", ["c.mhd", "c.nhdr", "c.hdr", "c#1.nii.gz", "c.mha"])
def test_all_files_of_a_scan_go_through_a_store(tmp_path: Path, name: str) -> None:
    scan = write_scan(tmp_path / "in" / name).images[0]
    (found,) = fetched(by_store(tmp_path), Case("c", (scan,)), tmp_path / "node")
    assert found.name == name
    assert np.array_equal(read_volume(found).array, read_volume(scan).array)
    assert {path.name for path in found.parent.iterdir()} == {path.name for path in scan.parent.iterdir()}


def test_a_link_goes_by_its_own_name(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "in" / "c.nii.gz").images[0]
    scan.rename(tmp_path / "3f2a")
    scan.symlink_to(tmp_path / "3f2a")
    (found,) = fetched(by_store(tmp_path), Case("c", (scan,)), tmp_path / "node")
    assert found.name == "c.nii.gz" and read_volume(found).array.shape == (1, 14, 18, 16)


def test_a_series_of_a_medium_goes_with_the_files_that_its_directory_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DICOMDIR", "A/1", "A/2", "other"):
        (tmp_path / "cd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cd" / name).write_bytes(name.encode())
    listed = [tmp_path / "cd" / name for name in ("A/1", "A/2")]
    monkeypatch.setattr("sagittal.volumes.dicom.referenced_files", lambda path: listed)
    monkeypatch.setattr("sagittal.volumes.io.is_dicom", lambda path: True)
    study = Case("a#1", (tmp_path / "cd" / "DICOMDIR#1.2.3",))
    (found,) = fetched(by_store(tmp_path), study, tmp_path / "node")
    assert found == tmp_path / "node" / "0" / "DICOMDIR#1.2.3"
    names = {path.relative_to(found.parent).as_posix() for path in found.parent.rglob("*") if path.is_file()}
    assert names == {"DICOMDIR", "A/1", "A/2"}


def test_forgetting_a_case_leaves_one_in_the_folder_of_its_name(tmp_path: Path) -> None:
    road = by_store(tmp_path)
    cases = [Case(name, write_scan(tmp_path / "in" / f"{name}.nii.gz").images) for name in ("a", "a/b")]
    for case in cases:
        road.brief(case)
    road.forget("a")
    (found,) = fetched(road, cases[1], tmp_path / "node")
    assert found.is_file()


def test_a_scan_that_can_not_be_read_is_told_as_such_and_a_store_that_can_not_be_written_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    road, link = by_store(tmp_path), tmp_path / "c.nii.gz"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"c\.nii\.gz: no such file") as told:
        road.brief(Case("c", (link,)))
    assert told.value.code == "unreadable"
    case = write_scan(tmp_path / "d.nii.gz")
    for code, kind in (("unreadable", DataError), ("changing", DataError), ("store", ResourceError)):

        def refuse(name: str, files: object, code: str = code) -> None:
            raise ResourceError("no", code=code)

        monkeypatch.setattr(road._store, "publish_files", refuse)
        with pytest.raises(kind):
            road.brief(case)


def test_a_scan_that_can_not_be_sent_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pooled:
        """A pool that asks for what it would hand out, and answers nothing."""

        def __init__(self, *given: object, **options: object) -> None:
            pass

        def run(self, items: list[str], brief: Callable[[str], str | None], told: Told) -> None:
            briefs.update({item: brief(item) for item in items})

    briefs: dict[str, str | None] = {}
    told: list[CasePrediction] = []
    monkeypatch.setattr(predict, "Pool", Pooled)
    cases = [write_scan(tmp_path / "in" / f"c{number}.nii.gz", number) for number in range(2)]
    (tmp_path / "in" / "dangling.nii.gz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "header.mhd").write_bytes(b"no header")
    cases += [
        Case(path.stem, (path,)) for path in (tmp_path / "in" / "dangling.nii.gz", tmp_path / "in" / "header.mhd")
    ]
    monkeypatch.setattr(predict, "remove_from", lambda nodes, run: None)
    crew = Crew(store=str(tmp_path / "store"))
    job, loading = Job(tmp_path / "out", Choices()), Loading(Path(__file__), "openvino")
    predict.predict_on_ray(Nodes((1, 0)), crew, loading, job, cases, told.append)  # type: ignore[arg-type]
    assert [case.id for case in cases if briefs[case.id] is None] == ["dangling.nii", "header"]
    assert [(case.case, case.status, case.code) for case in told] == [
        ("dangling.nii", "failed", "unreadable"),
        ("header", "failed", "unreadable"),
    ]
    assert told[0].message is not None and str(tmp_path / "in" / "dangling.nii.gz") in told[0].message


def test_however_a_run_ends_its_scans_go_from_nodes_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        """A pool that is stopped when a scan was sent."""

        def __init__(self, *given: object, **options: object) -> None:
            pass

        def run(self, items: list[str], brief: Callable[[str], str | None], told: Told) -> None:
            brief(items[0])
            raise KeyboardInterrupt

    removed: list[tuple[list[str], str]] = []
    store, session = Store(tmp_path / "store"), Nodes((1, 0), (1, 0))

    def remove(nodes: Callable[[], tuple[Node, ...]], run: str) -> None:
        assert any(name.startswith(f"{run}/scans/") for name in store.list()), "while workers could still fetch"
        removed.append(([node.id for node in nodes()], run))

    monkeypatch.setattr(predict, "Pool", Stopped)
    monkeypatch.setattr(predict, "remove_from", remove)
    case = write_scan(tmp_path / "in" / "c0.nii.gz")
    job, loading = Job(tmp_path / "out", Choices()), Loading(Path(__file__), "openvino")
    with pytest.raises(KeyboardInterrupt):
        predict.predict_on_ray(session, Crew(store=store.url), loading, job, [case], lambda told: None)  # type: ignore[arg-type]
    ((nodes, run),) = removed
    assert nodes == ["0", "1"] and run.startswith("predict-") and store.list() == []


def scoring_job(folder: Path, prediction: str) -> ScoringJob:
    return ScoringJob(
        case="c0",
        reference=folder / "reference.nii.gz",
        prediction=folder / prediction,
        probabilities=None,
        patient=None,
        classes=ClassSet.of_values([1]),
        settings=EvaluationSettings(),
        strict=False,
    )


def test_scoring_on_a_node_gives_the_case_or_its_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Volume(np.ones((1, 5, 6, 7), np.uint8), AFFINE).write(tmp_path / "reference.nii.gz")
    hand = ScoringHand()
    assert hand.open(1) == "scoring"
    outcome = Outcome.from_json(hand.do(scoring_job(tmp_path, "reference.nii.gz").model_dump_json()))
    assert outcome.score is not None and outcome.score.classes["1"].metrics["dice"] == 1.0
    with pytest.raises(ResourceError, match="this node does not see it"):
        hand.do(scoring_job(tmp_path, "elsewhere.nii.gz").model_dump_json())

    def too_large(job: ScoringJob) -> Outcome:
        raise MemoryError

    monkeypatch.setattr("sagittal.report.scoring_process.score_files", too_large)
    outcome = Outcome.from_json(hand.do(scoring_job(tmp_path, "reference.nii.gz").model_dump_json()))
    assert outcome.failure is not None and outcome.failure.code == "memory"


def test_items_are_plain_json_without_what_a_node_need_not_know(tmp_path: Path) -> None:
    case = write_scan(tmp_path / "c0.nii.gz")
    assert json.loads(_SameFolders().brief(case)) == {"id": "c0", "images": [str(tmp_path / "c0.nii.gz")]}
