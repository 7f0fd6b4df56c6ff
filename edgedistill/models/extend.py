"""Stock networks of every known class: given further inputs, and rid of the guidance input again."""

import copy

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from edgedistill.errors import ConfigError
from edgedistill.models.conditional import (
    ExtendedUNet2DConditionModel,
    bake_conditional_guidance,
    extend_conditional,
)
from edgedistill.models.inputs import Inputs
from edgedistill.models.unet import ExtendedUNet2DModel, bake_guidance


def extend(network: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy of a stock network with further inputs.

    Raises:
        ConfigError: If it is of a class, or has parts, to which inputs cannot be added.
    """
    if isinstance(network, UNet2DModel):
        return ExtendedUNet2DModel(copy.deepcopy(network), inputs)
    if isinstance(network, UNet2DConditionModel):
        return extend_conditional(network, inputs)
    msg = f"No inputs can be added to a {type(network).__name__}; this release extends UNet2DModel and UNet2DConditionModel."
    raise ConfigError(msg)


def bake(network: nn.Module, w: float) -> nn.Module:
    """Return the stock network that equals one whose further input is w, at one w.

    Raises:
        ConfigError: If it is of another class, or has other inputs than w.
    """
    if isinstance(network, ExtendedUNet2DModel):
        return bake_guidance(network, w)
    if isinstance(network, ExtendedUNet2DConditionModel):
        return bake_conditional_guidance(network, w)
    msg = f"Guidance cannot be baked into a {type(network).__name__}; export it as an input."
    raise ConfigError(msg)
