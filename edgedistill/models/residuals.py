"""Side networks: the encoder of one UNet, whose outputs are added to the skips and the middle of another."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.models.conditional import conditional_residual_encoder
from edgedistill.models.inputs import Inputs, inputs_of
from edgedistill.models.unet import ExtendedUNet2DModel, build_stock, zero_convs


class ResidualEncoder(ExtendedUNet2DModel):
    """An encoder that answers with ``residual_0``, ...: skips, then middle, each through a zero convolution.

    Untrained, all of them are zero, so that the other network does what it did without them (Zhang et al.,
    arXiv:2302.05543, section 3.1). The encoder may be narrower than the other network's.

    Args:
        unet: The stock model whose encoder it is; its modules become this one's, under the same names.
        inputs: What it takes beside the stock inputs; no residuals.
        base_channels: ``block_out_channels`` of the network that the residuals are for, which has as many
            levels, and layers in them, as this one.

    Raises:
        ConfigError: As `ExtendedUNet2DModel`, or if the numbers of levels differ.
    """

    def __init__(self, unet: UNet2DModel, inputs: Inputs, base_channels: Sequence[int]) -> None:
        super().__init__(unet, inputs)
        del self.up_blocks, self.conv_norm_out, self.conv_act, self.conv_out
        self.config["base_channels"] = list(base_channels)
        self.zero_convs = zero_convs(self.config, base_channels)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        **inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the residuals; arguments as for `ExtendedUNet2DModel`."""
        embedding = self._embed(sample, timestep, class_labels, inputs)
        skips, hidden = self.encode(sample, embedding, inputs)
        made = zip(self.zero_convs, (*skips, hidden), strict=True)
        return tuple(conv(value) for conv, value in made)


def residual_encoder(network: nn.Module, base: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a side network for `base` that begins as a copy of the encoder of `network`.

    Args:
        network: A stock network: `base` as it was before it took residuals, or one cut from it.
        base: The network that the residuals are for.
        inputs: What the side network takes beside the stock inputs.

    Raises:
        ConfigError: If `network` is of another class, or its levels are not those of `base`.
    """
    config: Any = base.config
    if isinstance(network, UNet2DModel):
        return ResidualEncoder(copy.deepcopy(network), inputs, config["block_out_channels"])
    if isinstance(network, UNet2DConditionModel):
        return conditional_residual_encoder(network, inputs, config["block_out_channels"])
    msg = f"No encoder can be taken from a {type(network).__name__}; this release takes that of a UNet2DModel or UNet2DConditionModel."
    raise ConfigError(msg)


def build_residual_encoder(config: Mapping[str, Any]) -> ResidualEncoder:
    """Build an untrained `ResidualEncoder` from a configuration."""
    return ResidualEncoder(build_stock(config), inputs_of(config), config["base_channels"])
