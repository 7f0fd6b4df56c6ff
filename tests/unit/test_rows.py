"""Row builders: the identities that each kind of row satisfies, and what is undefined."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import ConfigError
from edgedistill.prediction import PredictionType, x0_coefficients
from edgedistill.rows import (
    BUILDERS,
    analytic_row,
    boundary_row,
    consistency_row,
    ddim_row,
    jump_and_noise_row,
    jump_label,
    multistep_row,
    renoise_row,
    return_x0_row,
)
from edgedistill.schedule import Schedule
from edgedistill.table import Next, Row

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = Schedule.from_config(SCALED)
ZERO_SNR = Schedule.from_config({**SCALED, "rescale_betas_zero_snr": True})
EDM = Schedule.from_config({"_class_name": "EDMEulerScheduler"})
FLOW = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
FAMILIES = {"vp": SCHEDULE, "zero_snr": ZERO_SNR, "edm": EDM, "flow": FLOW}
kinds = st.sampled_from(list(PredictionType))
families = st.sampled_from(list(FAMILIES))
times = st.integers(0, 999)
values = st.floats(-3, 3)
law = settings(derandomize=True, max_examples=100)


def after(
    row: Row,
    t: int,
    kind: PredictionType,
    x: float,
    eps: float,
    noise: float = 0.0,
    schedule: Schedule = SCHEDULE,
) -> float:
    """Run a row on a perfect network's answer for one number."""
    alpha, sigma = schedule.alpha_sigma(t)
    z = alpha * x + sigma * eps
    a_z, a_r = x0_coefficients(kind, alpha, sigma)
    raw = (x - a_z * z) / a_r
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


@law
@given(families, kinds, times, st.integers(-1, 999), values, values)
def test_ddim_moves_both_ways_in_every_schedule(
    family: str, kind: PredictionType, t: int, s: int, x: float, eps: float
) -> None:
    schedule = FAMILIES[family]
    if schedule.alphas[t] < 1e-3 and kind is PredictionType.EPSILON:
        kind = PredictionType.V_PREDICTION
    if kind is PredictionType.V_PREDICTION and family in ("edm", "flow"):
        kind = PredictionType.SAMPLE
    row = ddim_row(schedule, t, s, kind)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    scale = max(1.0, sigma_s / min(schedule.sigmas[t], 1.0))
    got = after(row, t, kind, x, eps, schedule=schedule)
    assert got == pytest.approx(alpha_s * x + sigma_s * eps, abs=1e-11 * scale)
    assert row.feeds == {"timestep": schedule.feeds[t]}
    assert row.in_scale == schedule.in_scales[t]


def test_encoding_and_decoding_undo_each_other_with_the_same_network_answer() -> None:
    """z -> s -> t with x0 held is the identity: the two rows are inverse maps of z."""
    for schedule in (SCHEDULE, EDM, FLOW):
        up, down = (ddim_row(schedule, t, s, "sample") for t, s in ((200, 700), (700, 200)))
        assert up.next.z * down.next.z == pytest.approx(1, rel=1e-14)
        kept = down.next.z * up.next.x0 + down.next.x0
        assert kept == pytest.approx(0, abs=1e-12)
        assert up.note == {"kind": "ddim", "t": 200, "s": 700}


@law
@given(st.integers(0, 999), st.integers(-1, 999))
def test_ddim_in_alpha_and_sigma_is_euler_in_the_noise_level(t: int, s: int) -> None:
    row, levels = ddim_row(EDM, t, s, "edm"), [*EDM.levels, 0.0]
    ratio = levels[s] / levels[t]
    assert (row.next.z, row.next.x0) == pytest.approx((ratio, 1 - ratio), rel=1e-12)
    c_skip = 0.25 / (levels[t] ** 2 + 0.25)
    c_out = levels[t] * 0.5 / math.sqrt(levels[t] ** 2 + 0.25)
    assert row.x0 == pytest.approx((c_skip, c_out), rel=1e-12)
    row, scale = ddim_row(SCHEDULE, t, s, "sample"), SCHEDULE.alpha_sigma(t)[0]
    ratio = [*SCHEDULE.levels, 0.0][s] / SCHEDULE.levels[t]
    alpha_s = SCHEDULE.alpha_sigma(s)[0]
    assert row.next.z * scale / alpha_s == pytest.approx(ratio, rel=1e-12)
    assert row.next.x0 / alpha_s == pytest.approx(1 - ratio, rel=1e-11, abs=1e-14)


@law
@given(families, times, times, st.floats(0.0, 1.0))
def test_an_analytic_row_is_ddim_with_a_network_that_returns_the_normed_state(
    family: str, t: int, s: int, z: float
) -> None:
    """methods.md 7g: the network's x is ``z - t z / sqrt(1 + t^2)`` in the state z/alpha."""
    schedule = FAMILIES[family]
    row = analytic_row(schedule, t, s)
    assert (row.call, row.feeds, row.next.x0, row.next.raw) == ((), {}, 0.0, 0.0)
    if schedule.alphas[t] < 1e-3:
        return
    alpha, sigma = schedule.alpha_sigma(t)
    level = sigma / alpha
    x0 = (z - level * z / math.sqrt(1 + level**2)) / alpha
    called = ddim_row(schedule, t, s, "sample")
    expected = called.next.z * z + called.next.x0 * x0
    assert row.next.z * z == pytest.approx(expected, abs=1e-9 * max(1.0, called.next.z))


def test_an_analytic_row_of_edm_has_the_papers_number_and_needs_no_x_at_alpha_0() -> None:
    t, s = 999, 700
    high, low = EDM.levels[t], EDM.levels[s]
    row = analytic_row(EDM, t, s)
    assert row.next.z == pytest.approx(1 + (low - high) / math.sqrt(1 + high**2), rel=1e-12)
    assert row == Row((), next=row.next, note={"kind": "analytic", "t": t, "s": s})
    for schedule in (ZERO_SNR, FLOW):
        assert analytic_row(schedule, t, s).next.z == schedule.sigmas[s]


@law
@given(families, kinds, st.integers(1, 999), st.integers(-1, 998), values, values)
def test_a_boundary_row_bounds_x_and_not_eps(
    family: str, kind: PredictionType, t: int, s: int, x: float, eps: float
) -> None:
    schedule = FAMILIES[family]
    if family in ("edm", "flow") or (kind is PredictionType.EPSILON and family == "zero_snr"):
        kind = PredictionType.SAMPLE
    row = boundary_row(schedule, t, s, kind, timestep_scaling=0.05)
    alpha, sigma = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    c_skip = 0.25 / ((0.05 * t) ** 2 + 0.25)
    bounded = c_skip * (alpha * x + sigma * eps) + math.sqrt(1 - c_skip) * x
    expected = alpha_s * bounded + sigma_s * eps
    scale = max(1.0, sigma_s / min(sigma, 1.0))
    got = after(row, t, kind, x, eps, schedule=schedule)
    assert got == pytest.approx(expected, abs=1e-10 * scale)


def test_a_boundary_row_of_v_has_codis_numbers() -> None:
    row = boundary_row(SCHEDULE, 980, 720, "v_prediction")
    (alpha, sigma), (alpha_s, sigma_s) = SCHEDULE.alpha_sigma(980), SCHEDULE.alpha_sigma(720)
    c_skip, c_out = 0.25 / (9800.0**2 + 0.25), 9800.0 / math.sqrt(9800.0**2 + 0.25)
    assert row.x0 == pytest.approx((c_skip + c_out * alpha, -c_out * sigma), rel=1e-15)
    found = (row.next.z, row.next.x0, row.next.raw, row.next.noise)
    assert found == pytest.approx((sigma_s * sigma, alpha_s, sigma_s * alpha, 0.0), rel=1e-15)
    assert boundary_row(SCHEDULE, 0, -1, "v_prediction").x0 == (1.0, 0.0)


@law
@given(families, times, st.floats(0, 1))
def test_gamma_sampling_keeps_the_share_that_gamma_leaves(
    family: str, s: int, gamma: float
) -> None:
    schedule = FAMILIES[family]
    k = jump_label(schedule, s, gamma)
    assert 0 <= k <= s
    assert (jump_label(schedule, s, 0.0), jump_label(schedule, -1, gamma)) == (s, -1)
    if schedule.alphas[s] > 0:
        wanted = math.sqrt(1 - gamma**2) * schedule.levels[s]
        gap = abs(math.log(max(wanted, 1e-9) / schedule.levels[k]))
        near = schedule.levels[max(k - 1, 0) : k + 2]
        assert gap <= min(abs(math.log(max(wanted, 1e-9) / level)) for level in near) + 1e-12


def test_gamma_0_adds_no_noise_and_gamma_1_is_a_consistency_models_row() -> None:
    """methods.md 5g: jump to sigma_min and noise back, b_z = sigma_min/t, fresh sqrt(s^2 - sigma_min^2)."""
    t, s = 999, 700
    still = jump_and_noise_row(EDM, t, jump_label(EDM, s, 0.0), s, "edm", 1)
    assert (still.noise, still.next) == (None, ddim_row(EDM, t, s, "edm").next)
    assert jump_label(EDM, s, 1.0) == 0
    row = jump_and_noise_row(EDM, t, jump_label(EDM, s, 1.0), s, "edm", 1)
    low, high, level = EDM.levels[0], EDM.levels[t], EDM.levels[s]
    expected = (low / high, 1 - low / high, math.sqrt(level**2 - low**2))
    assert (row.next.z, row.next.x0, row.next.noise) == pytest.approx(expected, rel=1e-12)
    again = renoise_row(EDM, t, s, "edm", 1).next
    assert row.next.x0 == pytest.approx(again.x0, abs=3e-5)
    assert row.next.noise == pytest.approx(again.noise, rel=1e-4)
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"`gamma` must lie in \[0, 1\]"):
            jump_label(EDM, s, gamma)


def test_a_row_tells_the_network_where_it_jumps_to() -> None:
    jump = jump_and_noise_row(EDM, 900, 300, 500, "edm", 1, target_feed="s", feeds={"step": 4.0})
    assert jump.feeds == {"timestep": EDM.feeds[900], "s": EDM.feeds[300], "step": 4.0}
    assert jump.note["target_feed"] == "s"
    assert jump.note["feeds"] == {"step": 4.0}
    assert ddim_row(FLOW, 900, 500, "flow", target_feed="s").feeds["s"] == FLOW.feeds[500]
    assert ddim_row(FLOW, 900, -1, "flow", target_feed="s").feeds["s"] == FLOW.feeds[0]
    called = ddim_row(SCHEDULE, 9, 4, "sample", network=("guide", "unet"))
    assert called.call == ("guide", "unet")


@pytest.mark.parametrize(
    ("t", "s", "past", "message"),
    [
        (500, 600, (), "falling to s"),
        (500, 400, (450,), "falling to s"),
        (500, 400, (600, 700, 800), "at most 2 times of the past"),
        (500, -1, (600,), "none where s has no noise"),
    ],
)
def test_refused_multistep_rows(t: int, s: int, past: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        multistep_row(EDM, t, s, "edm", past=past)


def test_every_builder_writes_its_own_kind_into_the_note() -> None:
    for name, build in BUILDERS.items():
        times = {"t": 9, "s": 4} | ({"k": 2} if name == "jump_and_noise" else {})
        times = {"t": 9} if name == "return_x0" else times
        given = {} if name == "analytic" else {"prediction_type": "sample"}
        noise = {"noise": 1} if name in ("renoise", "jump_and_noise", "consistency") else {}
        assert build(SCHEDULE, **times, **given, **noise).note["kind"] == name


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "edm", "flow"])
def test_rows_from_pure_noise_take_all_of_x_from_the_network(kind: str) -> None:
    """At alpha = 0 the state is eps itself: s = alpha_s*x + sigma_s*z, whatever x is made of."""
    for schedule in (ZERO_SNR, FLOW):
        for s in (700, 0, -1):
            alpha_s, sigma_s = schedule.alpha_sigma(s)
            row = ddim_row(schedule, 999, s, kind)
            assert row.next == Next(z=sigma_s, x0=alpha_s)
            assert renoise_row(schedule, 999, s, kind, 1).next.x0 == alpha_s
            clipped = ddim_row(schedule, 999, s, kind, clip=(-1.0, 1.0)).next
            assert (clipped.z, clipped.x0, clipped.raw) == (sigma_s, alpha_s, 0.0)
    expected = {"sample": (0, 1), "v_prediction": (0, -1), "edm": (0, 0.5), "flow": (1, -1)}
    assert row.x0 == expected[kind]


def test_rows_of_the_cleanest_label_have_the_numbers_of_their_equations() -> None:
    for family, kind in (
        ("vp", "epsilon"),
        ("vp", "v_prediction"),
        ("edm", "edm"),
        ("flow", "flow"),
    ):
        schedule = FAMILIES[family]
        alpha, sigma = schedule.alpha_sigma(0)
        c_out = sigma * 0.5 / math.hypot(sigma, 0.5)
        a_z, a_r = {
            "epsilon": (1 / alpha, -sigma / alpha),
            "v_prediction": (alpha, -sigma),
            "edm": (0.25 / (sigma**2 + 0.25), c_out),
            "flow": (1.0, -sigma),
        }[kind]
        row = ddim_row(schedule, 0, -1, kind)
        assert row.x0 == pytest.approx((a_z, a_r), rel=1e-14)
        assert row.next == Next(x0=1.0)


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
