"""A student with other weights for one of its networks, such as a guide plugged into a fine-tuned base."""

import dataclasses
import shutil
from pathlib import Path

from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import sha256, written_aside
from edgedistill.models import store
from edgedistill.student import EXAMPLES, Student
from edgedistill.tables import tokenizers_of


def replace_network(student: Student, name: str, source: Path, output: Path) -> Student:
    """Write a copy of a student whose network `name` has the weights in `source`.

    Plugging a guide into another base takes two lines::

        guided = Student.open("digits-guide")
        replace_network(guided, "unet", Path("my-fine-tune/unet"), Path("my-guided-fine-tune"))

    Args:
        student: What is copied; the students of earlier phases that lie in its folder are left out.
        name: Of the network.
        source: Folder with a diffusers network of the same parameters; inputs that have none, such as
            residuals, are the student's.
        output: Folder to make.

    Raises:
        BundleError: If the student has no such network, or the weights cannot be read or do not fit.
        ConfigError: If `output` exists.
    """
    if name not in student.signatures:
        msg = f"{student.root}: has no network {name!r}, only: {', '.join(student.signatures)}."
        raise BundleError(msg)
    if output.exists():
        msg = f"{output}: exists; choose another folder."
        raise ConfigError(msg)
    network, given = store.load(student.folder(name)), store.load(source).state_dict()
    own = {key: value.shape for key, value in network.state_dict().items()}
    if own != {key: value.shape for key, value in given.items()}:
        msg = f"{source}: its parameters are not those of the student's network {name!r}; give a fine-tune of the same architecture."
        raise BundleError(msg)
    network.load_state_dict(given)
    replaced = {name: " ".join(map(sha256, store.weights_of(network, source).all))}
    provenance = {**student.provenance, "replaced": replaced}
    with written_aside(output) as aside:
        _copy(student, aside)
        store.save(network, dataclasses.replace(student, root=aside).folder(name))
        dataclasses.replace(student, root=aside, provenance=provenance).write_manifest()
    return Student.open(output)


def _copy(student: Student, target: Path) -> None:
    """Copy a student's networks, scheduler, tokenizers and examples."""
    folders = {student.folder(name) for name in student.signatures}
    for folder in sorted({*folders, student.root / "scheduler"}):
        if folder.is_dir():
            shutil.copytree(folder, target / folder.relative_to(student.root))
    for name in (*tokenizers_of(student.samplers), EXAMPLES):
        if (student.root / name).is_file():
            shutil.copy2(student.root / name, target / name)
