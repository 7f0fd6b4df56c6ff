"""DMD2's critic: its pace, what it sees, what leaks into it, and the head that tells images apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgedistill.errors import ConfigError, ContractError
from edgedistill.methods import dmd2
from edgedistill.methods.losses import prediction_mse
from edgedistill.methods.plan import Losses, Step
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.unet import build_stock
from edgedistill.training.loop import Trainer


def test_a_fake_score_that_is_the_teacher_leaves_no_gradient_but_the_gan_s(gaussian) -> None:
    stage = dmd2.StageSettings(1, gaussian.adam, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(gaussian.settings(match=stage), gaussian.context())
    step = gaussian.step(plan)
    update = plan.phases[0].updates[0]
    terms = update.loss(step).terms
    assert terms["matching"].item() == 0
    student = list(step.roles["student"].parameters())
    gradients = torch.autograd.grad(terms["matching"], student, retain_graph=True)
    assert all(float(g.abs().max()) == 0 for g in gradients)
    gradients = torch.autograd.grad(terms["gan"], student, allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) > 1e-6


def test_the_critic_takes_k_steps_for_each_of_the_student_and_nothing_else_moves(
    gaussian,
    tmp_path: Path,
) -> None:
    stage = dmd2.StageSettings(15, gaussian.adam, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(gaussian.settings(match=stage), gaussian.context())
    before = {role.name: [p.clone() for p in role.network.parameters()] for role in plan.roles}
    trainer = gaussian.run(plan, tmp_path)
    counts = {
        name: {int(state["step"]) for state in optimizer.state_dict()["state"].values()}
        for name, optimizer in trainer._optimizers.items()
    }
    assert counts == {"student": {3}, "critic": {15}}
    moved = {
        role.name: [
            not torch.equal(p, old)
            for p, old in zip(role.network.parameters(), before[role.name], strict=True)
        ]
        for role in plan.roles
    }
    assert not any(moved["teacher"])
    assert all(any(moved[name]) for name in ("student", "fake", "head"))


def test_what_leaks_into_the_critic_is_dropped_and_it_sees_the_images_made_before_the_step(
    gaussian,
) -> None:
    stage = dmd2.StageSettings(1, gaussian.adam, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(gaussian.settings(match=stage), gaussian.context())
    student, critic = plan.phases[0].updates
    assert student.zero_also == critic.roles == ("fake", "head")
    step = gaussian.step(plan)
    student.loss(step)
    images = step.memo[dmd2.IMAGES]
    assert not images.requires_grad
    for parameter in step.roles["student"].parameters():
        parameter.data.add_(1.0)
    given = gaussian.step(plan, memo={dmd2.IMAGES: images}, place="critic")
    other = gaussian.step(plan, place="critic", memo={dmd2.IMAGES: images + 1})
    fresh = gaussian.step(plan, place="critic")
    found = [critic.loss(item).terms["denoising"].item() for item in (given, other, fresh)]
    assert len({round(value, 6) for value in found}) == 3


class Watched(Trainer):
    """Remembers, after each update, its name and which of the critic's parts hold gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.left: list[tuple[str, list[str]]] = []

    def _run_update(self, phase: Any, place: Any, update: Any, memos: Any) -> dict[str, Tensor]:
        made = super()._run_update(phase, place, update, memos)
        held = [
            name
            for name in ("fake", "head")
            if any(p.grad is not None for p in self.roles[name].network.parameters())
        ]
        self.left.append((update.name, held))
        return made


@pytest.mark.parametrize("dropped", [True, False])
def test_in_the_loop_the_critic_gets_the_student_s_images_and_no_gradient_of_its_loss(
    gaussian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: bool
) -> None:
    stage = dmd2.StageSettings(7, gaussian.adam, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(gaussian.settings(match=stage, student_every=3), gaussian.context())
    (phase,) = plan.phases
    student, critic = phase.updates
    stored: list[Tensor] = []
    learnt: list[Tensor] = []  # what the fake score's error is measured to

    def of_student(step: Step) -> Losses:
        made = student.loss(step)
        stored.append(step.memo[dmd2.IMAGES])
        return made

    def error(fake: Denoiser, x0: Tensor, images: Tensor, t: Tensor) -> Tensor:
        learnt.append(images)
        return prediction_mse(fake, x0, images, t)

    monkeypatch.setattr(dmd2, "prediction_mse", error)
    zeroed = student.zero_also if dropped else ()
    updates = (replace(student, loss=of_student, zero_also=zeroed), critic)
    watched = replace(plan, phases=(replace(phase, updates=updates),))
    trainer = gaussian.run(watched, tmp_path, kind=Watched)
    given = [any(images is own for own in stored) for images in learnt]
    assert given == [True, False, False] * 2 + [True]
    assert all(own is got for own, got in zip(stored, learnt[::3], strict=True))
    after = [held for name, held in trainer.left if name == "student"]
    # Without `zero_also` the GAN's gradients would stay in both.
    assert after == [[] if dropped else ["fake", "head"]] * 3


def test_the_head_fits_the_middle_of_its_network_and_nothing_else(gaussian) -> None:
    method = dmd2.Distillation(gaussian.settings(), gaussian.context())
    head, fake = method.head(), gaussian.context().teacher
    z, t = torch.zeros(3, *gaussian.shape), torch.zeros(3, dtype=torch.int64)
    _, features = fake.tapped(z, t, {"class_labels": torch.zeros(3, dtype=torch.int32)})
    assert head.shape == tuple(features.shape[1:]) == (16, 4, 4)
    assert head(features).shape == (3,)
    with pytest.raises(ContractError, match=r"made for features of \(16, 4, 4\), got \(16, 2, 2\)"):
        head(features[..., :2, :2])
    cut = build_stock({**gaussian.unet, "mid_block_type": None})
    with pytest.raises(ConfigError, match="without a middle block has no features to tap"):
        dmd2.plan(gaussian.settings(), gaussian.context(cut))
