from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from cached_cases import make_plan
from small_scans import ball_case, write_dataset

import sagittal.data.cache as cache_module
from sagittal.data.cache import Cache, Entry, build_cache, entry_of, foreground_locations, need_bytes, safe_name
from sagittal.data.dataset import digest_of, files_of, read_dataset
from sagittal.errors import DataError, ResourceError
from sagittal.plan import Plan
from sagittal.plan.plan import NoNormalization, ZScore
from sagittal.volumes.work_memory import MIB

SHAPE = (10, 12, 14)


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", {f"case_{i}": ball_case(SHAPE, i) for i in range(3)})


@pytest.fixture
def plan(dataset) -> Plan:
    plan = make_plan((8, 8, 8))
    preprocessing = plan.preprocessing.replace(spacing_mm=(1.0, 1.0, 1.0))
    return plan.replace(dataset=dataset.spec, preprocessing=preprocessing)


def contents_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_cache_holds_images_indices_and_locations(dataset, plan, tmp_path):
    built: list[str] = []
    cache = build_cache(dataset, plan, tmp_path / "cache", workers=2, on_case=built.append)
    assert cache.case_ids == ("case_0", "case_1", "case_2")
    assert sorted(built) == list(cache.case_ids)
    image, labels = ball_case(SHAPE, 1)
    inside = (slice(2, -2),) * 3
    cropped = image[:, *inside]
    assert isinstance(cache.image(1), np.memmap) and cache.image(1).dtype == np.float16
    np.testing.assert_allclose(cache.image(1), (cropped - cropped.mean()) / cropped.std(), atol=2e-3)
    np.testing.assert_array_equal(cache.labels(1), labels[inside])
    assert cache.labels(1).dtype == np.uint8
    for index, voxels in cache.locations(1).items():
        assert sorted(map(tuple, voxels)) == sorted(map(tuple, np.argwhere(labels[inside] == index)))
    with pytest.raises(ValueError, match="read-only"):
        cache.image(1)[...] = 0


def test_the_second_time_nothing_is_read_or_written(dataset, plan, tmp_path, monkeypatch):
    first = build_cache(dataset, plan, tmp_path / "cache", workers=1)
    before = contents_of(tmp_path / "cache")
    monkeypatch.setattr(cache_module, "read_case", lambda *_: pytest.fail("a finished case was prepared again"))
    built: list[str] = []
    second = build_cache(
        dataset,
        plan,
        tmp_path / "cache",
        workers=1,
        on_case=built.append,
        digests={path: digest_of(path) for case in dataset.cases for path in files_of(case)},
    )
    assert second == first and not built
    assert contents_of(tmp_path / "cache") == before


@pytest.mark.parametrize("part", ["images", "labels", "locations"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_stopped_run_goes_on_with_what_is_missing(dataset, plan, tmp_path, part, damage):
    cache = build_cache(dataset, plan, tmp_path / "cache", workers=2)
    before = contents_of(cache.folder)
    (path,) = cache.folder.glob(f"{part}/case_1-*.np*")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    built: list[str] = []
    build_cache(dataset, plan, tmp_path / "cache", workers=2, on_case=built.append)
    assert built == ["case_1"]
    assert {name: content for name, (content, _) in contents_of(cache.folder).items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_names_follow_what_the_content_depends_on(dataset, plan):
    case = dataset.cases[0]
    digests = {path: digest_of(path) for path in files_of(case)}
    entry = entry_of(case, digests, plan)
    assert entry == entry_of(case, digests, plan.replace(reasons={"a": "b"}))
    assert entry == entry_of(case, digests, plan.replace(dataset=plan.dataset.replace(name="another")))
    spaced = plan.replace(preprocessing=plan.preprocessing.replace(spacing_mm=(1.0, 1.0, 2.0)))
    ignoring = entry_of(case, digests, plan.replace(dataset=plan.dataset.replace(ignore_value=3)))
    other_label = entry_of(case, {**digests, case.labels: (1, "other")}, plan)
    other_image = entry_of(case, {**digests, case.images[0]: (1, "other")}, plan)
    assert entry.image == ignoring.image == other_label.image
    others = [entry_of(case, digests, spaced), ignoring, other_label, other_image]
    assert len({entry.labels, *(other.labels for other in others)}) == 5
    assert len({entry.image, *(other.image for other in others)}) == 3


def test_a_changed_label_map_costs_no_image_and_a_changed_case_no_other(dataset, plan, tmp_path, monkeypatch):
    build_cache(dataset, plan, tmp_path / "cache", workers=1)
    image, labels = ball_case(SHAPE, 1)
    moved = np.roll(labels, 1, axis=0)
    other = write_dataset(tmp_path / "other", {"a": (image, moved)})
    shutil.copy(other.cases[0].labels, dataset.cases[1].labels)
    monkeypatch.setattr(cache_module, "prepare_image", lambda *_: pytest.fail("an image was prepared again"))
    built: list[str] = []
    cache = build_cache(read_dataset(dataset.folder), plan, tmp_path / "cache", workers=1, on_case=built.append)
    assert built == ["case_1"]
    np.testing.assert_array_equal(cache.labels(1), moved[2:-2, 2:-2, 2:-2])


def test_a_case_that_runs_out_of_memory_is_tried_once_more_alone(dataset, plan, tmp_path, monkeypatch):
    real, failures = cache_module.prepare_image, iter([MemoryError(), None, None, None])

    def prepare_image(*arguments, **options):
        failure = next(failures)
        if failure is not None:
            raise failure
        return real(*arguments, **options)

    monkeypatch.setattr(cache_module, "prepare_image", prepare_image)
    built: list[str] = []
    build_cache(dataset, plan, tmp_path / "cache", workers=2, on_case=built.append)
    assert sorted(built) == ["case_0", "case_1", "case_2"]


def test_a_case_that_fits_nowhere_is_named_with_the_numbers(dataset, plan, tmp_path, monkeypatch):
    def prepare_image(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(cache_module, "prepare_image", prepare_image)
    with pytest.raises(ResourceError, match=r"case_\d: does not fit into memory.*takes about [\d,]+ MiB") as caught:
        build_cache(dataset, plan, tmp_path / "cache", workers=2)
    assert caught.value.code == "memory"


def test_the_need_of_a_case_grows_with_its_voxels(tmp_path, plan):
    sizes = ((10, 12, 14), (100, 120, 140))
    dataset = write_dataset(tmp_path / "sizes", {f"case_{size[0]}": ball_case(size, 0) for size in sizes})
    small, large = (need_bytes(case, plan) for case in dataset.cases)
    assert 20 * 1_680_000 < large - small < 40 * 1_680_000
    assert small < 300 * MIB


@pytest.mark.parametrize(("scheme", "factor"), [(ZScore(), 1.0), (NoNormalization(), 1.0), (NoNormalization(), 1e5)])
def test_float32_is_kept_where_float16_would_lose_range(tmp_path, plan, scheme, factor):
    image, labels = ball_case(SHAPE, 0)
    dataset = write_dataset(tmp_path / "other", {"a": (image * factor, labels)})
    plan = plan.replace(preprocessing=plan.preprocessing.replace(normalization=(scheme,)))
    stored = build_cache(dataset, plan, tmp_path / "cache", workers=1).image(0)
    assert stored.dtype == (np.float16 if isinstance(scheme, ZScore) else np.float32)
    assert np.isfinite(stored).all()


def test_outliers_beyond_float16_are_kept(tmp_path, plan):
    image, labels = ball_case((50, 50, 50), 0, border=0)
    image *= 1e-6
    image[0, 0, 0, 0] = 1e9
    plan = plan.replace(preprocessing=plan.preprocessing.replace(crop_to_nonzero=False))
    dataset = write_dataset(tmp_path / "other", {"a": (image, labels)})
    assert build_cache(dataset, plan, tmp_path / "cache", workers=1).image(0).max() == pytest.approx(353.6, rel=0.01)


def test_case_ids_of_any_kind_have_safe_distinct_file_names(tmp_path, plan):
    ids = ["a", "A b", "A_b", "..", "é" * 3, "a_labels", "x" * 90, "x" * 91]
    names = [safe_name(case) for case in ids]
    assert len(set(names)) == len(ids)
    assert all(name[0] != "." and len(name) < 100 and set(name) <= set(map(chr, range(45, 123))) for name in names)
    odd = {"A b": ball_case(SHAPE, 0), "A_b": ball_case(SHAPE, 1), "é'(1)": ball_case(SHAPE, 2)}
    cache = build_cache(write_dataset(tmp_path / "odd", odd), plan, tmp_path / "cache", workers=2)
    assert cache.case_ids == tuple(sorted(odd))
    assert [cache.image(i).shape for i in range(3)] == [(1, 6, 8, 10)] * 3


def test_locations_are_a_sample_without_replacement_as_nnunet_takes_it():
    labels = np.zeros((40, 50, 60), np.uint8)
    labels[:20] = 1
    labels[30, 30, 30:40] = 3
    found = foreground_locations(labels, 4)
    assert {index: voxels.shape for index, voxels in found.items()} == {1: (10_000, 3), 2: (0, 3), 3: (10, 3)}
    assert len(np.unique(found[1], axis=0)) == 10_000
    assert (labels[tuple(found[1].T)] == 1).all()
    places = np.argwhere(labels == 1)[np.random.RandomState(1234).choice(60_000, 10_000, replace=False)]
    np.testing.assert_array_equal(found[1], places)


def test_more_than_a_hundredth_of_a_large_structure_is_kept(monkeypatch):
    monkeypatch.setattr(cache_module, "_MIN_LOCATIONS", 10)
    assert len(foreground_locations(np.ones((20, 30, 40), np.uint8), 2)[1]) == 240


def test_a_bad_case_is_named_and_the_good_ones_stay(dataset, plan, tmp_path):
    (dataset.folder / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"not an image")
    with pytest.raises(DataError, match="case_2: "):
        build_cache(dataset, plan, tmp_path / "cache", workers=1)
    assert {path.name.split("-")[0] for path in tmp_path.rglob("images/*.npy")} == {"case_0", "case_1"}


def test_a_full_disk_leaves_nothing_half_written(dataset, plan, tmp_path, monkeypatch):
    real_save, calls = np.save, []

    def save(file, array, **options):
        calls.append(array)
        if len(calls) == 3:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(file, array, **options)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(ResourceError, match=r"case_1-\w+\.npy: can't be written \(No space left on device\)") as caught:
        build_cache(dataset, plan, tmp_path / "cache", workers=1)
    assert caught.value.code == "disk"
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {"case_0"}
    monkeypatch.undo()
    built: list[str] = []
    build_cache(dataset, plan, tmp_path / "cache", workers=1, on_case=built.append)
    assert built == ["case_1", "case_2"]


def test_a_cache_folder_that_cant_be_made_is_refused(dataset, plan, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ResourceError, match=r"taken: can't be written \(Not a directory\).*another cache folder"):
        build_cache(dataset, plan, tmp_path / "taken", workers=1)


def test_a_cache_that_lost_a_file_says_so(tmp_path):
    cache = Cache(tmp_path, (Entry("a", "a", "a"),))
    for read in (cache.image, cache.labels, cache.locations):
        with pytest.raises(ResourceError, match="Delete it and start again") as caught:
            read(0)
        assert caught.value.code == "damaged_cache"


def test_another_data_set_than_the_plans_is_refused(tmp_path, plan):
    labels = {"background": 0, "first": 1, "third": 2}
    dataset = write_dataset(tmp_path / "other", {"a": ball_case(SHAPE, 0)}, labels=labels)
    with pytest.raises(DataError, match=r"differs from the plan's.*'third'") as caught:
        build_cache(dataset, plan, tmp_path / "cache", workers=1)
    assert caught.value.code == "other_dataset"


def test_a_case_without_labels_is_refused(dataset, plan, tmp_path):
    (dataset.folder / "labelsTr" / "case_1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case_1: .*no such file"):
        build_cache(dataset, plan, tmp_path / "cache", workers=2)
