from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sagittal.bundle import read_bundle
from sagittal.errors import PlanError
from sagittal.testing.bundle import main, write_random_bundle, write_untrained_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec

TINY = {"network.channels": 2, "network.block_counts": [1] * 9}


def test_weights_are_the_same_each_time(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first = read_bundle(write_untrained_bundle(tmp_path / "a", "mednext-s", 3, settings=TINY)).weights("all")
    torch.rand(3)
    second = read_bundle(write_untrained_bundle(tmp_path / "b", "mednext-s", 3, settings=TINY)).weights("all")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    torch.random.set_rng_state(state)


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    write_untrained_bundle(tmp_path / "a", "mednext-s", 3, settings=TINY)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_folds_differ(tmp_path: Path) -> None:
    plan = untrained_plan("mednext-s", untrained_spec(2), settings=TINY)
    bundle = read_bundle(write_random_bundle(tmp_path / "b", plan, folds=("fold_0", "fold_1")))
    assert bundle.weight_names == ("fold_0", "fold_1")
    first, second = bundle.weights("fold_0"), bundle.weights("fold_1")
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, "-m", "sagittal.testing.bundle", "--network", "mednext-s", "--classes", "5"]
    options = ["--channels", "2", "--set", "network.kernel_size=5", "--set", "network.channels=2", "--out", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout == f"{out}\n"
    plan = read_bundle(out).plan
    assert plan.dataset.num_outputs == 5 and len(plan.dataset.channel_names) == 2
    assert plan.network.kind == "mednext" and plan.network.kernel_size == 5
    assert plan.patch.size == (128, 128, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "mednext-s", "--classes", "1"], "Expected at least 2 classes"),
        (["--network", "mednext-s", "--classes", "2", "--channels", "0"], "and 1 channel"),
        (["--network", "mednxt-s", "--classes", "2"], "Did you mean 'mednext-s'"),
        (["--network", "mednext-s", "--classes", "2", "--set", "x"], "expected FIELD=VALUE"),
    ],
)
def test_mistakes_end_with_a_message(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_help_says_what_classes_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "the background included" in capsys.readouterr().out


def test_too_few_classes(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        write_untrained_bundle(tmp_path / "b", "mednext-s", 1)
