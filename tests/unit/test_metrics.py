"""The metrics on sets whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn

from edgedistill.data import Images
from edgedistill.errors import ContractError
from edgedistill.evaluation import metrics
from edgedistill.evaluation.features import torch_features
from edgedistill.evaluation.report import Evaluator, QualityReport, balanced


@pytest.fixture(scope="module")
def digits() -> Evaluator:
    return Evaluator.open("digits")


def gaussian(mean: list[float], covariance: np.ndarray, count: int = 50) -> np.ndarray:
    """Points whose sample mean and covariance are exactly those given."""
    points = np.random.default_rng(0).normal(size=(count, len(mean)))
    points -= points.mean(0)
    white = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + np.array(mean)


def test_frechet_distance_of_gaussians_with_diagonal_covariances() -> None:
    a = gaussian([0.0, 0.0, 1.0], np.diag([1.0, 4.0, 9.0]))
    b = gaussian([3.0, 0.0, -1.0], np.diag([4.0, 4.0, 1.0]))
    expected = (9 + 4) + (1 - 2) ** 2 + (3 - 1) ** 2
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_gaussians_whose_covariances_do_not_commute() -> None:
    first, second = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.6], [-0.6, 2.0]])
    product = first @ second  # the trace of a 2x2 root: sqrt(trace + 2 sqrt(determinant))
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 25 + np.trace(first + second) - 2 * root
    a, b = gaussian([0.0, 0.0], first), gaussian([3.0, 4.0], second)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_a_set_has_no_distance_to_itself_even_where_its_covariance_is_singular() -> None:
    flat = np.random.default_rng(1).normal(size=(40, 3)) @ np.ones((3, 6))
    assert metrics.frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_of_samples_that_miss_one_of_two_clusters() -> None:
    rng = np.random.default_rng(2)
    clusters = [rng.normal(centre, 0.1, size=(50, 2)) for centre in (0, 100)]
    real, fake = np.concatenate(clusters), rng.normal(0, 0.02, size=(60, 2))
    assert metrics.precision(real, fake) == 1
    assert metrics.recall(np.concatenate([fake, fake + 100]), fake) == 0.5
    assert metrics.recall(real, real) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: metrics.frechet_distance(a, a[:, :2]), r"of one width, got \(10, 3\) and \(10, 2\)"),
        (lambda a: metrics.recall(a * np.nan, a), "NaN or infinity"),
        (lambda a: metrics.precision(a[:5], a), "Neighbour 5 of each of 5 points"),
        (lambda a: metrics.diversity(a, np.arange(10) // 5, a, np.arange(10)), "Class 0 has 1 samples"),
        (lambda a: metrics.mse_to_reference(a, a[:5]), "must pair up"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit_are_refused(call, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        call(np.random.default_rng(3).normal(size=(10, 3)))


def test_real_images_score_the_floor(digits: Evaluator) -> None:
    chosen = balanced(digits.train, 1000)
    report = digits.report(digits.train.images[chosen], digits.train.labels[chosen])
    assert report.frechet == report.floor == pytest.approx(0.2955, abs=2e-3)
    assert report.memorisation == 1
    assert report.diversity == pytest.approx(1, abs=0.02)
    assert report.accuracy == 1
    assert report.recall > 0.9
    assert np.bincount(digits.train.labels[chosen]).tolist() == [100] * 10


def test_held_out_images_are_not_memorised_and_the_classifier_knows_them(digits: Evaluator) -> None:
    report = digits.report(digits.held_out.images, digits.held_out.labels)
    assert report.frechet == pytest.approx(0, abs=1e-6)
    assert report.memorisation == pytest.approx(0.01, abs=0.002)
    assert report.accuracy is not None
    assert report.accuracy >= 0.98


def test_class_means_look_accurate_and_precise_but_lack_everything_else(digits: Evaluator) -> None:
    labels = np.arange(1000) % 10
    images, classes = digits.train.images, digits.train.labels
    means = np.stack([images[classes == label].mean(0) for label in range(10)])[labels]
    report = digits.report(means, labels, reference=means + 0.5)
    assert (report.accuracy, report.precision) == (1, 1)
    assert report.diversity == pytest.approx(0, abs=1e-5)
    assert report.recall < 0.01
    assert report.frechet > 7
    assert report.mse_to_reference == pytest.approx(0.25)


def test_a_report_survives_json(digits: Evaluator) -> None:
    report = digits.report(digits.held_out.images[:100])
    assert report.accuracy is None
    assert QualityReport.from_json(report.to_json()) == report


def test_samples_of_another_shape_are_refused(digits: Evaluator) -> None:
    with pytest.raises(ContractError, match=r"Samples must be \(count, 1, 8, 8\)"):
        digits.report(np.zeros((10, 3, 8, 8), np.float32))


def test_any_torch_module_or_function_extracts_features(digits: Evaluator) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(128, 12))
    projection = np.random.default_rng(0).normal(size=(64, 12))
    for extractor, name in (
        (torch_features(module, size=16, batch=500), "Sequential"),
        (lambda images: images.reshape(-1, 64) @ projection, "<lambda>"),
    ):
        evaluator = Evaluator(digits.train, digits.held_out, extractor)
        blurred = np.full_like(digits.train.images, 0) + digits.train.images.mean(0)
        assert evaluator.report(blurred).features == name
        assert evaluator.frechet(blurred) > 5 * evaluator.floor(1000) > 0
        assert evaluator.fingerprint != digits.fingerprint


def test_an_extractor_that_drops_images_is_refused(digits: Evaluator) -> None:
    with pytest.raises(ContractError, match=r"must return \(1200, features\), got \(1199, 64\)"):
        Evaluator(digits.train, digits.held_out, lambda images: images.reshape(-1, 64)[1:])


def test_unlabelled_images_are_taken_as_they_come() -> None:
    images = Images(np.zeros((5, 1, 2, 2), np.float32))
    assert balanced(images, 3).tolist() == [0, 1, 2]
