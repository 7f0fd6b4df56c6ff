"""What a network may take beside its stock inputs, and how numbers among it are embedded."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgedistill.schedule import Schedule

EMBEDDING_DIM = 256
SCALES = {"w": 1000.0, "s": 1.0, "step": 100.0, "r": 100.0}
"""By scalar input: what it is multiplied with before its sinusoid (guidance as in latent-consistency models)."""
LOGARITHM_SCALE = 1000.0
"""That of s where times are told as ln(sigma)/4: 250 ln(s), as the code of arXiv:2310.02279 has it."""


@dataclass(frozen=True)
class Inputs:
    """What a network takes beside the stock inputs.

    Fields:
        scalars: Numbers per sample that enter the time embedding, by name; with their scales.
        image_channels: Channels of an image of the state's size; 0: none.
        residuals: Whether maps ``residual_0``, ... are added to the skips and, the last one, to the
            middle (the order of a ControlNet).
        mask: Whether a mask comes with the image, 1 where the sampler draws; the image is hidden there.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    image_channels: int = 0
    residuals: bool = False
    mask: bool = False


def scales_of(scalars: Iterable[str], schedule: Schedule) -> dict[str, float]:
    """Return what each scalar input is multiplied with in a network of a schedule.

    s is told as times are: labels count up to hundreds, but EDM's ln(sigma)/4 spans less than 3, and the
    embeddings of what is so near cannot be told apart.
    """
    is_logarithm = np.allclose(schedule.feeds, np.log(schedule.sigmas) / 4)
    scales = {**SCALES, "s": LOGARITHM_SCALE} if is_logarithm else SCALES
    return {name: scales[name] for name in scalars}


def scalar_embedding(value: Tensor, scale: float, dim: int = EMBEDDING_DIM) -> Tensor:
    """Return sines and cosines of ``scale * value``, the embedding of latent-consistency models.

    Args:
        value: (batch,) such as Meng's guidance weight w, then with scale 1000.
        scale: Multiplies the value.
        dim: Even width of the embedding.

    Returns:
        (batch, dim) float32: all sines, then all cosines.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=value.device)
    frequencies = torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    angles = scale * value.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def picture(given: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """Return the channels of the image that a network sees, and of the mask that hides parts of it."""
    if not inputs.mask:
        return given["image"]
    return torch.cat([given["image"] * (1 - given["mask"]), given["mask"]], dim=1)


def inputs_of(config: Mapping[str, Any]) -> Inputs:
    """Return what a configuration says that a network takes beside the stock inputs."""
    return Inputs(
        config["scalar_inputs"],
        config["image_channels"],
        config["residual_inputs"],
        config.get("mask_input", False),
    )


def refuse_unsized(config: Mapping[str, Any]) -> None:
    """Refuse the configuration of a denoiser that does not say what sizes it takes.

    Raises:
        ValueError: Naming the key and what belongs there.
    """
    size = config.get("sample_size")
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        msg = f"`sample_size` must be the size of its states, a whole number or [height, width], got {size!r}; write it into config.json"
        raise ValueError(msg)
