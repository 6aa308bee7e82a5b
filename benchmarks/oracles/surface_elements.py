"""What DeepMind's surface-distance makes of the masks of metric_masks.py: elements, their distances, what follows.

    python benchmarks/oracles/surface_elements.py > tests/golden/metrics/surface_elements.json

Runs in an environment of its own with surface-distance-based-measures 0.1, which needs numpy below 1.24 and scipy below
1.12. Printed is JSON; of the smallest masks every element with its distance and its area is in it, so that each of the
shapes that an element may have is compared and not their sum alone. An infinite distance is the string "inf".
"""

import json
import math
import warnings

import numpy as np
import surface_distance
from metric_masks import PAIRS, TOLERANCES_MM, pair

IN_FULL = ("noise", "single_voxels")


def told(value: float) -> float | str:
    """Return a value as JSON can hold it."""
    return float(value) if math.isfinite(value) else str(value)


def measure(name: str) -> dict:
    """Return all numbers of one pair."""
    reference, prediction, spacing = pair(name)
    found = surface_distance.compute_surface_distances(reference, prediction, spacing)
    printed = {
        "area_mm2": [float(found["surfel_areas_gt"].sum()), float(found["surfel_areas_pred"].sum())],
        "hd95_mm": told(surface_distance.compute_robust_hausdorff(found, 95)),
        "nsd": {
            f"{tolerance:g}": told(surface_distance.compute_surface_dice_at_tolerance(found, tolerance))
            for tolerance in TOLERANCES_MM
        },
    }
    if name in IN_FULL:
        for mine, theirs in (("reference", "gt"), ("prediction", "pred")):
            other = "pred" if theirs == "gt" else "gt"
            elements = zip(found[f"distances_{theirs}_to_{other}"], found[f"surfel_areas_{theirs}"], strict=True)
            printed[mine] = [[round(float(distance), 12), round(float(area), 12)] for distance, area in elements]
    return printed


if __name__ == "__main__":
    # Its calls of scipy were renamed long ago, which scipy tells on each.
    warnings.simplefilter("ignore", DeprecationWarning)
    print(json.dumps({"numpy": np.__version__, "pairs": {name: measure(name) for name in PAIRS}}))
