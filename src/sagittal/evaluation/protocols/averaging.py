"""Tables of cases and classes -> means: what the tools do, which is not the same."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64


def classes_of_all_cases(
    table: Float64[np.ndarray, "cases classes"],
) -> tuple[float, Float64[np.ndarray, " classes"]]:
    """Average over cases, then over classes; NaN spoils what it is in: for metrics that are always defined."""
    columns = _plain(table, axis=0)
    return float(_plain(columns, axis=0)), columns


def classes_of_defined_cases(
    table: Float64[np.ndarray, "cases classes"],
) -> tuple[float, Float64[np.ndarray, " classes"]]:
    """Average over the cases that are not NaN, then over all classes: one that is NaN everywhere spoils the overall."""
    columns = _of_defined(table, axis=0, otherwise=np.nan)
    return float(_plain(columns, axis=0)), columns


def defined_classes_of_defined_cases(
    table: Float64[np.ndarray, "cases classes"],
) -> tuple[float, Float64[np.ndarray, " classes"]]:
    """Average over the cases that are not NaN, then over the classes that are not."""
    columns = _of_defined(table, axis=0, otherwise=np.nan)
    return float(_of_defined(columns, axis=0, otherwise=np.nan)), columns


def cases_of_defined_classes(
    table: Float64[np.ndarray, "cases classes"],
) -> tuple[float, Float64[np.ndarray, " classes"]]:
    """Average each case over its classes that are not NaN, then over cases that have one; 0 where nothing is defined.

    The means of classes are over cases that are not NaN. As MONAI's reductions "mean" and "mean_batch".
    """
    rows = _of_defined(table, axis=1, otherwise=np.nan)
    return float(_of_defined(rows, axis=0, otherwise=0.0)), _of_defined(table, axis=0, otherwise=0.0)


def _plain(values: Float64[np.ndarray, " ..."], axis: int) -> Float64[np.ndarray, " ..."]:
    count = values.shape[axis]
    return np.asarray(values.sum(axis) / count) if count else np.full(np.delete(values.shape, axis), np.nan)


def _of_defined(values: Float64[np.ndarray, " ..."], axis: int, otherwise: float) -> Float64[np.ndarray, " ..."]:
    known = ~np.isnan(values)
    counts = np.asarray(known.sum(axis))
    sums = np.where(known, values, 0.0).sum(axis)
    means: Float64[np.ndarray, " ..."] = np.full(counts.shape, otherwise)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means
