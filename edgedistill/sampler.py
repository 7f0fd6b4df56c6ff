"""The one loop that runs a sampler table; it knows no method and works on any arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import ContractError
from edgedistill.table import Row, SamplerTable, Stage

Array = Any  # numpy.ndarray or torch.Tensor: whatever has arithmetic, `clip` and `reshape`
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
    """

    index: int
    row: Row
    state: Array
    raw: Array | None
    x0: Array | None
    next: Array


Observer = Callable[[RowTrace], None]


def run_table(
    table: SamplerTable,
    networks: Mapping[str, Network],
    noise: Sequence[Array],
    conditions: Mapping[str, Array],
    observe: Observer | None = None,
) -> Array:
    """Run every row and return the last state, clipped to `table.clamp`.

    Args:
        table: The sampler.
        networks: One callable per name in `table.networks`; each maps inputs to outputs by name.
        noise: The bank: `table.noise_count` arrays of shape (batch, channels, height, width).
        conditions: Further network inputs by name, one entry per sample, guidance input included.
        observe: Called after each row.

    Raises:
        ContractError: If a network or a noise array is missing.
    """
    if missing := [name for name in table.networks if name not in networks]:
        msg = f"The table calls networks that are not there: {', '.join(missing)}."
        raise ContractError(msg)
    if len(noise) != table.noise_count:
        msg = f"The table needs a noise bank of {table.noise_count} arrays, got {len(noise)}."
        raise ContractError(msg)
    z: Array = None
    index = 0
    for stage in table.stages:
        z = first_state(stage, noise, z)
        history: tuple[Array, ...] = ()
        for row in stage.rows:
            trace = run_row(table, row, networks, z, noise, conditions, history, index)
            if observe is not None:
                observe(trace)
            z = trace.next
            history = (trace.x0, *history)
            index += 1
    return z if table.clamp is None else z.clip(*table.clamp)


def first_state(stage: Stage, noise: Sequence[Array], carried: Array | None = None) -> Array:
    """Return the state that a stage starts from: scaled noise plus what the stage before left."""
    coefficient, position = stage.init_noise
    z = noise[position] * coefficient
    if stage.carry is not None:
        z = z + _resize(carried, stage.carry, stage.shape) * stage.carry_scale
    return z


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
    if row.call:
        raw = _predict(table, row, networks, z, conditions)
        x0 = z * row.x0[0] + raw * row.x0[1]
        if row.clip is not None:
            x0 = x0.clip(*row.clip)
    terms = [(row.next.z, z), (row.next.x0, x0), (row.next.raw, raw)]
    terms += list(zip(row.next.previous, history, strict=False))
    if row.noise is not None:
        terms.append((row.next.noise, noise[row.noise]))
    products = [value * factor for factor, value in terms if factor != 0]
    after = sum(products[1:], start=products[0]) if products else z * 0.0
    return RowTrace(index, row, z, raw, x0, after)


def _predict(
    table: SamplerTable,
    row: Row,
    networks: Mapping[str, Network],
    z: Array,
    conditions: Mapping[str, Array],
) -> Array:
    inputs = {table.state_input: z if row.in_scale == 1 else z * row.in_scale}
    given = {**conditions, **inputs}
    conditional = _call(table, row, networks, given)
    if row.guidance_scale is None:
        return conditional
    null = {name: given[name] * 0 + int(value) for name, value in table.guidance.null.items()}
    unconditional = _call(table, row, networks, {**given, **null})
    return unconditional + (conditional - unconditional) * row.guidance_scale


def _call(
    table: SamplerTable, row: Row, networks: Mapping[str, Network], given: Mapping[str, Array]
) -> Array:
    outputs: dict[str, Array] = {}
    for name in row.call:
        outputs = {**outputs, **networks[name]({**given, **row.feeds, **outputs})}
    if table.raw_output not in outputs:
        msg = f"The table takes `{table.raw_output}` of {' and '.join(row.call)}, which returned: {', '.join(outputs)}."
        raise ContractError(msg)
    return _as(outputs[table.raw_output], given[table.state_input])


def _as(raw: Array, z: Array) -> Array:
    """Give `raw` the dtype of the state, so that the coefficients never meet half precision."""
    if raw.dtype == z.dtype:
        return raw
    return raw.astype(z.dtype) if hasattr(raw, "astype") else raw.to(z.dtype)


def _resize(z: Array, how: str, shape: tuple[int, int, int]) -> Array:
    """Change height and width by a whole factor: nearest-neighbour up, or the mean of areas down."""
    batch, channels, height, width = z.shape
    if how == "identity":
        return z
    if how == "up_nearest":
        rows = [item // (shape[1] // height) for item in range(shape[1])]
        columns = [item // (shape[2] // width) for item in range(shape[2])]
        return z[:, :, rows][:, :, :, columns]
    high, wide = height // shape[1], width // shape[2]
    return z.reshape(batch, channels, shape[1], high, shape[2], wide).mean((3, 5))
