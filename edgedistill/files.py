"""Files that are whole or not there: hashes, safe paths, write-aside-and-rename."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from edgedistill.errors import BundleError

_ASIDE = ".aside-"
_OLD = "-old"
_FULL = {
    errno.ENOSPC: "free some space there or choose another place",
    errno.EDQUOT: "free some space there or choose another place",
    errno.EFBIG: "choose a place that takes larger files",
    errno.EROFS: "choose a folder that can be written",
}
_REFUSED = {
    errno.EACCES: "ask for the right to it or choose another place",
    errno.EPERM: "ask for the right to it or choose another place",
    errno.EISDIR: "a folder is in the way; choose another name",
    errno.EEXIST: "a part of the path is a file; choose another place",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
}


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inside(root: Path, relative: str) -> Path:
    """Join a path from a manifest to its folder, refusing to leave that folder.

    Raises:
        BundleError: If the path is absolute, climbs with ``..``, or a link leads outside.
    """
    pure = PurePosixPath(relative)
    bad = not relative or pure.is_absolute() or ".." in pure.parts or set("\\\0") & set(relative)
    # Path.resolve would raise RuntimeError where links go round in a circle.
    if bad or not Path(os.path.realpath(root / relative)).is_relative_to(os.path.realpath(root)):
        msg = f"{root}: the manifest names {relative!r}, which lies outside of the folder; refuse it and get the folder anew."
        raise BundleError(msg)
    return root / relative


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        BundleError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{path}: no such file."
        raise BundleError(msg) from error
    except (ValueError, RecursionError, IsADirectoryError) as error:
        msg = f"{path}: not a JSON file ({error})."
        raise BundleError(msg) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON with stable formatting; the file appears whole or not at all."""
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes aside, flush them to disk, and rename into place.

    Raises:
        BundleError: If the disk is full or the place cannot be written.
    """
    path = path.absolute()
    with _clear_refusal(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`; on success it takes the place of `target`.

    Nothing of the old folder is touched before the new one is complete. A killed process leaves the
    old folder and at most a hidden ``.NAME.aside-*`` folder beside it, which the next run sweeps away.

    Raises:
        BundleError: If the disk is full or the place cannot be written.
    """
    target = target.resolve()
    with _clear_refusal(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        aside = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        aside.chmod(0o755)
        try:
            yield aside
            _swap(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a place aside for a file and the weights that lie beside it; on success all move to `path`'s folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for part in sorted(Path(folder).iterdir()):
            part.replace(path.parent / part.name)


@contextlib.contextmanager
def _clear_refusal(target: Path) -> Iterator[None]:
    """Say what to do where writing `target` fails; failures to read other files pass through."""
    hidden = str(target.parent / f".{target.name}.")
    try:
        yield
    except OSError as error:
        place, number = str(error.filename or target), _number(error)
        is_ours = target.is_relative_to(place) or place.startswith(hidden)
        is_nested = any(
            _ASIDE in part for part in target.parts[:-1]
        )  # the outer one has the better name
        if is_nested or not (number in _FULL or (number in _REFUSED and is_ours)):
            raise
        msg = f"{target}: cannot be written ({os.strerror(number)}); {way_out(error)}. What was there is untouched."
        raise BundleError(msg) from error


def way_out(error: OSError) -> str | None:
    """Return what a user can do about an answer of the system, or None where nothing general can be said."""
    return {**_FULL, **_REFUSED}.get(_number(error))


def _number(error: OSError) -> int:
    """Return the system's number of an error; `shutil.copytree` gives it in words only."""
    in_words = re.search(r"\[Errno (\d+)\]", str(error))
    return error.errno or (int(in_words[1]) if in_words else 0)


@contextlib.contextmanager
def native_writer(library: str, path: Path) -> Iterator[None]:
    """Be clear where a native library cannot write: RuntimeError is all that they tell of a full disk.

    Raises:
        BundleError: If the library raises RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        msg = f"{path.name}: {library} could not write it ({error}); make room there or choose another place."
        raise BundleError(msg) from error


def _prefix(target: Path) -> str:
    """Return how names aside begin: hidden, and telling whose they are and who writes them."""
    return f".{target.name}{_ASIDE}{os.getpid()}-"


def _sweep(target: Path) -> None:
    """Remove what killed processes left; put back an old folder whose successor never came."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}{_ASIDE}*"):
        if _alive(stale):
            continue
        if stale.name.endswith(_OLD) and not target.exists():
            stale.rename(target)
        elif stale.is_file():
            stale.unlink(missing_ok=True)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def _alive(folder: Path) -> bool:
    process = folder.name.rsplit(_ASIDE, 1)[1].split("-")[0]
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(new: Path, target: Path) -> None:
    old = new.with_name(new.name + _OLD)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
