"""Rows of the solvers that walk down a list of noise levels: Euler and DPM-Solver++.

The levels follow diffusers' arithmetic: interpolated between the schedule's own or spread by Karras' rule,
and rounded to float32. A level sigma/alpha of a variance-preserving schedule has alpha =
1/sqrt(level^2 + 1), whether or not a timestep has the same one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from edgedistill.errors import ConfigError
from edgedistill.mixture import CallOptions, networks_of
from edgedistill.multistep import Point, multistep_next
from edgedistill.prediction import SIGMA_DATA, PredictionType, x0_coefficients
from edgedistill.rows import MAX_ORDER, Trail, multistep_row
from edgedistill.schedule import Schedule, check_num_steps, edm_levels, karras_levels, shifted
from edgedistill.table import Row

Levels = tuple[
    list[float], list[float]
]  # the label of each row; sigma/alpha before each and after the last
_ALPHA_AT_ZERO_SNR = 2.0**-12


@dataclass(frozen=True, eq=False)
class Descent:
    """The path of a solver.

    Fields:
        times: The label of each row; it may lie between two of the schedule's.
        feeds: What the network is told at each row.
        points: (alpha, sigma) of the state before each row, and after the last one.
        in_scales: Multiply the state before the network sees it, at each row.
    """

    times: Sequence[float]
    feeds: Sequence[float]
    points: Sequence[Point]
    in_scales: Sequence[float]


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
    times, levels = _euler_levels(full, num_steps)
    scales = [_alpha(level) for level in levels[:-1]]
    path = Descent(times, times, [(1.0, level) for level in levels], scales)
    top = max(levels)
    first = math.hypot(top, 1.0) if full["timestep_spacing"] == "leading" else top
    return _rows(full, path, "euler", options), first


def dpm_rows(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build the rows of DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithm 2, midpoint).

    Args:
        full: A configuration of diffusers' DPMSolverMultistepScheduler, absent keys filled in.
        num_steps: Number of rows.
        options: How rows call the network.

    Raises:
        ConfigError: If the spacing or the number of steps is not possible.
    """
    times, levels = _dpm_levels(full, num_steps)
    points = [(_alpha(level), level * _alpha(level)) for level in levels]
    path = Descent(times, times, points, [1.0] * num_steps)
    return _rows(full, path, "dpmsolver++", options), 1.0


def swift_rows(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build the rows of DPM-Solver++ (2M) as Apple's Swift package takes them (apple/ml-stable-diffusion).

    From diffusers' they differ in the grid, and below 15 steps in the row before the last, which is of first
    order too. The package decodes its last estimate of x, so that is what the last row returns.

    Args:
        full: Its fixed schedule, and ``timestep_spacing``: linspace, leading or karras.
        num_steps: Number of rows.
        options: How rows call the network.

    Raises:
        ConfigError: If the package cannot take so many steps.
    """
    times, levels = _swift_levels(full, num_steps)
    points = [(_alpha(level), level * _alpha(level)) for level in [*levels, 0.0]]
    path = Descent(times, times, points, [1.0] * num_steps)
    orders = solver_orders(num_steps, 2, lower_order_final=False)
    first_order = 2 if num_steps < 15 else 1
    orders[-first_order:] = [1] * min(first_order, num_steps)
    return _rows(full, path, "dpmsolver++", options, orders), 1.0


def edm_euler_rows(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build Euler's rows of diffusers' EDMEulerScheduler; arguments and errors are those of `euler_rows`."""
    path = _edm_path(full, num_steps)
    return _rows(full, path, "euler", options), math.hypot(full["sigma_max"], 1.0)


def edm_dpm_rows(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build the rows of diffusers' EDMDPMSolverMultistepScheduler, as `dpm_rows` does."""
    path = _edm_path(full, num_steps, float(np.float32(full["sigma_min"])))
    return _rows(full, path, "dpmsolver++", options), math.hypot(full["sigma_max"], 1.0)


def flow_rows(full: Mapping[str, Any], num_steps: int, options: CallOptions) -> Trail:
    """Build Euler's rows of diffusers' FlowMatchEulerDiscreteScheduler; arguments and errors as above.

    Its levels are shifted twice: they are spread between the ends of a schedule that is shifted already.
    """
    schedule = Schedule.from_config(full)
    T = schedule.num_train_timesteps
    check_num_steps(num_steps, T)
    even = np.linspace(schedule.sigmas[-1] * T, schedule.sigmas[0] * T, num_steps) / T
    sigmas = shifted(even, float(full["shift"])).astype(np.float32).astype(np.float64)
    points = [(1 - sigma, sigma) for sigma in [*sigmas.tolist(), 0.0]]
    path = Descent(_labels(schedule, sigmas), (sigmas * T).tolist(), points, [1.0] * num_steps)
    return _rows(full, path, "euler", options), schedule.first_scale


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
    orders = solver_orders(count, order, lower_order_final=lower_order_final)
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


def solver_orders(count: int, order: int, *, lower_order_final: bool) -> list[int]:
    """Return the order of each of `count` steps: one more than that of the step before, up to `order`.

    With `lower_order_final` no step looks back further than is left to go.
    """
    return [min(order, i + 1, count - i if lower_order_final else order) for i in range(count)]


def _dpm_orders(full: Mapping[str, Any], path: Descent) -> list[int]:
    count = len(path.times)
    lowers = full["lower_order_final"] and count < 15
    orders = solver_orders(count, full["solver_order"], lower_order_final=lowers)
    if full["euler_at_final"] or path.points[-1][1] == 0:
        orders[-1] = 1
    return orders


def _rows(
    full: Mapping[str, Any],
    path: Descent,
    solver: str,
    options: CallOptions,
    orders: Sequence[int] | None = None,
) -> list[Row]:
    kind = PredictionType(full["prediction_type"])
    if orders is None:
        orders = [1] * len(path.times) if solver == "euler" else _dpm_orders(full, path)
    rows = []
    for i, (t, s) in enumerate(zip(path.times, [*path.times[1:], -1.0], strict=True)):
        alpha, sigma = path.points[i]
        scale = path.in_scales[i]
        # What the network sees is noised with scale*alpha and scale*sigma.
        a_z, a_r = x0_coefficients(kind, alpha * scale, sigma * scale)
        row = Row(
            call=networks_of(options),
            feeds={options.get("feeds_name", "timestep"): path.feeds[i]},
            in_scale=scale,
            guidance_scale=options.get("guidance_scale"),
            x0=(a_z * scale, a_r),
            next=multistep_next(path.points[i + 1 - orders[i] : i + 2]),
            note={"kind": solver, "t": t, "s": s},
        )
        rows.append(row)
    return rows


def _edm_path(full: Mapping[str, Any], num_steps: int, lowest: float | None = None) -> Descent:
    """Lay out the path; one that ends with noise ends at `lowest`, or stays at its last level."""
    schedule = Schedule.from_config(full)
    check_num_steps(num_steps, schedule.num_train_timesteps)
    levels = edm_levels(full, num_steps)
    end = levels.tolist()[-1] if lowest is None else lowest
    last = 0.0 if full["final_sigmas_type"] == "zero" else end
    return Descent(
        _labels(schedule, levels),
        (np.log(levels) / 4).tolist(),
        [(1.0, level) for level in [*levels.tolist(), last]],
        (1 / np.hypot(levels, SIGMA_DATA)).tolist(),
    )


def _labels(schedule: Schedule, sigmas: np.ndarray) -> list[float]:
    """Interpolate the labels of sigmas: what notes say of rows between two labels."""
    return np.interp(sigmas, schedule.sigmas, np.arange(len(schedule.sigmas))).tolist()


def _euler_levels(full: Mapping[str, Any], num_steps: int) -> Levels:
    schedule, levels = _known_levels(full)
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
        chosen = karras_levels(
            chosen[0] if high is None else high, chosen[-1] if low is None else low, num_steps
        )
        times = _times(chosen, levels)
    return _ended(full, times, chosen, levels[0])


def _dpm_levels(full: Mapping[str, Any], num_steps: int) -> Levels:
    schedule, levels = _known_levels(full)
    T = schedule.num_train_timesteps
    check_num_steps(num_steps, T)
    if full["use_karras_sigmas"]:
        chosen = karras_levels(levels[-1], levels[0], num_steps)
        times = _times(chosen, levels)
        times = np.trunc(times) if full["beta_schedule"] == "squaredcos_cap_v2" else times.round()
        return _ended(full, times, chosen, levels[0])
    top = T - int(np.sum(-np.log(levels) < full["lambda_min_clipped"]))
    times = _dpm_times(full, num_steps, top, T)
    return _ended(full, times, np.interp(times, np.arange(T), levels), levels[0])


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


def _swift_levels(full: Mapping[str, Any], num_steps: int) -> Levels:
    """Return the whole timestep and the level of each row; the package looks a row up by its timestep."""
    schedule, levels = _known_levels(full)
    last, spacing = schedule.num_train_timesteps - 1, full["timestep_spacing"]
    check_num_steps(num_steps, last - 1)
    if spacing == "karras":
        chosen = karras_levels(levels[-1], levels[0], num_steps)
        times = _times(chosen, levels).round()
    elif spacing == "leading":
        times = 1 + np.arange(num_steps, 0, -1.0) * (last // (num_steps + 1))
        chosen = levels[times.astype(np.int64)]
    else:
        # In float32, halves up, where diffusers' numpy counts in float64 and rounds halves to even.
        grid = np.arange(num_steps, 0, -1, np.float32) * (np.float32(last) / np.float32(num_steps))
        times = np.floor(grid.astype(np.float64) + 0.5)
        chosen = levels[times.astype(np.int64)]
    if np.any(np.diff(times) >= 0) or (spacing == "karras" and num_steps == 1):
        msg = f"The Swift package cannot take {num_steps} steps of spacing {spacing}: it needs two or more with timesteps of their own; take another number."
        raise ConfigError(msg)
    return times.tolist(), chosen.tolist()


def _known_levels(full: Mapping[str, Any]) -> tuple[Schedule, np.ndarray]:
    """Return the schedule and sigma/alpha of its timesteps; diffusers makes an alpha of zero a tiny one."""
    schedule = Schedule.from_config(full)
    alphas, sigmas = schedule.alphas.copy(), schedule.sigmas.copy()
    if full.get("rescale_betas_zero_snr"):
        alphas[-1] = _ALPHA_AT_ZERO_SNR
        sigmas[-1] = math.sqrt(1 - _ALPHA_AT_ZERO_SNR**2)
    return schedule, (sigmas / alphas).astype(np.float32).astype(np.float64)


def _times(chosen: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Interpolate timesteps in the logarithm, which diffusers keeps in float32: some callers truncate them."""
    known = np.log(levels.astype(np.float32))
    wanted = np.log(chosen)
    below = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    low, high = known[below], known[below + 1]
    share = np.clip((low - wanted) / (low - high), 0, 1)
    return (1 - share) * below + share * (below + 1)


def _ended(full: Mapping[str, Any], times: np.ndarray, chosen: np.ndarray, lowest: float) -> Levels:
    """Add the end, round, and refuse what does not fall."""
    last = 0.0 if full["final_sigmas_type"] == "zero" else lowest
    levels = np.append(chosen, last).astype(np.float32).astype(np.float64)
    if np.any(np.diff(levels[:-1]) >= 0) or levels[-2] < levels[-1]:
        msg = f"{len(times)} steps with these settings do not fall at every row; take fewer steps or another spacing."
        raise ConfigError(msg)
    return times.tolist(), levels.tolist()


def _alpha(level: float) -> float:
    return 1 / math.hypot(level, 1.0)
