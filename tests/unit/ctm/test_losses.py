"""Consistency trajectory models: times, targets, and the consistency and denoising losses on Gaussian data."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.errors import ConfigError
from edgedistill.methods import ctm
from edgedistill.methods.jumps import jump
from edgedistill.methods.targets import cfg_combine, ddim_step
from edgedistill.models.denoiser import Denoiser


@pytest.mark.parametrize(("kind", "power"), [("weighted", 1), ("uniform", 0), ("global", 1)])
def test_times_are_drawn_as_the_code_draws_them(gaussian, kind: Any, power: int) -> None:
    settings = dataclasses.replace(gaussian.settings, steps_drawn=kind, most_steps=5)
    counts, ends = np.zeros(5), []
    for index in range(3000):
        times = ctm.draw_times(settings, gaussian.draw(8, index))
        counts[times.steps - 1] += 1
        u = times.t + times.steps
        assert times.t.min() >= 0
        assert (u <= times.s).all()
        assert times.s.max() <= settings.grid.points - 1
        assert kind != "global" or torch.equal(u, times.s)
        if times.steps == 2:
            ends += times.s[times.t == 4].tolist()
    wanted = np.arange(1, 6) ** power
    assert np.abs(counts / 3000 - wanted / wanted.sum()).max() < 0.03
    if kind != "global":
        shares = np.bincount(ends, minlength=settings.grid.points)[6:] / len(ends)
        assert np.abs(shares - 1 / 3).max() < 0.08


def test_gradients_reach_the_student_alone(gaussian) -> None:
    plan = ctm.plan(gaussian.settings, gaussian.context())
    step = gaussian.step(plan)
    z = 3 * gaussian.noise(1)
    t, s = torch.full((6,), 900), torch.full((6,), 300)
    ctm.image_of(step, z, t, s).square().sum().backward()
    assert gaussian.reached(step) == ["student"]
    points = torch.tensor(gaussian.settings.grid.labels(step.roles["student"].schedule))
    target = ctm.target_of(gaussian.settings, points, ctm.Times(t * 0, t * 0 + 5, 3), step, z)
    assert not target.requires_grad


def test_the_target_of_a_whole_path_is_where_the_teacher_ends_and_the_average_jumps_on(
    gaussian,
) -> None:
    settings = dataclasses.replace(gaussian.settings, guidance_scale=1.5, solver="ddim")
    context = gaussian.context()
    step = gaussian.step(ctm.plan(settings, context))
    d, given = context.teacher, step.batch.conditions
    labels = settings.grid.labels(context.schedule)
    times = ctm.Times(torch.full((6,), 1), torch.full((6,), 4), 3)
    made = ctm.target_of(settings, torch.tensor(labels), times, step, gaussian.noise(2))
    state = gaussian.noise(2)
    for t, s in itertools.pairwise(torch.tensor(labels[1:5])[:, None].expand(-1, 6)):
        guided = cfg_combine(
            d.x0(state, t, given), d.x0(state, t, step.batch.null), torch.full((6,), 0.5)
        )
        state = ddim_step(d, state, guided, t, s)
    end = torch.zeros(6, dtype=torch.long)
    wanted = jump(step.roles["average"], state, torch.full((6,), labels[4]), end, given)
    assert torch.equal(made, wanted)


def test_a_student_that_learns_from_itself_never_asks_the_teacher(gaussian) -> None:
    settings = dataclasses.replace(gaussian.settings, self_learn=True)
    context = gaussian.context()
    step = gaussian.step(ctm.plan(settings, context))
    points = torch.tensor(settings.grid.labels(context.schedule))
    places = torch.zeros(6, dtype=torch.long)
    made = ctm.target_of(
        settings, points, ctm.Times(places, places + 4, 3), step, gaussian.noise(2)
    )
    assert context.teacher.network.seen == []
    asked = ctm.target_of(
        gaussian.settings, points, ctm.Times(places, places + 4, 3), step, gaussian.noise(2)
    )
    assert len(context.teacher.network.seen) == 6  # twice for each of Heun's steps
    # Untrained, the student is its teacher.
    torch.testing.assert_close(made, asked)


def test_the_denoising_loss_moves_only_the_jumps_of_no_length(gaussian) -> None:
    plan = ctm.plan(dataclasses.replace(gaussian.settings, adversarial=None), gaussian.context())
    step = gaussian.step(plan, 512)
    student = step.roles["student"].network
    losses = plan.phases[0].updates[0].loss(step)
    t, s, _ = student.seen[-1]
    assert torch.equal(t, s)
    losses.terms["denoising"].backward()
    moved = student.jumps.grad
    assert moved.abs().sum() > 0
    assert torch.equal(moved, torch.diag_embed(moved.diagonal(dim1=1, dim2=2)))


@pytest.mark.parametrize(("guidance_scale", "shift"), [(1.0, 0.0), (1.5, -0.2)])
def test_the_denoising_loss_is_least_at_the_denoiser_which_is_guided_where_the_teacher_is(
    gaussian, guidance_scale: float, shift: float
) -> None:
    context = gaussian.context()
    settings = dataclasses.replace(
        gaussian.settings, guidance_scale=guidance_scale, adversarial=None
    )
    plan = ctm.plan(settings, context)
    slopes = []
    for offset in (-0.05, 0.05):
        network = gaussian.told(context.schedule)
        torch.nn.init.constant_(network.mean, gaussian.mean + shift + offset)
        student = Denoiser(network, context.schedule, context.prediction_type)
        step = gaussian.step(plan, 4096)
        roles = {**step.roles, "student": student, "average": student}
        terms = plan.phases[0].updates[0].loss(dataclasses.replace(step, roles=roles)).terms
        slopes += torch.autograd.grad(terms["denoising"], network.mean)
    assert slopes[0] < 0 < slopes[1]


def test_levels_of_the_denoising_loss(gaussian) -> None:
    schedule = gaussian.context({"_class_name": "EDMEulerScheduler"}).schedule
    one_kind = dataclasses.replace(gaussian.settings.denoising, share=1.0)
    settings = dataclasses.replace(gaussian.settings, denoising=one_kind)
    logarithms = ctm.denoising_levels(settings, schedule, gaussian.draw(20000)).log()
    assert abs(logarithms.mean() + 1.2) < 0.03
    assert abs(logarithms.std() - 1.2) < 0.03
    other = dataclasses.replace(
        gaussian.settings, denoising=dataclasses.replace(one_kind, share=0.0)
    )
    levels = ctm.denoising_levels(other, schedule, gaussian.draw(20000))
    lowest = (80 ** (1 / 7) + 0.7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert levels.max() == pytest.approx(80, rel=1e-2)
    assert levels.min() == pytest.approx(lowest, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"most_steps": 9}, "`most_steps` must lie in"),
        ({"steps": (1, 1)}, "`steps` must be different"),
        ({"self_learn": True, "guidance_scale": 2.0}, "no guidance to learn"),
    ],
)
def test_impossible_settings_are_refused(gaussian, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(gaussian.settings, **changes)
