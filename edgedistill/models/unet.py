"""Stock UNets with further inputs: embedded scalars, an image, residuals; and the folding of guidance into weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from edgedistill.contract import residual_shapes
from edgedistill.errors import ConfigError
from edgedistill.models.inputs import (
    EMBEDDING_DIM,
    Inputs,
    inputs_of,
    picture,
    refuse_unsized,
    scalar_embedding,
)


class ExtendedUNet2DModel(nn.Module):
    """A `UNet2DModel` with further inputs; untrained, its output is bitwise that of the stock model.

    Scalars: one bias-free projection of all their embeddings, zero at first, is added to the sinusoid of
    the timestep before the first layer of the time MLP (the form of diffusers' ``time_cond_proj_dim``; for
    guidance arXiv:2210.03142, section 3.1). The image: a convolution of it, zero at first, is added to
    that of the state. Residuals are added after the encoder has run.

    Args:
        unet: The stock model; its modules become this one's, under the same names.
        inputs: What is added.

    Raises:
        ConfigError: If the stock model uses a block or an embedding that this forward does not know.
    """

    def __init__(self, unet: UNet2DModel, inputs: Inputs) -> None:
        super().__init__()
        config = dict(unet.config)
        unknown = [name for name, allowed in _STOCK.items() if config.get(name) not in allowed] + [
            kind for kind in config["down_block_types"] if "Skip" in kind
        ]
        if unknown:
            msg = f"No input can be added to this UNet2DModel because of: {', '.join(unknown)}."
            raise ConfigError(msg)
        self.config = {
            **config,
            "_class_name": type(self).__name__,
            "scalar_inputs": dict(inputs.scalars),
            "image_channels": inputs.image_channels,
            "residual_inputs": inputs.residuals,
            "mask_input": inputs.mask,
        }
        self.conv_in: nn.Conv2d = unet.conv_in
        self.conv_image = _image_stem(unet.conv_in, inputs.image_channels + inputs.mask)
        self.time_proj: nn.Module = unet.time_proj
        self.time_embedding: nn.Module = _with_scalars(unet.time_embedding, len(inputs.scalars))
        self.class_embedding: nn.Module | None = unet.class_embedding
        self.down_blocks: nn.ModuleList = unet.down_blocks
        self.mid_block: nn.Module | None = unet.mid_block
        self.up_blocks: nn.ModuleList = unet.up_blocks
        self.conv_norm_out: nn.Module = unet.conv_norm_out
        self.conv_act: nn.Module = unet.conv_act
        self.conv_out: nn.Module = unet.conv_out

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Predict raw.

        Args:
            sample: (batch, channels, height, width) state.
            timestep: (batch,) label of the time.
            class_labels: (batch,) integers, or None for an unconditional model.
            **inputs: Scalars (batch,), ``image``, ``mask`` and ``residual_i`` (batch, ., ., .), as configured.
        """
        embedding = self._embed(sample, timestep, class_labels, inputs)
        skips, hidden = self.encode(sample, embedding, inputs)
        if self.config["residual_inputs"]:
            skips = tuple(skip + inputs[f"residual_{i}"] for i, skip in enumerate(skips))
            hidden = hidden + inputs[f"residual_{len(skips)}"]
        for block in self.up_blocks:
            count = len(list(block.resnets))  # type: ignore[arg-type]
            hidden = block(hidden, skips[-count:], embedding)
            skips = skips[:-count]
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))

    def encode(
        self, sample: Tensor, embedding: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the skips, in the order in which they are made, and what leaves the middle."""
        hidden = self.conv_in(sample)
        if self.conv_image is not None:
            hidden = hidden + self.conv_image(picture(inputs, inputs_of(self.config)))
        skips: tuple[Tensor, ...] = (hidden,)
        for block in self.down_blocks:
            hidden, made = block(hidden_states=hidden, temb=embedding)
            skips += made
        return skips, hidden if self.mid_block is None else self.mid_block(hidden, embedding)

    def _embed(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None,
        inputs: Mapping[str, Tensor],
    ) -> Tensor:
        sinusoid = self.time_proj(timestep).to(sample.dtype)
        scalars = [
            scalar_embedding(inputs[name], scale)
            for name, scale in self.config["scalar_inputs"].items()
        ]
        condition = torch.cat(scalars, dim=1).to(sample.dtype) if scalars else None
        embedding = self.time_embedding(sinusoid, condition)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels).to(sample.dtype)
        return embedding


def zero_convs(config: Mapping[str, Any], base_channels: Sequence[int]) -> nn.ModuleList:
    """Return a convolution, zero at first, for every residual that an encoder makes for another network.

    Args:
        config: Of the encoder.
        base_channels: ``block_out_channels`` of the other network.

    Raises:
        ConfigError: If the numbers of levels differ.
    """
    own = residual_shapes(config)
    wanted = residual_shapes({**config, "block_out_channels": list(base_channels)})
    if len(own) != len(wanted):
        msg = f"An encoder of {len(config['block_out_channels'])} levels has no residuals for a network of {len(base_channels)}."
        raise ConfigError(msg)
    made = nn.ModuleList(
        nn.Conv2d(before[0], after[0], 1) for before, after in zip(own, wanted, strict=True)
    )
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


def bake_guidance(model: ExtendedUNet2DModel, w: float) -> UNet2DModel:
    """Return a stock `UNet2DModel` that equals `model` at one guidance weight.

    Raises:
        ConfigError: If the model has other inputs than w.
    """
    stock = build_stock(model.config)
    stock.load_state_dict(baked_state(model, inputs_of(model.config), w))
    return stock.eval()


def baked_state(model: nn.Module, inputs: Inputs, w: float) -> dict[str, Tensor]:
    """Return the weights of a stock network that equals `model` at one guidance weight.

    The projected embedding of a constant w is a constant vector before the first linear layer of the
    time MLP, so it folds into that layer's bias.

    Args:
        model: Has a time MLP as diffusers' UNets do, with a projection of w.
        inputs: What it takes beside the stock inputs.
        w: Meng's guidance weight.

    Raises:
        ConfigError: If it has other inputs than w.
    """
    if set(inputs.scalars) != {"w"} or inputs.image_channels or inputs.residuals:
        msg = f"Only a network whose one further input is w can be baked; this one takes: {', '.join(_named(inputs)) or 'none'}."
        raise ConfigError(msg)
    state = model.state_dict()
    projection = state.pop("time_embedding.cond_proj.weight")
    embedding = scalar_embedding(torch.tensor([w]), inputs.scalars["w"], projection.shape[1])[0]
    vector = projection @ embedding.to(projection)
    bias = state["time_embedding.linear_1.bias"]
    state["time_embedding.linear_1.bias"] = bias + state["time_embedding.linear_1.weight"] @ vector
    return state


def _named(inputs: Inputs) -> list[str]:
    others = {"image": inputs.image_channels, "mask": inputs.mask, "residuals": inputs.residuals}
    return [*inputs.scalars, *(name for name, there in others.items() if there)]


def build_stock(config: Mapping[str, Any]) -> UNet2DModel:
    """Build an untrained stock `UNet2DModel` from a configuration; keys it does not know are left out.

    Raises:
        ValueError: If the configuration asks for an input that is not known here, or states no size.
    """
    refuse_unsized(config)
    if (kind := config.get("class_embed_type")) is not None:
        msg = f"its inputs are not known here: class_embed_type {kind!r}; classes are whole numbers, with `num_class_embeds`"
        raise ValueError(msg)
    return UNet2DModel.from_config(
        {k: v for k, v in config.items() if k not in _OURS and not k.startswith("_")}
    )


def build_extended(config: Mapping[str, Any]) -> ExtendedUNet2DModel:
    """Build an untrained `ExtendedUNet2DModel` from a configuration."""
    return ExtendedUNet2DModel(build_stock(config), inputs_of(config))


_OURS = ("scalar_inputs", "image_channels", "residual_inputs", "mask_input", "base_channels")
_STOCK: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional", None),
    "class_embed_type": (None,),
}


def _with_scalars(old: TimestepEmbedding, count: int) -> TimestepEmbedding:
    if not count:
        return old
    features = old.linear_1.in_features
    with old.linear_1.weight.device:
        new = TimestepEmbedding(
            features, old.linear_1.out_features, cond_proj_dim=count * EMBEDDING_DIM
        )
    new.load_state_dict(old.state_dict(), strict=False)
    nn.init.zeros_(new.cond_proj.weight)
    return new


def _image_stem(conv_in: nn.Conv2d, channels: int) -> nn.Conv2d | None:
    if not channels:
        return None
    stem = nn.Conv2d(channels, conv_in.out_channels, 3, padding=1, bias=False)
    nn.init.zeros_(stem.weight)
    return stem.to(conv_in.weight.device)
