"""The one loop that runs a sampler table; it knows no method and works on any arrays."""

import functools
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.errors import ContractError
from edgedistill.router import Router, route
from edgedistill.table import Blend, Condition, Row, SamplerTable, Stage

Array = Any  # numpy.ndarray or torch.Tensor: whatever has arithmetic, `clip` and `reshape`
TOKENS = "input_ids"  # of a text encoder; where several read one text, with an axis of theirs behind the batch
LATENT = "latent_sample"  # of a decoder, and what an encoder of images answers
IMAGE = "sample"  # of an encoder of images
NULL = "null."  # before the name of what unguided calls are given instead
Network = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class RowTrace:
    """What one row saw and made; handed to the observer.

    Fields:
        index: Position of the row in `SamplerTable.rows`.
        row: The row.
        state: z before the row.
        raw: The prediction, after guidance; None where no network was called.
        x0: The estimate of x; None where no network was called.
        next: z after the row.
        calls: The predictions that guidance was made of: that under the conditions, then that under the
            null conditions; empty in a row without guidance, whose `raw` is the network's own.
    """

    index: int
    row: Row
    state: Array
    raw: Array | None
    x0: Array | None
    next: Array
    calls: tuple[Array, ...] = ()


Observer = Callable[[RowTrace], None]


def run_table(
    table: SamplerTable,
    networks: Mapping[str, Network],
    noise: Sequence[Array],
    conditions: Mapping[str, Array],
    observe: Observer | None = None,
    forced: Sequence[Mapping[str, Array]] | None = None,
) -> Array:
    """Run every row and return the last state, decoded where the table says so, clipped to `table.clamp`.

    Args:
        table: The sampler.
        networks: One callable per name in `table.networks`; each maps inputs to outputs by name. Not
            looked up are students that no sample is routed to, and a text encoder without tokens.
        noise: The bank: `table.noise_count` arrays of shape (batch, channels, height, width).
        conditions: Further network inputs by name, one entry per sample, guidance input included;
            tokens of a text as `TOKENS`; what stands for "no condition" under `NULL` and the name.
        observe: Called after each row.
        forced: Another run, per row its ``state``, ``x0`` and ``next``: every row starts from that run's
            states and looks back on its estimates (teacher forcing). None: from its own.

    Raises:
        ContractError: If a network, a noise array or a condition is missing.
    """
    if len(noise) != table.noise_count:
        msg = f"The table needs a noise bank of {table.noise_count} arrays, got {len(noise)}."
        raise ContractError(msg)
    given = encoded(table, networks, conditions)
    called = networks if table.router is None else _routed(table.router, networks, given)
    z: Array = None
    index = 0
    for stage in table.stages:
        z, held = enter_stage(table, stage, noise, given, z)
        history: tuple[Array, ...] = ()
        for row in stage.rows:
            if forced is not None:
                z = forced[index]["state"]
            trace = run_row(table, row, called, z, noise, held, history, index)
            if observe is not None:
                observe(trace)
            kept = vars(trace) if forced is None else forced[index]
            z, history = kept["next"], (kept.get("x0"), *history)
            index += 1
    output = z if table.decoder is None else _decoded(table, _find(networks, table.decoder), z)
    return output if table.clamp is None else output.clip(*table.clamp)


def encoded(
    table: SamplerTable, networks: Mapping[str, Network], conditions: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the conditions as rows and networks take them.

    That is, with what the text encoder makes of tokens and of the tokens of the null text, with latents in
    place of images that have an encoder, and with masks of blends in the size of the state, where whatever
    holds a pixel to draw is drawn.
    """
    given = dict(conditions)
    masks = {row.blend.mask for row in table.rows if row.blend is not None}
    for item in table.conditions:
        if item.kind == "text" and item.encoder is not None:
            given |= embedded(networks, item, conditions, table.guidance.null.get(item.name))
        elif item.kind == "image" and item.encoder is not None:
            given[item.name] = latent_of(table, _find(networks, item.encoder), given[item.name])
        elif item.name in masks:
            mask, shape = given[item.name], table.stages[0].shape
            if mask.shape[2:] != shape[1:]:
                given[item.name] = _as(resize(mask, "area_down", (1, *shape[1:])) > 0, mask)
    return given


def embedded(
    networks: Mapping[str, Network],
    text: Condition,
    conditions: Mapping[str, Array],
    null: Any = None,
) -> dict[str, Array]:
    """Return what a text's encoders make of the tokens among the conditions, and of those of the null text.

    Args:
        networks: Holds the encoders.
        text: Names them.
        conditions: Tokens (batch, length), or (batch, encoders, length) where there are several.
        null: A number that the embeddings of the null text are filled with.
    """
    texts: dict[str, Array] = {}
    for prefix in ("", NULL):
        if prefix + TOKENS in conditions:
            tokens = conditions[prefix + TOKENS]
            for index, encoder in enumerate(text.encoders):
                mine = tokens[:, index] if len(tokens.shape) > 2 else tokens
                for name, value in _find(networks, encoder)({TOKENS: mine}).items():
                    known = texts.get(prefix + name)
                    texts[prefix + name] = value if known is None else _beside(known, value)
    if null is not None and not isinstance(null, str):
        texts |= {NULL + name: value * 0 + null for name, value in texts.items()}
    return texts


def _beside(first: Array, second: Array) -> Array:
    """Put two arrays side by side on the last axis, of whatever library, as the one operation that converters know."""
    if isinstance(first, np.ndarray):
        return np.concatenate((first, second), axis=-1)
    library = sys.modules[
        type(first).__module__.partition(".")[0]
    ]  # torch, which nothing here imports
    return library.cat((first, second), -1)


def latent_of(table: SamplerTable, encoder: Network, images: Array) -> Array:
    """Return the states of images (batch, channels, height, width): their latents, shifted and scaled."""
    scale, shift = table.space.get("scale", 1.0), table.space.get("shift", 0.0)
    made = encoder({IMAGE: images})[LATENT]
    return _as((made - shift) * scale, images)


def enter_stage(
    table: SamplerTable,
    stage: Stage,
    noise: Sequence[Array],
    given: Mapping[str, Array],
    before: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Return the state that a stage starts from, and all that its networks are given beside it.

    Args:
        table: The sampler.
        stage: One of its stages.
        noise: The bank.
        given: Conditions by name.
        before: The last state of the stage before.
    """
    coefficient, position = stage.init_noise
    z = noise[position] * coefficient
    inputs = {other.carry_to: z * 0.0 for other in table.stages if other.carry_to is not None}
    if stage.init_image is not None:
        factor, name = stage.init_image
        z = z + given[name] * factor
    if stage.carry is not None:
        carried = resize(before, stage.carry, stage.shape) * stage.carry_scale
        if stage.carry_noise is not None:
            carried = carried + noise[stage.carry_noise[1]] * stage.carry_noise[0]
        if stage.carry_to is None:
            z = z + carried
        else:
            inputs[stage.carry_to] = carried
    return z, {**given, **inputs}


def run_row(
    table: SamplerTable,
    row: Row,
    networks: Mapping[str, Network],
    z: Array,
    noise: Sequence[Array],
    conditions: Mapping[str, Array],
    history: Sequence[Array] = (),
    index: int = 0,
) -> RowTrace:
    """Run one row from the state `z`; `history` holds earlier x0, the newest first."""
    raw = x0 = None
    calls: tuple[Array, ...] = ()
    if row.call:
        raw, calls = _predict(table, row, networks, z, conditions)
        x0 = z * row.x0[0] + raw * row.x0[1]
        if row.clip is not None:
            x0 = x0.clip(*row.clip)
    terms = [(row.next.z, z), (row.next.x0, x0), (row.next.raw, raw)]
    terms += list(zip(row.next.previous, history, strict=False))
    if row.noise is not None:
        terms.append((row.next.noise, noise[row.noise]))
    products = [value * factor for factor, value in terms if factor != 0]
    after = sum(products[1:], start=products[0]) if products else z * 0.0
    if row.blend is not None:
        after = _blended(row.blend, after, noise, conditions)
    return RowTrace(index, row, z, raw, x0, after, calls)


def _blended(
    blend: Blend, z: Array, noise: Sequence[Array], conditions: Mapping[str, Array]
) -> Array:
    known, mask = conditions[blend.image] * blend.known, conditions[blend.mask]
    if blend.index is not None:
        known = known + noise[blend.index] * blend.noise
    return z * mask + known * (1 - mask)


def _predict(
    table: SamplerTable,
    row: Row,
    networks: Mapping[str, Network],
    z: Array,
    conditions: Mapping[str, Array],
) -> tuple[Array, tuple[Array, ...]]:
    """Return the prediction after guidance, and what guidance was made of."""
    inputs = {table.state_input: z if row.in_scale == 1 else z * row.in_scale}
    given = {**conditions, **inputs}
    conditional = _call(table, row, networks, given)
    if row.guidance_scale is None:
        return conditional, ()
    unconditional = _call(table, row, networks, {**given, **_null(table, given)})
    guided = unconditional + (conditional - unconditional) * row.guidance_scale
    return guided, (conditional, unconditional)


def _null(table: SamplerTable, given: Mapping[str, Array]) -> dict[str, Array]:
    """Return what the unguided call is given instead."""
    null = {k.removeprefix(NULL): v for k, v in given.items() if k.startswith(NULL)}
    for name, value in table.guidance.null.items():
        if not isinstance(value, str):
            null[name] = given[name] * 0 + (int(value) if value == int(value) else value)
        elif name not in null:
            msg = f"Guidance needs the null text of `{name}` as `{NULL}{name}`, or its tokens as `{NULL}{TOKENS}`."
            raise ContractError(msg)
    return null


def _call(
    table: SamplerTable, row: Row, networks: Mapping[str, Network], given: Mapping[str, Array]
) -> Array:
    outputs: dict[str, Array] = {}
    for name in row.call:
        outputs = {**outputs, **_find(networks, name)({**given, **row.feeds, **outputs})}
    if table.raw_output not in outputs:
        msg = f"The table takes `{table.raw_output}` of {' and '.join(row.call)}, which returned: {', '.join(outputs)}."
        raise ContractError(msg)
    return _as(outputs[table.raw_output], given[table.state_input])


def _find(networks: Mapping[str, Network], name: str) -> Network:
    if name not in networks:
        msg = f"The table calls a network that is not there: {name}."
        raise ContractError(msg)
    return networks[name]


def _decoded(table: SamplerTable, decoder: Network, z: Array) -> Array:
    scale, shift = table.space.get("scale", 1.0), table.space.get("shift", 0.0)
    (made,) = decoder({LATENT: z * (1 / scale) + shift}).values()
    return _as(made, z)


def _routed(
    router: Router, networks: Mapping[str, Network], given: Mapping[str, Array]
) -> Mapping[str, Network]:
    """Add the routed network: it cuts a batch up by student, calls each once, and puts it together again."""
    students = route(router, given)
    parts = {int(k): np.flatnonzero(students == k).tolist() for k in np.unique(students)}

    def call(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        whole: dict[str, Array] = {}
        for student, index in parts.items():
            mine = {
                name: value if np.ndim(value) == 0 else value[index]
                for name, value in inputs.items()
            }
            for name, made in _find(networks, router.networks[student])(mine).items():
                # Room for the whole batch, of whatever library.
                whole.setdefault(name, made[[0] * len(students)])[index] = made
        return whole

    # A lookup opens a network, so `networks` is not copied. A ChainMap writes to its first map alone.
    return ChainMap({router.network: call}, networks)  # type: ignore[arg-type]


def _as(raw: Array, z: Array) -> Array:
    """Give `raw` the dtype of the state, so that the coefficients never meet half precision."""
    if raw.dtype == z.dtype:
        return raw
    return raw.astype(z.dtype) if hasattr(raw, "astype") else raw.to(z.dtype)


def resize(z: Array, how: str, shape: tuple[int, int, int]) -> Array:
    """Change height and width by a whole factor: nearest-neighbour up, or the mean of areas down."""
    if how == "identity":
        return z
    channels, height, width = map(int, z.shape[1:])  # a tracer counts in tensors
    whole = (-1, channels, *shape[1:])
    # Of rank 5 at most, which is all that Core ML runs.
    if how == "up_nearest":
        sizes = (height, shape[1] // height, width, shape[2] // width)
        apart = z.reshape(-1, height, 1, width, 1)
        expand = getattr(apart, "expand", functools.partial(np.broadcast_to, apart))
        return expand((apart.shape[0], *sizes)).reshape(whole)
    # In float64 the mean of equal values is that value, in whatever order they are summed up.
    exact = z.double() if hasattr(z, "double") else z.astype(np.float64)
    areas = exact.reshape(-1, shape[1], height // shape[1], shape[2], width // shape[2])
    return _as(areas.mean((2, 4)).reshape(whole), z)
