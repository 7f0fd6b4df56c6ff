"""DMD2's students: backward simulation, their tables, the pairs that warm them up, and those that cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods import dmd2
from edgedistill.methods.plan import Stretch
from edgedistill.models.run import torch_networks
from edgedistill.sampler import run_table
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.validate import validate


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_backward_simulation_comes_to_the_states_of_the_sampler(gaussian, row: int) -> None:
    labels = (999, 749, 499, 249)
    plan = dmd2.plan(gaussian.settings(labels=labels), gaussian.context())
    table = plan.phases[0].emits.table
    student = plan.roles[-1].module
    batch = gaussian.data.first(4)
    draw = torch.Generator().manual_seed(1)
    noises = [torch.randn(4, *gaussian.shape, generator=draw) for _ in labels]
    traces: list[Any] = []
    networks = torch_networks({"unet": student.network})
    run_table(table, networks, noises, batch.conditions, traces.append)
    made = dmd2.evaluate(table, student, noises[: row + 1], batch)
    assert torch.equal(made.detach(), traces[row].x0)
    # The state as the paper says it: pure noise, then the last x0 with fresh noise at the next label.
    z = noises[0]
    if row:
        alpha, sigma = gaussian.schedule.alpha_sigma(labels[row])
        z = alpha * traces[row - 1].x0 + sigma * noises[row]
    torch.testing.assert_close(traces[row].state, z, rtol=0, atol=1e-6)
    # Only the last call has gradients.
    t = torch.full((4,), labels[row])
    alone = student.x0(z, t, batch.conditions)
    torch.testing.assert_close(made, alone, rtol=0, atol=1e-5)
    pairs = [
        torch.autograd.grad(x.square().sum(), list(student.parameters()), allow_unused=True)
        for x in (made, alone)
    ]
    for a, b in zip(*pairs, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_every_evaluation_is_trained_and_all_of_a_batch_the_same_one(gaussian) -> None:
    plan = dmd2.plan(gaussian.settings(labels=(999, 749, 499, 249)), gaussian.context())
    table, student = plan.phases[0].emits.table, plan.roles[-1].module
    told: list[Tensor] = []
    student.network.register_forward_pre_hook(
        lambda *call: told.append(call[2]["timestep"]), with_kwargs=True
    )
    last = []
    for place in range(40):
        told.clear()
        with torch.no_grad():
            dmd2.generate(table, student, gaussian.step(plan, 2, f"{place}"))
        assert all(float(t.min()) == float(t.max()) for t in told)
        assert [float(t[0]) for t in told] == [999, 749, 499, 249][: len(told)]
        last.append(len(told))
    assert {*last} == {1, 2, 3, 4}


def test_the_tables_are_those_of_their_notes_and_pure_noise_may_have_any_label(gaussian) -> None:
    for labels in ((999,), (399,), (999, 749, 499, 249)):
        table = dmd2.student_table(
            gaussian.settings(labels=labels, guidance_scale=1.5), gaussian.context()
        )
        assert validate(table) == []
        assert table.nfe == table.noise_count == len(labels)
        assert [row.feeds["timestep"] for row in table.rows] == list(labels)
        assert table.stages[0].init_noise == (1.0, 0)
        assert table.guidance.mode == "baked"
        assert table.guidance.default == 1.5
        assert (table.rows[-1].next.x0, table.rows[-1].noise) == (1.0, None)


def test_pairs_are_the_teacher_s_samples_whenever_they_are_made(gaussian, tmp_path: Path) -> None:
    chosen = gaussian.settings(
        warm_up=Stretch(2, gaussian.adam), pairs=dmd2.PairSettings(70, 3), guidance_scale=1.5
    )
    method, teacher = dmd2.Distillation(chosen, gaussian.context()), gaussian.context().teacher
    for place in ("first", "second"):
        draw = PositionDraw(0, (place,), Slice(8, 0, 8), torch.device("cpu"))
        noise, batch = method.pairs.sample(teacher, draw)
    # A resumed run makes the pairs at another step, and finds the same ones.
    draw = PositionDraw(0, ("second",), Slice(8, 0, 8), torch.device("cpu"))
    resumed = dmd2.Distillation(chosen, gaussian.context()).pairs.sample(teacher, draw)
    assert torch.equal(noise, resumed[0])
    assert torch.equal(batch.x, resumed[1].x)
    z = noise
    for t, s in ((999, 666), (666, 332), (332, -1)):
        time = torch.full((8,), t)
        x0 = 1.5 * teacher.x0(z, time, batch.conditions) - 0.5 * teacher.x0(z, time, batch.null)
        alpha, sigma = gaussian.schedule.alpha_sigma(t)
        after = gaussian.schedule.alpha_sigma(s)
        z = (after[0] * x0 + after[1] * (z - alpha * x0) / sigma).detach()
    torch.testing.assert_close(batch.x, z, rtol=0, atol=1e-4)
    plan = dmd2.plan(chosen, gaussian.context())
    assert [phase.name for phase in plan.phases] == ["warm-up", "match"]
    gaussian.run(plan, tmp_path)


def test_regression_trains_every_evaluation_on_the_teacher_s_samples(gaussian) -> None:
    chosen = gaussian.settings(
        labels=(999, 499), warm_up=Stretch(2, gaussian.adam), pairs=dmd2.PairSettings(70, 3)
    )
    plan = dmd2.plan(chosen, gaussian.context())
    student, loss = plan.roles[-1].module, plan.phases[0].updates[0].loss
    seen: list[tuple[float, Tensor]] = []
    student.network.register_forward_pre_hook(
        lambda *call: seen.append((call[2]["timestep"][0].item(), call[2]["sample"])),
        with_kwargs=True,
    )
    pairs = dmd2.Distillation(chosen, gaussian.context()).pairs
    alpha, sigma = gaussian.schedule.alpha_sigma(499)
    for place in range(8):
        loss(gaussian.step(plan, 64, f"{place}"))
        draw = PositionDraw(0, (f"{place}",), Slice(64, 0, 64), torch.device("cpu"))
        noise, batch = pairs.sample(gaussian.context().teacher, draw)
        label, z = seen[-1]
        fresh = noise if label == 999 else (z - alpha * batch.x) / sigma
        assert torch.equal(z, noise) == (label == 999)
        assert abs(fresh.mean().item()) < 0.06
        assert fresh.std().item() == pytest.approx(1.0, abs=0.05)
    assert {label for label, _ in seen} == {999, 499}


def test_students_that_cannot_be_are_refused(gaussian) -> None:
    with pytest.raises(ConfigError, match="cannot start where alpha is 4.9e-05"):
        dmd2.plan(gaussian.settings(), gaussian.context(kind="epsilon"))
    dmd2.plan(gaussian.settings(labels=(749,)), gaussian.context(kind="epsilon"))
    with pytest.raises(ConfigError, match="no null condition"):
        dmd2.plan(gaussian.settings(guidance_scale=2.0), gaussian.context(null={}))
    with pytest.raises(ConfigError, match=r"Timestep must lie in \[-1, 999\], got 1000"):
        dmd2.plan(gaussian.settings(labels=(1000,)), gaussian.context())
    with pytest.raises(ConfigError, match="one or more falling labels"):
        gaussian.settings(labels=(249, 499))
    with pytest.raises(ConfigError, match="One of `match` and `adversarial`"):
        gaussian.settings(match=None)
    with pytest.raises(ConfigError, match="`student_every` at least 1"):
        gaussian.settings(student_every=0)
    with pytest.raises(
        ConfigError, match="`student_gan` 0.1 would fool a head that `critic_gan` 0"
    ):
        dmd2.StageSettings(student_gan=0.1)
    with pytest.raises(ConfigError, match="must not be negative"):
        dmd2.StageSettings(critic_gan=-0.1)
    with pytest.raises(ConfigError, match="`iterations` must be at least 1"):
        dmd2.StageSettings(0)
    assert dmd2.StageSettings(critic_gan=0.1).has_gan
