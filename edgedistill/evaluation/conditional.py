"""Students that follow an image, beside the teacher that is made to follow it without training."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from edgedistill.data.controls import CHANCES, Task, control_error, controls_of, impose
from edgedistill.evaluation.report import Evaluator
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import sample_torch
from edgedistill.models.source import open_network
from edgedistill.noise import noise_bank
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.student import Student
from edgedistill.table import SamplerTable
from edgedistill.teacher import Teacher

Manner = Literal["state", "estimate"]


@dataclass(frozen=True, eq=False)
class Trial:
    """Held-out images, and what samplers are told of them.

    Fields:
        task, factor: See `edgedistill.data.controls`.
        images: float32 (count, channels, height, width) in [-1, 1].
        labels: int64 (count,), or None.
        controls: By condition, (count, ...).
    """

    task: Task
    factor: int
    images: np.ndarray
    labels: np.ndarray | None
    controls: dict[str, np.ndarray]


@dataclass(frozen=True)
class Following:
    """How well samples follow what they were told.

    Fields:
        name: Of the sampler.
        nfe: Network evaluations per sample.
        frechet: Frechet distance to the held-out images that the controls are of.
        control_error: Mean squared error of the samples' own controls.
        error: Mean squared error of the samples themselves.
        imposed: The Frechet distance once what was told is put back into the samples, or None where the
            control is of a kind that cannot be.
    """

    name: str
    nfe: int
    frechet: float
    control_error: float
    error: float
    imposed: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return dataclasses.asdict(self)


def trial(evaluator: Evaluator, task: Task, factor: int = 2, seed: int = 0) -> Trial:
    """Return a trial of every held-out image.

    Args:
        evaluator: Holds the images.
        task, factor: What is told of them.
        seed: Of the holes.
    """
    data = evaluator.held_out
    images = np.asarray(data.images)
    generator = np.random.Generator(np.random.Philox(key=seed))
    chances = generator.random((len(images), CHANCES), dtype=np.float32)
    return Trial(task, factor, images, data.labels, controls_of(task, images, chances, factor))


def follow_student(
    student: Student, given: Trial, evaluator: Evaluator, seed: int = 0, *, free: bool = False
) -> Following:
    """Sample a student of the trial's task under its controls, and measure.

    Args:
        student: The student.
        given: What is to be followed.
        evaluator: Measures.
        seed: Of the first sample's noise.
        free: Leave out what the table puts back of the known pixels.
    """
    table = _free(student.table) if free else student.table
    modules = {name: open_network(student, name) for name in table.networks}
    conditions: dict[str, Any] = dict(given.controls)
    if table.condition("class") is not None:
        conditions["class_labels"] = given.labels
    samples = sample_torch(modules, table, len(given.images), seed=seed, **conditions)
    return measured(student.name, student.table.nfe, samples, given, evaluator)


def follow_teacher(
    teacher: Teacher,
    given: Trial,
    evaluator: Evaluator,
    evaluations: int = 4,
    w: Sequence[float] = (0.0, 0.5),
    spacings: Sequence[str] = ("trailing", "leading"),
    seed: int = 0,
) -> tuple[Following, ...]:
    """Sample the teacher, which was never told of any image, so that it follows one, in every way that is tried.

    After every row but the last the controlled part is put right, in one of two manners: in the state,
    by the known part noised (as in RePaint, arXiv:2201.09865), or in the estimate of x (as in DDNM,
    arXiv:2212.00490). Both put it right after the last row too: what that does is in `Following.imposed`.

    Args:
        teacher: The teacher.
        given: What is to be followed.
        evaluator: Measures.
        evaluations: Of the network per sample: one for each row, or two for each that is guided.
        w: Guidance weights that are tried.
        spacings: Spacings of the times that are tried.
        seed: Of the first sample's noise.

    Raises:
        ConfigError: If the control is of a kind that cannot be imposed.
    """
    manners: tuple[Manner, ...] = ("state", "estimate")
    found = []
    for weight, spacing, manner in itertools.product(w, spacings, manners):
        steps = evaluations // (2 if weight else 1)
        table = teacher.table(steps, 1 + weight, spacing)
        samples = _steered(teacher, table, given, manner, weight, seed)
        name = f"teacher, {steps} steps, g={1 + weight:g}, {spacing}, {manner} put right"
        found.append(measured(name, table.nfe, samples, given, evaluator))
    return tuple(found)


def measured(
    name: str, nfe: int, samples: np.ndarray, given: Trial, evaluator: Evaluator
) -> Following:
    """Measure samples that were made under the controls of a trial, one for each."""
    imposed = None
    if given.task != "edges":
        put_back = impose(given.task, samples, given.images, given.controls, given.factor)
        imposed = evaluator.frechet(put_back.clip(-1, 1))
    return Following(
        name,
        nfe,
        evaluator.frechet(samples),
        float(control_error(given.task, samples, given.controls, given.factor)),
        float(np.mean((samples - given.images) ** 2)),
        imposed,
    )


def _free(table: SamplerTable) -> SamplerTable:
    stages = tuple(
        dataclasses.replace(
            stage, rows=tuple(dataclasses.replace(row, blend=None) for row in stage.rows)
        )
        for stage in table.stages
    )
    return dataclasses.replace(table, stages=stages)


@torch.no_grad()
def _steered(
    teacher: Teacher, table: SamplerTable, given: Trial, manner: Manner, w: float, seed: int
) -> np.ndarray:
    """Take the times of a DDIM table and put the controlled part right after every row but the last."""
    schedule = Schedule.from_config(teacher.scheduler)
    denoiser = Denoiser(teacher.network, schedule, PredictionType(teacher.prediction_type))
    controls = {name: torch.from_numpy(value) for name, value in given.controls.items()}
    conditions = {} if given.labels is None else {"class_labels": torch.from_numpy(given.labels)}
    null = {name: torch.full_like(conditions[name], value) for name, value in teacher.null.items()}
    (first,) = noise_bank(table, range(seed, seed + len(given.images)))
    # The second noise is as far from the samples' as the seeds of two trials are.
    (second,) = noise_bank(table, range(10**6 + seed, 10**6 + seed + len(given.images)))
    z, noise = torch.from_numpy(first), torch.from_numpy(second)
    for row in table.rows:
        t = torch.full((len(z),), row.note["t"])
        raw = denoiser.raw(z, t, conditions)
        if w:
            raw = (1 + w) * raw - w * denoiser.raw(z, t, null)
        x0, eps = denoiser.to_x0(z, t, raw), denoiser.to_eps(z, t, raw)
        alpha, sigma = schedule.alpha_sigma(row.note["s"])

        def right(state: Tensor, known: Tensor) -> Tensor:
            return impose(given.task, state, known, controls, given.factor)

        if manner == "estimate" and row is not table.rows[-1]:
            x0 = right(x0, controls["image"])
        z = alpha * x0 + sigma * eps
        if manner == "state" and row is not table.rows[-1]:
            z = right(z, alpha * controls["image"] + sigma * noise)
    return z.clip(-1, 1).numpy()
