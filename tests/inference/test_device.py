from __future__ import annotations

import pytest
import torch

from sagittal.errors import ResourceError
from sagittal.inference.device import resolve_device


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(expected)


def test_names_are_taken_in_any_case_and_as_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("CPU") == torch.device("cpu")
    assert resolve_device(torch.device("cuda:1")) == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "cpu:1"])
def test_absent_devices_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=f"device '{name}' is not there") as caught:
        resolve_device(name)
    assert caught.value.code == "unknown_device"


@pytest.mark.parametrize(
    ("name", "hint"), [("cud", "Did you mean 'cuda'"), ("tpu", "cpu"), ("", "Known"), ("cuda:x", "cuda")]
)
def test_unknown_devices_are_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ResourceError, match="is not a device") as caught:
        resolve_device(name)
    assert hint in caught.value.message
