from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from sagittal.data import heads
from sagittal.data.dataset import read_dataset
from sagittal.data.heads import HeadsDescription, make_heads, mean_label_map_dice
from sagittal.errors import DataError, ResourceError
from sagittal.volumes import Volume, read_labels, read_volume


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HeadsDescription]:
    folder = tmp_path_factory.mktemp("heads")
    return folder, make_heads(folder, train=6, test=2, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_folder_is_a_data_set_in_nnunets_layout(made: tuple[Path, HeadsDescription]) -> None:
    folder, _ = made
    dataset = read_dataset(folder)
    assert [case.id for case in dataset.cases] == [f"head_{index:03d}" for index in range(6)]
    assert dataset.spec.channel_names == ("MR",)
    assert [label.name for label in dataset.spec.labels] == ["cerebrospinal fluid", "grey matter", "white matter"]
    assert dataset.declared_cases == 6
    assert dataset.unused == ()
    assert sorted(path.name for path in (folder / "imagesTs").iterdir()) == [
        "head_006_0000.nii.gz",
        "head_007_0000.nii.gz",
    ]
    assert len(list((folder / "labelsTs").iterdir())) == 2


def test_image_and_labels_share_a_grid_in_ras_and_every_tissue_is_there(made: tuple[Path, HeadsDescription]) -> None:
    folder, _ = made
    for path in sorted(folder.glob("images*/*")):
        image = read_volume(path)
        labels, geometry = read_labels(str(path).replace("images", "labels").replace("_0000", ""))
        assert np.array_equal(geometry.affine, image.affine)
        assert image.array.shape == (1, *labels.shape) == (1, *heads.SHAPE)
        assert image.spacing_mm == (3.0, 3.0, 3.0)
        assert image.reoriented() is image
        # Grey exceeds white, white exceeds fluid, as in the template; the brain is where the image is not 0.
        fluid, grey, white = (int((labels == value).sum()) for value in (1, 2, 3))
        assert grey > white > fluid > 1000
        assert np.array_equal(image.array[0] > 0, labels > 0)


def test_every_second_contrast_is_inverted(made: tuple[Path, HeadsDescription]) -> None:
    folder, _ = made
    for index, path in enumerate(sorted((folder / "imagesTr").iterdir())):
        image = read_volume(path).array[0]
        labels, _ = read_labels(folder / "labelsTr" / f"head_{index:03d}.nii.gz")
        fluid, grey, white = (float(np.median(image[labels == value])) for value in (1, 2, 3))
        assert (white < grey < fluid) if index % 2 else (fluid < grey < white)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    made: tuple[Path, HeadsDescription], tmp_path: Path
) -> None:
    folder, _ = made
    make_heads(tmp_path / "again", train=2, test=0, seed=3)
    again, before = digests(tmp_path / "again"), digests(folder)
    cases = [name for name in again if name != "dataset.json"]
    assert len(cases) == 4
    assert all(again[name] == before[name] for name in cases)
    make_heads(tmp_path / "other", train=1, test=0, seed=4)
    image = "imagesTr/head_000_0000.nii.gz"
    assert digests(tmp_path / "other")[image] != before[image]


def test_the_mean_label_map_is_no_good_answer(made: tuple[Path, HeadsDescription]) -> None:
    folder, _ = made
    assert 0.2 < mean_label_map_dice(folder) < 0.70


def test_the_floor_is_one_where_all_label_maps_are_equal_and_counts_the_majority(tmp_path: Path) -> None:
    labels = np.zeros((3, 4, 5), dtype=np.uint8)
    labels[0] = 1
    other = np.zeros_like(labels)
    for index in range(2):
        Volume(labels[None], np.eye(4)).write(tmp_path / "labelsTr" / f"a{index}.nii.gz")
    Volume(other[None], np.eye(4)).write(tmp_path / "labelsTr" / "b.nii.gz")
    Volume(labels[None], np.eye(4)).write(tmp_path / "labelsTs" / "c.nii.gz")
    assert mean_label_map_dice(tmp_path) == 1.0
    half = labels.copy()
    half[0, :2] = 0
    Volume(half[None], np.eye(4)).write(tmp_path / "labelsTs" / "d.nii.gz")
    assert mean_label_map_dice(tmp_path) == pytest.approx((1.0 + 2 * 10 / 30) / 2)


def test_the_floor_needs_label_maps_on_one_grid(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labelsTr: no label maps"):
        mean_label_map_dice(tmp_path)
    for part, shape in (("labelsTr", (3, 4, 5)), ("labelsTs", (3, 4, 6))):
        Volume(np.ones((1, *shape), dtype=np.uint8), np.eye(4)).write(tmp_path / part / "a.nii.gz")
    with pytest.raises(DataError, match="different shapes"):
        mean_label_map_dice(tmp_path)


def test_deformation_moves_every_voxel_but_folds_none() -> None:
    for seed in range(3):
        points = heads._deformed_points(np.random.default_rng(seed))
        slopes = np.stack([np.stack(np.gradient(axis, heads.SPACING_MM)) for axis in points])
        # x, y, z against D, H, W: a mirrored order, so an unfolded map has a negative determinant everywhere.
        assert np.linalg.det(np.moveaxis(slopes, (0, 1), (-2, -1))).max() < 0


def test_held_out_contrasts_come_from_other_ranges_and_curves_rise() -> None:
    assert heads.TRAIN_LOG_SLOPE[1] < heads.TEST_LOG_SLOPE[0]
    rng = np.random.default_rng(0)
    for log_slope in (heads.TRAIN_LOG_SLOPE, heads.TEST_LOG_SLOPE):
        curve = heads._contrast_curve(rng, log_slope)
        assert (np.diff(curve) > 0).all()
        assert (curve[0], curve[-1]) == (0.0, pytest.approx(1.0))


def test_the_description_tells_seed_ranges_source_and_licence(made: tuple[Path, HeadsDescription]) -> None:
    _, description = made
    assert description == HeadsDescription.from_json(description.to_json())
    text = description.sentences()
    assert "6 training and 2 held-out" in text
    assert "seed 3" in text
    assert "15 degrees" in text
    assert "12 mm" in text
    assert "nilearn" in description.source
    assert "BSD-3-Clause" in description.licence


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install 'sagittal\[demo\]'"):
        make_heads(tmp_path)
    assert list(tmp_path.iterdir()) == []
