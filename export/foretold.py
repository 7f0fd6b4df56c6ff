"""What an export is about to write, as tasks with estimates of what they take."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgedistill.bundle import REFERENCE
from edgedistill.contract import BATCH
from edgedistill.student import Student
from edgedistill.table import SamplerTable
from edgedistill.tables import choose, networks_of
from edgedistill.weight_files import weights_in

from .budget import Task, memory, seconds, task
from .calls import Size, sizes_of, together
from .formats import Job
from .frozen import FREE_SIZES
from .layouts import CONTROLNET, SINGLE_ROOT

TOGETHER = "all networks together"
_DENOISERS = ("unet", CONTROLNET)


@dataclass(frozen=True)
class Probing:
    """How the reference is called for the probes.

    Fields:
        samples: How many are drawn, golden ones and those to calibrate on.
        batch: How many of them at once.
    """

    samples: int
    batch: int


def tasks_of(
    student: Student, missing: Sequence[tuple[Job, Collection[str]]], probing: Probing | None
) -> list[Task]:
    """Return what is to be written, the reference first.

    Args:
        student: What is exported.
        missing: Artifacts, each with the names of the networks that it lacks.
        probing: How the reference is called; None: it is there.
    """
    sizes = sizes_of(student, networks_of(student.samplers))
    tasks = [_reference(student, sizes, probing)] if probing is not None and sizes else []
    for job, names in missing:
        tasks += _of_job(student, sizes, job, names)
    return tasks


def _reference(student: Student, sizes: Mapping[str, Size], probing: Probing) -> Task:
    whole = together([*sizes.values()])
    # Halves of an autoencoder are of one folder; networks that differ in the size of images have the same weights.
    held = {(student.folder(name), size.weights) for name, size in sizes.items()}
    flops = sum(_flops(table, sizes) for table in student.samplers.values())
    size = Size(sum(weights for _, weights in held), whole.layer, whole.attention, flops)
    files = {part for folder, _ in held for part in weights_in(folder)}
    return Task(
        TOGETHER,
        REFERENCE,
        memory("torch", size, probing.batch),
        sum(part.stat().st_size for part in files),
        seconds=seconds("torch", size, probing.samples),
    )


def _of_job(
    student: Student, sizes: Mapping[str, Size], job: Job, names: Collection[str]
) -> Iterator[Task]:
    kind = job.format, job.precision
    if job.sampler is None:
        for name in names:
            if name in sizes:
                yield task(name, job.name, kind, sizes[name], _batch(job, name))
        return
    table = choose(student.samplers, job.sampler)
    if called := {name: sizes[name] for name in table.networks if name in sizes}:
        whole = together([*called.values()])
        size = Size(whole.weights, whole.layer, whole.attention, _flops(table, called))
        yield task(TOGETHER, job.name, kind, size, _batch(job, TOGETHER))


def _batch(job: Job, name: str) -> int:
    """Return how many samples a written graph is checked with."""
    if job.layout != SINGLE_ROOT:
        return int(job.settings.get("batch") or FREE_SIZES[BATCH])
    if job.format == "coreml":  # both calls of guidance at once, at most
        return 2 if name in _DENOISERS else 1
    return FREE_SIZES[BATCH]


def _flops(table: SamplerTable, sizes: Mapping[str, Size]) -> int:
    """Return the operations of one sample: the dearest network that rows call at every evaluation, others once."""
    around = {*(name for item in table.conditions for name in item.encoders), table.decoder}
    flops = {name: sizes[name].flops for name in table.networks if name in sizes}
    dearest = max((count for name, count in flops.items() if name not in around), default=0)
    return table.nfe * dearest + sum(count for name, count in flops.items() if name in around)
