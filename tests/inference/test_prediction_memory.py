from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.errors import ResourceError
from sagittal.inference.memory import (
    GIB,
    MAX_SLAB_BYTES,
    MIN_SLAB_BYTES,
    PROCESS_BYTES,
    Choice,
    NetworkMemory,
    Workload,
    choose,
    gib,
    phase_bytes,
)

NETWORK = NetworkMemory(fixed_bytes=20 << 20, per_window_bytes=300 << 20)
WORK = Workload(
    channels=2,
    outputs=5,
    stored_voxels=512 * 512 * 100,
    cropped_voxels=400 * 300 * 90,
    prepared_voxels=300 * 250 * 200,
    is_padded=False,
    window_voxels=96**3,
    windows=40,
    label_bytes=1,
    plane_bytes=1 << 20,
    keeps_scan=False,
)


def test_predicting_counts_what_is_alive() -> None:
    needs = phase_bytes(WORK, NETWORK, Choice(2, MIN_SLAB_BYTES))
    prepared, logits = 300 * 250 * 200 * 2 * 4, 300 * 250 * 200 * 5 * 4
    window = 96**3 * (2 * 2 + 3 * 5) * 4
    calls = 1.25 * (NETWORK.fixed_bytes + 2 * NETWORK.per_window_bytes)
    assert needs["predicting"] == PROCESS_BYTES + 2 * prepared + logits + int(calls) + 2 * window


def test_a_held_scan_and_a_gpu_count() -> None:
    choice = Choice(1, MIN_SLAB_BYTES)
    plain = phase_bytes(WORK, NETWORK, choice)
    held = phase_bytes(replace(WORK, keeps_scan=True), NETWORK, choice)
    scan = 2 * WORK.stored_voxels * 4
    assert held["predicting"] - plain["predicting"] == scan
    assert held["making the label map"] - plain["making the label map"] == scan
    beside = phase_bytes(replace(WORK, on_device=True), NETWORK, choice)
    assert plain["predicting"] - beside["predicting"] > 1.25 * 320 * (1 << 20)


def test_cutting_off_the_padding_takes_the_logits_twice() -> None:
    choice = Choice(1, MIN_SLAB_BYTES)
    small = NetworkMemory(0, 0)
    one_voxel = replace(WORK, window_voxels=1)
    plain, padded = (
        phase_bytes(replace(one_voxel, is_padded=pads), small, choice)["predicting"] for pads in (False, True)
    )
    assert padded - plain == pytest.approx(WORK.prepared_voxels * 5 * 4, abs=100)


def test_a_thick_plane_counts_more_than_the_slab() -> None:
    choice = Choice(1, MIN_SLAB_BYTES)
    thick = phase_bytes(replace(WORK, plane_bytes=1 * GIB), NETWORK, choice)["making the label map"]
    assert thick - phase_bytes(WORK, NETWORK, choice)["making the label map"] == 1 * GIB - MIN_SLAB_BYTES


@given(budget=st.floats(1.0, 8.0), preferred=st.integers(1, 16))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_choice_stays_within_the_budget_or_is_refused(budget: float, preferred: int) -> None:
    allowed = int(budget * GIB)
    try:
        choice = choose(WORK, NETWORK, allowed, preferred_batch=preferred)
    except ResourceError as error:
        least = max(phase_bytes(WORK, NETWORK, Choice(1, MIN_SLAB_BYTES)).values())
        assert least > allowed
        assert gib(least) in error.message and gib(allowed) in error.message
        assert error.code == "memory"
        return
    assert 1 <= choice.window_batch <= preferred
    assert MIN_SLAB_BYTES <= choice.slab_bytes <= MAX_SLAB_BYTES
    assert max(phase_bytes(WORK, NETWORK, choice).values()) <= allowed


def test_plenty_gives_what_is_preferred() -> None:
    assert choose(WORK, NETWORK, 100 * GIB, preferred_batch=4) == Choice(4, MAX_SLAB_BYTES)
    assert choose(replace(WORK, windows=2), NETWORK, 100 * GIB, preferred_batch=4).window_batch == 2


def test_refusal_names_every_phase() -> None:
    with pytest.raises(ResourceError, match=r"preparing the scan .*predicting .*making the label map .*--memory-gib"):
        choose(WORK, NETWORK, 1 * GIB, preferred_batch=4)
