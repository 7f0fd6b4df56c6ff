"""Students of one router that were trained by different runs, put into one folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from edgedistill.errors import ConfigError
from edgedistill.files import sha256, written_aside
from edgedistill.methods.msd import ROUTED
from edgedistill.student import MANIFEST, Student
from edgedistill.tables import networks_of

_OF_THE_RUN = (MANIFEST, "training")


def join(parts: Sequence[Path], output: Path, *, overwrite: bool = False) -> Student:
    """Write one student folder that holds the networks of several.

    Args:
        parts: Student folders with the same samplers.
        output: Folder to make.
        overwrite: Replace `output`, whatever it is.

    Raises:
        BundleError: If a part cannot be read, or changed since it was written.
        ConfigError: If `output` exists, the parts have other samplers or hold different networks of the
            same name, or some network is in none of them.
    """
    if output.exists() and not overwrite:
        msg = f"{output}: exists; choose another folder or add --overwrite."
        raise ConfigError(msg)
    students = [Student.open(part) for part in parts]
    first = students[0]
    homes: dict[str, Student] = {}
    for student in students:
        student.verify()
        if student.samplers != first.samplers:
            msg = f"{student.root} and {first.root} have different samplers, so they are not parts of one student; distil them from one recipe and one seed."
            raise ConfigError(msg)
        for name in student.signatures:
            other = homes.setdefault(name, student)
            if _digests(student, name) != _digests(other, name):
                msg = f"{student.root} and {other.root} hold different networks `{name}`; name one of them."
                raise ConfigError(msg)
    if missing := set(networks_of(first.samplers)) - set(homes):
        msg = f"No part holds {', '.join(sorted(missing))}; distil these and name them too."
        raise ConfigError(msg)
    with written_aside(output) as aside:
        for student in students:
            _copy(student, aside)
        _joined(students, aside).write_manifest()
    return Student.open(output)


def _digests(student: Student, network: str) -> list[tuple[str, str]]:
    folder = student.folder(network)
    return [(path.name, sha256(path)) for path in sorted(folder.rglob("*")) if path.is_file()]


def _copy(student: Student, folder: Path) -> None:
    """Copy what belongs to a student, without the record of its training."""
    ignored = shutil.ignore_patterns(*_OF_THE_RUN)
    shutil.copytree(student.root, folder, dirs_exist_ok=True, ignore=ignored)


def _joined(students: Sequence[Student], folder: Path) -> Student:
    first = students[0]
    parameters = {k: v for s in students for k, v in s.provenance["parameters"].items()}
    recipes = [student.provenance["recipe_fingerprint"] for student in students]
    return Student(
        folder,
        f"{first.provenance['recipe']['name']}-{ROUTED}",
        first.table,
        {name: item for student in students for name, item in student.signatures.items()},
        {**first.provenance, "parameters": parameters, "joined_recipe_fingerprints": recipes},
        first.further,
        {k: v for student in students for k, v in student.folders.items()},
    )
