"""A cohort on a Ray cluster of this machine: throughput of a warm worker, and 500 scans while nodes go and come.

    python benchmarks/cluster.py --scans 500 --rounds 3

First one worker with one processor beside one process with one thread, by turns, on the same scans, larger ones and all
the small ones: cases per second after the first tenth, the best round of each, and their ratio. Then all scans on three
nodes of one processor each; two nodes are killed and two added on the way. Printed is whether each scan was told once
and has the bytes that one machine gives. The network is untrained and small, so per scan a cluster's own cost weighs
more than in earnest.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import sagittal.cluster  # noqa: F401 - before Ray: it turns Ray's telemetry off
from sagittal.bundle import read_bundle
from sagittal.cluster.places import Place
from sagittal.cluster.predict import Crew, predict_on_ray
from sagittal.cluster.ray_session import connected
from sagittal.inference.folder import model_of, run_folder
from sagittal.inference.pipeline import Job
from sagittal.inference.processes import Loading, predict_on
from sagittal.inference.processes import Place as Local
from sagittal.inference.run_report import Choices
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.volumes import Volume

OBJECTS = 80 * 1024**2
WARM_SHARE = 0.1
EVENTS = {0.2: "kill", 0.3: "add", 0.5: "kill", 0.6: "add"}
"""By the share of the scans that are told."""


def write_scans(folder, count, shape):
    """Write scans of noise, each another one."""
    for number in range(count):
        scan = np.random.default_rng(number).normal(100, 20, (1, *shape)).astype(np.float32)
        Volume(scan, np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]).write(folder / f"c{number:04d}.nii.gz")


def sums(folder):
    """Return the hash of each label map."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.nii.gz")}


class Cohort:
    """A bundle, scans, and the two ways to predict them."""

    def __init__(self, work, settings):
        self.work, self.bundle = work, work / "bundle"
        write_untrained_bundle(self.bundle, "mednext-s", 3, settings=settings)
        self.read = read_bundle(self.bundle)
        self.model = model_of(self.read, self.read.plan, "openvino fp32", ("cpu",))
        self.runs = 0

    def predict(self, scans, compute, on_told=lambda count: None):
        """Return the output folder and when each case was told."""
        self.runs += 1
        out = self.work / f"out{self.runs}"
        job = Job(out, Choices(mirror=False), self.model.sha256, "cpu", None, self.model.threshold)
        told, names = [], []

        def on_case(case):
            told.append(time.perf_counter())
            names.append(case.case)
            on_told(len(told))

        run_folder(self.model, job, scans, lambda cases, tell: compute(job, cases, tell), on_case=on_case)
        return out, told, names

    def alone(self, job, cases, tell):
        """Predict in one process with one thread."""
        predict_on([Local("cpu", 1)], Loading(self.bundle, "openvino"), job, cases, tell)

    def on(self, session, workers, say=lambda line: None):
        """Return what predicts on a cluster."""
        loading = Loading(self.bundle, "openvino")
        return lambda job, cases, tell: predict_on_ray(
            session, Crew(cpus=1, workers=workers), loading, job, cases, tell, say
        )


def warm_rate(told):
    """Return cases per second after the first tenth."""
    first = int(len(told) * WARM_SHARE)
    return (len(told) - 1 - first) / (told[-1] - told[first])


def compare(cohort, session, scans, rounds):
    """Return rates of one process and one worker, by turns."""
    rates = {"process": [], "worker": []}
    for _ in range(rounds):
        rates["process"].append(round(warm_rate(cohort.predict(scans, cohort.alone)[1]), 2))
        rates["worker"].append(round(warm_rate(cohort.predict(scans, cohort.on(session, 1))[1]), 2))
    ratios = [there / here for here, there in zip(rates["process"], rates["worker"], strict=True)]
    best = max(rates["worker"]) / max(rates["process"])
    return {**rates, "ratio_of_best": round(best, 3), "ratios": [round(ratio, 3) for ratio in ratios]}


def survive(cohort, session, cluster, nodes, scans, count):
    """Return what became of all scans while nodes were killed and added."""
    expected, told_alone, _ = cohort.predict(scans, cohort.alone)
    due = {int(share * count): event for share, event in EVENTS.items()}
    said = []

    def on_told(number):
        event = due.pop(number, None)
        if event == "kill":
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
        elif event == "add":
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=OBJECTS))

    out, told, names = cohort.predict(scans, cohort.on(session, None, said.append), on_told)
    return {
        "scans": count,
        "told_once": sorted(names) == sorted(set(names)) and len(names) == count,
        "equal_to_one_machine": sums(out) == sums(expected) and len(sums(out)) == count,
        "half_written": len(list(out.rglob("*.part"))),
        "seconds": round(told[-1] - told[0], 1),
        "seconds_of_one_process": round(told_alone[-1] - told_alone[0], 1),
        "said": said,
    }


def main():
    """Print both parts as JSON, with the machine's load before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scans", type=int, default=500)
    parser.add_argument("--timed-scans", type=int, default=60)
    parser.add_argument("--timed-shape", default="64,64,64")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    import ray
    from ray.cluster_utils import Cluster

    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": OBJECTS},
        )
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        small = {"network.channels": 4, "network.block_counts": [1] * 9, "patch.size": [32, 32, 32]}
        cohort = Cohort(work, small)
        write_scans(work / "timed", given.timed_scans, tuple(map(int, given.timed_shape.split(","))))
        write_scans(work / "scans", given.scans, (15, 18, 16))
        with connected(Place("ray")) as session:
            found = {
                "throughput": compare(cohort, session, work / "timed", given.rounds),
                "throughput_of_small_scans": compare(cohort, session, work / "scans", given.rounds),
            }
            print(json.dumps(found), flush=True)
            nodes = [cluster.add_node(num_cpus=1, object_store_memory=OBJECTS) for _ in range(2)]
            found["nodes_lost_and_added"] = survive(cohort, session, cluster, nodes, work / "scans", given.scans)
        ray.shutdown()
        cluster.shutdown()
    found["load"] = {"before": load, "after": os.getloadavg()}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
