"""A student whose guidance is an input to one whose guidance lies in its weights."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import init_empty_weights

from edgedistill.contract import Signature
from edgedistill.edits import baked
from edgedistill.files import write_json
from edgedistill.models import store
from edgedistill.models.extend import bake
from edgedistill.models.variant import link_part
from edgedistill.student import EXAMPLES, MANIFEST, Student
from edgedistill.tables import tokenizers_of


@dataclass(frozen=True, eq=False)
class Baking:
    """A student put together of links, whose guidance is still to be worked into its weights.

    Fields:
        student: Its configurations, signatures and tables are what they will be.
        source: Folders of the networks to bake, by the folder that each gets.
        w: Meng's guidance weight.
    """

    student: Student
    source: dict[Path, Path]
    w: float

    def merge(self) -> Student:
        """Bake the networks; this is the work."""
        for target, source in self.source.items():
            shutil.rmtree(target)
            store.save(bake(store.load(source), self.w), target)
        self.student.write_manifest()
        return Student.open(self.student.root)


def bake_student(student: Student, guidance_scale: float, folder: Path) -> Student:
    """Write a student that samples as another does at one guidance scale; arguments and errors as of `link_baked`."""
    return link_baked(student, guidance_scale, folder).merge()


def link_baked(student: Student, guidance_scale: float, folder: Path) -> Baking:
    """Put a student together that samples as `student` does at one guidance scale, and takes none; no weights are read.

    Args:
        student: Its tables' guidance is ``embedded``.
        guidance_scale: g, where 1 is no guidance.
        folder: An empty folder to write it to.

    Raises:
        ConfigError: If guidance is no input of this student, the scale was not trained for, or a network
            takes it that cannot be baked.
    """
    tables = {name: baked(table, guidance_scale) for name, table in student.samplers.items()}
    w, weight = guidance_scale - 1, student.table.guidance.input
    signatures = {name: _without(item, weight) for name, item in student.signatures.items()}
    taking = {name for name, item in student.signatures.items() if item != signatures[name]}
    bakings = {}
    for name in sorted(student.signatures, key=taking.__contains__, reverse=True):
        source, target = student.folder(name), folder / student.folders.get(name, name)
        if target.exists():
            continue
        link_part(source, target)
        if name in taking:
            write_json(target / "config.json", _baked_config(source, w))
            bakings[target] = source
    # The manifest says that it is a student; what it says of it is written when the weights are there.
    for name in (*tokenizers_of(student.samplers), EXAMPLES, MANIFEST):
        link_part(student.root / name, folder / name)
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
    return Baking(made, bakings, w)


def _baked_config(folder: Path, w: float) -> dict[str, object]:
    """Return the configuration of the stock network that a folder's will be, or refuse what cannot be baked."""
    with init_empty_weights():
        return store.config_of(bake(store.sketch(folder), w))


def _without(signature: Signature, name: str | None) -> Signature:
    inputs = tuple(spec for spec in signature.inputs if spec.name != name)
    return Signature(inputs, signature.outputs)
