"""A cohort predicted and scored on a cluster of this machine: run in a process of its own by `test_ray_predict`.

Ray leaves sockets and threads to the end of its process, which tests take for errors. What each part found goes to
FOLDER/NAME.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from moto.server import ThreadedMotoServer
from patient_nodes import SYSTEM, agent_ports, patiently

import sagittal.cluster.predict as cluster_predict
from sagittal.bundle import read_bundle
from sagittal.cli import run as sagittal
from sagittal.cluster import pool
from sagittal.cluster.places import Place
from sagittal.cluster.predict import Crew, predict_on_ray
from sagittal.cluster.predict_hand import PredictHand
from sagittal.cluster.ray_session import connected
from sagittal.errors import SagittalError
from sagittal.inference.ensemble import predictor_of
from sagittal.inference.folder import Model, model_of, run_folder
from sagittal.inference.inputs import find_cases
from sagittal.inference.pipeline import CasePipeline, Job
from sagittal.inference.processes import Loading
from sagittal.inference.run_report import CasePrediction, Choices, FolderResult
from sagittal.report.evaluation import evaluate
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.volumes import Volume

CASES, POISON, DAMAGED = 30, "c05", "c20"
COMING = "coming"
"""A file that is there while a node comes up: what is begun meanwhile waits, so that there is work left for it."""
JOIN_S = 180.0
"""How long it is waited for: a slow machine takes longer for it than for all the scans."""
OBJECTS = 80 * 1024**2
TINY = {"network.channels": 4, "network.block_counts": [1] * 9, "patch.size": [16, 16, 16]}
NOTICE_S = 10.0
"""How long the pool takes it that a loss may not have been noticed yet: two seconds, on a slow machine more."""


class Mortal(PredictHand):
    """A worker that one scan ends, as a scan does that the kernel kills it for; others take their time."""

    def do(self, item: str) -> str:
        case = json.loads(item)["id"]
        log = self._task.job.folder / "begun"
        log.mkdir(exist_ok=True)
        with (log / case).open("a") as file:
            file.write("x")
        end = time.monotonic() + JOIN_S
        while (self._task.job.folder / COMING).exists() and time.monotonic() < end:
            time.sleep(0.05)
        if case == POISON:
            time.sleep(0.1)
            os._exit(9)
        time.sleep(0.1)
        return super().do(item)


class Stillborn(PredictHand):
    """A worker whose model does not fit into memory."""

    def open(self, beside: int) -> str:
        os._exit(9)


def write_scans(folder: Path, count: int) -> None:
    for number in range(count):
        rng = np.random.default_rng(number)
        scan = rng.normal(100, 20, (1, 15 + number % 4, 18, 16)).astype(np.float32)
        Volume(scan, np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]).write(folder / f"c{number:02d}.nii.gz")


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.nii.gz"))}


class Cohort:
    """Three nodes of one processor each, a bundle, scans, and what one machine makes of them."""

    def __init__(self, work: Path) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self.work, self.scans = work, work / "scans"
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": OBJECTS, "_system_config": SYSTEM}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={**head, **agent_ports()}))
        self.nodes = [self.add_node() for _ in range(2)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        write_untrained_bundle(work / "bundle", "mednext-s", 3, settings=TINY)
        write_scans(self.scans, CASES)
        (self.scans / f"{DAMAGED}.nii.gz").write_bytes(b"no scan")
        self.bundle = read_bundle(work / "bundle")
        self.model: Model = model_of(self.bundle, self.bundle.plan, "openvino fp32", ("cpu",))
        alone = self.job("alone")

        def on_this_machine(cases: Any, tell: Any) -> None:
            predictor = predictor_of([self.bundle], alone.choices, "cpu", "openvino", threads=1)
            CasePipeline(predictor, alone, tell).run(cases)

        self.alone = run_folder(self.model, alone, self.scans, on_this_machine)

    def add_node(self) -> Any:
        size = {"num_cpus": 1, "object_store_memory": OBJECTS}
        return patiently(lambda: self.cluster.add_node(**size, **agent_ports()))

    def job(self, out: str) -> Job:
        return Job(self.work / out, Choices(mirror=False), self.model.sha256, "cpu", None, self.model.threshold)

    def predict(
        self, out: str, crew: Crew, on_case: Callable[[CasePrediction], None], scans: Path | None = None
    ) -> tuple[FolderResult, list[str]]:
        said: list[str] = []
        job = self.job(out)

        def say(line: str) -> None:
            said.append(line)
            if line.endswith(" joined"):
                (job.folder / COMING).unlink(missing_ok=True)

        loading = Loading(self.work / "bundle", "openvino")

        def compute(cases: Any, tell: Any) -> None:
            with connected(Place("ray")) as session:
                predict_on_ray(session, crew, loading, job, cases, tell, say)

        return run_folder(self.model, job, scans or self.scans, compute, on_case=on_case), said

    def nodes_lost_and_added(self) -> dict[str, Any]:
        told: list[str] = []
        held: list[int] = []

        def on_case(case: CasePrediction) -> None:
            told.append(case.case)
            held.append(len(list((self.work / "out" / "begun").iterdir())) - len(told))
            if len(told) == 8:
                self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
            if len(told) == 14:
                (self.work / "out" / COMING).touch()
                self.nodes.append(self.add_node())

        cluster_predict.PredictHand = Mortal  # type: ignore[misc]
        try:
            result, said = self.predict("out", Crew(cpus=1), on_case)
        finally:
            cluster_predict.PredictHand = PredictHand  # type: ignore[misc]
        again: list[CasePrediction] = []
        self.predict("out", Crew(cpus=1), again.append)
        return {
            "told": told,
            "most_held": max(held),
            "said": said,
            "failed": {case.case: [case.code, case.message] for case in result.failures},
            "sums": sums(self.work / "out"),
            "begun": {path.name: len(path.read_text()) for path in (self.work / "out" / "begun").iterdir()},
            "again": [case.case for case in again if not case.finished_before],
            "parts": [path.name for path in (self.work / "out").rglob("*.part")],
        }

    def by_store(self) -> dict[str, Any]:
        import boto3

        boto3.client("s3").create_bucket(Bucket="scans")
        few = self.work / "few"
        few.mkdir()
        for number in range(4):
            shutil.copyfile(self.scans / f"c{number:02d}.nii.gz", few / f"c{number:02d}.nii.gz")
        told: list[str] = []
        result, _ = self.predict("by_store", Crew(cpus=1, store="s3://scans/x"), lambda c: told.append(c.case), few)
        again: list[CasePrediction] = []
        self.predict("by_store", Crew(cpus=1, store="s3://scans/x"), again.append, few)
        left = boto3.client("s3").list_objects_v2(Bucket="scans").get("KeyCount")
        return {
            "told": told,
            "failed": [case.message for case in result.failures],
            "sums": sums(self.work / "by_store"),
            "again": [case.case for case in again if not case.finished_before],
            "left_in_store": left,
        }

    def refused(self) -> dict[str, Any]:
        job = self.job("never written")
        job.folder.mkdir()
        cases = list(find_cases(self.scans, ["channel_0"], out=job.folder).good)[:1]
        found = {}
        with connected(Place("ray")) as session:
            tried = {
                "bundle": (Crew(cpus=1, workers=1), self.work / "no bundle"),
                "size": (Crew(cpus=64), self.work / "bundle"),
                "gpu": (Crew(device="cuda"), self.work / "bundle"),
            }
            for name, (crew, bundle) in tried.items():
                try:
                    predict_on_ray(session, crew, Loading(bundle, "openvino"), job, cases, lambda case: None)
                except SagittalError as error:
                    found[name] = [error.code, error.message]
            cluster_predict.PredictHand = Stillborn  # type: ignore[misc]
            try:
                loading = Loading(self.work / "bundle", "openvino")
                predict_on_ray(session, Crew(cpus=1, workers=1), loading, job, cases, lambda case: None)
            except SagittalError as error:
                found["start"] = [error.code, error.message]
            finally:
                cluster_predict.PredictHand = PredictHand  # type: ignore[misc]
        return found

    def command_line(self) -> dict[str, Any]:
        out, err = io.StringIO(), io.StringIO()
        few, bundle = str(self.work / "few"), str(self.work / "bundle")
        here = evaluate(self.work / "by_store", self.work / "by_store")
        with redirect_stdout(out), redirect_stderr(err):
            options = ["--no-mirror", "--engine", "openvino", "--on", "ray", "--worker-cpus", "1", "--workers", "2"]
            code = sagittal(["predict", bundle, few, "--out", str(self.work / "cli"), *options])
        report, scored = out.getvalue(), io.StringIO()
        with redirect_stdout(scored), redirect_stderr(err):
            answers = ["--on", "ray", "--workers", "1", "--json"]
            codes = [code, sagittal(["evaluate", str(self.work / "cli"), str(self.work / "by_store"), *answers])]
        return {
            "codes": codes,
            "out": report,
            "err": err.getvalue(),
            "sums": sums(self.work / "cli"),
            "report": json.loads((self.work / "cli" / "prediction.json").read_text()),
            "scores": json.loads(scored.getvalue()),
            "scores_here": json.loads(here.to_json()),
        }


def begin_store() -> ThreadedMotoServer:
    """Start a server that speaks S3 at a port that it holds, and tell the nodes to come of it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    return server


def main() -> None:
    work = Path(sys.argv[1])
    pool.NOTICE_S = NOTICE_S
    server = begin_store()
    cohort = Cohort(work)
    found: dict[str, Any] = {"alone": sums(work / "alone")}
    for part in (cohort.nodes_lost_and_added, cohort.by_store, cohort.refused, cohort.command_line):
        found[part.__name__] = part()
    server.stop()
    (work / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
