"""Student to bundle: the reference, its probes, and one artifact per format and precision, all or nothing."""

import functools
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edgedistill
from edgedistill import plugins
from edgedistill.bundle import (
    CALIBRATION,
    REFERENCE,
    Artifact,
    Bundle,
    Draft,
    NetworkFile,
    start_from,
    write_bundle,
)
from edgedistill.contract import BATCH, LENGTH, Signature, TensorSpec
from edgedistill.errors import ContractError
from edgedistill.files import sha256
from edgedistill.models import store
from edgedistill.network import CheckedNetwork
from edgedistill.probes import (
    GOLDEN_SAMPLES,
    Examples,
    golden_samples,
    load_probes,
    record_calibration,
    record_golden,
    save_probes,
    spread_conditions,
)
from edgedistill.student import EXAMPLES, Student
from edgedistill.tables import choose, golden_file, networks_of, table_file
from edgedistill.validate import check
from edgedistill.weight_files import plain_names, weights_in

from .dialects import plain
from .formats import FORMATS, ExportOptions, Job, jobs
from .layouts import SINGLE_ROOT, place
from .loader_files import check_jobs, make_stock, write_loader_files
from .single_graph import refuse, unrolled
from .single_root import check_target, in_dialects
from .worker import ALONE_ABOVE, called, in_child, works_alone

CALIBRATION_SEEDS = range(1000, 1032)  # none of them golden
# Of large students, whose every call takes seconds in PyTorch; 12 rows calibrate a UNet of 860 million to 30 dB.
FEW_GOLDEN, FEW_SEEDS = 2, range(1000, 1003)

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
    if options.single_graph is not None:
        refuse(choose(student.samplers, options.single_graph))
    wanted = {job.name: job for job in jobs(formats, options)}
    if options.layout == SINGLE_ROOT:
        check_jobs(student, wanted.values())
    base = start_from(target, _without_artifacts(student), overwrite=options.overwrite)
    kept = [name for name, held in base.artifacts.items() if _still_wanted(held, wanted.get(name))]
    missing = [job for name, job in wanted.items() if name not in kept]
    if options.layout == SINGLE_ROOT:
        check_target(target, kept, missing, base)
    if base.artifacts and not missing:
        return base
    fill = functools.partial(_fill, student, options, missing, progress or _silent)
    return write_bundle(target, base, fill, kept)


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


def _still_wanted(held: Artifact, job: Job | None) -> bool:
    return job is None or held.made_with.get("options") == job.settings


def _fill(
    student: Student,
    options: ExportOptions,
    missing: Sequence[Job],
    progress: Progress,
    draft: Draft,
) -> None:
    for name, table in student.samplers.items():
        check(table, str(student.root / table_file(name)))
    # Networks that are all written in processes of their own are never read in this one.
    apart = {name for name, size in sizes(student).items() if works_alone(options.isolate, size)}
    sketched = apart if all(job.sampler is None for job in missing) else set()
    networks = _open_networks(student, sketched)
    steps: list[tuple[str, Callable[[], None]]] = []
    if REFERENCE not in draft.artifacts:
        refer = functools.partial(_add_reference, draft, student, options.layout, alone=bool(apart))
        steps.append((REFERENCE, refer))
    add = functools.partial(_add, draft, student, networks, options.isolate)
    steps += [(job.name, functools.partial(add, job)) for job in missing]
    for done, (name, write) in enumerate(steps):
        progress(name, done, len(steps))
        write()
    if options.layout == SINGLE_ROOT:
        held = {artifact.format for artifact in draft.artifacts.values()}
        write_loader_files(student, draft.root, held)
    progress("", len(steps), len(steps))


def sizes(student: Student) -> dict[str, int]:
    """Return the bytes of float32 weights of each network that the tables call, from their configurations."""
    names = [name for name in networks_of(student.samplers) if name in student.signatures]
    return {
        name: _size(store.facing(store.sketch(student.folder(name)), student.signatures[name]))
        for name in names
    }


def _size(network: nn.Module) -> int:
    return sum(value.nbytes for value in network.state_dict().values())


def _open_networks(student: Student, sketched: Collection[str] = ()) -> Networks:
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
            msg = f"{student.root}: the table calls network {name!r}, but the student holds only: {', '.join(student.signatures)}."
            raise ContractError(msg)
        folder = student.folder(name)
        key = folder, name in sketched
        if key not in loaded:
            loaded[key] = (store.sketch if name in sketched else store.load)(folder)
        networks[name] = store.facing(loaded[key], student.signatures[name])
        shared = name in student.folders
        if not _fits(student.signatures[name], store.signature(networks[name]), shared=shared):
            msg = f"{folder}: its inputs and outputs are not those of the student's manifest; distil it anew."
            raise ContractError(msg)
    student.verify()  # last: what is wrong with a network says more than that it changed
    return networks


def _fits(stated: Signature, found: Signature, *, shared: bool) -> bool:
    """Whether a network is the stated one; one that shares its folder may be stated for other sizes."""

    def plain(spec: TensorSpec) -> tuple[object, ...]:
        return spec.name, spec.dtype, spec.kind, len(spec.shape) if shared else spec.shape

    sides = [(stated.inputs, found.inputs), (stated.outputs, found.outputs)]
    return all([*map(plain, a)] == [*map(plain, b)] for a, b in sides)


def _signatures(student: Student, batch: int | str) -> dict[str, Signature]:
    """Return what each network takes in a bundle: a fixed number of tokens, and this batch."""
    texts = [table.condition("text") for table in student.samplers.values()]
    lengths = [text.length for text in texts if text is not None and text.length is not None]
    sizes = {LENGTH: lengths[0]} if lengths else {}
    names = networks_of(student.samplers)
    return {name: student.signatures[name].with_batch(batch).bind(**sizes) for name in names}


def _digest(folder: Path) -> str:
    return " ".join(f"{path.name} {sha256(path)}" for path in weights_in(folder))


def _add_reference(draft: Draft, student: Student, layout: str, *, alone: bool) -> None:
    draft.add(called(_write_reference, draft.root, student, layout, alone=alone))


def _write_reference(root: Path, student: Student, layout: str) -> Artifact:
    """Copy the networks as they are, those of equal bytes once, and record the probes with them."""
    files, reference = {}, {}
    written: dict[str, str] = {}
    for name, signature in _signatures(student, BATCH).items():
        folder = student.folder(name)
        path = written.setdefault(_digest(folder), place(layout, "torch", "float32", name))
        if not (root / path).exists():
            (root / path).mkdir(parents=True)
            for part, named in plain_names(weights_in(folder)).items():
                shutil.copy2(part, root / path / named)
            if layout == SINGLE_ROOT:
                make_stock(root / path)
        session = plugins.find(plugins.RUNTIMES, "torch").open(root / path, signature, {})
        files[name] = NetworkFile(path, signature)
        reference[name] = CheckedNetwork(name, signature, session)
    made_with = {"torch": torch.__version__, "options": {}}
    _write_probes(root, student, reference)
    return Artifact(REFERENCE, "torch", "torch", "float32", files, made_with)


def _write_probes(root: Path, student: Student, reference: Mapping[str, CheckedNetwork]) -> None:
    examples: Examples = {}
    if (student.root / EXAMPLES).is_file():
        examples = load_probes(student.root / EXAMPLES)
    tokenize = student.tokenize
    samples, seeds = (
        (FEW_GOLDEN, FEW_SEEDS) if _is_large(student) else (GOLDEN_SAMPLES, CALIBRATION_SEEDS)
    )
    runs = []
    for name, table in student.samplers.items():
        chosen = golden_samples(table, examples, tokenize, samples)
        save_probes(record_golden(table, reference, *chosen), root / golden_file(name))
        runs.append((table, spread_conditions(table, len(seeds), examples, tokenize)))
    calibration = record_calibration(runs, reference, seeds)
    called = {name.rpartition(".")[0] for name in calibration}
    if unused := sorted(set(reference) - called):
        msg = f"{student.root}: no example is routed to {', '.join(unused)}; add texts that are to the condition's `examples`."
        raise ContractError(msg)
    save_probes(calibration, root / CALIBRATION)


def _is_large(student: Student) -> bool:
    folders = {student.folder(name) for name in student.signatures}
    sizes = [sum(part.stat().st_size for part in weights_in(folder)) for folder in folders]
    return max(sizes, default=0) > ALONE_ABOVE


def _graphs(
    student: Student, networks: Networks, job: Job
) -> Mapping[str, tuple[nn.Module, Signature]]:
    """Return what becomes a graph each, by name."""
    signatures = _signatures(student, job.settings.get("batch") or BATCH)
    if job.sampler is not None:
        return unrolled(student, networks, signatures, job)
    if job.layout == SINGLE_ROOT:
        return in_dialects(student, networks, signatures, job)
    return {name: (networks[name], signature) for name, signature in signatures.items()}


def _add(draft: Draft, student: Student, networks: Networks, isolate: str, job: Job) -> None:
    form = FORMATS[job.format]
    files, reports = {}, []
    written: dict[tuple[str, Signature], str] = {}
    for name, (network, signature) in _graphs(student, networks, job).items():
        own = job.path(name, controlled=signature.input("residual") is not None)
        weights = _digest(student.folder(name)) if name in student.signatures else name
        path = written.setdefault((weights, signature), own)
        if path == own:
            place_of = draft.root / path
            if works_alone(isolate, _size(network)):
                report, used = in_child(_write_alone, student, job, name, place_of)
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
    graph = _graphs(student, _open_networks(student, others), job)[name]
    return _write(*graph, job, path, consume=True)


def _silent(_what: str, _done: int, _total: int) -> None:
    pass
