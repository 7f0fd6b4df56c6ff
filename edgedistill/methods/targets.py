"""Target functions: pure, without gradients, and what the closed-form tests hit."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.models.denoiser import Denoiser
from edgedistill.schedule import Schedule

MOST_SHARE = 100.0
"""Of Heun's second estimate in a step from noise; beyond it next to nothing of x was left, and it says nothing."""
Predict = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["heun", "dpm", "ddim"]


def cfg_combine(conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """Return ``(1 + w) * conditional - w * unconditional``.

    Valid on raw, x0 and eps alike (same timestep, no clipping in between).

    Args:
        conditional, unconditional: (batch, channels, height, width) predictions.
        w: (batch,) Meng's weight, ``guidance_scale - 1``; 0 is conditional, -1 unconditional.

    References:
        Meng et al., arXiv:2210.03142, section 3.1.
    """
    weight = w[:, None, None, None]
    return (1 + weight) * conditional - weight * unconditional


def ddim_step(denoiser: Denoiser, z: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Move the state from t to s along the deterministic DDIM path of an x0 estimate.

    Where s equals t, the state comes back bit for bit.

    Args:
        denoiser: Gives alpha and sigma.
        z, x0: State at t and the estimate made there.
        t, s: (batch,) timesteps; s may be -1, the end.

    References:
        Song et al., arXiv:2010.02502, Eq. 12 with eta = 0.
    """
    alpha_t, sigma_t = denoiser.alpha_sigma(t)
    alpha_s, sigma_s = denoiser.alpha_sigma(s)
    ratio = sigma_s / sigma_t
    return ratio * z + (alpha_s - ratio * alpha_t) * x0


@torch.no_grad()
def solver_step(
    denoiser: Denoiser, predict: Predict, z: Tensor, t: Tensor, s: Tensor, solver: Solver
) -> Tensor:
    """Move the state from t to s along the probability-flow ODE of an x0 estimate.

    Both second-order solvers are a DDIM step of ``D_t + share * (D_s - D_t)``, where D_s is the estimate
    at the state to which D_t alone leads: Heun's rule in the noise level r = sigma/alpha has the share
    ``r_t / (2 r_s)``, and needs steps that are small in log r (from alpha = 0 the share is infinite, see
    `require_solver`); DPM-Solver++'s has 1/2 whatever the step.

    Args:
        denoiser: Gives alpha and sigma.
        predict: x0 of (state, timestep).
        z: State at t.
        t, s: (batch,) labels of at least 0, s < t.
        solver: ``ddim`` is Euler's rule, of first order.

    References:
        Karras et al., arXiv:2206.00364, Algorithm 1 (Heun); Lu et al., arXiv:2211.01095, Algorithm 1
        with r = 1.
    """
    first = predict(z, t)
    landed = ddim_step(denoiser, z, first, t, s)
    if solver == "ddim":
        return landed
    alpha_t, sigma_t = denoiser.alpha_sigma(t)
    alpha_s, sigma_s = denoiser.alpha_sigma(s)
    share = sigma_t * alpha_s / (2 * alpha_t * sigma_s) if solver == "heun" else 0.5
    return ddim_step(denoiser, z, first + share * (predict(landed, s) - first), t, s)


def require_solver(solver: Solver, schedule: Schedule, t: int, s: int) -> None:
    """Refuse Heun's rule for a first step from where next to nothing of x is left.

    Args:
        solver: Of the teacher's ODE.
        schedule: The noise schedule.
        t, s: Labels that the first step leads from and to, s < t.

    Raises:
        ConfigError: If Heun's share of the second estimate is infinite, or above `MOST_SHARE`.
    """
    before, after = float(schedule.levels[t]), float(schedule.levels[s])
    share = before / after / 2
    if solver == "heun" and share > MOST_SHARE:
        msg = (
            f"`solver: heun` cannot step from label {t} to {s}: from the noise level sigma/alpha {before:.3g} to "
            f"{after:.3g} it would take {share:.3g} times the second estimate; set `solver: dpm`."
        )
        raise ConfigError(msg)


@torch.no_grad()
def progressive_target(
    denoiser: Denoiser, predict: Predict, z: Tensor, u: Tensor, m: Tensor, s: Tensor
) -> Tensor:
    """Return the x0 that lands one student step u -> s where two teacher steps u -> m -> s land.

    Where m equals s there is no second teacher step, and the first teacher estimate is returned: the
    clamped last jump of the stochastic sampler.

    Args:
        denoiser: Gives alpha and sigma.
        predict: The teacher's x0 of (state, timestep).
        z: State at u.
        u, m, s: (batch,) timesteps, falling; s may be -1.

    Returns:
        x~ = (z'' - r z) / (alpha_s - r alpha_u), r = sigma_s / sigma_u; at sigma_s = 0 that is the
        second teacher estimate.

    References:
        Salimans and Ho, arXiv:2202.00512, Algorithm 2; with w in both networks, Meng et al.,
        arXiv:2210.03142, section 3.2.
    """
    first = predict(z, u)
    middle = ddim_step(denoiser, z, first, u, m)
    second = predict(middle, m.clamp(min=0))
    landed = ddim_step(denoiser, middle, second, m, s)
    alpha_u, sigma_u = denoiser.alpha_sigma(u)
    alpha_s, sigma_s = denoiser.alpha_sigma(s)
    ratio = sigma_s / sigma_u
    both = (landed - ratio * z) / (alpha_s - ratio * alpha_u)
    return torch.where((m == s)[:, None, None, None], first, both)


@torch.no_grad()
def matching_gradient(images: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return the direction from where the teacher sees the data to where the fake score sees the images.

    Args:
        images: (batch, channels, height, width), the student's.
        real, fake: The two estimates of x0 from the images under noise.

    Returns:
        ``(fake - real) / mean|images - real|``, the mean taken over each sample; 0 where that is undefined.

    References:
        Yin et al., arXiv:2405.14867 (DMD2), as its public code has it.
    """
    scale = (images - real).abs().flatten(1).mean(1)[:, None, None, None]
    return torch.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0)
