"""Names, dtypes and shapes of the graphs that loaders open, by format and network.

A size that is a word is free, or fixed by the configuration key of that name; equal words are equal
sizes. Sources: optimum-onnx 0.1.0 and optimum-intel 1.27 (`modeling_diffusion.py`), openvino.genai
2026.4 (`src/cpp/src/image_generation`), apple/ml-stable-diffusion (`torch2coreml.py`, `Unet.swift`,
`ControlNet.swift`, `TextEncoder.swift`, `TextEncoderXL.swift`, `Decoder.swift`, `Encoder.swift`,
`SafetyChecker.swift`, `MultiModalDiffusionTransformer.swift`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgedistill.contract import BATCH, LENGTH, Signature, TensorSpec, residual_shapes

CONTROLNET, CONTROLLED = "controlnet", "control-unet"
_LATENT = ("height", "width")
_IMAGE = ("image_height", "image_width")
_F16, _F32, _I64 = "float16", "float32", "int64"


def _spec(name: str, kind: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, shape, dtype, kind)


_UNET = Signature(
    (
        _spec("sample", "x", _F32, BATCH, "in_channels", *_LATENT),
        _spec("timestep", "t", _F32),
        _spec("encoder_hidden_states", "text", _F32, BATCH, LENGTH, "cross_attention_dim"),
        _spec("timestep_cond", "w", _F32, BATCH, "time_cond_proj_dim"),
        _spec("text_embeds", "pooled", _F32, BATCH, "projection_dim"),
        _spec("time_ids", "size", _F32, BATCH, 6),
    ),
    (_spec("out_sample", "raw", _F32, BATCH, "out_channels", *_LATENT),),
)
_TOKENS = _spec("input_ids", "tokens", _I64, BATCH, LENGTH)
_HIDDEN = _spec("last_hidden_state", "text", _F32, BATCH, LENGTH, "hidden_size")
_DECODER = Signature(
    (_spec("latent_sample", "latent", _F32, BATCH, "latent_channels", *_LATENT),),
    (_spec("sample", "image", _F32, BATCH, "out_channels", *_IMAGE),),
)
_ENCODER = Signature(
    (_spec("sample", "image", _F32, BATCH, "in_channels", *_IMAGE),),
    (_spec("latent_parameters", "moments", _F32, BATCH, "moments", *_LATENT),),
)
_ONNX = {
    "unet": _UNET,
    "text_encoder": Signature(
        (_TOKENS,), (_HIDDEN, _spec("pooler_output", "pooled", _F32, BATCH, "hidden_size"))
    ),
    "text_encoder_2": Signature(
        (_TOKENS,), (_spec("text_embeds", "pooled", _F32, BATCH, "projection_dim"), _HIDDEN)
    ),
    "vae_decoder": _DECODER,
    "vae_encoder": _ENCODER,
}
_OPENVINO = {
    **_ONNX,
    "unet": replace(
        _UNET,
        inputs=tuple(
            _spec("timestep", "t", _I64, "labels") if item.kind == "t" else item
            for item in _UNET.inputs
        ),
    ),
}
_APPLE_UNET = Signature(
    (
        _spec("sample", "x", _F16, BATCH, "in_channels", *_LATENT),
        _spec("timestep", "t", _F16, BATCH),
        _spec("encoder_hidden_states", "text", _F16, BATCH, "cross_attention_dim", 1, LENGTH),
        _spec("text_embeds", "pooled", _F16, BATCH, "projection_dim"),
        _spec("time_ids", "size", _F16, BATCH, 6),
    ),
    (_spec("noise_pred", "raw", _F32, BATCH, "out_channels", *_LATENT),),
)
_PICTURE = _spec("controlnet_cond", "image", _F16, BATCH, "conditioning_channels", *_IMAGE)
_RESIDUAL = "additional_residual_"
_CORE_ML = {
    "unet": _APPLE_UNET,
    CONTROLLED: _APPLE_UNET,
    # Swift adds up what several of them give, in place and as Float32.
    CONTROLNET: Signature((*_APPLE_UNET.inputs, _PICTURE), ()),
    "text_encoder": Signature(
        (_spec("input_ids", "tokens", _F32, 1, LENGTH),),
        (
            _spec("last_hidden_state", "text", _F32, 1, LENGTH, "hidden_size"),
            _spec("pooled_outputs", "pooled", _F32, 1, "hidden_size"),
        ),
    ),
    "text_encoder_2": Signature(
        (_spec("input_ids", "tokens", _F32, 1, LENGTH),),
        (
            _spec("hidden_embeds", "text", _F32, 1, LENGTH, "hidden_size"),
            _spec("pooled_outputs", "pooled", _F32, 1, "projection_dim"),
        ),
    ),
    "vae_decoder": Signature(
        (_spec("z", "latent", _F16, 1, "latent_channels", *_LATENT),),
        (_spec("image", "image", _F32, 1, "out_channels", *_IMAGE),),
    ),
    "vae_encoder": Signature(
        (_spec("x", "image", _F16, 1, "in_channels", *_IMAGE),),
        (_spec("latent", "moments", _F32, 1, "moments", *_LATENT),),
    ),
    # Stable Diffusion 3's transformer, whose loader always sends two samples.
    "mmdit": Signature(
        (
            _spec("latent_image_embeddings", "x", _F16, BATCH, "in_channels", *_LATENT),
            _spec("token_level_text_embeddings", "text", _F16, BATCH, "text", 1, "tokens"),
            _spec("pooled_text_embeddings", "pooled", _F16, BATCH, "pooled", 1, 1),
            _spec("timestep", "t", _F16, 2),
        ),
        (_spec("denoiser_output", "raw", _F32, BATCH, "in_channels", *_LATENT),),
    ),
    "safety_checker": Signature(
        (
            _spec("clip_input", "image", _F16, 1, 3, 224, 224),
            _spec("images", "image", _F16, 1, 512, 512, 3),
            _spec("adjustment", "scalar", _F16, 1),
        ),
        (
            _spec("filtered_images", "image", _F32, 1, 512, 512, 3),
            _spec("has_nsfw_concepts", "class", _F32, 1),
            _spec("concept_scores", "class", _F32, 1, "concepts"),
        ),
    ),
}
GRAPHS: Mapping[str, Mapping[str, Signature]] = {
    "onnx": _ONNX,
    "openvino": _OPENVINO,
    "coreml": _CORE_ML,
}
"""By format and network; `signature` says which of the inputs a pipeline has."""


@dataclass(frozen=True)
class Tolerance:
    """A difference that works.

    Fields:
        loader, what, found: What is tolerated, in the words of `mismatches.Mismatch`.
        tensors: Where, numbers at the ends of names left out; empty: everywhere.
        level: ``warning``, or None for what costs nothing.
    """

    loader: str
    what: str
    found: str
    tensors: tuple[str, ...] = ()
    level: str | None = None


_SWIFT_SENDS = (
    *("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "z", "x"),
    *("latent_image_embeddings", "token_level_text_embeddings", "pooled_text_embeddings"),
    *(_PICTURE.name, _RESIDUAL),
)
_SWIFT_CONVERTS = (
    *("noise_pred", "denoiser_output", "last_hidden_state", "hidden_embeds"),
    *("pooled_outputs", "image", "latent"),
)
TOLERATED = (
    # A pipeline that is float16 as a whole runs, on some devices.
    Tolerance("ort", "precision", _F16, level="warning"),
    # It costs an unsqueeze and a line in the log at every step.
    Tolerance("ort", "rank", "rank 1", ("timestep",), "warning"),
    Tolerance("genai", "dtype", "int32", ("input_ids",)),
    # Swift makes Float32 arrays, and Float32 of what it is given; Apple's converter declares float16.
    Tolerance("swift", "precision", _F32, _SWIFT_SENDS),
    Tolerance("swift", "precision", _F16, _SWIFT_CONVERTS),
    # Apple's converter once declared 12 sizes in a row, which Swift still sends where it is asked to.
    Tolerance("swift", "rank", "rank 1", ("time_ids",)),
)


def signature(
    format_: str, network: str, sizes: Mapping[str, Any], *, stacked: bool = False
) -> Signature | None:
    """Return what a loader's graph of a network takes and gives, or None where no contract is known.

    Args:
        format_: ``onnx``, ``openvino`` or ``coreml``.
        network: Name of its folder, such as ``"unet"``.
        sizes: Configuration keys and other fixed sizes; what is not in there stays free. The residuals of
            a ControlNet are those at a list ``sample_size``.
        stacked: Whether the pipeline reads inner states of its text encoders, as Stable Diffusion XL does.
    """
    contract = GRAPHS[format_].get(network)
    if contract is None:
        return None
    absent = _absent(sizes)
    outputs = contract.outputs
    if stacked and network.startswith("text_encoder"):
        outputs = _stacked(format_, outputs, sizes.get("num_hidden_layers"))
    tiny = network == "vae_encoder" and sizes.get("_class_name") == "AutoencoderTiny"
    if tiny and format_ != "coreml":
        outputs = _DECODER.inputs  # latents themselves, for it has no distribution
    inputs = tuple(item for item in contract.inputs if item.name not in absent)
    if network == CONTROLLED:
        inputs += _residuals(sizes, _F16)
    if network == CONTROLNET:
        outputs = _residuals(sizes, _F32)
    fixed = {key: value for key, value in sizes.items() if isinstance(value, int) and value > 0}
    return Signature(inputs, outputs).bind(**fixed)


def _residuals(sizes: Mapping[str, Any], dtype: str) -> tuple[TensorSpec, ...]:
    """Return what a ControlNet gives and its UNet takes, as far as the configuration tells."""
    kinds = {"block_out_channels": list, "layers_per_block": int, "sample_size": list}
    if not all(sizes.get(key) and isinstance(sizes[key], kind) for key, kind in kinds.items()):
        return ()
    return tuple(
        _spec(f"{_RESIDUAL}{i}", "residual", dtype, BATCH, *shape)
        for i, shape in enumerate(residual_shapes(sizes))
    )


def _absent(sizes: Mapping[str, Any]) -> set[str]:
    """Return the inputs that a UNet of this configuration does not have."""
    absent = set() if sizes.get("time_cond_proj_dim") else {"timestep_cond"}
    if sizes.get("addition_embed_type") != "text_time":
        absent |= {"text_embeds", "time_ids"}
    return absent


def _stacked(
    format_: str, outputs: tuple[TensorSpec, ...], layers: int | None
) -> tuple[TensorSpec, ...]:
    """Return the outputs of a text encoder of Stable Diffusion XL."""
    if format_ == "coreml":
        return (replace(outputs[0], name="hidden_embeds"), outputs[1])
    hidden = next(item for item in outputs if item.name == "last_hidden_state")
    inner = (replace(hidden, name=f"hidden_states.{i}") for i in range((layers or 0) + 1))
    return (*outputs, *inner)
