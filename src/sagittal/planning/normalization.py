"""How intensities are normalised, by the channel's name (nnU-Net's map_channel_name_to_normalization)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from sagittal.plan import ChannelIntensities, Fingerprint
from sagittal.plan.plan import CTNormalization, NoNormalization, Normalization, RescaleToUnit, ZScore

SPECIAL_NAMES = ("CT", "noNorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")
"""Channel names that decide their normalisation, in any case; every other name means z-score."""
CROP_SHARE = 3 / 4
"""Below this median share of voxels left by the crop, z-scores are taken inside the non-zero mask."""
_STD_FLOOR = 1e-8


def normalization(channel_names: Sequence[str], fingerprint: Fingerprint) -> tuple[tuple[Normalization, ...], str]:
    """Return one normalisation per channel, and why, with a warning where a name looks like a slip of the pen."""
    share = fingerprint.median_relative_size_after_crop
    chosen = [
        _of_channel(name, intensities, nonzero_only=share < CROP_SHARE)
        for name, intensities in zip(channel_names, fingerprint.intensities, strict=True)
    ]
    names_by_why: dict[str, list[str]] = {}
    for name, (_, why) in zip(channel_names, chosen, strict=True):
        names_by_why.setdefault(why, []).append(f"'{name}'")
    reason = "; ".join(f"{', '.join(names)}: {why}" for why, names in names_by_why.items())
    schemes = tuple(scheme for scheme, _ in chosen)
    if any(isinstance(scheme, ZScore) for scheme in schemes):
        compared = "less than" if share < CROP_SHARE else "at least"
        where = "inside the non-zero mask" if share < CROP_SHARE else "over the whole crop"
        reason += (
            f"; z-scores {where}, because the crop leaves {100 * share:.3g} % of the voxels (median), "
            f"{compared} {100 * CROP_SHARE:g} %"
        )
    return schemes, reason


def _of_channel(name: str, intensities: ChannelIntensities, *, nonzero_only: bool) -> tuple[Normalization, str]:
    match name.casefold():
        case "ct":
            scheme = CTNormalization(
                lower=intensities.percentile_00_5,
                upper=intensities.percentile_99_5,
                mean=intensities.mean,
                std=max(intensities.std, _STD_FLOOR),
            )
            why = (
                f"clipped to percentiles 0.5 and 99.5 of the foreground, {scheme.lower:.4g} to {scheme.upper:.4g}, "
                f"then its mean {scheme.mean:.4g} and standard deviation {scheme.std:.4g}"
            )
            return scheme, why
        case "nonorm":
            return NoNormalization(), "left as it is, by name"
        case "rescale_to_0_1" | "rgb_to_0_1":
            return RescaleToUnit(), "each image's range to 0..1, by name"
        case "zscore":
            return ZScore(nonzero_only=nonzero_only), "z-score of each image, by name"
        case _:
            why = f"z-score of each image, as for every name but {', '.join(SPECIAL_NAMES)}"
            return ZScore(nonzero_only=nonzero_only), why + _warning(name)


def _warning(name: str) -> str:
    """Return a warning where an unknown name is close to one that would have meant something else, else nothing."""
    words = re.split(r"[^a-z0-9]+", name.casefold())
    if any(word.startswith("ct") or word in ("cect", "hu", "hounsfield") for word in words):
        return " (warning: if it holds Hounsfield units, name it 'CT' in dataset.json)"
    known = {special.casefold(): special for special in SPECIAL_NAMES}
    close = get_close_matches(name.casefold(), known, n=1, cutoff=0.75)
    return f" (warning: did you mean '{known[close[0]]}'?)" if close else ""
