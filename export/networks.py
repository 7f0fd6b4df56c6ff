"""The networks of a student as an export takes them: which, of what size, opened, and held to its manifest."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from edgedistill.contract import LENGTH, Signature, TensorSpec
from edgedistill.errors import ConfigError, ContractError
from edgedistill.files import sha256
from edgedistill.models import store
from edgedistill.student import Student
from edgedistill.tables import networks_of
from edgedistill.weight_files import weights_in

from .formats import ExportOptions

Networks = Mapping[str, nn.Module]


def chosen_networks(student: Student, options: ExportOptions) -> tuple[str, ...]:
    """Return the names of the networks that become graphs.

    Raises:
        ConfigError: If one is asked for that the student does not have.
    """
    held = networks_of(student.samplers)
    if unknown := sorted(set(options.networks) - set(held)):
        msg = f"{student.root}: no network {', '.join(map(repr, unknown))}; choose of {', '.join(held)}."
        raise ConfigError(msg)
    return tuple(name for name in held if name in options.networks) or held


def sizes(student: Student) -> dict[str, int]:
    """Return the bytes of float32 weights of each network that the tables call, from their configurations."""
    names = [name for name in networks_of(student.samplers) if name in student.signatures]
    return {
        name: weight_bytes(
            store.facing(store.sketch(student.folder(name)), student.signatures[name])
        )
        for name in names
    }


def weight_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's weights, which may be on no device."""
    return sum(value.nbytes for value in network.state_dict().values())


def open_networks(student: Student, sketched: Collection[str] = ()) -> Networks:
    """Load what a table calls, each folder once, and hold it to the student's manifest.

    Args:
        student: Whose networks they are.
        sketched: Names of those of which no weight is read.

    Raises:
        ContractError: If a network is not in the manifest, or takes or gives something else.
    """
    networks: dict[str, nn.Module] = {}
    loaded: dict[tuple[Path, bool], nn.Module] = {}
    for name in networks_of(student.samplers):
        if name not in student.signatures:
            msg = f"{student.root}: the table calls network {name!r}, but the student holds only: {', '.join(student.signatures)}; distil it anew, or take the table that was written with these networks."
            raise ContractError(msg)
        folder = student.folder(name)
        key = folder, name in sketched
        if key not in loaded:
            loaded[key] = (store.sketch if name in sketched else store.load)(folder)
        networks[name] = store.facing(loaded[key], student.signatures[name])
        shared = name in student.folders
        if not _fits(student.signatures[name], store.signature(networks[name]), shared=shared):
            msg = f"{folder}: its inputs and outputs are not those of the student's manifest: its config.json was changed since; put the network's own back, or distil it anew."
            raise ContractError(msg)
    student.verify()  # last: what is wrong with a network says more than that it changed
    return networks


def _fits(stated: Signature, found: Signature, *, shared: bool) -> bool:
    """Whether a network is the stated one; one that shares its folder may be stated for other sizes."""

    def plain(spec: TensorSpec) -> tuple[object, ...]:
        return spec.name, spec.dtype, spec.kind, len(spec.shape) if shared else spec.shape

    sides = [(stated.inputs, found.inputs), (stated.outputs, found.outputs)]
    return all([*map(plain, a)] == [*map(plain, b)] for a, b in sides)


def signatures_of(student: Student, batch: int | str) -> dict[str, Signature]:
    """Return what each network takes in a bundle: a fixed number of tokens, and this batch."""
    texts = [table.condition("text") for table in student.samplers.values()]
    lengths = [text.length for text in texts if text is not None and text.length is not None]
    sizes = {LENGTH: lengths[0]} if lengths else {}
    names = networks_of(student.samplers)
    return {name: student.signatures[name].with_batch(batch).bind(**sizes) for name in names}


def digest(folder: Path) -> str:
    """Return what folders of equal weights have in common."""
    return " ".join(f"{path.name} {sha256(path)}" for path in weights_in(folder))
