"""A pipeline's folder with other weights: a variant, LoRA files merged, another autoencoder, a ControlNet; the rest is linked."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json, sha256, write_json
from edgedistill.models import store
from edgedistill.models.lora_file import PARTS, Layers, add_updates, read_lora
from edgedistill.models.parts import AUTOENCODERS, CONTROLNET, CONTROLNETS, INDEX, PROMPTS
from edgedistill.models.source import name_of, open_source
from edgedistill.student import Student
from edgedistill.weight_files import (
    DIFFUSERS,
    TRANSFORMERS,
    find_weights,
    plain_names,
    variants,
)

Change = Callable[[dict[str, Tensor]], None]  # of a network's weights, in place
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


@dataclass(frozen=True, eq=False)
class Variant:
    """A pipeline put together of links, with the weights of some networks still to be changed.

    Fields:
        student: The pipeline; its configurations and its table are what they will be.
        changes: What is to be done to the weights, by network.
    """

    student: Student
    changes: Mapping[str, Change]

    def merge(self) -> Student:
        """Change the weights; this is the work.

        Raises:
            BundleError: If weights are damaged, or an update is for another network.
        """
        for part, change in self.changes.items():
            _change(self.student.root / part, change)
        return self.student


def open_variant(root: Path, place: Path, **asked: Any) -> Student:
    """Write a pipeline that differs from another, and open it; arguments and errors as for `link_variant`."""
    return link_variant(root, place, **asked).merge()


def link_variant(
    root: Path,
    place: Path,
    *,
    loras: Sequence[Lora] = (),
    vae: Path | None = None,
    controlnet: Path | None = None,
    conditioning_scale: float | None = None,
    variant: str | None = None,
    **asked: Any,
) -> Variant:
    """Put a pipeline together that differs from another by these; no weights are read but those of LoRA files.

    Args:
        root: The pipeline's folder; it is not changed.
        place: An empty folder to write to.
        loras: Added one after another.
        vae: Folder of another autoencoder.
        controlnet: Folder of a ControlNet; None: the pipeline's own, if it has one.
        conditioning_scale: Multiplies what it adds to the network's skips, in its weights; None: 1.
        variant: Name of the weights to take, such as ``"fp16"``, where a network has them.
        **asked: As `edgedistill.models.source.open_source`.

    Returns:
        The student, whose provenance says what was done, and what is to be done to its weights.

    Raises:
        BundleError: If a file is missing, damaged, a pickle, or for another network.
        ConfigError: As `open_source`.
    """
    name = name_of(root)
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
    sources = {part: root / part for part in _WHOLE}
    sources |= {"vae": vae or sources["vae"], CONTROLNET: controlnet or sources[CONTROLNET]}
    changes: dict[str, Change] = {part: _adding(part, updates) for part in changed}
    if conditioning_scale is not None:
        changes[CONTROLNET] = _scaling(sources[CONTROLNET], conditioning_scale)
    for part, source in sources.items():
        link_part(source, place / part)
    student = open_source(place, **asked)
    added = [
        {"file": lora.path.name, "sha256": sha256(lora.path), "scale": lora.scale} for lora in loras
    ]
    done = {
        "lora": added,
        "vae": None if vae is None else vae.resolve().name,
        CONTROLNET: None if controlnet is None else controlnet.resolve().name,
        "conditioning_scale": conditioning_scale,
        "variant": variant,
    }
    told = {name: value for name, value in done.items() if value not in (None, [])}
    student = dataclasses.replace(student, name=name, provenance={**student.provenance, **told})
    return Variant(student, changes)


def done_to_weights(provenance: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a provenance says that was done to a pipeline's weights; where it differs, so do they."""
    loras = [(item["sha256"], item["scale"]) for item in provenance.get("lora", ())]
    return loras, provenance.get("conditioning_scale") or 1.0


def _scaling(source: Path, scale: float) -> Change:
    """Return what multiplies the residuals of a ControlNet."""
    from edgedistill.models.controlnet import scale_residuals

    if not source.is_dir() or not math.isfinite(scale):
        msg = f"A conditioning scale is a finite number for a ControlNet, got {scale:g}; give one with --controlnet."
        raise ConfigError(msg)
    return lambda state: scale_residuals(state, scale)


def _adding(part: str, updates: Sequence[tuple[Lora, Mapping[str, Layers]]]) -> Change:
    """Return what adds the updates of one part of a pipeline."""

    def add(state: dict[str, Tensor]) -> None:
        for lora, held in updates:
            add_updates(state, held.get(part, {}), lora.scale, str(lora.path))

    return add


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
            link_part(source, place / source.name)
        taken |= bool(stems)
    if not taken:
        msg = f"{root}: no network has weights of the variant {variant!r}; leave it out, or get the files {DIFFUSERS}.{variant}.safetensors."
        raise BundleError(msg)
    return place


def _change(folder: Path, change: Change) -> None:
    """Give a network of links other weights, in files of its own."""
    config = read_json(folder / "config.json")
    with torch.device("meta"):
        network = store.build(config, str(folder))
    state = store.load_shards(store.weights_of(network, folder))
    change(state)
    shutil.rmtree(folder)
    folder.mkdir()
    write_json(folder / "config.json", config)
    store.save_weights(state, folder / store.weights_file(network), {"format": "pt"})


def link_part(source: Path, target: Path) -> None:
    """Link a file, or the files of a folder, under another path; what is not there is left out."""
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
