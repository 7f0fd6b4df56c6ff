"""What a network's raw output means: affine conversions between raw, x0 and eps.

Everywhere ``z = alpha*x + sigma*eps``. The functions return the two coefficients of an affine map and use
nothing but arithmetic, so that alpha and sigma may be floats, numpy arrays or torch tensors alike; the caller
sees to it that nothing is divided by zero.
"""

from enum import StrEnum
from typing import Any

from edgedistill.errors import ConfigError

Coefficients = tuple[Any, Any]


class PredictionType(StrEnum):
    """What the network returns, in diffusers' spelling."""

    EPSILON = "epsilon"
    """eps."""
    SAMPLE = "sample"
    """x0."""
    V_PREDICTION = "v_prediction"
    """alpha*eps - sigma*x, where alpha^2 + sigma^2 = 1 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
    FLOW_PREDICTION = "flow_prediction"
    """eps - x."""

    @classmethod
    def _missing_(cls, value: object) -> "PredictionType":
        msg = f"`prediction_type` must be one of {', '.join(cls)}, got {value!r}."
        raise ConfigError(msg)


def x0_coefficients(kind: PredictionType, alpha: Any, sigma: Any) -> Coefficients:
    """Return (a_z, a_r) of ``x0 = a_z*z + a_r*raw``; undefined for ``epsilon`` at alpha = 0."""
    if kind is PredictionType.EPSILON:
        return 1 / alpha, -sigma / alpha
    if kind is PredictionType.SAMPLE:
        return 0.0, 1.0
    if kind is PredictionType.V_PREDICTION:
        return alpha, -sigma
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def eps_coefficients(kind: PredictionType, alpha: Any, sigma: Any) -> Coefficients:
    """Return (e_z, e_r) of ``eps = e_z*z + e_r*raw``; undefined for ``sample`` at sigma = 0."""
    if kind is PredictionType.EPSILON:
        return 0.0, 1.0
    if kind is PredictionType.SAMPLE:
        return 1 / sigma, -alpha / sigma
    if kind is PredictionType.V_PREDICTION:
        return sigma, alpha
    return 1 / (alpha + sigma), alpha / (alpha + sigma)


def raw_coefficients(kind: PredictionType, alpha: Any, sigma: Any) -> Coefficients:
    """Return (r_z, r_x0) of ``raw = r_z*z + r_x0*x0``; undefined at sigma = 0, except for ``sample``."""
    if kind is PredictionType.EPSILON:
        return 1 / sigma, -alpha / sigma
    if kind is PredictionType.SAMPLE:
        return 0.0, 1.0
    if kind is PredictionType.V_PREDICTION:
        return alpha / sigma, -1 / sigma
    return 1 / sigma, -(alpha + sigma) / sigma
