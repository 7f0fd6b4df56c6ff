"""Which of the files by which loaders open a single root are others than an export would write by now."""

import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from edgedistill.student import Student

from .loader_files import write_loader_files


def outdated_files(student: Student, root: Path, formats: Collection[str]) -> dict[str, bool]:
    """Return the files that `write_loader_files` would add to a root or write otherwise, and which are there.

    What only tells another version of a package is not written otherwise. Files that the export does not write,
    such as a card or what was compiled, are not looked at.

    Args:
        student: The root's.
        root: The folder.
        formats: Of the artifacts that it holds.

    Returns:
        Whether a file is there, by its path in the root.
    """
    with tempfile.TemporaryDirectory() as place:
        fresh = Path(place)
        write_loader_files(student, fresh, formats)
        names = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*"))
        return {
            name: (root / name).is_file()
            for name in names
            if (fresh / name).is_file() and not _is_same(root / name, fresh / name)
        }


def _is_same(held: Path, fresh: Path) -> bool:
    if not held.is_file():
        return False
    one, other = held.read_bytes(), fresh.read_bytes()
    meaning = _MEANINGS.get(fresh.suffix)
    return one == other or (meaning is not None and meaning(one) == meaning(other))


def _without_version(data: bytes) -> Any:
    """Return what a JSON file says, but for the version of diffusers that wrote it."""
    try:
        told = json.loads(data)
    except ValueError:
        return data
    if not isinstance(told, dict):
        return told
    return {name: value for name, value in told.items() if name != "_diffusers_version"}


def _without_numbers(data: bytes) -> bytes:
    """Return a graph of OpenVINO's without versions and the numbers that a process gives its layers."""
    return re.sub(rb"\d+", b"", data)


_MEANINGS: Mapping[str, Callable[[bytes], Any]] = {
    ".json": _without_version,
    ".xml": _without_numbers,
}
