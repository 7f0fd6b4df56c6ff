"""Likelihood of images under a denoiser, along its probability-flow ODE.

In ``y = z/alpha`` and the noise level ``r = sigma/alpha`` every schedule has the ODE ``dy/dr = (y - D) / r``.
Its solution carries an image at the lowest level to Gaussian noise at the highest, and the logarithm of the
density changes by the integral of the divergence (Song et al., arXiv:2011.13456, section 4.3), which is
estimated with random signs (Hutchinson).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgedistill.errors import require
from edgedistill.models.denoiser import Denoiser
from edgedistill.schedule import Schedule

LEVELS = 256


@dataclass(frozen=True)
class Integration:
    """How the ODE is solved.

    Fields:
        sigma_max: Noise level sigma/alpha that counts as pure noise; where the schedule reaches less far, its own.
        rtol, atol: Of the adaptive Runge-Kutta solver of order 5(4).
        seed: Of the random signs, and of the noise at the lowest level.
    """

    sigma_max: float = 80.0
    rtol: float = 1e-3
    atol: float = 1e-3
    seed: int = 0


def bits_per_dim(log_likelihood: Tensor, dims: int, levels: int = LEVELS) -> Tensor:
    """Turn log densities of images in [-1, 1] into bits for each of their numbers.

    Args:
        log_likelihood: (batch,) in nats.
        dims: Numbers in an image.
        levels: Values that a number had before it was scaled to [-1, 1]; 256 add log2(128) = 7 bits.
    """
    return -log_likelihood / (dims * math.log(2)) + math.log2(levels / 2)


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    conditions: Mapping[str, Tensor],
    integration: Integration | None = None,
) -> Tensor:
    """Return log p(x), (batch,) float64 in nats, one estimate for each image.

    The image is noised to the lowest level r: ``log p(y) + log N(x; D(y), r^2) - log N(y; x, r^2)`` is a
    lower bound of it, tight as r goes to 0 (CTM's code; Kim et al., arXiv:2310.02279). A student of
    trajectories is asked for g(z, t, t), which is the denoiser.

    Args:
        denoiser: Unguided; a guided one has no density that its samples follow.
        x: (batch, channels, height, width) images, dequantised where they were whole numbers.
        conditions: The network's other inputs, all but s.
        integration: How the ODE is solved.

    Raises:
        MissingDependencyError: If scipy is not installed.
    """
    integration = integration or Integration()
    generator = torch.Generator().manual_seed(integration.seed)
    noise = torch.randn(x.shape, generator=generator).to(x)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    flow = _Flow(denoiser, conditions, signs)
    finite = denoiser.schedule.levels[np.isfinite(denoiser.schedule.levels)]
    low, high = float(finite[0]), min(float(finite[-1]), integration.sigma_max)
    y = x + low * noise
    ended, change = flow.solve(y, low, high, integration)
    with torch.no_grad():
        residual = (x - flow.estimate(y, low)).double() / low
    bound = (noise.double().square() - residual.square()).flatten(1).sum(1) / 2
    return _log_normal(ended, high) + change + bound


@dataclass(frozen=True)
class _Flow:
    denoiser: Denoiser
    conditions: Mapping[str, Tensor]
    signs: Tensor

    def estimate(self, y: Tensor, level: float) -> Tensor:
        """Return D at a noise level, between labels too."""
        at = Denoiser(
            self.denoiser.network,
            _schedule_at(self.denoiser.schedule, level),
            self.denoiser.prediction_type,
        ).to(y.device)
        label = torch.zeros(len(y), dtype=torch.long, device=y.device)
        alpha, _ = at.alpha_sigma(label)
        return at.x0(alpha * y, label, {**self.conditions, "s": label})

    def slope(self, level: float, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return dy/dr, and its divergence (batch,)."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x0 = self.estimate(y, level)
            (product,) = torch.autograd.grad((x0 * self.signs).sum(), y)
        trace = (product * self.signs).flatten(1).sum(1)
        return (y - x0).detach() / level, (y[0].numel() - trace) / level

    def solve(self, y: Tensor, low: float, high: float, how: Integration) -> tuple[Tensor, Tensor]:
        """Return the state at the highest level, and the integral of the divergence; float64.

        The variable is the logarithm of the level, in which the slope stays of the order of the state.
        """
        size = y.numel()

        def slope(logarithm: float, state: np.ndarray) -> np.ndarray:
            level = math.exp(logarithm)
            now = torch.from_numpy(state[:size]).to(y).reshape(y.shape)
            slopes = [item.flatten().double().cpu() for item in self.slope(level, now)]
            return level * torch.cat(slopes).numpy()

        start = np.concatenate([y.double().flatten().cpu().numpy(), np.zeros(len(y))])
        span = (math.log(low), math.log(high))
        solved = require("scipy.integrate", "train").solve_ivp(
            slope, span, start, "RK45", rtol=how.rtol, atol=how.atol
        )
        final = torch.from_numpy(solved.y[:, -1]).to(y.device)
        return final[:size].reshape(y.shape), final[size:]


def _schedule_at(schedule: Schedule, level: float) -> Schedule:
    """Return a schedule whose one label has a noise level; what lies between labels is interpolated."""
    levels = schedule.levels
    known = np.isfinite(levels)
    place = math.log(level), np.log(levels[known])
    alpha, feed, scale = (
        float(np.interp(*place, values[known]))
        for values in (schedule.alphas, schedule.feeds, schedule.in_scales)
    )
    alphas, sigmas, feeds, scales = np.array([[alpha], [level * alpha], [feed], [scale]])
    return Schedule(alphas, sigmas, feeds, scales)


def _log_normal(y: Tensor, level: float) -> Tensor:
    dims = y[0].numel()
    return -y.flatten(1).square().sum(1) / (2 * level**2) - dims * math.log(
        level * math.sqrt(2 * math.pi)
    )
