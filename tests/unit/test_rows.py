"""Row builders: the identities that each kind of row satisfies, and what is undefined."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import ConfigError
from edgedistill.prediction import PredictionType, raw_coefficients
from edgedistill.rows import (
    consistency_row,
    ddim_row,
    jump_and_noise_row,
    renoise_row,
    return_x0_row,
)
from edgedistill.schedule import Schedule
from edgedistill.table import Next, Row

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = Schedule.from_config(SCALED)
ZERO_SNR = Schedule.from_config({**SCALED, "rescale_betas_zero_snr": True})
kinds = st.sampled_from(list(PredictionType))
times = st.integers(0, 999)
values = st.floats(-3, 3)
law = settings(derandomize=True, max_examples=100)


def after(row: Row, t: int, kind: PredictionType, x: float, eps: float, noise: float) -> float:
    """Run a row on a perfect network's answer for one number."""
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    z = alpha * x + sigma * eps
    r_z, r_x0 = raw_coefficients(kind, alpha, sigma)
    raw = r_z * z + r_x0 * x
    x0 = row.x0[0] * z + row.x0[1] * raw
    return row.next.z * z + row.next.x0 * x0 + row.next.raw * raw + row.next.noise * noise


@law
@given(kinds, times, st.integers(-1, 999), values, values, st.booleans())
def test_ddim_lands_on_the_same_x_and_eps(
    kind: PredictionType, t: int, s: int, x: float, eps: float, clips: bool
) -> None:
    row = ddim_row(SCHEDULE, t, s, kind, clip=(-9.0, 9.0) if clips else None)
    alpha_s, sigma_s = SCHEDULE.alpha_sigma(s)
    got = after(row, t, kind, x, eps, 0.0)
    assert got == pytest.approx(alpha_s * x + sigma_s * eps, abs=1e-7)
    assert (row.noise, row.next.noise) == (None, 0.0)


@law
@given(kinds, st.lists(times, min_size=3, max_size=3, unique=True), values, values, values)
def test_jump_and_noise_keeps_what_the_jump_left(
    kind: PredictionType, given_times: list[int], x: float, eps: float, noise: float
) -> None:
    k, s, t = sorted(given_times)
    row = jump_and_noise_row(SCHEDULE, t, k, s, kind, 1)
    (alpha_k, sigma_k), (alpha_s, sigma_s) = SCHEDULE.alpha_sigma(k), SCHEDULE.alpha_sigma(s)
    z_k = alpha_k * x + sigma_k * eps
    log_snr_k, log_snr_s = (
        2 * math.log(a / b) for a, b in ((alpha_k, sigma_k), (alpha_s, sigma_s))
    )
    spread = sigma_s * math.sqrt(1 - math.exp(log_snr_s - log_snr_k))
    expected = alpha_s / alpha_k * z_k + spread * noise
    assert after(row, t, kind, x, eps, noise) == pytest.approx(expected, abs=1e-7)
    variance = (alpha_s / alpha_k * sigma_k) ** 2 + row.next.noise**2
    assert variance == pytest.approx(sigma_s**2, abs=1e-15)


@law
@given(kinds, times, times, values, values, values)
def test_renoise_forgets_eps(
    kind: PredictionType, t: int, s: int, x: float, eps: float, noise: float
) -> None:
    alpha_s, sigma_s = SCHEDULE.alpha_sigma(s)
    got = after(renoise_row(SCHEDULE, t, s, kind, 1), t, kind, x, eps, noise)
    assert got == pytest.approx(alpha_s * x + sigma_s * noise, abs=1e-7)


@law
@given(kinds, times, st.integers(-1, 999), st.floats(0.01, 1), values, values, values)
def test_ddim_with_eta_keeps_the_variance(
    kind: PredictionType, t: int, s: int, eta: float, x: float, eps: float, noise: float
) -> None:
    s = min(s, t)
    row = ddim_row(SCHEDULE, t, s, kind, eta=eta, noise=3)
    alpha_s, sigma_s = SCHEDULE.alpha_sigma(s)
    kept = math.sqrt(max(sigma_s**2 - row.next.noise**2, 0))
    got = after(row, t, kind, x, eps, noise)
    assert got == pytest.approx(alpha_s * x + kept * eps + row.next.noise * noise, abs=1e-7)
    assert row.noise == (3 if row.next.noise else None)


def test_returning_x0_is_ddim_to_the_end() -> None:
    for kind in PredictionType:
        row = return_x0_row(SCHEDULE, 499, kind)
        assert row.next == Next(x0=1.0) == ddim_row(SCHEDULE, 499, -1, kind).next
        assert row.x0 == ddim_row(SCHEDULE, 499, -1, kind).x0


def test_a_consistency_row_is_the_identity_at_zero_and_nearly_x0_far_from_it() -> None:
    assert consistency_row(SCHEDULE, 0, -1, "epsilon", 1).x0 == (1.0, 0.0)
    row = consistency_row(SCHEDULE, 999, 499, "epsilon", 1)
    assert row.x0 == pytest.approx(renoise_row(SCHEDULE, 999, 499, "epsilon", 1).x0, rel=1e-7)
    clipped = consistency_row(SCHEDULE, 2, 1, "epsilon", 1, clip=(-1.0, 1.0), timestep_scaling=0.1)
    alpha = SCHEDULE.alpha_sigma(1)[0]
    c_skip = 0.25 / (0.2**2 + 0.25)
    assert clipped.next.z == pytest.approx(alpha * c_skip)
    assert clipped.next.x0 == pytest.approx(alpha * math.sqrt(1 - c_skip))


def test_the_numbers_of_a_four_row_sampler_of_stable_diffusion() -> None:
    rows = [renoise_row(SCHEDULE, t, t - 250, "epsilon", 1) for t in (999, 749, 499)]
    found = [item for row in rows for item in (*row.x0, row.next.x0, row.next.noise)]
    expected = [
        *(14.648812, -14.614641, 0.237957, 0.971276),
        *(4.202441, -4.081730, 0.526944, 0.849900),
        *(1.897736, -1.612886, 0.821847, 0.569708),
    ]
    assert found == pytest.approx(expected, rel=2e-6)


def test_options_and_note_end_up_in_the_row() -> None:
    row = ddim_row(
        SCHEDULE, 9, 4, "sample", network="student", guidance_scale=2.0, feeds_name="t", clip=None
    )
    assert (row.call, row.feeds, row.guidance_scale) == (("student",), {"t": 9.0}, 2.0)
    assert row.note == {"kind": "ddim", "t": 9, "s": 4}


def test_epsilon_says_nothing_of_x_where_alpha_is_zero() -> None:
    for build in (ddim_row, lambda *a: renoise_row(*a, 1)):
        with pytest.raises(ConfigError, match="At timestep 999 alpha is 0 .* v_prediction"):
            build(ZERO_SNR, 999, 499, "epsilon")
    assert ddim_row(ZERO_SNR, 999, 499, "v_prediction").x0 == (0.0, -1.0)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="jumps to k=5 cannot be noised to the earlier time s=4"):
        jump_and_noise_row(SCHEDULE, 9, 5, 4, "epsilon", 1)
    with pytest.raises(ConfigError, match="timestep of at least 0, got -1"):
        return_x0_row(SCHEDULE, -1, "epsilon")
    with pytest.raises(ConfigError, match="adds noise and needs an index"):
        ddim_row(SCHEDULE, 9, 4, "epsilon", eta=1.0)
