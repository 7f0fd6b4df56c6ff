"""The stock `UNet2DConditionModel`, and the same with further inputs, which the stock class already has places for."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from edgedistill.models.inputs import EMBEDDING_DIM, Inputs, inputs_of, scalar_embedding

ADDED = ("text_embeds", "time_ids")
"""What a stock network of Stable Diffusion XL takes beside its text: the embedded prompt, and sizes."""
# Further inputs of a stock network, which have no place in a table yet.
_NONE = ("class_embed_type", "encoder_hid_dim_type")


class ExtendedUNet2DConditionModel(UNet2DConditionModel):
    """A `UNet2DConditionModel` with further inputs; untrained, its output is that of the stock model.

    Scalars enter as ``timestep_cond`` (so that a student with the one scalar w is what diffusers'
    latent-consistency pipelines load), residuals where those of a ControlNet do, and the image as further
    channels of the state, as in inpainting models. What is new is zero at first.

    Args:
        config: Of the stock model.
        inputs: What is added.
    """

    def __init__(self, config: Mapping[str, Any], inputs: Inputs) -> None:
        known = inspect.signature(UNet2DConditionModel.__init__).parameters
        stock = {name: value for name, value in config.items() if name in known}
        if inputs.scalars:
            stock["time_cond_proj_dim"] = EMBEDDING_DIM * len(inputs.scalars)
        super().__init__(**stock)
        if inputs.image_channels:
            self.conv_in: nn.Conv2d = _widened(self.conv_in, inputs.image_channels)
        if inputs.scalars:
            nn.init.zeros_(self.time_embedding.cond_proj.weight)
        self.register_to_config(
            scalar_inputs=dict(inputs.scalars),
            image_channels=inputs.image_channels,
            residual_inputs=inputs.residuals,
            mask_input=inputs.mask,
        )
        self.inputs = inputs

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Predict raw.

        Args:
            sample: (batch, channels, height, width) state.
            timestep: (batch,) label of the time.
            encoder_hidden_states: (batch, length, dim) text.
            class_labels: (batch,) integers, or None.
            added_cond_kwargs: What `ADDED` names, or None.
            **inputs: Scalars (batch,), ``image`` and ``residual_i`` (batch, ., ., .), as configured.
        """
        scalars = [scalar_embedding(inputs[n], s) for n, s in self.inputs.scalars.items()]
        residuals = [inputs[n] for n in inputs if n.startswith("residual_")]
        if self.inputs.image_channels:
            sample = torch.cat([sample, inputs["image"].to(sample.dtype)], dim=1)
        return (
            super()
            .forward(
                sample,
                timestep,
                encoder_hidden_states,
                class_labels=class_labels,
                added_cond_kwargs=added_cond_kwargs,
                timestep_cond=torch.cat(scalars, dim=1).to(sample.dtype) if scalars else None,
                down_block_additional_residuals=residuals[:-1] if residuals else None,
                mid_block_additional_residual=residuals[-1] if residuals else None,
            )
            .sample
        )


def extend_conditional(
    network: UNet2DConditionModel, inputs: Inputs
) -> ExtendedUNet2DConditionModel:
    """Return a copy of a stock network with further inputs."""
    with network.device:
        extended = ExtendedUNet2DConditionModel(network.config, inputs)
    state = network.state_dict()
    if inputs.image_channels:
        own = extended.conv_in.weight
        weight = state["conv_in.weight"]
        state["conv_in.weight"] = torch.cat(
            [weight, torch.zeros_like(own[:, weight.shape[1] :])], 1
        )
    extended.load_state_dict(state, strict=False)
    return extended.train(mode=network.training)


def build_conditional(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Build an untrained stock network.

    Raises:
        ValueError: If the configuration asks for an input that is not known here.
    """
    unknown = [f"{name} {config[name]!r}" for name in _NONE if config.get(name) is not None]
    if (added := config.get("addition_embed_type")) not in (None, "text_time"):
        unknown.append(f"addition_embed_type {added!r}")
    if isinstance(dims := config.get("cross_attention_dim"), list | tuple):
        unknown.append(f"cross_attention_dim {dims!r}")
    if unknown:
        msg = f"its inputs are not known here: {', '.join(unknown)}"
        raise ValueError(msg)
    return UNet2DConditionModel.from_config(
        {key: value for key, value in config.items() if not key.startswith("_")}
    )


def build_extended_conditional(config: Mapping[str, Any]) -> ExtendedUNet2DConditionModel:
    """Build an untrained `ExtendedUNet2DConditionModel` from a configuration."""
    return ExtendedUNet2DConditionModel(config, inputs_of(config))


def _widened(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return an untrained convolution that takes further channels."""
    size: Any = conv.kernel_size
    padding: Any = conv.padding
    return nn.Conv2d(conv.in_channels + channels, conv.out_channels, size, padding=padding)
