from __future__ import annotations

from pathlib import Path

import numpy as np
from faulty_sets import MM, coded, declare, look, only, write_case
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.data.doctor.structures import may_erase, thin_structures
from sagittal.data.doctor.target import planned_spacing
from sagittal.data.resampling import resample_labels, separate_axis
from sagittal.plan import ChannelIntensities, Fingerprint
from sagittal.planning.spacing import target_spacing
from sagittal.volumes.crop import bounding_box
from sagittal.volumes.resampling import new_shape

LENGTHS = st.floats(0.3, 8.0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(
        st.tuples(st.tuples(LENGTHS, LENGTHS, LENGTHS), st.tuples(*[st.integers(8, 400)] * 3)), min_size=1, max_size=6
    )
)
def test_the_planned_spacing_is_the_planners(cases):
    spacings, shapes = [spacing for spacing, _ in cases], [shape for _, shape in cases]
    numbers = ChannelIntensities(
        mean=0.0, median=0.0, std=1.0, min=-1.0, max=1.0, percentile_00_5=-1.0, percentile_99_5=1.0
    )
    fingerprint = Fingerprint(
        content_sha256="0" * 64,
        shapes_vox=tuple(shapes),
        spacings_mm=tuple(spacings),
        intensities=(numbers,),
        median_relative_size_after_crop=1.0,
    )
    assert planned_spacing(spacings, shapes) == target_spacing(fingerprint, 3.0)[0]


def test_nothing_is_thin_where_no_axis_gets_coarser():
    assert not may_erase((1.0, 1.0, 1.0), (1.0, 0.9995 + 1e-3, 0.5))
    assert may_erase((1.0, 1.0, 1.0), (0.5, 0.5, 1.1))


def look_at(labels: np.ndarray, spacing, target):
    box = bounding_box(labels != 0)
    assert box is not None
    return thin_structures(labels[box.slices] != 0, box, labels.shape, spacing, target)


def test_structures_are_counted_and_followed_through_the_resampling():
    labels = np.zeros((12, 14, 16), np.uint8)
    labels[2:10, 2:12, 2:9] = 1  # 8 x 10 x 7 mm, safe
    labels[4, 4, 12] = 1  # one voxel of 1 mm
    labels[8:11, 10:13, 12] = 1  # 1 mm thin
    found = look_at(labels, (1.0, 1.0, 1.0), (1.0, 1.0, 3.0))
    assert found is not None
    assert (found.structures, found.thin) == (3, 2)
    assert (found.thinnest_mm, found.planned_mm) == (1.0, 3.0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    target=st.tuples(*[st.sampled_from([1.0, 1.4, 2.0, 2.7, 3.3])] * 3),
    size=st.tuples(*[st.integers(1, 4)] * 3),
)
def test_erased_is_what_resampling_erases(seed, target, size):
    rng = np.random.default_rng(seed)
    labels = np.zeros((11, 13, 17), np.uint8)
    start = [int(rng.integers(0, n - s + 1)) for n, s in zip(labels.shape, size, strict=True)]
    labels[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))] = 1
    spacing = (1.0, 1.0, 1.0)
    found = look_at(labels, spacing, target)
    apart = separate_axis(spacing, target, 3.0)
    left = resample_labels(labels, new_shape(labels.shape, spacing, target), apart=apart)
    if found is None:
        assert all(length >= mm * 0.999 for length, mm in zip(size, target, strict=True))
    elif found.erased:
        assert not left.any()
    elif not left.any():
        # Exactly half of a voxel: the tie goes to whichever voxel is nearer.
        assert min(size) == 1


def test_a_tiny_structure_is_told_by_label_with_the_numbers(tmp_path: Path):
    declare(tmp_path, {"organ": 1, "speck": 2})
    coarse = MM.copy()
    coarse[:3, :3] *= 3
    big = np.zeros((10, 11, 12), np.uint8)
    big[3:8, 3:8, 3:8] = 1
    big[1, 1, 1] = 2
    for case in "abc":
        write_case(tmp_path, case, big, coarse)
    fine = np.zeros((20, 22, 24), np.uint8)
    fine[3:15, 3:15, 3:15] = 1
    fine[17, 18, 19] = 2
    write_case(tmp_path, "d", fine)
    finding = only(coded(look(tmp_path), "tiny_structure"))
    assert (finding.level, finding.case, finding.label) == ("warning", "d", "speck")
    assert (
        "label speck: 1 of 1 structure in 1 case are thinner than a voxel of the planned spacing, 3 x 3 x 3 mm"
        in finding.message
    )
    assert "the thinnest measures 1 of 3 mm. 1 would have no voxel left" in finding.message
    assert "nothing of the label would be left in 1 (d)" in finding.message


def test_a_thin_structure_that_stays_is_a_fact(tmp_path: Path):
    declare(tmp_path, {"organ": 1})
    coarse = MM.copy()
    coarse[:3, :3] *= 1.2
    labels = np.zeros((10, 11, 12), np.uint8)
    labels[3:8, 3:8, 3:8] = 1
    for case in "abc":
        write_case(tmp_path, case, labels, coarse)
    plate = np.zeros((12, 12, 12), np.uint8)
    plate[2:10, 2:10, 5] = 1
    write_case(tmp_path, "d", plate)
    finding = only(coded(look(tmp_path), "tiny_structure"))
    assert (finding.level, finding.case) == ("fact", "")
