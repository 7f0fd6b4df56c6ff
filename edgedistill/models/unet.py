"""A `UNet2DModel` that takes the guidance weight as an input, and its folding back into a stock one."""

import math
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from edgedistill.errors import ConfigError

GUIDANCE_DIM = 256


def guidance_embedding(w: Tensor, dim: int = GUIDANCE_DIM) -> Tensor:
    """Return sines and cosines of ``1000*w``, the embedding of latent-consistency models.

    Args:
        w: (batch,) Meng's guidance weight, ``guidance_scale - 1``.
        dim: Even width of the embedding.

    Returns:
        (batch, dim) float32: all sines, then all cosines.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=w.device)
    frequencies = torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GuidedUNet2DModel(nn.Module):
    """A `UNet2DModel` whose time embedding also sees the guidance weight.

    A bias-free projection of `guidance_embedding(w)`, zero at first, is added to the sinusoid of the
    timestep before the first layer of the time MLP (arXiv:2210.03142, section 3.1; the form is the
    one of diffusers' ``time_cond_proj_dim``). Untrained, the output is bitwise that of the stock model.

    Args:
        unet: The stock model; its modules become this one's, under the same names.
        guidance_dim: Width of the guidance embedding.

    Raises:
        ConfigError: If the stock model uses a block or an embedding that this forward does not know.
    """

    def __init__(self, unet: UNet2DModel, guidance_dim: int = GUIDANCE_DIM) -> None:
        super().__init__()
        config = dict(unet.config)
        unknown = [name for name, allowed in _STOCK.items() if config.get(name) not in allowed] + [
            kind for kind in config["down_block_types"] if "Skip" in kind
        ]
        if unknown:
            msg = f"A guidance input cannot be added to this UNet2DModel because of: {', '.join(unknown)}."
            raise ConfigError(msg)
        self.config = {
            **config,
            "_class_name": type(self).__name__,
            "time_cond_proj_dim": guidance_dim,
        }
        self.conv_in: nn.Module = unet.conv_in
        self.time_proj: nn.Module = unet.time_proj
        self.time_embedding: nn.Module = _with_condition(unet.time_embedding, guidance_dim)
        self.class_embedding: nn.Module | None = unet.class_embedding
        self.down_blocks: nn.ModuleList = unet.down_blocks
        self.mid_block: nn.Module | None = unet.mid_block
        self.up_blocks: nn.ModuleList = unet.up_blocks
        self.conv_norm_out: nn.Module = unet.conv_norm_out
        self.conv_act: nn.Module = unet.conv_act
        self.conv_out: nn.Module = unet.conv_out

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None, w: Tensor
    ) -> Tensor:
        """Predict raw.

        Args:
            sample: (batch, channels, height, width) state.
            timestep: (batch,) label of the time.
            class_labels: (batch,) integers, or None for an unconditional model.
            w: (batch,) guidance weight ``guidance_scale - 1``.
        """
        sinusoid = self.time_proj(timestep).to(sample.dtype)
        guidance = guidance_embedding(w, self.config["time_cond_proj_dim"]).to(sample.dtype)
        embedding = self.time_embedding(sinusoid, guidance)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels).to(sample.dtype)
        hidden = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (hidden,)
        for block in self.down_blocks:
            hidden, made = block(hidden_states=hidden, temb=embedding)
            skips += made
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, embedding)
        for block in self.up_blocks:
            count = len(list(block.resnets))  # type: ignore[arg-type]
            hidden = block(hidden, skips[-count:], embedding)
            skips = skips[:-count]
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))


def bake_guidance(model: GuidedUNet2DModel, w: float) -> UNet2DModel:
    """Return a stock `UNet2DModel` that equals `model` at one guidance weight.

    The projected embedding of a constant w is a constant vector before the first linear layer of the
    time MLP, so it folds into that layer's bias.
    """
    stock = build_stock(model.config)
    state = model.state_dict()
    projection = state.pop("time_embedding.cond_proj.weight")
    vector = projection @ guidance_embedding(torch.tensor([w]), projection.shape[1])[0].to(
        projection
    )
    bias = state["time_embedding.linear_1.bias"]
    state["time_embedding.linear_1.bias"] = bias + state["time_embedding.linear_1.weight"] @ vector
    stock.load_state_dict(state)
    return stock.eval()


def build_stock(config: dict[str, Any]) -> UNet2DModel:
    """Build an untrained stock `UNet2DModel` from a configuration; keys it does not know are left out."""
    return UNet2DModel.from_config(
        {k: v for k, v in config.items() if k != "time_cond_proj_dim" and not k.startswith("_")}
    )


_STOCK: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional", None),
    "class_embed_type": (None,),
}


def _with_condition(old: TimestepEmbedding, dim: int) -> TimestepEmbedding:
    features = old.linear_1.in_features
    new = TimestepEmbedding(features, old.linear_1.out_features, cond_proj_dim=dim)
    new.load_state_dict(old.state_dict(), strict=False)
    nn.init.zeros_(new.cond_proj.weight)
    return new.to(old.linear_1.weight.device)
