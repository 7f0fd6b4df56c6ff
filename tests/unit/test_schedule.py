"""Noise schedules: diffusers' numbers, and the refusals."""

from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ConfigError
from edgedistill.schedule import Schedule

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


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
