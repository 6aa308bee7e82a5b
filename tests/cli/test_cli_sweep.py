"""What `sagittal sweep` refuses before anything is begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagittal.cli.sweep import sweep
from sagittal.cli.train_cluster import OnMachines
from sagittal.cli.train_options import HowToRun
from sagittal.errors import PlanError


@pytest.mark.parametrize(
    ("how", "machines", "says"),
    [
        (HowToRun(), OnMachines(on="ray:local", fold_processes=2), "each fold with one process"),
        (HowToRun(), OnMachines(on="ray://head:10001"), "from a node of the cluster.*ray:HOST:PORT"),
        (HowToRun(devices="cuda:0,cuda:1"), OnMachines(), "one fold at a time.*--on ray:local"),
        (HowToRun(devices="cuda:0"), OnMachines(on="ray"), "with --on, other machines train"),
        (HowToRun(device="cuda"), OnMachines(on="ray", fold_gpus=0), "cuda and --fold-gpus 0 exclude each other"),
        (HowToRun(), OnMachines(fold_cpus=2), "belong to --on"),
    ],
)
def test_a_sweep_trains_each_fold_by_itself(tmp_path: Path, how: HowToRun, machines: OnMachines, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        sweep(tmp_path, out=tmp_path / "out", networks="a,b", budget="1h", how=how, machines=machines)
    assert not (tmp_path / "out").exists()
