"""The student: a folder of diffusers networks with the sampler table that was trained for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.conditions import Tokenize
from edgedistill.contract import Signature
from edgedistill.errors import BundleError
from edgedistill.files import inside, read_json, sha256, write_json
from edgedistill.table import SamplerTable, check_version
from edgedistill.tables import (
    DEFAULT,
    FURTHER,
    TABLE,
    Tables,
    further_names,
    load_further,
    save_tables,
    table_file,
    tokenizers_of,
)
from edgedistill.weight_files import weights_in

MANIFEST = "student.json"
SCHEMA_VERSION = "1.1"
EXAMPLES = "examples.safetensors"


@dataclass(frozen=True)
class Student:
    """An opened student folder, or a pipeline's that is treated as one and holds no manifest and no tables.

    Fields:
        root: The folder; each network lies in a subfolder, as diffusers writes it. Beside them may lie a
            tokenizer (a file, or a folder of one), and ``examples.safetensors``: an image or mask per example under the name of the
            condition, which the probes are made of.
        name: For people.
        table: The sampler it was trained for (``sampler.json``).
        signatures: By network name.
        provenance: Method, recipe, teacher, data, seed, versions.
        further: Other tables over the same networks (``samplers/NAME.json``), by name.
        folders: Subfolders of the networks that do not lie in one of their own name: networks of the
            same weights that differ in the size of what they take share one.
    """

    root: Path
    name: str
    table: SamplerTable
    signatures: Mapping[str, Signature]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    further: Tables = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)

    @property
    def samplers(self) -> Tables:
        """All tables by name, the default first."""
        return {DEFAULT: self.table, **dict(sorted(self.further.items()))}

    @property
    def tokenize(self) -> Tokenize | None:
        """What turns prompts into tokens; None where no table takes prompts."""
        names = tokenizers_of(self.samplers)
        if not names:
            return None
        from edgedistill.text import open_readers

        return open_readers([inside(self.root, name) for name in names])

    def folder(self, network: str) -> Path:
        """Return the folder that a network lies in."""
        return inside(self.root, self.folders.get(network, network))

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
            folders = data.get("folders", {})
            for name in (*signatures, *folders.values()):
                inside(root, name)
            table = SamplerTable.load(root / TABLE)
            names = further_names(f"{FURTHER}/{path.name}" for path in (root / FURTHER).glob("*"))
            further = load_further(root, names)
            return cls(root, data["name"], table, signatures, data["provenance"], further, folders)
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"{source}: malformed ({type(error).__name__}: {error})."
            raise BundleError(msg) from error

    def write_manifest(self) -> None:
        """Write the tables and the manifest; the networks are already there."""
        save_tables(self.root, self.samplers)
        write_json(
            self.root / MANIFEST,
            {
                "schema_version": SCHEMA_VERSION,
                "name": self.name,
                "fingerprint": self.fingerprint,
                "signatures": {name: item.to_json() for name, item in self.signatures.items()},
                "provenance": dict(self.provenance),
                **({"folders": dict(self.folders)} if self.folders else {}),
            },
        )

    def verify(self) -> None:
        """Refuse networks and a table that are not those the manifest was written with.

        Raises:
            BundleError: If a byte of them changed since.
        """
        if not (self.root / MANIFEST).is_file():
            return
        if read_json(self.root / MANIFEST).get("fingerprint") != self.fingerprint:
            msg = f"{self.root}: damaged: its networks and table do not fit the fingerprint in {MANIFEST}; distil it anew."
            raise BundleError(msg)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of every network file, of the tables, tokenizers and examples."""
        import hashlib
        import json

        folders = sorted({self.folder(name) for name in self.signatures})
        files = [path for folder in folders for path in weights_in(folder)]
        files += [self.root / table_file(name) for name in self.samplers]
        for name in tokenizers_of(self.samplers):
            files += [self.root / name, *sorted((self.root / name).glob("*"))]
        files += [self.root / EXAMPLES]
        parts = [
            f"{path.relative_to(self.root).as_posix()} {sha256(path)}"
            for path in files
            if path.is_file()
        ]
        if not (self.root / TABLE).is_file():
            parts += [json.dumps(table.to_json()) for table in self.samplers.values()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
