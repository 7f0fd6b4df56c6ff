"""Does a table say what its annotations say? Derive its numbers again and compare.

Rows that `edgedistill.rows` builds are built again from their own notes; rows of the solvers, which depend
on one another, from the scheduler's configuration.
"""

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError
from edgedistill.mixture import CallOptions
from edgedistill.rows import BUILDERS
from edgedistill.schedule import Schedule
from edgedistill.table import Row, SamplerTable

TOLERANCE = 1e-6  # of each coefficient, relative to it or to 1, whichever is larger


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
    note; for the solvers ``num_steps`` too.
    """
    problems = list(_law_problems(table))
    try:
        expected, first = _derive(table)
    except ConfigError as error:
        return [*problems, str(error).rstrip(".")]
    if len(expected) != len(table.rows):
        return [
            *problems,
            f"there are {len(table.rows)} rows, and the annotations make {len(expected)}",
        ]
    for index, (row, wanted) in enumerate(zip(table.rows, expected, strict=True)):
        problems += [f"row {index}: {item}" for item in _differences(row, wanted)]
    if not _close(table.stages[0].init_noise[0], first):
        problems.append(
            f"the first noise is scaled by {table.stages[0].init_noise[0]}, not {first}"
        )
    return problems


def _law_problems(table: SamplerTable) -> Iterator[str]:
    """Check what no single row says."""
    span = tuple(table.space["value_range"])
    if table.space.get("kind") == "pixel" and table.clamp not in (None, span):
        yield f"the output is clamped to {table.clamp}, and the pixels' range is {span}"
    for index, row in enumerate(table.rows):
        if not _number(row.note.get("s")) <= _number(row.note.get("t")):
            yield f"row {index}: its note must hold times t and s <= t, got {dict(row.note)}"
        if row.guidance_scale not in (None, table.guidance.default):
            yield f"row {index}: guidance_scale is {row.guidance_scale}, and the table's default is {table.guidance.default}"
        if row.clip not in (None, span, _clip_range(table)):
            yield f"row {index}: clip {row.clip} is neither the scheduler's nor the value range"
    for stage in table.stages:
        times = [_number(row.note.get("t")) for row in stage.rows]
        if any(a < b for a, b in itertools.pairwise(times)):
            yield f"times must fall from row to row, got {times}"


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
        return [_from_note(schedule, kind, row) for row in table.rows], 1.0
    num_steps = table.annotations.get("num_steps")
    if type(num_steps) is not int:
        msg = f"the annotations must hold `num_steps`, got {num_steps!r}"
        raise ConfigError(msg)
    again = compile_scheduler(
        config,
        num_steps,
        shape=table.stages[0].shape,
        network=table.networks[0],
        prediction_type=kind,
        guidance=table.guidance,
        conditions=table.conditions,
    )
    return again.rows, again.stages[0].init_noise[0]


def _from_note(schedule: Schedule, kind: str, row: Row) -> Row:
    builder = BUILDERS[row.note["kind"]]
    given = {**row.note, "prediction_type": kind, "noise": row.noise or 1}
    wanted = {name: given[name] for name in inspect.signature(builder).parameters if name in given}
    times = [value for name, value in wanted.items() if name in ("t", "k", "s")]
    if any(type(value) is not int for value in times) or len(row.call) != 1 or not row.feeds:
        msg = f"a row of kind {row.note['kind']!r} calls one network at a whole timestep, got {dict(row.note)}"
        raise ConfigError(msg)
    options: CallOptions = {
        "network": row.call[0],
        "clip": row.clip,
        "guidance_scale": row.guidance_scale,
        "feeds_name": next(iter(row.feeds)),
    }
    try:
        return builder(schedule, **wanted, **options)
    except TypeError as error:
        msg = f"a row of kind {row.note['kind']!r} cannot be built from its note {dict(row.note)}"
        raise ConfigError(msg) from error


def _differences(row: Row, wanted: Row) -> Iterator[str]:
    found, expected = _numbers(row), _numbers(wanted)
    for name in sorted(found.keys() | expected.keys()):
        if not _close(found.get(name), expected.get(name)):
            yield f"{name} is {found.get(name)}, and the annotations make it {expected.get(name)}"
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


def _close(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))


def _number(value: Any) -> float:
    """Return a number as it is and everything else as NaN, which compares with nothing."""
    return float(value) if type(value) in (int, float) else math.nan
