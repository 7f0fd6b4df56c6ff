"""The noise bank: one stream per seed, whatever the batch and the process."""

import hashlib

import numpy as np
import pytest

from edgedistill.errors import ConfigError
from edgedistill.noise import bank_shapes, noise_bank
from edgedistill.table import Next, Row, SamplerTable, Stage

NOISY = Row(("unet",), {"timestep": 9.0}, next=Next(x0=0.5, noise=0.5), noise=1)
PLAIN = Row(("unet",), {"timestep": 1.0}, next=Next(x0=1.0))
TABLE = SamplerTable(
    (
        Stage((1, 4, 4), (NOISY, PLAIN)),
        Stage((1, 8, 8), (PLAIN,), init_noise=(1.0, 2), carry="up_nearest"),
    ),
    noise_count=3,
)


def test_each_entry_has_the_shape_of_its_stage() -> None:
    assert bank_shapes(TABLE) == [(1, 4, 4), (1, 4, 4), (1, 8, 8)]
    bank = noise_bank(TABLE, [5, 6])
    assert [item.shape for item in bank] == [(2, 1, 4, 4), (2, 1, 4, 4), (2, 1, 8, 8)]
    assert all(item.dtype == np.float32 for item in bank)


def test_the_batch_does_not_change_a_sample() -> None:
    together = noise_bank(TABLE, [3, 1, 4])
    for position, seed in enumerate([3, 1, 4]):
        for whole, alone in zip(together, noise_bank(TABLE, [seed]), strict=True):
            assert np.array_equal(whole[position], alone[0])


def test_seeds_and_entries_are_independent_unit_normals() -> None:
    bank = noise_bank(TABLE, range(500))
    first, second = (item.reshape(-1) for item in bank[:2])
    count = first.size
    assert abs(float(first.mean())) < 5 / count**0.5
    assert abs(float(first.std()) - 1) < 5 / (2 * count) ** 0.5
    assert abs(float(np.mean(first * second))) < 5 / count**0.5
    assert abs(float(np.mean(bank[0][0] * bank[0][1]))) < 5 / 16**0.5
    assert len(np.unique(bank[0][:, 0, 0, 0])) == 500


def test_the_bits_are_those_of_every_run_before() -> None:
    digest = hashlib.sha256(b"".join(item.tobytes() for item in noise_bank(TABLE, [0, 2**100])))
    assert digest.hexdigest() == "a7dae24e57277c93973030e049c1a871d3f8653ae4b412f83ea62cf4a869b047"


@pytest.mark.parametrize("seeds", [[], [1, -1], [1 << 128]])
def test_refused_seeds(seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"integers of 0 to 2\^128 - 1"):
        noise_bank(TABLE, seeds)
