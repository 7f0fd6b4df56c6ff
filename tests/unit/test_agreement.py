"""Measures against cases worked out by hand."""

import math

import numpy as np
import pytest

from edgedistill.agreement import (
    TOLERANCE,
    compare,
    cosine,
    is_close,
    psnr_db,
    response_gain,
    response_share,
    snr_db,
)
from edgedistill.errors import ContractError

RANDOM = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def test_snr_of_a_hand_computed_case():
    assert snr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20.0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e20])
def test_snr_is_free_of_scale(scale):
    noisy = RANDOM * 1.01
    wanted = snr_db(RANDOM.astype(np.float64), noisy.astype(np.float64))
    got = snr_db(RANDOM.astype(np.float64) * scale, noisy.astype(np.float64) * scale)
    assert got == pytest.approx(wanted, abs=1e-6)


def test_snr_sees_differences_that_float32_would_lose():
    assert snr_db(np.float32([1e8]), np.float64([1e8 + 1])) == pytest.approx(160.0, abs=1e-6)


def test_snr_at_the_ends():
    assert snr_db(RANDOM, RANDOM) == math.inf
    assert snr_db(np.zeros(3), np.zeros(3)) == math.inf
    assert snr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert snr_db(np.ones(3), np.zeros(3)) == pytest.approx(0.0)


def test_psnr_of_a_hand_computed_case_with_its_peak():
    got = RANDOM + np.float32(0.02)
    assert psnr_db(RANDOM, got, peak=2.0) == pytest.approx(40.0, abs=1e-3)
    assert psnr_db(RANDOM, got, peak=1.0) == pytest.approx(40.0 - 20 * math.log10(2), abs=1e-3)


def test_cosine_of_known_angles():
    x = np.array([[1.0, 0.0]])
    assert cosine(x, np.array([[1.0, 1.0]])) == pytest.approx(math.sqrt(0.5))
    assert cosine(x, -x) == -1.0
    assert cosine(x, np.array([[0.0, 2.0]])) == 0.0
    assert cosine(x, 0 * x) == 0.0


def test_gain_is_blind_to_noise_that_has_nothing_to_do_with_the_response():
    response, noise = RANDOM, np.random.default_rng(1).standard_normal(RANDOM.shape)
    noise -= response * float((noise * response).sum() / (response * response).sum())
    assert response_gain(response, 0.25 * response + 3 * noise) == pytest.approx(0.25, abs=1e-6)
    assert response_gain(response, noise) == pytest.approx(0.0, abs=1e-6)


def test_gain_needs_a_response():
    with pytest.raises(ContractError, match="does not depend on this condition"):
        response_gain(np.zeros(4), np.ones(4))


def test_compare_gathers_all_measures():
    got = RANDOM.copy()
    got[1, 2, 3, 4] += 0.5
    found = compare(RANDOM, got, peak=2.0)
    assert found.max_abs == pytest.approx(0.5, abs=1e-6)
    assert found.snr_db == snr_db(RANDOM, got)
    assert found.psnr_db == psnr_db(RANDOM, got, 2.0)
    assert compare(RANDOM, got).psnr_db is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_compare_refuses_what_is_not_finite(value):
    with pytest.raises(ContractError, match="NaN or infinity"):
        compare(np.ones(2), np.array([1.0, value]))


def test_compare_refuses_other_shapes():
    with pytest.raises(ContractError, match=r"one shape, got \(2,\) and \(1, 2\)"):
        compare(np.ones(2), np.ones((1, 2)))


def test_the_share_of_a_response_is_by_root_mean_squares() -> None:
    generator = np.random.default_rng(0)
    output = generator.standard_normal((8, 64))
    assert response_share(0.04 * output[:, ::-1], output) == pytest.approx(0.04)
    assert response_share(np.zeros_like(output), output) == 0


def test_coefficients_are_close_relative_to_themselves_or_to_1():
    for expected in (0.0, 0.5, -1.0, 80.0):
        allowed = TOLERANCE * max(1.0, abs(expected))
        assert is_close(expected + 0.99 * allowed, expected)
        assert not is_close(expected + 1.01 * allowed, expected)
    assert is_close(None, None)
    assert not is_close(None, 0.0)
    assert not is_close(0.0, None)
