"""Autoencoders of images: the stock ones, and their two halves as networks of one input and one output."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from edgedistill.contract import BATCH, Signature, TensorSpec

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
_STOCK: Mapping[str, type[Autoencoder]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
}


def build_autoencoder(config: Mapping[str, Any]) -> Autoencoder:
    """Build an untrained `AutoencoderKL` or `AutoencoderTiny` from its configuration.

    Raises:
        ValueError: If its latents are normalised by channel, which a table cannot say.
    """
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        msg = "`latents_mean` and `latents_std` are not known here, one `scaling_factor` is"
        raise ValueError(msg)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return _STOCK[config["_class_name"]].from_config(public)


class _Half(nn.Module):
    """One half of an autoencoder.

    Args:
        stock: The autoencoder; its modules become this one's, under the same names.
        latent_size: (height, width) of the latents.
    """

    def __init__(self, stock: Autoencoder, latent_size: tuple[int, int]) -> None:
        super().__init__()
        config = dict(stock.config)
        kind = next(name for name, cls in _STOCK.items() if isinstance(stock, cls))
        self.config: dict[str, Any] = {
            **config,
            "_class_name": type(self).__name__,
            "autoencoder": kind,
            "latent_size": list(latent_size),
        }

    def _images(self, channels: str) -> TensorSpec:
        height, width = (size * reduction(self.config) for size in self.config["latent_size"])
        shape = (BATCH, self.config[channels], height, width)
        return TensorSpec("sample", shape, "float32", "image")

    def _latents(self) -> TensorSpec:
        shape = (BATCH, self.config["latent_channels"], *self.config["latent_size"])
        return TensorSpec("latent_sample", shape, "float32", "latent")


class VaeEncoder(_Half):
    """From images in [-1, 1] to latents, neither scaled nor shifted; of an `AutoencoderKL` their mean."""

    def __init__(self, stock: Autoencoder, latent_size: tuple[int, int]) -> None:
        super().__init__(stock, latent_size)
        self.encoder: nn.Module = stock.encoder
        self.quant_conv: nn.Module | None = getattr(stock, "quant_conv", None)

    @property
    def signature(self) -> Signature:
        """``sample`` in, ``latent_sample`` out."""
        return Signature((self._images("in_channels"),), (self._latents(),))

    def forward(self, sample: Tensor) -> Tensor:
        """Encode images (batch, channels, height, width)."""
        return self.encode(sample)[:, : self.config["latent_channels"]]

    def encode(self, sample: Tensor) -> Tensor:
        """Return the latents; of an `AutoencoderKL` their mean and, in further channels, log-variance."""
        hidden = self.encoder(sample)
        return hidden if self.quant_conv is None else self.quant_conv(hidden)


class VaeDecoder(_Half):
    """From latents, neither scaled nor shifted, to images in about [-1, 1]."""

    def __init__(self, stock: Autoencoder, latent_size: tuple[int, int]) -> None:
        super().__init__(stock, latent_size)
        self.decoder: nn.Module = stock.decoder
        # The attention of several images leaves their channels innermost, where PyTorch's norms of 512x512
        # pixels keep 91 dB and not 145.
        for name, part in self.decoder.named_children():
            if name == "mid_block":
                part.register_forward_hook(_channels_outermost)
        self.post_quant_conv: nn.Module | None = getattr(stock, "post_quant_conv", None)

    @property
    def signature(self) -> Signature:
        """``latent_sample`` in, ``sample`` out."""
        return Signature((self._latents(),), (self._images("out_channels"),))

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Decode latents (batch, channels, height, width)."""
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return self.decoder(latent_sample)


def _channels_outermost(_module: nn.Module, _given: tuple[Tensor, ...], made: Tensor) -> Tensor:
    return made.contiguous()


def half_of(stock: Autoencoder, signature: Signature) -> VaeEncoder | VaeDecoder:
    """Return the half of an autoencoder that a signature asks for; what takes an image is the encoder."""
    takes, gives = signature.inputs[0], signature.outputs[0]
    half, latents = (VaeEncoder, gives) if takes.kind == "image" else (VaeDecoder, takes)
    height, width = latents.shape[2:]
    return half(stock, (int(height), int(width)))


def build_half(config: Mapping[str, Any]) -> VaeEncoder | VaeDecoder:
    """Build an untrained `VaeEncoder` or `VaeDecoder` from its configuration."""
    half = VaeEncoder if config["_class_name"] == VaeEncoder.__name__ else VaeDecoder
    height, width = config["latent_size"]
    ours = ("autoencoder", "latent_size")
    public = {key: value for key, value in config.items() if key not in ours}
    return half(
        build_autoencoder({**public, "_class_name": config["autoencoder"]}), (height, width)
    )


def reduction(config: Mapping[str, Any]) -> int:
    """Return by what factor an autoencoder's latents are smaller than its images."""
    levels = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return int(2 ** (len(levels) - 1))


def scale_and_shift(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the scale and shift of ``(latents - shift) * scale``, what a diffusion network works on."""
    return float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
