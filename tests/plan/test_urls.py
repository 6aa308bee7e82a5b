"""URLs in commands: neither their passwords nor their signatures are told."""

from __future__ import annotations

import sys

import pytest

from sagittal.cli.stopping import command_to_tell
from sagittal.plan.urls import words_without_secrets

GIVEN = ["train", "a b", "--store", "ftp://me:word@host/x", "--store=ftp://me:word@host/x?sig=word", "--set", "a=b@c?d"]
TOLD = ["train", "a b", "--store", "ftp://host/x", "--store=ftp://host/x", "--set", "a=b@c?d"]


def test_the_words_of_a_command_lose_the_secrets_of_their_urls_alone() -> None:
    assert words_without_secrets(GIVEN) == TOLD


def test_a_command_to_give_again_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sagittal", "--resume", *GIVEN])
    told = "train 'a b' --store ftp://host/x --store=ftp://host/x --set 'a=b@c?d'"
    assert command_to_tell() == f"sagittal --resume {told}"
    assert command_to_tell("torchrun", resume=True) == f"torchrun {told} --resume"
