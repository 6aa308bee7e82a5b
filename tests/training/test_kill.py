"""Training that is killed at any moment ends with the weights of training that was left alone.

Every attempt is the command line in a process of its own that gets a real SIGKILL. So that twenty of them fit into a
test, they are forked from a process that has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import held_training
import sagittal
from sagittal.cli.stopping import STOPPED
from sagittal.training.log import read_log

pytestmark = [pytest.mark.kill, pytest.mark.slow]

STEPS = 40
KILLS = 20
WAITS_AFTER = 12
"""Steps after the one at which it is to be killed, a run waits: else it may be through before the signal comes."""
SETTINGS = (
    *("network.channels=4", "network.block_counts=[1,1,1,1,1,1,1,1,1]", "patch.size=[16,16,16]"),
    *("training.batch_size=2", "training.ema_decay=0.9", f"schedule.steps={STEPS}", "schedule.validations=6"),
    "schedule.validation_cases=1",
    'training.optimizer={"kind":"muon","learning_rate":0.002,"weight_decay":0.01}',
)
FORKS = """
import json, os, sys
import sagittal.cli, sagittal.cli.train, sagittal.training.run, held_training
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):
            os.dup2(null, number)
        held, *sys.argv[1:] = json.loads(line)
        if held is not None:
            held_training.hold_at(held)
        try:
            sagittal.cli.main()
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class _Forks:
    """Starts command lines and reports how they ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(
        self, arguments: list[str], disturb: Callable[[int], None] = lambda child: None, *, held: int | None = None
    ) -> int:
        """Return the exit code, negative for a signal.

        `disturb` is called with the process's number; from the step `held` on training waits for what ends it.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([held, *arguments]) + "\n")
        self._process.stdin.flush()
        disturb(int(self._line()))
        return int(self._line())


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[_Forks]:
    paths = [str(Path(held_training.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield _Forks(process)
        assert process.stdin is not None
        process.stdin.close()


def _command(data: Path, out: Path) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    shared = ["--cache", str(out.parent / "cache"), "--device", "cpu", "--checkpoint-every", "0.01s"]
    return ["train", str(data), "--out", str(out), "--fold", "0", "--resume", *shared, *settings]


def _records(out: Path) -> list[dict[str, object]]:
    return read_log(out.with_name(out.name + ".run") / "fold_0" / "log.jsonl")


def _reached(out: Path) -> int:
    steps = [int(str(record["step"])) for record in _records(out) if record["kind"] == "step"]
    return steps[-1] if steps else 0


def _alive(child: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{child}/stat").read_text().split(")")[1].split()[0] != "Z"
    return False


@contextmanager
def _within(seconds: float) -> Iterator[Callable[[], None]]:
    """Give a pause for loops that wait; it fails after `seconds`."""
    end = time.monotonic() + seconds

    def pause() -> None:
        assert time.monotonic() < end, "training hangs"
        time.sleep(0.002)

    yield pause


def _kill_at(out: Path, step: int, delay_s: float, held: int, *, while_writing: bool) -> Callable[[int], None]:
    """Return what kills a run `delay_s` after it has reached a step, or then while it writes a checkpoint.

    Where nobody looked while it wrote one, it is killed at the step `held`, from which on it waits.
    """
    folder = out.with_name(out.name + ".run") / "fold_0"

    def kill(child: int) -> None:
        with _within(300) as pause:
            while _alive(child) and _reached(out) < step:
                pause()
            while while_writing and _alive(child) and _reached(out) < held:
                if any(folder.glob(".checkpoint_*.part")):
                    break
                pause()
        time.sleep(0 if while_writing else delay_s)
        os.kill(child, signal.SIGKILL)

    return kill


@pytest.mark.timeout(1500)
def test_training_killed_twenty_times_ends_with_the_weights_of_undisturbed_training(
    tiny_dataset: Path, tmp_path: Path, forks: _Forks
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert forks.run(_command(tiny_dataset, whole)) == 0

    draw = random.Random(20)
    # The first ones come before the first step: while data are checked, planned for and prepared.
    steps = [0, 0, *sorted(draw.choices(range(1, STEPS - 3), k=KILLS - 2))]
    kinds = [False, False, *(draw.random() < 0.4 for _ in steps[2:])]
    resumed_at = []
    for step, while_writing in zip(steps, kinds, strict=True):
        delay_s = draw.uniform(0, 0.2 if step else 1.0)
        held = min(step + WAITS_AFTER, STEPS - 1)
        disturb = _kill_at(cut, step, delay_s, held, while_writing=while_writing)
        assert forks.run(_command(tiny_dataset, cut), disturb, held=held) == -signal.SIGKILL
        resumed_at.append(_reached(cut))
    assert not cut.exists()
    assert len(set(resumed_at)) > KILLS // 3
    assert forks.run(_command(tiny_dataset, cut)) == 0

    # How many validations there is time for depends on the clock; they change no weight.
    losses = [[record["loss"] for record in _records(out) if record["kind"] == "step"] for out in (whole, cut)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    first, second = (sagittal.read_bundle(out).weights("fold_0") for out in (whole, cut))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_sigterm_saves_and_ends_with_a_code_that_asks_to_be_started_again(
    tiny_dataset: Path, tmp_path: Path, forks: _Forks
) -> None:
    out = tmp_path / "out"

    def terminate(child: int) -> None:
        with _within(300) as pause:
            while _alive(child) and _reached(out) < 2:
                pause()
        os.kill(child, signal.SIGTERM)

    assert forks.run(_command(tiny_dataset, out), terminate, held=10) == STOPPED == 75
    folder = out.with_name("out.run") / "fold_0"
    assert (folder / f"checkpoint_{_reached(out):08d}.safetensors").exists()
    assert forks.run(_command(tiny_dataset, out)) == 0
    assert _reached(out) == STEPS
