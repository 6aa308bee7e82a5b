"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sagittal.testing.datasets import write_tiny_dataset

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the checkout; without it the test is skipped, except under CI."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA
    reason = f"real scans are absent: no folder {SHARED_DATA.name} beside the checkout"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """Six training cases and a test case in nnU-Net's layout, each of 18 x 22 x 20 voxels."""
    return write_tiny_dataset(tmp_path / "tiny")
