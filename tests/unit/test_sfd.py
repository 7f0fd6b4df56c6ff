"""The identities of trajectory matching (SFD, SFD-v), on networks with closed forms and on a tiny UNet."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from edgedistill.config import build
from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Batch, Losses, LossFunction, OptimizerSettings, Step
from edgedistill.methods.sfd import (
    Course,
    SecondSettings,
    SfdSettings,
    feature_distance,
    plan,
    time_stamps,
    trajectory_loss,
)
from edgedistill.methods.states import trajectory
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import sample_torch
from edgedistill.prediction import SIGMA_DATA, PredictionType, x0_coefficients
from edgedistill.rows import analytic_row, ddim_row
from edgedistill.sampler import run_row
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, SamplerTable
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.loop import curve
from edgedistill.validate import validate

EDM = {"_class_name": "EDMEulerScheduler", "prediction_type": "edm"}
VP = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
MEAN, SPREAD = 0.3, 0.4
SHAPE = (1, 8, 8)
BATCH = 4
PLAIN = SfdSettings(inserted=0, solver="ddim", analytic_first=False)


class Gaussian(nn.Module):
    """EDM's F of data with one mean and one spread; a gain and a shift per row of the student can be trained."""

    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1}

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(2))
        self.shifts = nn.Parameter(torch.zeros(2))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        sigma = torch.exp(4 * timestep)[:, None, None, None]
        z = sample * torch.hypot(sigma, torch.tensor(SIGMA_DATA))
        x0 = (SPREAD**2 * z + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)
        a_z, a_r = x0_coefficients(PredictionType.EDM, torch.ones(1), sigma)
        row = (timestep < 0.25).long()  # of the two rows that call, at 10.9 and at 0.67
        parts = (self.gains[row], self.shifts[row])
        gain, shift = (part[:, None, None, None] for part in parts)
        return (x0 - a_z * z) / a_r + gain * sample + shift


def gaussian() -> Context:
    schedule, kind = Schedule.from_config(EDM), PredictionType.EDM
    teacher = Denoiser(Gaussian(), schedule, kind)
    return Context("sfd", teacher, Gaussian(), EDM, kind, SHAPE, (), clamp=None)


def tiny_unet() -> Context:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=4,
    ).eval()
    schedule, kind = Schedule.from_config(VP), PredictionType.V_PREDICTION
    classes = (Condition("class_labels", "class", 3),)
    teacher = Denoiser(unet, schedule, kind)
    return Context("sfd", teacher, unet, VP, kind, SHAPE, classes, null={"class_labels": 3})


def batch() -> Batch:
    labels = torch.arange(BATCH, dtype=torch.int32) % 3
    nothing = torch.empty(BATCH, *SHAPE)
    return Batch(nothing, {"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)})


def draw(*position: int) -> PositionDraw:
    return PositionDraw(0, position, Slice(BATCH, 0, BATCH), torch.device("cpu"))


def rows(loss: LossFunction, roles: dict[str, Any], *position: int) -> Iterator[Losses]:
    """Go through one iteration as the trainer does."""
    made = Losses({})
    index = 0
    while not made.done:
        made = loss(Step(roles, batch(), draw(*position, index), index, made.carry))
        yield made
        index += 1


def first_course(loss: LossFunction, roles: dict[str, Any]) -> Course:
    """The course of the first iteration."""
    course: Course = next(rows(loss, roles, 0)).carry.course
    return course


def prepared(settings: SfdSettings, context: Context) -> tuple[LossFunction, dict[str, Any], Any]:
    made = plan(settings, context)
    (update,) = made.phases[0].updates
    return update.loss, {role.name: role.module for role in made.roles}, made


@pytest.mark.parametrize("counts", [(4,), (4, 5, 6, 7)])
def test_the_untrained_student_follows_its_own_trajectory_without_a_loss(
    counts: tuple[int, ...],
) -> None:
    settings = dataclasses.replace(PLAIN, stamps=counts)
    loss, roles, _ = prepared(settings, tiny_unet())
    for iteration in range(6):
        made = list(rows(loss, roles, iteration))
        assert len(made) + 1 in counts
        assert all(value.item() == 0 for item in made for value in item.terms.values())
    finer, roles, _ = prepared(dataclasses.replace(settings, inserted=1), tiny_unet())
    assert all(item.terms[f"row {i}"] > 0 for i, item in enumerate(rows(finer, roles, 0)))


@pytest.mark.parametrize("config", [EDM, VP], ids=["edm", "vp"])
@pytest.mark.parametrize("change", [{}, {"end": "data"}, {"grid": "trailing"}], ids=str)
def test_the_students_stamps_are_some_of_the_teachers(
    config: dict[str, Any], change: dict[str, Any]
) -> None:
    schedule, settings = Schedule.from_config(config), SfdSettings(**change)
    for count in range(3, 8):
        finer = time_stamps(settings, schedule, 4 * (count - 1) + 1)
        assert finer[::4] == time_stamps(settings, schedule, count)
        assert (finer[-1] == -1) == bool(change)


def test_the_stamps_are_those_of_the_paper() -> None:
    schedule = Schedule.from_config(EDM)
    wanted = {3: [80, 3.107, 0.006], 4: [80, 10.929, 0.6699, 0.006]}
    wanted[7] = [80, 31.73, 10.93, 3.107, 0.670, 0.0936, 0.006]
    for count, levels in wanted.items():
        found = schedule.sigmas[list(time_stamps(SfdSettings(), schedule, count))]
        np.testing.assert_allclose(found, levels, rtol=0.01)


def test_a_schedule_that_reaches_less_far_gives_its_own_ends() -> None:
    latent = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    latent |= {"beta_start": 0.00085, "beta_end": 0.012}
    found = time_stamps(SfdSettings(), Schedule.from_config(latent), 4)
    assert (found[0], found[-1]) == (999, 0)


def test_noise_of_another_scale_than_the_first_stamps_is_refused() -> None:
    with pytest.raises(ConfigError, match="scale 39.95.*scale 80"):
        plan(SfdSettings(sigma_max=40.0), gaussian())


def exact(z: Tensor, t: float, s: float) -> Tensor:
    """The probability flow of Gaussian data, in closed form."""
    return MEAN + (z - MEAN) * math.sqrt((SPREAD**2 + s**2) / (SPREAD**2 + t**2))


def test_a_higher_order_of_the_teachers_solver_comes_nearer_to_the_flow() -> None:
    context = gaussian()
    noise = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    errors = []
    for solver in ("ddim", "dpmpp2m", "dpmpp3m"):
        loss, roles, _ = prepared(SfdSettings(solver=solver, inserted=7), context)
        course = first_course(loss, roles)
        end = trajectory(context.teacher, course.teacher, noise, batch())[-1]
        t, s = (context.schedule.sigmas[i] for i in (999, course.teacher.rows[-1].note["s"]))
        errors.append((end - exact(80 * noise, t, s)).abs().mean().item())
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[2] < 2e-3


def test_an_overfitted_student_ends_where_its_teacher_ends() -> None:
    loss, roles, made = prepared(SfdSettings(), gaussian())
    parameters = list(roles["student"].network.parameters())
    optimizer = torch.optim.Adam(parameters)
    for iteration in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.93**iteration
        for item in rows(loss, roles, 0):
            optimizer.zero_grad()
            if item.terms:
                sum(item.terms.values()).backward()
                optimizer.step()
    *_, last = rows(loss, roles, 0)
    assert last.terms["row 2"] / math.prod(SHAPE) < 1e-3
    # And the table that is emitted makes the same of the same noise.
    table = made.phases[0].emits.table
    noise = [draw(0, 0).normal(*SHAPE).numpy()]
    sampled = sample_torch({"unet": roles["student"].network}, table, BATCH, noise=noise)
    np.testing.assert_allclose(sampled, last.carry.z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [EDM, VP], ids=["edm", "vp"])
def test_the_analytic_row_is_that_of_a_network_whose_eps_is_the_state(
    config: dict[str, Any],
) -> None:
    schedule = Schedule.from_config(config)
    t, s = time_stamps(SfdSettings(), schedule, 4)[:2]
    alpha, sigma = schedule.alpha_sigma(t)
    z = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0)).double()

    def network(given: Any) -> dict[str, Tensor]:
        state = given["sample"]
        return {"out_sample": (state - sigma * state / math.hypot(alpha, sigma)) / alpha}

    called = ddim_row(schedule, t, s, "sample")
    called = dataclasses.replace(called, in_scale=1.0)
    free = analytic_row(schedule, t, s)
    table = gaussian().table((called,))
    by_network, by_none = (
        run_row(table, row, {"unet": network}, z, (), {}).next for row in (called, free)
    )
    torch.testing.assert_close(by_none, by_network, rtol=0, atol=1e-9)


def test_evaluations_are_two_less_than_stamps_and_one_less_without_the_analytic_row() -> None:
    for first, fewer in ((True, 2), (False, 1)):
        settings = SfdSettings(stamps=(4, 5, 6, 7), analytic_first=first)
        emits = plan(settings, tiny_unet()).phases[0].emits
        assert emits is not None
        tables = [emits.table, *emits.samplers.values()]
        assert [table.nfe for table in tables] == [n - fewer for n in (4, 5, 6, 7)]
        assert list(emits.samplers) == [f"{n - fewer}-evaluations" for n in (5, 6, 7)]


def variable() -> tuple[nn.Module, SamplerTable]:
    """A student of several samplers whose step input has learned something, and its default table."""
    context = tiny_unet()
    _, roles, made = prepared(SfdSettings(stamps=(4, 7), guidance_scale=1.5), context)
    network = roles["student"].network
    nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.1)
    return network, made.phases[0].emits.table


def told(table: SamplerTable, step: float) -> SamplerTable:
    """The same table, with every row that calls told another number of stamps, in numbers and notes."""
    changed = [
        dataclasses.replace(
            row, feeds={**row.feeds, "step": step}, note={**row.note, "feeds": {"step": step}}
        )
        if row.call
        else row
        for row in table.rows
    ]
    stage = dataclasses.replace(table.stages[0], rows=tuple(changed))
    return dataclasses.replace(table, stages=(stage,))


def test_the_step_condition_moves_the_output_and_belongs_to_the_number_of_stamps() -> None:
    network, table = variable()
    other = told(table, 5.0)
    a, b = (sample_torch({"unet": network}, item, 3) for item in (table, other))
    assert np.abs(a - b).max() > 1e-3
    assert np.array_equal(a, sample_torch({"unet": network}, told(table, 4.0), 3))
    assert validate(table) == []
    assert any("told of 5 time stamps" in problem for problem in validate(other))


def test_the_tables_of_every_stage_are_what_their_annotations_say() -> None:
    settings = SfdSettings(stamps=(4, 7), guidance_scale=1.5, second=SecondSettings())
    for context, change in ((tiny_unet(), settings), (gaussian(), SfdSettings())):
        for phase in plan(change, context).phases:
            assert phase.emits is not None
            for table in (phase.emits.table, *phase.emits.samplers.values()):
                assert validate(table) == []


def test_gradients_stay_in_the_student_and_inside_of_a_row() -> None:
    loss, roles, _ = prepared(SfdSettings(stamps=(5,)), tiny_unet())
    for index, item in enumerate(rows(loss, roles, 0)):
        assert not item.carry.z.requires_grad
        assert not any(target.requires_grad for target in item.carry.targets)
        if index == 0:
            assert not item.terms
            continue
        sum(item.terms.values()).backward()
        grads = [p.grad for p in roles["student"].network.parameters()]
        assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0
        assert all(p.grad is None for p in roles["teacher"].network.parameters())
        roles["student"].zero_grad()


def test_the_loss_of_a_row_is_the_l1_distance_to_the_teachers_state_at_its_stamp() -> None:
    context = tiny_unet()
    loss, roles, _ = prepared(SfdSettings(guidance_scale=1.5), context)
    course = first_course(loss, roles)
    noise = draw(0, 0).normal(*SHAPE)
    states = trajectory(context.teacher, course.teacher, noise, batch())
    assert (len(states), course.teacher.nfe) == (12, 24)
    for index, item in enumerate(rows(loss, roles, 0)):
        wanted = states[4 * (index + 1) - 1]
        distance = (item.carry.z - wanted).abs().flatten(1).sum(1).mean()
        if item.terms:
            torch.testing.assert_close(item.terms[f"row {index}"].detach(), distance)


def test_an_iteration_keeps_to_one_number_of_stamps_and_all_of_them_come_up() -> None:
    loss, roles, made = prepared(SfdSettings(stamps=(4, 5, 6, 7), inserted=0), tiny_unet())
    assert made.phases[0].updates[0].unroll == 6
    seen = set()
    for iteration in range(30):
        made_rows = list(rows(loss, roles, iteration))
        assert len({id(item.carry.course) for item in made_rows}) == 1
        seen.add(len(made_rows) + 1)
    assert seen == {4, 5, 6, 7}


def test_the_second_stage_follows_the_first_stages_student_along_its_own_rows() -> None:
    settings = SfdSettings(stamps=(4, 7), guidance_scale=1.5, second=SecondSettings(3))
    _, roles, made = prepared(settings, tiny_unet())
    main, second = made.phases
    loss = second.updates[0].loss
    course = first_course(loss, roles)
    assert second.copies == (("student", "first"),)
    assert course.teacher == main.emits.samplers["5-evaluations"]
    assert second.emits.table.nfe == 1
    labels = [row.note["t"] for row in course.teacher.rows]
    assert [row.note["t"] for row in course.student.rows] == labels[::3]
    assert course.student.rows[-1].feeds["step"] == 3
    *_, last = rows(loss, roles, 0)
    states = trajectory(roles["first"], course.teacher, draw(0, 0).normal(*SHAPE), batch())
    assert all(map(torch.equal, last.carry.targets, states[2::3]))


def test_the_perceptual_distance_is_zero_on_equal_images_and_moves_the_made_ones_alone() -> None:
    teacher = tiny_unet().teacher
    made, target = (draw(0, i).normal(*SHAPE).requires_grad_() for i in range(2))
    conditions = batch().conditions
    assert feature_distance(teacher, made, made, conditions) == 0
    feature_distance(teacher, made, target, conditions).backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
    assert target.grad is None
    plain, roles, _ = prepared(PLAIN, tiny_unet())
    loss = trajectory_loss([first_course(plain, roles)], "teacher", features=2.0)
    *others, last = rows(loss, roles, 0)
    assert [list(item.terms) for item in others] == [["row 0"], ["row 1"]]
    assert list(last.terms) == ["row 2", "features"]


def test_the_rate_falls_to_a_tenth_after_half_of_the_phase() -> None:
    settings = OptimizerSettings(decay="step")
    assert [curve(settings, i, 10) for i in (0, 4, 5, 9)] == [1.0, 1.0, 0.1, 0.1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stamps": [2]}, "`stamps` must be different numbers of at least 3"),
        ({"stamps": [4, 4]}, "`stamps` must be different"),
        ({"stamps": []}, "`stamps` must be different"),
        ({"inserted": -1}, "`inserted` must not be negative"),
        ({"solver": "heun"}, "`solver` must be one of dpmpp3m, dpmpp2m, ddim"),
        ({"stamps": [4], "second": {}}, "second stage needs a student of 7 stamps"),
    ],
)
def test_settings_that_make_no_method_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SfdSettings, data, "recipe")


def test_guidance_needs_a_teacher_with_a_null_condition() -> None:
    with pytest.raises(ConfigError, match="no null condition"):
        plan(SfdSettings(guidance_scale=1.5), gaussian())


def test_a_student_that_predicts_epsilon_is_not_called_where_x_is_lost() -> None:
    eps = dataclasses.replace(tiny_unet(), prediction_type=PredictionType.EPSILON)
    assert plan(SfdSettings(), eps).phases
    with pytest.raises(ConfigError, match="x0 is lost in rounding"):
        plan(SfdSettings(analytic_first=False), eps)
