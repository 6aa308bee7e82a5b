from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.data.normalizing import mask_bytes, nonzero_mask
from sagittal.errors import PlanError, ResourceError
from sagittal.inference import memory
from sagittal.inference.blending import carried_voxels, visiting_order
from sagittal.inference.coarse import coarse_voxels, kept_windows, piece_bytes
from sagittal.inference.engines.engine import LinearHead, NetworkMemory
from sagittal.inference.labelling import ConsumerFeed, plane_bytes
from sagittal.inference.memory import (
    GIB,
    KEPT_VALUES,
    MAX_SLAB_BYTES,
    MIN_SLAB_BYTES,
    PROCESS_BYTES,
    Choice,
    Comparison,
    Workload,
    budget_bytes,
    choose,
    gib,
    phase_bytes,
    row_bytes,
)
from sagittal.inference.postprocessing import apply, rules_bytes
from sagittal.inference.probabilities import shares_of
from sagittal.inference.uncertainty import Disagreement, comparison_of, votes_of
from sagittal.inference.windows import tile
from sagittal.plan import Label
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume
from sagittal.testing.plans import untrained_spec

MIB = 1 << 20
NETWORK = NetworkMemory(fixed_bytes=20 * MIB, per_window_bytes=300 * MIB)
WORK = Workload(
    stored_bytes=2 * 512 * 512 * 100 * 2,
    stored_voxels=512 * 512 * 100,
    between_voxels=400 * 300 * 120,
    prepared_values=2 * 300 * 250 * 200,
    may_halve_image=True,
    channels=5,
    carried_voxels=(36 * 300 * 250, 12 * 300 * 250, 0),
    halo_voxels=2 * 300 * 250,
    output_voxels=96**3,
    window_voxels=96**3,
    window_channels=2,
    windows=40,
    copies=1,
    label_bytes=512 * 512 * 100,
    row_bytes=1 << 20,
)


def test_predicting_counts_what_is_alive() -> None:
    needs = phase_bytes(WORK, NETWORK, Choice(2, ahead=True, kept_values=1))
    image, window = 2 * 300 * 250 * 200 * 4, 96**3 * 4
    # Two windows of five channels are blended while two more are computed, and one is kept for constant windows.
    outputs = (2 + 1) * 5 * window
    given_windows = 2 * window * (2 + 2)
    kept = 5 * (48 * 300 * 250 + 2 * 300 * 250) * 4
    calls = NETWORK.fixed_bytes + 2 * NETWORK.per_window_bytes
    expected = image + 512 * 512 * 100 + calls + outputs + given_windows + kept + MIN_SLAB_BYTES
    assert needs["predicting"] == PROCESS_BYTES["torch"] + expected


def test_halves_are_half() -> None:
    full, halved = (phase_bytes(WORK, NETWORK, Choice(1, halve_image=half, half=half)) for half in (False, True))
    saved = 2 * 300 * 250 * 200 * 2 + 5 * 48 * 300 * 250 * 2
    assert full["predicting"] - halved["predicting"] == saved
    assert full["preparing the scan"] - halved["preparing the scan"] == 2 * 300 * 250 * 200 * 2


def test_a_held_scan_and_mirrored_copies_count() -> None:
    plain = phase_bytes(WORK, NETWORK, Choice(1))
    held = phase_bytes(replace(WORK, keeps_scan=True), NETWORK, Choice(1))
    assert held["predicting"] - plain["predicting"] == WORK.stored_bytes
    assert held["writing the label map"] - plain["writing the label map"] == WORK.stored_bytes
    mirrored = phase_bytes(replace(WORK, copies=8), NETWORK, Choice(1))
    assert mirrored["predicting"] - plain["predicting"] == 5 * 96**3 * 4


def test_rules_members_planes_and_masks_count() -> None:
    plain = phase_bytes(WORK, NETWORK, Choice(4))
    assert "post-processing" not in plain
    ruled = phase_bytes(replace(WORK, rules_bytes=3 * GIB), NETWORK, Choice(4))
    assert ruled["post-processing"] == WORK.process_bytes + WORK.label_bytes + 3 * GIB
    comparison = Comparison(per_copy=1000, per_window=100, once=7)
    compared = phase_bytes(replace(WORK, comparison=comparison), NETWORK, Choice(4))
    assert compared["predicting"] - plain["predicting"] == 4 * 1000 + 4 * 100 + 7
    mirrored = [
        phase_bytes(replace(WORK, copies=2, comparison=what), NETWORK, Choice(4)) for what in (None, comparison)
    ]
    assert mirrored[1]["predicting"] - mirrored[0]["predicting"] == 4 * 1000 + 2 * 100 + 7
    thick = phase_bytes(replace(WORK, plane_bytes=GIB), NETWORK, Choice(4))
    assert thick["predicting"] - plain["predicting"] == GIB - MIN_SLAB_BYTES
    masked = phase_bytes(replace(WORK, mask_bytes=9 * GIB), NETWORK, Choice(4))
    assert masked["preparing the scan"] == WORK.process_bytes + WORK.stored_bytes + 9 * GIB


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that numpy and Python hold at a time beside what was there before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_is_stated_is_what_rules_take() -> None:
    spec = untrained_spec(4)
    labels = np.random.default_rng(0).integers(0, 4, (150, 160, 170)).astype(np.uint8)
    rules = (
        LargestComponent(labels=("class_1", "class_3")),
        MinimumVolume(label="class_2", volume_ml=0.003),
        FillHoles(label="class_1"),
    )
    taken = peak_of(lambda: apply(labels, rules, (1.0, 1.0, 1.0), spec))
    stated = rules_bytes(labels.nbytes, labels.size)
    assert 0.5 * stated < taken < stated


def test_what_is_stated_is_what_masks_take() -> None:
    channels = [np.random.default_rng(seed).integers(0, 2, (120, 130, 140)).astype(np.int16) for seed in range(2)]
    taken = peak_of(lambda: nonzero_mask(channels))
    assert 0.8 * mask_bytes(channels[0].size) < taken < 1.2 * mask_bytes(channels[0].size)


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("folds", [1, 3])
def test_what_is_stated_is_what_a_comparison_takes(has_regions: bool, folds: int) -> None:
    spec = untrained_spec(4)
    if has_regions:
        values = tuple(range(1, 4))
        labels = tuple(Label(name=f"r{value}", values=values[value - 1 :]) for value in values)
        spec = spec.replace(labels=labels, regions_class_order=values)
    window, outputs = (40, 48, 56), spec.num_outputs
    rng = np.random.default_rng(0)
    copies = [rng.standard_normal((folds, outputs, *window)).astype(np.float32) for _ in range(4)]
    weight = np.ones(window, np.float32)
    disagreement = Disagreement(spec)

    def compare() -> None:
        votes = [votes_of(np.flip(part, 2), None, None, has_regions=has_regions) for given in copies for part in given]
        disagreement.count(votes, weight)

    stated = comparison_of(folds, 4, (outputs, outputs), weight.size, has_regions=has_regions)
    taken = peak_of(compare)
    assert 0.3 * (stated.per_window + stated.once) < taken < stated.per_window + stated.once + MIB
    assert stated.per_copy == (0 if folds == 1 else 2 * copies[0].nbytes)


def test_what_is_stated_is_what_a_slab_takes() -> None:
    outputs, plane = 40, (150, 160)
    head = LinearHead(np.ones((outputs, 8), np.float32), np.zeros(outputs, np.float32))
    for last, channels in ((head, 8), (None, outputs)):
        feed = ConsumerFeed([lambda rows, logits: shares_of(logits, has_regions=False)], last, (channels, 8, *plane), 1)
        feed((slice(0, 8), slice(0, 150), slice(0, 160)), np.zeros((channels, 8, *plane), np.float32))
        # Besides, tiles of a fixed size.
        assert peak_of(feed.end_layer) < plane_bytes(outputs, *plane) + 12 * MIB


def test_a_thick_row_counts_more_than_the_slab() -> None:
    thick = phase_bytes(replace(WORK, row_bytes=1 * GIB), NETWORK, Choice(1))["predicting"]
    assert thick - phase_bytes(WORK, NETWORK, Choice(1))["predicting"] == 1 * GIB - MIN_SLAB_BYTES


@given(budget=st.floats(1.0, 8.0), preferred=st.integers(1, 16), copies=st.sampled_from([1, 8]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_choice_stays_within_the_budget_or_is_refused(budget: float, preferred: int, copies: int) -> None:
    allowed, work = int(budget * GIB), replace(WORK, copies=copies)
    try:
        choice = choose(work, NETWORK, allowed, preferred_batch=preferred)
    except ResourceError as error:
        least = max(phase_bytes(work, NETWORK, Choice(1, halve_image=True, half=True)).values())
        assert least > allowed
        assert gib(least) in error.message and gib(allowed) in error.message
        assert error.code == "memory"
        return
    assert 1 <= choice.window_batch <= preferred
    assert MIN_SLAB_BYTES <= choice.slab_bytes <= MAX_SLAB_BYTES
    assert max(phase_bytes(work, NETWORK, choice).values()) <= allowed


def test_plenty_gives_what_is_preferred() -> None:
    best = Choice(4, ahead=True, kept_values=KEPT_VALUES, slab_bytes=MAX_SLAB_BYTES)
    assert choose(WORK, NETWORK, 100 * GIB, preferred_batch=4) == best
    assert choose(replace(WORK, windows=2), NETWORK, 100 * GIB, preferred_batch=4).window_batch == 2
    assert not choose(replace(WORK, windows=1), NETWORK, 100 * GIB, preferred_batch=4).ahead


def test_float16_is_the_last_resort_and_only_where_it_may_be() -> None:
    seen, wide = [], replace(WORK, channels=60)
    for twentieth in range(100, 5, -1):
        try:
            seen.append(choose(wide, NETWORK, twentieth * GIB // 20, preferred_batch=4))
        except ResourceError:
            break
    assert any(choice.halve_image and not choice.half for choice in seen) and any(choice.half for choice in seen)
    assert all(choice.halve_image and choice.window_batch == 1 for choice in seen if choice.half)
    assert [choice.half for choice in seen] == sorted(choice.half for choice in seen)
    raw = replace(wide, may_halve_image=False)
    least = max(phase_bytes(raw, NETWORK, Choice(1, half=True)).values())
    assert not choose(raw, NETWORK, least, preferred_batch=4).halve_image


def test_a_file_is_taken_before_accuracy_is_given_up() -> None:
    seen, wide = [], replace(WORK, channels=60, may_use_file=True)
    for twentieth in range(100, 5, -1):
        try:
            seen.append(choose(wide, NETWORK, twentieth * GIB // 20, preferred_batch=4))
        except ResourceError:
            break
    assert {choice.levels_in_file for choice in seen} == {0, 1, 2}
    assert all(choice.levels_in_file == 2 for choice in seen if choice.halve_image or choice.half or not choice.ahead)
    least = max(phase_bytes(wide, NETWORK, Choice(1, halve_image=True, half=True, levels_in_file=2)).values())
    assert least < max(phase_bytes(wide, NETWORK, Choice(1, halve_image=True, half=True)).values())
    assert choose(wide, NETWORK, least, preferred_batch=4).levels_in_file == 2


def test_devices_are_kept_busy_as_long_as_memory_allows() -> None:
    tight = max(phase_bytes(WORK, NETWORK, Choice(2, halve_image=True, half=True)).values())
    assert choose(WORK, NETWORK, tight, preferred_batch=8, least_batch=2).window_batch == 2
    assert choose(WORK, NETWORK, tight - 1, preferred_batch=8, least_batch=2).window_batch == 1


def test_what_is_in_the_file_is_not_in_memory() -> None:
    needs = [phase_bytes(WORK, NETWORK, Choice(1, levels_in_file=levels))["predicting"] for levels in range(3)]
    assert needs[0] - needs[1] == 5 * 36 * 300 * 250 * 4 and needs[1] - needs[2] == 5 * 12 * 300 * 250 * 4


def test_refusal_names_every_phase() -> None:
    with pytest.raises(ResourceError, match=r"preparing the scan .*predicting .*writing the label map .*--memory-gib"):
        choose(WORK, NETWORK, GIB // 2, preferred_batch=4)


def _large_scan(channels: int, stride: int) -> Workload:
    """Return the work of 512 x 512 x 800 voxels of int16 with a window of 128 voxels."""
    shape, voxels = (800, 512, 512), 800 * 512 * 512
    tiling = tile(shape, (128, 128, 128), 0.5)
    order = visiting_order(tiling)
    output = coarse_voxels(tiling.window, stride)
    fine = carried_voxels(tiling, order)
    assert order[0] == 0 and sum(fine) < 88 * 512 * 512
    return Workload(
        stored_bytes=2 * voxels,
        stored_voxels=voxels,
        between_voxels=0,
        prepared_values=voxels,
        may_halve_image=True,
        channels=channels,
        carried_voxels=(output * kept_windows(tiling, order, stride, (shape, shape)), 0, 0) if stride > 1 else fine,
        halo_voxels=0,
        output_voxels=output,
        window_voxels=128**3,
        window_channels=1,
        windows=tiling.num_windows,
        copies=1,
        label_bytes=voxels,
        row_bytes=piece_bytes(channels, stride) if stride > 1 else row_bytes(32, tiling.window, 0, shape, shape),
        process_bytes=PROCESS_BYTES["openvino"],
    )


@pytest.mark.parametrize(("budget", "half"), [(6, False), (4, True)])
def test_117_classes_of_a_large_scan_fit_with_mednext(budget: int, half: bool) -> None:
    # 32 features. 1.2 GiB is what a window may take for this to hold.
    network = NetworkMemory(fixed_bytes=50 * MIB, per_window_bytes=1200 * MIB)
    choice = choose(_large_scan(32, 1), network, budget * GIB, preferred_batch=1)
    assert choice.half == half and choice.window_batch == 1


@pytest.mark.parametrize("budget", [6, 4])
def test_117_classes_of_a_large_scan_fit_with_segformer3d(budget: int) -> None:
    # 117 logits at a quarter of the resolution: about one layer of windows is kept, and float32 suffices.
    network = NetworkMemory(fixed_bytes=50 * MIB, per_window_bytes=900 * MIB)
    choice = choose(_large_scan(117, 4), network, budget * GIB, preferred_batch=1)
    assert not choice.half


def test_without_a_budget_a_share_of_what_is_free_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * GIB)
    assert budget_bytes(None) == 8 * GIB and budget_bytes(6.0) == 6 * GIB
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert budget_bytes(None) is None


@pytest.mark.parametrize("memory_gib", [0.0, -1.0, float("nan"), float("inf")])
def test_budgets_that_are_no_positive_number_are_refused(memory_gib: float) -> None:
    with pytest.raises(PlanError, match="above 0"):
        budget_bytes(memory_gib)
