"""Channels declared missing: filled with what training put there, refused where training never did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_network import scan_of, tiny_plan
from torch import Tensor, nn

from sagittal.errors import DataError
from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.inference.missing import channels_given, fill, preprocessing_of
from sagittal.inference.predictor import Predictor
from sagittal.plan import DatasetSpec, Label, Plan
from sagittal.plan.postprocessing import LargestComponent
from sagittal.volumes import Volume

SPEC = DatasetSpec(
    name="heads",
    channel_names=("t1", "t1ce", "t2"),
    labels=(Label(name="a", values=(1,)), Label(name="b", values=(2,))),
    file_ending=".nii.gz",
)
ZSCORE = [{"kind": "zscore"}, {"kind": "none"}, {"kind": "zscore"}]


def _plan(dropout: float = 0.3) -> Plan:
    settings = {"training.augmentation.channel_dropout": dropout, "preprocessing.normalization": ZSCORE}
    return tiny_plan(SPEC, **settings)


class _WhichIsPositive(nn.Module):
    """Class a where the first channel is above 0, class b where the second is exactly 0."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, :1], x[:, 1:2]
        return torch.cat([torch.full_like(first, 0.1), first, (second == 0) * 0.2], dim=1)


def _predictor(**how: object) -> Predictor:
    plan = _plan()
    return Predictor(plan, TorchEngine(plan, (_WhichIsPositive().eval(),), "cpu"), **how)  # type: ignore[arg-type]


def _scans() -> list[Volume]:
    return [scan_of((17, 19, 23), seed=seed) for seed in range(3)]


def test_a_missing_channel_is_zero_after_normalisation_and_the_others_keep_their_places() -> None:
    t1, t1ce, t2 = _scans()
    every = _predictor().predict([t1, t1ce, t2], mirror=False)
    found = _predictor(missing=("t1ce",)).predict([t1, t2], mirror=False)
    zero = t1ce.with_array(np.zeros_like(t1ce.array))
    np.testing.assert_array_equal(found.array, _predictor().predict([t1, zero, t2], mirror=False).array)
    assert (found.array != every.array).any() and set(np.unique(found.array)) == {1, 2}


def test_another_number_of_channels_than_declared_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="3 channels given, but the model takes 2: t1, t2"):
        _predictor(missing=("t1ce",)).predict(_scans(), mirror=False)
    with pytest.raises(DataError, match="1 channel given, but the model takes 3: t1, t1ce, t2"):
        _predictor().predict(_scans()[:1], mirror=False)


def test_what_can_not_be_missing_is_refused() -> None:
    with pytest.raises(DataError, match=r"no such channel\. Did you mean 't1ce'"):
        channels_given(_plan(), ("t1c",))
    with pytest.raises(DataError, match="no channel is left"):
        channels_given(_plan(), ("t1", "t2", "t1ce"))
    with pytest.raises(DataError, match="channel_dropout"):
        channels_given(_plan(0.0), ("t2",))
    assert channels_given(_plan(0.0), ()) == (0, 1, 2)


def test_channels_go_to_their_places() -> None:
    image = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    filled = fill(image, (0, 2), 3)
    assert filled.dtype == np.float16 and not filled[1].any()
    np.testing.assert_array_equal(filled[[0, 2]], image)
    assert fill(image, (0, 1), 2) is image
    kinds = [each.kind for each in preprocessing_of(_plan().preprocessing, (1, 2)).normalization]
    assert kinds == ["none", "zscore"]


def test_rules_of_the_plan_are_applied_unless_they_are_left_out() -> None:
    plan = tiny_plan(SPEC, **{"preprocessing.normalization": [{"kind": "none"}] * 3})
    plan = plan.replace(postprocessing=(LargestComponent(labels=("a",)),))
    engine = TorchEngine(plan, (_WhichIsPositive().eval(),), "cpu")
    array = np.full((1, 9, 11, 13), -1.0, np.float32)
    array[0, 2:5, 2:5, 2:5] = array[0, 7, 8, 9] = 1.0
    scans = [Volume(array, np.eye(4)), Volume(np.ones_like(array), np.eye(4)), Volume(np.ones_like(array), np.eye(4))]
    raw = Predictor(plan, engine, postprocessing=False).predict(scans, mirror=False).array
    done = Predictor(plan, engine).predict(scans, mirror=False).array
    assert raw[0, 7, 8, 9] == 1 and done[0, 7, 8, 9] == 0
    assert (raw != done).sum() == 1 and (done == 1).sum() == 27
