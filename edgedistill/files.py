"""Files that are whole or not there: hashes, safe paths, write-aside-and-rename."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from edgedistill.errors import BundleError

_CHUNK = 1 << 20


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
    bad = not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative
    path = root / relative
    if bad or not path.resolve().is_relative_to(root.resolve()):
        msg = f"{root}: the manifest names {relative!r}, which lies outside of the folder; refuse it and get the bundle anew."
        raise BundleError(msg)
    return path


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
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        msg = f"{path}: not a JSON file ({error})."
        raise BundleError(msg) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON with stable formatting; the file appears whole or not at all."""
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes aside, flush them to disk, and rename into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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
    old folder and at most a hidden ``.NAME.*`` folder beside it, which the next run sweeps away.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.aside-*"):
        if not _alive(stale):
            shutil.rmtree(stale, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.aside-{os.getpid()}-", dir=target.parent))
    aside.chmod(0o755)
    try:
        yield aside
        _swap(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _alive(folder: Path) -> bool:
    process = folder.name.rsplit("aside-", 1)[1].split("-")[0]
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
    old = new.with_name(new.name + "-old")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
