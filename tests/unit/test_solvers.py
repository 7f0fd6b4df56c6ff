"""Solver rows over arbitrary labels against equations written out in numpy, and native loops against the table loop."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ConfigError
from edgedistill.rows import (
    analytic_row,
    boundary_row,
    ddim_row,
    jump_and_noise_row,
    jump_label,
)
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule
from edgedistill.solvers import multistep_rows, solver_orders
from edgedistill.table import Row, SamplerTable, Stage

SHAPE = (2, 3, 3)
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "vp": Schedule.from_config(SCALED),
    "zero_snr": Schedule.from_config({**SCALED, "rescale_betas_zero_snr": True}),
    "edm": Schedule.from_config({"_class_name": "EDMEulerScheduler"}),
    "flow": Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}),
}
KINDS = {"vp": "epsilon", "zero_snr": "v_prediction", "edm": "edm", "flow": "flow"}
Net = Callable[[np.ndarray, float], np.ndarray]


def net(z: np.ndarray, fed: float) -> np.ndarray:
    return np.tanh(z[..., ::-1] * 0.9) + 0.1 * np.cos(z + fed)


def noises(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(5).standard_normal((count, 2, *SHAPE)))


def by_table(rows: Sequence[Row], first: float, bank: list[np.ndarray]) -> np.ndarray:
    """Run rows through the loop of the runtimes, in float64."""
    table = SamplerTable((Stage(SHAPE, tuple(rows), init_noise=(first, 0)),), len(bank))

    def network(feeds: Any) -> dict[str, np.ndarray]:
        return {"out_sample": net(feeds["sample"], feeds["timestep"] + feeds.get("s", 0.0))}

    return np.asarray(run_table(table, {"unet": network}, bank, {}))


def x0_of(name: str, z: np.ndarray, t: int) -> np.ndarray:
    """Return the estimate of x, from the definition of each kind."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.alpha_sigma(t)
    if name == "edm":
        raw = net(z / math.sqrt(sigma**2 + 0.25), math.log(sigma) / 4)
        c_out = sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        return 0.25 / (sigma**2 + 0.25) * z + c_out * raw
    if name == "flow":
        return z - sigma * net(z, 1000 * sigma)
    raw = net(z, float(t))
    return alpha * z - sigma * raw if name == "zero_snr" else (z - sigma * raw) / alpha


def dpm_reference(name: str, times: Sequence[int], z: np.ndarray, order: int) -> np.ndarray:
    """DPM-Solver++ of orders 1 to 3 with lower orders at both ends, from the equations.

    The x0 of the last steps are interpolated in lambda = log(alpha/sigma); integrals of exp(lambda) * u^k
    over the step give the weights. The second order takes the midpoint's weight, the third half of the
    integral of u^2.
    """
    schedule, steps = SCHEDULES[name], len(times) - 1
    ends = schedule.alpha_sigma(times[-1])[1] == 0
    lambdas, estimates = [], []
    for i in range(steps):
        (a, s), (a2, s2) = schedule.alpha_sigma(times[i]), schedule.alpha_sigma(times[i + 1])
        estimates.append(x0_of(name, z, times[i]))
        lambdas.append(math.log(a / s) if a > 0 else -math.inf)
        now = 1 if ends and i == steps - 1 else min(order, i + 1, steps - i)
        weight = a2 - s2 / s * a
        after = s2 / s * z + weight * estimates[i]
        if now > 1:
            h = math.log(a2 / s2) - lambdas[i]
            slope = (estimates[i] - estimates[i - 1]) / (lambdas[i] - lambdas[i - 1])
        if now == 2:
            after = after + weight * h / 2 * slope
        if now == 3:
            older = (estimates[i - 1] - estimates[i - 2]) / (lambdas[i - 1] - lambdas[i - 2])
            bend = (slope - older) / (lambdas[i] - lambdas[i - 2])
            # x0(lambda) = x0 + (slope + bend*h0)*u + bend*u^2, where u is the distance from now.
            u = np.linspace(0, h, 20001)
            kernel = s2 * np.exp(lambdas[i] + u)
            slope = slope + bend * (lambdas[i] - lambdas[i - 1])
            after = after + np.trapezoid(kernel * u, u) * slope
            after = after + np.trapezoid(kernel * u**2, u) / 2 * bend
        z = after
    return z


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("name", "end"), [("vp", 0), ("zero_snr", -1), ("edm", 0), ("flow", 7)])
def test_multistep_rows_are_the_equations_of_dpm_solver(name: str, end: int, order: int) -> None:
    times = (999, 900, 820, 700, 555, 400, 300, 120, end)
    rows = multistep_rows(SCHEDULES[name], times, KINDS[name], order=order)
    first = SCHEDULES[name].first_scale
    got = by_table(rows, first, noises(1))
    expected = dpm_reference(name, times, first * noises(1)[0], order)
    # The reference integrates by trapezoids.
    assert np.abs(got - expected).max() < 1e-8 * max(1.0, np.abs(expected).max())
    assert [len(row.next.previous) + 1 for row in rows] == [
        min(order, i + 1, 8 - i) for i in range(8)
    ]


def test_the_third_order_knows_slopes_and_half_of_the_curvature() -> None:
    schedule = SCHEDULES["edm"]
    *_, row = multistep_rows(schedule, (900, 800, 650, 500), "edm", lower_order_final=False)
    lambdas = -np.log(schedule.levels[[650, 800, 900]]) + math.log(schedule.levels[650])
    u = np.linspace(0, math.log(schedule.levels[650] / schedule.levels[500]), 20001)
    weights = (row.next.x0, *row.next.previous)
    for power, share in ((0, 1.0), (1, 1.0), (2, 0.5)):
        exact = np.trapezoid(np.exp(u) * u**power, u) / np.exp(u[-1])
        assert np.dot(weights, lambdas**power) == pytest.approx(share * exact, rel=1e-7)


def test_multistep_rows_of_first_order_are_ddim() -> None:
    for name, schedule in SCHEDULES.items():
        rows = multistep_rows(schedule, (999, 500, 20, -1), KINDS[name], order=1)
        for row, (t, s) in zip(rows, ((999, 500), (500, 20), (20, -1)), strict=True):
            expected = ddim_row(schedule, t, s, KINDS[name])
            assert row.next.z == pytest.approx(expected.next.z, abs=1e-15)
            assert row.next.x0 == pytest.approx(expected.next.x0, abs=1e-14)
            assert row.note == {"kind": "multistep", "t": t, "s": s, "past": []}


def test_orders() -> None:
    assert solver_orders(6, 3, lower_order_final=True) == [1, 2, 3, 3, 2, 1]
    assert solver_orders(4, 3, lower_order_final=False) == [1, 2, 3, 3]
    assert solver_orders(1, 3, lower_order_final=False) == [1]
    to_the_end = multistep_rows(SCHEDULES["edm"], (9, 8, 7, 6, -1), "edm", lower_order_final=False)
    assert [len(row.note["past"]) for row in to_the_end] == [0, 1, 2, 0]
    with pytest.raises(ConfigError, match="falling to s"):
        multistep_rows(SCHEDULES["edm"], (9, 10, 7), "edm")


def test_gamma_sampling_of_ctm_equals_its_native_loop() -> None:
    """Four rows at gamma = 0.3 in the paper's own terms: x + Euler's jump, then noise (arXiv:2310.02279)."""
    schedule, gamma = SCHEDULES["edm"], 0.3
    times, bank = schedule.polynomial(5), noises(4)
    jumps = [jump_label(schedule, s, gamma) for s in times[1:]]
    rows = [
        jump_and_noise_row(schedule, t, k, s, "edm", i, target_feed="s")
        for i, (t, k, s) in enumerate(zip(times, jumps, times[1:], strict=False), start=1)
    ]
    assert [row.noise for row in rows] == [1, 2, 3, None]
    x = schedule.first_scale * bank[0]
    for i, (t, k, s) in enumerate(zip(times, jumps, times[1:], strict=False), start=1):
        high, low, after = schedule.sigmas[[t, k, s]]
        fed = (math.log(high) + math.log(low)) / 4
        raw = net(x / math.sqrt(high**2 + 0.25), fed)
        inner = 0.25 / (high**2 + 0.25) * x + high * 0.5 / math.sqrt(high**2 + 0.25) * raw
        x = low / high * x + (1 - low / high) * inner
        if i < 4:
            assert low == pytest.approx(math.sqrt(1 - gamma**2) * after, rel=1e-2)
            x = x + math.sqrt(after**2 - low**2) * bank[i]
    assert np.abs(by_table(rows, schedule.first_scale, bank) - x).max() < 1e-12


def test_the_sampler_of_sfd_equals_its_native_loop() -> None:
    """Four stamps: a first step without a network and two Euler steps (arXiv:2409.19681)."""
    schedule = SCHEDULES["edm"]
    times, bank = schedule.polynomial(4, sigma_min=0.006), noises(1)
    rows = [analytic_row(schedule, *times[:2])]
    rows += [ddim_row(schedule, t, s, "edm") for t, s in (times[1:3], times[2:])]
    x = schedule.first_scale * bank[0]
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        high, low = schedule.sigmas[[t, s]]
        direction = x / math.sqrt(1 + high**2) if i == 0 else (x - x0_of("edm", x, t)) / high
        x = x + (low - high) * direction
    assert np.abs(by_table(rows, schedule.first_scale, bank) - x).max() < 1e-12
    assert sum(bool(row.call) for row in rows) == len(times) - 2


def test_the_sampler_of_codi_equals_its_native_loop() -> None:
    """Four rows of v with a boundary: the grid and the steps of its public code (arXiv:2310.01407)."""
    schedule, bank = SCHEDULES["vp"], noises(1)
    steps = ((980, 720), (720, 460), (460, 200), (200, 0))
    rows = [boundary_row(schedule, t, s, "v_prediction") for t, s in steps]
    z = bank[0]
    for t, s in steps:
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        v = net(z, float(t))
        c_skip = 0.25 / ((10 * t) ** 2 + 0.25)
        c_out = 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        x = c_skip * z + c_out * (alpha * z - sigma * v)
        z = alpha_s * x + sigma_s * (alpha * v + sigma * z)
    assert np.abs(by_table(rows, 1.0, bank) - z).max() < 1e-12
    assert all(row.next.raw != 0 for row in rows)
