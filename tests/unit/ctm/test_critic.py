"""Consistency trajectory models: the critic, what it sees, its two sides, and the balance of the losses."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from edgedistill.errors import ConfigError
from edgedistill.methods import ctm, losses
from edgedistill.methods.context import Context
from edgedistill.methods.jumps import GridSettings
from edgedistill.methods.losses import balance, critic_loss, distance, fooling_loss
from edgedistill.methods.plan import Batch
from edgedistill.models.critic import Critic
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.table import Condition

COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}


def test_balanced_losses_move_the_last_layer_alike() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    x = torch.tensor([3.0, 4.0])
    leader, term = (weight @ x).sum(), 100 * (weight @ (2 * x)).sum()
    assert balance(leader, term, weight, (0.0, 1e4)).item() == pytest.approx(1 / 200)
    assert balance(leader, term, weight, (0.01, 10.0)).item() == pytest.approx(0.01)
    assert balance(term, leader, weight, (0.01, 10.0)).item() == 10.0


def test_losses_are_not_balanced_on_a_layer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "DTensor", nn.Parameter)
    one = torch.ones(())
    with pytest.raises(ConfigError, match="configure accelerate for MULTI_GPU"):
        balance(one, one, nn.Parameter(one), (0.0, 1.0))


def test_distances_and_the_two_sides_of_a_critic(gaussian) -> None:
    a, b = gaussian.noise(0), gaussian.noise(1)
    assert distance(a, b, "l2").item() == pytest.approx(((a - b) ** 2).mean().item())
    far = distance(1e3 * a, 1e3 * b, "pseudo_huber").item()
    assert far == pytest.approx(1e3 * (a - b).flatten(1).norm(dim=1).mean().item() / 16, rel=1e-3)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert critic_loss(real, fake, "hinge").item() == pytest.approx(0.25 + 0.5)
    assert fooling_loss(fake, "hinge").item() == 1.5
    undecided = critic_loss(0 * real, 0 * fake, "non_saturating").item()
    assert undecided == pytest.approx(2 * math.log(2))


def test_a_critic_scores_images_by_their_class_and_is_made_of_its_seed(gaussian) -> None:
    images, labels = gaussian.noise(0), torch.tensor([0, 1, 2, 0, 1, 2])
    critic, again = (Critic(1, 4, 3, width=4, seed=5) for _ in range(2))
    assert torch.equal(critic(images, labels), again(images, labels))
    assert not torch.equal(critic(images, labels), critic(images, labels.flip(0)))
    assert critic(images, labels).shape == (6,)


def test_the_critic_takes_turns_with_the_student_and_the_average_is_what_comes_out(
    gaussian, tmp_path: Path
) -> None:
    plan = ctm.plan(gaussian.settings, gaussian.context())
    assert [phase.name for phase in plan.phases] == ["consistency", "adversarial"]
    assert [(u.name, u.every, u.offset) for u in plan.phases[1].updates] == [
        ("student", 2, 0),
        ("critic", 2, 1),
    ]
    critic = plan.roles[-1].module
    before = [p.clone() for p in critic.parameters()]
    emitted = gaussian.train(plan, tmp_path, batch_size=8)
    assert not all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))
    average = {role.name: role.network for role in plan.roles}["average"]
    assert torch.equal(emitted["adversarial"]["jumps"], average.jumps)
    assert not torch.equal(emitted["adversarial"]["jumps"], emitted["consistency"]["jumps"])


def test_a_critic_may_see_the_features_of_the_teacher(gaussian, stock) -> None:
    against = dataclasses.replace(gaussian.settings.adversarial, critic="teacher", noise=0.3)
    settings = dataclasses.replace(gaussian.settings, adversarial=against)
    kind, schedule = PredictionType("v_prediction"), Schedule.from_config(COSINE)
    teacher = Denoiser(stock, schedule, kind)
    classes = (Condition("class_labels", "class", 4),)
    base = copy.deepcopy(stock)
    context = Context("ctm", teacher, base, COSINE, kind, (1, 8, 8), classes, {"class_labels": 4})
    settings = dataclasses.replace(
        settings, grid=GridSettings("trailing", settings.grid.points), solver="dpm"
    )
    plan = ctm.plan(settings, context)
    labels = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    batch = Batch(
        torch.randn(4, 1, 8, 8), {"class_labels": labels}, {"class_labels": 0 * labels + 4}
    )
    step = gaussian.step(plan, 4, batch)
    terms = plan.phases[1].updates[0].loss(step).terms
    terms["adversarial"].backward()
    reached = gaussian.reached(step)
    assert "student" in reached
    assert "teacher" not in reached


def test_it_sees_features_of_images_at_labels_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"`critic: teacher`, a share of labels, not above 1, got 1\.5"
    ):
        ctm.AdversarialSettings(noise=1.5)
    with pytest.raises(ConfigError, match="`noise` must not be negative"):
        ctm.AdversarialSettings(critic="pixels", noise=-0.5)
    assert ctm.AdversarialSettings(critic="pixels", noise=1.5).noise == 1.5
