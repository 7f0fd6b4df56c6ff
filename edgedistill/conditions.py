"""What the caller chooses per sample, checked and turned into network inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgedistill.choices import SIZES
from edgedistill.errors import ContractError
from edgedistill.images import from_pil
from edgedistill.sampler import NULL, TOKENS
from edgedistill.table import Condition, Guidance, SamplerTable

# Texts and a length to int32 (texts, length), or (texts, encoders, length) where several read.
Tokenize = Callable[[Sequence[str], int], np.ndarray]


def network_conditions(
    table: SamplerTable,
    count: int,
    guidance_scale: float | None,
    given: Mapping[str, Any],
    tokenize: Tokenize | None = None,
) -> dict[str, np.ndarray]:
    """Return the network inputs that the caller's choices make.

    Args:
        table: Says what may be chosen.
        count: Number of samples.
        guidance_scale: g, where 1 is no guidance; None: the table's default.
        given: One entry per sample, or one for all, by name. A class that is left out runs through all
            classes in turn, a text through the condition's examples; a size is that of a whole image. A text is a prompt, or tokens
            (integers), or embeddings; an image or mask is an array or a PIL image. What an embedding
            leaves to be told to the router comes under the router's name.
        tokenize: Turns prompts into tokens; None where there are none.

    Returns:
        Arrays (count, ...) by input name, ready for `edgedistill.sampler.run_table`.

    Raises:
        ContractError: If a condition is unknown, missing or out of range, or guidance is not this
            model's to choose.
    """
    known = {condition.name: condition for condition in table.conditions}
    extra = {table.router.on} - set(known) if table.router else set()
    if unknown := sorted(set(given) - set(known) - extra):
        msg = f"Unknown condition {', '.join(unknown)}; this model takes: {', '.join(known) or 'none'}."
        raise ContractError(msg)
    inputs = {name: np.asarray(given[name], np.float32) for name in extra & set(given)}
    for name, condition in known.items():
        value = given.get(name)
        match condition.kind:
            case "class":
                inputs[name] = _classes(condition, count, value)
            case "text":
                inputs |= _text(condition, count, value, table.guidance.null.get(name), tokenize)
            case "size":
                inputs[name] = _sizes(condition, count, value)
            case _:
                inputs[name] = _picture(condition, count, value)
    return {**inputs, **_guidance(table.guidance, count, guidance_scale)}


def entries(condition: Condition, value: Any) -> int | None:
    """Return for how many samples a value is given; None: one value for all."""
    if isinstance(value, list | tuple):
        return len(value)
    rank = {"class": 1, "text": 3, "image": 4, "mask": 4, "size": 2}[condition.kind]
    if condition.kind == "text" and not _floats(value):
        rank = 2 + bool(condition.further)
    return len(value) if np.ndim(value) == rank else None


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


def _text(
    condition: Condition, count: int, given: Any, null: Any, tokenize: Tokenize | None
) -> dict[str, np.ndarray]:
    examples = condition.examples or ("",)
    value = [examples[i % len(examples)] for i in range(count)] if given is None else given
    made = {}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        name, dtype = (condition.name, np.float32) if _floats(value) else (TOKENS, np.int32)
        made[name] = _repeated(condition, np.asarray(value, dtype), count)
    else:
        prompts = [value] if isinstance(value, str) else list(value)
        if not all(isinstance(item, str) for item in prompts):
            msg = f"`{condition.name}` must be a prompt or {count} of them, tokens or embeddings, got {value!r:.60}."
            raise ContractError(msg)
        made[TOKENS] = _repeated(condition, _tokens(condition, prompts, tokenize), count)
    if isinstance(null, str):
        made[NULL + TOKENS] = _repeated(condition, _tokens(condition, [null], tokenize), count)
    return made


def _tokens(condition: Condition, prompts: Sequence[str], tokenize: Tokenize | None) -> np.ndarray:
    if tokenize is None:
        msg = f"`{condition.name}`: there is no tokenizer to read prompts with; give tokens or embeddings."
        raise ContractError(msg)
    return tokenize(prompts, condition.length or 0)


def _picture(condition: Condition, count: int, given: Any) -> np.ndarray:
    shape = condition.shape or (1, 1, 1)
    low, high = condition.value_range or (0.0, 1.0)
    if given is None:
        msg = f"`{condition.name}` is missing; give {condition.kind}s of {'x'.join(map(str, shape))}, arrays or PIL images."
        raise ContractError(msg)
    listed = given if isinstance(given, list | tuple) else [given]
    if all(hasattr(item, "getbands") for item in listed):
        value = np.stack([from_pil(item, shape[0], (low, high)) for item in listed])
    else:
        value = np.asarray(given, np.float32)
    value = value[None] if value.ndim == 3 else value
    if value.shape[1:] != shape or len(value) not in (1, count):
        wanted, got = ("x".join(map(str, size)) for size in ((count, *shape), value.shape))
        msg = f"`{condition.name}` must be {wanted}, got {got}; images are not resized here."
        raise ContractError(msg)
    if not ((value >= low) & (value <= high)).all():
        msg = f"`{condition.name}` must lie in [{low:g}, {high:g}]."
        raise ContractError(msg)
    return np.broadcast_to(value, (count, *shape))


def _sizes(condition: Condition, count: int, given: Any) -> np.ndarray:
    value = np.asarray(condition.whole_size if given is None else given, np.float32)
    if value.shape not in ((SIZES,), (count, SIZES)):
        msg = f"`{condition.name}` must be {SIZES} numbers, or as many for each of {count} samples, got shape {value.shape}."
        raise ContractError(msg)
    return np.broadcast_to(value, (count, SIZES))


def _repeated(condition: Condition, value: np.ndarray, count: int) -> np.ndarray:
    if len(value) == count:
        return value
    if len(value) != 1:
        msg = f"`{condition.name}` must be one text or {count} of them, got {len(value)}."
        raise ContractError(msg)
    return np.repeat(value, count, axis=0)


def _floats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


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
