"""How good a student is beside its teacher, and the bars that the packaged recipes must clear."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.evaluation.baselines import Baselines
from edgedistill.evaluation.report import Evaluator, QualityReport
from edgedistill.models.run import sample_torch
from edgedistill.models.source import open_network
from edgedistill.student import Student
from edgedistill.tables import DEFAULT, choose


@dataclass(frozen=True)
class Bar:
    """What a student must reach; ratios of one run, so that noise cancels. None: no bar.

    Fields:
        to_naive: Largest Frechet distance over that of the strongest naive teacher of as many steps.
        to_teacher: Largest Frechet distance over that of the guided many-step teacher.
        mse_to_naive: Largest squared error to the many-step teacher over that of the naive teacher.
        recall: Smallest recall.
    """

    to_naive: float | None = None
    to_teacher: float | None = None
    mse_to_naive: float | None = None
    recall: float | None = None


# Of the digits, 1000 samples; by method and evaluations.
BARS: Mapping[str, Mapping[int, Bar]] = {
    "guided": {
        4: Bar(0.85, 1.35, 0.40),
        2: Bar(0.55, 1.45, 0.25),
        1: Bar(0.40, 1.80, 0.15, 0.60),
    },
    "guide": {32: Bar(None, 1.1), 16: Bar(None, 1.1), 8: Bar(None, 1.1)},
    "sfd": {4: Bar(0.90, 1.5), 2: Bar(0.65, 2.0, 0.35)},
    "dmd2": {1: Bar(0.45, 2.0, recall=0.55)},
    "ctm": {2: Bar(0.65, 2.0), 1: Bar(0.45, 2.0)},
}
MIN_ACCURACY, MAX_MEMORISATION, MIN_DIVERSITY = 0.95, 0.03, 0.6


@dataclass(frozen=True, eq=False)
class StudentQuality:
    """One line of a quality table.

    Fields:
        name: Of the student.
        nfe: Network evaluations per sample.
        parameters: Of all its networks.
        report: Its own numbers.
        to_naive, to_teacher, mse_to_naive: As in `Bar`; None where no naive teacher has that many steps.
        samples: float32 (count, channels, height, width).
    """

    name: str
    nfe: int
    parameters: int
    report: QualityReport
    to_naive: float | None
    to_teacher: float
    mse_to_naive: float | None
    samples: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, samples left out."""
        data = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "samples"
        }
        return {**data, "report": self.report.to_json()}

    def problems(self, bar: Bar | None = None) -> list[str]:
        """Return what misses the guards, and the bar where one is given; empty: all is well."""
        report = self.report
        checks: list[tuple[str, float | None, float | None, bool]] = [
            ("accuracy", report.accuracy, MIN_ACCURACY, False),
            ("memorisation", report.memorisation, MAX_MEMORISATION, True),
            ("diversity", report.diversity, MIN_DIVERSITY, False),
        ]
        if bar is not None:
            checks += [
                ("Frechet distance / naive teacher", self.to_naive, bar.to_naive, True),
                ("Frechet distance / guided teacher", self.to_teacher, bar.to_teacher, True),
                ("squared error / naive teacher", self.mse_to_naive, bar.mse_to_naive, True),
                ("recall", report.recall, bar.recall, False),
            ]
        return [
            f"{self.name}: {name} is {value:.3f}, {'at most' if at_most else 'at least'} {limit:g} is required"
            for name, value, limit, at_most in checks
            if value is not None
            and limit is not None
            and (value > limit if at_most else value < limit)
        ]


def measure(
    student: Student, evaluator: Evaluator, baselines: Baselines, sampler: str = DEFAULT
) -> StudentQuality:
    """Sample a student at the baselines' guidance, noise and count, and measure it against them.

    Args:
        student: The student.
        evaluator: Measures.
        baselines: Of its teacher.
        sampler: Which of the student's tables; guidance that it does not leave to the caller stays its own.

    Raises:
        ConfigError: If the student has no such table.
    """
    settings, table = baselines.settings, choose(student.samplers, sampler)
    modules = {name: open_network(student, name) for name in table.networks}
    embedded = table.guidance.mode == "embedded"
    labels = evaluator.labels(table.conditions, settings.count)
    samples = sample_torch(
        modules,
        table,
        settings.count,
        seed=settings.seed,
        guidance_scale=1 + settings.reference_w if embedded else None,
        tokenize=student.tokenize,
    )
    report = evaluator.report(samples, labels, baselines.reference)
    naive = baselines.naive.get(table.nfe)
    parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
    return StudentQuality(
        student.name if sampler == DEFAULT else f"{student.name}, {sampler}",
        table.nfe,
        parameters,
        report,
        report.frechet / naive.report.frechet if naive else None,
        report.frechet / baselines.teacher.frechet,
        _ratio(report.mse_to_reference, naive.report.mse_to_reference if naive else None),
        samples,
    )


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None
