"""What K students divide among them: ranges of classes, or the sides of planes through embedded prompts."""

import numpy as np

from edgedistill.errors import ConfigError
from edgedistill.router import CLASS_TABLE, SIGN_PLANES, Router

_DIGITS, _TRIED = 6, 8


def class_ranges(classes: int, students: int, on: str = "class_labels") -> Router:
    """Part classes into ranges that follow one another and differ in size by 1 at most.

    Args:
        classes: How many there are; the null class is not one of them.
        students: At least 1.
        on: The condition that decides.

    Raises:
        ConfigError: If there are more students than classes.
    """
    if students > classes:
        msg = f"{students} students cannot share {classes} classes; choose at most as many."
        raise ConfigError(msg)
    table = tuple(label * students // classes for label in range(classes))
    return Router(CLASS_TABLE, on, students, table)


def principal_planes(embeddings: np.ndarray, students: int, on: str = "pooled") -> Router:
    """Part embeddings by planes, each through the middle of all parts that there are so far.

    A plane is orthogonal to a direction in which the embeddings differ much within the parts that there are
    so far, while the parts' means agree: to that one of the principal directions, and at that place, where
    the least even cut of a part is most even. Equal embeddings stay together, and beyond two students the
    parts' sizes are only about equal.

    Args:
        embeddings: (count, size).
        students: A power of two; of 1 there are no planes.
        on: What the router takes.

    Raises:
        ConfigError: If the number is no power of two, or the embeddings do not differ in enough directions.
    """
    count = students.bit_length() - 1
    if students < 1 or students != 1 << count:
        msg = f"Planes part prompts among 1, 2, 4, 8, ... students, got {students}."
        raise ConfigError(msg)
    points = embeddings.astype(np.float64)
    part = np.zeros(len(points), np.int64)
    planes: list[tuple[float, ...]] = []
    bias: list[float] = []
    for bit in range(count):
        cuts = [_even_cut(points, part, axis) for axis in _directions(points, part)]
        _, plane, offset = max(cuts, key=lambda cut: cut[0])
        part |= (points @ plane + offset >= 0).astype(np.int64) << bit
        planes.append(tuple(plane.tolist()))
        bias.append(offset)
    if len(np.unique(part)) < students:
        msg = f"The prompts are too alike to part them among {students} students; choose fewer."
        raise ConfigError(msg)
    return Router(SIGN_PLANES, on, students, planes=tuple(planes), bias=tuple(bias))


def _directions(points: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the unit vectors of most variance within the parts that are orthogonal to what separates their means."""
    means = np.stack([points[part == k].mean(0) for k in np.unique(part)])
    within = points - means[np.unique(part, return_inverse=True)[1]]
    _, sizes, axes = np.linalg.svd(means - means.mean(0), full_matrices=False)
    between = axes[sizes > 1e-9 * max(sizes.max(), 1.0)]
    principal = np.linalg.svd(within - within @ between.T @ between, full_matrices=False)[2]
    # The signs are what the decomposition leaves open.
    return np.stack([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in principal[:_TRIED]])


def _even_cut(
    points: np.ndarray, part: np.ndarray, axis: np.ndarray
) -> tuple[float, np.ndarray, float]:
    """Return how even the best cut along an axis is (0 to 1/2, of its least even part), its plane and its bias.

    Both are rounded to what all machines agree on.
    """
    plane = np.round(axis, _DIGITS)
    heights = points @ plane
    different = np.unique(np.round(heights, _DIGITS))
    places = (different[1:] + different[:-1]) / 2
    if not len(places):
        return 0.0, plane, 0.0
    shares = np.stack(
        [
            np.searchsorted(np.sort(heights[part == k]), places) / np.sum(part == k)
            for k in np.unique(part)
        ]
    )
    evenness = np.minimum(shares, 1 - shares).min(0)
    best = int(evenness.argmax())
    return float(evenness[best]), plane, float(np.round(-places[best], _DIGITS))
