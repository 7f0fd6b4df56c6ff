"""The samplers that a pipeline is exported with: its scheduler's or one that loaders share, and one that Swift takes."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edgedistill.compiler import TableFields
from edgedistill.errors import ConfigError
from edgedistill.files import read_json
from edgedistill.manifest import MANIFEST as BUNDLED
from edgedistill.plans import SWIFT_STEPS, Plan, portable, swift
from edgedistill.stock import loaders_for, objections, swift_spacing
from edgedistill.student import MANIFEST, Student
from edgedistill.table import SamplerTable
from edgedistill.tables import table_file

from .formats import OWN, PORTABLE, SWIFT

CHOICE = "choice"
"""The annotation of a table that says why it is the one."""
_DISTILLED_FOR = (
    "LCMScheduler",
    "TCDScheduler",
)  # other steps are not what the weights were made for


def with_samplers(
    student: Student, formats: Collection[str], asked: str | None = None, held: Path | None = None
) -> Student:
    """Return a pipeline with the samplers that loaders can follow; a distilled student is returned as it is.

    The default is the folder's own scheduler where every loader takes its steps, else the portable plan if
    it has that many steps. Beside it, where there is Core ML, lies ``swift``: as many steps as were asked
    for, or the most that the package takes.

    Args:
        student: What is exported.
        formats: What will be written.
        asked: One of `SCHEDULERS` for the default; None: as above.
        held: Folder of a bundle that the formats may join: whether it has ``swift`` decides in their place.

    Raises:
        ConfigError: If the plan asked for cannot be, or the folder's own scheduler is asked for and
            cannot be compiled.
    """
    if (student.root / MANIFEST).is_file():
        return student
    table = _default(student, asked)
    wanted = "coreml" in formats
    if held is not None and (held / BUNDLED).is_file():
        wanted = (held / table_file(SWIFT)).is_file()
    beside = _for_swift(table) if wanted else None
    further = {**student.further, **({SWIFT: beside} if beside else {})}
    return dataclasses.replace(student, table=table, further=further)


def _default(student: Student, asked: str | None) -> SamplerTable:
    from edgedistill.models.parts import find_parts

    table = student.table
    own = str(read_json(find_parts(student.root).scheduler).get("_class_name"))
    compiled = table.annotations["scheduler"]["_class_name"]
    if asked == OWN and compiled != own:
        msg = f"{student.root}: no table makes the steps of its {own}; leave --scheduler out, or choose portable."
        raise ConfigError(msg)
    if asked in (PORTABLE, SWIFT):
        plan = {PORTABLE: portable, SWIFT: swift}[asked]
        return _chosen(_planned(plan, table, _steps(table)), "it was asked for")
    why = f"no table makes the steps of its {own}" if compiled != own else ""
    if reason := _objection(table):
        why = "; ".join(filter(None, (why, f"of its {compiled}'s steps, {reason}")))
        if asked is None and compiled not in _DISTILLED_FOR:
            shared = _if_possible(portable, table, _steps(table))
            table = table if shared is None else shared
    return _chosen(table, why) if why else table


def _for_swift(table: SamplerTable) -> SamplerTable | None:
    """Return the steps that an unmodified Swift package takes; None: the table's own, or it takes none."""
    if swift_spacing(table):
        return None
    made = _if_possible(swift, table, min(_steps(table), SWIFT_STEPS[-1]))
    return made and _chosen(made, "an unmodified Swift package takes them")


def _if_possible(plan: Any, table: SamplerTable, num_steps: int) -> SamplerTable | None:
    """Return a plan's table, or None where it has no such schedule, prediction or number of steps."""
    try:
        return _planned(plan, table, num_steps)
    except ConfigError:
        return None


def _planned(plan: Any, table: SamplerTable, num_steps: int) -> SamplerTable:
    """Return a plan's table with all that a scheduler says nothing about as it is."""
    kept = {name: getattr(table, name) for name in TableFields.__annotations__}
    made: Plan = plan(
        table.annotations["scheduler"],
        num_steps,
        shape=table.stages[0].shape,
        network=table.rows[0].call,
        **kept,
    )
    return made.table


def _objection(table: SamplerTable) -> str | None:
    """Return the first thing against a table that a loader has which calls such networks."""
    found = objections(table.annotations["scheduler"], _steps(table), table)
    shared = [name for name in loaders_for(table) if name != "swift"]
    told = (f"{name} says: {reasons[0]}" for name in shared if (reasons := found[name]))
    return next(told, None)


def _steps(table: SamplerTable) -> int:
    return sum(1 for row in table.rows if row.call)


def _chosen(table: SamplerTable, why: str) -> SamplerTable:
    return dataclasses.replace(table, annotations={**table.annotations, CHOICE: why})
