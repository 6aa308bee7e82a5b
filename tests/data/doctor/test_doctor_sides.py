from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from faulty_sets import MM, coded, declare, look, only, write_case

from sagittal.data.doctor.sides import Extent, Sides, side_pairs, suspected_flips
from sagittal.plan.dataset import Label

KIDNEYS = (Label(name="kidney_left", values=(1,)), Label(name="kidney_right", values=(2,)))
ORGANS = (Label(name="liver", values=(1,)), Label(name="spleen", values=(2,)))


def labels_of(*names: str) -> list[Label]:
    return [Label(name=name, values=(value,)) for value, name in enumerate(names, start=1)]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("kidney_left", "kidney_right"),
        ("Left-Hippocampus", "Right-Hippocampus"),
        ("LeftLung", "RightLung"),
        ("lh_thalamus", "rh_thalamus"),
        ("L femur", "R femur"),
        ("left", "right"),
        ("rib_left_3", "rib_right_3"),
    ],
)
def test_names_that_differ_in_the_side_alone_are_pairs(left, right):
    ((one, other),) = side_pairs(labels_of(right, "liver", left))
    assert (one.name, other.name) == (left, right)


@pytest.mark.parametrize(
    "names",
    [("liver", "spleen"), ("kidney_left", "lung_right"), ("L1", "L2"), ("left_right", "right_left"), ("cleft",)],
)
def test_other_names_are_no_pairs(names):
    assert side_pairs(labels_of(*names)) == ()


def at(case: str, left: float, right: float, spread: float = 10.0) -> Sides:
    extents = {1: Extent(100, float(left), spread**2), 2: Extent(100, float(right), spread**2)}
    return Sides(case, 0.0, 150.0, extents)


def test_one_mirrored_case_is_named_with_its_numbers():
    cases = [at(f"c{number}", -60, 58) for number in range(3)] + [at("turned", 61, -59)]
    finding = only(list(suspected_flips(cases, KIDNEYS)))
    assert (finding.level, finding.code, finding.case) == ("warning", "suspected_flip", "turned")
    assert "kidney_left lies 120 mm to the right of kidney_right (world x 61 and -59 mm)" in finding.message
    assert "3 of 3 other cases are the right way round" in finding.message
    assert finding.shown_cases == ("turned", "c0")


def test_a_single_mirrored_case_is_told_by_its_pairs_alone():
    assert only(list(suspected_flips([at("turned", 61, -59)], KIDNEYS))).case == "turned"


def test_where_most_cases_are_mirrored_it_is_one_finding():
    cases = [at(f"c{number}", 60, -60) for number in range(4)] + [at("upright", -60, 60)]
    finding = only(list(suspected_flips(cases, KIDNEYS)))
    assert finding.case == ""
    assert "exchanged in 4 of 5 cases" in finding.message
    assert "The others (upright) are the other way round." in finding.message


def test_halves_that_lie_side_by_side_in_depth_prove_nothing():
    # Their centroids differ by less than they are wide.
    assert not list(suspected_flips([at("c", 4, -4, spread=8.0)], KIDNEYS))


def test_one_swapped_pair_among_upright_ones_is_told():
    labels = labels_of("kidney_left", "kidney_right", "lung_left", "lung_right", "eye_left", "eye_right")

    def case(name: str, swapped: bool) -> Sides:
        places = {1: -60.0, 2: 60.0, 3: -80.0, 4: 80.0, 5: -30.0, 6: 30.0}
        if swapped:
            places[5], places[6] = 30.0, -30.0
        return Sides(name, 0.0, 150.0, {value: Extent(9, x, 4.0) for value, x in places.items()})

    cases = [case(f"c{number}", False) for number in range(5)] + [case("odd", True)]
    finding = only(list(suspected_flips(cases, labels)))
    assert finding.case == "odd"
    assert "eye_left and eye_right seem exchanged" in finding.message
    # Four other cases would not be enough to say so.
    assert not list(suspected_flips(cases[1:], labels))


def organs(case: str, liver: float, spleen: float, centre: float = 0.0) -> Sides:
    extents = {1: Extent(900, float(liver + centre), 900.0), 2: Extent(100, float(spleen + centre), 100.0)}
    return Sides(case, float(centre), 150.0, extents)


def a_cohort(count: int, seed: int = 0) -> list[Sides]:
    rng = np.random.default_rng(seed)
    return [
        organs(f"c{n}", 50 + rng.normal(0, 6), -80 + rng.normal(0, 6), centre=float(rng.normal(0, 40)))
        for n in range(count)
    ]


def test_without_pairs_a_case_that_fits_the_others_only_mirrored_is_told_with_the_statistics():
    cases = [*a_cohort(19), organs("turned", -52, 79, centre=12)]
    finding = only(list(suspected_flips(cases, ORGANS)))
    assert finding.case == "turned"
    assert "3 of 3 measures that the other cases agree on" in finding.message
    assert "19 of 19 other cases" in finding.message
    assert "sign test p = 2e-06" in finding.message


@pytest.mark.parametrize("count", [1, 6, 7, 20])
def test_a_cohort_without_a_mirrored_case_gives_no_alarm(count):
    assert not list(suspected_flips(a_cohort(count), ORGANS))


def test_without_pairs_few_cases_prove_nothing():
    assert not list(suspected_flips([*a_cohort(6), organs("turned", -50, 80)], ORGANS))
    assert list(suspected_flips([*a_cohort(7), organs("turned", -50, 80)], ORGANS))


def test_what_is_found_on_both_sides_gives_no_alarm():
    # Tumours: three quarters on one side, anywhere in it.
    rng = np.random.default_rng(1)
    places = np.concatenate([rng.uniform(20, 90, 30), rng.uniform(-90, -20, 10)])
    cases = [Sides(f"c{n}", 0.0, 150.0, {1: Extent(50, float(x), 25.0)}) for n, x in enumerate(places)]
    assert not list(suspected_flips(cases, labels_of("tumour")))


def test_one_organ_on_the_other_side_is_anatomy_not_a_mirrored_scan():
    labels = labels_of("liver", "spleen", "stomach")
    cohort = [
        Sides(one.case, one.centre_mm, 150.0, {**one.extents, 3: Extent(99, one.centre_mm - 60, 9.0)})
        for one in a_cohort(20)
    ]
    odd = organs("odd", 50, -80)
    assert not list(
        suspected_flips([*cohort, Sides("odd", 0.0, 150.0, {**odd.extents, 3: Extent(99, 60.0, 9.0)})], labels)
    )


def test_regions_count_with_all_their_values():
    halves = (Label(name="left", values=(1, 3)), Label(name="right", values=(2,)))
    sides = Sides("c", 0.0, 100.0, {1: Extent(10, 30.0, 4.0), 3: Extent(30, 50.0, 4.0), 2: Extent(10, -40.0, 4.0)})
    found = sides.of(halves[0])
    assert found is not None
    assert (found.voxels, found.mean_mm, found.variance_mm2) == (40, 45.0, pytest.approx(79.0))
    assert sides.of(Label(name="x", values=(9,))) is None
    assert "left lies 85 mm to the right of right" in only(list(suspected_flips([sides], halves))).message


def two_boxes() -> np.ndarray:
    labels = np.zeros((10, 12, 20), np.uint8)
    labels[2:8, 3:9, 2:6] = 1
    labels[3:7, 4:8, 13:18] = 2
    return labels


@pytest.mark.parametrize("how", ["array", "header"])
def test_a_mirrored_scan_on_disk_is_found(tmp_path: Path, how: str):
    declare(tmp_path, {"kidney_left": 1, "kidney_right": 2})
    for case in "abc":
        write_case(tmp_path, case, two_boxes())
    turned = MM.copy()
    turned[0, 2] *= -1
    if how == "array":
        write_case(tmp_path, "d", np.ascontiguousarray(two_boxes()[:, :, ::-1]))
    else:
        write_case(tmp_path, "d", two_boxes(), turned)
    assert only(coded(look(tmp_path), "suspected_flip")).case == "d"


def test_another_axis_order_with_a_true_header_is_no_flip(tmp_path: Path):
    declare(tmp_path, {"kidney_left": 1, "kidney_right": 2})
    turned = MM.copy()
    turned[0, 2], turned[0, 3] = -1, 19
    for case in "abc":
        write_case(tmp_path, case, two_boxes())
    write_case(tmp_path, "d", np.ascontiguousarray(two_boxes()[:, :, ::-1]), turned)
    assert not coded(look(tmp_path), "suspected_flip")
