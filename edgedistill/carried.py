"""What a bundle takes over from another, file by file: whose they are, and how they come along."""

import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from edgedistill.weight_files import weights_in


def holds(path: str, name: str) -> bool:
    """Whether a file is what a path names, or lies in the folder that it names."""
    return name == path or name.startswith(path.rstrip("/") + "/")


def members(path: Path) -> list[Path]:
    """Return what is read of a path: of a network's folder its weights, with a graph those beside it, else all."""
    if path.is_dir():
        return weights_in(path) if (path / "config.json").is_file() else [path]
    beside = {".onnx": path.with_name(f"{path.name}_data"), ".xml": path.with_suffix(".bin")}
    weights = beside.get(path.suffix)
    return [path] if weights is None or not weights.is_file() else [path, weights]


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder to a place that is not there yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def link(source: Path, target: Path) -> None:
    """Let a file, or the files of a folder, lie in a second place without a second copy, where the system can.

    Links stay links. Both places are one file until either is replaced: replace it by renaming, never write into it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_linked)
    else:
        _linked(str(source), str(target))


def is_one_file(one: Path, other: Path) -> bool:
    """Whether two paths are there and are one file, as `link` makes them."""
    return one.is_file() and other.is_file() and one.samefile(other)


def unlisted(root: Path, listed: Collection[str], replaced: Collection[str]) -> Iterator[str]:
    """Yield the files of a bundle that its manifest does not list: a card, what was compiled of a package, notes.

    Args:
        root: The bundle's folder.
        listed: The files that are known.
        replaced: Paths of what is written anew. What lies in the same folder of the bundle may have been made of
            it, as compiled models are, so it is left out.
    """
    tops = {PurePosixPath(path).parts[0] for path in replaced}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        is_file = path.is_symlink() or path.is_file()
        if is_file and name not in listed and PurePosixPath(name).parts[0] not in tops:
            yield name


def _linked(source: str, target: str) -> str:
    """Link a file, or copy it where the file system cannot."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)
    return target
