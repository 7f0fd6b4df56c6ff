"""The stock `UNet2DConditionModel`: built where its inputs are the state, the time, a text and perhaps a class."""

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel

# Further inputs of a stock network, which have no place in a table yet.
_NONE = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def build_conditional(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Build an untrained network.

    Raises:
        ValueError: If the configuration asks for an input that is not known here.
    """
    unknown = [f"{name} {config[name]!r}" for name in _NONE if config.get(name) is not None]
    if isinstance(dims := config.get("cross_attention_dim"), list | tuple):
        unknown.append(f"cross_attention_dim {dims!r}")
    if unknown:
        msg = f"its inputs are not known here: {', '.join(unknown)}"
        raise ValueError(msg)
    return UNet2DConditionModel.from_config(
        {key: value for key, value in config.items() if not key.startswith("_")}
    )
