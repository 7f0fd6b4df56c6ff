"""What a set of images is."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgedistill.errors import ConfigError


class Pixels(Protocol):
    """Images by number: a numpy array, or `LazyPixels`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(count, channels, height, width)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """Return the images at a slice or an array of numbers, float32 in [-1, 1]."""


class ImageDataset(Protocol):
    """Anything with these attributes can be trained on and measured against."""

    @property
    def images(self) -> Pixels:
        """float32 (count, channels, height, width) in [-1, 1]."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (count,), or None for images without classes."""

    @property
    def captions(self) -> Sequence[str] | None:
        """One sentence per image, or None."""

    @property
    def fingerprint(self) -> str:
        """Differs when any image does."""


class LazyPixels:
    """Images that are read when they are asked for; `numpy.asarray` reads them all.

    Args:
        count: Number of images, at least 1.
        read: Returns image i as 8-bit (height, width, channels).
        name: Says where image i lies, for messages.
        identity: Differs when any image does; made without reading them.
    """

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(
        self,
        count: int,
        read: Callable[[int], np.ndarray],
        name: Callable[[int], str],
        identity: str,
    ) -> None:
        self.identity = identity
        self._count, self._read, self._name = count, read, name
        self._first = read(0).shape
        height, width, channels = self._first
        self.shape = (count, channels, height, width)

    @property
    def nbytes(self) -> int:
        """Bytes that all images together would take."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers = np.arange(self._count)[index]
        images = [self._one(int(number)) for number in np.atleast_1d(numbers)]
        made = (
            from_uint8(np.stack(images)) if images else np.zeros((0, *self.shape[1:]), np.float32)
        )
        return made if numbers.ndim else made[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001
        if copy is False:
            msg = "Images that lie on disk become an array only by copying."
            raise ValueError(msg)
        return self[:].astype(dtype or self.dtype, copy=False)

    def _one(self, number: int) -> np.ndarray:
        image = self._read(number)
        if image.shape != self._first:
            msg = f"{self._name(number)}: is {image.shape}, but {self._name(0)} is {self._first} (height, width, channels); all images must agree."
            raise ConfigError(msg)
        return image


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images.

    Fields:
        images: float32 (count, channels, height, width) in [-1, 1]; lazy ones are checked as they are read.
        labels: int64 (count,) from 0, or None.
        captions: One sentence per image, or None.

    Raises:
        ConfigError: If shapes, range, labels or captions are not like that.
    """

    images: Pixels
    labels: np.ndarray | None = None
    captions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        problems = _array_problems(self.images) if isinstance(self.images, np.ndarray) else []
        if self.labels is not None:
            if self.labels.shape != self.images.shape[:1]:
                problems.append(f"{len(self.images)} images have {self.labels.shape} labels")
            elif self.labels.dtype != np.int64 or self.labels.min() < 0:
                problems.append(f"labels must be int64 from 0, got {self.labels.dtype}")
        if self.captions is not None and len(self.captions) != len(self.images):
            problems.append(f"{len(self.images)} images have {len(self.captions)} captions")
        if problems:
            msg = f"Not a set of images: {'; '.join(problems)}."
            raise ConfigError(msg)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images; where they lie on disk, of their files' names, sizes and times."""
        if isinstance(self.images, LazyPixels):
            return self.images.identity
        images = np.ascontiguousarray(self.images)
        return hashlib.sha256(f"{images.shape}".encode() + images.tobytes()).hexdigest()


def identity_of(files: Iterable[Path], shape: Any) -> str:
    """Return a SHA-256 of files' names, sizes and times, and of the shape that their images are brought to."""
    digest = hashlib.sha256(repr(shape).encode())
    for path in files:
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def from_uint8(images: np.ndarray) -> np.ndarray:
    """Map 0..255, channels last, to float32 in [-1, 1], channels first.

    Raises:
        ConfigError: If the shape is not (count, height, width, channels).
    """
    if images.ndim != 4:
        msg = f"8-bit images must be (count, height, width, channels), got {images.shape}."
        raise ConfigError(msg)
    return np.ascontiguousarray((images / 127.5 - 1.0).astype(np.float32).transpose(0, 3, 1, 2))


def _array_problems(images: np.ndarray) -> list[str]:
    if images.ndim != 4 or not images.size:
        return [f"images must be (count, channels, height, width), got {images.shape}"]
    if images.dtype != np.float32 or not np.abs(images).max() <= 1:
        return [f"images must be float32 in [-1, 1], got {images.dtype}"]
    return []
