"""Jumps between any two times: the jump itself, the grid of times, and the sampler that makes a few of them."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods.targets import ddim_step
from edgedistill.models.denoiser import Denoiser
from edgedistill.rows import jump_and_noise_row, jump_label
from edgedistill.schedule import Schedule
from edgedistill.table import Row

END = 0
"""The label that counts as data: the lowest noise level there is."""


@dataclass(frozen=True)
class GridSettings:
    """Where jumps begin and end.

    Fields:
        kind: ``polynomial`` (Karras' time stamps, arXiv:2206.00364, equation 5) or ``trailing`` (even in
            labels, with the end).
        points: Of the training grid, both ends counted; samplers have grids of their own.
        rho, sigma_max: Of the polynomial grid, in sigma/alpha; None: from the noisiest label.
    """

    kind: Literal["polynomial", "trailing"] = "polynomial"
    points: int = 18
    rho: float = 7.0
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        if self.points < 2:
            msg = f"`points` must be at least 2, got {self.points}."
            raise ConfigError(msg)

    def labels(self, schedule: Schedule, points: int | None = None) -> tuple[int, ...]:
        """Return falling labels from noise to `END`.

        Args:
            schedule: The noise schedule.
            points: How many; None: those of the training grid.

        Raises:
            ConfigError: If the schedule is too coarse for them.
        """
        count = points or self.points
        if self.kind == "polynomial":
            return schedule.polynomial(count, self.rho, self.sigma_max)
        return (*schedule.timesteps(count - 1, "trailing"), END)

    def level(self, schedule: Schedule, place: Tensor) -> Tensor:
        """Return the noise levels sigma/alpha at places from 0 (noise) to 1 on the polynomial grid."""
        levels = schedule.levels[np.isfinite(schedule.levels)]
        ends = self.sigma_max or levels[-1], levels[0]
        high, low = (float(level) ** (1 / self.rho) for level in ends)
        made: Tensor = (high + place * (low - high)) ** self.rho
        return made


def jump(
    denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """Return G(z, t, s) of a network that is told s; z itself, bit for bit, where s equals t.

    Args:
        denoiser: Its x0 is the paper's g(z, t, s).
        z: (batch, channels, height, width) state at t.
        t, s: (batch,) labels, s <= t.
        conditions: The network's other inputs.
    """
    return ddim_step(denoiser, z, denoiser.x0(z, t, {**conditions, "s": s}), t, s)


def gamma_rows(
    schedule: Schedule, labels: tuple[int, ...], prediction_type: str, gamma: float = 0.0
) -> tuple[Row, ...]:
    """Return the rows of gamma-sampling: jumps, each followed by noise back up to the next time.

    Args:
        schedule: The noise schedule.
        labels: Falling, from noise to the end.
        prediction_type: What the network returns.
        gamma: 0 is deterministic; 1 jumps to the end every time, as consistency models do. The paper
            and its code differ in where they measure levels from; here they are the paper's, rounded to
            labels, and the noise is exactly what is missing.

    References:
        Kim et al., arXiv:2310.02279, Algorithm 2.
    """
    rows: list[Row] = []
    for t, s in itertools.pairwise(labels):
        k = jump_label(schedule, s, gamma)
        noise = 1 + sum(row.noise is not None for row in rows)
        rows.append(jump_and_noise_row(schedule, t, k, s, prediction_type, noise, target_feed="s"))
    return tuple(rows)
