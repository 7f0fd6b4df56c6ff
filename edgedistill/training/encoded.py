"""Training data as the networks see it: states and embedded prompts, each made once and kept.

An autoencoder or a text encoder in the loop would do the same work every epoch. Here every image becomes a
state and every different caption an embedding before training; with a cache folder they are made once per
teacher and data, and latents stay on disk.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from edgedistill import __version__
from edgedistill.data import ImageDataset
from edgedistill.data.dataset import Pixels
from edgedistill.errors import ConfigError
from edgedistill.files import written_aside
from edgedistill.methods.plan import Batch, Subset
from edgedistill.models import store
from edgedistill.teacher import Teacher
from edgedistill.training.draw import EpochOrder, Slice

PIECE = 4096
"""Latents or captions per file."""
_AT_ONCE = 16
"""Images that are read and encoded together: at 1024x1024 they take 200 MB."""
_ASKED_AT_ONCE = 65536


class Rows(Protocol):
    """Arrays by number."""

    def __len__(self) -> int: ...

    def take(self, numbers: Tensor) -> Tensor:
        """Return the rows at these numbers, float32 (count, ...)."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Rows that are the images themselves."""

    pixels: Pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, numbers: Tensor) -> Tensor:
        """Return the images at these numbers."""
        return torch.from_numpy(self.pixels[numbers.numpy()])


@dataclass(frozen=True, eq=False)
class Pieces:
    """Rows in pieces of `PIECE`, the last one shorter; those from files are mapped, not read."""

    pieces: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def take(self, numbers: Tensor) -> Tensor:
        """Return the rows at these numbers."""
        if len(self.pieces) == 1:
            return self.pieces[0][numbers]
        return torch.stack([self.pieces[n // PIECE][n % PIECE] for n in numbers.tolist()])


@dataclass(frozen=True, eq=False)
class Captions:
    """Captions as networks see them.

    Fields:
        rows: By the name of the network's input, one row per different caption.
        index: (count,) the row of each sample.
        null: By the same names, (1, ...): the null text.
    """

    rows: Mapping[str, Rows]
    index: Tensor
    null: Mapping[str, Tensor]

    def take(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return what the captions of these samples are to the network."""
        return {name: rows.take(self.index[numbers]) for name, rows in self.rows.items()}


class EncodedData:
    """States with their conditions, in an order that is a function of the seed.

    Args:
        states: Every clean state.
        labels: (count,) int32 classes, or None.
        null: Values that stand for "no condition"; of the class input here.
        text: Every caption, or None.
        seed: Key of the order.
        sizes: By the name of the network's input, what all samples say of their size.
        kept: Numbers of the states that belong to this set; None: all.
    """

    def __init__(
        self,
        states: Rows,
        labels: Tensor | None,
        null: Mapping[str, Any],
        text: Captions | None,
        seed: int,
        sizes: Mapping[str, Tensor],
        kept: Tensor | None = None,
    ) -> None:
        self._states, self._labels, self._text, self._sizes = states, labels, text, sizes
        self._null, self._seed = null, seed
        self._kept = torch.arange(len(states)) if kept is None else kept
        self._order = EpochOrder(seed, len(self._kept))

    def __len__(self) -> int:
        return len(self._kept)

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        """Return one part of the global batch that begins at running sample `start`."""
        order = self._order.indices(start + part.start, part.stop - part.start)
        numbers = self._kept[order]
        null: dict[str, Tensor] = {}
        if self._labels is not None and "class_labels" in self._null:
            value = int(self._null["class_labels"])
            null["class_labels"] = torch.full((len(numbers),), value, dtype=torch.int32)
        if self._text is not None:
            null |= {k: v.expand(len(numbers), *v.shape[1:]) for k, v in self._text.null.items()}
        null |= self._told(len(numbers)) if null else {}
        x = self._states.take(numbers).to(device)
        return Batch(x, _moved(self._conditions(numbers), device), _moved(null, device))

    def first(self, count: int) -> Batch:
        """Return the first samples in the order of training, on the CPU."""
        return self.batch(0, Slice(count, 0, count), torch.device("cpu"))

    def subset(self, chosen: Subset) -> "EncodedData":
        """Return the samples that `chosen` picks by their conditions; it is asked part by part.

        Raises:
            ConfigError: If there are none.
        """
        masks = [
            chosen({name: value.numpy() for name, value in self._conditions(part).items()})
            for part in self._kept.split(_ASKED_AT_ONCE)
        ]
        mask = torch.from_numpy(np.concatenate(masks))
        if not mask.any():
            msg = (
                "A part of the data that the method trains on holds no sample; choose fewer parts."
            )
            raise ConfigError(msg)
        kept = self._kept[mask]
        held = (self._states, self._labels, self._null, self._text, self._seed, self._sizes)
        return EncodedData(*held, kept)

    def _conditions(self, numbers: Tensor) -> dict[str, Tensor]:
        made = self._told(len(numbers))
        if self._labels is not None:
            made["class_labels"] = self._labels[numbers]
        return made if self._text is None else {**made, **self._text.take(numbers)}

    def _told(self, count: int) -> dict[str, Tensor]:
        return {name: value.expand(count, -1) for name, value in self._sizes.items()}


def encode(
    data: ImageDataset,
    teacher: Teacher,
    seed: int,
    *,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> EncodedData:
    """Turn images, labels and captions into what a teacher's network works on.

    Args:
        data: Images of the teacher's size, with labels or captions where it takes them.
        teacher: Gives the autoencoder, the text encoder and what stands for "no condition".
        seed: Key of the order of samples.
        cache: Folder to keep latents and embeddings in, by fingerprint of teacher and data; None: they are
            made anew and held in memory.
        device: Where autoencoder and text encoder run; None: where they are.

    Raises:
        ConfigError: If the data do not fit the teacher.
    """
    _refuse_misfits(data, teacher)
    labels = None
    if teacher.classes is not None and data.labels is not None:
        labels = torch.from_numpy(data.labels).to(torch.int32)
    states: Rows = Pictures(data.images)
    if teacher.vae is not None:
        with _placed(teacher.vae, device):
            states = _latents(data, teacher, cache)
    text = None
    if teacher.text_encoder is not None and data.captions is not None:
        with _placed(teacher.text_encoder, device):
            text = _captions(data.captions, teacher, cache)
    sizes = {
        item.name: torch.tensor([item.whole_size])
        for item in teacher.conditions
        if item.kind == "size"
    }
    return EncodedData(states, labels, teacher.null, text, seed, sizes)


def _refuse_misfits(data: ImageDataset, teacher: Teacher) -> None:
    problems = []
    if data.images.shape[1:] != teacher.image_shape:
        problems.append(f"images are {data.images.shape[1:]}, not {teacher.image_shape}")
    if teacher.classes is not None and (
        data.labels is None or data.labels.max() >= teacher.classes
    ):
        problems.append(f"images must be labelled with its classes 0..{teacher.classes - 1}")
    if teacher.text_encoder is not None and data.captions is None:
        problems.append("it reads prompts, and the images have no captions")
    if problems:
        msg = f"The data do not fit teacher {teacher.name!r}: {'; '.join(problems)}."
        raise ConfigError(msg)


def _latents(data: ImageDataset, teacher: Teacher, cache: Path | None) -> Rows:
    def make(start: int, stop: int) -> dict[str, np.ndarray]:
        parts = range(start, stop, _AT_ONCE)
        images = (np.asarray(data.images[i : min(i + _AT_ONCE, stop)]) for i in parts)
        return {"latents": np.concatenate([teacher.encode(part) for part in images])}

    entry = None if cache is None else cache / f"latents-{_key(teacher, data.fingerprint)}"
    return _kept(make, len(data.images), entry, "latents")["latents"]


def _captions(captions: Sequence[str], teacher: Teacher, cache: Path | None) -> Captions:
    different, index = np.unique(np.array(captions), return_inverse=True)
    texts = [str(text) for text in different]
    entry = None if cache is None else cache / f"captions-{_key(teacher, texts)}"
    rows = _kept(
        lambda start, stop: teacher.embed(texts[start:stop]), len(texts), entry, "captions"
    )
    null = {name: torch.from_numpy(value) for name, value in teacher.embed([""]).items()}
    return Captions(rows, torch.from_numpy(index.reshape(-1)), null)


def _kept(
    make: Callable[[int, int], Mapping[str, np.ndarray]], count: int, entry: Path | None, what: str
) -> dict[str, Rows]:
    """Make rows piece by piece, in the folder `entry` if there is one; what lies there already is opened."""
    starts = range(0, count, PIECE)

    def pieces() -> Iterator[dict[str, Tensor]]:
        for start in tqdm(starts, desc=what, disable=None):
            made = make(start, min(start + PIECE, count))
            yield {name: torch.from_numpy(value) for name, value in made.items()}

    if entry is None:
        held = list(pieces())
    else:
        names = [f"{number:05}.safetensors" for number in range(len(starts))]
        if not entry.is_dir():
            with written_aside(entry) as folder:
                for name, piece in zip(names, pieces(), strict=True):
                    store.save_weights(piece, folder / name)
        held = [load_file(entry / name) for name in names]
    return {name: Pieces(tuple(piece[name] for piece in held)) for name in held[0]}


def _key(teacher: Teacher, data: Any) -> str:
    parts = json.dumps([__version__, PIECE, teacher.fingerprint, data])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _placed(network: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Lend a network to a device."""
    home = next(network.parameters()).device
    network.to(device or home)
    try:
        yield
    finally:
        network.to(home)


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}
