"""Channels that a scan lacks: declared by name, and only for networks that were trained to do without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sagittal.errors import DataError, did_you_mean
from sagittal.plan.plan import Plan, Preprocessing


def channels_given(plan: Plan, missing: Sequence[str]) -> tuple[int, ...]:
    """Return the positions of the channels that a scan has where the `missing` ones, by name, are declared absent.

    Raises:
        DataError: an unknown name, no channel left, or a network that never saw a patch without a channel.
    """
    names = plan.dataset.channel_names
    for name in missing:
        if name not in names:
            raise DataError(
                f"--missing {name}: the model has no such channel.{did_you_mean(name, names)}", code="unknown_channel"
            )
    if missing and not plan.training.augmentation.channel_dropout:
        raise DataError(
            f"--missing {','.join(missing)}: this model was trained with all of its channels ({', '.join(names)}) in "
            "every patch, and what it says without one is a guess. Give all channels, or train a model that can do "
            "without: sagittal train ... --set training.augmentation.channel_dropout=0.2.",
            code="missing_channel",
        )
    given = tuple(position for position, name in enumerate(names) if name not in missing)
    if not given:
        raise DataError(
            f"--missing {','.join(missing)}: no channel is left. Give at least one of {', '.join(names)}.",
            code="missing_channel",
        )
    return given


def preprocessing_of(preprocessing: Preprocessing, given: Sequence[int]) -> Preprocessing:
    """Return how the channels at these positions are prepared."""
    if len(given) == len(preprocessing.normalization):
        return preprocessing
    return preprocessing.replace(normalization=tuple(preprocessing.normalization[position] for position in given))


def plan_of_scans(plan: Plan, missing: Sequence[str]) -> Plan:
    """Return the plan as if the model had only the channels that scans have: for what is asked of the scans alone.

    Raises:
        DataError: as for `channels_given`.
    """
    if not missing:
        return plan
    given = channels_given(plan, missing)
    names = tuple(plan.dataset.channel_names[position] for position in given)
    training = plan.training.replace(augmentation=plan.training.augmentation.replace(channel_dropout=0.0))
    return plan.replace(
        dataset=plan.dataset.replace(channel_names=names),
        preprocessing=preprocessing_of(plan.preprocessing, given),
        training=training,
    )


def fill(image: Float[np.ndarray, "c D H W"], given: Sequence[int], channels: int) -> Float[np.ndarray, "C D H W"]:
    """Return a prepared image with 0 in the channels that are not `given`, which is how training left them out.

    Args:
        image: the given channels, normalised.
        given: the position of each among all channels.
        channels: all of them. Where none is missing, the image itself comes back.
    """
    if len(given) == channels:
        return image
    whole = np.zeros((channels, *image.shape[1:]), image.dtype)
    whole[list(given)] = image
    return whole
