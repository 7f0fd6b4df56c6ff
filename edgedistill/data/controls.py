"""What a picture may be controlled by: pure functions of clean images, on numpy arrays and torch tensors alike."""

from collections.abc import Mapping
from typing import Any, Literal

from edgedistill.errors import ConfigError
from edgedistill.sampler import resize
from edgedistill.table import Condition

Array = Any
Task = Literal["super_resolution", "inpainting", "edges"]
CHANCES = 4
"""Uniform numbers per sample that a control may depend on."""


def control_conditions(
    task: Task, shape: tuple[int, int, int], limits: tuple[float, float] = (-1.0, 1.0)
) -> tuple[Condition, ...]:
    """Return what a sampler of a task takes from its caller.

    Args:
        task: ``super_resolution`` takes the small image, enlarged to the full size by nearest neighbours;
            ``inpainting`` an image and a mask of what is to be drawn, and does not look beneath it;
            ``edges`` a map of them.
        shape: (channels, height, width) of a sample.
        limits: Between which its numbers lie.
    """
    if task == "edges":
        return (Condition("image", "image", shape=(1, *shape[1:]), value_range=(0.0, 1.0)),)
    image = Condition("image", "image", shape=shape, value_range=limits)
    if task == "super_resolution":
        return (image,)
    return (image, Condition("mask", "mask", shape=(1, *shape[1:])))


def controls_of(task: Task, x: Array, chances: Array, factor: int = 2) -> dict[str, Array]:
    """Return the inputs of a task, by condition, that clean images lead to.

    Args:
        task: See `control_conditions`.
        x: float32 (batch, channels, height, width) in [-1, 1].
        chances: (batch, CHANCES) from [0, 1).
        factor: Of super-resolution.
    """
    if task == "edges":
        return {"image": edges(x)}
    if task == "super_resolution":
        return {"image": low_resolution(x, factor)}
    mask = hole(x, chances)
    return {"image": x * (1 - mask), "mask": mask}


def low_resolution(x: Array, factor: int) -> Array:
    """Return what a smaller image keeps: the mean of every square of `factor` pixels a side, over all of it."""
    channels, height, width = x.shape[1:]
    small = resize(x, "area_down", (channels, height // factor, width // factor))
    return resize(small, "up_nearest", (channels, height, width))


def hole(x: Array, chances: Array) -> Array:
    """Return masks (batch, 1, height, width): 1 in a rectangle, each side half to three quarters of the image's."""
    ones = x[:, :1] * 0 + 1
    inside = ones
    for axis, share, place in ((2, 0, 2), (3, 1, 3)):
        size = x.shape[axis]
        length = size // 2 + chances[:, share] * (size // 4 + 1) // 1
        start = chances[:, place] * (size - length + 1) // 1
        position = ones.cumsum(axis) - 1
        start, length = start[:, None, None, None], length[:, None, None, None]
        inside = inside * (position >= start) * (position < start + length)
    return inside


def edges(x: Array) -> Array:
    """Return the size of the grey values' gradient, (batch, 1, height, width) in [0, 1], by differences.

    The difference over two pixels is halved; the borders are repeated.
    """
    grey = x.mean(1)[:, None]
    height, width = grey.shape[2:]
    up, down = _neighbours(height)
    left, right = _neighbours(width)
    rows = (grey[:, :, down] - grey[:, :, up]) / 2
    columns = (grey[..., right] - grey[..., left]) / 2
    # What is added keeps the gradient of a flat image finite.
    return ((rows**2 + columns**2 + 1e-12) ** 0.5).clip(0, 1)


def control_error(
    task: Task, samples: Array, controls: Mapping[str, Array], factor: int = 2
) -> Array:
    """Return how far samples are from what they were told: the mean squared error of their own controls.

    For inpainting that is the error of the pixels that were known.
    """
    if task == "edges":
        return ((edges(samples) - controls["image"]) ** 2).mean()
    if task == "super_resolution":
        return ((low_resolution(samples, factor) - controls["image"]) ** 2).mean()
    known = (samples * 0 + 1) * (1 - controls["mask"])
    return (known * (samples - controls["image"]) ** 2).sum() / known.sum()


def impose(
    task: Task, z: Array, known: Array, controls: dict[str, Array], factor: int = 2
) -> Array:
    """Return z with the part that the control tells of taken from `known`: its small image, or its known pixels.

    Raises:
        ConfigError: If the task is one whose control no linear map makes.
    """
    if task == "edges":
        msg = (
            "Edges cannot be imposed on an image; only super-resolution and inpainting are linear."
        )
        raise ConfigError(msg)
    if task == "super_resolution":
        return z + low_resolution(known - z, factor)
    return z * controls["mask"] + known * (1 - controls["mask"])


def _neighbours(size: int) -> tuple[list[int], list[int]]:
    before = [max(index - 1, 0) for index in range(size)]
    after = [min(index + 1, size - 1) for index in range(size)]
    return before, after
