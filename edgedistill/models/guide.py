"""Guides: side networks whose residuals steer a frozen denoiser as a second, unguided pass would."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from edgedistill.contract import BATCH, Signature, TensorSpec, residual_shapes
from edgedistill.errors import ConfigError
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.inputs import scalar_embedding

GROUPS = 8
W_SCALE = (
    10.0  # of w before its sinusoids: slow ones, so that residuals change smoothly with guidance
)


class GuidedDenoiser(Denoiser):
    """A guide and the frozen base that it steers, called one after the other; `network` is the guide.

    Args:
        guide: Takes what the base takes, and w; returns the base's residuals.
        base: Takes them.
    """

    instead_of_epsilon = (
        "a guide's base is the teacher as it is, so take a teacher that predicts v or x0"
    )

    def __init__(self, guide: nn.Module, base: Denoiser) -> None:
        super().__init__(guide, base.schedule, base.prediction_type)
        self.base = base

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuidedDenoiser":
        """Copy the guide; the base, which nobody trains, is shared."""
        return GuidedDenoiser(copy.deepcopy(self.network, memo), self.base)

    def raw(self, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the base's prediction under the guide's residuals; arguments as for `Denoiser.raw`."""
        return self.base.raw(z, t, self.base.with_residuals(self.network, z, t, conditions))


class TinyGuide(nn.Module):
    """A tower over the noised state, one level per resolution of the base's residuals.

    Every level is scaled and shifted by what it is told: w, the time, the class, the mean of a text's
    embeddings. Every residual leaves its level through a convolution of its own, zero at first, so that an
    untrained guide changes nothing.

    Args:
        config: ``base``, the configuration of the denoiser that the residuals are for; ``widths``, channels
            of each level; ``embedding_dim``, width of what the levels are told.

    Raises:
        ConfigError: If there is not one width for each level, or the normalisation's groups do not divide it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        base, widths, dim = (config[key] for key in ("base", "widths", "embedding_dim"))
        shapes = residual_shapes(base)
        sizes = list(dict.fromkeys(shape[1:] for shape in shapes))
        if len(widths) != len(sizes) or any(width < 1 or width % GROUPS for width in widths):
            msg = f"A guide for this base needs {len(sizes)} widths, multiples of {GROUPS}, got {list(widths)}."
            raise ConfigError(msg)
        self.config = {"_class_name": type(self).__name__, **config}
        self.signature = _signature(base, shapes)
        self._levels = [sizes.index(shape[1:]) for shape in shapes]
        self.told = _Told(base, dim)
        self.conv_in = nn.Conv2d(base["in_channels"], widths[0], 3, padding=1)
        self.downs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in itertools.pairwise(widths)
        )
        self.blocks = nn.ModuleList(_block(width, dim) for width in widths)
        self.zero_convs = nn.ModuleList(
            _zero_conv(widths[level], shape[0])
            for level, shape in zip(self._levels, shapes, strict=True)
        )

    def forward(
        self, sample: Tensor, timestep: Tensor, w: Tensor, **conditions: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the residuals: skips, then middle.

        Args:
            sample: (batch, channels, height, width) state, as the base is fed it.
            timestep: (batch,) as the base is fed it.
            w: (batch,) Meng's guidance weight.
            **conditions: ``class_labels`` (batch,) and ``encoder_hidden_states`` (batch, length, dim),
                where the base takes them.
        """
        embedding = self.told(sample, timestep, w, conditions)
        features = [self.blocks[0](self.conv_in(sample), embedding)]
        for down, block in zip(self.downs, list(self.blocks)[1:], strict=True):
            features.append(block(down(features[-1]), embedding))
        return tuple(
            conv(features[level]) for level, conv in zip(self._levels, self.zero_convs, strict=True)
        )


def tiny_guide(
    base: nn.Module, widths: Sequence[int], embedding_dim: int, seed: int = 0
) -> TinyGuide:
    """Return an untrained guide for a stock network.

    Args:
        base: The denoiser that the residuals are for.
        widths, embedding_dim: As in the configuration of `TinyGuide`.
        seed: Key of the first weights.

    Raises:
        ConfigError: As `TinyGuide`.
    """
    config = {k: v for k, v in store.config_of(base).items() if not k.startswith("_")}
    settings = {"base": config, "widths": list(widths), "embedding_dim": embedding_dim}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyGuide(settings)


class _Told(nn.Module):
    """Embeds what the levels are told beside the state."""

    def __init__(self, base: Mapping[str, Any], dim: int) -> None:
        super().__init__()
        classes, text = base.get("num_class_embeds"), base.get("cross_attention_dim")
        self.time_proj = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(dim, dim)
        self.w_embedding = TimestepEmbedding(dim, dim)
        self.class_embedding = nn.Embedding(classes, dim) if classes else None
        self.text_embedding = nn.Linear(text, dim) if text else None
        self._dim = dim

    def forward(
        self, sample: Tensor, timestep: Tensor, w: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        sinusoid = scalar_embedding(w, W_SCALE, self._dim)
        made: Tensor = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        made = made + self.w_embedding(sinusoid.to(sample.dtype))
        if self.class_embedding is not None:
            made = made + self.class_embedding(conditions["class_labels"])
        if self.text_embedding is not None:
            made = made + self.text_embedding(conditions["encoder_hidden_states"].mean(dim=1))
        return made


def _signature(base: Mapping[str, Any], shapes: Sequence[tuple[int, int, int]]) -> Signature:
    w = TensorSpec("w", (BATCH,), "float32", "w")
    residuals = tuple(
        TensorSpec(f"residual_{i}", (BATCH, *shape), "float32", "residual")
        for i, shape in enumerate(shapes)
    )
    return Signature((*store.signature_of(base).inputs, w), residuals)


def _block(width: int, dim: int) -> nn.Module:
    return ResnetBlock2D(
        in_channels=width,
        temb_channels=dim,
        groups=GROUPS,
        eps=1e-5,
        time_embedding_norm="scale_shift",
    )


def _zero_conv(channels: int, wanted: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, wanted, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
