"""Weights files: what is read, what is refused, and that nothing in them is ever run."""

from __future__ import annotations

import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sagittal.errors import PlanError
from sagittal.networks import read_weights_file
from sagittal.networks.weights_file import Unread

WEIGHTS = OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(4, dtype=torch.float16))


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.model", "w.safetensors"])
@pytest.mark.parametrize("modern", [True, False])
def test_a_state_dict_is_read(tmp_path: Path, name: str, modern: bool) -> None:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(dict(WEIGHTS), path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=modern)
    read = read_weights_file(path)
    assert list(read) == ["a", "b"]
    assert all(torch.equal(read[name], WEIGHTS[name]) and read[name].dtype == WEIGHTS[name].dtype for name in WEIGHTS)


def test_a_checkpoint_of_nnunet_v1_is_read_and_numpys_numbers_in_it_are_passed_over(tmp_path: Path) -> None:
    checkpoint = {
        "epoch": 7,
        "state_dict": WEIGHTS,
        "optimizer_state_dict": None,
        "plot_stuff": ([np.float64(1.5)], [np.float32(2)], np.zeros(3), np.int64(4)),
        "best_stuff": (None, np.bool_(True), 0.5),
        "plans": {0: {"spacing": np.array([1.0, 1.0, 1.0])}},
    }
    torch.save(checkpoint, tmp_path / "final.model")
    read = read_weights_file(tmp_path / "final.model")
    assert read["epoch"] == 7 and torch.equal(read["state_dict"]["a"], WEIGHTS["a"])
    passed_over = [*read["plot_stuff"][0], *read["plot_stuff"][1], *read["plot_stuff"][2:], read["best_stuff"][1]]
    assert {type(value) for value in passed_over} == {Unread} and len(passed_over) == 5


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_malicious_file_is_refused_and_nothing_is_run(tmp_path: Path, modern: bool, nested: bool) -> None:
    trap = Malicious(tmp_path / "made")
    content = {"state_dict": WEIGHTS, "x": trap} if nested else trap
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=modern)
    with pytest.raises(PlanError, match=r"refused, for it holds posix\.mkdir") as caught:
        read_weights_file(tmp_path / "w.pth")
    assert caught.value.code == "unsafe_weights"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_is_refused_and_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "w.model").write_bytes(pickle.dumps(Malicious(tmp_path / "made"), protocol=protocol))
    with pytest.raises(PlanError):
        read_weights_file(tmp_path / "w.model")
    assert not (tmp_path / "made").exists()


def test_a_whole_network_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(PlanError, match=r"holds torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        read_weights_file(tmp_path / "w.pth")


def test_the_advice_never_is_to_read_the_file_without_its_guard(tmp_path: Path) -> None:
    for name, content in (
        ("a.pth", b""),
        ("b.pth", b"hello world"),
        ("c.pth", b"\x80\x04N."),
        ("d.safetensors", b"no"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PlanError, match=name) as caught:
            read_weights_file(tmp_path / name)
        assert caught.value.code == "weights_unreadable" or b"N." in content
        assert "weights_only" not in caught.value.message and "safe_globals" not in caught.value.message


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-200])
    with pytest.raises(PlanError, match="can't be read as weights"):
        read_weights_file(tmp_path / "w.pth")


@pytest.mark.parametrize("modern", [True, False])
def test_bytes_of_any_making_end_in_an_error_that_names_the_file(tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": WEIGHTS, "x": np.zeros(3)}, path, _use_new_zipfile_serialization=modern)
    whole, dice = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        content = bytearray(whole[: dice.choice((len(whole), dice.randrange(1, len(whole))))])
        for _ in range(3):
            content[dice.randrange(min(len(content), 700))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            read_weights_file(path)
        except PlanError as error:
            refused += 1
            assert str(path) in error.message
    assert refused > 100


@pytest.mark.parametrize("content", [[1, 2], {}, {3: torch.ones(1)}, torch.ones(2)])
def test_something_else_than_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(PlanError, match="Expected tensors by name"):
        read_weights_file(tmp_path / "w.pth")


def test_a_wrong_ending_and_a_missing_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(b"")
    with pytest.raises(PlanError, match=r"Expected one of \.pth, \.pt, \.model, \.safetensors"):
        read_weights_file(tmp_path / "w.pkl")
    with pytest.raises(PlanError, match="does not exist"):
        read_weights_file(tmp_path / "w.pth")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(PlanError, match="a folder"):
        read_weights_file(tmp_path / "folder.pt")
