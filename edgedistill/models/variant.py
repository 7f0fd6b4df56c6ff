"""A pipeline's folder with other weights: a variant, LoRA files merged, another autoencoder, a ControlNet; the rest is linked."""

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json, sha256, write_json
from edgedistill.models import store
from edgedistill.models.lora_file import PARTS, Layers, add_updates, read_lora
from edgedistill.models.parts import AUTOENCODERS, CONTROLNET, CONTROLNETS, INDEX, PROMPTS
from edgedistill.models.source import open_source
from edgedistill.student import Student
from edgedistill.weight_files import (
    DIFFUSERS,
    TRANSFORMERS,
    find_weights,
    plain_names,
    variants,
)

_WHOLE = (*PARTS, "vae", CONTROLNET, "scheduler", "tokenizer", "tokenizer_2", INDEX, PROMPTS)


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and how much of it.

    Fields:
        path: A safetensors file.
        scale: 1 is the update as it was trained.
    """

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Read ``FILE`` or ``FILE:SCALE``.

        Raises:
            ConfigError: If the scale is no number.
        """
        name, colon, scale = text.rpartition(":")
        if not colon or Path(text).is_file():
            return cls(Path(text))
        try:
            return cls(Path(name), float(scale))
        except ValueError:
            msg = f"A LoRA is given as FILE or FILE:SCALE, got {text!r}."
            raise ConfigError(msg) from None


def open_variant(
    root: Path,
    place: Path,
    *,
    loras: Sequence[Lora] = (),
    vae: Path | None = None,
    controlnet: Path | None = None,
    conditioning_scale: float | None = None,
    variant: str | None = None,
    **asked: Any,
) -> Student:
    """Write a pipeline that differs from another by these, and open it.

    Args:
        root: The pipeline's folder; it is not changed.
        place: An empty folder to write to.
        loras: Added one after another.
        vae: Folder of another autoencoder.
        controlnet: Folder of a ControlNet; None: the pipeline's own, if it has one.
        conditioning_scale: Multiplies what it adds to the network's skips; None: 1, or what was set before.
        variant: Name of the weights to take, such as ``"fp16"``, where a network has them.
        **asked: As `edgedistill.models.source.open_source`.

    Returns:
        The student; what was done is in its provenance.

    Raises:
        BundleError: If a file is missing, damaged, a pickle, or for another network.
        ConfigError: As `open_source`.
    """
    name = root.resolve().name
    if variant is not None:
        root = _of_variant(root, place / "variant", variant)
    open_source(root, **asked)  # refuses what cannot be taken before there is any work
    if vae is not None:
        store.open_one_of(vae, AUTOENCODERS, bare=True)
    if controlnet is not None:
        store.open_one_of(controlnet, CONTROLNETS, bare=True)
    updates = [(lora, read_lora(lora.path)) for lora in loras]
    changed = sorted({part for _, held in updates for part in held})
    for part in changed:
        if not (root / part).is_dir():
            msg = f"{root}: has no {part}/, which a LoRA updates; the file is for another pipeline, or this is no whole one."
            raise BundleError(msg)
    replaced = {"vae": vae, CONTROLNET: controlnet}
    for part in _WHOLE:
        if part not in changed:
            _link(replaced.get(part) or root / part, place / part)
    for part in changed:
        _write_updated(root / part, place / part, part, updates)
    if conditioning_scale is not None:
        _set_scale(place / CONTROLNET / "config.json", conditioning_scale)
    student = open_source(place, **asked)
    merged = [
        {"file": lora.path.name, "sha256": sha256(lora.path), "scale": lora.scale} for lora in loras
    ]
    done = {
        "lora": merged,
        "vae": None if vae is None else vae.resolve().name,
        CONTROLNET: None if controlnet is None else controlnet.resolve().name,
        "conditioning_scale": conditioning_scale,
        "variant": variant,
    }
    told = {name: value for name, value in done.items() if value not in (None, [])}
    return dataclasses.replace(student, name=name, provenance={**student.provenance, **told})


def _set_scale(path: Path, scale: float) -> None:
    """Write how much of a ControlNet there is into its configuration."""
    from edgedistill.models.controlnet import SCALE

    if not path.is_file() or not math.isfinite(scale):
        msg = f"A conditioning scale is a finite number for a ControlNet, got {scale:g}; give one with --controlnet."
        raise ConfigError(msg)
    write_json(path, {**read_json(path), SCALE: scale})


def _of_variant(root: Path, place: Path, variant: str) -> Path:
    """Link a pipeline whose networks have the weights of a variant, where they have them, under the plain names."""
    taken = False
    place.mkdir()
    for source in (root / name for name in _WHOLE):
        stems = [stem for stem in (DIFFUSERS, TRANSFORMERS) if variant in variants(source, stem)]
        if stems:
            files = find_weights(source, stems[0], variant).all
            (place / source.name).mkdir()
            for path, plain in plain_names([source / "config.json", *files]).items():
                _linked(str(path), str(place / source.name / plain))
        else:
            _link(source, place / source.name)
        taken |= bool(stems)
    if not taken:
        msg = f"{root}: no network has weights of the variant {variant!r}; leave it out, or get the files {DIFFUSERS}.{variant}.safetensors."
        raise BundleError(msg)
    return place


def _write_updated(
    source: Path, folder: Path, part: str, updates: Sequence[tuple[Lora, Mapping[str, Layers]]]
) -> None:
    """Write a network with the updates of one part of a pipeline added to its weights."""
    config = read_json(source / "config.json")
    with torch.device("meta"):
        network = store.build(config, str(source))
    state = store.load_shards(store.weights_of(network, source))
    for lora, held in updates:
        add_updates(state, held.get(part, {}), lora.scale, str(lora.path))
    write_json(folder / "config.json", config)
    store.save_weights(state, folder / store.weights_file(network), {"format": "pt"})


def _link(source: Path, target: Path) -> None:
    """Link a file, or the files of a folder; what is not there is left out."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_linked)
    elif source.is_file():
        _linked(str(source), str(target))


def _linked(source: str, target: str) -> str:
    """Link a file, or copy it where the file system cannot."""
    try:
        os.link(os.path.realpath(source), target)  # caches hold links, which may be relative
    except OSError:
        shutil.copy2(source, target)
    return target
