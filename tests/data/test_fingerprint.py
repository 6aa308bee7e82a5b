from __future__ import annotations

import numpy as np
import pytest
from small_scans import AXES_RAS, affine_of, ball_case, write_dataset

import sagittal.data.fingerprint as fingerprint_module
from sagittal.data.dataset import content_hash, read_dataset
from sagittal.data.fingerprint import Sample, draw_with_replacement, extract_fingerprint, pooled_intensities
from sagittal.errors import DataError
from sagittal.plan.volume_range import VolumeRange


def as_list(sample: Sample) -> np.ndarray:
    return np.repeat(sample.values, sample.counts)


def test_draws_are_those_of_numpys_choice(monkeypatch):
    monkeypatch.setattr(fingerprint_module, "_CHUNK", 17)
    values = np.random.default_rng(0).normal(size=40).astype(np.float32)
    mine, numpys = np.random.RandomState(1234), np.random.RandomState(1234)
    for _channel in range(2):
        drawn = draw_with_replacement(values, 100, mine)
        np.testing.assert_array_equal(as_list(drawn), np.sort(numpys.choice(values, 100, replace=True)))


def test_a_small_structure_gives_every_voxel_evenly():
    drawn = draw_with_replacement(np.array([3.0, 1.0, 3.0], np.float32), 302, np.random.RandomState(0))
    assert drawn.values.tolist() == [1.0, 3.0]
    assert drawn.counts.tolist() == [101, 201]


def test_nothing_is_drawn_from_nothing():
    assert as_list(draw_with_replacement(np.empty(0, np.float32), 100, np.random.RandomState(0))).size == 0


def test_statistics_are_those_of_the_pooled_draws():
    rng = np.random.default_rng(1)
    samples = [
        Sample(np.sort(rng.choice(900, 40, replace=False)).astype(np.float32), rng.integers(1, 9, 40)) for _ in range(3)
    ]
    pooled = np.concatenate([as_list(sample) for sample in samples]).astype(np.float64)
    found = pooled_intensities(samples)
    assert found.mean == pytest.approx(pooled.mean(), rel=1e-12)
    assert found.std == pytest.approx(pooled.std(), rel=1e-12)
    assert (found.min, found.max) == (pooled.min(), pooled.max())
    wanted = np.percentile(pooled, [0.5, 50, 99.5])
    assert [found.percentile_00_5, found.median, found.percentile_99_5] == pytest.approx(wanted.tolist(), rel=1e-12)


def test_shapes_are_cropped_and_in_ras_order(tmp_path):
    # Stored with D to the right, H to the front, W to the head, reversed: the prepared order is the other way round.
    affine = affine_of((0.5, 1.0, 3.0), -AXES_RAS[:, ::-1])
    cases = {"b": ball_case((14, 12, 10), 0), "a": ball_case((16, 12, 10), 1)}
    found = extract_fingerprint(write_dataset(tmp_path / "data", cases, affine=affine), workers=2)
    assert found.shapes_vox == ((6, 8, 12), (6, 8, 10))
    assert found.spacings_mm == ((3.0, 1.0, 0.5),) * 2
    shares = [6 * 8 * 12 / (16 * 12 * 10), 6 * 8 * 10 / (14 * 12 * 10)]
    assert found.median_relative_size_after_crop == pytest.approx(float(np.mean(shares)))
    assert found.num_cases == 2


def test_intensities_are_of_the_foreground_of_each_channel(tmp_path):
    image, labels = ball_case((10, 12, 14), 0, channels=2)
    image[1] = -2 * image[0]
    dataset = write_dataset(tmp_path / "data", {"a": (image, labels)}, channel_names=("T1", "T2"))
    found = extract_fingerprint(dataset, workers=1)
    first, second = found.intensities
    foreground = image[0][labels > 0].astype(np.float64)
    assert (first.min, first.max) == (foreground.min(), foreground.max())
    assert first.mean == pytest.approx(foreground.mean(), rel=1e-4)
    assert first.percentile_99_5 == pytest.approx(np.percentile(np.repeat(foreground, 1000), 99.5), rel=1e-3)
    assert second.mean == pytest.approx(-2 * first.mean, rel=1e-6)


def test_ignored_voxels_and_empty_cases_add_no_intensities(tmp_path):
    image, labels = ball_case((10, 12, 14), 0)
    image[0][labels == 2] = 1e5
    other, _ = ball_case((10, 12, 14), 1)
    cases = {"a": (image, labels), "b": (other + 1e6, np.zeros_like(labels))}
    declared = {"background": 0, "first": 1, "ignore": 2}
    found = extract_fingerprint(write_dataset(tmp_path / "data", cases, labels=declared), workers=2)
    assert found.num_cases == 2
    assert found.intensities[0].max < 100


def test_volumes_of_classes_are_medians_over_the_cases_that_have_them(tmp_path):
    image, labels = ball_case((10, 12, 14), 0)
    half = np.where(np.arange(14) < 7, labels, 0).astype(labels.dtype)
    cases = {"a": (image, labels), "b": (image, half), "c": (image, np.zeros_like(labels))}
    declared = {"background": 0, "first": 1, "second": 2, "never": 3}
    data = write_dataset(tmp_path / "data", cases, labels=declared, affine=affine_of((2.0, 1.0, 0.5)))
    found = extract_fingerprint(data, workers=2)
    sizes = [[np.sum(array == value) for array in (labels, half)] for value in (1, 2)]
    expected = [float(np.median([size for size in both if size])) / 1000 for both in sizes]
    assert found.class_volumes_ml == (*(pytest.approx(volume) for volume in expected), None)


def test_volumes_of_labels_are_described_over_all_cases_regions_as_wholes(tmp_path):
    image, labels = ball_case((10, 12, 14), 0)
    half = np.where(np.arange(14) < 7, labels, 0).astype(labels.dtype)
    cases = {"a": (image, labels), "b": (image, half), "c": (image, np.zeros_like(labels))}
    declared = {"background": 0, "whole": [1, 2], "second": 2, "never": 3}
    affine = affine_of((2.0, 1.0, 0.5))
    data = write_dataset(tmp_path / "data", cases, labels=declared, affine=affine, regions_class_order=[1, 2, 3])
    found = extract_fingerprint(data, workers=2).label_volumes
    whole, second = ([float(np.isin(one, values).sum()) / 1000 for one in (labels, half)] for values in ((1, 2), 2))
    assert second[1] == 0.0 and whole[0] > whole[1] > 0
    for one, volumes_ml in zip(found, (whole, second, (0.0, 0.0)), strict=True):
        expected = VolumeRange.of([*volumes_ml, 0.0])
        assert (one.present, one.absent) == (expected.present, expected.absent)
        assert one.quantiles_ml == pytest.approx(expected.quantiles_ml)
        assert one.log_mad == pytest.approx(expected.log_mad)


def test_the_fingerprint_knows_the_content_and_not_the_workers(tmp_path):
    cases = {f"case {i}": ball_case((10, 12, 14), i) for i in range(3)}
    dataset = write_dataset(tmp_path / "data", cases)
    found = extract_fingerprint(dataset, workers=1)
    assert found == extract_fingerprint(dataset, workers=3)
    assert found.content_sha256 == content_hash(dataset)


def test_no_foreground_at_all_is_an_error(tmp_path):
    image, labels = ball_case((10, 12, 14), 0)
    with pytest.raises(DataError, match=r"none of 1 label maps has a foreground voxel.*\[1, 2\]") as caught:
        extract_fingerprint(write_dataset(tmp_path / "data", {"a": (image, 0 * labels)}), workers=1)
    assert caught.value.code == "no_foreground"


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda image, labels: image.__setitem__((0, 5, 6, 7), np.nan), "not_finite", "NaN or infinity"),
        (lambda image, labels: labels.__setitem__((0, 0, 0), 5), "undeclared_label", r"label values \[5\] in 1 voxels"),
    ],
)
def test_an_unusable_case_is_named(tmp_path, spoil, code, message):
    bad = ball_case((10, 12, 14), 1)
    spoil(*bad)
    dataset = write_dataset(tmp_path / "data", {"good": ball_case((10, 12, 14), 0), "spoilt": bad})
    with pytest.raises(DataError, match=f"spoilt: .*{message}") as caught:
        extract_fingerprint(dataset, workers=2)
    assert caught.value.code == code


def test_hippocampus(shared_data):
    dataset = read_dataset(shared_data / "hippocampus")
    found = extract_fingerprint(dataset, workers=2)
    assert found.num_cases == 200
    assert tuple(np.median(found.shapes_vox, axis=0)) == (36, 50, 35)
    assert set(found.spacings_mm) == {(1.0, 1.0, 1.0)}
    assert found.median_relative_size_after_crop == 1.0
