"""Guided distillation against closed forms: what the losses compare and where, and where the samplers lead."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgedistill.methods import guided
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Batch, Plan, Step
from edgedistill.methods.states import noised_data
from edgedistill.methods.targets import cfg_combine, progressive_target
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import sample_torch
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.table import Condition
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.validate import validate

COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
LATENT = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
LATENT |= {"beta_start": 0.00085, "beta_end": 0.012}
MEAN, SPREAD = 0.3, 0.4
SHAPE, COUNT = (1, 4, 4), 16
ROWS = 8
STOCHASTIC = guided.GuidedSettings(start_steps=128, steps=(ROWS,), sampler="stochastic")


class Network(nn.Module):
    """Something that takes classes, and w where it is a student's."""

    def __init__(self, *, told: bool = True) -> None:
        super().__init__()
        self.config = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "num_class_embeds": 3}
        self.config |= {"scalar_inputs": {"w": 1000.0}} if told else {}
        self.device_of = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []


class Wave(Network):
    """A fixed smooth function of all inputs."""

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, **told: Tensor
    ) -> Tensor:
        phase = timestep / 300 + class_labels + sum(told.values())
        return torch.sin(2 * sample + phase[:, None, None, None])


class Exact(Network):
    """The exact denoiser of Gaussian data, which returns x0."""

    def __init__(self, schedule: Schedule, *, told: bool = True) -> None:
        super().__init__(told=told)
        self.schedule = schedule

    def forward(self, sample: Tensor, timestep: Tensor, **_: Tensor) -> Tensor:
        self.seen.append(timestep)
        alpha, sigma = (
            torch.tensor(values)[timestep.long()].float()[:, None, None, None]
            for values in (self.schedule.alphas, self.schedule.sigmas)
        )
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return MEAN + gain * (sample - alpha * MEAN)


class Halved(Network):
    """A student that learned all there is to learn: where two steps of the previous one lead, on a grid."""

    def __init__(self, previous: Denoiser, grid: Sequence[int]) -> None:
        super().__init__()
        self.previous, self.grid = previous, torch.tensor(grid)

    def forward(self, sample: Tensor, timestep: Tensor, **told: Tensor) -> Tensor:
        def predict(z: Tensor, t: Tensor) -> Tensor:
            return self.previous.x0(z, t, told)

        k = (self.grid == timestep[:, None]).long().argmax(1)
        u, m, s = self.grid[k], self.grid[k - 1], self.grid[(k - 2).clamp(min=0)]
        twice = progressive_target(self.previous, predict, sample, u, m, s)
        # From the first point there is one step to the end, and none after it.
        return torch.where((k == 1)[:, None, None, None], predict(sample, u), twice)


class Students(Context):
    """Starts students from the teacher's own class of network."""

    def student(self, *scalars: str, **inputs: Any) -> Denoiser:
        assert (scalars, inputs) == (("w",), {})
        own = self.teacher.network
        network = Exact(self.schedule) if isinstance(own, Exact) else type(own)()
        return Denoiser(network, self.schedule, self.prediction_type)


def context(network: nn.Module, config: dict[str, Any], kind: str) -> Students:
    predicted = PredictionType(kind)
    teacher = Denoiser(network, Schedule.from_config(config), predicted)
    scheduler = {**config, "prediction_type": kind}
    classes = (Condition("class_labels", "class", 2),)
    null = {"class_labels": 2}
    return Students(
        "guided", teacher, network, scheduler, predicted, SHAPE, classes, null, clamp=None
    )


def gaussian() -> tuple[Schedule, Plan]:
    schedule = Schedule.from_config(COSINE)
    teacher = Exact(schedule, told=False)
    return schedule, guided.plan(STOCHASTIC, context(teacher, COSINE, "sample"))


def step_of(plan: Plan, *position: int, **others: Denoiser) -> Step:
    roles = {**{role.name: role.module for role in plan.roles}, **others}
    labels = torch.arange(COUNT, dtype=torch.int32) % 2
    x = MEAN + SPREAD * torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Step(
        roles, Batch(x, {"class_labels": labels}, {"class_labels": 0 * labels + 2}), draw(*position)
    )


def draw(*position: int) -> PositionDraw:
    return PositionDraw(0, position, Slice(COUNT, 0, COUNT), torch.device("cpu"))


def points(schedule: Schedule, count: int) -> list[int]:
    """The end, and where `count` equal jumps begin, rising."""
    return [-1, *reversed(schedule.timesteps(count, "trailing"))]


def learned(schedule: Schedule) -> tuple[Denoiser, Denoiser]:
    """The students of `ROWS` jumps, and of half of them from every point of that grid."""
    students = [Denoiser(Exact(schedule), schedule, PredictionType.SAMPLE)]
    while (jumps := STOCHASTIC.start_steps >> len(students)) >= ROWS // 2:
        network = Halved(students[-1], points(schedule, 2 * jumps))
        students.append(Denoiser(network, schedule, PredictionType.SAMPLE))
    return students[-2], students[-1]


@pytest.mark.parametrize(("config", "kind"), [(LATENT, "epsilon"), (COSINE, "v_prediction")])
def test_stage_1_without_a_weight_is_the_error_of_the_raw_prediction(
    config: dict[str, Any], kind: str
) -> None:
    fold = dataclasses.replace(STOCHASTIC.fold, weighting="prediction")
    settings = dataclasses.replace(STOCHASTIC, fold=fold)
    plan = guided.plan(settings, context(Wave(told=False), config, kind))
    step, again = step_of(plan), draw()
    (found,) = plan.phases[0].updates[0].loss(step).terms.values()
    w, t = again.uniform(0.0, 2.0), again.integers(0, 1000)
    teacher, student = step.roles["teacher"], step.roles["student"]
    z, asked = noised_data(teacher, step.batch, t, again), step.batch.conditions
    wanted = cfg_combine(teacher.raw(z, t, asked), teacher.raw(z, t, step.batch.null), w)
    error = (student.raw(z, t, {**asked, "w": w}) - wanted).square().mean()
    torch.testing.assert_close(found, error, rtol=1e-3, atol=0)


def test_the_student_of_the_stochastic_sampler_sees_every_point_of_its_grid() -> None:
    schedule, plan = gaussian()
    student = plan.roles[1].module
    for index in range(20):
        plan.phases[-1].updates[0].loss(step_of(plan, index))
    seen = torch.cat(student.network.seen).unique().tolist()
    assert seen == points(schedule, ROWS)[1:]


def test_it_learns_two_steps_of_the_previous_one_and_from_the_first_point_its_only_step() -> None:
    schedule, plan = gaussian()
    previous, student = learned(schedule)
    for index in range(4):
        step = step_of(plan, index, previous=previous, student=student)
        assert plan.phases[-1].updates[0].loss(step).terms["halve"].item() < 1e-9
        untrained = dataclasses.replace(step, roles={**step.roles, "student": previous})
        untrained = dataclasses.replace(untrained, draw=draw(index))
        assert plan.phases[-1].updates[0].loss(untrained).terms["halve"].item() > 1e-4


def test_the_stochastic_sampler_of_gaussian_data_has_their_mean_and_deviation() -> None:
    schedule, plan = gaussian()
    _, student = learned(schedule)
    table = plan.phases[-1].emits.table
    assert (table.nfe, validate(table)) == (ROWS, [])
    samples = sample_torch({"unet": student.network}, table, 2000)
    assert samples.mean() == pytest.approx(MEAN, abs=0.01)
    assert samples.std() == pytest.approx(
        SPREAD, rel=0.03
    )  # measured 0.018; that of the student before, 0.20
