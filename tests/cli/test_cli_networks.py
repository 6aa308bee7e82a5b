"""`sagittal networks`: the figures it prints, the picture it draws, and that docs/networks.md holds both."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sagittal.cli import run
from sagittal.cli.networks import _cost, _fitted
from sagittal.networks.build import build_network
from sagittal.networks.cost import parameters
from sagittal.plan.networks import NETWORKS, NetworkConfig, UNETRConfig
from sagittal.report.cost_tables import cost_table
from sagittal.report.published import SCORE_SETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "networks.md"
PICTURE = ROOT / "docs" / "images" / "parameters-dice.svg"
LIGHT = ("mednext-s", "mednext-b-k5", "segformer3d", "transbts", "nnformer-tumour")
COUNTED = [
    score.size for scores in SCORE_SETS for score in scores.scores if score.size is not None and score.size.counted_as
]


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["networks", *arguments, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_the_costs_of_chosen_networks(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--network", "mednext-s", "--network", "SegFormer3D")
    shown = _json(capsys, "--input", "4x32x32x48", "--classes", "2", *chosen)
    assert (shown["input"], shown["classes"]) == ([4, 32, 32, 48], 2)
    mednext, segformer3d = shown["networks"]
    assert (mednext["name"], segformer3d["name"]) == ("mednext-s", "segformer3d")
    assert mednext["multiply_adds_as_published"] == mednext["multiply_adds"] > 1e9
    assert mednext["interpolation_multiply_adds"] == 0
    assert segformer3d["multiply_adds_as_published"] > 1.5 * segformer3d["multiply_adds"]
    assert segformer3d["interpolation_multiply_adds"] > 8 * 2 * 32 * 32 * 48
    for cost in (mednext, segformer3d):
        assert cost["training_activation_bytes"] > 2 * cost["inference_activation_bytes"] > 0


def test_without_a_name_all_networks_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[NetworkConfig] = []
    verb = sys.modules["sagittal.cli.networks"]  # the package has a function of this name
    monkeypatch.setattr(verb, "_cost", lambda config, *_, **__: counted.append(config) or "not now")
    shown = _json(capsys)
    assert shown["input"] == [1, 128, 128, 128]
    assert [row["name"] for row in shown["networks"]] == list(NETWORKS)
    assert counted == list(NETWORKS.values())


def test_a_terminal_of_80_columns_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["networks", "--input", "1x32x32x48", "--network", "nnformer-tumour", "--network", "segformer3d"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    row = next(line.split() for line in shown.splitlines() if "segformer3d" in line)
    assert len(row) == 7
    assert "8 multiply-adds for each" in shown.replace("\n", " ")


def test_a_terminal_of_80_columns_shows_every_input_of_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["networks", "--paper", "--network", "segformer3d", "--network", "nnformer-synapse"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "4×128×128×128" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_a_network_whose_library_is_missing_says_so_and_the_others_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sagittal.networks.monai_networks", None)
    shown = _json(capsys, "--input", "1x32x32x48", "--network", "unetr", "--network", "segformer3d")
    unetr, segformer3d = shown["networks"]
    assert "sagittal[baselines]" in unetr["error"]
    assert segformer3d["parameters"] > 4e6


def test_published_figures_stand_beside_computed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _json(capsys, "--paper", "--network", "segformer3d")
    (row,) = shown["networks"]
    assert row["published"]["giga_multiply_adds"] == 17.5
    assert row["published"]["input_shape"] == [4, 128, 128, 128]
    assert row["computed"]["multiply_adds_as_published"] == pytest.approx(15.55e9, rel=0.001)
    assert row["computed"]["multiply_adds"] == pytest.approx(9.41e9, rel=0.001)


def test_beside_a_paper_unetr_has_a_position_for_each_patch_of_the_input() -> None:
    fitted = _fitted(NETWORKS["unetr"], (1, 64, 120, 128))
    assert isinstance(fitted, UNETRConfig)
    assert fitted.input_size == (64, 128, 128)
    assert _fitted(NETWORKS["segformer3d"], (1, 64, 120, 128)) is NETWORKS["segformer3d"]


def test_the_picture_is_written_and_its_points_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = tmp_path / "figures" / "dice.svg"
    shown = _json(capsys, "--picture", str(drawn))
    assert [scores["title"] for scores in shown["sets"]] == [
        "BTCV",
        "AMOS22",
        "KiTS19",
        "BraTS21",
        "BraTS",
        "Synapse",
        "ACDC",
    ]
    assert drawn.read_text().startswith("<svg")
    assert run(["networks", "--picture", str(drawn)]) == 0
    assert "--markdown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--paper", "--picture", "x.svg"), "exclude each other"),
        (("--paper", "--input", "1x64x64x64"), "belong to inputs of their own"),
        (("--picture", "x.svg", "--classes", "4"), "belong to inputs of their own"),
        (("--json", "--markdown"), "exclude each other"),
        (("--network", "mednext-x"), "Did you mean"),
        (("--network", "mednext-s", "--classes", "0"), "--classes 0: expected a number of at least 1"),
        (("--picture", "x.png"), "expected a file that ends in .svg"),
    ],
)
def test_what_makes_no_sense_is_told(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["networks", *arguments]) == 2
    told = capsys.readouterr()
    assert expected in told.err + told.out
    assert not Path("x.svg").exists()
    assert not Path("x.png").exists()


def test_the_documented_figures_are_those_of_the_code() -> None:
    documented = _rows(DOCS.read_text())
    assert set(documented) >= set(NETWORKS)
    shape, classes = (1, 128, 128, 128), 3
    counted = cost_table({name: _cost(NETWORKS[name], shape, classes, memory=False) for name in LIGHT}, shape, classes)
    for row in counted.rows:
        # Memory, which stands behind the arithmetic, changes a little with PyTorch's version.
        assert documented[row[0]][:5] == list(row[:5]), "run the command in docs/networks.md again"


@pytest.mark.parametrize(
    ("name", "millions"),
    sorted({(size.counted_as, size.millions) for size in COUNTED}),
)
def test_sizes_said_to_be_counted_here_are(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = build_network(NETWORKS[name], 1, 3)
    assert parameters(network) == pytest.approx(millions * 1e6, rel=0.005)


def test_the_documented_picture_and_points_are_those_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["networks", "--picture", str(tmp_path / "dice.svg"), "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in DOCS.read_text()
    assert (tmp_path / "dice.svg").read_text() == PICTURE.read_text()


def test_every_option_of_the_command_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["networks", "--help"]) == 0
    options = set(re.findall(r"(?<![\w-])--[a-z]+", capsys.readouterr().out)) - {"--help", "--version", "--debug"}
    assert options >= {"--input", "--paper", "--picture"}
    text = DOCS.read_text()
    assert [option for option in options if option not in text] == []


def _rows(text: str) -> dict[str, list[str]]:
    """Return the first table's rows by the name in their first cell."""
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            rows.setdefault(cells[0], cells)
    return rows
