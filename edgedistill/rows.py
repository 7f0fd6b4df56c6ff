"""Rows of a sampler in any schedule: pure functions from times to coefficients.

Compilers and training methods build their tables from these, and `edgedistill.validate` builds them again.
Most states are ``alpha_s*x0 + kept*eps + fresh*noise`` with ``kept^2 + fresh^2 = sigma_s^2``; the kinds of
rows differ in how much of the old eps they keep. A row's ``note`` says what made it: ``kind``, ``t`` (time
now), ``s`` (time after, -1 for the end), and what the network is told beside t.

In (alpha, sigma) DDIM's step is Euler's of the state z/alpha at the noise level sigma/alpha, so rows that
papers write for variance-exploding noise hold in every schedule.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

from edgedistill.errors import ConfigError
from edgedistill.mixture import CallOptions, Mixture, mixture_row
from edgedistill.multistep import multistep_next
from edgedistill.prediction import PredictionType, boundary_coefficients, eps_coefficients
from edgedistill.schedule import Schedule
from edgedistill.table import Next, Row

Trail = tuple[list[Row], float]  # the rows of a sampler, and the scale of its first noise
MAX_ORDER = 3


def ddim_row(
    schedule: Schedule,
    t: int,
    s: int,
    prediction_type: str,
    *,
    eta: float = 0.0,
    noise: int | None = None,
    **options: Unpack[CallOptions],
) -> Row:
    """Build the step t -> s of DDIM (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

    With s > t it encodes: the same equation leads from data to noise.

    Args:
        schedule: The noise schedule.
        t: Time now.
        s: Time after; -1 for the end.
        prediction_type: What the network returns.
        eta: 0 is deterministic, 1 is the variance of DDPM.
        noise: Index into the noise bank, for eta > 0; not used where s has no noise.
        **options: See `CallOptions`.

    Raises:
        ConfigError: If the prediction leaves x0 undefined at t, or eta > 0 comes without a noise index.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    snr_ratio = (alpha * sigma_s / (alpha_s * sigma)) ** 2 if eta else 1.0
    fresh = eta * sigma_s * math.sqrt(max(1 - snr_ratio, 0.0))
    kept = math.sqrt(max(sigma_s**2 - fresh**2, 0.0)) if eta else sigma_s
    note = {"kind": "ddim", "t": t, "s": s, **({"eta": eta} if eta else {})}
    return mixture_row(
        schedule, prediction_type, Mixture(alpha_s, kept, fresh, noise), note, **options
    )


def renoise_row(
    schedule: Schedule,
    t: int,
    s: int,
    prediction_type: str,
    noise: int,
    **options: Unpack[CallOptions],
) -> Row:
    """Build the step t -> s that keeps x0 alone and noises it afresh: ``alpha_s*x0 + sigma_s*noise``.

    Consistency models take their steps like this (Song et al. 2023, arXiv:2303.01469, algorithm 1).

    Raises:
        ConfigError: If the prediction leaves x0 undefined at t.
    """
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    note = {"kind": "renoise", "t": t, "s": s}
    return mixture_row(
        schedule, prediction_type, Mixture(alpha_s, 0.0, sigma_s, noise), note, **options
    )


def jump_and_noise_row(
    schedule: Schedule,
    t: int,
    k: int,
    s: int,
    prediction_type: str,
    noise: int,
    **options: Unpack[CallOptions],
) -> Row:
    """Build the stochastic step of Meng et al. 2023 (arXiv:2210.03142): DDIM t -> k, then noise k -> s.

    Args:
        schedule: The noise schedule.
        t: Time now.
        k: Time after the jump, at most s; -1 for the end.
        s: Time after the noise.
        prediction_type: What the network returns.
        noise: Index into the noise bank.
        **options: See `CallOptions`.

    Raises:
        ConfigError: If k > s, or the prediction leaves x0 undefined at t.
    """
    if k > s:
        msg = (
            f"A row that jumps to k={k} cannot be noised to the earlier time s={s}; choose k <= s."
        )
        raise ConfigError(msg)
    alpha_k, sigma_k = schedule.alpha_sigma(k)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    kept = alpha_s / alpha_k * sigma_k if k < s else sigma_s
    after = Mixture(alpha_s, kept, math.sqrt(sigma_s**2 - kept**2), noise)
    note = {"kind": "jump_and_noise", "t": t, "k": k, "s": s}
    return mixture_row(schedule, prediction_type, after, note, **options)


def return_x0_row(
    schedule: Schedule, t: int, prediction_type: str, **options: Unpack[CallOptions]
) -> Row:
    """Build the row whose state after is x0 itself.

    Raises:
        ConfigError: If the prediction leaves x0 undefined at t.
    """
    note = {"kind": "return_x0", "t": t, "s": -1}
    return mixture_row(schedule, prediction_type, Mixture(1.0), note, **options)


def consistency_row(
    schedule: Schedule,
    t: int,
    s: int,
    prediction_type: str,
    noise: int,
    *,
    timestep_scaling: float = 10.0,
    **options: Unpack[CallOptions],
) -> Row:
    """Build the step t -> s of a consistency model (Luo et al. 2023, arXiv:2310.04378): x0 noised afresh.

    The estimate of x is ``c_skip*z + c_out*x0``, which is z itself at t = 0.

    Args:
        schedule: The noise schedule.
        t: Time now.
        s: Time after; -1 for the end, which returns the estimate.
        prediction_type: What the network returns.
        noise: Index into the noise bank; not used where s is the end.
        timestep_scaling: How fast c_skip falls with t.
        **options: See `CallOptions`.

    Raises:
        ConfigError: If the prediction leaves x0 undefined at t.
    """
    alpha_s, sigma_s = (1.0, 0.0) if s < 0 else schedule.alpha_sigma(s)
    note = {"kind": "consistency", "t": t, "s": s, "timestep_scaling": timestep_scaling}
    row = mixture_row(
        schedule, prediction_type, Mixture(alpha_s, 0.0, sigma_s, noise), note, **options
    )
    c_skip, c_out = boundary_coefficients(t, timestep_scaling)
    if row.clip is None:
        return replace(row, x0=(c_skip + c_out * row.x0[0], c_out * row.x0[1]))
    return replace(row, next=replace(row.next, z=alpha_s * c_skip, x0=alpha_s * c_out))


def boundary_row(
    schedule: Schedule,
    t: int,
    s: int,
    prediction_type: str,
    *,
    timestep_scaling: float = 10.0,
    **options: Unpack[CallOptions],
) -> Row:
    """Build the deterministic step t -> s of CoDi (Mei et al. 2023, arXiv:2310.01407), as its code makes it.

    The estimate of x is ``c_skip*z + c_out*x0`` of a consistency model, clipped where `clip` says so; the
    eps that goes on is the network's own, so that the next state has a term in raw.

    Args:
        schedule: The noise schedule.
        t: Time now.
        s: Time after; -1 for the end.
        prediction_type: What the network returns.
        timestep_scaling: How fast c_skip falls with t.
        **options: See `CallOptions`.

    Raises:
        ConfigError: If the prediction leaves x0 or eps undefined at t.
    """
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    note = {"kind": "boundary", "t": t, "s": s, "timestep_scaling": timestep_scaling}
    row = mixture_row(schedule, prediction_type, Mixture(alpha_s, sigma_s), note, **options)
    c_skip, c_out = boundary_coefficients(t, timestep_scaling)
    e_z, e_r = eps_coefficients(PredictionType(prediction_type), *schedule.alpha_sigma(t))
    return replace(
        row,
        x0=(c_skip + c_out * row.x0[0], c_out * row.x0[1]),
        next=Next(z=sigma_s * e_z, x0=alpha_s, raw=sigma_s * e_r),
    )


def analytic_row(schedule: Schedule, t: int, s: int) -> Row:
    """Build a DDIM step t -> s that calls no network: eps is taken to be the state at unit variance.

    That is close to the truth where next to nothing of x is left, for the first step of a sampler (Dockhorn
    et al. 2022, arXiv:2210.05475); with alpha = 1 it is ``(1 + (s - t)/sqrt(1 + t^2)) z``.

    Raises:
        ConfigError: If t or s lies outside of the schedule.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    scale = math.hypot(alpha, sigma)
    # eps = z / scale; x0 = (z - sigma*eps) / alpha = alpha / (scale * (scale + sigma)) * z, at alpha = 0 too.
    z = (sigma_s + alpha_s * alpha / (scale + sigma)) / scale
    return Row(call=(), next=Next(z=z), note={"kind": "analytic", "t": t, "s": s})


def multistep_row(
    schedule: Schedule,
    t: int,
    s: int,
    prediction_type: str,
    *,
    past: Sequence[int] = (),
    **options: Unpack[CallOptions],
) -> Row:
    """Build the step t -> s of DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) with earlier estimates of x.

    Args:
        schedule: The noise schedule.
        t: Time now.
        s: Time after; -1 for the end, for which nothing of the past can be used.
        prediction_type: What the network returns.
        past: Times of the rows before whose x0 is used, the newest first; none is DDIM, at most two.
        **options: See `CallOptions`.

    Raises:
        ConfigError: If the prediction leaves x0 undefined at t, the times do not fall, or there are more
            of the past than can be used.
    """
    times = [*reversed(past), t, s]
    points = [schedule.alpha_sigma(item) for item in times]
    falls = all(before > after for before, after in itertools.pairwise(times))
    if not falls or len(past) >= MAX_ORDER or (past and points[-1][1] == 0):
        msg = f"A multistep row takes at most {MAX_ORDER - 1} times of the past, falling to s, and none where s has no noise; got {times}."
        raise ConfigError(msg)
    note = {"kind": "multistep", "t": t, "s": s, "past": list(past)}
    row = mixture_row(schedule, prediction_type, Mixture(*points[-1]), note, **options)
    return replace(row, next=multistep_next(points))


def jump_label(schedule: Schedule, s: int, gamma: float) -> int:
    """Return the label k that CTM's gamma-sampling jumps to before it adds noise back up to s.

    Its level sigma/alpha is nearest to ``sqrt(1 - gamma^2)`` times that of s: gamma 0 jumps to s itself, 1
    to label 0 (Kim et al. 2023, arXiv:2310.02279).

    Raises:
        ConfigError: If gamma is outside of [0, 1].
    """
    if not 0 <= gamma <= 1:
        msg = f"`gamma` must lie in [0, 1], got {gamma}."
        raise ConfigError(msg)
    if s < 0 or gamma == 0:
        return s
    share = math.sqrt(1 - gamma**2)
    return schedule.label_of(share * float(schedule.levels[s]) if share else 0.0)


BUILDERS: Mapping[str, Callable[..., Row]] = {
    "analytic": analytic_row,
    "boundary": boundary_row,
    "consistency": consistency_row,
    "ddim": ddim_row,
    "jump_and_noise": jump_and_noise_row,
    "multistep": multistep_row,
    "renoise": renoise_row,
    "return_x0": return_x0_row,
}
"""By the ``kind`` in a row's note; the note's other entries are the builder's arguments of that name."""
