"""Distances between sets of samples, on numpy arrays in float64; each says what it cannot see."""

from collections.abc import Iterator

import numpy as np

from edgedistill.errors import ContractError

_PIECE = 1024


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of features (arXiv:1706.08500).

    ``|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2))``. Sees blur and collapse;
    blind to labels; falls as the sets grow, so compare only equal sizes.

    Args:
        a, b: (count, features), at least two each; the counts may differ.

    Raises:
        ContractError: If the shapes do not fit or a value is not finite.
    """
    a, b = _pair(a, b)
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    root = _root(cov_a)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * cross
    return max(0.0, float(distance))


def precision(real: np.ndarray, fake: np.ndarray, k: int = 5) -> float:
    """Return the share of `fake` that lies within the k-th neighbour distance of some real one.

    arXiv:1904.06991, equations 1 and 2. Blind to collapse: one real image per class scores 1.

    Args:
        real, fake: (count, features).
        k: Which nearest neighbour counts, a point itself left out.

    Raises:
        ContractError: If the features do not fit or `real` has not more than k points.
    """
    real, fake = _pair(real, fake)
    if len(real) <= k:
        msg = f"Neighbour {k} of each of {len(real)} points is not there; give more samples."
        raise ContractError(msg)
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _distances(real, real)])
    return float(np.concatenate([(d <= radii).any(1) for d in _distances(fake, real)]).mean())


def recall(real: np.ndarray, fake: np.ndarray, k: int = 5) -> float:
    """Return the share of `real` that lies within the k-th neighbour distance of some fake one.

    `precision` with the roles exchanged; falls when the samples lack variety.
    """
    return precision(fake, real, k)


def diversity(
    real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray, fake_labels: np.ndarray
) -> float:
    """Return the mean distance between samples of one class, relative to that of real ones.

    Args:
        real, fake: (count, features).
        real_labels, fake_labels: (count,) integers; classes that `fake` lacks are left out.

    Returns:
        Mean over classes: 1 for the variety of the real set, 0 for one image per class.

    Raises:
        ContractError: If the features do not fit or a class has fewer than two samples.
    """
    real, fake = _pair(real, fake)
    ratios = [
        _spread(fake[fake_labels == label], label) / _spread(real[real_labels == label], label)
        for label in np.unique(fake_labels)
    ]
    return float(np.mean(ratios))


def memorisation(train: np.ndarray, held_out: np.ndarray, fake: np.ndarray) -> float:
    """Return the share of `fake` nearer to a training image than the nearest 1 % of held-out ones are.

    Args:
        train, held_out, fake: (count, features).

    Returns:
        About 0.01 for new real images, 1 for copies of training images.

    Raises:
        ContractError: If the features do not fit.
    """
    threshold = np.quantile(_nearest(held_out, train), 0.01)
    return float(np.mean(_nearest(fake, train) < threshold))


def mse_to_reference(samples: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean squared difference to samples that a reference made from the same noise.

    Args:
        samples, reference: Of one shape, sample by sample.

    Raises:
        ContractError: If the shapes differ.
    """
    if samples.shape != reference.shape:
        msg = (
            f"Samples and reference must pair up, got shapes {samples.shape} and {reference.shape}."
        )
        raise ContractError(msg)
    return float(np.mean((samples.astype(np.float64) - reference) ** 2))


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check two sets of features and return them in float64."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        msg = f"Features must be two arrays (count >= 2, features) of one width, got {a.shape} and {b.shape}."
        raise ContractError(msg)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        msg = "Features hold NaN or infinity; the samples or the extractor are broken."
        raise ContractError(msg)
    return a.astype(np.float64), b.astype(np.float64)


def _root(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Yield Euclidean distances (piece, len(b)) of consecutive pieces of `a` to all of `b`."""
    squares = (b**2).sum(1)
    for start in range(0, len(a), _PIECE):
        piece = a[start : start + _PIECE]
        yield np.sqrt(((piece**2).sum(1)[:, None] + squares - 2 * piece @ b.T).clip(0))


def _nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = _pair(a, b)
    return np.concatenate([d.min(1) for d in _distances(a, b)])


def _spread(points: np.ndarray, label: int) -> float:
    count = len(points)
    if count < 2:
        msg = f"Class {label} has {count} samples; diversity needs two or more of each class."
        raise ContractError(msg)
    return sum(float(d.sum()) for d in _distances(points, points)) / (count * (count - 1))
