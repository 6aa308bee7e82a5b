"""The loss against a plain computation in NumPy, and what must not depend on ignored voxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sagittal.data.label_index import label_index
from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.plan.loss import Loss
from sagittal.plan.overrides import deep_supervision_weights
from sagittal.training.losses import segmentation_loss, soft_dice

SHAPE = (2, 3, 4, 5)


def _spec(**changes: object) -> DatasetSpec:
    classes = (Label(name="one", values=(1,)), Label(name="two", values=(2,)))
    return DatasetSpec(name="x", channel_names=("MR",), labels=classes, file_ending=".nii.gz").replace(**changes)


def _random(seed: int, outputs: int, indices: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE[0], outputs, *SHAPE[1:], generator=generator, dtype=torch.float64)
    return logits, torch.randint(indices, SHAPE, generator=generator)


def _plain(logits: np.ndarray, targets: np.ndarray, *, batch_dice: bool) -> float:
    exp = np.exp(logits - logits.max(1, keepdims=True))
    probs = exp / exp.sum(1, keepdims=True)
    entropy = np.mean([-np.log(probs[n][(targets[n][d, h, w], d, h, w)]) for n, d, h, w in np.ndindex(*targets.shape)])
    dice = []
    groups = [slice(None)] if batch_dice else [slice(n, n + 1) for n in range(len(targets))]
    for group in groups:
        for k in range(1, logits.shape[1]):
            p, t = probs[group, k], targets[group] == k
            dice.append((2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5))
    return float(entropy + 1 - np.mean(dice))


@pytest.mark.parametrize("batch_dice", [False, True])
def test_dice_and_cross_entropy_equal_their_definitions(batch_dice: bool) -> None:
    logits, targets = _random(0, 3, 3)
    loss = segmentation_loss([logits], targets, label_index(_spec()), Loss(batch_dice=batch_dice))
    assert float(loss) == pytest.approx(_plain(logits.numpy(), targets.numpy(), batch_dice=batch_dice), rel=1e-5)


def test_regions_count_every_value_that_they_join() -> None:
    spec = _spec(
        labels=(Label(name="whole", values=(1, 2)), Label(name="core", values=(2,))), regions_class_order=(1, 2)
    )
    targets = torch.tensor([[[[0, 1, 2]]]])
    right = torch.tensor([[-50.0, 50.0, 50.0], [-50.0, -50.0, 50.0]]).view(1, 2, 1, 1, 3)
    assert float(segmentation_loss([right], targets, label_index(spec), Loss())) < 1e-4
    assert float(segmentation_loss([-right], targets, label_index(spec), Loss())) > 20


def test_ignored_voxels_change_neither_loss_nor_gradient() -> None:
    index = label_index(_spec(ignore_value=9))
    logits, targets = _random(1, 3, 3)
    targets[0, 1] = index.ignore_index
    other = logits.clone()
    other[0, :, 1] += 7
    results = []
    for values in (logits, other):
        leaf = values.clone().requires_grad_()
        loss = segmentation_loss([leaf], targets, index, Loss())
        loss.backward()
        assert leaf.grad is not None
        assert leaf.grad[0, :, 1].abs().max() == 0
        results.append(float(loss.detach()))
    assert results[0] == results[1]


def test_a_batch_of_ignored_voxels_alone_has_a_finite_loss() -> None:
    index = label_index(_spec(ignore_value=9))
    logits, targets = _random(2, 3, 3)
    targets.fill_(3)
    assert np.isfinite(float(segmentation_loss([logits], targets, index, Loss())))


def test_every_scale_counts_with_its_weight() -> None:
    logits, _ = _random(3, 3, 3)
    targets = torch.ones(SHAPE, dtype=torch.long)
    coarse = torch.randn(SHAPE[0], 3, 2, 2, 3, dtype=torch.float64)
    index, weights = label_index(_spec()), (0.75, 0.25)
    both = segmentation_loss([logits, coarse], targets, index, Loss(deep_supervision_weights=weights))
    fine = segmentation_loss([logits], targets, index, Loss())
    rough = segmentation_loss([coarse], torch.ones(SHAPE[0], 2, 2, 3, dtype=torch.long), index, Loss())
    assert float(both) == pytest.approx(0.75 * float(fine) + 0.25 * float(rough), rel=1e-6)


def test_mednext_weights_are_those_of_the_paper() -> None:
    assert [round(weight, 4) for weight in deep_supervision_weights(5)] == [0.5161, 0.2581, 0.129, 0.0645, 0.0323]


def test_two_empty_masks_have_dice_one() -> None:
    empty = torch.zeros(1, 1, 2, 3, 4)
    assert float(soft_dice(empty, empty, batch_dice=False, smooth=1e-5)) == pytest.approx(1.0)
