"""All checks of a folder for the loaders that it is meant for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgedistill.errors import BundleError, ConfigError
from edgedistill.stock import LOADERS

from . import (
    config_checks,
    graph_checks,
    index_checks,
    scheduler_checks,
    swift_checks,
    tokenizer_checks,
)
from .findings import CHECKS, FORMATS, Finding
from .folder import Folder

MODULES = (
    index_checks,
    config_checks,
    tokenizer_checks,
    scheduler_checks,
    graph_checks,
    swift_checks,
)
"""Whose import registered the checks, in this order."""
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "coreml": ".mlpackage"}


def loaders_of(root: Path) -> tuple[str, ...]:
    """Return the loaders that a folder holds anything for; diffusers if there is nothing at all.

    Raises:
        BundleError: If there is no such folder.
    """
    if not root.is_dir():
        msg = f"{root}: no such folder."
        raise BundleError(msg)
    folder = Folder(root)
    return tuple(name for name in LOADERS if folder.holds(name)) or ("diffusers",)


def check_layout(root: Path, loaders: Sequence[str] | None = None) -> list[Finding]:
    """Check a pipeline folder without loading a weight.

    Args:
        root: The folder with `model_index.json`.
        loaders: Names in `LOADERS`; None: those that the folder holds anything for.

    Returns:
        What is wrong, by loader in the order given; nothing if each opens the folder as it is.

    Raises:
        BundleError: If there is no such folder.
        ConfigError: If a loader is unknown.
        MissingDependencyError: If `onnx` or `coremltools` is needed to read graphs and not installed.
    """
    there = loaders_of(root)
    if unknown := [name for name in loaders or () if name not in LOADERS]:
        msg = f"Unknown loader {unknown[0]!r}: choose of {', '.join(LOADERS)}."
        raise ConfigError(msg)
    folder = Folder(root)
    found = []
    for loader in loaders or there:
        problems = list(index_checks.without_controlnets(folder, loader))
        if not problems:
            problems = [item for check in CHECKS[loader] for item in check(folder, loader)]
            problems += _damaged(folder, loader)
        found += [replace(item, loader=loader) for item in problems]
    return found


def _damaged(folder: Folder, loader: str) -> list[Finding]:
    """Return what could not be read of what a loader reads: its graphs, and every JSON file."""
    suffixes = (".json", _SUFFIXES.get(FORMATS.get(loader, ""), ".json"))
    return [
        Finding(path, "a whole file", reason.rstrip("."), "export it anew")
        for path, reason in folder.damaged.items()
        if path.endswith(suffixes)
    ]
