"""Commands, runtimes and reports found through entry points, so that the core imports no wing."""

import functools
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

from edgedistill.errors import ConfigError

COMMANDS = "edgedistill.commands"
RUNTIMES = "edgedistill.runtimes"
REPORTS = "edgedistill.reports"
PACKAGES = ("edgedistill", "export", "quantize", "runtimes")
ALIASES = {"ort": "onnxruntime", "ov": "openvino", "core-ml": "coreml", "pytorch": "torch"}
_HOME = Path(__file__).resolve().parent.parent


@functools.cache
def _own(group: str) -> dict[str, metadata.EntryPoint]:
    """Return this distribution's entries; one file is read, where the whole scan reads them all."""
    try:
        points = metadata.distribution("edgedistill").entry_points
    except metadata.PackageNotFoundError as error:
        msg = f"edgedistill lies in {_HOME} but is not installed; run: pip install -e {_HOME}"
        raise ConfigError(msg) from error
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
        ConfigError: If there is no such entry (the message lists all and the nearest), or if a file of
            the user's hides the package that holds it.
    """
    name = ALIASES.get(name, name)
    if name in _own(group):
        point = _own(group)[name]
        _refuse_hidden(point.module.split(".", maxsplit=1)[0])
        return point.load()
    if name not in entries(group):
        raise _unknown(group, name)
    return entries(group)[name].load()


def _unknown(group: str, name: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(name, [*names(group), *ALIASES], n=1)
    hint = f"; did you mean {ALIASES.get(near[0], near[0])!r}?" if near else "."
    what = group.rsplit(".", 1)[1][:-1]
    return ConfigError(f"Unknown {what} {name!r}: choose one of {', '.join(names(group))}{hint}")


def _refuse_hidden(package: str) -> None:
    """Refuse a package of ours that is found elsewhere; nothing of what hides it is executed."""
    spec = importlib.util.find_spec(package)
    where = spec.origin if spec is not None else None
    if where is None:
        msg = f"The package `{package}` of edgedistill is not in {_HOME}; install edgedistill anew."
        raise ConfigError(msg)
    if Path(where).resolve().parent.parent != _HOME:
        msg = (
            f"{where} hides the package `{package}` of edgedistill, "
            f"which lies in {_HOME / package}; rename it or run from another folder."
        )
        raise ConfigError(msg)
