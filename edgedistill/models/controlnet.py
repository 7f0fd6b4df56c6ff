"""ControlNets: diffusers' side network from a control picture to residuals, and the UNet that takes them."""

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.models import store
from edgedistill.models.conditional import (
    ExtendedUNet2DConditionModel,
    refuse_unknown_inputs,
)
from edgedistill.models.inputs import Inputs
from edgedistill.table import Condition

IMAGE = "image"
RANGE = (0.0, 1.0)
"""Values of black and white in the control picture."""
_LAST = ("controlnet_down_blocks.", "controlnet_mid_block.")
"""The convolutions that residuals leave through."""


class ControlNet(nn.Module):
    """diffusers' `ControlNetModel` (arXiv:2302.05543) as a network of named tensors, at one size.

    Args:
        stock: The stock network, which holds the weights.
        latent_size: (height, width) of the states.
    """

    def __init__(self, stock: ControlNetModel, latent_size: tuple[int, int]) -> None:
        super().__init__()
        self.stock = stock
        self.config: dict[str, Any] = store.config_of(stock)
        self.latent_size = latent_size

    @property
    def signature(self) -> Signature:
        """What the UNet takes and ``image`` in, ``residual_i`` out: skips, then middle."""
        config = self.config
        factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        size = [side * factor for side in self.latent_size]
        shape = (BATCH, config["conditioning_channels"], *size)
        image = TensorSpec(IMAGE, shape, "float32", "image")
        widths = config["block_out_channels"]
        sized = {**config, "sample_size": self.latent_size, "base_channels": widths}
        whole = store.signature_of(sized)
        return Signature((*whole.inputs, image), whole.outputs)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        image: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the residuals.

        Args:
            sample: (batch, channels, height, width) state.
            timestep: (batch,) label of the time.
            encoder_hidden_states: (batch, length, dim) text.
            image: (batch, channels, image height, image width) control picture in `RANGE`.
            added_cond_kwargs: What Stable Diffusion XL is told beside its text, or None.
        """
        skips, middle = self.stock(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond=image,
            added_cond_kwargs=added_cond_kwargs,
            return_dict=False,
        )
        return (*skips, middle)


def picture_of(controlnet: Signature) -> Condition:
    """Return the control picture as a table asks the caller for it."""
    spec = next(spec for spec in controlnet.inputs if spec.kind == "image")
    _, channels, height, width = spec.shape
    shape = int(channels), int(height), int(width)
    return Condition(spec.name, spec.kind, shape=shape, value_range=RANGE)


def build_controlnet(config: Mapping[str, Any]) -> ControlNetModel:
    """Build an untrained `ControlNetModel` from its configuration.

    Raises:
        ValueError: If the configuration asks for an input or an output that is not known here.
    """
    refuse_unknown_inputs(config)
    if config.get("global_pool_conditions") or config.get("num_class_embeds"):
        msg = "`global_pool_conditions` and `num_class_embeds` are not known here"
        raise ValueError(msg)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    stock: ControlNetModel = ControlNetModel.from_config(public)
    return stock


def scale_residuals(state: dict[str, Tensor], scale: float) -> None:
    """Multiply what a ControlNet answers by changing its weights, which every loader then has.

    Args:
        state: Of a `ControlNetModel`; it is changed.
        scale: diffusers' ``controlnet_conditioning_scale``.
    """
    for name in [name for name in state if name.startswith(_LAST)]:
        state[name] = state[name] * scale


def controlling(stock: ControlNetModel, signature: Signature) -> ControlNet:
    """Return a stock network as one that takes states of a signature's size."""
    _, _, height, width = signature.inputs[0].shape
    return ControlNet(stock, (int(height), int(width)))


def controlled(network: UNet2DConditionModel) -> ExtendedUNet2DConditionModel:
    """Return a network that also takes residuals; its weights are those of the one given, not copies."""
    scalars = network.inputs.scalars if isinstance(network, ExtendedUNet2DConditionModel) else {}
    with init_empty_weights():
        taking = ExtendedUNet2DConditionModel(network.config, Inputs(scalars, residuals=True))
    taking.load_state_dict(network.state_dict(), assign=True)
    return taking.eval().requires_grad_(requires_grad=False)


def asked_residuals(network: Any, signature: Signature) -> nn.Module:
    """Return a network as a signature wants it: with residuals, or as it is."""
    wants = signature.input("residual") is not None
    has = isinstance(network, ExtendedUNet2DConditionModel) and network.inputs.residuals
    return controlled(network) if wants and not has else network
