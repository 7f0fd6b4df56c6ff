"""Stock networks of every known class with further inputs."""

import copy

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from edgedistill.errors import ConfigError
from edgedistill.models.conditional import extend_conditional
from edgedistill.models.inputs import Inputs
from edgedistill.models.unet import ExtendedUNet2DModel


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
