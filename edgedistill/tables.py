"""Several tables over the same networks: their names, their files, and what they need together."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from edgedistill.errors import BundleError, ConfigError
from edgedistill.table import SamplerTable

DEFAULT = "default"
TABLE = "sampler.json"
FURTHER = "samplers"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Tables = Mapping[str, SamplerTable]  # by name, the default first


def table_file(name: str) -> str:
    """Return where the table of a name lies in a student or a bundle.

    Raises:
        ConfigError: If it is no name for a file.
    """
    if name == DEFAULT:
        return TABLE
    if not _NAME.fullmatch(name):
        msg = f"A sampler's name is made of letters, digits, dots and dashes, got {name!r}."
        raise ConfigError(msg)
    return f"{FURTHER}/{name}.json"


def golden_file(name: str) -> str:
    """Return where the golden tensors of a table lie in a bundle."""
    return "probes/golden.safetensors" if name == DEFAULT else f"probes/golden.{name}.safetensors"


def further_names(files: Iterable[str]) -> list[str]:
    """Return the names of the tables beside the default among files of a student or a bundle, in order."""
    paths = sorted(map(PurePosixPath, files))
    return [p.stem for p in paths if p.parent == PurePosixPath(FURTHER) and p.suffix == ".json"]


def load_further(root: Path, names: Iterable[str]) -> dict[str, SamplerTable]:
    """Read the tables beside the default."""
    return {name: SamplerTable.load(root / table_file(name)) for name in names}


def save_tables(root: Path, tables: Tables) -> None:
    """Write every table to its place."""
    for name, table in tables.items():
        table.save(root / table_file(name))


def choose(tables: Tables, name: str | None) -> SamplerTable:
    """Return the table of a name; None: the default.

    Raises:
        ConfigError: If there is none.
    """
    if (name or DEFAULT) not in tables:
        msg = f"No sampler {name!r}; there is: {', '.join(tables)}."
        raise ConfigError(msg)
    return tables[name or DEFAULT]


def networks_of(tables: Tables) -> tuple[str, ...]:
    """Return the names of the networks that any table calls, in order of first use, then those that edits call."""
    called = [name for table in tables.values() for name in table.networks]
    return tuple(dict.fromkeys([*called, *encoders_of(tables)]))


def encoders_of(tables: Tables) -> tuple[str, ...]:
    """Return the names of the networks that make latents of images."""
    names = (table.encoder for table in tables.values())
    return tuple(dict.fromkeys(name for name in names if name is not None))


def tokenizers_of(tables: Tables) -> tuple[str, ...]:
    """Return the files of the tokenizers that any table needs.

    Raises:
        BundleError: If one of them has the name of something else that lies there.
    """
    texts = (table.condition("text") for table in tables.values())
    names = tuple(dict.fromkeys(name for item in texts if item for name in item.tokenizers))
    for name in names:
        if not _NAME.fullmatch(name) or name in (TABLE, "edgedistill.json", "student.json"):
            msg = f"A tokenizer's file cannot be named {name!r}; name it such as tokenizer.json."
            raise BundleError(msg)
    return names
