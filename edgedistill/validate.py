"""Does a table say what its annotations say? Derive its numbers again and compare.

Rows that `edgedistill.rows` builds are built again from their own notes; rows of the solvers, which depend
on one another, from the scheduler's configuration.
"""

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgedistill.agreement import is_close
from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.mixture import CallOptions
from edgedistill.rows import BUILDERS
from edgedistill.schedule import Schedule
from edgedistill.table import Row, SamplerTable, Stage


def check(table: SamplerTable, source: str = "sampler table") -> None:
    """Refuse a table whose numbers are not those of its annotations.

    Raises:
        ConfigError: With what `validate` found.
    """
    if problems := validate(table):
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        msg = f"{source}: {'; '.join(problems[:3])}{more}; make the table again."
        raise ConfigError(msg)


def validate(table: SamplerTable) -> list[str]:
    """Return what is wrong with a table; an empty list where nothing is.

    Needs the annotations ``scheduler`` (a diffusers configuration) and ``prediction_type``, and each row's
    note; for the solvers ``num_steps`` too. A table that leads from data to noise has the annotation
    ``direction`` "encode".
    """
    problems = list(_law_problems(table))
    try:
        return [*problems, *_derived_problems(table)]
    except ConfigError as error:
        return [*problems, str(error).rstrip(".")]


def _derived_problems(table: SamplerTable) -> list[str]:
    """Compare with what the annotations make.

    Raises:
        ConfigError: If they make nothing.
    """
    expected, first = _derive(table)
    if len(expected) != len(table.rows):
        return [f"there are {len(table.rows)} rows, and the annotations make {len(expected)}"]
    problems = [
        f"row {index}: {item}"
        for index, (row, wanted) in enumerate(zip(table.rows, expected, strict=True))
        for item in _differences(row, wanted)
    ]
    schedule = Schedule.from_config(table.annotations["scheduler"])
    for stage in table.stages:
        problems += _start_problems(stage, schedule, first, encodes=_encodes(table))
        problems += _blend_problems(stage, schedule)
    return problems


def _law_problems(table: SamplerTable) -> Iterator[str]:
    """Check what no single row says."""
    span = tuple(table.space["value_range"])
    if table.space.get("kind") == "pixel" and table.clamp not in (None, span):
        yield f"the output is clamped to {table.clamp}, and the pixels' range is {span}"
    if _encodes(table) and table.clamp is not None:
        yield "a table that encodes returns noise, which is not clamped"
    for index, row in enumerate(table.rows):
        if row.guidance_scale not in (None, table.guidance.default):
            yield f"row {index}: guidance_scale is {row.guidance_scale}, and the table's default is {table.guidance.default}"
        if row.clip not in (None, span, _clip_range(table)):
            yield f"row {index}: clip {row.clip} is neither the scheduler's nor the value range"
        told = row.feeds.get("step")
        if told not in (None, len(table.rows) + 1):
            yield f"row {index}: is told of {told:g} time stamps, and the table has {len(table.rows) + 1}"
    for stage in table.stages:
        if len(calls := {row.call for row in stage.rows if row.call}) > 1:
            yield f"rows of one stage call the same networks, got {sorted(calls)}"
        yield from _order_problems(stage, encodes=_encodes(table))


def _order_problems(stage: Stage, *, encodes: bool) -> Iterator[str]:
    """Check that times fall, or rise where a table encodes, and that rows look back on those before them."""
    sign, order, turn = (-1, ">=", "rise") if encodes else (1, "<=", "fall")
    times = [_number(row.note.get("t")) for row in stage.rows]
    for index, row in enumerate(stage.rows):
        if not sign * _number(row.note.get("s")) <= sign * times[index]:
            yield f"a row's note must hold times t and s {order} t, got {dict(row.note)}"
        past = _past(row)
        if past != times[max(index - len(past), 0) : index][::-1]:
            yield f"a row at t={times[index]} looks back on {past}, and the rows before it are at {times[:index]}"
    if any(sign * a < sign * b for a, b in itertools.pairwise(times)):
        yield f"times must {turn} from row to row, got {times}"


def _past(row: Row) -> list[Any]:
    """Return the times of the rows that a row looks back on, the newest first."""
    past = row.note.get("past")
    return list(past) if isinstance(past, list | tuple) else []


def _encodes(table: SamplerTable) -> bool:
    return table.annotations.get("direction") == "encode"


def _start_problems(
    stage: Stage, schedule: Schedule, first: float, *, encodes: bool
) -> Iterator[str]:
    """Check that the first state is noise alone, or an image noised to the time of the first row."""
    t = stage.rows[0].note.get("t")
    alpha, sigma = schedule.alpha_sigma(t) if type(t) is int else (math.nan, math.nan)
    image = None
    if stage.init_image is not None:
        image = stage.init_image[0]
    elif stage.carry is not None and stage.carry_to is None:
        image = stage.carry_scale
    allowed = [(first, None), (sigma, None)] if image is None else [(sigma, alpha)]
    found = stage.init_noise[0], image
    if not any(all(map(is_close, found, item)) for item in ([(0.0, 1.0)] if encodes else allowed)):
        also = "" if image is None else f" and the first image by {image}"
        wanted = "0 and 1" if encodes else first if image is None else f"{sigma} and {alpha}"
        yield f"the first noise is scaled by {found[0]}{also}, not {wanted}"


def _blend_problems(stage: Stage, schedule: Schedule) -> Iterator[str]:
    """Check that the known part of the picture is as noisy as the state it is put into."""
    for row in stage.rows:
        if row.blend is None:
            continue
        s = row.note.get("s")
        allowed = [schedule.alpha_sigma(s)] if type(s) is int else []
        allowed += [(1.0, 0.0)] if row is stage.rows[-1] else []
        found = row.blend.known, row.blend.noise
        if not any(all(map(is_close, found, item)) for item in allowed):
            yield f"the row to s={s} blends {found}, not {' or '.join(map(str, allowed))}"


def _clip_range(table: SamplerTable) -> tuple[float, float]:
    config = table.annotations.get("scheduler")
    limit = _number(config.get("clip_sample_range", 1.0) if isinstance(config, Mapping) else None)
    return -limit, limit


def _derive(table: SamplerTable) -> tuple[Sequence[Row], float]:
    """Return the rows and the scale of the first noise that the annotations make."""
    config = table.annotations.get("scheduler")
    if not isinstance(config, Mapping):
        msg = (
            "the annotations must hold the configuration of the `scheduler` that the rows come from"
        )
        raise ConfigError(msg)
    kind = str(table.annotations.get("prediction_type"))
    if all(str(row.note.get("kind")) in BUILDERS for row in table.rows):
        schedule = Schedule.from_config(config)
        return [_from_note(schedule, kind, row) for row in table.rows], schedule.first_scale
    num_steps = table.annotations.get("num_steps")
    if type(num_steps) is not int or len(table.stages) != 1:
        msg = f"rows of a solver need one stage and `num_steps` in the annotations, got {len(table.stages)} and {num_steps!r}"
        raise ConfigError(msg)
    again = compile_scheduler(
        config,
        num_steps,
        shape=table.stages[0].shape,
        network=table.rows[0].call,
        prediction_type=kind,
        guidance=table.guidance,
        conditions=table.conditions,
    )
    return again.rows, again.stages[0].init_noise[0]


def _from_note(schedule: Schedule, kind: str, row: Row) -> Row:
    name = row.note["kind"]
    builder = BUILDERS[name]
    parameters = inspect.signature(builder).parameters
    calls = "prediction_type" in parameters
    given = {**row.note, "prediction_type": kind, "noise": row.noise or 1, "past": _past(row)}
    wanted = {key: given[key] for key in parameters if key in given}
    times = [given.get("t"), *(wanted[key] for key in ("k", "s") if key in wanted)]
    if any(type(item) is not int for item in (*times, *_past(row))):
        msg = f"a row of kind {name!r} goes from one label to another, got {dict(row.note)}"
        raise ConfigError(msg)
    if bool(row.call) is not calls:
        msg = f"a row of kind {name!r} calls {'a network' if calls else 'no network'}, got {list(row.call)}"
        raise ConfigError(msg)
    try:
        return builder(schedule, **wanted, **(_call_options(row) if calls else {}))
    except TypeError as error:
        msg = f"a row of kind {name!r} cannot be built from its note {dict(row.note)}"
        raise ConfigError(msg) from error


def _call_options(row: Row) -> CallOptions:
    """Read how a row calls its networks from the row and what its note says of the numbers it feeds."""
    feeds, target = row.note.get("feeds", {}), row.note.get("target_feed")
    told = [*feeds, target] if isinstance(feeds, Mapping) else [*row.feeds]
    names = [name for name in row.feeds if name not in told]
    if len(names) != 1:
        msg = f"a row that calls is fed its time and what its note says, got {dict(row.feeds)} and {dict(row.note)}"
        raise ConfigError(msg)
    return {
        "network": row.call,
        "clip": row.clip,
        "guidance_scale": row.guidance_scale,
        "feeds_name": names[0],
        "feeds": feeds,
        "target_feed": target,
    }


def _differences(row: Row, wanted: Row) -> Iterator[str]:
    found, expected = _numbers(row), _numbers(wanted)
    for name in sorted(found.keys() | expected.keys()):
        if not is_close(found.get(name), expected.get(name)):
            yield f"{name} is {found.get(name)}, and the annotations make it {expected.get(name)}"
    if row.call != wanted.call:
        yield f"it calls {list(row.call)}, and the annotations say {list(wanted.call)}"
    for name, value in wanted.note.items():
        if row.note.get(name) != value:
            yield f"its note says {name}={row.note.get(name)!r}, and the annotations say {value!r}"


def _numbers(row: Row) -> dict[str, float | None]:
    lists = {"x0": row.x0, "clip": row.clip or (), "next.previous": row.next.previous}
    return {
        **{
            f"{name}[{i}]": value
            for name, values in lists.items()
            for i, value in enumerate(values)
        },
        **{f"feeds.{name}": value for name, value in row.feeds.items()},
        **{f"next.{name}": getattr(row.next, name) for name in ("z", "x0", "raw", "noise")},
        "in_scale": row.in_scale,
        "guidance_scale": row.guidance_scale,
    }


def _number(value: Any) -> float:
    """Return a number as it is and everything else as NaN, which compares with nothing."""
    return float(value) if type(value) in (int, float) else math.nan
