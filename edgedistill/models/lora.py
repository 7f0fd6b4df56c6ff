"""Students that differ from their teacher by low-rank updates alone (LoRA), through peft."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from edgedistill.errors import ConfigError, require
from edgedistill.models.conditional import ExtendedUNet2DConditionModel

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj")
# Inputs that were added to a network start at zero, so that they have to be trained as a whole.
_ADDED = re.compile(r"(^|\.)(cond_proj|conv_image)\.")
_FIRST = re.compile(r"(^|\.)conv_in\.")


@dataclass(frozen=True)
class LoraSettings:
    """What is trained in place of whole weights.

    Fields:
        rank: Of each update ``scale * B @ A``.
        alpha: The scale is ``alpha / rank``; None: 1.
        targets: Ends of the names of the layers that get an update; those that are not there are left out.

    References:
        Hu et al., arXiv:2106.09685, section 4.1.
    """

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            msg = f"`rank` must be at least 1, got {self.rank}."
            raise ConfigError(msg)


def inject(network: nn.Module, settings: LoraSettings) -> nn.Module:
    """Add updates, zero at first, to a network in place, and return it.

    Raises:
        ConfigError: If it has none of the layers.
        MissingDependencyError: If peft is not installed.
    """
    peft = require("peft", "train")
    names = [name for name, _ in network.named_modules()]
    found = [name for name in names if name.endswith(settings.targets)]
    if not found:
        msg = f"A {type(network).__name__} has no layer whose name ends with {', '.join(settings.targets)}; set `lora.targets`."
        raise ConfigError(msg)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        target_modules=found,
    )
    return peft.inject_adapter_in_model(config, network)


def has_updates(network: nn.Module) -> bool:
    """Say whether `inject` was there."""
    return any(".lora_" in name for name, _ in network.named_parameters())


def is_trained(parameter: str, network: nn.Module) -> bool:
    """Say whether a parameter of a network with updates is trained: an update, or an added input.

    A `UNet2DConditionModel` takes an image through further channels of its first layer, which is then trained
    as a whole.
    """
    if ".lora_" in parameter or _ADDED.search(parameter) is not None:
        return True
    widened = isinstance(network, ExtendedUNet2DConditionModel) and network.inputs.image_channels
    return bool(widened) and _FIRST.search(parameter) is not None


def merged(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights, under their stock names, that the updates in `state` make of a network.

    Args:
        network: As `inject` left it; it is not changed.
        state: Its weights.
    """
    layers = require("peft.tuners.lora", "train")
    whole = copy.deepcopy(network)
    whole.load_state_dict(state)
    for module in list(whole.modules()):
        if isinstance(module, layers.LoraLayer):
            module.merge()
    return {
        name.replace(".base_layer.", "."): value
        for name, value in whole.state_dict().items()
        if ".lora_" not in name
    }
