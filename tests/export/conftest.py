from __future__ import annotations

import pytest
from tiny_segformer import TINY

from sagittal.plan import Plan
from sagittal.testing.plans import untrained_plan, untrained_spec


@pytest.fixture
def tiny_plan() -> Plan:
    """A small SegFormer3D of two channels and three outputs, whose window is no cube."""
    return untrained_plan(
        "segformer3d", untrained_spec(3, 2), patch_size=(16, 24, 33), spacing_mm=(2.0, 1.0, 1.5), settings=TINY
    )
