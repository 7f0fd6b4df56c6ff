"""A student whose guidance is an input to one whose guidance lies in its weights."""

import dataclasses
import shutil
from pathlib import Path

from edgedistill.contract import Signature
from edgedistill.edits import baked
from edgedistill.errors import ConfigError
from edgedistill.models import store
from edgedistill.models.unet import ExtendedUNet2DModel, bake_guidance
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
        network = store.load(student.folder(name))
        if not isinstance(network, ExtendedUNet2DModel):
            msg = f"Guidance cannot be baked into network {name!r}, a {type(network).__name__}; export it as an input."
            raise ConfigError(msg)
        store.save(bake_guidance(network, guidance_scale - 1), target)
    for name in (*tokenizers_of(student.samplers), EXAMPLES):
        if (student.root / name).is_file():
            shutil.copy2(student.root / name, folder / name)
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
