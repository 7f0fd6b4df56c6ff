"""Networks on disk: a diffusers folder of config.json and safetensors, read without pickle."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgedistill.choices import SIZES
from edgedistill.contract import BATCH, LENGTH, Signature, TensorSpec, residual_shapes
from edgedistill.errors import BundleError
from edgedistill.files import read_json, write_json
from edgedistill.models.conditional import (
    ADDED,
    build_conditional,
    build_conditional_residual_encoder,
    build_extended_conditional,
)
from edgedistill.models.residuals import build_residual_encoder
from edgedistill.models.unet import build_extended, build_stock
from edgedistill.weight_files import DIFFUSERS, WeightFiles, find_weights, weight_map

WEIGHTS = f"{DIFFUSERS}.safetensors"
# Constants that transformers wrote into weights until 4.31.
_OLD_BUFFERS = ("text_model.embeddings.position_ids",)


def _transformer(config: dict[str, Any]) -> nn.Module:
    from edgedistill.models.transformer import build_transformer

    return build_transformer(config)


def _text_encoder(config: dict[str, Any]) -> nn.Module:
    from edgedistill.models.text import build_text_encoder

    return build_text_encoder(config)


def _autoencoder(config: dict[str, Any]) -> nn.Module:
    from edgedistill.models.vae import build_autoencoder

    return build_autoencoder(config)


def _guide(config: dict[str, Any]) -> nn.Module:
    from edgedistill.models.guide import TinyGuide

    return TinyGuide(config)


def _half_autoencoder(config: dict[str, Any]) -> nn.Module:
    from edgedistill.models.vae import build_half

    return build_half(config)


def _controlnet(config: dict[str, Any]) -> nn.Module:
    from edgedistill.models.controlnet import build_controlnet

    return build_controlnet(config)


def _controlling(network: Any, signature: Signature) -> nn.Module:
    from edgedistill.models.controlnet import controlling

    return controlling(network, signature)


def _with_residuals(network: Any, signature: Signature) -> nn.Module:
    from edgedistill.models.controlnet import asked_residuals

    return asked_residuals(network, signature)


def _half_of(network: Any, signature: Signature) -> nn.Module:
    from edgedistill.models.vae import half_of

    return half_of(network, signature)


def _asked(network: Any, signature: Signature) -> nn.Module:
    from edgedistill.models.text import asked

    return asked(network, signature)


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "UNet2DModel": build_stock,
    "UNet2DConditionModel": build_conditional,
    "DiTTransformer2DModel": _transformer,
    "ControlNetModel": _controlnet,
    "CLIPTextModel": _text_encoder,
    "CLIPTextModelWithProjection": _text_encoder,
    "AutoencoderKL": _autoencoder,
    "AutoencoderTiny": _autoencoder,
    "VaeEncoder": _half_autoencoder,
    "VaeDecoder": _half_autoencoder,
    "ExtendedUNet2DModel": build_extended,
    "ExtendedUNet2DConditionModel": build_extended_conditional,
    "TinyGuide": _guide,
    "ResidualEncoder": build_residual_encoder,
    "ConditionalResidualEncoder": build_conditional_residual_encoder,
}
FACES: dict[str, Callable[[Any, Signature], nn.Module]] = {
    "AutoencoderKL": _half_of,
    "AutoencoderTiny": _half_of,
    "ControlNetModel": _controlling,
    "UNet2DConditionModel": _with_residuals,
    "ExtendedUNet2DConditionModel": _with_residuals,
    "CLIPTextModel": _asked,
    "CLIPTextModelWithProjection": _asked,
}
"""Networks that answer in several ways."""


def build(config: Mapping[str, Any], source: str = "config") -> nn.Module:
    """Build an untrained network from its configuration.

    Raises:
        BundleError: If `_class_name` is not one that this release knows, or the values make no network.
    """
    kind = class_name(config)
    if kind not in BUILDERS:
        msg = f"{source}: `_class_name` {kind!r} is not known; this release reads {', '.join(BUILDERS)}."
        raise BundleError(msg)
    try:
        return BUILDERS[str(kind)]({**config, "_class_name": kind})
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{source}: no {kind} can be built from it ({' '.join(str(error).split())})."
        raise BundleError(msg) from error


def class_name(config: Mapping[str, Any]) -> str | None:
    """Return the class that a configuration is of, as diffusers or transformers writes it."""
    named = config.get("_class_name")
    return named or next(iter(config.get("architectures") or ()), None)


def weights_file(network: nn.Module) -> str:
    """Return the name of the file that holds a network's weights, which is the stock library's."""
    return getattr(network, "weights_file", WEIGHTS)


def weights_of(network: nn.Module, folder: Path) -> WeightFiles:
    """Find the weights of a network that may have none of its own yet.

    Raises:
        BundleError: As `edgedistill.weight_files.find_weights`.
    """
    return find_weights(folder, weights_file(network).removesuffix(".safetensors"))


def load(folder: Path) -> nn.Module:
    """Load a network for inference: float32, eval mode, no gradients.

    Raises:
        BundleError: If a file is missing, damaged, not safetensors, does not fit the configuration,
            or holds NaN or infinity.
    """
    network = sketch(folder)  # neither drawn nor held twice: the file's own memory becomes its
    weights = weights_of(network, folder)
    state = _renamed(network, load_shards(weights))
    expected = network.state_dict()
    wrong = sorted(set(expected) ^ set(state)) or [
        name for name, value in state.items() if value.shape != expected[name].shape
    ]
    if wrong:
        msg = f"{weights.all[0]}: does not fit config.json at {', '.join(wrong[:3])}; the two belong to different networks."
        raise BundleError(msg)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(requires_grad=False)


def sketch(folder: Path) -> nn.Module:
    """Build the network of a folder without reading a weight: its parameters have shapes and no values.

    Raises:
        BundleError: If its configuration is not one that `build` takes.
    """
    from accelerate import init_empty_weights

    config = folder / "config.json"
    with init_empty_weights():
        return build(read_json(config), str(config)).eval()


def load_as(folder: Path, signature: Signature) -> nn.Module:
    """Load what a signature asks of the network in a folder: all of it, or one half of an autoencoder."""
    return facing(load(folder), signature)


def facing(network: nn.Module, signature: Signature) -> nn.Module:
    """Return the part of a network that has a signature.

    Args:
        network: An autoencoder, of which a signature takes one half, at a size of latents; a text encoder,
            which answers as one of a pair where no ``pooled`` is asked of it; a ControlNet, at a size of
            latents; a UNet, which may be asked to take residuals; any other is returned as it is.
        signature: What is wanted of it.
    """
    turn = FACES.get(str(class_name(config_of(network))))
    return network if turn is None else turn(network, signature)


def open_one_of(folder: Path, kinds: Sequence[str], *, bare: bool = False) -> nn.Module:
    """Load a network that is of one of these classes, or build it without its weights where it is `bare`.

    Raises:
        BundleError: As `load`, or if it is of another class.
    """
    config = read_json(folder / "config.json")
    if class_name(config) not in kinds:
        msg = f"{folder}: is a {class_name(config)}; one of {', '.join(kinds)} is expected here."
        raise BundleError(msg)
    return build(config, str(folder)).eval() if bare else load(folder)


def _renamed(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the parameters of old checkpoints their names of today, as the stock libraries do."""
    rename = getattr(network, "_fix_state_dict_keys_on_load", None)
    if rename is not None:
        rename(state)
    return {name: value for name, value in state.items() if name not in _OLD_BUFFERS}


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file as float32 (integers as they are).

    Raises:
        BundleError: If the file is missing, damaged, a pickle, or holds NaN or infinity.
    """
    if not path.is_file():
        msg = f"{path}: no such file."
        raise BundleError(msg)
    try:
        state = load_file(path)
    except SafetensorError as error:
        msg = f"{path}: not a whole safetensors file ({error}); get it anew. Only safetensors is read, never pickle."
        raise BundleError(msg) from error
    state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    for name, value in state.items():
        if value.is_floating_point() and not _is_finite(value):
            msg = f"{path}: `{name}` holds NaN or infinity; the checkpoint is broken, take an earlier one."
            raise BundleError(msg)
    return state


def load_shards(weights: WeightFiles) -> dict[str, Tensor]:
    """Read the weights of a network as `load_weights` does, one shard at a time.

    Raises:
        BundleError: As `load_weights`, or if a shard holds something else than the index says.
    """
    state: dict[str, Tensor] = {}
    places = {} if weights.index is None else weight_map(weights.index)
    for path in weights.shards:
        held = load_weights(path)
        said = {name for name, place in places.items() if place == path.name}
        if weights.index is not None and (wrong := sorted(said ^ set(held))):
            msg = f"{path}: does not hold what {weights.index.name} says at {', '.join(wrong[:3])}; the two are of different downloads, get both anew."
            raise BundleError(msg)
        state |= held
    return state


def _is_finite(value: Tensor) -> bool:
    """Say whether every number is finite; a finite sum says so at a thirtieth of the cost."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def save_weights(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        BundleError: If the disk is full or cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        msg = (
            f"{path.name}: could not be written ({error}); make room there or choose another place."
        )
        raise BundleError(msg) from error


def save(network: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and safetensors; a stock network's folder opens in diffusers."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = config_of(network)
    config = {key: value for key, value in whole.items() if not key.startswith("_")}
    write_json(folder / "config.json", {"_class_name": whole["_class_name"], **config})
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in network.state_dict().items()
    }
    save_weights(state, folder / weights_file(network), metadata={"format": "pt"})


def config_of(network: nn.Module) -> dict[str, Any]:
    """Return a network's configuration as a plain dictionary, its class included."""
    config: Any = network.config
    names = [kind.__name__ for kind in type(network).__mro__]  # FSDP makes a subclass of its own
    return {
        "_class_name": next((name for name in names if name in BUILDERS), names[0]),
        **dict(config),
    }


def call(network: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Call a network by input names and return its raw prediction as a plain tensor.

    diffusers' networks return an object with the prediction as `sample`, also from inside of a wrapper.
    """
    made = network(**_arguments(inputs))
    return getattr(made, "sample", made)


def call_outputs(network: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Call a network by input names and return all that it answers, in the order of its signature."""
    made = network(**_arguments(inputs))
    plain = getattr(made, "sample", made)
    return tuple(plain) if isinstance(plain, tuple | list) else (plain,)


def _arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Hand over what diffusers' networks take in one bag, as they want it."""
    bag = {name: inputs[name] for name in ADDED if name in inputs}
    plain = {name: value for name, value in inputs.items() if name not in bag}
    return {**plain, "added_cond_kwargs": bag} if bag else plain


def signature(network: nn.Module) -> Signature:
    """Return what a network takes and gives, with a free batch; prompts are of a free ``length`` too."""
    own = getattr(network, "signature", None)
    return own if isinstance(own, Signature) else signature_of(config_of(network))


def signature_of(config: Mapping[str, Any]) -> Signature:
    """Return the signature of a denoiser from its configuration."""
    size = config["sample_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    inputs = [
        TensorSpec("sample", (BATCH, config["in_channels"], height, width), "float32", "x"),
        TensorSpec("timestep", (BATCH,), "float32", "t"),
    ]
    if dim := config.get("cross_attention_dim"):
        inputs.append(TensorSpec("encoder_hidden_states", (BATCH, LENGTH, dim), "float32", "text"))
    if config.get("addition_embed_type") == "text_time":
        wide = config["projection_class_embeddings_input_dim"]
        pooled = wide - SIZES * config["addition_time_embed_dim"]
        for name, size, kind in zip(ADDED, (pooled, SIZES), ("pooled", "size"), strict=True):
            inputs.append(TensorSpec(name, (BATCH, size), "float32", kind))
    if config.get("num_class_embeds") or config.get("num_embeds_ada_norm"):
        inputs.append(TensorSpec("class_labels", (BATCH,), "int32", "class"))
    inputs += [
        TensorSpec(name, (BATCH,), "float32", name) for name in config.get("scalar_inputs", ())
    ]
    if channels := config.get("image_channels"):
        inputs.append(TensorSpec("image", (BATCH, channels, height, width), "float32", "image"))
    if config.get("mask_input"):
        inputs.append(TensorSpec("mask", (BATCH, 1, height, width), "float32", "mask"))
    if config.get("residual_inputs"):
        inputs += _residuals(config)
    if widths := config.get("base_channels"):
        return Signature(tuple(inputs), _residuals({**config, "block_out_channels": widths}))
    # A transformer may predict a variance too, which is left out.
    learned = "num_embeds_ada_norm" in config
    channels = config["in_channels" if learned else "out_channels"]
    output = TensorSpec("out_sample", (BATCH, channels, height, width), "float32", "raw")
    return Signature(tuple(inputs), (output,))


def _residuals(config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"residual_{i}", (BATCH, *shape), "float32", "residual")
        for i, shape in enumerate(residual_shapes(config))
    )
