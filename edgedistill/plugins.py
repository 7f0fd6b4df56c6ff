"""Commands and runtimes found through entry points, so that the core imports no wing."""

import difflib
import functools
from importlib import metadata
from typing import Any

from edgedistill.errors import ConfigError

COMMANDS = "edgedistill.commands"
RUNTIMES = "edgedistill.runtimes"
ALIASES = {"ort": "onnxruntime", "ov": "openvino", "core-ml": "coreml", "pytorch": "torch"}


@functools.cache
def _own(group: str) -> dict[str, metadata.EntryPoint]:
    """Return this distribution's entries; one file is read, where the whole scan reads them all."""
    points = metadata.distribution("edgedistill").entry_points
    return {point.name: point for point in points if point.group == group}


@functools.cache
def entries(group: str) -> dict[str, metadata.EntryPoint]:
    """Return every entry of a group by name, those of other distributions included."""
    found = {point.name: point for point in metadata.entry_points(group=group)}
    return {**found, **_own(group)}


def names(group: str) -> list[str]:
    """Return the names of a group, sorted."""
    return sorted(entries(group))


def find(group: str, name: str) -> Any:
    """Load one entry by name or alias.

    Raises:
        ConfigError: If there is no such entry; the message lists all and the nearest.
    """
    name = ALIASES.get(name, name)
    point = _own(group).get(name) or entries(group).get(name)
    if point is None:
        near = difflib.get_close_matches(name, names(group), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        what = group.rsplit(".", 1)[1][:-1]
        msg = f"Unknown {what} {name!r}: choose one of {', '.join(names(group))}{hint}"
        raise ConfigError(msg)
    return point.load()
