"""What a network's raw output means: affine conversions between raw, x0 and eps.

Everywhere ``z = alpha*x + sigma*eps``. The functions return the two coefficients of an affine map and use
nothing but arithmetic, so that alpha and sigma may be floats, numpy arrays or torch tensors alike; the caller
sees to it that nothing is divided by zero.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from edgedistill.errors import ConfigError

Coefficients = tuple[Any, Any]
SIGMA_DATA = 0.5
"""Standard deviation of the data that EDM and the consistency models assume."""


class PredictionType(StrEnum):
    """What the network returns."""

    EPSILON = "epsilon"
    """eps."""
    SAMPLE = "sample"
    """x0."""
    V_PREDICTION = "v_prediction"
    """alpha*eps - sigma*x, where alpha^2 + sigma^2 = 1 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
    EDM = "edm"
    """F of ``x0 = c_skip*z + c_out*F`` (Karras et al. 2022, arXiv:2206.00364, table 1), with z/alpha for their state."""
    FLOW = "flow"
    """eps - x."""

    @classmethod
    def _missing_(cls, value: object) -> "PredictionType":
        msg = f"`prediction_type` must be one of {', '.join(cls)}, got {value!r}."
        raise ConfigError(msg)


def prediction_of(config: Mapping[str, Any]) -> PredictionType:
    """Return what a diffusers scheduler configuration says that its network predicts.

    The EDM schedulers call F "epsilon"; a flow's scheduler says nothing of its own accord.

    Raises:
        ConfigError: If the kind is not known, or is the negative F that EDM calls "v_prediction".
    """
    name, said = str(config.get("_class_name")), config.get("prediction_type")
    if name.startswith("EDM"):
        if said not in (None, "epsilon", "edm"):
            msg = f"`prediction_type` of a {name} must be epsilon, got {said!r}; networks of that sign cannot be read."
            raise ConfigError(msg)
        return PredictionType.EDM
    if said == "flow_prediction" or (said is None and name.startswith("FlowMatch")):
        return PredictionType.FLOW
    return PredictionType(said or "epsilon")


def x0_coefficients(kind: PredictionType, alpha: Any, sigma: Any) -> Coefficients:
    """Return (a_z, a_r) of ``x0 = a_z*z + a_r*raw``; undefined for ``epsilon`` at alpha = 0."""
    if kind is PredictionType.EPSILON:
        return 1 / alpha, -sigma / alpha
    if kind is PredictionType.SAMPLE:
        return 0.0, 1.0
    if kind is PredictionType.V_PREDICTION:
        return alpha, -sigma
    if kind is PredictionType.EDM:
        scale = _edm_scale(alpha, sigma)
        return alpha * (SIGMA_DATA / scale) ** 2, sigma * SIGMA_DATA / scale
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def eps_coefficients(kind: PredictionType, alpha: Any, sigma: Any) -> Coefficients:
    """Return (e_z, e_r) of ``eps = e_z*z + e_r*raw``; undefined for ``sample`` at sigma = 0."""
    if kind is PredictionType.EPSILON:
        return 0.0, 1.0
    if kind is PredictionType.SAMPLE:
        return 1 / sigma, -alpha / sigma
    if kind is PredictionType.V_PREDICTION:
        return sigma, alpha
    if kind is PredictionType.EDM:
        scale = _edm_scale(alpha, sigma)
        return sigma / scale**2, -alpha * SIGMA_DATA / scale
    return 1 / (alpha + sigma), alpha / (alpha + sigma)


def boundary_coefficients(t: Any, timestep_scaling: float = 10.0) -> Coefficients:
    """Return (c_skip, c_out) of a consistency model's ``c_skip*z + c_out*x0``: (1, 0) at label t = 0.

    See Luo et al. 2023, arXiv:2310.04378, with the scaling of t that its reference code applies.
    """
    scaled = t * timestep_scaling
    square = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / square**0.5


def _edm_scale(alpha: Any, sigma: Any) -> Any:
    """Standard deviation of the state where that of the data is `SIGMA_DATA`."""
    return (sigma**2 + (alpha * SIGMA_DATA) ** 2) ** 0.5
