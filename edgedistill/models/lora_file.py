"""Published LoRA files: low-rank updates that are added to the weights of a pipeline's networks."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from edgedistill.errors import BundleError
from edgedistill.models import store
from edgedistill.models.lora_names import PREFIXES, flat_names

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
Factors = dict[str, Tensor]  # "down" (rank, in), "up" (out, rank), and perhaps "alpha"
Layers = dict[str, Factors]
_METADATA = "lora_adapter_metadata"
# What diffusers, peft and kohya have called them; the second group says which it is.
_ENDS = (
    re.compile(r"(\.lora_)(A|B)(?:\.default)?\.weight$"),
    re.compile(r"(\.lora|\.lora_linear_layer)\.(down|up)\.weight$"),
    re.compile(r"(\.lora_)(down|up)\.weight$"),
    re.compile(r"(\.)(alpha)$"),
)
_WHICH = {"A": "down", "B": "up"}
_OLD_ATTENTION = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")


def read_lora(path: Path) -> dict[str, Layers]:
    """Read a LoRA file as diffusers, peft or kohya's scripts write it.

    Args:
        path: A safetensors file. Names begin with the part that they are for, such as ``unet.`` or
            ``lora_unet_``; without a part they are the UNet's.

    Returns:
        By part of the pipeline and name of the layer: its factors, float32. Of kohya's files the names
        are as `edgedistill.models.lora_names.flat_names` knows them.

    Raises:
        BundleError: If the file is missing, damaged, a pickle, or holds anything else than such updates.
    """
    made: dict[str, Layers] = {}
    for key, value in store.load_weights(path).items():
        part, layer, which = _parsed(key, path)
        made.setdefault(part, {}).setdefault(layer, {})[which] = value
    alphas = _alphas(path)
    for part, layers in made.items():
        for layer, factors in layers.items():
            if not {"up", "down"} <= set(factors):
                msg = f"{path}: `{part}.{layer}` has one factor of its update and not the other; get the file anew."
                raise BundleError(msg)
            if part in alphas:
                factors.setdefault("alpha", factors["down"].new_tensor(alphas[part]))
    return made


def add_updates(
    state: dict[str, Tensor], layers: Mapping[str, Factors], scale: float, source: str
) -> None:
    """Add ``scale * alpha / rank * up @ down`` to the weights of layers, in place.

    Args:
        state: Weights by name, float32.
        layers: Factors by the layer's name, as `read_lora` returns them for one part.
        scale: 1 is the update as it was trained.
        source: Names the file in messages.

    Raises:
        BundleError: If a layer is not there or is of another shape.
    """
    flat = flat_names(n.removesuffix(".weight") for n in state if n.endswith(".weight"))
    for layer, factors in layers.items():
        name = f"{flat.get(layer, layer)}.weight"
        up, down = factors["up"].flatten(1), factors["down"].flatten(1)
        weight = state.get(name)
        found = None if weight is None else list(weight.flatten(1).shape)
        if weight is None or found != [len(up), down.shape[1]]:
            msg = f"{source}: updates `{name}` of {len(up)}x{down.shape[1]}, which the network has {'not' if found is None else 'as ' + 'x'.join(map(str, found))}; the file is for another one."
            raise BundleError(msg)
        factor = float(factors["alpha"]) / len(down) if "alpha" in factors else 1.0
        state[name] = weight + (up @ down).reshape(weight.shape) * (scale * factor)


def _parsed(key: str, path: Path) -> tuple[str, str, str]:
    """Return the part, the layer and which factor a tensor is."""
    name = _OLD_ATTENTION.sub(lambda found: f".{found[1].replace('to_out', 'to_out.0')}.lora.", key)
    for end in _ENDS:
        if (found := end.search(name)) is not None:
            which = _WHICH.get(found[2], found[2])
            for prefix, part in PREFIXES.items():
                if name.startswith(prefix):
                    return part, name[len(prefix) : found.start()], which
            head, _, rest = name[: found.start()].partition(".")
            known = head in PARTS
            layer = rest if known else name[: found.start()].removeprefix("base_model.model.")
            return head if known else PARTS[0], layer, which
    msg = f"{path}: `{key}` is no update as diffusers, peft or kohya write it; load the file in diffusers and save it with `save_lora_weights`."
    raise BundleError(msg)


def _alphas(path: Path) -> dict[str, float]:
    """Return the alpha of each part as diffusers notes it beside the tensors."""
    with safe_open(path, "pt") as file:
        noted = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    alphas = {part: noted.get(f"{part}.lora_alpha") for part in PARTS}
    return {part: float(alpha) for part, alpha in alphas.items() if alpha is not None}
