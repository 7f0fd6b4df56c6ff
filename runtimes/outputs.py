"""What an app wrote on a device, against the golden tensors: no runtime is opened, arrays are compared."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgedistill.bundle import Artifact, Bundle
from edgedistill.environment import versions
from edgedistill.errors import ConfigError
from edgedistill.parity import ArtifactParity, ParityReport, RowParity, floor_of
from edgedistill.probes import CALLS, Golden
from edgedistill.table import SamplerTable
from edgedistill.tables import DEFAULT, choose, golden_file

from .summary import DEVICE
from .verify import as_called, compare_row, finished

_OUTPUT = "output"
_FORCED = ("raw", "x0", *CALLS)

Arrays = Mapping[str, np.ndarray]


def verify_outputs(
    bundle: Bundle,
    path: Path,
    *,
    precision: str | None = None,
    artifact: str | None = None,
    sampler: str | None = None,
) -> ParityReport:
    """Compare arrays that a device wrote with the golden tensors of the same names.

    A device that is fed the golden noise and conditions and runs freely writes ``row.{i}.next`` and ``output``;
    one that is fed ``row.{i}.state`` writes ``row.{i}.raw``, which then is the network's error alone. Any of
    these will do, and of the samples the first ones.

    Args:
        bundle: Holds the golden tensors (see `edgedistill.probes.record_golden`).
        path: A safetensors file.
        precision: Whose floors must be reached; None: those of the artifact.
        artifact: What ran on the device; None: not said. Where a guidance scale lies in its graphs, the
            samples are those of that scale.
        sampler: Whose golden tensors; None: the artifact's own, else the default's.

    Raises:
        BundleError: If there is no such artifact, or the golden tensors cannot be read.
        ConfigError: If neither precision nor artifact is given, there is no such precision or sampler, or the
            file cannot be compared: it is no safetensors, a name is unknown, a shape is another, what the
            device was fed is not golden, or nothing in it has a floor.
    """
    item = None if artifact is None else bundle.artifact(artifact)
    known = precision or (item.precision if item else None)
    if known is None:
        msg = f"{path}: say whose floors it must reach, such as --precision float16, or by --artifact what ran on the device."
        raise ConfigError(msg)
    floor_of(known)
    name = sampler or (item.sampler if item else None) or DEFAULT
    table = choose(bundle.samplers, name)
    place = bundle.path(golden_file(name))
    golden = Golden.load(place, table)
    if item is not None:
        golden = as_called(golden, table, item)
    held = _read(path)
    golden = _checked(path, held, golden, place)
    size = 0 if item is None else bundle.size(item)
    entry = ArtifactParity(path.name, DEVICE, _format(item), known, size, sampler=name)
    low, high = table.space["value_range"]
    return ParityReport(
        bundle.name,
        bundle.fingerprint,
        len(golden.output),
        (low, high),
        (_compared(entry, path, held, table, golden),),
        versions(),
        golden.output,
    )


def _format(item: Artifact | None) -> str:
    return DEVICE if item is None else item.format


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        msg = f"{path}: not a whole safetensors file ({error}); write it such as with safetensors.numpy.save_file."
        raise ConfigError(msg) from error
    except KeyError as error:
        msg = f"{path}: numpy has no numbers of the type {error}; write float32 or float16."
        raise ConfigError(msg) from error


def _checked(path: Path, held: Arrays, golden: Golden, place: Path) -> Golden:
    """Return as many golden samples as the file holds; refuse what cannot be compared with them."""
    fed, answers = _fed(golden), _answers(golden)
    if unknown := [name for name in held if name not in fed and name not in answers]:
        last = len(golden.rows) - 1
        msg = f"{path}: {', '.join(unknown[:3])} is no golden tensor; what is compared is named `output` and, for rows 0 to {last}, `row.0.next`, `row.0.raw` and so on, as in {place}."
        raise ConfigError(msg)
    count = next((len(value) for value in held.values() if value.ndim), 0)
    golden = golden.part(slice(max(count, 1)))
    expected = {**_fed(golden), **_answers(golden)}
    for name, value in held.items():
        if value.shape != expected[name].shape:
            msg = f"{path}: {name} must be {_shape(expected[name])}, the first samples of {place} in their order of axes, got {_shape(value)}."
            raise ConfigError(msg)
        if name in fed and not np.array_equal(value, expected[name]):
            msg = f"{path}: {name} is what the device was fed, and not that of {place}; feed it as it lies there, or leave it out if the device made it."
            raise ConfigError(msg)
    return golden


def _fed(golden: Golden) -> dict[str, np.ndarray]:
    return {
        **{f"noise.{k}": bank for k, bank in enumerate(golden.noise)},
        **{f"condition.{name}": value for name, value in golden.conditions.items()},
        **{f"row.{i}.state": row["state"] for i, row in enumerate(golden.rows)},
    }


def _answers(golden: Golden) -> dict[str, np.ndarray]:
    made = {
        f"row.{i}.{what}": value
        for i, row in enumerate(golden.rows)
        for what, value in row.items()
        if what != "state"
    }
    return {**made, _OUTPUT: golden.output}


def _shape(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape)) or "a number"


def _compared(
    entry: ArtifactParity, path: Path, held: Arrays, table: SamplerTable, golden: Golden
) -> ArtifactParity:
    answers = [name for name in held if name in _answers(golden)]
    described = f"{len(answers)} of {len(_answers(golden))} golden tensors, from {path}"
    entry = replace(entry, described=described)
    if bad := [name for name in answers if not np.isfinite(held[name]).all()]:
        return replace(entry, broken=f"NaN or infinity in {', '.join(bad[:3])}.")
    entry = replace(entry, rows=tuple(_rows(held, table, golden)))
    if _OUTPUT in held:
        entry = finished(entry, table, golden, held[_OUTPUT])
    if (entry.worst_forced, entry.worst_free, entry.image) == (None, None, None):
        msg = f"{path}: nothing in it has a floor; write `output`, or `raw` or `next` of a row, such as `row.0.raw`."
        raise ConfigError(msg)
    return entry


def _rows(held: Arrays, table: SamplerTable, golden: Golden) -> list[RowParity]:
    found = []
    for index, (row, kept) in enumerate(zip(table.rows, golden.rows, strict=True)):
        own = {what: held[f"row.{index}.{what}"] for what in kept if f"row.{index}.{what}" in held}
        forced = {what: own[what] for what in _FORCED if what in own}
        if forced or "next" in own:
            found.append(compare_row(index, row, kept, forced, own.get("next")))
    return found
