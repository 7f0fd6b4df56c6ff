"""The stock `UNet2DConditionModel`, and the same with further inputs, which the stock class already has places for."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from edgedistill.models.inputs import (
    EMBEDDING_DIM,
    SCALES,
    Inputs,
    inputs_of,
    picture,
    refuse_unsized,
    scalar_embedding,
)
from edgedistill.models.unet import baked_state, zero_convs

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
        stock = _stock(config)
        width = EMBEDDING_DIM
        if inputs.scalars:
            # A latent-consistency model says how wide the embedding of its one scalar is.
            width = (stock.get("time_cond_proj_dim") or 0) // len(inputs.scalars) or EMBEDDING_DIM
            stock["time_cond_proj_dim"] = width * len(inputs.scalars)
        super().__init__(**stock)
        if inputs.image_channels:
            further = inputs.image_channels + inputs.mask
            self.conv_in: nn.Conv2d = _widened(self.conv_in, further)
        if inputs.scalars:
            nn.init.zeros_(self.time_embedding.cond_proj.weight)
        self.register_to_config(
            scalar_inputs=dict(inputs.scalars),
            image_channels=inputs.image_channels,
            residual_inputs=inputs.residuals,
            mask_input=inputs.mask,
        )
        self.inputs = inputs
        self.scalar_width = width

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
            **inputs: Scalars (batch,), ``image``, ``mask`` and ``residual_i`` (batch, ., ., .), as configured.
        """
        residuals = [inputs[n] for n in inputs if n.startswith("residual_")]
        return (
            super()
            .forward(
                self._state(sample, inputs),
                timestep,
                encoder_hidden_states,
                class_labels=class_labels,
                added_cond_kwargs=added_cond_kwargs,
                timestep_cond=self._told(sample, inputs),
                down_block_additional_residuals=residuals[:-1] if residuals else None,
                mid_block_additional_residual=residuals[-1] if residuals else None,
            )
            .sample
        )

    def _state(self, sample: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the state with the channels of the image behind it."""
        if not self.inputs.image_channels:
            return sample
        return torch.cat([sample, picture(inputs, self.inputs).to(sample.dtype)], dim=1)

    def _told(self, sample: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return the embeddings of the scalars, or None where there are none."""
        made = [
            scalar_embedding(inputs[n], s, self.scalar_width)
            for n, s in self.inputs.scalars.items()
        ]
        return torch.cat(made, dim=1).to(sample.dtype) if made else None


class ConditionalResidualEncoder(ExtendedUNet2DConditionModel):
    """The encoder of a `UNet2DConditionModel` that answers with ``residual_0``, ...: skips, then middle.

    Each leaves through a zero convolution (Zhang et al., arXiv:2302.05543, section 3.1).

    Args:
        config: Of the stock model.
        inputs: What it takes beside the stock inputs; no residuals.
        base_channels: ``block_out_channels`` of the network that the residuals are for.
    """

    def __init__(
        self, config: Mapping[str, Any], inputs: Inputs, base_channels: Sequence[int]
    ) -> None:
        super().__init__(config, inputs)
        del self.up_blocks, self.conv_norm_out, self.conv_act, self.conv_out
        self.register_to_config(base_channels=list(base_channels))
        self.zero_convs = zero_convs(dict(self.config), base_channels)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the residuals; arguments as for `ExtendedUNet2DConditionModel`."""
        sinusoid = self.get_time_embed(sample, timestep)
        embedding = self.time_embedding(sinusoid, self._told(sample, inputs))
        for further in (
            self.get_class_embed(sample, class_labels),
            self.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs),
        ):
            embedding = embedding if further is None else embedding + further
        hidden = self.conv_in(self._state(sample, inputs))
        skips: tuple[Tensor, ...] = (hidden,)
        for block in self.down_blocks:
            text = {"encoder_hidden_states": encoder_hidden_states}
            reads = getattr(block, "has_cross_attention", False)
            hidden, made = block(hidden, embedding, **(text if reads else {}))
            skips += made
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, embedding, encoder_hidden_states=encoder_hidden_states)
        pairs = zip(self.zero_convs, (*skips, hidden), strict=True)
        return tuple(conv(value) for conv, value in pairs)


_Extended = TypeVar("_Extended", bound=ExtendedUNet2DConditionModel)


def extend_conditional(
    network: UNet2DConditionModel, inputs: Inputs
) -> ExtendedUNet2DConditionModel:
    """Return a copy of a stock network with further inputs."""
    with network.device:
        extended = ExtendedUNet2DConditionModel(network.config, inputs)
    return _filled(extended, network)


def conditional_residual_encoder(
    network: UNet2DConditionModel, inputs: Inputs, base_channels: Sequence[int]
) -> ConditionalResidualEncoder:
    """Return a side network that begins as a copy of the encoder of a stock network."""
    with network.device:
        encoder = ConditionalResidualEncoder(network.config, inputs, base_channels)
    return _filled(encoder, network)


def _filled(extended: _Extended, network: UNet2DConditionModel) -> _Extended:
    """Give a network the weights of the stock one that it has places for; those of further channels are zero."""
    state = network.state_dict()
    if extended.inputs.image_channels:
        own = extended.conv_in.weight
        weight = state["conv_in.weight"]
        state["conv_in.weight"] = torch.cat(
            [weight, torch.zeros_like(own[:, weight.shape[1] :])], 1
        )
    extended.load_state_dict(state, strict=False)
    return extended.train(mode=network.training)


def build_conditional(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Build an untrained stock network; one that takes ``timestep_cond`` takes w, which is embedded in it.

    Raises:
        ValueError: If the configuration asks for an input that is not known here, or states no size.
    """
    refuse_unsized(config)
    refuse_unknown_inputs(config)
    if config.get("time_cond_proj_dim"):
        return ExtendedUNet2DConditionModel(config, Inputs({"w": SCALES["w"]}))
    return UNet2DConditionModel.from_config(
        {key: value for key, value in config.items() if not key.startswith("_")}
    )


def bake_conditional_guidance(
    model: ExtendedUNet2DConditionModel, w: float
) -> UNet2DConditionModel:
    """Return a stock `UNet2DConditionModel` that equals `model` at one guidance weight and takes none.

    Raises:
        ConfigError: If the model has other inputs than w.
    """
    state = baked_state(model, model.inputs, w)
    stock = UNet2DConditionModel(**{**_stock(model.config), "time_cond_proj_dim": None})
    stock.load_state_dict(state)
    return stock.eval()


def _stock(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that the stock class takes."""
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {name: value for name, value in config.items() if name in known}


def refuse_unknown_inputs(config: Mapping[str, Any]) -> None:
    """Refuse a stock network with further inputs that are not known here.

    Raises:
        ValueError: Naming them.
    """
    unknown = [f"{name} {config[name]!r}" for name in _NONE if config.get(name) is not None]
    if (added := config.get("addition_embed_type")) not in (None, "text_time"):
        unknown.append(f"addition_embed_type {added!r}")
    if isinstance(dims := config.get("cross_attention_dim"), list | tuple):
        unknown.append(f"cross_attention_dim {dims!r}")
    if unknown:
        msg = f"its inputs are not known here: {', '.join(unknown)}"
        raise ValueError(msg)
    if added is not None and not config.get("addition_time_embed_dim"):
        msg = "`addition_time_embed_dim` must say how wide each size is embedded where `addition_embed_type` is 'text_time'; get config.json anew"
        raise ValueError(msg)


def build_conditional_residual_encoder(config: Mapping[str, Any]) -> ConditionalResidualEncoder:
    """Build an untrained `ConditionalResidualEncoder` from a configuration."""
    return ConditionalResidualEncoder(config, inputs_of(config), config["base_channels"])


def build_extended_conditional(config: Mapping[str, Any]) -> ExtendedUNet2DConditionModel:
    """Build an untrained `ExtendedUNet2DConditionModel` from a configuration."""
    return ExtendedUNet2DConditionModel(config, inputs_of(config))


def _widened(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return an untrained convolution that takes further channels."""
    size: Any = conv.kernel_size
    padding: Any = conv.padding
    return nn.Conv2d(conv.in_channels + channels, conv.out_channels, size, padding=padding)
