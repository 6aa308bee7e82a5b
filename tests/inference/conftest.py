from __future__ import annotations

import pytest
from known_network import Threshold, tiny_plan

from sagittal.inference.predictor import Predictor


@pytest.fixture
def thresholding() -> Predictor:
    return Predictor(tiny_plan(), (Threshold().eval(),), "cpu")
