"""nnU-Net v2's plans.json in terms of a Plan: how scans are prepared, read entry by entry and never guessed.

What nnU-Net names by class or function (a preprocessor, a normalisation, a resampler, a reader) is mapped where it is
one that Sagittal computes in the same way. Anything else is refused by its name: a scan prepared in another way would
be segmented wrongly without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.base import Triple, TripleMm, describe_validation_error
from sagittal.plan.plan import (
    CTNormalization,
    NoNormalization,
    Normalization,
    Preprocessing,
    RescaleToUnit,
    ZScore,
    as_triple,
)

_READERS: Mapping[str, Literal["RAS", "stored"]] = MappingProxyType(
    {"SimpleITKIO": "stored", "NibabelIO": "stored", "NibabelIOWithReorient": "RAS", "SimpleITKIOWithReorient": "RAS"}
)
"""nnU-Net's readers of volumes, and the axis order that each gives its arrays."""
_NORMALIZATIONS = ("CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization")
_RGB = "RGBTo01Normalization"
_RESAMPLER = "resample_data_or_seg_to_shape"
_ANISOTROPY = 3.0
_NEVER_APART = 1e6
"""As an anisotropy threshold: no scan's voxels are that long."""
_STD_FLOOR = 1e-8
INSTEAD = "Predict with nnU-Net itself, or train here on the same data ('sagittal train DATASET --preset nnunet')."


@dataclass(frozen=True)
class Entries:
    """A dict read from JSON, whose entries are asked for by name and kind.

    Attributes:
        values: the dict.
        where: the file, and the place in it, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def get(self, name: str, *kinds: type) -> Any:
        """Return an entry of one of `kinds`; True and False are no numbers.

        Raises:
            PlanError: it is missing or of another kind.
        """
        value = self.values.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) > (bool in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            shown = isinstance(value, bool | int | float | str | None)
            found = "missing" if name not in self.values else f"{value!r:.80}" if shown else f"a {type(value).__name__}"
            raise PlanError(
                f"{self.where}: '{name}' is {found}, expected {_article(wanted)}, as nnU-Net v2 writes it. Give the "
                "model's folder as nnU-Net left it.",
                code="nnunet_plans",
            )
        return value

    def part(self, name: str) -> Entries:
        """Return the entry of a dict.

        Raises:
            PlanError: it is missing or no dict.
        """
        return Entries(self.get(name, dict), f"{self.where}: {name}")

    def numbers(self, name: str, count: int | None = None) -> list[Any]:
        """Return a list of numbers, of `count` of them where that is given.

        Raises:
            PlanError: it is missing, holds something else, or another number of them.
        """
        values: list[Any] = self.get(name, list)
        if any(type(value) not in (int, float) for value in values) or (count is not None and len(values) != count):
            expected = "numbers" if count is None else f"{count} numbers"
            raise PlanError(
                f"{self.where}: '{name}' is {json.dumps(values)[:80]}, expected {expected}. Give the model's folder as "
                "nnU-Net left it.",
                code="nnunet_plans",
            )
        return values

    def refuse(self, what: str, expected: str) -> PlanError:
        """Return the error for something that Sagittal does not compute as nnU-Net does."""
        return PlanError(
            f"{self.where}: {what}, which Sagittal does not compute. Expected {expected}. {INSTEAD}",
            code="nnunet_unsupported",
        )


def read_json(path: Path) -> Entries:
    """Return a file of nnU-Net's that holds an object.

    Raises:
        PlanError: it can't be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"{path}: can't be read ({error.strerror}). A trained model of nnU-Net v2 has this file; give the folder "
            "that holds it, for example nnUNetTrainer__nnUNetPlans__3d_fullres.",
            code="nnunet_plans",
        ) from None
    except ValueError as error:
        raise PlanError(
            f"{path}: is no JSON ({error}). Give the model's folder as nnU-Net left it.", code="nnunet_plans"
        ) from None
    if not isinstance(content, dict):
        raise PlanError(
            f"{path}: holds a {type(content).__name__}, expected an object. Give the model's folder as nnU-Net left "
            "it.",
            code="nnunet_plans",
        )
    return Entries(content, str(path))


def configuration_of(plans: Entries, name: str) -> Entries:
    """Return a configuration of plans.json with what it inherits, and refuse those that Sagittal can't predict with.

    Raises:
        PlanError: no such configuration, one that inherits from itself, a 2d one or a cascade's second stage.
    """
    known = plans.part("configurations")
    values: dict[str, Any] = {}
    visited: list[str] = []
    wanted: str | None = name
    while wanted is not None:
        if wanted not in known.values or wanted in visited:
            what = "inherits from itself" if wanted in visited else "is not there"
            raise PlanError(
                f"{known.where}: '{wanted}' {what}, expected {name} and what it inherits from."
                f"{did_you_mean(wanted, known.values)} Give the model's folder as nnU-Net left it.",
                code="nnunet_plans",
            )
        visited.append(wanted)
        own = known.part(wanted).values
        values = {**own, **values}
        wanted = own.get("inherits_from")
    resolved = Entries(values, f"{known.where}: {name}")
    if len(resolved.get("patch_size", list)) == 2:
        raise resolved.refuse("this is a 2d configuration", "a 3d one, such as 3d_fullres")
    if values.get("previous_stage"):
        stage = f"the second stage of a cascade, which also sees what {values['previous_stage']} predicted"
        raise resolved.refuse(f"this is {stage}", "a configuration by itself, such as 3d_fullres or 3d_lowres")
    return resolved


def preprocessing_of(
    plans: Entries, configuration: Entries, channel_names: tuple[str, ...]
) -> tuple[Preprocessing, dict[str, str]]:
    """Return how scans are prepared and the reason of each number.

    Args:
        plans: plans.json.
        configuration: see `configuration_of`.
        channel_names: of dataset.json; each has its normalisation.

    Raises:
        PlanError: something that Sagittal does not compute as nnU-Net does, by its name, or a missing entry.
    """
    _require(configuration, "preprocessor_name", "DefaultPreprocessor")
    reader = plans.get("image_reader_writer", str)
    if reader not in _READERS:
        raise plans.refuse(f"scans are read by {reader}", f"one of {', '.join(_READERS)}")
    transpose = _transpose(plans)
    threshold, why_threshold = _anisotropy(configuration)
    spacing = configuration.numbers("spacing", 3)
    names = configuration.get("normalization_schemes", list)
    masks = configuration.get("use_mask_for_norm", list)
    if not len(names) == len(masks) == len(channel_names):
        raise PlanError(
            f"{configuration.where}: {len(names)} normalization_schemes and {len(masks)} use_mask_for_norm for "
            f"{len(channel_names)} channels ({', '.join(channel_names)}), expected one of each per channel. Give the "
            "dataset.json and plans.json that belong together.",
            code="nnunet_plans",
        )
    try:
        preprocessing = Preprocessing(
            orientation=_READERS[reader],
            transpose=transpose,
            crop_to_nonzero=True,
            # nnU-Net's is along the transposed axes; ours along those before.
            spacing_mm=_before(transpose, spacing),
            normalization=tuple(
                _normalization(plans, configuration, channel, name, mask)
                for channel, (name, mask) in enumerate(zip(names, masks, strict=True))
            ),
            anisotropy_threshold=threshold,
        )
    except ValidationError as error:
        raise PlanError(describe_validation_error(error, configuration.where), code="nnunet_plans") from None
    given = "plans.json's"
    return preprocessing, {
        "preprocessing.orientation": f"plans.json's image_reader_writer, {reader}",
        "preprocessing.transpose": f"{given} transpose_forward",
        "preprocessing.crop_to_nonzero": "nnU-Net crops every scan",
        "preprocessing.spacing_mm": f"{given} spacing, back in the order before transpose_forward",
        "preprocessing.normalization": f"{given} normalization_schemes: {', '.join(names)}",
        "preprocessing.anisotropy_threshold": why_threshold,
    }


def _before(transpose: Triple, values: list[Any]) -> TripleMm:
    """Return values along the network's axes in the order of the axes before the transposition."""
    d, h, w = (float(values[transpose.index(axis)]) for axis in range(3))
    return d, h, w


def patch_of(configuration: Entries) -> Triple:
    """Return the window.

    Raises:
        PlanError: no three numbers.
    """
    size = configuration.numbers("patch_size", 3)
    if any(type(value) is not int or value < 1 for value in size):
        raise PlanError(
            f"{configuration.where}: patch_size is {size}, expected whole numbers above 0. Give the model's folder as "
            "nnU-Net left it.",
            code="nnunet_plans",
        )
    return as_triple(size)


def _require(entries: Entries, name: str, expected: str) -> None:
    given = entries.get(name, str)
    if given != expected:
        raise entries.refuse(f"{name} is {given}", f"{expected}, nnU-Net's own")


def _transpose(plans: Entries) -> Triple:
    forward, backward = plans.numbers("transpose_forward", 3), plans.numbers("transpose_backward", 3)
    if sorted(forward) != [0, 1, 2] or [forward[axis] for axis in backward if axis in (0, 1, 2)] != [0, 1, 2]:
        raise PlanError(
            f"{plans.where}: transpose_forward {forward} and transpose_backward {backward}, expected the axes 0, 1, 2 "
            "and the way back. Give the model's folder as nnU-Net left it.",
            code="nnunet_plans",
        )
    return as_triple(forward)


def _anisotropy(configuration: Entries) -> tuple[float, str]:
    """Return the ratio of spacings above which the coarse axis is resampled apart, and why."""
    found = []
    for what, order in (("data", 3), ("probabilities", 1)):
        _require(configuration, f"resampling_fn_{what}", _RESAMPLER)
        options = configuration.part(f"resampling_fn_{what}_kwargs")
        expected = {"is_seg": False, "order": order, "order_z": 0}
        for name, value in expected.items():
            if options.values.get(name, value) != value:
                raise options.refuse(f"{name} is {options.values[name]}", f"{value}, nnU-Net's own")
        unknown = options.values.keys() - {*expected, "force_separate_z", "separate_z_anisotropy_threshold"}
        if unknown:
            raise options.refuse(f"resampling has the option {', '.join(sorted(unknown))}", "nnU-Net's own options")
        # Left out, nnU-Net's function takes False; its plans always write null.
        apart = options.values.get("force_separate_z", False)
        if apart is not None and apart is not False:
            raise options.refuse(f"force_separate_z is {json.dumps(apart)}", "null or false")
        found.append(apart)
    if found[0] is False:
        return _NEVER_APART, "plans.json's force_separate_z, false: no axis is resampled apart"
    threshold = configuration.part("resampling_fn_data_kwargs").values.get(
        "separate_z_anisotropy_threshold", _ANISOTROPY
    )
    return float(threshold), "nnU-Net's, where force_separate_z is null"


def _normalization(plans: Entries, configuration: Entries, channel: int, name: Any, mask: Any) -> Normalization:
    match name:
        case "ZScoreNormalization":
            return ZScore(nonzero_only=bool(mask))
        case "CTNormalization":
            measured = _intensities(plans, channel)
            lower, upper, mean, std = (
                float(measured.get(entry, int, float))
                for entry in ("percentile_00_5", "percentile_99_5", "mean", "std")
            )
            return CTNormalization(lower=lower, upper=upper, mean=mean, std=max(std, _STD_FLOOR))
        case "NoNormalization":
            return NoNormalization()
        case "RescaleTo01Normalization":
            return RescaleToUnit()
        case "RGBTo01Normalization":
            # It divides by 255, and raises beyond 0..255: a clip there changes nothing.
            return CTNormalization(lower=0.0, upper=255.0, mean=0.0, std=255.0)
        case _:
            what = f"channel {channel} is normalised by {name}"
            raise configuration.refuse(what, f"one of {', '.join((*_NORMALIZATIONS, _RGB))}")


def _intensities(plans: Entries, channel: int) -> Entries:
    # Renamed in nnU-Net 2.0.
    former = "foreground_intensity_properties_by_modality"
    name = former if former in plans.values else "foreground_intensity_properties_per_channel"
    return plans.part(name).part(str(channel))


def _article(kinds: str) -> str:
    return "a number" if kinds in ("int or float", "float or int") else f"a {kinds}"
