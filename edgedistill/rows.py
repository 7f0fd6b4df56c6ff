"""Rows of a variance-preserving sampler: pure functions from times to coefficients.

Compilers and training methods build their tables from these, and `edgedistill.validate` builds them again.
Every state is ``alpha_s*x0 + kept*eps + fresh*noise`` with ``kept^2 + fresh^2 = sigma_s^2``; the kinds of
rows differ in how much of the old eps they keep. A row's ``note`` says what made it: ``kind``, ``t`` (time
now), ``s`` (time after, -1 for the end).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

from edgedistill.errors import ConfigError
from edgedistill.prediction import PredictionType, eps_coefficients, x0_coefficients
from edgedistill.schedule import Schedule
from edgedistill.table import Next, Row

Range = tuple[float, float]
Trail = tuple[list[Row], float]  # the rows of a sampler, and the scale of its first noise
_SIGMA_DATA = 0.5


class CallOptions(TypedDict, total=False):
    """How a row calls its network.

    Fields:
        network: Name of the network; left out: ``"unet"``.
        clip: Range that x0 is clipped to; left out: none.
        guidance_scale: g of a row that calls twice; left out: a single call.
        feeds_name: The network input that takes t; left out: ``"timestep"``.
    """

    network: str
    clip: Range | None
    guidance_scale: float | None
    feeds_name: str


@dataclass(frozen=True)
class Mixture:
    """The state after a row.

    Fields:
        x0, eps, noise: Shares of the estimate of x, of the eps that goes with it, and of fresh noise.
        index: Of the fresh noise in the bank.
    """

    x0: float
    eps: float = 0.0
    noise: float = 0.0
    index: int | None = None


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
    fresh = eta * sigma_s / sigma * math.sqrt(max(1 - (alpha / alpha_s) ** 2, 0.0)) if eta else 0.0
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
    scaled = t * timestep_scaling
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / math.hypot(scaled, _SIGMA_DATA)
    if row.clip is None:
        return replace(row, x0=(c_skip + c_out * row.x0[0], c_out * row.x0[1]))
    return replace(row, next=replace(row.next, z=alpha_s * c_skip, x0=alpha_s * c_out))


BUILDERS: Mapping[str, Callable[..., Row]] = {
    "ddim": ddim_row,
    "renoise": renoise_row,
    "jump_and_noise": jump_and_noise_row,
    "consistency": consistency_row,
    "return_x0": return_x0_row,
}
"""By the ``kind`` in a row's note; the note's other entries are the builder's arguments of that name."""


def mixture_row(
    schedule: Schedule,
    prediction_type: str,
    after: Mixture,
    note: Mapping[str, Any],
    **options: Unpack[CallOptions],
) -> Row:
    """Build the row that calls a network at ``note["t"]`` and leaves the mixture `after`.

    Where x0 is clipped, eps is that of the x0 before the clip, as in diffusers; hence the term in raw.

    Raises:
        ConfigError: If the prediction leaves x0 or eps undefined, or noise comes without an index.
    """
    t, kind, clip = note["t"], PredictionType(prediction_type), options.get("clip")
    alpha, sigma = _defined(schedule, t, kind)
    if after.noise and after.index is None:
        msg = f"The row at t={t} adds noise and needs an index into the noise bank; give `noise`."
        raise ConfigError(msg)
    if clip is None:
        z, raw, x0 = after.eps / sigma, 0.0, after.x0 - after.eps * alpha / sigma
    else:
        z, raw = (after.eps * item for item in eps_coefficients(kind, alpha, sigma))
        x0 = after.x0
    return Row(
        call=(options.get("network", "unet"),),
        feeds={options.get("feeds_name", "timestep"): float(t)},
        guidance_scale=options.get("guidance_scale"),
        x0=x0_coefficients(kind, alpha, sigma),
        clip=clip,
        next=Next(z=z, x0=x0, raw=raw, noise=after.noise),
        noise=after.index if after.noise else None,
        note=note,
    )


def _defined(schedule: Schedule, t: int, kind: PredictionType) -> tuple[float, float]:
    if t < 0:
        msg = f"A row that calls a network needs a timestep of at least 0, got {t}."
        raise ConfigError(msg)
    alpha, sigma = schedule.alpha_sigma(t)
    if alpha == 0 and kind is PredictionType.EPSILON:
        msg = (
            f"At timestep {t} alpha is 0 and a network that predicts epsilon says nothing of x; "
            "convert it to v_prediction, or set `rescale_betas_zero_snr` to false."
        )
        raise ConfigError(msg)
    if sigma == 0:
        msg = f"At timestep {t} sigma is 0 and there is nothing to denoise; start at a later one."
        raise ConfigError(msg)
    return alpha, sigma
