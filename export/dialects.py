"""Graphs as loaders want them: names, ranks and dtypes by format, and modules to trace that speak so.

Sources: optimum-onnx 0.1.0 and optimum-intel 1.27 (`modeling_diffusion.py`), openvino.genai 2026.4
(`src/cpp/src/image_generation`), apple/ml-stable-diffusion (`torch2coreml.py`, `Unet.swift`, `ControlNet.swift`,
`TextEncoder.swift`, `TextEncoderXL.swift`, `Encoder.swift`, `Decoder.swift`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.errors import ContractError
from edgedistill.models.controlnet import ControlNet
from edgedistill.models.inputs import SCALES, scalar_embedding
from edgedistill.models.text import TextEncoder
from edgedistill.models.vae import VaeDecoder, VaeEncoder

HIDDEN = "hidden"
"""Kind of what leaves a layer of a text encoder."""
_FREE = {"image": ("image_height", "image_width")}
_FREE |= dict.fromkeys(("x", "raw", "latent", "moments"), ("height", "width"))
_NAMES: Mapping[str, Mapping[str, str]] = {
    "onnx": {"w": "timestep_cond", "moments": "latent_parameters"},
    "openvino": {"w": "timestep_cond", "moments": "latent_parameters"},
    "coreml": {"raw": "noise_pred", "latent": "z", "image": "image", "moments": "latent"},
}
_APPLE_ENCODER_INPUT = "x"
_PICTURE = "controlnet_cond"
"""diffusers' and Apple's name of the picture that a ControlNet follows."""
_SURE = -30.0
"""The least log-variance that diffusers and Apple's package know."""
UNET_KINDS = {"x", "t", "text", "pooled", "size", "w", "residual"}
"""What loaders feed a denoiser."""


@dataclass(frozen=True)
class Dialect:
    """How the graphs of one export speak.

    Fields:
        format: ``onnx``, ``openvino`` or ``coreml``.
        two_encoders: Whether the pipeline reads prompts with two text encoders, as Stable Diffusion XL does:
            then what leaves the last layer but one is what counts.
        guided: Whether the network is called with and without condition.
        controlled: Whether a ControlNet is called before it.
        w: The guidance weight to fold into graphs of Core ML, whose loader feeds none; None: there is none.
        free_sizes: Whether height and width are left free, batch apart. Core ML leaves nothing free.
    """

    format: str
    two_encoders: bool = False
    guided: bool = False
    controlled: bool = False
    w: float | None = None
    free_sizes: bool = False

    def of(self, network: nn.Module, signature: Signature) -> tuple[Signature, nn.Module]:
        """Return what the graph of a network takes and gives, and what to trace for it.

        Args:
            network: A denoiser of Stable Diffusion's kind, its ControlNet, a text encoder, or half of an
                autoencoder.
            signature: The network's own, its sizes fixed but for the batch.

        Returns:
            The signature of the graph, its names here and in the graph; and a module that takes and gives
            tensors by their names in the graph.

        Raises:
            ContractError: If loaders know no such network.
        """
        match network:
            case TextEncoder():
                made = self._text(network, signature)
                return made, _SpokenText(network, [spec.graph_name for spec in made.outputs])
            case VaeEncoder():
                draws = (
                    _has_moments(network) or self.format == "coreml"
                )  # whose loader always draws
                made = _with_moments(signature) if draws else signature
                return self._fitted(made), _SpokenHalf(network, draws=draws)
            case VaeDecoder():
                return self._fitted(signature), _SpokenHalf(network)
            case ControlNet():
                config = network.config
                inputs = tuple(self._unet_input(spec, config) for spec in signature.inputs)
                return self._fitted(Signature(inputs, signature.outputs)), _SpokenControl(network)
            case UNet2DConditionModel():
                return self._unet(network, signature)
        msg = f"Loaders of pipelines know no {type(network).__name__}; export with --layout bundle."
        raise ContractError(msg)

    def _unet(
        self, network: UNet2DConditionModel, signature: Signature
    ) -> tuple[Signature, nn.Module]:
        if unknown := [s.name for s in signature.inputs if s.kind not in UNET_KINDS]:
            msg = f"Loaders of pipelines feed no {', '.join(unknown)}; export with --layout bundle."
            raise ContractError(msg)
        baked = self.format == "coreml" and signature.input("w") is not None
        inputs = tuple(
            self._unet_input(spec, dict(network.config))
            for spec in signature.inputs
            if not (baked and spec.kind == "w")
        )
        made = self._fitted(Signature(inputs, signature.outputs))
        return made, _SpokenUNet(network, self.w if baked else None)

    def _unet_input(self, spec: TensorSpec, config: Mapping[str, Any]) -> TensorSpec:
        match spec.kind, self.format:
            case "t", "onnx":
                return dataclasses.replace(spec, shape=())
            case "t", "openvino":
                return dataclasses.replace(spec, dtype="int64")
            case "w", _:
                return dataclasses.replace(
                    spec, shape=(spec.shape[0], config["time_cond_proj_dim"])
                )
            case "text", "coreml":
                batch, length, dim = spec.shape
                return dataclasses.replace(spec, shape=(batch, dim, 1, length))
        return spec

    def _text(self, network: TextEncoder, signature: Signature) -> Signature:
        """Return the outputs in the order of optimum's exports, by which openvino.genai takes them."""
        (tokens,) = signature.inputs
        tokens = dataclasses.replace(
            tokens, dtype="float32" if self.format == "coreml" else "int64"
        )
        text = next(spec for spec in signature.outputs if spec.kind == "text")
        own = next((spec for spec in signature.outputs if spec.kind == "pooled"), None)
        projected = network.text_projection is not None
        width = network.config["projection_dim" if projected else "hidden_size"]
        pooled = own or TensorSpec("pooled", (text.shape[0], width), "float32", "pooled")
        if self.format == "coreml":
            name = "hidden_embeds" if self.two_encoders else "last_hidden_state"
            outputs = [_called(text, name), _called(pooled, "pooled_outputs")]
            return Signature((tokens,), tuple(outputs))
        pooled = _called(pooled, "text_embeds" if projected else "pooler_output")
        if not self.two_encoders:
            return Signature((tokens,), (_called(text, "last_hidden_state"), pooled))
        last = dataclasses.replace(text, name="last_hidden_state", kind=HIDDEN)
        layers = network.config["num_hidden_layers"]
        names = [f"hidden_states.{i}" for i in range(layers + 1)]
        states = [dataclasses.replace(text, name=name, kind=HIDDEN) for name in names]
        states[layers - 1] = _called(text, names[layers - 1])
        first = [pooled, last] if projected else [last, pooled]
        return Signature((tokens,), (*first, *states))

    def _fitted(self, signature: Signature) -> Signature:
        """Give tensors their names in the graph, and free their sizes."""
        inputs, outputs = (
            tuple(map(self._fitted_spec, side)) for side in (signature.inputs, signature.outputs)
        )
        first, *others = inputs
        if self.format == "coreml" and first.kind == "image":
            first = _called(first, _APPLE_ENCODER_INPUT)
        others = [_called(s, _PICTURE) if s.kind == "image" else s for s in others]
        return Signature((first, *others), outputs)

    def _fitted_spec(self, spec: TensorSpec) -> TensorSpec:
        shape = spec.shape
        if self.free_sizes and spec.kind in _FREE:
            shape = (*shape[:2], *_FREE[spec.kind])
        name = _NAMES[self.format].get(spec.kind, spec.name)
        if spec.kind == "residual":
            name = f"additional_{spec.name}"
        return _called(dataclasses.replace(spec, shape=shape), name)


def plain(signature: Signature) -> Signature:
    """Return the signature with the names in the graph as its own: what a writer and a tracer need."""
    inputs, outputs = (
        tuple(dataclasses.replace(spec, name=spec.graph_name, graph=None) for spec in side)
        for side in (signature.inputs, signature.outputs)
    )
    return Signature(inputs, outputs)


class _SpokenUNet(nn.Module):
    """A denoiser that takes timesteps, texts and guidance as loaders give them.

    Args:
        network: Stock, or with the one further input w, which is the stock ``timestep_cond``.
        w: The guidance weight that is folded in, or None.
    """

    def __init__(self, network: UNet2DConditionModel, w: float | None) -> None:
        super().__init__()
        self.network = network
        self.told: Tensor | None
        width = network.config["time_cond_proj_dim"]
        told = None if w is None else scalar_embedding(torch.tensor([w]), SCALES["w"], width)
        self.register_buffer("told", told)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **residuals: Tensor,
    ) -> Tensor:
        """Predict raw; a timestep of one number is that of all samples, the last residual that of the middle."""
        *skips, middle = residuals.values() or (None,)
        told = timestep_cond if self.told is None else self.told.expand(sample.shape[0], -1)
        return UNet2DConditionModel.forward(
            self.network,
            sample,
            timestep.to(sample.dtype).expand(sample.shape[0]),
            _text_rows(encoder_hidden_states),
            timestep_cond=told,
            added_cond_kwargs=added_cond_kwargs,
            down_block_additional_residuals=skips or None,
            mid_block_additional_residual=middle,
        ).sample


class _SpokenControl(nn.Module):
    """A ControlNet that takes timesteps, texts and its picture as loaders give them."""

    def __init__(self, network: ControlNet) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the residuals; a timestep of one number is that of all samples."""
        made: tuple[Tensor, ...] = self.network(
            sample,
            timestep.to(sample.dtype).expand(sample.shape[0]),
            _text_rows(encoder_hidden_states),
            controlnet_cond,
            added_cond_kwargs,
        )
        return made


def _text_rows(text: Tensor) -> Tensor:
    """Return a text as (batch, length, dim), which Apple gives as (batch, dim, 1, length)."""
    return text.squeeze(2).transpose(1, 2) if text.ndim == 4 else text


class _SpokenText(nn.Module):
    """A text encoder that gives what leaves its layers by the names of loaders.

    Args:
        network: The encoder.
        names: What to give, in order.
    """

    def __init__(self, network: TextEncoder, names: list[str]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Encode tokens, whole numbers of whatever dtype."""
        network, tokens = self.network, input_ids.int()
        states = network.layers(tokens)
        pooled = network.pooled(states[-1], network.ends(tokens))
        made = {f"hidden_states.{i}": state for i, state in enumerate(states)}
        made |= dict.fromkeys(("pooler_output", "text_embeds", "pooled_outputs"), pooled)
        made["last_hidden_state"] = network.text_model.final_layer_norm(states[-1])
        made["hidden_embeds"] = states[-2]
        return tuple(made[name] for name in self.names)


class _SpokenHalf(nn.Module):
    """Half of an autoencoder whose one input has any name.

    Args:
        network: The half.
        draws: Whether an encoder gives mean and log-variance, of which its loader draws. One that gives latents
            alone gives them as the mean of what hardly varies.
    """

    def __init__(self, network: VaeEncoder | VaeDecoder, *, draws: bool = False) -> None:
        super().__init__()
        self.network = network
        self.draws = draws

    def forward(self, **inputs: Tensor) -> Tensor:
        """Encode or decode."""
        (value,) = inputs.values()
        if not isinstance(self.network, VaeEncoder):
            return self.network(value)
        made = self.network.encode(value)
        if self.draws and not _has_moments(self.network):
            return torch.cat([made, torch.full_like(made, _SURE)], dim=1)
        return made


def _called(spec: TensorSpec, name: str) -> TensorSpec:
    return dataclasses.replace(spec, graph=None if name == spec.name else name)


def _has_moments(network: VaeEncoder) -> bool:
    return bool(network.config["autoencoder"] == "AutoencoderKL")


def _with_moments(signature: Signature) -> Signature:
    """Return the signature of an encoder that gives mean and log-variance."""
    (latent,) = signature.outputs
    shape = (latent.shape[0], 2 * int(latent.shape[1]), *latent.shape[2:])
    moments = dataclasses.replace(latent, shape=shape, kind="moments")
    return Signature(signature.inputs, (moments,))


def batch_of(dialect: Dialect, network: nn.Module) -> int | str:
    """Return the batch of a graph: free, and in Core ML one, or both calls of a guided denoiser."""
    if dialect.format != "coreml":
        return BATCH
    # Swift calls the denoiser of Stable Diffusion XL with both halves whatever the guidance, and a ControlNet.
    both = dialect.guided or dialect.two_encoders or dialect.controlled
    return 2 if both and isinstance(network, UNet2DConditionModel | ControlNet) else 1
