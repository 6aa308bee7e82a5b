from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_network import tiny_plan

from sagittal.inference.input_check import check_grid, check_intensities, check_modality
from sagittal.plan import Plan
from sagittal.testing.plans import untrained_spec
from sagittal.volumes import Volume
from sagittal.volumes.geometry import Geometry
from sagittal.volumes.header import Unplaced

CT = {"kind": "ct", "lower": -160.0, "upper": 240.0, "mean": 60.0, "std": 30.0}


def plan_for(name: str = "CT", scheme: dict[str, Any] | None = None, **settings: Any) -> Plan:
    spec = untrained_spec(3).replace(channel_names=(name,))
    return tiny_plan(spec, **{"preprocessing.normalization": [scheme or {"kind": "zscore"}], **settings})


def grid(spacing: tuple[float, float, float], shape: tuple[int, int, int] = (20, 22, 24), **more: Any) -> Geometry:
    return Geometry(shape, np.diag([*spacing[::-1], 1.0])[:, [2, 1, 0, 3]], **more)


def codes(flags: Any) -> list[str]:
    return [flag.code for flag in flags]


def of_values(values: Any) -> list[Volume]:
    array = np.asarray(values, np.float32).reshape(1, 10, 10, -1)
    return [Volume(array, np.eye(4))]


def test_a_scan_like_those_of_the_training_is_not_flagged() -> None:
    assert check_grid(grid((1, 1, 1)), plan_for()) == ()
    body = np.concatenate([np.full(600, -1000), np.linspace(-100, 200, 400)])
    assert check_intensities(of_values(body), plan_for("CT", CT)) == ()
    assert check_intensities(of_values(np.linspace(0, 900, 1000)), plan_for("T1")) == ()


def test_spacing_far_from_the_plans_is_flagged_along_the_networks_axes() -> None:
    (flag,) = check_grid(grid((3.5, 1, 1)), plan_for())
    assert flag.code == "spacing" and "along D" in flag.message and "3.5 times coarser" in flag.message
    (flag,) = check_grid(grid((1, 1, 0.3), (20, 22, 80)), plan_for())
    assert "along W" in flag.message and "3.3 times finer" in flag.message
    turned = Geometry((20, 22, 24), np.diag([1.0, 1.0, 3.5, 1.0]))
    assert "along D" in check_grid(turned, plan_for())[0].message
    first = plan_for(**{"preprocessing.transpose": [2, 0, 1]})
    assert "along H" in check_grid(grid((3.5, 1, 1)), first)[0].message


def test_a_plan_that_keeps_slices_takes_any_distance_of_them() -> None:
    assert check_grid(grid((9, 1, 1)), plan_for(**{"preprocessing.keeps_slices": True})) == ()


def test_a_scan_that_shows_little_and_one_in_other_units_are_flagged() -> None:
    (flag,) = check_grid(grid((1, 1, 1), (20, 4, 24)), plan_for())
    assert flag.code == "size" and "4 mm along H" in flag.message and "18 mm" in flag.message
    (flag,) = check_grid(grid((1, 1, 1), (20, 4000, 24)), plan_for())
    assert flag.code == "size" and "in mm?" in flag.message


def test_orientation() -> None:
    assert codes(check_grid(grid((1, 1, 1), header=Unplaced()), plan_for())) == ["orientation"]
    stored = plan_for(**{"preprocessing.orientation": "stored"})
    assert check_grid(grid((1, 1, 1), header=Unplaced()), stored) == ()
    angle = np.radians(30)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    tilted = Geometry((20, 22, 24), affine[:, [2, 1, 0, 3]])
    (flag,) = check_grid(tilted, plan_for())
    assert "30 degrees" in flag.message
    assert check_grid(tilted, stored) == ()
    sheared = np.eye(4)
    sheared[0, 1] = 0.1
    assert "right angles" in check_grid(Geometry((20, 22, 24), sheared[:, [2, 1, 0, 3]]), plan_for())[0].message


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.linspace(0, 1, 1000), "too close together"),
        (np.linspace(2000, 4000, 1000), "of the voxels"),
        (np.concatenate([np.full(300, 20), np.linspace(900, 1300, 700)]), "above|exceed"),
        (np.concatenate([np.full(500, 235.0), np.linspace(0, 900, 500)]), "offset of -1024"),
        (np.linspace(-159, -40, 1000), "far from its mean"),
        (np.full(1000, 7.0), "every voxel"),
    ],
)
def test_values_that_are_no_hounsfield_units_are_flagged(values: Any, told: str) -> None:
    (flag,) = check_intensities(of_values(values), plan_for("CT", CT))
    assert flag.code == "intensity"
    assert any(part in flag.message for part in told.split("|")), flag.message


def test_a_ct_given_to_a_model_for_mr_is_flagged() -> None:
    values = np.linspace(-1000, 1500, 1000)
    assert "as in CT" in check_intensities(of_values(values), plan_for("T1_post"))[0].message
    assert check_intensities(of_values(values), plan_for("unnamed")) == ()


def test_voxels_that_are_refused_anyway_and_channels_too_many_are_left_to_the_predictor() -> None:
    values = np.linspace(0, 1, 1000)
    values[0] = np.nan
    assert check_intensities(of_values(values), plan_for("CT", CT)) == ()
    two = of_values(np.linspace(0, 900, 1000)) * 2
    assert check_intensities(two, plan_for("T1")) == ()


def test_the_modality_of_a_dicom_header_is_compared_with_the_channels_name() -> None:
    path = [Path("series")]
    assert codes(check_modality(path, ["MR"], plan_for("CT"))) == ["modality"]
    assert codes(check_modality(path, ["CT"], plan_for("T2 FLAIR"))) == ["modality"]
    for modality, name in (("CT", "CT"), ("MR", "T1"), (None, "CT"), ("CT", "intensity")):
        assert check_modality(path, [modality], plan_for(name)) == ()
