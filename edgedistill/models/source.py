"""What can be exported: a student's folder as it is, a pipeline or a network of diffusers' with a table compiled for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from edgedistill import manifest
from edgedistill.compiler import FAMILIES, compile_scheduler
from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json
from edgedistill.models import store
from edgedistill.models.parts import (
    AUTOENCODERS,
    CONTROLNET,
    CONTROLNETS,
    DENOISERS,
    ENCODERS,
    INDEX,
    Parts,
    conditions_of,
    find_parts,
    refuse_other_controlnet,
    refuse_strangers,
    space_of,
)
from edgedistill.models.text import TextEncoder
from edgedistill.models.vae import VaeDecoder, VaeEncoder
from edgedistill.plans import PORTABLE
from edgedistill.student import MANIFEST, Student
from edgedistill.table import Condition, Guidance, SamplerTable
from edgedistill.text import Tokenizer

NUM_STEPS = 4
EMBEDDED_RANGE = (1.0, 15.0)
"""Guidance scales that pipelines are asked for; their folders do not say what they were made for."""
EMBEDDED_DEFAULT = 8.5
CFG_RANGE = (1.0, 20.0)
"""Guidance scales that may be chosen where every row calls the network twice."""
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_DECODER, _ENCODER = "vae_decoder", "vae_encoder"


def open_source(
    path: Path | str,
    *,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Student:
    """Open whatever can be exported; of a folder that is no student's, not a weight is read or copied.

    Args:
        path: A student's folder; or a pipeline's, with ``unet/`` or ``transformer/`` and ``scheduler/``, and
            perhaps ``controlnet/``; or that of such a network alone, with ``scheduler_config.json`` in it or
            in its parent.
        num_steps: Rows of the table; None: `NUM_STEPS`.
        guidance_scale: g. Where the network takes it as an input it is the default there, else every row
            calls the network with and without condition. None: `EMBEDDED_DEFAULT`, or no guidance.
        scheduler: A scheduler's configuration; None: the folder's. One that cannot be compiled lends its
            noise schedule to DDIM on trailing timesteps.

    Raises:
        BundleError: If a part is missing, is a pickle, is of a class that is not known, belongs to another
            pipeline, or would need code that comes with the model.
        ConfigError: If the scheduler's configuration cannot be used, guidance is asked of a network without
            conditions, or anything is asked of a student, whose table was trained for it.
    """
    root = Path(path)
    if (root / MANIFEST).is_file():
        if (num_steps, guidance_scale, scheduler) != (None, None, None):
            msg = f"{root}: a student has the steps, the guidance and the scheduler that it was trained for; leave them out."
            raise ConfigError(msg)
        return Student.open(root)
    if not root.is_dir() or (root / manifest.MANIFEST).is_file():
        found = "holds a bundle, which is exported already" if root.is_dir() else "no such folder"
        if root.is_file():
            found = "is one file, which diffusers opens with `from_single_file`"
        msg = f"{root}: {found}; give a student's folder, or one that diffusers wrote with `save_pretrained`. Nothing is fetched here."
        raise BundleError(msg)
    parts = find_parts(root)
    sketch = _sketch(parts)
    config = dict(scheduler or read_json(parts.scheduler))
    table = _table(parts, sketch, config, num_steps or NUM_STEPS, guidance_scale)
    networks = sketch.networks
    return Student(
        root,
        name_of(root),
        table,
        {name: store.signature(network) for name, network in networks.items()},
        {"source": str(parts.index.get("_class_name") or store.class_name(sketch.denoiser))},
        folders=sketch.folders,
    )


def name_of(root: Path) -> str:
    """Return what a pipeline is called where it is from, ``owner/name``, or else its folder's name."""
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    told = str(index.get("_name_or_path"))
    return told if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", told) else root.resolve().name


def open_network(student: Student, name: str) -> nn.Module:
    """Load a network of a student as its manifest says that it is called.

    Raises:
        BundleError: As `edgedistill.models.store.load`.
    """
    return store.load_as(student.folder(name), student.signatures[name])


@dataclass(frozen=True, eq=False)
class _Sketch:
    """A pipeline's networks without their weights.

    Fields:
        denoiser: The network that draws.
        networks: All of them by name.
        folders: Subfolders of those that do not lie in one of their own name.
        vae: Configuration of the autoencoder, or None.
    """

    denoiser: Mapping[str, Any]
    networks: Mapping[str, nn.Module]
    folders: Mapping[str, str]
    vae: Mapping[str, Any] | None


def _sketch(parts: Parts) -> _Sketch:
    """Build every network on no device, which says what it takes and that its configuration makes one."""
    networks: dict[str, nn.Module] = {}
    folders: dict[str, str] = {}
    with torch.device("meta"):
        denoiser = store.open_one_of(parts.folder, DENOISERS[parts.name], bare=True)
        if parts.controlnet is not None:
            denoiser, networks[CONTROLNET] = _controlled(parts, denoiser)
        signature = store.signature(denoiser)
        networks[parts.name] = denoiser
        if parts.folder == parts.root:
            folders[parts.name] = "."
        encoders = _encoders(parts, signature)
        vae = None
        if parts.vae is not None:
            stock: Any = store.open_one_of(parts.vae, AUTOENCODERS, bare=True)
            vae = dict(stock.config)
            _, _, height, width = signature.inputs[0].shape
            size = int(height), int(width)
            halves = {_DECODER: VaeDecoder(stock, size), _ENCODER: VaeEncoder(stock, size)}
            networks |= halves
            folders |= dict.fromkeys(halves, parts.vae.name)
    tokenizers = [Tokenizer.open(parts.root / _TOKENIZERS[name]) for name in encoders]
    networks |= encoders
    readers = list(encoders.values())
    words = max(tokenizers, key=lambda item: item.vocabulary_size, default=None)
    refuse_strangers(str(parts.root), parts.name, signature, readers, words, vae)
    for name, network in networks.items():
        store.weights_of(network, parts.root / folders.get(name, name))
    return _Sketch(store.config_of(denoiser), networks, folders, vae)


def _controlled(parts: Parts, denoiser: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the network that draws as one that takes residuals, and the ControlNet that makes them."""
    from edgedistill.models.controlnet import controlled, controlling

    stock: Any = store.open_one_of(parts.root / CONTROLNET, CONTROLNETS, bare=True)
    if not isinstance(denoiser, UNet2DConditionModel):
        msg = (
            f"{parts.root / CONTROLNET}: is for a UNet2DConditionModel, and {parts.name}/ is none."
        )
        raise BundleError(msg)
    taking = controlled(denoiser)
    signature = store.signature(taking)
    made = controlling(stock, signature)
    refuse_other_controlnet(parts.root, signature, made.signature)
    return taking, made


def _encoders(parts: Parts, denoiser: Signature) -> dict[str, TextEncoder]:
    """Return the text encoders that a network needs; two of them answer as a pair."""
    if denoiser.input("text") is None:
        return {}
    if not parts.encoders:
        msg = f"{parts.root}: its {parts.name} reads prompts, and there is no text_encoder/ beside it; give the folder of the whole pipeline."
        raise BundleError(msg)
    made = {}
    for name in parts.encoders:
        encoder: Any = store.open_one_of(parts.root / name, ENCODERS[name], bare=True)
        encoder.in_pair = len(parts.encoders) > 1
        made[name] = encoder
    return made


def _table(
    parts: Parts, sketch: _Sketch, config: dict[str, Any], num_steps: int, scale: float | None
) -> SamplerTable:
    if config.get("_class_name") not in FAMILIES:
        config = {**config, **PORTABLE}
    signature = store.signature(sketch.networks[parts.name])
    guidance, classes = _guidance(parts, signature, sketch.denoiser, scale)
    _, *shape = signature.inputs[0].shape
    state = int(shape[0]), int(shape[1]), int(shape[2])
    decoder, encoder = (_DECODER, _ENCODER) if sketch.vae is not None else (None, None)
    return compile_scheduler(
        config,
        num_steps,
        shape=state,
        network=(CONTROLNET, parts.name) if parts.controlnet is not None else parts.name,
        guidance=guidance,
        conditions=_conditions(parts, sketch, signature, classes, state),
        clamp=(-1.0, 1.0),
        space=space_of(sketch.vae),
        decoder=decoder,
        encoder=encoder,
    )


def _conditions(
    parts: Parts,
    sketch: _Sketch,
    denoiser: Signature,
    classes: int | None,
    state: tuple[int, int, int],
) -> tuple[Condition, ...]:
    encoders = {k: v for k, v in sketch.networks.items() if isinstance(v, TextEncoder)}
    reads = None
    if encoders:
        first, *others = encoders
        reads = {
            "encoder": first,
            "tokenizer": _TOKENIZERS[first],
            "further": {name: _TOKENIZERS[name] for name in others} or None,
            "length": min(encoder.length for encoder in encoders.values()),
            "examples": parts.examples,
        }
    shape: Any = state
    if sketch.vae is not None:
        shape = store.signature(sketch.networks[_DECODER]).outputs[0].shape[1:]
    asked = conditions_of(denoiser, classes=classes, image_shape=shape, text=reads)
    if parts.controlnet is None:
        return asked
    from edgedistill.models.controlnet import picture_of

    return *asked, picture_of(store.signature(sketch.networks[CONTROLNET]))


def _guidance(
    parts: Parts, denoiser: Signature, config: Mapping[str, Any], scale: float | None
) -> tuple[Guidance, int | None]:
    """Return how guidance enters, and how many classes may be asked for."""
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if (w := denoiser.input("w")) is not None:
        default = EMBEDDED_DEFAULT if scale is None else scale
        return Guidance("embedded", w.name, default, EMBEDDED_RANGE), classes
    if scale is None or scale <= 1:
        return Guidance(), classes
    null: dict[str, Any] = {}
    if (words := denoiser.input("text")) is not None:
        # Stable Diffusion XL was trained without prompts on zeros in place of embeddings.
        zeros = parts.encoders[1:] and parts.index.get("force_zeros_for_empty_prompt", True)
        null[words.name] = 0 if zeros else ""
    if (labels := denoiser.input("class")) is not None and classes:
        # A transformer has an embedding for "no class" behind the others, of a UNet it is the last one.
        classes -= parts.name == "unet"
        null[labels.name] = classes
    if not null:
        msg = f"{parts.root}: guidance needs a network that takes a text or a class; leave the scale out."
        raise ConfigError(msg)
    limits = (min(scale, CFG_RANGE[0]), max(scale, CFG_RANGE[1]))
    return Guidance("cfg", default=scale, range=limits, null=null), classes
