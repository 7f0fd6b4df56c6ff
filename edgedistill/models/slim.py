"""A smaller UNet cut from a teacher: fewer blocks or narrower channels, weights mapped by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.models import store

_KNOWN = (UNet2DModel, UNet2DConditionModel)


@dataclass(frozen=True)
class CutSettings:
    """What is taken away.

    Fields:
        remove_mid_block: Leave out the block at the lowest resolution.
        layers_per_block: Residual layers, with their attention, kept per level; None: all. The first and the
            last of a level stay, which are the ones whose channel counts fit.
        width: Share of the channels of every level that stays, in (0, 1].

    References:
        Block removal: Kim et al. (BK-SDM), arXiv:2305.15798, section 3.1.
    """

    remove_mid_block: bool = False
    layers_per_block: int | None = None
    width: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            msg = f"`width` must lie in (0, 1], got {self.width}."
            raise ConfigError(msg)


def cut(teacher: nn.Module, settings: CutSettings) -> nn.Module:
    """Build the smaller network, of the teacher's class, and give it the teacher's weights.

    Kept channels are spread evenly over the teacher's, which keeps whole normalisation groups and, at
    half width, exactly every second frequency of the timestep's sinusoid and every second channel of each
    attention head. What a text is embedded in stays as wide as it is. Block removal starts close to the
    teacher; a narrower network starts far from it (though nearer than random weights) and needs a longer
    first phase.

    Args:
        teacher: A stock `UNet2DModel` or `UNet2DConditionModel`.
        settings: What is taken away.

    Raises:
        ConfigError: If the teacher is of another class, its levels have different numbers of layers and these are
            to be cut, a width does not divide into the normalisation groups, or layers would be added.
    """
    if not isinstance(teacher, _KNOWN):
        msg = f"No smaller network can be cut from a {type(teacher).__name__}; this release cuts {' and '.join(kind.__name__ for kind in _KNOWN)}. Leave `student` or `cut` out of the recipe."
        raise ConfigError(msg)
    whole = store.config_of(teacher)
    config = {**whole, **_smaller(whole, settings)}
    with next(teacher.parameters()).device:
        student = store.build(config)
    source = teacher.state_dict()
    mapped = {
        name: _shrink(source[_origin(name, whole, config)], value.shape, name, teacher)
        for name, value in student.state_dict().items()
    }
    student.load_state_dict(mapped)
    return student.eval()


def _smaller(config: Mapping[str, Any], settings: CutSettings) -> dict[str, Any]:
    whole, layers = config["layers_per_block"], settings.layers_per_block
    if layers is not None and not isinstance(whole, int):
        msg = f"`layers_per_block` cannot be cut where the teacher's levels differ, having {list(whole)}; leave it out."
        raise ConfigError(msg)
    if layers is not None and not 1 <= layers <= whole:
        msg = f"`layers_per_block` must lie in [1, {whole}], the teacher's, got {layers}."
        raise ConfigError(msg)
    groups = config["norm_num_groups"]
    widths = [round(channels * settings.width) for channels in config["block_out_channels"]]
    if any(width % groups for width in widths):
        msg = f"`width` {settings.width} makes levels of {widths} channels, which do not divide into {groups} normalisation groups."
        raise ConfigError(msg)
    mid = None if settings.remove_mid_block else config["mid_block_type"]
    made = {"block_out_channels": widths, "mid_block_type": mid}
    return made if layers is None else {**made, "layers_per_block": layers}


def _origin(name: str, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Name the teacher's layer that a student's layer comes from."""
    if teacher["layers_per_block"] == student["layers_per_block"]:
        return name

    def rename(match: re.Match[str]) -> str:
        blocks, kind, index = match.group(1), match.group(3), int(match.group(4))
        extra = 1 if blocks == "up_blocks" else 0
        last = student["layers_per_block"] + extra - 1
        shift = teacher["layers_per_block"] - student["layers_per_block"]
        kept = index + shift if index == last and last > 0 else index
        return f"{blocks}.{match.group(2)}.{kind}.{kept}."

    return re.sub(r"^(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions)\.(\d+)\.", rename, name)


def _shrink(value: Tensor, shape: torch.Size, name: str, teacher: nn.Module) -> Tensor:
    """Keep evenly spread rows and columns of a weight."""
    for dim, kept in enumerate(shape):
        full = value.shape[dim]
        if full == kept:
            continue
        is_input = dim == 1 or re.search(r"\.norm1\.", name) is not None
        segments = _concatenation(name, teacher) if is_input else None
        value = value.index_select(dim, _spread(segments or [full], kept))
    return value.clone()


def _spread(segments: list[int], kept: int) -> Tensor:
    """Return indices spread evenly over each segment, `kept` in all, segments in proportion."""
    full, start, chosen = sum(segments), 0, []
    for size in segments:
        count = size * kept // full
        chosen += [start + position * size // count for position in range(count)]
        start += size
    return torch.tensor(chosen)


def _concatenation(name: str, teacher: nn.Module) -> list[int] | None:
    """Return the channels of [hidden, skip] for the layers that read a concatenation."""
    match = re.match(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|conv1|conv_shortcut)\.", name)
    if match is None:
        return None
    widths = list(reversed(store.config_of(teacher)["block_out_channels"]))
    level, position = int(match.group(1)), int(match.group(2))
    hidden = widths[max(level - 1, 0)] if position == 0 else widths[level]
    layer: Any = teacher.get_submodule(f"up_blocks.{level}.resnets.{position}.conv1")
    return [hidden, layer.in_channels - hidden]
