"""Names of layers in kohya's LoRA files: those of diffusers, or of the older UNet, with underscores for dots."""

import re
from collections.abc import Iterable, Iterator

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "time_emb_proj": "emb_layers.1",
}
_ALONE = {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}


def flat_names(layers: Iterable[str]) -> dict[str, str]:
    """Return layers by what kohya's files call them.

    Files for Stable Diffusion XL number blocks as the network did that it was published with
    (``input_blocks``, ``middle_block``, ``output_blocks``), those for 1.x and 2.x as diffusers does.

    Args:
        layers: Names of a network's layers in diffusers or transformers.
    """
    held = list(layers)
    return {old.replace(".", "_"): name for name, old in _old_names(held)} | {
        name.replace(".", "_"): name for name in held
    }


def _old_names(layers: list[str]) -> Iterator[tuple[str, str]]:
    """Give each layer of a UNet with its name in the older one, which counts through all blocks."""
    blocks = [found for name in layers if (found := _BLOCK.fullmatch(name)) is not None]
    sizes = {"down": 1, "up": 1}  # what every block has in the older count; down, its sampler too
    for side, _, kind, index, _ in (found.groups() for found in blocks):
        if kind == "resnets":
            sizes[side] = max(sizes[side], int(index) + 1 + (side == "down"))
    attends = {found.group(1, 2) for found in blocks if found[3] == "attentions"}
    for name in layers:
        if name in _ALONE:
            yield name, _ALONE[name]
        elif (middle := _MIDDLE.fullmatch(name)) is not None:
            kind, index, rest = middle.groups()
            place = 1 if kind == "attentions" else 2 * int(index)
            yield name, f"middle_block.{place}.{_inner(kind, rest)}"
        elif (block := _BLOCK.fullmatch(name)) is not None:
            side, number, kind, index, rest = block.groups()
            first = int(number) * sizes[side]
            match kind:
                case "downsamplers":
                    yield name, f"input_blocks.{first + sizes[side]}.0.op"
                case "upsamplers":
                    place = 1 + ((side, number) in attends)
                    yield name, f"output_blocks.{first + sizes[side] - 1}.{place}.{rest}"
                case _:
                    count = first + int(index) + (side == "down")
                    where = "input_blocks" if side == "down" else "output_blocks"
                    inner = _inner(kind, rest)
                    yield name, f"{where}.{count}.{int(kind == 'attentions')}.{inner}"


def _inner(kind: str, rest: str) -> str:
    return _IN_RESNETS.get(rest, rest) if kind == "resnets" else rest
