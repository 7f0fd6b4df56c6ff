"""One folder that every loader of pipelines opens: what its graphs are made of, and what it may hold."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from edgedistill.bundle import Bundle
from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ConfigError
from edgedistill.student import Student

from .dialects import Dialect, batch_of
from .formats import Job
from .layouts import BUNDLE, INDEX, SINGLE_ROOT

SECOND = "text_encoder_2"
KNOWN = ("unet", "text_encoder", SECOND, "vae_decoder", "vae_encoder")
"""Networks that loaders look for."""
_NEEDED = ("unet", "text_encoder", "vae_decoder")


def layout_for(student: Student, target: Path, asked: str | None) -> str:
    """Return the layout of an export: what is asked for, what is there, or what the student's networks allow.

    Raises:
        ConfigError: If a single root is asked for and loaders know no such pipeline.
    """
    fits = set(_NEEDED) <= set(student.signatures) <= set(KNOWN)
    if asked == SINGLE_ROOT and not fits:
        held = ", ".join(student.signatures)
        msg = f"{student.root}: loaders know pipelines of {', '.join(_NEEDED)}, this one has {held}; export with --layout bundle."
        raise ConfigError(msg)
    if asked is None and (target / INDEX).is_file():
        return SINGLE_ROOT
    return asked or (SINGLE_ROOT if fits else BUNDLE)


def check_target(target: Path, kept: Sequence[str], wanted: Sequence[Job], held: Bundle) -> None:
    """Refuse a single root that no loader could open, or that would hold two precisions of a format.

    Args:
        target: Its folder.
        kept: Names of artifacts of `held` that stay.
        wanted: What will be written.
        held: What is there.

    Raises:
        BundleError: Saying which.
    """
    if "text_encoder" in str(target.resolve()):
        msg = f"{target}: OpenVINO GenAI finds no tokenizer where a path itself holds `text_encoder`; choose another name."
        raise BundleError(msg)
    there = {held.artifacts[name].format: held.artifacts[name].precision for name in kept}
    for job in wanted:
        if there.setdefault(job.format, job.precision) != job.precision:
            msg = f"{target}: holds {job.format} in {there[job.format]}, and loaders look for one file per network; write {job.precision} to another folder, or give --overwrite."
            raise BundleError(msg)


def with_one_scale(student: Student) -> Student:
    """Return a student whose embedded guidance is not chosen: Core ML's graphs hold one scale."""
    tables = {}
    for name, table in student.samplers.items():
        guidance = table.guidance
        if guidance.mode == "embedded":
            limits = (guidance.default, guidance.default)
            guidance = dataclasses.replace(guidance, range=limits)
        tables[name] = dataclasses.replace(table, guidance=guidance)
    default, *further = tables
    return dataclasses.replace(
        student, table=tables[default], further={name: tables[name] for name in further}
    )


def in_dialects(
    student: Student,
    networks: Mapping[str, nn.Module],
    signatures: Mapping[str, Signature],
    job: Job,
) -> dict[str, tuple[nn.Module, Signature]]:
    """Return what is traced for each network, and the signature of its graph.

    Args:
        student: Says how guidance enters.
        networks: By name.
        signatures: The networks' own, their lengths of prompts fixed.
        job: Says the format.
    """
    guidance = student.table.guidance
    dialect = Dialect(
        job.format,
        two_encoders=SECOND in student.signatures,
        guided=guidance.mode == "cfg",
        w=guidance.default - 1 if guidance.mode == "embedded" else None,
        free_sizes=bool(job.settings.get("free_sizes")),
    )
    made = {}
    for name, signature in signatures.items():
        network = networks[name]
        graph, spoken = dialect.of(network, signature.with_batch(batch_of(dialect, network)))
        made[name] = (spoken, graph)
    return made
