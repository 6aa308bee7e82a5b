"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from browser import Browser
from sagittal.testing.datasets import write_tiny_dataset

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a test module draws while it is imported is the same in every run: torch would begin at another seed."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test, its fixtures too, draws the same numbers whichever tests its process ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the checkout; without it the test is skipped, except under CI."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA
    reason = f"real scans are absent: no folder {SHARED_DATA.name} beside the checkout"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs keep for the next run is kept for this run alone.

    What earlier runs left in the user's cache decides nothing, and two runs at a time, which would write the same
    compiled networks there, don't meet.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SAGITTAL_CACHE", raising=False)
        yield


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """Six training cases and a test case in nnU-Net's layout, each of 18 x 22 x 20 voxels."""
    return write_tiny_dataset(tmp_path / "tiny")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab of Chromium, one for all pages; without it the test is skipped, except under CI."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        reason = "no Chromium on this machine: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
