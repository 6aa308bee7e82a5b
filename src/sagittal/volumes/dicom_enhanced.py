"""Enhanced multi-frame objects: where each frame lies and how its numbers are scaled, from its functional groups.

A tag stands in the frame's own groups, or in those that all frames share. What comes out has the names that a file of
one slice uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Tags = Any
"""Values by the name of their tag: a dict, or pydicom's data set, which is none but answers `get` alike."""

FRAME_TAGS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameContentSequence": ("StackID", "TemporalPositionIndex", "FrameAcquisitionNumber"),
    "MREchoSequence": ("EffectiveEchoTime",),
    "MRTimingAndRelatedParametersSequence": ("FlipAngle",),
    "MRModifierSequence": ("InversionTimes",),
    "MRDiffusionSequence": ("DiffusionBValue",),
    "CardiacSynchronizationSequence": ("NominalCardiacTriggerDelayTime",),
    "TemporalPositionSequence": ("TemporalPositionTimeOffset",),
    "MRImageFrameTypeSequence": ("ComplexImageComponent", "FrameType"),
    "CTXRayDetailsSequence": ("KVP",),
}
_GRADIENT = ("MRDiffusionSequence", "DiffusionGradientDirectionSequence", "DiffusionGradientOrientation")
_CALLED = {"EffectiveEchoTime": "EchoTime", "FrameType": "ImageType", "InversionTimes": "InversionTime"}
_NUMBERS = (
    "stack",
    "direction",
    "TemporalPositionIndex",
    "TemporalPositionTimeOffset",
    "NominalCardiacTriggerDelayTime",
    "KVP",
    "FrameAcquisitionNumber",
)
"""What may tell the frames at one place apart, beside what slices of a file each have too."""


def is_enhanced(class_name: str) -> bool:
    """Whether a kind of object, by its name, has functional groups: enhanced CT, MR and PET, converted ones too."""
    return "Enhanced" in class_name and any(kind in class_name for kind in (" CT ", " MR ", " PET "))


def tags_of_frames(groups: Any, frames: int) -> list[dict[str, Any]] | None:
    """Return the tags of each frame, by the names that files of one slice use.

    Args:
        groups: pydicom's data set with `FRAME_TAGS`.
        frames: how many there are.

    Returns:
        one dict per frame; `stack` and `direction` (of a diffusion gradient) are counted from 1, and `FrameNames` lists
        the numbers that may tell frames apart. None where there are not as many groups as frames.
    """
    own = groups.get("PerFrameFunctionalGroupsSequence")
    if own is None or len(own) != frames:
        return None
    shared = _tags_of(_first(groups, "SharedFunctionalGroupsSequence"))
    found = [shared | _tags_of(frame) for frame in own]
    _count(found, "StackID", "stack")
    _count(found, "gradient", "direction")
    for frame in found:
        frame["FrameNames"] = _NUMBERS
    return found


def _tags_of(frame: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sequence, names in _GROUPS.items():
        group = _first(frame, sequence)
        for name in names if group is not None else ():
            value = group.get(name)
            if value is not None:
                found[_CALLED.get(name, name)] = _single(name, value)
    gradient = _first(_first(frame, _GRADIENT[0]), _GRADIENT[1])
    if gradient is not None and gradient.get(_GRADIENT[2]) is not None:
        found["gradient"] = tuple(round(float(value), 4) for value in gradient.get(_GRADIENT[2]))
    return found


def _first(tags: Any, sequence: str) -> Any:
    items = None if tags is None else tags.get(sequence)
    return items[0] if items else None


def _single(name: str, value: Any) -> Any:
    if name == "StackID":
        return str(value)
    if name == "InversionTimes":
        return value if isinstance(value, int | float) or len(value) != 1 else value[0]
    return value


def _count(frames: Sequence[dict[str, Any]], name: str, called: str) -> None:
    """Number what is text or a direction, in place, so that no text of the file gets on."""
    found = {frame[name] for frame in frames if name in frame}
    places = {value: place for place, value in enumerate(sorted(found, key=lambda each: (len(each), each)), start=1)}
    for frame in frames:
        if name in frame:
            frame[called] = places[frame.pop(name)]
