"""Hypothesis strategies for volumes: small, never a cube, in any axis order, oblique or not, with unequal spacing.

For the tests of Sagittal and of code that builds on it. Needs hypothesis, which Sagittal itself does not depend on.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from sagittal.plan.base import Triple
from sagittal.volumes.geometry import Geometry
from sagittal.volumes.volume import Volume

LABEL_VALUES = 4


@st.composite
def shapes(draw: st.DrawFn, min_size: int = 1, max_size: int = 9) -> Triple:
    """Draw D, H, W, not all equal."""
    size = st.integers(min_size, max_size)
    return draw(st.tuples(size, size, size).filter(lambda shape: len(set(shape)) > 1))


@st.composite
def affines(draw: st.DrawFn, oblique: bool = True) -> NDArray[np.float64]:
    """Draw a (d, h, w, 1) -> (x, y, z, 1) affine in mm whose numbers fit float32, as most files hold them.

    All 48 axis orders occur, mirrored ones too; spacing is 0.3 to 6 mm per axis, the origin within 300 mm.
    """
    order = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from((-1.0, 1.0))] * 3))
    direction = np.zeros((3, 3))
    for axis, (row, sign) in enumerate(zip(order, signs, strict=True)):
        direction[row, axis] = sign
    if oblique and draw(st.booleans()):
        direction = _rotation(*np.radians(draw(st.tuples(*[st.integers(-34, 34)] * 3)))) @ direction
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(draw(st.tuples(*[st.integers(300, 6000)] * 3))) / 1000.0
    affine[:3, 3] = np.array(draw(st.tuples(*[st.integers(-30000, 30000)] * 3))) / 100.0
    return affine.astype(np.float32).astype(np.float64)


@st.composite
def geometries(draw: st.DrawFn, max_size: int = 9, oblique: bool = True) -> Geometry:
    """Draw a grid: shape and affine."""
    return Geometry(draw(shapes(max_size=max_size)), draw(affines(oblique=oblique)))


@st.composite
def volumes(
    draw: st.DrawFn, dtype: DTypeLike = np.float32, channels: int = 1, max_size: int = 9, oblique: bool = True
) -> Volume:
    """Draw an image (C, D, H, W): normally distributed floats, or integers over the whole range of the type."""
    geometry = draw(geometries(max_size=max_size, oblique=oblique))
    kind = np.dtype(dtype)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (channels, *geometry.shape)
    if kind.kind == "f":
        return Volume.on(geometry, random.normal(100.0, 300.0, shape).astype(kind))
    limits = np.iinfo(kind)
    return Volume.on(geometry, random.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True))


@st.composite
def label_maps(draw: st.DrawFn, dtype: DTypeLike = np.uint8, max_size: int = 9) -> Volume:
    """Draw a label map (1, D, H, W) of boxes with values 0 to 3."""
    geometry = draw(geometries(max_size=max_size))
    labels = np.zeros(geometry.shape, dtype=dtype)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for value in range(1, LABEL_VALUES):
        start = [int(random.integers(0, size)) for size in geometry.shape]
        stop = [int(random.integers(first, size)) + 1 for first, size in zip(start, geometry.shape, strict=True)]
        labels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = value
    return Volume.on(geometry, labels)


def _rotation(x: float, y: float, z: float) -> NDArray[np.float64]:
    """Return the rotation by angles in radians around the three world axes in turn."""
    rotation = np.eye(3)
    for axis, angle in enumerate((x, y, z)):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[first, first] = step[second, second] = np.cos(angle)
        step[first, second], step[second, first] = -np.sin(angle), np.sin(angle)
        rotation = step @ rotation
    return rotation
