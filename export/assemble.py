"""Student to bundle: the reference, its probes, and one artifact per format and precision, each whole or not at all."""

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

import edgedistill
from edgedistill.bundle import REFERENCE, Artifact, Bundle, NetworkFile
from edgedistill.contract import BATCH, Signature
from edgedistill.drafts import Draft, another_student, refuse_taken, start_from, write_bundle
from edgedistill.errors import BundleError
from edgedistill.manifest import MANIFEST
from edgedistill.models.variant import done_to_weights
from edgedistill.student import Student
from edgedistill.tables import choose, networks_of, table_file
from edgedistill.validate import check

from . import budget
from .budget import Task
from .dialects import plain
from .foretold import tasks_of
from .formats import FORMATS, ExportOptions, Job, jobs, require_modules
from .layouts import SINGLE_ROOT
from .loader_files import check_jobs, write_loader_files
from .networks import (
    Networks,
    chosen_networks,
    digest,
    open_networks,
    signatures_of,
    sizes,
    weight_bytes,
)
from .outdated import outdated_files
from .reference import add_reference, probing
from .single_graph import refuse, unrolled
from .single_root import check_target, in_dialects
from .stages import about
from .worker import in_child, works_alone

Progress = Callable[[str, int, int], None]  # what is written next, how many are done, of how many
Foretold = Callable[[list[str]], None]
Missing = Sequence[tuple[Job, Collection[str]]]  # what is written, with the networks it lacks


def export_student(
    student: Student,
    target: Path,
    formats: Sequence[str],
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    foretold: Foretold | None = None,
) -> Bundle:
    """Export a student to a bundle, or add formats to the bundle that it already has.

    What the bundle holds with the same options is kept, so an export that is run again does nothing; but files
    around the graphs that it would write otherwise by now are replaced.
    The bundle appears with the reference and the first artifact, and changes with each further one, when it is
    written and checked: what is finished stays, whatever becomes of the next, and is not written again.

    Args:
        student: An opened student folder.
        target: The bundle's folder.
        formats: Names in `FORMATS`, or just ``"all"``.
        options: None: the defaults.
        progress: Told before each artifact, and once at the end.
        foretold: Told in lines, before any work, what each network will take, and which files of loaders are replaced.

    Raises:
        BundleError: If `target` holds a bundle of another student or something else, or the student's
            weights are missing, damaged or not finite.
        CheckFailedError: If a graph strays from PyTorch.
        ConfigError: If a format is unknown or is not written in the dtype asked for, the table is not
            what its annotations say, or more memory or disk is needed than there is.
        ContractError: If the student's networks are not what its manifest and its table say.
        MissingDependencyError: If a package that a format needs is not installed.
    """
    options = options or ExportOptions()
    wanted = _wanted(student, formats, options)
    base = start_from(target, _without_artifacts(student), overwrite=options.overwrite)
    kept, missing = _kept_and_missing(student, target, wanted, options, base)
    outdated = _outdated(student, base, options)
    if base.artifacts and not missing and not outdated:
        return base
    tasks = _estimated(student, target, options, kept, missing)
    replaced = [name for name, there in outdated.items() if there]
    (foretold or _silent)([*budget.lines(tasks), *_told_of(target, replaced)])
    isolate = budget.isolation(options.isolate, sizes(student), tasks, options.max_memory)
    options = replace(options, isolate=isolate)
    return _write_one_by_one(student, target, options, (base, kept), missing, progress or _silent)


def check_export(
    student: Student, target: Path, formats: Sequence[str], options: ExportOptions
) -> None:
    """Refuse what `export_student` would refuse, as far as no weights are needed to know it.

    Args:
        student: Its weights may not be yet what they will be.
        target, formats, options: As for `export_student`.

    Raises:
        BundleError, ConfigError, ContractError, MissingDependencyError: As `export_student`.
    """
    refuse_taken(target)
    wanted = _wanted(student, formats, options)
    held = Bundle(student.root, student.name, "", student.table, {}, further=student.further)
    if not options.overwrite and (target / MANIFEST).is_file():
        held = Bundle.open(target, whole=False)
        if _told(held) != _told(student):
            raise another_student(target, held, student.name, student.samplers)
    kept, missing = _kept_and_missing(student, target, wanted, options, held)
    _estimated(student, target, options, kept, missing)


def _told(held: Bundle | Student) -> Any:
    """Return what tells two students apart without their weights: tables, and what was done to the weights."""
    tables = {name: item.to_json() for name, item in held.samplers.items()}
    return json.dumps(tables, sort_keys=True), done_to_weights(held.provenance)


def _wanted(student: Student, formats: Sequence[str], options: ExportOptions) -> dict[str, Job]:
    """Return what is asked for, by the names of the artifacts, if it can be written at all."""
    if options.single_graph is not None:
        refuse(choose(student.samplers, options.single_graph))
    wanted = {job.name: job for job in jobs(formats, options)}
    if options.layout == SINGLE_ROOT:
        check_jobs(student, wanted.values())
    return wanted


def _kept_and_missing(
    student: Student,
    target: Path,
    wanted: Mapping[str, Job],
    options: ExportOptions,
    base: Bundle,
) -> tuple[dict[str, Artifact], list[tuple[Job, list[str]]]]:
    """Return the artifacts of `base` that stay, and the jobs to do with the networks that each lacks."""
    names = chosen_networks(student, options)
    kept = {
        name: held
        for name, held in base.artifacts.items()
        if _still_wanted(held, wanted.get(name), names, target)
    }
    missing = [(job, _lacking(kept.get(job.name), names)) for job in wanted.values()]
    missing = [(job, lacking) for job, lacking in missing if lacking]
    if options.layout == SINGLE_ROOT:
        check_target(target, [*kept], [job for job, _ in missing], base)
    return kept, missing


def _outdated(student: Student, base: Bundle, options: ExportOptions) -> Mapping[str, bool]:
    """Return which files loaders would be given of a bundle otherwise by now; see `outdated_files`."""
    formats = {artifact.format for artifact in base.artifacts.values()}
    if options.layout != SINGLE_ROOT or not formats:
        return {}
    return outdated_files(student, base.root, formats)


def _told_of(target: Path, replaced: Collection[str]) -> Iterator[str]:
    """Say which files are replaced."""
    if replaced:
        yield f"{target}: replaces {', '.join(replaced)}, which this release writes otherwise."


def _estimated(
    student: Student,
    target: Path,
    options: ExportOptions,
    kept: Collection[str],
    missing: Missing,
) -> list[Task]:
    """Return what is to be written, if there are the packages, the memory and the disk for it."""
    require_modules(job for job, _ in missing)
    tasks = tasks_of(student, missing, None if REFERENCE in kept else probing(student))
    budget.check(tasks, target, options.max_memory)
    return tasks


def _without_artifacts(student: Student) -> Bundle:
    provenance = {**student.provenance, "exported_by": f"edgedistill {edgedistill.__version__}"}
    return Bundle(
        student.root,
        student.name,
        student.fingerprint,
        student.table,
        {},
        provenance,
        student.further,
    )


def _still_wanted(held: Artifact, job: Job | None, names: Collection[str], target: Path) -> bool:
    """Whether what is there of an artifact stays; what was written with other options goes, if all of it is written anew."""
    if job is None or held.made_with.get("options") == job.settings:
        return True
    if job.sampler is None and not set(held.networks) <= set(names):
        msg = f"{target}: holds {held.name} with other options ({_differing(held, job)}); give the same, or leave --networks out to write all of it anew."
        raise BundleError(msg)
    return False


def _differing(held: Artifact, job: Job) -> str:
    """Say in what the options of an artifact differ from those asked for."""
    options = held.made_with.get("options", {})
    pairs = ((name, options.get(name), value) for name, value in job.settings.items())
    return ", ".join(f"{name} {old}, not {new}" for name, old, new in pairs if old != new)


def _lacking(held: Artifact | None, names: Collection[str]) -> list[str]:
    """Return which networks are to be written of an artifact; of a sampler as one graph all or none."""
    if held is not None and held.sampler is not None:
        return []
    return [name for name in names if held is None or name not in held.networks]


def _write_one_by_one(
    student: Student,
    target: Path,
    options: ExportOptions,
    held: tuple[Bundle, Collection[str]],
    missing: Missing,
    progress: Progress,
) -> Bundle:
    """Write each artifact into the bundle when it is finished; what is written anew stays as it is until then.

    Args:
        student, target, options: As of `export_student`.
        held: What the first starts from, and the names of its artifacts that stay.
        missing: What is to be written.
        progress: As of `export_student`.
    """
    for name, table in student.samplers.items():
        check(table, str(student.root / table_file(name)))
    apart = {name for name, size in sizes(student).items() if works_alone(options.isolate, size)}
    networks, alone = _open(student, apart, missing), bool(apart)
    bundle, kept = held
    first = [] if REFERENCE in bundle.artifacts else [REFERENCE]
    steps = [*first, *(job.name for job, _ in missing)]
    tells = (functools.partial(progress, name, i, len(steps)) for i, name in enumerate(steps))
    for part in [[item] for item in missing] or [[]]:
        anew = {job.name for job, _ in part}.difference(kept)
        fill = functools.partial(_fill, student, options, networks, alone, part, tells)
        keep = [name for name in bundle.artifacts if name not in anew]
        bundle = write_bundle(target, bundle, fill, keep)
    progress("", len(steps), len(steps))
    return bundle


def _open(student: Student, apart: Collection[str], missing: Missing) -> Networks:
    """Open the networks; what is written in processes of their own, or not at all, is never read in this one."""
    unused = set(student.signatures).difference(*(names for _, names in missing))
    one_graph = any(job.sampler is not None for job, _ in missing)
    return open_networks(student, set() if one_graph else unused | set(apart))


def _fill(
    student: Student,
    options: ExportOptions,
    networks: Networks,
    alone: bool,  # noqa: FBT001
    missing: Missing,
    tells: Iterator[Callable[[], None]],
    draft: Draft,
) -> None:
    if REFERENCE not in draft.artifacts:
        next(tells)()
        add_reference(draft, student, options.layout, alone=alone)
    for job, names in missing:
        next(tells)()
        _add(draft, student, networks, options.isolate, job, names)
    if options.layout == SINGLE_ROOT:
        held = {artifact.format for artifact in draft.artifacts.values()}
        write_loader_files(student, draft.root, held)


def _graphs(
    student: Student, networks: Networks, job: Job, names: Collection[str]
) -> Mapping[str, tuple[nn.Module, Signature]]:
    """Return what becomes a graph each, by name: the networks called so, or a whole sampler."""
    signatures = signatures_of(student, job.settings.get("batch") or BATCH)
    if job.sampler is not None:
        return unrolled(student, networks, signatures, job)
    signatures = {name: signatures[name] for name in names}
    if job.layout == SINGLE_ROOT:
        return in_dialects(student, networks, signatures, job)
    return {name: (networks[name], signature) for name, signature in signatures.items()}


def _add(
    draft: Draft,
    student: Student,
    networks: Networks,
    isolate: str,
    job: Job,
    names: Collection[str],
) -> None:
    """Write an artifact, or those of its networks that it lacks; what is the same is one file."""
    form, held = FORMATS[job.format], draft.artifacts.get(job.name)
    files = dict(held.networks) if held else {}
    reports = [dict(held.made_with)] if held else []
    written = {(digest(student.folder(name)), f.signature): f.path for name, f in files.items()}
    for name, (network, signature) in _graphs(student, networks, job, names).items():
        residuals = signature.input("residual") is not None
        own = job.path(name, student.name, controlled=residuals)
        weights = digest(student.folder(name)) if name in student.signatures else name
        path = written.setdefault((weights, signature), own)
        if path == own:
            place_of = draft.root / path
            with about(name):
                if works_alone(isolate, weight_bytes(network)):
                    what = f"{job.name}, {name}"
                    report, used = in_child(_write_alone, student, job, name, place_of, what=what)
                    reports.append({**report, **asdict(used)})
                else:
                    reports.append(_write(network, signature, job, place_of, consume=False))
        files[name] = NetworkFile(path, signature)
    made_with = {
        **reports[0],
        "snr_db": min(report["snr_db"] for report in reports),
        **_used(reports),
        "options": dict(job.settings),
    }
    draft.add(
        Artifact(
            job.name,
            form.runtime,
            job.format,
            job.precision,
            files,
            made_with,
            job.sampler,
            _scale_inside(student, files),
        )
    )


def _scale_inside(student: Student, files: Mapping[str, NetworkFile]) -> float | None:
    """Return the guidance scale that lies in graphs, if they take none and their networks do."""
    guidance = student.table.guidance
    inside = any(
        student.signatures[name].input("w") and not file.signature.input("w")
        for name, file in files.items()
        if name in student.signatures
    )
    return guidance.default if inside else None


def _used(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what the processes of their own took: the highest peak, the seconds of all."""
    told = [report for report in reports if "peak_gb" in report]
    if not told:
        return {}
    return {
        "peak_gb": round(max(report["peak_gb"] for report in told), 2),
        "seconds": round(sum(report["seconds"] for report in told), 1),
    }


def _write(
    network: nn.Module, signature: Signature, job: Job, path: Path, *, consume: bool
) -> dict[str, Any]:
    write = FORMATS[job.format].write
    return write(network, plain(signature), path, job.precision, job.settings, consume=consume)


def _write_alone(student: Student, job: Job, name: str, path: Path) -> dict[str, Any]:
    """Open the networks anew, only that one where it can be, and write one of them."""
    others = set(networks_of(student.samplers)) - {name} if job.sampler is None else set()
    graph = _graphs(student, open_networks(student, others), job, [name])[name]
    return _write(*graph, job, path, consume=True)


def _silent(*_told: object) -> None:
    pass
