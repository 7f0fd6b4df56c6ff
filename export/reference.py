"""The reference of a bundle: the networks as PyTorch has them, and the probes that are what they answered."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from edgedistill import plugins
from edgedistill.bundle import CALIBRATION, REFERENCE, Artifact, NetworkFile
from edgedistill.contract import BATCH
from edgedistill.drafts import Draft
from edgedistill.errors import ContractError
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
from edgedistill.tables import golden_file
from edgedistill.weight_files import plain_names, weights_in

from .foretold import TOGETHER, Probing
from .layouts import SINGLE_ROOT, place
from .loader_files import make_stock
from .networks import digest, signatures_of
from .worker import ALONE_ABOVE, called

CALIBRATION_SEEDS = range(1000, 1032)  # none of them golden
# Of large students, whose every call takes seconds in PyTorch; 12 rows calibrate a UNet of 860 million to 30 dB.
FEW_GOLDEN, FEW_SEEDS = 2, range(1000, 1003)


def add_reference(draft: Draft, student: Student, layout: str, *, alone: bool) -> None:
    """Write the reference and the probes.

    Args:
        draft: The bundle that gets them.
        student: What is exported.
        layout: One of `export.layouts.LAYOUTS`.
        alone: Whether this takes a process of its own.

    Raises:
        ContractError: If no example of a prompt is routed to one of several students.
    """
    what = f"{REFERENCE}, {TOGETHER}"
    draft.add(called(_write_reference, draft.root, student, layout, alone=alone, what=what))


def _write_reference(root: Path, student: Student, layout: str) -> Artifact:
    """Copy the networks as they are, those of equal bytes once, and record the probes with them."""
    files, reference = {}, {}
    written: dict[str, str] = {}
    for name, signature in signatures_of(student, BATCH).items():
        folder = student.folder(name)
        path = written.setdefault(digest(folder), place(layout, "torch", "float32", name))
        if not (root / path).exists():
            (root / path).mkdir(parents=True)
            for part, named in plain_names(weights_in(folder)).items():
                shutil.copy2(part, root / path / named)
            if layout == SINGLE_ROOT:
                make_stock(root / path)
        session = plugins.find(plugins.RUNTIMES, "torch").open(root / path, signature, {})
        files[name] = NetworkFile(path, signature)
        # Sample by sample where one takes gigabytes.
        called_with = signature.with_batch(1) if _is_large(student) else signature
        reference[name] = CheckedNetwork(name, called_with, session)
    made_with = {"torch": torch.__version__, "options": {}}
    _write_probes(root, student, reference)
    return Artifact(REFERENCE, "torch", "torch", "float32", files, made_with)


def _write_probes(root: Path, student: Student, reference: Mapping[str, CheckedNetwork]) -> None:
    examples: Examples = {}
    if (student.root / EXAMPLES).is_file():
        examples = load_probes(student.root / EXAMPLES)
    tokenize = student.tokenize
    samples, seeds = _probed(student)
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


def _probed(student: Student) -> tuple[int, range]:
    """Return how many golden samples the probes hold, and the seeds of those to calibrate on."""
    return (FEW_GOLDEN, FEW_SEEDS) if _is_large(student) else (GOLDEN_SAMPLES, CALIBRATION_SEEDS)


def probing(student: Student) -> Probing:
    """Return how the reference is called for the probes."""
    samples, seeds = _probed(student)
    batch = 1 if _is_large(student) else max(samples, len(seeds))
    return Probing(samples + len(seeds), batch)


def _is_large(student: Student) -> bool:
    folders = {student.folder(name) for name in student.signatures}
    files = ([part for part in weights_in(folder) if part.is_file()] for folder in folders)
    sizes = [sum(part.stat().st_size for part in parts) for parts in files]
    return max(sizes, default=0) > ALONE_ABOVE
