"""Conversions between raw, x0 and eps: definitions, inverses, refusals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import ConfigError
from edgedistill.prediction import (
    PredictionType,
    boundary_coefficients,
    eps_coefficients,
    prediction_of,
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
        PredictionType.EDM: edm_raw(sigma / alpha, x, x + sigma / alpha * eps),
        PredictionType.FLOW: eps - x,
    }[kind]


def edm_raw(level: float, x: float, state: float) -> float:
    """Return F of table 1 of arXiv:2206.00364, where the state is x + level*eps."""
    c_skip = 0.25 / (level**2 + 0.25)
    return (x - c_skip * state) / (level * 0.5 / math.sqrt(level**2 + 0.25))


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


@pytest.mark.parametrize("kind", PredictionType)
@law
@given(angles, values, values)
def test_x_and_eps_make_up_the_state(
    kind: PredictionType, angle: float, z: float, raw: float
) -> None:
    alpha, sigma = math.cos(angle), math.sin(angle)
    x0 = apply(x0_coefficients(kind, alpha, sigma), z, raw)
    eps = apply(eps_coefficients(kind, alpha, sigma), z, raw)
    assert alpha * x0 + sigma * eps == pytest.approx(z, abs=1e-9)


@law
@given(st.floats(0.01, 0.99), values, values)
def test_flow_is_right_off_the_circle_too(t: float, x: float, eps: float) -> None:
    kind = PredictionType.FLOW
    z = (1 - t) * x + t * eps
    assert apply(x0_coefficients(kind, 1 - t, t), z, eps - x) == pytest.approx(x, abs=1e-9)
    assert x0_coefficients(kind, 1 - t, t) == pytest.approx((1.0, -t))


@pytest.mark.parametrize("kind", PredictionType)
def test_arrays_and_tensors_give_the_numbers_that_floats_give(kind: PredictionType) -> None:
    torch = pytest.importorskip("torch")
    alpha, sigma = np.array([0.6, 0.8]), np.array([0.8, 0.6])
    for function in (x0_coefficients, eps_coefficients):
        arrays = function(kind, alpha, sigma)
        tensors = function(kind, torch.tensor(alpha), torch.tensor(sigma))
        for i in range(2):
            floats = function(kind, float(alpha[i]), float(sigma[i]))
            for place in range(2):
                assert np.broadcast_to(arrays[place], 2)[i] == floats[place]
                assert np.broadcast_to(np.asarray(tensors[place]), 2)[i] == floats[place]


def test_the_ends_of_a_schedule_have_finite_numbers() -> None:
    """At alpha = 0 the state says nothing of x, and all that is known of it comes from the network."""
    assert x0_coefficients(PredictionType.V_PREDICTION, 0.0, 1.0) == (0.0, -1.0)
    assert x0_coefficients(PredictionType.SAMPLE, 0.0, 1.0) == (0.0, 1.0)
    assert x0_coefficients(PredictionType.FLOW, 0.0, 1.0) == (1.0, -1.0)
    assert x0_coefficients(PredictionType.EDM, 0.0, 1.0) == (0.0, 0.5)
    assert eps_coefficients(PredictionType.V_PREDICTION, 0.0, 1.0) == (1.0, 0.0)
    assert eps_coefficients(PredictionType.FLOW, 0.0, 1.0) == (1.0, 0.0)
    assert eps_coefficients(PredictionType.EDM, 0.0, 1.0) == (1.0, 0.0)
    for kind in set(PredictionType) - {PredictionType.EPSILON}:
        assert eps_coefficients(kind, 0.0, 1.0)[1] == 0.0
    for kind in set(PredictionType) - {PredictionType.SAMPLE}:
        a_z, a_r = x0_coefficients(kind, 1.0, 0.0)
        assert (a_z, a_r) == (1.0, 0.0)
        assert all(math.isfinite(item) for item in eps_coefficients(kind, 1.0, 0.0))


def test_edm_has_the_numbers_of_the_paper() -> None:
    for level in (0.002, 0.5, 80.0):
        a_z, a_r = x0_coefficients(PredictionType.EDM, 1.0, level)
        assert a_z == pytest.approx(0.25 / (level**2 + 0.25), rel=1e-14)
        assert a_r == pytest.approx(level * 0.5 / math.sqrt(level**2 + 0.25), rel=1e-14)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, "epsilon"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
        ({"_class_name": "EDMEulerScheduler"}, "edm"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}, "edm"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "sample"}, "sample"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "flow"),
    ],
)
def test_what_a_scheduler_configuration_says(config: dict[str, str], kind: str) -> None:
    assert prediction_of(config) == kind


def test_a_negative_edm_prediction_is_refused() -> None:
    config = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}
    with pytest.raises(ConfigError, match="EDMEulerScheduler must be epsilon, got 'v_prediction'"):
        prediction_of(config)


def test_a_boundary_is_the_identity_at_label_0_and_keeps_unit_variance_elsewhere() -> None:
    assert boundary_coefficients(0) == (1.0, 0.0)
    for t in (0.01, 1, 999):
        c_skip, c_out = boundary_coefficients(t)
        assert c_skip == pytest.approx(1 - c_out**2, abs=1e-15)
    assert boundary_coefficients(1, 0.5) == pytest.approx((0.5, math.sqrt(0.5)), rel=1e-15)


def test_kinds_have_names() -> None:
    names = ["epsilon", "sample", "v_prediction", "edm", "flow"]
    assert [str(kind) for kind in PredictionType] == names
    with pytest.raises(ConfigError, match="`prediction_type` must be one of .* got 'noise'"):
        PredictionType("noise")
