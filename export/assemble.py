"""Student to bundle: the reference, its probes, and one artifact per format and precision, all or nothing."""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import edgedistill
from edgedistill import plugins
from edgedistill.bundle import (
    CALIBRATION,
    GOLDEN,
    REFERENCE,
    TABLE,
    Artifact,
    Bundle,
    Draft,
    NetworkFile,
    start_from,
    write_bundle,
)
from edgedistill.contract import BATCH
from edgedistill.errors import ContractError
from edgedistill.models import store
from edgedistill.network import CheckedNetwork
from edgedistill.probes import (
    golden_samples,
    record_calibration,
    record_golden,
    save_probes,
    spread_conditions,
)
from edgedistill.student import Student
from edgedistill.validate import check

from .formats import FORMATS, ExportOptions, Job, jobs

CALIBRATION_SEEDS = range(1000, 1032)  # none of them golden

Networks = Mapping[str, nn.Module]
Progress = Callable[[str, int, int], None]  # what is written next, how many are done, of how many


def export_student(
    student: Student,
    target: Path,
    formats: Sequence[str],
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a student to a bundle, or add formats to the bundle that it already has.

    What the bundle holds with the same options is kept, so an export that is run again does nothing.
    The bundle appears, or changes, only when everything asked for is written and checked.

    Args:
        student: An opened student folder.
        target: The bundle's folder.
        formats: Names in `FORMATS`, or just ``"all"``.
        options: None: the defaults.
        progress: Told before each artifact, and once at the end.

    Raises:
        BundleError: If `target` holds a bundle of another student or something else, or the student's
            weights are missing, damaged or not finite.
        CheckFailedError: If a graph strays from PyTorch.
        ConfigError: If a format is unknown or is not written in the dtype asked for, or the table is not
            what its annotations say.
        ContractError: If the student's networks are not what its manifest and its table say.
        MissingDependencyError: If a package that a format needs is not installed.
    """
    options = options or ExportOptions()
    wanted = {job.name: job for job in jobs(formats, options)}
    base = start_from(target, _without_artifacts(student), overwrite=options.overwrite)
    kept = [name for name, held in base.artifacts.items() if _still_wanted(held, wanted.get(name))]
    missing = [job for name, job in wanted.items() if name not in kept]
    if base.artifacts and not missing:
        return base
    return write_bundle(
        target, base, functools.partial(_fill, student, missing, progress or _silent), kept
    )


def _without_artifacts(student: Student) -> Bundle:
    provenance = {**student.provenance, "exported_by": f"edgedistill {edgedistill.__version__}"}
    return Bundle(student.root, student.name, student.fingerprint, student.table, {}, provenance)


def _still_wanted(held: Artifact, job: Job | None) -> bool:
    return job is None or held.made_with.get("options") == job.settings


def _fill(student: Student, missing: Sequence[Job], progress: Progress, draft: Draft) -> None:
    check(student.table, str(student.root / TABLE))
    networks = _open_networks(student)
    steps: list[tuple[str, Callable[[], None]]] = []
    if REFERENCE not in draft.artifacts:
        steps.append((REFERENCE, functools.partial(_add_reference, draft, student)))
    steps += [(job.name, functools.partial(_add, draft, student, networks, job)) for job in missing]
    for done, (name, write) in enumerate(steps):
        progress(name, done, len(steps))
        write()
    progress("", len(steps), len(steps))


def _open_networks(student: Student) -> Networks:
    """Load every network that the table calls, and hold it to the student's manifest.

    Raises:
        ContractError: If a network is not in the manifest, or takes or gives something else.
    """
    networks = {}
    for name in student.table.networks:
        if name not in student.signatures:
            msg = f"{student.root}: the table calls network {name!r}, but the student holds only: {', '.join(student.signatures)}."
            raise ContractError(msg)
        networks[name] = store.load(student.root / name)
        if store.signature(networks[name]) != student.signatures[name]:
            msg = f"{student.root / name}: its inputs and outputs are not those of the student's manifest; distil it anew."
            raise ContractError(msg)
    student.verify()  # last: what is wrong with a network says more than that it changed
    return networks


def _add_reference(draft: Draft, student: Student) -> None:
    """Copy the networks as they are, and record the probes with them."""
    files, reference = {}, {}
    for name in student.table.networks:
        path, signature = f"torch/float32/{name}", student.signatures[name]
        (draft.root / path).mkdir(parents=True)
        for part in ("config.json", store.WEIGHTS):
            shutil.copy2(student.root / name / part, draft.root / path / part)
        session = plugins.find(plugins.RUNTIMES, "torch").open(draft.root / path, signature, {})
        files[name] = NetworkFile(path, signature)
        reference[name] = CheckedNetwork(name, signature, session)
    made_with = {"torch": torch.__version__, "options": {}}
    draft.add(Artifact(REFERENCE, "torch", "torch", "float32", files, made_with))
    table = student.table
    golden = record_golden(table, reference, *golden_samples(table))
    save_probes(golden, draft.root / GOLDEN)
    given = spread_conditions(table, len(CALIBRATION_SEEDS))
    calibration = record_calibration(table, reference, CALIBRATION_SEEDS, given)
    save_probes(calibration, draft.root / CALIBRATION)


def _add(draft: Draft, student: Student, networks: Networks, job: Job) -> None:
    form = FORMATS[job.format]
    files, reports = {}, []
    for name, network in networks.items():
        path = f"{job.format}/{job.precision}/{name}{form.suffix}"
        signature = student.signatures[name].with_batch(job.settings["batch"] or BATCH)
        reports.append(
            form.write(network, signature, draft.root / path, job.precision, job.settings)
        )
        files[name] = NetworkFile(path, signature)
    made_with = {
        **reports[0],
        "snr_db": min(report["snr_db"] for report in reports),
        "options": dict(job.settings),
    }
    draft.add(Artifact(job.name, form.runtime, job.format, job.precision, files, made_with))


def _silent(_what: str, _done: int, _total: int) -> None:
    pass
