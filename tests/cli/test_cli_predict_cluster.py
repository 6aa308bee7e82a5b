"""Options of a cluster that can't be meant, refused before anything is read or started."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagittal.cli import run


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--on", "rai"], "unknown place"),
        (["--on", "ray", "--device", "cuda:0,cuda:1"], "each worker has a device of its own"),
        (["--on", "slurm", "--workers", "2"], "are about Ray. For jobs, write shards="),
        (["--on", "slurm", "--device", "cpu,cpu"], "each worker has a device of its own"),
        (["--workers", "2"], "--workers, --worker-cpus and --store are about a cluster"),
        (["--store", "s3://bucket/x"], "are about a cluster"),
    ],
)
def test_predict_refuses(options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", str(tmp_path / "bundle"), str(tmp_path), "--out", str(tmp_path / "out"), *options]) != 0
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_service_takes_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = str(tmp_path / "scan.nii.gz")
    assert run(["predict", "http://127.0.0.1:1", scan, "--out", str(tmp_path / "out"), "--on", "ray"]) != 0
    assert "a service computes where it runs" in capsys.readouterr().err


def test_evaluate_scores_on_ray_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(tmp_path), str(tmp_path), "--on", "slurm"]) != 0
    assert "cases are scored on Ray" in capsys.readouterr().err
