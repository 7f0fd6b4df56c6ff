"""What the caller chooses per sample, checked and turned into network inputs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgedistill.errors import ContractError
from edgedistill.table import Condition, Guidance, SamplerTable


def network_conditions(
    table: SamplerTable, count: int, guidance_scale: float | None, given: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the network inputs that the caller's choices make.

    Args:
        table: Says what may be chosen.
        count: Number of samples.
        guidance_scale: g, where 1 is no guidance; None: the table's default.
        given: One entry per sample, or one for all, by name. A class condition that is left out runs
            through all classes in turn.

    Returns:
        Arrays (count,) by input name.

    Raises:
        ContractError: If a condition is unknown or out of range, or guidance is not this model's to choose.
    """
    known = {condition.name: condition for condition in table.conditions}
    if unknown := sorted(set(given) - set(known)):
        msg = f"Unknown condition {', '.join(unknown)}; this model takes: {', '.join(known) or 'none'}."
        raise ContractError(msg)
    inputs = {name: _classes(item, count, given.get(name)) for name, item in known.items()}
    return {**inputs, **_guidance(table.guidance, count, guidance_scale)}


def _classes(condition: Condition, count: int, given: Any) -> np.ndarray:
    value = np.arange(count) % (condition.size or 1) if given is None else np.asarray(given)
    if value.ndim > 1 or (value.ndim == 1 and len(value) != count):
        msg = f"`{condition.name}` must be one value or {count} of them, got shape {value.shape}."
        raise ContractError(msg)
    whole = np.issubdtype(value.dtype, np.integer)
    if not whole or value.min() < 0 or value.max() >= (condition.size or np.inf):
        top = "" if condition.size is None else f" up to {condition.size - 1}"
        msg = f"`{condition.name}` must be whole numbers from 0{top}, got {value.tolist()!r:.60}."
        raise ContractError(msg)
    return np.broadcast_to(value, (count,))


def _guidance(guidance: Guidance, count: int, scale: float | None) -> dict[str, np.ndarray]:
    if scale is not None and guidance.mode != "embedded" and scale != guidance.default:
        msg = (
            f"This model's guidance is {guidance.mode!r} at scale {guidance.default:g}; "
            f"`guidance_scale={scale:g}` cannot be chosen here, leave it out."
        )
        raise ContractError(msg)
    if guidance.input is None:
        return {}
    value = guidance.default if scale is None else scale
    low, high = guidance.range
    if not low <= value <= high:
        msg = f"`guidance_scale` must lie in the trained range [{low:g}, {high:g}], got {value:g}."
        raise ContractError(msg)
    return {guidance.input: np.full((count,), value - 1.0, np.float32)}
