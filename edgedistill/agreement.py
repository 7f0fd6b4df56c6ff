"""How near an answer is to its reference: SNR, PSNR, largest difference, cosine, and gain of a response."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgedistill.errors import ContractError

DB_LIMIT = 999.0
TOLERANCE = 1e-6
"""Of a coefficient, relative to it or to 1, whichever is larger."""


@dataclass(frozen=True)
class Agreement:
    """An answer beside its reference.

    Fields:
        snr_db: See `snr_db`; infinite for equal bits.
        max_abs: Largest absolute difference, in the tensor's own unit.
        cosine: See `cosine`.
        psnr_db: See `psnr_db`; None for what is not an image.
    """

    snr_db: float
    max_abs: float
    cosine: float
    psnr_db: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; 999 stands for infinite dB."""
        data = {name: value for name, value in asdict(self).items() if value is not None}
        return {k: finite_db(v) if k.endswith("_db") else v for k, v in data.items()}


def compare(reference: np.ndarray, got: np.ndarray, peak: float | None = None) -> Agreement:
    """Compare an answer with its reference.

    Args:
        reference: Any shape.
        got: The same shape.
        peak: Width of the value range, for images (2.0 for [-1, 1]); None: no PSNR.

    Raises:
        ContractError: If the shapes differ or a value is not finite.
    """
    reference, got = np.asarray(reference, np.float64), np.asarray(got, np.float64)
    if reference.shape != got.shape:
        msg = f"Reference and answer must have one shape, got {reference.shape} and {got.shape}."
        raise ContractError(msg)
    if not (np.isfinite(reference).all() and np.isfinite(got).all()):
        msg = "Reference or answer holds NaN or infinity."
        raise ContractError(msg)
    return Agreement(
        snr_db(reference, got),
        float(np.abs(reference - got).max()),
        cosine(reference, got),
        None if peak is None else psnr_db(reference, got, peak),
    )


def snr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """Return 20 log10(norm(reference) / norm(reference - got)); infinite for equal arrays."""
    return _decibel(_norm(reference), _norm(np.subtract(reference, got, dtype=np.float64)))


def psnr_db(reference: np.ndarray, got: np.ndarray, peak: float) -> float:
    """Return 20 log10(peak / rmse), where `peak` is the width of the value range."""
    return _decibel(peak, _rms(np.subtract(reference, got, dtype=np.float64)))


def cosine(reference: np.ndarray, got: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays seen as vectors; 0 where one is zero."""
    a, b = np.ravel(reference).astype(np.float64), np.ravel(got).astype(np.float64)
    lengths = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / lengths) if lengths else 0.0


def response_gain(reference: np.ndarray, got: np.ndarray) -> float:
    """Return by how much a response is scaled against the reference's: 1 the same, 0 no response.

    The least-squares factor k of ``got = k * reference + error``. Noise that has nothing to do with the
    response, such as quantization's, does not move it, where the ratio of norms would grow.

    Args:
        reference: Change of the reference's output when a condition changes.
        got: Change of the output in question for the same change.

    Raises:
        ContractError: If the reference does not respond at all.
    """
    a, b = np.ravel(reference).astype(np.float64), np.ravel(got).astype(np.float64)
    if not a.any():
        msg = "The reference's output does not depend on this condition, so no gain can be given."
        raise ContractError(msg)
    return float(a @ b / (a @ a))


def response_share(response: np.ndarray, output: np.ndarray) -> float:
    """Return how large a response is beside the output, both by their root mean square.

    Args:
        response: Changes of the reference's output when a condition changes.
        output: The reference's output, not zero.
    """
    return _rms(response) / _rms(output)


def is_close(found: float | None, expected: float | None) -> bool:
    """Say whether a coefficient is what it should be, up to `TOLERANCE`; None is close to nothing but None."""
    if found is None or expected is None:
        return found is expected
    return abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))


def finite_db(value: float) -> float:
    """Return a value that JSON can hold: at most `DB_LIMIT` up or down."""
    return min(max(value, -DB_LIMIT), DB_LIMIT)


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(np.ravel(values).astype(np.float64)))


def _rms(values: np.ndarray) -> float:
    return _norm(values) / math.sqrt(np.size(values))


def _decibel(signal: float, error: float) -> float:
    if error == 0:
        return math.inf
    return 20 * math.log10(signal / error) if signal > 0 else -math.inf
