"""A student whose guidance is an input to one whose guidance lies in its weights."""

import dataclasses
import shutil
from pathlib import Path

from edgedistill.contract import Signature
from edgedistill.edits import baked
from edgedistill.models import store
from edgedistill.models.extend import bake
from edgedistill.student import EXAMPLES, Student
from edgedistill.tables import tokenizers_of


def bake_student(student: Student, guidance_scale: float, folder: Path) -> Student:
    """Write a student that samples as `student` does at one guidance scale, and takes none.

    Args:
        student: Its tables' guidance is ``embedded``.
        guidance_scale: g, where 1 is no guidance.
        folder: An empty folder to write it to.

    Raises:
        ConfigError: If guidance is no input of this student, the scale was not trained for, or a network
            takes it that cannot be baked.
    """
    tables = {name: baked(table, guidance_scale) for name, table in student.samplers.items()}
    weight = student.table.guidance.input
    signatures = {}
    for name, signature in student.signatures.items():
        signatures[name] = _without(signature, weight)
        if (target := folder / student.folders.get(name, name)).exists():
            continue
        if signatures[name] == signature:
            shutil.copytree(student.folder(name), target)
            continue
        store.save(bake(store.load(student.folder(name)), guidance_scale - 1), target)
    for name in (*tokenizers_of(student.samplers), EXAMPLES):
        source = student.root / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copy2(source, folder / name)
    default, *further = tables
    made = dataclasses.replace(
        student,
        root=folder,
        name=f"{student.name}-g{guidance_scale:g}",
        table=tables[default],
        further={name: tables[name] for name in further},
        signatures=signatures,
        provenance={**student.provenance, "baked_guidance_scale": guidance_scale},
    )
    made.write_manifest()
    return Student.open(folder)


def _without(signature: Signature, name: str | None) -> Signature:
    inputs = tuple(spec for spec in signature.inputs if spec.name != name)
    return Signature(inputs, signature.outputs)
