"""The student: a folder of diffusers networks with the sampler table that was trained for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.bundle import TABLE
from edgedistill.contract import Signature
from edgedistill.errors import BundleError
from edgedistill.files import inside, read_json, sha256, write_json
from edgedistill.table import SamplerTable, check_version

MANIFEST = "student.json"
SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class Student:
    """An opened student folder.

    Fields:
        root: The folder; each network lies in a subfolder of its name, as diffusers writes it.
        name: For people.
        table: The sampler it was trained for (``sampler.json``).
        signatures: By network name.
        provenance: Method, recipe, teacher, data, seed, versions.
    """

    root: Path
    name: str
    table: SamplerTable
    signatures: Mapping[str, Signature]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path | str) -> "Student":
        """Open a student folder.

        Raises:
            BundleError: If the folder or its manifest is missing, malformed or newer than this release.
        """
        root = Path(root)
        source = root / MANIFEST
        if not source.is_file():
            msg = f"{root}: not a student folder (it holds no {MANIFEST}); make one with `edgedistill distill`."
            raise BundleError(msg)
        data = read_json(source)
        try:
            check_version(data["schema_version"], SCHEMA_VERSION, str(source))
            signatures = {k: Signature.from_json(v) for k, v in data["signatures"].items()}
            for name in signatures:
                inside(root, name)
            table = SamplerTable.load(root / TABLE)
            return cls(root, data["name"], table, signatures, data["provenance"])
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"{source}: malformed ({type(error).__name__}: {error})."
            raise BundleError(msg) from error

    def write_manifest(self) -> None:
        """Write the table and the manifest; the networks are already there."""
        self.table.save(self.root / TABLE)
        write_json(
            self.root / MANIFEST,
            {
                "schema_version": SCHEMA_VERSION,
                "name": self.name,
                "fingerprint": self.fingerprint,
                "signatures": {name: item.to_json() for name, item in self.signatures.items()},
                "provenance": dict(self.provenance),
            },
        )

    def verify(self) -> None:
        """Refuse networks and a table that are not those the manifest was written with.

        Raises:
            BundleError: If a byte of them changed since.
        """
        if read_json(self.root / MANIFEST).get("fingerprint") != self.fingerprint:
            msg = f"{self.root}: damaged: its networks and table do not fit the fingerprint in {MANIFEST}; distil it anew."
            raise BundleError(msg)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of every network file and of the table."""
        import hashlib

        parts = [
            f"{path.relative_to(self.root).as_posix()} {sha256(path)}"
            for name in sorted(self.signatures)
            for path in sorted((self.root / name).rglob("*"))
            if path.is_file()
        ]
        parts.append(f"{TABLE} {sha256(self.root / TABLE)}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
