"""The switch of the kernels: what it takes, tries, refuses and remembers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sagittal.errors import ResourceError
from sagittal.kernels import TailWeights, choice, cpu_available, depthwise, depthwise_conv, mednext_block, native
from sagittal.kernels.choice import Job, Rivals, decide, edge_of, require_kernels, use_kernels

JOB = Job("depthwise", "cpu", "float32", 32, (16, 3, 3, 1), True)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "_verdicts", {})
    monkeypatch.setattr(choice, "_checked", {})
    monkeypatch.setattr(choice, "_timed", set())
    monkeypatch.setattr(choice, "_told", set())
    yield
    assert choice.kernels_mode() == "auto"


class Contest:
    """A trial of x * 2, whose kernels can be made wrong in several ways."""

    def __init__(self, flaw: str = "") -> None:
        self.flaw = flaw
        self.sizes: list[tuple[int, int, int]] = []

    def __call__(self, job: Job, size: tuple[int, int, int]) -> Rivals:
        self.sizes.append(size)
        return Rivals(self.kernels, lambda x: x * 2, [choice.draw((1, 4, *size), job, seed=0)])

    def kernels(self, x: Tensor) -> Tensor:
        if self.flaw == "compiler":
            raise RuntimeError("no such instruction")
        if self.flaw == "result":
            return x * 2 + 1e-3
        if self.flaw == "gap":
            return torch.where(torch.arange(x.shape[-1]) == 0, torch.nan, x * 2)
        if self.flaw == "gradient":
            return x.detach() * 2 + 0 * x
        return x * 2


def test_off_on_and_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = Contest("result")
    with use_kernels("off"):
        assert not decide(JOB, contest)
    with use_kernels("on"):
        assert decide(JOB, contest)
        with use_kernels("off"):
            assert choice.kernels_mode() == "off"
        assert choice.kernels_mode() == "on"
    assert contest.sizes == []
    assert decide(JOB, Contest())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ResourceError, match="expected auto, on, off"), use_kernels("maybe"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    ("flaw", "words"),
    [("compiler", "no such instruction"), ("result", "the result was off"), ("gap", "the result was off by nan"),
     ("gradient", "gradient 1 was off")],
)  # fmt: skip
def test_kernels_that_fail_their_trial_are_told_once_and_passed_by(flaw: str, words: str) -> None:
    contest = Contest(flaw)
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch computes depthwise float32.*{words}"):
        assert not decide(JOB, contest)
    assert not decide(JOB, contest)
    assert not decide(JOB._replace(edge=64), contest)
    assert len(contest.sizes) == 1


def test_a_wrong_gradient_does_not_matter_to_prediction() -> None:
    assert decide(JOB._replace(training=False), Contest("gradient"))


def test_trials_keep_their_hands_off_random_numbers() -> None:
    before = torch.get_rng_state()
    decide(JOB, Contest())
    assert torch.equal(before, torch.get_rng_state())


def test_the_slower_form_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_failure", lambda job, trial: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu = JOB._replace(device="cuda:0")
    for kernels_ms, expected in ((2.0, False), (1.0, True), (0.5, True)):
        monkeypatch.setattr(choice, "_times", lambda job, trial, taken=kernels_ms: (taken, 1.0))
        monkeypatch.setattr(choice, "_verdicts", {})
        assert decide(on_gpu, Contest()) is expected
    monkeypatch.setattr(choice, "_times", lambda job, trial: (9.0, 1.0))
    monkeypatch.setattr(choice, "MEASURED", {((9, 0), "depthwise", "float32", 32): True})
    monkeypatch.setattr(choice, "_verdicts", {})
    assert decide(on_gpu, Contest())


def test_deterministic_runs_do_not_ask_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_failure", lambda job, trial: None)
    monkeypatch.setattr(choice, "_times", lambda job, trial: pytest.fail("timed"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert decide(JOB._replace(device="cuda:0"), Contest())


def test_what_was_timed_is_remembered_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "kernels.json"
    on_gpu = JOB._replace(device="cuda:0")
    with use_kernels("auto", path):
        choice._verdicts.update({on_gpu: False, JOB: True})
        choice._timed.add(on_gpu)
    choice._verdicts.clear()
    with use_kernels("auto", path):
        assert choice._verdicts == {on_gpu: False}
    choice._verdicts.clear()
    monkeypatch.setattr(choice, "_software", lambda: "another PyTorch")
    choice.read_verdicts(path)
    assert choice._verdicts == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"KEY": 3}', '{"KEY": [[1, true]]}', '{"KEY": [[[1], true]]}'])
def test_a_damaged_memory_says_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(text.replace('"KEY"', json.dumps(choice._software())))
    choice.read_verdicts(path)
    assert choice._verdicts == {}


def test_a_memory_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choice._timed.add(JOB)
    choice._verdicts[JOB] = True
    choice.write_verdicts(tmp_path / "file" / "kernels.json")
    assert (tmp_path / "file").read_text() == ""


def test_volumes_are_classed_by_the_nearest_cube() -> None:
    assert [edge_of(edge**3) for edge in (1, 8, 16, 32, 64, 128, 256)] == [8, 8, 16, 32, 64, 128, 128]
    assert edge_of(48 * 64 * 48) == 64


def test_on_is_refused_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernels("meta", on_cpu=False)
    with use_kernels("on"):
        require_kernels("cpu", on_cpu=True)
        with pytest.raises(ResourceError, match=r"not built with this installation.*--kernels auto"):
            require_kernels("cpu", on_cpu=False)
        with pytest.raises(ResourceError, match="no kernels for devices of type mps"):
            require_kernels("mps", on_cpu=True)
        monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ResourceError, match=r"Triton is not installed \(pip install"):
            require_kernels("cuda:0", on_cpu=True)
        monkeypatch.undo()
        monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(ResourceError, match=r"compute capability 7\.5, and the kernels need 8\.0"):
            require_kernels("cuda:0", on_cpu=True)


def test_a_record_names_what_may_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.kernels_on("cpu", on_cpu=True) == "compiled"
    assert choice.kernels_on("cpu", on_cpu=False) == choice.kernels_on("mps", on_cpu=True) == "torch"
    monkeypatch.setattr(choice, "gpu_reason", lambda device: None)
    monkeypatch.setattr(choice.importlib.metadata, "version", lambda name: "3.6.0")
    assert choice.kernels_on("cuda:1", on_cpu=True) == "triton 3.6.0"
    with use_kernels("off"):
        assert choice.kernels_on("cuda:1", on_cpu=True) == choice.kernels_on("cpu", on_cpu=True) == "torch"


def test_a_gpu_without_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="plain PyTorch computes on cuda:0.*Triton is not installed"):
        assert not choice._available("cuda:0")
    assert not choice._available("cuda:0")


def test_off_computes_with_plain_pytorch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "depthwise", lambda *arguments: pytest.fail("a kernel ran"))
    monkeypatch.setattr(native, "sweep", lambda *arguments: pytest.fail("a kernel ran"))
    x, weight = torch.randn(1, 16, 5, 6, 7), torch.randn(16, 1, 3, 3, 3)
    rest = [torch.randn(shape) for shape in ((16,), (16,), (32, 16), (32,), (16, 32), (16,))]
    with use_kernels("off"):
        depthwise_conv(x, weight)
        mednext_block(x, weight, None, TailWeights(*rest))


@pytest.mark.skipif(not cpu_available(), reason="the compiled CPU kernels are not built here")
def test_auto_takes_the_compiled_kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "plain_conv", lambda *arguments: pytest.fail("plain PyTorch ran"))
    depthwise_conv(torch.randn(1, 16, 5, 6, 7), torch.randn(16, 1, 3, 3, 3))


def test_kernels_and_networks_import_where_only_torch_is_installed() -> None:
    hidden = ("pydantic", "nibabel", "scipy", "cyclopts", "jaxtyping", "matplotlib", "jinja2", "monai", "triton")
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {hidden}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import sagittal.kernels.choice, sagittal.networks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=500)
