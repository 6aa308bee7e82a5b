"""The losses against plain computations in NumPy, what must not depend on ignored voxels, and parts that add up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sagittal.data.label_index import label_index
from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.plan.loss import Loss
from sagittal.plan.overrides import deep_supervision_weights
from sagittal.training.losses import segmentation_loss
from sagittal.training.overlap_losses import Overlap, dice, focal_tversky

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


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_voxels_of_rare_classes_weigh_by_their_number_in_the_sample(power: float) -> None:
    logits, targets = _random(3, 3, 4)
    targets[1][targets[1] == 2] = 0  # a class that a sample lacks
    config = Loss(dice_weight=0.0, rare_class_power=power)
    loss = segmentation_loss([logits], targets, label_index(_spec(ignore_value=7)), config)
    entropy = torch.nn.functional.cross_entropy(logits, targets % 3, reduction="none").numpy()
    total, kept = 0.0, 0
    for sample, labels in zip(entropy, targets.numpy(), strict=True):
        counts = {label: int(np.sum(labels == label)) for label in range(3)}
        weights = {label: count**-power for label, count in counts.items() if count}
        scale = sum(counts.values()) / sum(weight * counts[label] for label, weight in weights.items())
        total += sum(scale * weight * sample[labels == label].sum() for label, weight in weights.items())
        kept += sum(counts.values())
    assert float(loss) == pytest.approx(total / kept, rel=1e-12)


def test_classes_weigh_alike_at_power_one_whatever_their_size() -> None:
    logits = torch.zeros(1, 3, 2, 10, 10, dtype=torch.float64)
    targets = torch.zeros(1, 2, 10, 10, dtype=torch.int64)
    targets[0, 0, 0, 0] = 1
    index = label_index(_spec())
    for power, share in ((0.0, 1 / 200), (0.5, 1 / (1 + 199**0.5)), (1.0, 1 / 2)):
        given = logits.clone().requires_grad_()
        segmentation_loss([given], targets, index, Loss(dice_weight=0.0, rare_class_power=power)).backward()
        assert given.grad is not None
        # At equal logits the gradient of a voxel's own class is its weight times -2/3.
        assert float(given.grad[0, 1, 0, 0, 0]) == pytest.approx(-share * 2 / 3, rel=1e-9)


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


def test_two_empty_masks_have_dice_one_and_nothing_to_change() -> None:
    nothing = Overlap(*torch.zeros(3, 1, 1))
    assert float(dice(nothing, 1e-5)) == pytest.approx(1.0)
    assert float(focal_tversky(nothing, alpha=0.3, beta=0.7, gamma=0.75, smooth=1e-5)) < 1e-4


@pytest.mark.parametrize("batch_dice", [False, True])
def test_focal_tversky_equals_its_definition(batch_dice: bool) -> None:
    logits, targets = _random(4, 3, 3)
    config = Loss(dice_weight=0, cross_entropy_weight=0, tversky_weight=2, batch_dice=batch_dice, dice_smooth=0)
    probs, values = torch.softmax(logits, 1).numpy(), []
    for group in [slice(None)] if batch_dice else [slice(n, n + 1) for n in range(SHAPE[0])]:
        for k in (1, 2):
            p, t = probs[group, k], targets.numpy()[group] == k
            common, false, missed = (p * t).sum(), (p * ~t).sum(), ((1 - p) * t).sum()
            values.append((1 - common / (common + 0.3 * false + 0.7 * missed)) ** 0.75)
    loss = segmentation_loss([logits], targets, label_index(_spec()), config)
    assert float(loss) == pytest.approx(2 * np.mean(values), rel=1e-12)


def test_a_right_prediction_has_a_finite_gradient_of_focal_tversky() -> None:
    targets = torch.tensor([[[[0, 1, 2]]]])
    logits = (40 * torch.nn.functional.one_hot(targets, 3).movedim(-1, 1).float()).requires_grad_()
    config = Loss(dice_weight=0, cross_entropy_weight=0, tversky_weight=1)
    segmentation_loss([logits], targets, label_index(_spec()), config).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_top_k_is_the_mean_of_the_worst_voxels_that_count(ignore: bool, fraction: float) -> None:
    index = label_index(_spec(ignore_value=9))
    logits, targets = _random(5, 3, 3)
    if ignore:
        targets[0, :2] = 3
    log_probs, kept = torch.log_softmax(logits, 1), []
    for n in range(SHAPE[0]):
        counted = targets[n] != 3
        entropy = -log_probs[n].movedim(0, -1)[counted].gather(1, targets[n][counted].unsqueeze(1)).flatten()
        kept.extend(sorted(entropy.tolist(), reverse=True)[: math.ceil(fraction * len(entropy))])
    config = Loss(dice_weight=0, top_k_fraction=fraction)
    loss = segmentation_loss([logits], targets, index, config)
    assert float(loss) == pytest.approx(np.mean(kept), rel=1e-12)


def test_the_boundary_loss_adds_up_probability_times_signed_distance() -> None:
    targets = torch.zeros(1, 1, 1, 5, dtype=torch.long)
    targets[..., 3] = 1
    targets[..., 4] = 3
    index = label_index(_spec(ignore_value=9, labels=(Label(name="one", values=(1,)), Label(name="two", values=(2,)))))
    logits = torch.randn(1, 3, 1, 1, 5, dtype=torch.float64)
    probs = torch.softmax(logits, 1)[0, 1:, 0, 0, :4]
    config = Loss(dice_weight=0, cross_entropy_weight=0, boundary_weight=0.5, boundary_reach_mm=5.0)
    loss = segmentation_loss([logits], targets, index, config, spacing_mm=(9.0, 9.0, 2.0))
    # Class 2 is not there: its surface is out of reach.
    expected = (probs[0] * torch.tensor([5.0, 4.0, 2.0, -2.0])).sum() + 5 * probs[1].sum()
    assert float(loss) == pytest.approx(0.5 * float(expected) / (4 * 2), rel=1e-12)


def test_the_boundary_loss_of_a_coarse_scale_knows_its_voxel_size() -> None:
    targets = torch.zeros(1, 1, 1, 8, dtype=torch.long)
    targets[..., 4:] = 1
    logits = torch.randn(1, 3, 1, 1, 4)
    config = Loss(dice_weight=0, cross_entropy_weight=0, boundary_weight=1)
    losses = [
        segmentation_loss([logits], labels, label_index(_spec()), config, spacing_mm=(1.0, 1.0, width))
        for labels, width in ((targets, 1.5), (targets[..., ::2], 3.0))
    ]
    assert losses[0] == losses[1]


def test_a_loss_of_weight_zero_is_not_computed() -> None:
    logits, targets = _random(6, 3, 3)
    # It would need spacing_mm.
    segmentation_loss([logits], targets, label_index(_spec()), Loss(boundary_weight=0))
    with pytest.raises(AssertionError, match="spacing_mm"):
        segmentation_loss([logits], targets, label_index(_spec()), Loss(boundary_weight=1))


@pytest.mark.parametrize("field", ["weights", "deep_supervision_weights"])
def test_a_loss_of_nothing_is_refused(field: str) -> None:
    changes = {"dice_weight": 0, "cross_entropy_weight": 0} if field == "weights" else {field: (0.0, 0.0)}
    with pytest.raises(ValueError, match="nothing to minimise"):
        Loss(**changes)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float64", "float64"), ("float16", "float32"), ("bfloat16", "float32")]
)
def test_precision_is_kept_or_raised(dtype: str, expected: str) -> None:
    logits, targets = _random(7, 3, 3)
    loss = segmentation_loss([logits.to(getattr(torch, dtype))], targets, label_index(_spec()), Loss())
    assert loss.dtype == getattr(torch, expected)
    if dtype == "float64":
        plain = _plain(logits.numpy(), targets.numpy(), batch_dice=False)
        assert float(loss) == pytest.approx(plain, rel=1e-13)


ALL_LOSSES = Loss(
    tversky_weight=1,
    boundary_weight=0.1,
    boundary_reach_mm=3,
    top_k_fraction=0.3,
    rare_class_power=0.5,
    deep_supervision_weights=(0.7, 0.3),
)


@pytest.mark.parametrize("regions", [False, True])
def test_parts_of_a_batch_add_up_to_its_loss(regions: bool) -> None:
    order = {"regions_class_order": (1, 2)} if regions else {}
    index = label_index(_spec(ignore_value=9, **order))
    generator = torch.Generator().manual_seed(8)
    k = index.spec.num_outputs
    outputs = [
        torch.randn(5, k, *size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((4, 5, 6), (2, 3, 3))
    ]
    targets = torch.randint(4, (5, 4, 5, 6), generator=generator)
    targets[3] = 3
    keywords = {"spacing_mm": (2.0, 1.0, 1.0), "whole": targets}
    whole = segmentation_loss(outputs, targets, index, ALL_LOSSES, **keywords)
    parts = [
        segmentation_loss([output[part] for output in outputs], targets[part], index, ALL_LOSSES, **keywords)
        for part in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5))
    ]
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-13)
    for of_parts, of_whole in zip(
        torch.autograd.grad(sum(parts), outputs), torch.autograd.grad(whole, outputs), strict=True
    ):
        torch.testing.assert_close(of_parts, of_whole, rtol=1e-10, atol=1e-16)


def test_parts_of_a_batch_weigh_its_batch_dice_by_their_samples() -> None:
    logits, targets = _random(9, 3, 3)
    config = Loss(batch_dice=True, cross_entropy_weight=0)
    index = label_index(_spec())
    parts = [
        float(segmentation_loss([logits[n : n + 1]], targets[n : n + 1], index, config, whole=targets)) for n in (0, 1)
    ]
    alone = [float(segmentation_loss([logits[n : n + 1]], targets[n : n + 1], index, config)) for n in (0, 1)]
    assert sum(parts) == pytest.approx(np.mean(alone), rel=1e-13)
