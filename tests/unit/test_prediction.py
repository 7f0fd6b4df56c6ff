"""Conversions between raw, x0 and eps: definitions, inverses, refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import ConfigError
from edgedistill.prediction import (
    PredictionType,
    eps_coefficients,
    raw_coefficients,
    x0_coefficients,
)

angles = st.floats(0.01, math.pi / 2 - 0.01)
values = st.floats(-3, 3)
law = settings(derandomize=True, max_examples=50)


def raw_of(kind: PredictionType, alpha: float, sigma: float, x: float, eps: float) -> float:
    """Return what a perfect network would, straight from the definitions."""
    return {
        PredictionType.EPSILON: eps,
        PredictionType.SAMPLE: x,
        PredictionType.V_PREDICTION: alpha * eps - sigma * x,
        PredictionType.FLOW_PREDICTION: eps - x,
    }[kind]


def apply(coefficients: tuple[float, float], z: float, other: float) -> float:
    return coefficients[0] * z + coefficients[1] * other


@pytest.mark.parametrize("kind", PredictionType)
@law
@given(angles, values, values)
def test_a_perfect_network_gives_back_x_and_eps(
    kind: PredictionType, angle: float, x: float, eps: float
) -> None:
    alpha, sigma = math.cos(angle), math.sin(angle)
    z, raw = alpha * x + sigma * eps, raw_of(kind, alpha, sigma, x, eps)
    assert apply(x0_coefficients(kind, alpha, sigma), z, raw) == pytest.approx(x, abs=1e-9)
    assert apply(eps_coefficients(kind, alpha, sigma), z, raw) == pytest.approx(eps, abs=1e-9)
    assert apply(raw_coefficients(kind, alpha, sigma), z, x) == pytest.approx(raw, abs=1e-9)


@pytest.mark.parametrize("kind", PredictionType)
@law
@given(angles, values, values)
def test_raw_and_x0_invert_each_other(
    kind: PredictionType, angle: float, z: float, raw: float
) -> None:
    alpha, sigma = math.cos(angle), math.sin(angle)
    x0 = apply(x0_coefficients(kind, alpha, sigma), z, raw)
    assert apply(raw_coefficients(kind, alpha, sigma), z, x0) == pytest.approx(raw, abs=1e-9)
    eps = apply(eps_coefficients(kind, alpha, sigma), z, raw)
    assert alpha * x0 + sigma * eps == pytest.approx(z, abs=1e-9)


@law
@given(st.floats(0.01, 0.99), values, values)
def test_flow_is_right_off_the_circle_too(t: float, x: float, eps: float) -> None:
    kind = PredictionType.FLOW_PREDICTION
    z = (1 - t) * x + t * eps
    assert apply(x0_coefficients(kind, 1 - t, t), z, eps - x) == pytest.approx(x, abs=1e-9)
    assert x0_coefficients(kind, 1 - t, t) == pytest.approx((1.0, -t))


@pytest.mark.parametrize("kind", PredictionType)
def test_arrays_and_tensors_give_the_numbers_that_floats_give(kind: PredictionType) -> None:
    torch = pytest.importorskip("torch")
    alpha, sigma = np.array([0.6, 0.8]), np.array([0.8, 0.6])
    for function in (x0_coefficients, eps_coefficients, raw_coefficients):
        arrays = function(kind, alpha, sigma)
        tensors = function(kind, torch.tensor(alpha), torch.tensor(sigma))
        for i in range(2):
            floats = function(kind, float(alpha[i]), float(sigma[i]))
            for place in range(2):
                assert np.broadcast_to(arrays[place], 2)[i] == floats[place]
                assert np.broadcast_to(np.asarray(tensors[place]), 2)[i] == floats[place]


def test_spellings_are_those_of_diffusers() -> None:
    spelled = ["epsilon", "sample", "v_prediction", "flow_prediction"]
    assert [str(kind) for kind in PredictionType] == spelled
    with pytest.raises(ConfigError, match="`prediction_type` must be one of .* got 'noise'"):
        PredictionType("noise")
