"""What a set of images is."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgedistill.errors import ConfigError


class ImageDataset(Protocol):
    """Anything with these two attributes can be trained on and measured against."""

    @property
    def images(self) -> np.ndarray:
        """float32 (count, channels, height, width) in [-1, 1]."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (count,), or None for images without classes."""


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images in memory.

    Fields:
        images: float32 (count, channels, height, width) in [-1, 1].
        labels: int64 (count,) from 0, or None.

    Raises:
        ConfigError: If shapes, range or labels are not like that.
    """

    images: np.ndarray
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.images.ndim != 4 or not self.images.size:
            problems.append(
                f"images must be (count, channels, height, width), got {self.images.shape}"
            )
        elif self.images.dtype != np.float32 or not np.abs(self.images).max() <= 1:
            problems.append(f"images must be float32 in [-1, 1], got {self.images.dtype}")
        if self.labels is not None:
            if self.labels.shape != self.images.shape[:1]:
                problems.append(f"{len(self.images)} images have {self.labels.shape} labels")
            elif self.labels.dtype != np.int64 or self.labels.min() < 0:
                problems.append(f"labels must be int64 from 0, got {self.labels.dtype}")
        if problems:
            msg = f"Not a set of images: {'; '.join(problems)}."
            raise ConfigError(msg)

    def __len__(self) -> int:
        return len(self.images)
