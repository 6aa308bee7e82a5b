"""Ctrl-C and SIGTERM: the first is a wish, the second an order, and what only seems to be a second is none."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sagittal.training import signals
from sagittal.training.signals import graceful_stop


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell's background jobs ignore Ctrl-C, and so would this test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_STOP_S", -1.0)
    with graceful_stop() as stop:
        _send(signal.SIGINT)
        assert stop.reason == "interrupted"
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)


def test_a_ctrl_c_that_torchrun_passes_on_is_not_a_second_one() -> None:
    with graceful_stop() as stop:
        _send(signal.SIGINT)
        _send(signal.SIGINT)
        assert stop.reason == "interrupted"


def test_a_ctrl_c_that_was_heard_of_already_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_STOP_S", -1.0)
    with graceful_stop() as stop:
        stop.reason = "interrupted"  # by the process that trains folds side by side, which the terminal told too
        _send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)


def test_ctrl_c_after_sigterm_ends_at_once_and_sigterm_twice_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_STOP_S", -1.0)
    with graceful_stop() as stop:
        _send(signal.SIGTERM)
        _send(signal.SIGTERM)
        assert stop.reason == "terminated"
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGINT)
