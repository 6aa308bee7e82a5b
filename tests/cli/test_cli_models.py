from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sagittal.bundle import read_bundle, write_bundle
from sagittal.cli import run
from sagittal.testing.plans import untrained_plan, untrained_spec


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    plan = untrained_plan("mednext-s", untrained_spec(9), patch_size=(32, 32, 32))
    weights = {"all": {"head.bias": np.zeros(9, np.float32)}}
    return write_bundle(tmp_path / "made" / "abdomen", plan=plan, weights=weights, metrics={"mean_dice": 0.875})


def test_a_bundle_is_added_listed_and_fetched(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    index = tmp_path / "share" / "models.json"
    assert run(["models", "add", str(bundle), "--index", str(index), "--licence", "CC BY 4.0"]) == 0
    assert "lists abdomen 1" in capsys.readouterr().out
    assert run(["models", "list", str(index)]) == 0
    shown = capsys.readouterr().out
    for part in ("abdomen", "mednext-s", "0.875", "CC BY 4.0", "class_6 and 2 more", "sagittal models fetch NAME"):
        assert part in shown
    assert run(["models", "list", str(index), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["labels"][-1] == "class_8"
    assert run(["models", "fetch", "abdomen", "--index", str(index), "--out", str(tmp_path / "here")]) == 0
    package = tmp_path / "here" / "abdomen-1.sagittal"
    assert f"sagittal predict {package} SCAN" in capsys.readouterr().out
    assert read_bundle(package).manifest == read_bundle(bundle).manifest


def test_names_are_listed_whole_in_a_narrow_window(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    index, name = tmp_path / "models.json", "abdomen-of-adults-in-the-portal-venous-phase"
    command = ["models", "add", str(bundle), "--index", str(index), "--name", name, "--licence", "[own] use"]
    assert run(command) == 0
    capsys.readouterr()
    assert run(["models", "list", str(index)]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "[own]" in shown


def test_what_goes_wrong_is_told(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "models.json"
    url = "https://example.org/abdomen.sagittal"
    assert run(["models", "add", str(bundle), "--index", str(index), "--url", url]) == 0
    assert f"put it to {url}" in capsys.readouterr().out
    assert run(["models", "add", str(bundle), "--index", str(index)]) == 1
    assert "abdomen 1: is in the list already" in capsys.readouterr().err
    assert run(["models", "fetch", "abdomn", "--index", str(index), "--out", str(tmp_path)]) == 1
    assert "Did you mean 'abdomen'" in capsys.readouterr().err
    assert run(["models", "list", str(bundle / "plan.json")]) == 1
    assert "not a list of models" in capsys.readouterr().err
