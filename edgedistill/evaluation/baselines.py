"""What a student is measured against: the guided many-step teacher, and the teacher at a few steps."""

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from edgedistill import __version__
from edgedistill.evaluation.report import Evaluator, QualityReport
from edgedistill.files import read_json, write_json, written_aside
from edgedistill.models.run import sample_torch
from edgedistill.table import SamplerTable
from edgedistill.teacher import Teacher

_FIGURES, _SAMPLES = "baselines.json", "reference.safetensors"


@dataclass(frozen=True)
class Settings:
    """What is sampled for the baselines.

    Fields:
        steps: Numbers of steps of the naive teacher.
        w: Its guidance weights, ``guidance_scale - 1``.
        spacings: Its timestep spacings.
        reference_steps, reference_w: The many-step teacher.
        count: Samples of each; the classes take turns.
        seed: Of the first sample.
    """

    steps: tuple[int, ...] = (4, 2, 1)
    w: tuple[float, ...] = (0.0, 0.25, 0.5)
    spacings: tuple[str, ...] = ("trailing", "leading", "linspace")
    reference_steps: int = 50
    reference_w: float = 0.5
    count: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Naive:
    """The teacher at a few steps, without distillation."""

    steps: int
    w: float
    spacing: str
    report: QualityReport


@dataclass(frozen=True, eq=False)
class Baselines:
    """What students have to come near to, and what they have to beat.

    Fields:
        settings: How it was sampled; students must use the same count and seed.
        teacher: The guided many-step teacher.
        naive: Every naive teacher that was tried.
        reference: float32 (count, channels, height, width), the samples behind `teacher`.
    """

    settings: Settings
    teacher: QualityReport
    naive: tuple[Naive, ...]
    reference: np.ndarray

    def strongest(self, steps: int) -> Naive:
        """Return the naive teacher of the smallest Frechet distance at a number of steps."""
        tried = [item for item in self.naive if item.steps == steps]
        return min(tried, key=lambda item: item.report.frechet)


def naive_baselines(
    teacher: Teacher,
    evaluator: Evaluator,
    settings: Settings | None = None,
    cache: Path | None = None,
) -> Baselines:
    """Sample and measure the many-step teacher and every naive few-step teacher.

    Args:
        teacher: The teacher.
        evaluator: Measures; its data must be the teacher's.
        settings: What to sample; None: `Settings()`, where w other than 0 needs a teacher with a null class.
        cache: Folder to keep results in, by fingerprint of teacher, data, features and settings.
    """
    settings = settings or Settings()
    key = _fingerprint(teacher, evaluator, settings)
    entry = None if cache is None else cache / key[:16]
    if entry is not None and (entry / _FIGURES).is_file():
        return _read(entry, settings)
    made = _measure(teacher, evaluator, settings)
    if entry is not None:
        _write(entry, made)
    return made


def _measure(teacher: Teacher, evaluator: Evaluator, settings: Settings) -> Baselines:
    labels = None if teacher.classes is None else np.arange(settings.count) % teacher.classes

    def sample(table: SamplerTable) -> np.ndarray:
        modules = dict.fromkeys(table.networks, teacher.network)
        return sample_torch(modules, table, settings.count, seed=settings.seed)

    reference = sample(teacher.table(settings.reference_steps, 1 + settings.reference_w))
    best = evaluator.report(reference, labels)
    naive = []
    choices = list(itertools.product(settings.steps, settings.w, settings.spacings))
    for steps, w, spacing in tqdm(choices, desc="naive teachers", disable=None):
        samples = sample(teacher.table(steps, 1 + w, spacing))
        naive.append(Naive(steps, w, spacing, evaluator.report(samples, labels, reference)))
    return Baselines(settings, best, tuple(naive), reference)


def _fingerprint(teacher: Teacher, evaluator: Evaluator, settings: Settings) -> str:
    parts = {
        "version": __version__,
        "teacher": teacher.fingerprint,
        "evaluator": evaluator.fingerprint,
        "settings": dataclasses.asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(entry: Path, made: Baselines) -> None:
    figures = {
        "teacher": made.teacher.to_json(),
        "naive": [dataclasses.asdict(item) for item in made.naive],
    }
    with written_aside(entry) as folder:
        save_file({"reference": made.reference}, folder / _SAMPLES)
        write_json(folder / _FIGURES, figures)


def _read(entry: Path, settings: Settings) -> Baselines:
    figures = read_json(entry / _FIGURES)
    naive = [
        Naive(**{**item, "report": QualityReport.from_json(item["report"])})
        for item in figures["naive"]
    ]
    teacher = QualityReport.from_json(figures["teacher"])
    return Baselines(settings, teacher, tuple(naive), load_file(entry / _SAMPLES)["reference"])
