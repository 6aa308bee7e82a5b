from __future__ import annotations

import subprocess
import sys

import pytest

from sagittal.inference.engines.openvino_core import core

LET_GO_ELSEWHERE = """
import faulthandler, os, signal, threading
import openvino
from openvino import opset13 as ops
from sagittal.inference.engines.openvino_core import core

faulthandler.enable()
given = ops.parameter([1, 4], openvino.Type.f32)
kept = [core().compile_model(openvino.Model([ops.relu(given)], [given]), "CPU")]
thread = threading.Thread(target=kept.clear)
thread.start()
thread.join()
signal.signal(signal.SIGTERM, lambda number, frame: print("heard", flush=True))
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
"""


def test_there_is_one_core() -> None:
    assert core() is core()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are handled another way")
def test_a_signal_is_survived_after_a_network_was_let_go_in_another_thread() -> None:
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", LET_GO_ELSEWHERE], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split()) == (0, ["heard", "alive"]), ended.stderr
