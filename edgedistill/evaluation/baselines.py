"""What a student is measured against: the guided many-step teacher, and the teacher at a few steps."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from edgedistill import __version__
from edgedistill.evaluation.report import Evaluator, QualityReport
from edgedistill.files import read_json, write_json, written_aside
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
        count: Samples of each; the classes take turns, and so do the example prompts.
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
    """The teacher at a few steps, without distillation: the strongest of those tried."""

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
        naive: By number of steps, the naive teacher of the smallest Frechet distance.
        tried: Every naive teacher's (steps, w, spacing, Frechet distance).
        reference: float32 (count, channels, height, width), the samples behind `teacher`.
    """

    settings: Settings
    teacher: QualityReport
    naive: Mapping[int, Naive]
    tried: tuple[tuple[int, float, str, float], ...]
    reference: np.ndarray


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
    labels = evaluator.labels(teacher.conditions, settings.count)
    reference = _sample(teacher, settings, settings.reference_steps, settings.reference_w)
    best = evaluator.report(reference, labels)
    naive: dict[int, Naive] = {}
    tried = []
    choices = list(itertools.product(settings.steps, settings.w, settings.spacings))
    for steps, w, spacing in tqdm(choices, desc="naive teachers", disable=None):
        samples = _sample(teacher, settings, steps, w, spacing)
        frechet = evaluator.frechet(samples)
        tried.append((steps, w, spacing, frechet))
        if steps not in naive or frechet < naive[steps].report.frechet:
            report = evaluator.report(samples, labels, reference)
            naive[steps] = Naive(steps, w, spacing, report)
    return Baselines(settings, best, naive, tuple(tried), reference)


def _sample(
    teacher: Teacher, settings: Settings, steps: int, w: float, spacing: str | None = None
) -> np.ndarray:
    table = teacher.table(steps, 1 + w, spacing)
    return teacher.sample(table, settings.count, seed=settings.seed)


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
        "naive": [dataclasses.asdict(item) for item in made.naive.values()],
        "tried": made.tried,
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
    return Baselines(
        settings,
        QualityReport.from_json(figures["teacher"]),
        {item.steps: item for item in naive},
        tuple(tuple(item) for item in figures["tried"]),
        load_file(entry / _SAMPLES)["reference"],
    )
