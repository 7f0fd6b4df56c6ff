"""Noise schedules: diffusers' numbers, and the refusals."""

from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ConfigError
from edgedistill.schedule import Schedule

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
EDM = {"_class_name": "EDMEulerScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FAMILIES = (SCALED, {**SCALED, "rescale_betas_zero_snr": True}, EDM, FLOW, {**FLOW, "shift": 3.0})


def in_ulps(found: np.ndarray, expected: np.ndarray) -> int:
    """Return the largest number of float32 values between two arrays."""
    a, b = (item.astype(np.float32).view(np.int32).astype(np.int64) for item in (found, expected))
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("T", [1, 2, 37, 50, 1000])
@pytest.mark.parametrize("beta", [{"beta_schedule": "linear"}, SCALED, COSINE])
def test_alphas_are_those_of_diffusers(T: int, beta: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDIMScheduler(**beta, num_train_timesteps=T).alphas_cumprod.numpy()
    schedule = Schedule.from_config({**beta, "num_train_timesteps": T})
    assert in_ulps(schedule.alphas**2, expected) <= 1
    assert schedule.num_train_timesteps == T


def test_sigmoid_and_trained_betas_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    trained = [0.01, 0.02, 0.5]
    for config in (
        {"beta_schedule": "sigmoid"},
        {"trained_betas": trained, "num_train_timesteps": 3},
    ):
        expected = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
        # The last bits of torch's logistic function differ from machine to machine.
        assert in_ulps(Schedule.from_config(config).alphas ** 2, expected) <= 4


@pytest.mark.parametrize("beta", [{"beta_schedule": "linear"}, SCALED, COSINE])
def test_zero_terminal_snr_is_that_of_diffusers(beta: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {**beta, "rescale_betas_zero_snr": True}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    schedule = Schedule.from_config(config)
    assert schedule.alpha_sigma(999) == (0.0, 1.0)
    # torch's square root is off by a bit on some machines, which weighs where alpha nears zero.
    assert np.allclose(schedule.alphas**2, expected, rtol=2e-5, atol=0)
    assert np.allclose(schedule.alphas**2, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [{"beta_schedule": "linear"}, SCALED, COSINE])
def test_a_schedule_preserves_variance_and_falls(beta: dict[str, Any]) -> None:
    schedule = Schedule.from_config(beta)
    assert np.allclose(schedule.alphas**2 + schedule.sigmas**2, 1, rtol=0, atol=1e-15)
    assert np.all(np.diff(schedule.alphas) < 0)
    assert schedule.alphas.dtype == schedule.sigmas.dtype == np.float64


def test_stable_diffusions_last_timestep_has_the_known_numbers() -> None:
    alpha, sigma = Schedule.from_config(SCALED).alpha_sigma(999)
    assert (round(alpha, 5), round(sigma, 5), round(sigma / alpha, 3)) == (0.06826, 0.99767, 14.615)


def test_after_the_last_step_there_is_no_noise_or_that_of_timestep_0() -> None:
    assert Schedule.from_config(SCALED).alpha_sigma(-1) == (1.0, 0.0)
    schedule = Schedule.from_config({**SCALED, "set_alpha_to_one": False})
    assert schedule.alpha_sigma(-1) == schedule.alpha_sigma(0)


def test_absent_keys_take_the_defaults_of_the_class() -> None:
    latent = Schedule.from_config({"_class_name": "LCMScheduler"})
    assert np.array_equal(latent.alphas, Schedule.from_config(SCALED).alphas)
    pixel = Schedule.from_config({})
    assert pixel.alpha_sigma(0)[1] == pytest.approx(0.01, rel=1e-3)


def test_a_variance_preserving_schedule_feeds_its_labels() -> None:
    schedule = Schedule.from_config(SCALED)
    assert np.array_equal(schedule.feeds, np.arange(1000.0))
    assert np.array_equal(schedule.in_scales, np.ones(1000))
    assert schedule.first_scale == 1.0


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize(
    "options", [{}, {"sigma_schedule": "exponential"}, {"sigma_max": 20.0, "rho": 5.0}]
)
@pytest.mark.parametrize("T", [2, 40, 1000])
def test_edm_levels_are_those_of_diffusers(name: str, options: dict[str, Any], T: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(num_train_timesteps=T, **options)
    scheduler.set_timesteps(T)
    schedule = Schedule.from_config(dict(scheduler.config) | {"_class_name": name})
    expected = scheduler.sigmas[:-1].numpy()[::-1].astype(np.float64)
    # The second scheduler raises to the 7th power in float32.
    assert np.allclose(schedule.sigmas, expected, rtol=4e-6, atol=0)
    assert np.allclose(schedule.feeds, scheduler.timesteps.numpy()[::-1], rtol=0, atol=2e-6)
    assert np.all(schedule.alphas == 1)
    c_in = scheduler._get_conditioning_c_in(expected)
    assert np.allclose(schedule.in_scales, c_in, rtol=4e-6, atol=0)
    assert schedule.first_scale == scheduler.config.sigma_max
    assert schedule.alpha_sigma(-1) == (1.0, 0.0)


def test_edm_has_the_ends_that_it_was_given() -> None:
    schedule = Schedule.from_config({"_class_name": "EDMEulerScheduler"})
    assert schedule.sigmas[[0, -1]] == pytest.approx([0.002, 80], rel=1e-7)
    assert schedule.feeds[-1] == pytest.approx(np.log(80) / 4, rel=1e-7)
    assert schedule.in_scales[-1] == pytest.approx(1 / np.sqrt(80**2 + 0.25), rel=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("T", [10, 1000])
def test_flow_times_are_those_of_diffusers(shift: float, T: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {"num_train_timesteps": T, "shift": shift}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **config})
    assert in_ulps(schedule.sigmas, scheduler.sigmas.numpy()[::-1].copy()) <= 1
    assert np.allclose(schedule.feeds, scheduler.timesteps.numpy()[::-1], rtol=2e-7, atol=0)
    assert np.allclose(schedule.alphas + schedule.sigmas, 1, rtol=0, atol=0)
    assert schedule.alpha_sigma(T - 1) == (0.0, 1.0)
    assert (schedule.alpha_sigma(-1), schedule.first_scale) == ((1.0, 0.0), 1.0)


def test_a_flow_samples_with_all_its_times_as_diffusers_does() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(1000)
    schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert np.allclose(schedule.sigmas[::-1], scheduler.sigmas[:-1], rtol=2e-7, atol=1e-7)


def test_every_label_is_the_one_of_its_own_noise_level() -> None:
    labels = np.arange(1000)
    for config in FAMILIES:
        schedule = Schedule.from_config(config)
        levels = schedule.levels
        assert np.all(np.diff(levels) > 0)
        assert np.array_equal(schedule.label_of(levels), labels)
        assert schedule.label_of(float(levels[412])) == 412
        near = levels[1:-1] * np.where(labels[1:-1] % 2, 1.0001, 1 / 1.0001)
        assert np.array_equal(schedule.label_of(near), labels[1:-1])
        assert (schedule.label_of(0.0), schedule.label_of(float("inf"))) == (0, 999)


def test_the_nearest_label_is_the_one_of_the_nearest_logarithm() -> None:
    schedule = Schedule.from_config({"_class_name": "EDMEulerScheduler", "num_train_timesteps": 30})
    found = schedule.label_of(np.geomspace(0.002, 80, 500))
    gaps = np.abs(np.log(np.geomspace(0.002, 80, 500))[:, None] - np.log(schedule.levels))
    assert np.array_equal(found, gaps.argmin(axis=1))


def test_polynomial_time_stamps_have_the_papers_noise_levels() -> None:
    """The stamps of SFD (arXiv:2409.19681) and CTM (arXiv:2310.02279)."""
    schedule = Schedule.from_config(
        {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 8000}
    )
    for count, low, expected in (
        (3, 0.006, [80, 3.107, 0.006]),
        (4, 0.006, [80, 10.929, 0.6699, 0.006]),
        (7, 0.006, [80, 31.73, 10.93, 3.107, 0.670, 0.0936, 0.006]),
        (5, None, [80, 17.53, 2.515, 0.1698, 0.002]),
    ):
        times = schedule.polynomial(count, sigma_min=low)
        assert schedule.levels[list(times)] == pytest.approx(expected, rel=2e-3)
        assert times[0] == 7999
    assert schedule.polynomial(5)[-1] == 0


def test_polynomial_time_stamps_fall_in_every_family_and_start_at_the_last_label() -> None:
    for config in FAMILIES:
        schedule = Schedule.from_config(config)
        for count in (2, 4, 7):
            times = schedule.polynomial(count)
            assert (len(times), times[0], times[-1]) == (count, 999, 0)
            assert list(times) == sorted(set(times), reverse=True)
        assert schedule.polynomial(13)[::4] == schedule.polynomial(4)
        high = float(schedule.levels[800])
        assert schedule.polynomial(3, sigma_max=high)[0] == 800


@pytest.mark.parametrize(
    ("count", "low", "high", "message"),
    [
        (40, None, None, "too coarse for 40 time stamps from 80 to 0.002"),
        (1, None, None, "count of at least 2"),
        (3, 5.0, 4.0, "0 < sigma_min < sigma_max, got 3, 5.0 and 4.0"),
    ],
)
def test_refused_time_stamps(
    count: int, low: float | None, high: float | None, message: str
) -> None:
    schedule = Schedule.from_config({"_class_name": "EDMEulerScheduler", "num_train_timesteps": 30})
    with pytest.raises(ConfigError, match=message):
        schedule.polynomial(count, sigma_min=low, sigma_max=high)


@pytest.mark.parametrize(
    ("count", "spacing", "offset", "expected"),
    [
        (4, "trailing", 0, (999, 749, 499, 249)),
        (3, "trailing", 0, (999, 666, 332)),
        (4, "leading", 0, (750, 500, 250, 0)),
        (4, "leading", 1, (751, 501, 251, 1)),
        (3, "linspace", 0, (999, 500, 0)),
        (1, "trailing", 0, (999,)),
        (1, "leading", 0, (0,)),
        (1, "linspace", 0, (0,)),
    ],
)
def test_timesteps(count: int, spacing: str, offset: int, expected: tuple[int, ...]) -> None:
    assert Schedule.from_config({}).timesteps(count, spacing, offset) == expected


def test_every_spacing_gives_the_asked_number_of_falling_timesteps() -> None:
    schedule = Schedule.from_config({})
    for spacing in ("leading", "trailing", "linspace"):
        for count in range(1, 1001):
            times = schedule.timesteps(count, spacing)
            assert len(times) == count
            assert all(0 <= t < 1000 for t in times)
            assert list(times) == sorted(set(times), reverse=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "cubic"}, "`beta_schedule` must be linear, .* got 'cubic'"),
        ({"beta_start": "low"}, "betas are not numbers"),
        ({"beta_start": None}, "above 0 and up to 1"),
        ({"beta_start": -0.1}, "above 0 and up to 1"),
        ({"beta_end": float("nan")}, "above 0 and up to 1"),
        ({"num_train_timesteps": 0}, "above 0 and up to 1"),
        ({"trained_betas": [0.1, 0.2]}, "one for each of `num_train_timesteps`"),
        ({"trained_betas": [[0.1], [0.2, 0.3]]}, "betas are not numbers"),
        (
            {"_class_name": "CosineDPMSolverMultistepScheduler"},
            "schedule of a CosineDPM.* is not known; known are DDPMScheduler, .* FlowMatch",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "`use_flow_sigmas` makes a flow",
        ),
        ({**EDM, "sigma_data": 1.0}, r"`sigma_data` of an EDM schedule must be 0\.5, got 1\.0"),
        ({**EDM, "sigma_min": 0}, "needs 0 < sigma_min < sigma_max"),
        ({**EDM, "sigma_max": "high"}, "sigma_min and sigma_max and rho must be numbers"),
        ({**EDM, "sigma_schedule": "linear"}, "must be karras or exponential, got 'linear'"),
        ({**EDM, "num_train_timesteps": 1}, "whole number of at least 2, got 1"),
        ({**FLOW, "shift": 0}, "`shift` of a flow's schedule must be above 0, got 0"),
        ({**FLOW, "use_dynamic_shifting": True}, "`use_dynamic_shifting` of a FlowMatch.* False"),
    ],
)
def test_refused_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule.from_config(config)


def test_refused_timesteps() -> None:
    schedule = Schedule.from_config({"num_train_timesteps": 100})
    for count in (0, 101, -1):
        with pytest.raises(ConfigError, match=r"number of steps must lie in \[1, 100\]"):
            schedule.timesteps(count)
    with pytest.raises(ConfigError, match="`timestep_spacing` must be one of .* got 'karras'"):
        schedule.timesteps(4, "karras")
    with pytest.raises(ConfigError, match="`steps_offset` 1 moves timestep 100 past"):
        schedule.timesteps(100, "leading", 1)
    for t in (-2, 100):
        with pytest.raises(ConfigError, match=r"Timestep must lie in \[-1, 99\]"):
            schedule.alpha_sigma(t)
