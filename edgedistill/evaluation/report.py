"""All numbers about one set of samples, against data that the model has and has not seen."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.choices import Condition
from edgedistill.data import ImageDataset, open_dataset
from edgedistill.data.captions import digits_of
from edgedistill.errors import ContractError, require
from edgedistill.evaluation import metrics
from edgedistill.evaluation.features import Extractor, extract, name_of, pixels

Classifier = Callable[[np.ndarray], np.ndarray]
Reader = Callable[[Sequence[str]], np.ndarray]
_READERS: Mapping[str, Reader] = {"captioned_digits": digits_of}


@dataclass(frozen=True)
class QualityReport:
    """How good a set of samples is; compare only reports of one `count`.

    Fields:
        count: Number of samples.
        features: What images were compared by, such as ``pixels``.
        frechet: Frechet distance to the held-out images.
        floor: The same for as many training images: what a perfect generator would score.
        recall: Share of held-out images that the samples cover.
        precision: Share of samples near held-out images; a guard only.
        memorisation: Share of near copies of training images; 0.01 is what new real images score.
        diversity: Variety within classes, relative to the real one; None without classes.
        accuracy: Share of samples that a classifier gives their class; a guard only, None without one.
        mse_to_reference: To the many-step teacher from the same noise; None where none was given.
    """

    count: int
    features: str
    frechet: float
    floor: float
    recall: float
    precision: float
    memorisation: float
    diversity: float | None = None
    accuracy: float | None = None
    mse_to_reference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "QualityReport":
        """Read what `to_json` wrote."""
        return cls(**data)


class Evaluator:
    """Measures samples against training and held-out images, whose features it computes once.

    Args:
        train: What the teacher was trained on.
        held_out: What it has not seen.
        extractor: Maps images to the features that they are compared by.
        classifier: Maps images to classes, for `QualityReport.accuracy`.
        reader: Maps prompts to the classes that they ask for.
    """

    def __init__(
        self,
        train: ImageDataset,
        held_out: ImageDataset,
        extractor: Extractor = pixels,
        classifier: Classifier | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.train = train
        self.held_out = held_out
        self.extractor = extractor
        self.classifier = classifier
        self.reader = reader
        self.train_features = extract(extractor, np.asarray(train.images))
        self.held_out_features = extract(extractor, np.asarray(held_out.images))
        self.floor = functools.cache(self._floor)

    @classmethod
    def open(cls, name: str = "digits", extractor: Extractor = pixels) -> "Evaluator":
        """Open the two splits of a data set; one with classes gets a support-vector classifier.

        Raises:
            ConfigError: As `open_dataset`.
        """
        train, held_out = open_dataset(name, "train"), open_dataset(name, "test")
        classifier = None if train.labels is None else fit_classifier(train)
        return cls(train, held_out, extractor, classifier, _READERS.get(name))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that reports depend on besides the samples: features, classes, classifier."""
        arrays = [self.train_features, self.held_out_features]
        arrays += [data.labels for data in (self.train, self.held_out) if data.labels is not None]
        arrays += [self.classifier(np.asarray(self.held_out.images))] if self.classifier else []
        digest = hashlib.sha256(name_of(self.extractor).encode())
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def labels(self, conditions: Sequence[Condition], count: int) -> np.ndarray | None:
        """Return the classes that samples stand for when a table's conditions are left to themselves.

        Args:
            conditions: Of the table; classes take turns, and so do the examples of a text.
            count: Number of samples.

        Returns:
            (count,) classes; None where nothing says them.
        """
        for item in conditions:
            if item.kind == "class" and item.size:
                return np.arange(count) % item.size
            if item.kind == "text" and item.examples and self.reader is not None:
                return np.resize(self.reader(item.examples), count)
        return None

    def report(
        self,
        samples: np.ndarray,
        labels: np.ndarray | None = None,
        reference: np.ndarray | None = None,
    ) -> QualityReport:
        """Measure samples.

        Args:
            samples: float32 (count, channels, height, width) in [-1, 1].
            labels: (count,) the classes that were asked for, or None.
            reference: Samples of the many-step teacher from the same noise, or None.

        Raises:
            ContractError: If the shapes do not fit the data or a value is not finite.
        """
        if samples.shape[1:] != self.train.images.shape[1:]:
            msg = f"Samples must be (count, {', '.join(map(str, self.train.images.shape[1:]))}), got {samples.shape}."
            raise ContractError(msg)
        made = extract(self.extractor, samples)
        return QualityReport(
            count=len(samples),
            features=name_of(self.extractor),
            frechet=metrics.frechet_distance(made, self.held_out_features),
            floor=self.floor(len(samples)),
            recall=metrics.recall(self.held_out_features, made),
            precision=metrics.precision(self.held_out_features, made),
            memorisation=metrics.memorisation(self.train_features, self.held_out_features, made),
            diversity=self._diversity(made, labels),
            accuracy=self._accuracy(samples, labels),
            mse_to_reference=None
            if reference is None
            else metrics.mse_to_reference(samples, reference),
        )

    def frechet(self, samples: np.ndarray) -> float:
        """Return the Frechet distance of samples to the held-out images."""
        made = extract(self.extractor, samples)
        return metrics.frechet_distance(made, self.held_out_features)

    def _floor(self, count: int) -> float:
        chosen = self.train_features[balanced(self.train, count)]
        return metrics.frechet_distance(chosen, self.held_out_features)

    def _diversity(self, made: np.ndarray, labels: np.ndarray | None) -> float | None:
        if labels is None or self.train.labels is None:
            return None
        return metrics.diversity(self.train_features, self.train.labels, made, labels)

    def _accuracy(self, samples: np.ndarray, labels: np.ndarray | None) -> float | None:
        if labels is None or self.classifier is None:
            return None
        return float(np.mean(self.classifier(samples) == labels))


def balanced(data: ImageDataset, count: int) -> np.ndarray:
    """Return indices of the first `count` images (or all there are), the classes taken in turn."""
    if data.labels is None:
        return np.arange(min(count, len(data.images)))
    rank = np.zeros(len(data.labels), np.int64)
    for label in np.unique(data.labels):
        members = data.labels == label
        rank[members] = np.arange(members.sum())
    return np.lexsort((data.labels, rank))[:count]


def fit_classifier(train: ImageDataset) -> Classifier:
    """Fit a support-vector classifier on raw pixels; deterministic, 0.99 on held-out digits.

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    machine = require("sklearn.svm", "train").SVC(C=10.0, gamma="scale")
    machine.fit(pixels(np.asarray(train.images)), train.labels)
    return lambda images: machine.predict(pixels(images))
