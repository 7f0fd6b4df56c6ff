"""Where the weights of a network lie in its folder: one file, shards with an index, or a variant of either."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import BundleError
from edgedistill.files import read_json

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
_STEMS = f"{DIFFUSERS}|{TRANSFORMERS}"
# As diffusers and transformers write them; the variant is a word such as fp16.
_WHOLE = re.compile(rf"({_STEMS})(?:\.(\w+))?\.safetensors")
_INDEX = re.compile(rf"({_STEMS})\.safetensors\.index(?:\.(\w+))?\.json")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a network's weights.

    Fields:
        shards: Safetensors files, in order.
        index: The file that says which shard holds a tensor; None: there is one file, which holds all.
    """

    shards: tuple[Path, ...]
    index: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """All of them."""
        return self.shards if self.index is None else (self.index, *self.shards)


def variants(folder: Path, stem: str) -> dict[str, Path]:
    """Return the file, or else the index, of each variant that lies in a folder; ``""`` is none.

    Args:
        folder: A network's.
        stem: `DIFFUSERS` or `TRANSFORMERS`.
    """
    found = {}
    for pattern in (_INDEX, _WHOLE):
        for path in sorted(folder.glob(f"{stem}.*")):
            match = pattern.fullmatch(path.name)
            if match is not None and match[1] == stem:
                found[match[2] or ""] = path
    return found


def find_weights(folder: Path, stem: str, variant: str | None = None) -> WeightFiles:
    """Find the weights of a network; nothing is read but the index of shards.

    Args:
        folder: The network's.
        stem: `DIFFUSERS` or `TRANSFORMERS`.
        variant: Such as ``"fp16"``; None: none, or the only one where there is no plain file.

    Raises:
        BundleError: If they are not there, there is more than one variant to choose from, or the index is
            damaged or names a file that is not there.
    """
    held = variants(folder, stem)
    if variant is not None:
        held = {name: path for name, path in held.items() if name == variant}
    if not held:
        raise BundleError(_missing(folder, stem, variant))
    if "" not in held and len(held) > 1:
        msg = f"{folder}: holds the variants {', '.join(held)} and no plain {stem}.safetensors; say which with --variant."
        raise BundleError(msg)
    head = held.get("") or next(iter(held.values()))
    if head.suffix == ".safetensors":
        return WeightFiles((head,))
    shards = tuple(folder / name for name in sorted(set(weight_map(head).values())))
    for path in shards:
        if not path.is_file():
            msg = f"{path}: no such file, and {head.name} says that it holds a part of the weights; get it anew."
            raise BundleError(msg)
    return WeightFiles(shards, head)


def weight_map(index: Path) -> dict[str, str]:
    """Return which shard holds each tensor.

    Raises:
        BundleError: If the file is damaged.
    """
    data = read_json(index)
    found: Any = data.get("weight_map") if isinstance(data, dict) else None
    names = set(found.values()) if isinstance(found, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        msg = f"{index}: has no `weight_map` from tensors to files beside it; get it anew."
        raise BundleError(msg)
    return dict(found)


def weights_in(folder: Path) -> list[Path]:
    """Return the files of a network's folder that are its own: configuration and weights, no graphs, no variants beside them.

    Raises:
        BundleError: As `find_weights`; not where there are no weights at all.
    """
    made = [folder / "config.json"]
    for stem in (DIFFUSERS, TRANSFORMERS):
        if variants(folder, stem):
            made += find_weights(folder, stem).all
    return made


def plain_names(files: Iterable[Path]) -> dict[Path, str]:
    """Return the name of each file without a variant: what libraries look for that are asked for none.

    Shards keep theirs, which the index says.
    """
    made = {}
    for path in files:
        whole, index = _WHOLE.fullmatch(path.name), _INDEX.fullmatch(path.name)
        made[path] = path.name
        if whole is not None:
            made[path] = f"{whole[1]}.safetensors"
        elif index is not None:
            made[path] = f"{index[1]}.safetensors.index.json"
    return made


def _missing(folder: Path, stem: str, variant: str | None) -> str:
    """Say that weights are missing, and what lies there instead."""
    name = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    others = [item.name for item in sorted(folder.glob("*.safetensors*"))]
    hint = " Nor are there shards of it: get the folder whole."
    if others:
        hint = f" {', '.join(others[:3])} is there: load the folder in diffusers and save it anew."
    elif pickles:
        hint = f" {pickles[0].name} is a pickle, which can run code when it is read: convert it to safetensors first."
    return f"{folder / name}: no such file.{hint}"
