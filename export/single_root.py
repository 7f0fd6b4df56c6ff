"""One folder that every loader of pipelines opens: what its graphs are made of, and what it may hold."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import nn

from edgedistill.bundle import Bundle
from edgedistill.contract import Signature, TensorSpec, residual_shapes
from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json
from edgedistill.models.store import class_name
from edgedistill.student import Student
from edgedistill.table import SamplerTable

from .dialects import UNET_KINDS, Dialect, batch_of
from .formats import Job
from .layouts import BUNDLE, CONTROLNET, INDEX, SINGLE_ROOT
from .loader_files import why_not

SECOND = "text_encoder_2"
_DECODER = "vae_decoder"
_NEEDED = ("unet", "text_encoder", _DECODER)
_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
_KNOWN: Mapping[str, Collection[str]] = {
    "unet": ("UNet2DConditionModel", "ExtendedUNet2DConditionModel"),
    "text_encoder": ("CLIPTextModel",),
    SECOND: ("CLIPTextModelWithProjection",),
    CONTROLNET: ("ControlNetModel",),
    _DECODER: _AUTOENCODERS,
    "vae_encoder": _AUTOENCODERS,
}


def layout_for(student: Student, target: Path, asked: str | None) -> str:
    """Return the layout of an export: what is asked for, what is there, or what the student's networks allow.

    Raises:
        ConfigError: If a single root is asked for and loaders know no such pipeline.
    """
    problem = _problem(student)
    if asked == SINGLE_ROOT and problem:
        msg = (
            f"{student.root}: loaders know no pipeline with {problem}; export with --layout bundle."
        )
        raise ConfigError(msg)
    if asked is None and (target / INDEX).is_file():
        return SINGLE_ROOT
    return asked or (BUNDLE if problem else SINGLE_ROOT)


def _problem(student: Student) -> str | None:
    held = {name: _class_of(student, name) for name in student.signatures}
    fits = set(_NEEDED) <= set(held) and all(held[name] in _KNOWN.get(name, ()) for name in held)
    if not fits:
        return f"networks {', '.join(f'{name} ({kind})' for name, kind in held.items())}"
    inputs = student.signatures["unet"].inputs
    if unknown := [spec.name for spec in inputs if spec.kind not in UNET_KINDS]:
        return f"a network that takes {', '.join(unknown)}"
    return why_not(student)


def _class_of(student: Student, network: str) -> str | None:
    return class_name(read_json(student.folder(network) / "config.json"))


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
    plain = [held.artifacts[name] for name in kept if held.artifacts[name].sampler is None]
    there = {item.format: item.precision for item in plain}
    for job in (item for item in wanted if item.sampler is None):
        if there.setdefault(job.format, job.precision) != job.precision:
            msg = f"{target}: holds {job.format} in {there[job.format]}, and loaders look for one file per network; write {job.precision} to another folder, or give --overwrite."
            raise BundleError(msg)


def resized(
    student: Student,
    height: int | None,
    width: int | None,
    *,
    latents: tuple[int | None, int | None] = (None, None),
) -> Student:
    """Return a pipeline that makes images of another size.

    Args:
        student: Its networks take any size.
        height, width: Of the image; None: as it is.
        latents: Height and width of its latent, another way to say the same.

    Raises:
        ConfigError: If it works on pixels, or its latents cannot make this size.
    """
    decoder = student.signatures.get(_DECODER)
    if decoder is None:
        msg = f"{student.root}: only what works on latents is exported at another size, and it has no {_DECODER}; leave height and width out."
        raise ConfigError(msg)
    own = [int(side) for side in decoder.outputs[0].shape[2:]]
    factor = own[0] // int(decoder.inputs[0].shape[2])
    tall, wide = (latent and latent * factor for latent in latents)
    size = (height or tall or own[0], width or wide or own[1])
    if (tall or size[0], wide or size[1]) != size:
        msg = f"A latent of {latents[0] or 'any'} x {latents[1] or 'any'} makes no image of {size[0]} x {size[1]}; say one of them."
        raise ConfigError(msg)
    step = 2 * factor
    if any(side % step for side in size):
        near = " and ".join(str(max(1, round(side / step)) * step) for side in size)
        msg = f"Height and width must be multiples of {step}, got {size[0]} and {size[1]}; the nearest are {near}."
        raise ConfigError(msg)
    small = (size[0] // factor, size[1] // factor)
    held = {"image": size, **dict.fromkeys(("x", "raw", "latent"), small)}
    residuals = _residual_sizes(student, small)

    def spec_of(spec: TensorSpec) -> TensorSpec:
        sides = held.get(spec.kind) or residuals.get(spec.name)
        return spec if sides is None else dataclasses.replace(spec, shape=(*spec.shape[:2], *sides))

    tables = {name: _resized_table(table, small, size) for name, table in student.samplers.items()}
    default, *further = tables
    signatures = {
        name: Signature(tuple(map(spec_of, each.inputs)), tuple(map(spec_of, each.outputs)))
        for name, each in student.signatures.items()
    }
    return dataclasses.replace(
        student,
        table=tables[default],
        further={name: tables[name] for name in further},
        signatures=signatures,
        folders={**{name: name for name in signatures}, **student.folders},
    )


def _residual_sizes(student: Student, latents: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return height and width of what a ControlNet gives to the denoiser, by name."""
    if CONTROLNET not in student.signatures:
        return {}
    config = read_json(student.folder(CONTROLNET) / "config.json")
    shapes = residual_shapes({**config, "sample_size": latents})
    specs = student.signatures[CONTROLNET].outputs
    return {spec.name: shape[1:] for spec, shape in zip(specs, shapes, strict=True)}


def _resized_table(
    table: SamplerTable, latents: tuple[int, int], images: tuple[int, int]
) -> SamplerTable:
    stages = [dataclasses.replace(s, shape=(s.shape[0], *latents)) for s in table.stages]
    conditions = [
        item if item.shape is None else dataclasses.replace(item, shape=(item.shape[0], *images))
        for item in table.conditions
    ]
    return dataclasses.replace(table, stages=tuple(stages), conditions=tuple(conditions))


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
        controlled=CONTROLNET in student.signatures,
        w=guidance.default - 1 if guidance.mode == "embedded" else None,
        free_sizes=bool(job.settings.get("free_sizes")),
    )
    made = {}
    for name, signature in signatures.items():
        network = networks[name]
        graph, spoken = dialect.of(network, signature.with_batch(batch_of(dialect, network)))
        made[name] = (spoken, graph)
    return made
