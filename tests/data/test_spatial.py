from __future__ import annotations

import math

import numpy as np
import pytest

from sagittal.data.draws import seeded
from sagittal.data.spatial import SpatialDraw, box_size, draw_spatial, source_matrix, through_plane_axis
from sagittal.plan.augmentation import Augmentation

PATCH = (12, 17, 14)
SPACING = (2.0, 1.0, 1.5)


def test_rotation_is_rigid_in_millimetres_and_scale_stretches() -> None:
    draw = SpatialDraw(rotation_rad=(0.4, -0.3, 0.2), extent_factor=(1.3, 1.3, 1.3))
    matrix = source_matrix(draw, SPACING)
    world = np.diag(SPACING) @ matrix @ np.diag(1 / np.asarray(SPACING))
    assert np.allclose(world @ world.T, 1.3**2 * np.eye(3))


def test_draws_have_the_probabilities_and_ranges_of_the_plan() -> None:
    config = Augmentation()
    draws = [draw_spatial(seeded(seed), config, (48, 64, 48)) for seed in range(3000)]
    rotated = [draw for draw in draws if any(draw.rotation_rad)]
    scaled = [draw.extent_factor[0] for draw in draws if draw.extent_factor != (1.0, 1.0, 1.0)]
    assert len(rotated) / len(draws) == pytest.approx(0.2, abs=0.03)
    assert len(scaled) / len(draws) == pytest.approx(0.2, abs=0.03)
    assert np.mean([draw.is_exact for draw in draws]) == pytest.approx(0.64, abs=0.03)
    assert np.mean([draw.mirrored for draw in draws], axis=0) == pytest.approx([0.5] * 3, abs=0.03)
    assert max(abs(angle) for draw in rotated for angle in draw.rotation_rad) <= math.radians(30)
    assert (min(scaled) >= 0.7, max(scaled) <= 1.4) == (True, True)
    assert len({draw.extent_factor for draw in draws if len(set(draw.extent_factor)) > 1}) == 0


def test_only_the_plans_axes_are_mirrored() -> None:
    config = Augmentation(mirror_axes=(2,))
    mirrored = np.array([draw_spatial(seeded(seed), config, PATCH).mirrored for seed in range(200)])
    assert not mirrored[:, :2].any()
    assert 60 < mirrored[:, 2].sum() < 140


@pytest.mark.parametrize(
    ("patch", "axis"), [((48, 64, 48), None), ((16, 48, 48), None), ((15, 48, 48), 0), ((64, 20, 40), 1)]
)
def test_a_flat_patch_is_turned_in_its_plane_only(patch: tuple[int, int, int], axis: int | None) -> None:
    assert through_plane_axis(patch) == axis
    config = Augmentation(rotation_probability=1.0, scaling_probability=1.0)
    draw = draw_spatial(seeded(0), config, patch)
    turned = [other for other in range(3) if draw.rotation_rad[other]]
    assert turned == ([0, 1, 2] if axis is None else [axis])
    if axis is not None:
        assert draw.extent_factor[axis] == 1.0
        assert box_size(draw, patch, (1.0, 1.0, 1.0))[axis] == patch[axis]


def test_elastic_draws_have_the_probability_and_ranges_of_the_plan_and_are_off_by_default() -> None:
    assert all(draw_spatial(seeded(seed), Augmentation(), PATCH).elastic is None for seed in range(50))
    config = Augmentation(elastic_probability=0.3, elastic_sigma=(0.1, 0.2), elastic_magnitude=(0.02, 0.05))
    draws = [draw_spatial(seeded(seed), config, PATCH) for seed in range(1500)]
    bent = [draw.elastic for draw in draws if draw.elastic is not None]
    assert len(bent) / len(draws) == pytest.approx(0.3, abs=0.04)
    assert all(0.1 <= elastic.sigma <= 0.2 for elastic in bent)
    shares = np.array([elastic.reach_vox for elastic in bent]) / PATCH
    assert (shares.min() >= 0.02, shares.max() <= 0.05) == (True, True)
    assert len({elastic.seed for elastic in bent}) == len(bent)
    assert not any(draw.is_exact for draw in draws if draw.elastic is not None)


def test_switching_elastic_on_changes_nothing_else_of_the_space() -> None:
    config = Augmentation(elastic_probability=1.0)
    for seed in range(20):
        plain, bent = (draw_spatial(seeded(seed), each, PATCH) for each in (Augmentation(), config))
        assert (plain.rotation_rad, plain.extent_factor, plain.mirrored) == (
            bent.rotation_rad,
            bent.extent_factor,
            bent.mirrored,
        )


def test_nothing_is_bent_out_of_the_plane_of_a_flat_patch() -> None:
    elastic = draw_spatial(seeded(1), Augmentation(elastic_probability=1.0), (8, 40, 40)).elastic
    assert elastic is not None
    assert elastic.reach_vox[0] == 0
