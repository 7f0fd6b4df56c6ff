"""Side networks: the encoder of one UNet, whose outputs are added to the skips and the middle of another."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.models.inputs import Inputs, inputs_of
from edgedistill.models.unet import ExtendedUNet2DModel, build_stock, residual_shapes


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
        own = residual_shapes(self.config)
        self.config["base_channels"] = list(base_channels)
        wanted = residual_shapes({**self.config, "block_out_channels": list(base_channels)})
        if len(own) != len(wanted):
            msg = f"An encoder of {len(self.config['block_out_channels'])} levels has no residuals for a network of {len(base_channels)}."
            raise ConfigError(msg)
        pairs = zip(own, wanted, strict=True)
        self.zero_convs = nn.ModuleList(_zero_conv(before[0], after[0]) for before, after in pairs)

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


def residual_encoder(network: nn.Module, base: nn.Module, inputs: Inputs) -> ResidualEncoder:
    """Return a side network for `base` that begins as a copy of the encoder of `network`.

    Args:
        network: A stock network: `base` as it was before it took residuals, or one cut from it.
        base: The network that the residuals are for.
        inputs: What the side network takes beside the stock inputs.

    Raises:
        ConfigError: If `network` is of another class, or its levels are not those of `base`.
    """
    if not isinstance(network, UNet2DModel):
        msg = f"No encoder can be taken from a {type(network).__name__}; this release takes that of a UNet2DModel."
        raise ConfigError(msg)
    config: Any = base.config
    return ResidualEncoder(copy.deepcopy(network), inputs, config["block_out_channels"])


def build_residual_encoder(config: Mapping[str, Any]) -> ResidualEncoder:
    """Build an untrained `ResidualEncoder` from a configuration."""
    return ResidualEncoder(build_stock(config), inputs_of(config), config["base_channels"])


def _zero_conv(channels: int, wanted: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, wanted, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
