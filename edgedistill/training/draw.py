"""Randomness as a function of (seed, position): nothing to save, the same on every device and process."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(seed: int, *position: int | str) -> torch.Generator:
    """Return a CPU generator keyed by a seed and a position such as ``("fold", 17, "student")``."""
    key = hashlib.sha256("/".join(map(str, (seed, *position))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


@dataclass(frozen=True)
class Slice:
    """The part of the global batch that one process (and one accumulation step) works on."""

    total: int
    start: int
    stop: int


class PositionDraw:
    """The random numbers of one step (see `edgedistill.methods.plan.Draw`).

    Numbers are drawn for the whole global batch and cut afterwards, so that the number of processes
    and of accumulation steps does not change them.

    Args:
        seed, position: Key of the generators.
        part: Which samples of the global batch are ours.
        device: Where the tensors go.
    """

    def __init__(
        self, seed: int, position: tuple[int | str, ...], part: Slice, device: torch.device
    ) -> None:
        self._generator = generator(seed, *position)
        self._shared = generator(seed, *position, "shared")
        self._part = part
        self._device = device

    def normal(self, *shape: int) -> Tensor:
        """Return unit Gaussian noise of shape (batch, *shape), float32."""
        return self._cut(torch.randn(self._part.total, *shape, generator=self._generator))

    def uniform(self, low: float, high: float) -> Tensor:
        """Return (batch,) float32 numbers from [low, high)."""
        return self._cut(
            low + (high - low) * torch.rand(self._part.total, generator=self._generator)
        )

    def integers(self, low: int, high: int) -> Tensor:
        """Return (batch,) int64 numbers from {low, ..., high - 1}."""
        return self._cut(torch.randint(low, high, (self._part.total,), generator=self._generator))

    def shared_integer(self, low: int, high: int) -> int:
        """Return one number from {low, ..., high - 1}, the same on every process."""
        return int(torch.randint(low, high, (1,), generator=self._shared).item())

    def _cut(self, whole: Tensor) -> Tensor:
        return whole[self._part.start : self._part.stop].to(self._device)


class EpochOrder:
    """Which samples make the batch at a position: every epoch is a permutation of its own.

    Args:
        seed: Key of the permutations.
        size: Number of samples in the data.
    """

    def __init__(self, seed: int, size: int) -> None:
        self._seed = seed
        self._size = size
        self._cache: dict[int, Tensor] = {}

    def indices(self, start: int, count: int) -> Tensor:
        """Return the indices of `count` samples from running position `start`, over epoch borders."""
        positions = torch.arange(start, start + count)
        epochs, places = positions // self._size, positions % self._size
        return torch.stack([self._epoch(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._cache:
            self._cache = {k: v for k, v in self._cache.items() if k >= epoch - 1}
            self._cache[epoch] = torch.randperm(
                self._size, generator=generator(self._seed, "epoch", epoch)
            )
        return self._cache[epoch]
