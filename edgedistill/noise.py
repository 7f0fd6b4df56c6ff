"""The noise bank: drawn once from a seed per sample, so that every runtime sees the same bits."""

from collections.abc import Sequence

import numpy as np

from edgedistill.errors import ConfigError
from edgedistill.table import SamplerTable

Bank = list[np.ndarray]


def noise_bank(table: SamplerTable, seeds: Sequence[int]) -> Bank:
    """Draw unit Gaussian noise for every entry of a table's bank.

    Sample i of each entry comes from ``numpy.random.Philox(key=seeds[i])`` alone, entry after entry, so that
    neither the batch size nor the other samples change it.

    Args:
        table: Gives the number of entries and the shape of each.
        seeds: One non-negative integer per sample.

    Returns:
        `table.noise_count` float32 arrays of shape (len(seeds), channels, height, width).

    Raises:
        ConfigError: If there are no seeds, or one of them is negative or has more than 128 bits.
    """
    if not seeds or min(seeds) < 0 or max(seeds) >= 1 << 128:
        msg = f"Seeds must be one or more integers of 0 to 2^128 - 1, got {list(seeds)[:4]}."
        raise ConfigError(msg)
    shapes = bank_shapes(table)
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    return [
        np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        for shape in shapes
    ]


def bank_shapes(table: SamplerTable) -> list[tuple[int, int, int]]:
    """Return the shape (channels, height, width) of every entry of the bank."""
    return [stage.shape for stage in table.stages for _ in stage.noises]
