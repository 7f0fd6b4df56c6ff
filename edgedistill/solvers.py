"""Rows of the solvers that walk down a list of noise levels sigma/alpha: Euler and DPM-Solver++.

The levels follow diffusers' arithmetic: interpolated between the schedule's own or spread by Karras' rule,
and rounded to float32. A level has alpha = 1/sqrt(level^2 + 1), whether or not a timestep has the same one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from edgedistill.errors import ConfigError
from edgedistill.mixture import CallOptions, networks_of
from edgedistill.prediction import PredictionType, x0_coefficients
from edgedistill.rows import MAX_ORDER, Trail, multistep_row
from edgedistill.schedule import Schedule, check_num_steps
from edgedistill.table import Next, Row

_RHO = 7.0
_ALPHA_AT_ZERO_SNR = 2.0**-12


@dataclass(frozen=True, eq=False)
class Descent:
    """The path of a solver.

    Fields:
        times: The label that the network is fed at each row.
        levels: sigma/alpha before each row, and after the last one.
    """

    times: tuple[float, ...]
    levels: tuple[float, ...]


def euler_rows(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build Euler's rows (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without noise).

    The state is x + level*eps, and the network sees it scaled by alpha.

    Args:
        full: A configuration of diffusers' EulerDiscreteScheduler, absent keys filled in.
        num_steps: Number of rows.
        options: How rows call the network.

    Raises:
        ConfigError: If the spacing or the number of steps is not possible.
    """
    path = _euler_descent(full, num_steps)
    rows = []
    for index, level in enumerate(path.levels[:-1]):
        alpha = _alpha(level)
        ratio = path.levels[index + 1] / level
        a_z, a_r = x0_coefficients(PredictionType(full["prediction_type"]), alpha, level * alpha)
        rows.append(
            _row(path, index, "euler", options, alpha, (a_z * alpha, a_r), Next(ratio, 1 - ratio))
        )
    top = max(path.levels)
    return rows, math.hypot(top, 1.0) if full["timestep_spacing"] == "leading" else top


def dpm_rows(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build the rows of DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2, midpoint).

    Args:
        full: A configuration of diffusers' DPMSolverMultistepScheduler, absent keys filled in.
        num_steps: Number of rows.
        options: How rows call the network.

    Raises:
        ConfigError: If the spacing or the number of steps is not possible.
    """
    path = _dpm_descent(full, num_steps)
    last_is_first_order = (
        full["euler_at_final"]
        or (full["lower_order_final"] and num_steps < 15)
        or path.levels[-1] == 0
    )
    rows = []
    for index, level in enumerate(path.levels[:-1]):
        first_order = full["solver_order"] == 1 or index == 0
        first_order |= index == num_steps - 1 and last_is_first_order
        after = _dpm_next(path.levels[max(index - 1, 0) : index + 2], first_order=first_order)
        alpha = _alpha(level)
        x0 = x0_coefficients(PredictionType(full["prediction_type"]), alpha, level * alpha)
        rows.append(_row(path, index, "dpmsolver++", options, 1.0, x0, after))
    return rows, 1.0


def multistep_rows(
    schedule: Schedule,
    times: Sequence[int],
    prediction_type: str,
    *,
    order: int = MAX_ORDER,
    lower_order_final: bool = True,
    **options: Unpack[CallOptions],
) -> list[Row]:
    """Build the rows of DPM-Solver++ over any labels (Lu et al. 2022, arXiv:2211.01095).

    Args:
        schedule: The noise schedule.
        times: Falling labels, the last of which (it may be -1) is where the last row ends.
        prediction_type: What the network returns.
        order: At most 3; the first rows have less, as has a row that ends without noise.
        lower_order_final: Whether the last rows fall back to second and first order.
        **options: How rows call the network.

    Raises:
        ConfigError: If the times do not fall, or the prediction leaves x0 undefined at one of them.
    """
    count = len(times) - 1
    orders = solver_orders(count, order, count if lower_order_final else 0)
    if count and schedule.alpha_sigma(times[-1])[1] == 0:
        orders[-1] = 1
    return [
        multistep_row(
            schedule,
            times[i],
            times[i + 1],
            prediction_type,
            past=times[i - now + 1 : i][::-1],
            **options,
        )
        for i, now in enumerate(orders)
    ]


def solver_orders(count: int, order: int, lowered: int) -> list[int]:
    """Return the order of each of `count` steps: one more than the step before has, up to `order`.

    The last `lowered` steps do not look back further than is left to go.
    """
    return [min(order, i + 1, count - i if i >= count - lowered else order) for i in range(count)]


def _dpm_next(levels: tuple[float, ...], *, first_order: bool) -> Next:
    """Step from the second-last of `levels` to the last; in log(level), the second order extrapolates x0."""
    now, after = levels[-2:]
    alpha, alpha_after = _alpha(now), _alpha(after)
    z = after * alpha_after / (now * alpha)
    gain = alpha_after - z * alpha
    if first_order:
        return Next(z=z, x0=gain)
    slope = 0.5 * gain * math.log(now / after) / math.log(levels[0] / now)
    return Next(z=z, x0=gain + slope, previous=(-slope,))


def _row(
    path: Descent,
    index: int,
    kind: str,
    options: CallOptions,
    in_scale: float,
    x0: tuple[float, float],
    after: Next,
) -> Row:
    t = path.times[index]
    following = path.times[index + 1] if index + 1 < len(path.times) else -1.0
    return Row(
        call=networks_of(options),
        feeds={options.get("feeds_name", "timestep"): t},
        in_scale=in_scale,
        guidance_scale=options.get("guidance_scale"),
        x0=x0,
        next=after,
        note={"kind": kind, "t": t, "s": following},
    )


def _euler_descent(full: Mapping[str, Any], num_steps: int) -> Descent:
    schedule, levels = _levels(full)
    if full["timestep_spacing"] == "linspace":
        check_num_steps(num_steps, schedule.num_train_timesteps)
        grid = np.linspace(0, schedule.num_train_timesteps - 1, num_steps)[::-1]
    else:
        offset = full["steps_offset"]
        grid = np.array(schedule.timesteps(num_steps, full["timestep_spacing"], offset))
    times = grid.astype(np.float32).astype(np.float64)
    chosen = np.interp(times, np.arange(len(levels)), levels)
    if full["use_karras_sigmas"]:
        low, high = full.get("sigma_min"), full.get("sigma_max")
        chosen = _karras(
            chosen[-1] if low is None else low, chosen[0] if high is None else high, num_steps
        )
        times = _times(chosen, levels)
    return _descent(full, times, chosen, levels[0])


def _dpm_descent(full: Mapping[str, Any], num_steps: int) -> Descent:
    schedule, levels = _levels(full)
    T = schedule.num_train_timesteps
    check_num_steps(num_steps, T)
    if full["use_karras_sigmas"]:
        chosen = _karras(levels[0], levels[-1], num_steps)
        times = _times(chosen, levels)
        times = np.trunc(times) if full["beta_schedule"] == "squaredcos_cap_v2" else times.round()
        return _descent(full, times, chosen, levels[0])
    top = T - int(np.sum(-np.log(levels) < full["lambda_min_clipped"]))
    times = _dpm_times(full, num_steps, top, T)
    return _descent(full, times, np.interp(times, np.arange(T), levels), levels[0])


def _dpm_times(full: Mapping[str, Any], num_steps: int, top: int, T: int) -> np.ndarray:
    spacing = full["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, top - 1, num_steps + 1).round()[:0:-1]
    if spacing == "leading":
        return np.arange(num_steps, 0, -1.0) * (top // (num_steps + 1)) + full["steps_offset"]
    if spacing == "trailing":
        return np.arange(top, 0, -T / num_steps)[:num_steps].round() - 1
    msg = f"`timestep_spacing` must be leading, trailing or linspace, got {spacing!r}."
    raise ConfigError(msg)


def _levels(full: Mapping[str, Any]) -> tuple[Schedule, np.ndarray]:
    """Return the schedule and sigma/alpha of its timesteps; diffusers makes an alpha of zero a tiny one."""
    schedule = Schedule.from_config(full)
    alphas, sigmas = schedule.alphas.copy(), schedule.sigmas.copy()
    if full.get("rescale_betas_zero_snr"):
        alphas[-1] = _ALPHA_AT_ZERO_SNR
        sigmas[-1] = math.sqrt(1 - _ALPHA_AT_ZERO_SNR**2)
    return schedule, (sigmas / alphas).astype(np.float32).astype(np.float64)


def _karras(low: float, high: float, count: int) -> np.ndarray:
    """Spread levels evenly in their 7th root (Karras et al. 2022, arXiv:2206.00364, equation 5)."""
    ramp = np.linspace(0, 1, count)
    return (high ** (1 / _RHO) + ramp * (low ** (1 / _RHO) - high ** (1 / _RHO))) ** _RHO


def _times(chosen: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Interpolate timesteps in the logarithm, which diffusers keeps in float32: some callers truncate them."""
    known = np.log(levels.astype(np.float32))
    wanted = np.log(chosen)
    below = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    low, high = known[below], known[below + 1]
    share = np.clip((low - wanted) / (low - high), 0, 1)
    return (1 - share) * below + share * (below + 1)


def _descent(
    full: Mapping[str, Any], times: np.ndarray, chosen: np.ndarray, lowest: float
) -> Descent:
    last = 0.0 if full["final_sigmas_type"] == "zero" else lowest
    levels = np.append(chosen, last).astype(np.float32).astype(np.float64)
    if np.any(np.diff(levels[:-1]) >= 0) or levels[-2] < levels[-1]:
        msg = f"{len(times)} steps with these settings do not fall at every row; take fewer steps or another spacing."
        raise ConfigError(msg)
    return Descent(tuple(float(t) for t in times), tuple(float(level) for level in levels))


def _alpha(level: float) -> float:
    return 1 / math.hypot(level, 1.0)
