from __future__ import annotations

import pytest
from known_network import Threshold, predictor_of, tiny_plan

from sagittal.inference.predictor import Predictor


@pytest.fixture
def thresholding() -> Predictor:
    return predictor_of(tiny_plan(), Threshold().eval())
