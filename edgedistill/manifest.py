"""The manifest of a bundle: its version, its seal, and whether a file is what it says."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.errors import BundleError
from edgedistill.files import read_json, sha256, write_json
from edgedistill.table import check_version

MANIFEST = "edgedistill.json"
FORMAT = "edgedistill-bundle"
SCHEMA_VERSION = "1.0"


def seal_manifest(root: Path, data: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, with its format, version and seal."""
    whole = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **data}
    write_json(root / MANIFEST, {**whole, "seal": seal(whole)})


def seal(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 that guards the manifest itself: over its JSON, sorted, without ``seal``."""
    body = {key: value for key, value in data.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a folder; its seal is not looked at.

    Raises:
        BundleError: If there is none, it is another kind of file, or newer than this release.
    """
    source = root / MANIFEST
    if not source.is_file():
        found = f"it holds no {MANIFEST}" if root.is_dir() else "no such folder"
        msg = f"{root}: not a bundle: {found}; make one with `edgedistill export`."
        raise BundleError(msg)
    data = read_json(source)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        msg = f"{source}: not an edgedistill manifest; make the bundle anew with `edgedistill export`."
        raise BundleError(msg)
    check_version(data.get("schema_version"), SCHEMA_VERSION, str(source))
    return data


def check_seal(root: Path, data: Mapping[str, Any]) -> None:
    """Refuse a manifest that was changed.

    Raises:
        BundleError: If its seal is another one.
    """
    if data.get("seal") != seal(data):
        msg = f"{root / MANIFEST}: damaged: its contents do not fit its seal; get the bundle anew."
        raise BundleError(msg)


def check_size(path: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a file that is missing or of another size than its entry in the manifest says.

    Raises:
        BundleError: If so.
    """
    if not path.is_file():
        msg = f"{path}: missing; the manifest lists it, get the bundle anew."
        raise BundleError(msg)
    if (held := path.stat().st_size) != expected["bytes"]:
        msg = f"{path}: damaged: it has {held} bytes, by the manifest {expected['bytes']}; get the bundle anew."
        raise BundleError(msg)


def check_hash(path: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a file of other bytes than its entry in the manifest says.

    Raises:
        BundleError: If so.
    """
    if sha256(path) != expected["sha256"]:
        msg = f"{path}: damaged: its SHA-256 is not the manifest's; get the bundle anew."
        raise BundleError(msg)
