"""Consistency trajectories: every term does what its name says, and what they cannot begin from is refused."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.methods import ctm
from edgedistill.methods.context import Context
from edgedistill.methods.jumps import GridSettings
from edgedistill.methods.plan import Batch, Plan, Step
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.inputs import scalar_embedding
from edgedistill.prediction import PredictionType
from edgedistill.schedule import Schedule
from edgedistill.table import Condition
from edgedistill.training.draw import PositionDraw, Slice

COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
EDM = {"_class_name": "EDMEulerScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SHAPE, COUNT = (1, 8, 8), 8
SETTINGS = ctm.CtmSettings(
    grid=GridSettings(points=9, sigma_max=80.0),
    solver="dpm",
    most_steps=8,
    adversarial=ctm.AdversarialSettings(4, critic="pixels", width=8),
)


@pytest.fixture
def context(stock: nn.Module) -> Callable[..., Context]:
    """Make what a method builds its plan from, for a schedule and a prediction."""

    def make(config: dict[str, Any] = COSINE, kind: str = "v_prediction") -> Context:
        predicted = PredictionType(kind)
        teacher = Denoiser(copy.deepcopy(stock), Schedule.from_config(config), predicted)
        classes = (Condition("class_labels", "class", 4),)
        return Context(
            "ctm", teacher, stock, config, predicted, SHAPE, classes, {"class_labels": 4}
        )

    return make


def noise(seed: int) -> Tensor:
    return torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(seed))


def steps_of(plan: Plan) -> tuple[Step, Step]:
    """Return one step twice, with the same draws."""
    for role in plan.roles:
        role.network.requires_grad_(role.trained)
    roles = {role.name: role.module for role in plan.roles}
    labels = torch.arange(COUNT, dtype=torch.int32) % 4
    batch = Batch(noise(0), {"class_labels": labels}, {"class_labels": 0 * labels + 4})
    first, again = (
        Step(roles, batch, PositionDraw(0, (), Slice(COUNT, 0, COUNT), torch.device("cpu")))
        for _ in range(2)
    )
    return first, again


def gradient(term: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(term, weight, retain_graph=True)[0]


def test_a_step_along_the_adversarial_term_makes_the_critic_take_more_for_data(context) -> None:
    plan = ctm.plan(SETTINGS, context())
    student, scores = plan.phases[1].updates[0], []
    step, again = steps_of(plan)
    step.roles["critic"].register_forward_hook(lambda *call: scores.append(call[2].mean().item()))
    student.loss(step).terms["adversarial"].backward()
    moved = [p for p in step.roles["student"].network.parameters() if p.grad is not None]
    length = torch.stack([p.grad.norm() for p in moved]).norm()
    torch.optim.SGD(moved, lr=1e-2 / length.item()).step()
    student.loss(again)
    before, after = scores
    assert after > before + 1e-5


def test_every_term_moves_the_last_layer_as_much_as_the_consistency_loss(
    context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bounds in ("DENOISING_BOUNDS", "ADVERSARIAL_BOUNDS"):
        monkeypatch.setattr(ctm, bounds, (0.0, 1e6))
    plan = ctm.plan(SETTINGS, context())
    step, _ = steps_of(plan)
    step.roles["critic"].score.weight.data *= 100  # so that the ratio's guard against 0 is small
    terms = plan.phases[1].updates[0].loss(step).terms
    last = step.roles["student"].last_layer
    norms = {name: gradient(term, last).norm().item() for name, term in terms.items()}
    assert set(norms) == {"consistency", "denoising", "adversarial"}
    assert norms["denoising"] == pytest.approx(norms["consistency"], rel=0.01)
    assert norms["adversarial"] == pytest.approx(norms["consistency"], rel=0.01)


def test_an_untrained_critic_is_undecided_and_its_loss_is_its_own(context) -> None:
    plan = ctm.plan(SETTINGS, context())
    step, _ = steps_of(plan)
    loss = plan.phases[1].updates[1].loss(step).terms["critic"]
    assert loss.item() == pytest.approx(2.0, abs=0.3)
    loss.backward()
    reached = [
        role.name
        for role in plan.roles
        if any(p.grad is not None for p in role.network.parameters())
    ]
    assert reached == ["critic"]


@pytest.mark.parametrize(("config", "kind"), [(ZERO_SNR, "v_prediction"), (FLOW, "flow")])
def test_targets_from_pure_noise_are_finite_and_heuns_rule_is_refused_there(
    context, config: dict[str, Any], kind: str
) -> None:
    made, settings = (
        context(config, kind),
        dataclasses.replace(SETTINGS, grid=GridSettings(points=9)),
    )
    points = torch.tensor(settings.grid.labels(made.schedule))
    assert made.schedule.alphas[points[0]] == 0
    step, _ = steps_of(ctm.plan(settings, made))
    places = torch.zeros(COUNT, dtype=torch.long)
    times = ctm.Times(places, places + 4, 3)
    assert torch.isfinite(ctm.target_of(settings, points, times, step, noise(1))).all()
    with pytest.raises(ConfigError, match="from label 999 to .* inf times .* set `solver: dpm`"):
        ctm.plan(dataclasses.replace(settings, solver="heun"), made)


def test_heuns_rule_needs_a_first_step_that_is_not_too_long(context) -> None:
    heun = dataclasses.replace(SETTINGS, solver="heun")
    assert ctm.plan(heun, context()).phases
    with pytest.raises(ConfigError, match="set `solver: dpm`"):
        ctm.plan(dataclasses.replace(heun, grid=GridSettings("trailing", 9)), context())


def test_a_grid_that_begins_below_the_first_noise_is_refused(context) -> None:
    grid = GridSettings(points=9, sigma_max=40.0)
    with pytest.raises(ConfigError, match=r"scale 39\.9.*scale 80\.01; raise `sigma_max`"):
        ctm.plan(dataclasses.replace(SETTINGS, grid=grid), context(EDM, "edm"))
    low = {**EDM, "sigma_max": 2.0}  # the schedule's own beginning is the best that there is
    assert ctm.plan(dataclasses.replace(SETTINGS, grid=GridSettings(points=9)), context(low, "edm"))


@pytest.mark.parametrize(
    ("config", "kind", "scale"),
    [(COSINE, "v_prediction", 1.0), (FLOW, "flow", 1.0), (EDM, "edm", 1000.0)],
)
def test_a_student_can_tell_the_times_of_its_grid_apart(
    context, config: dict[str, Any], kind: str, scale: float
) -> None:
    made = context(config, kind)
    assert made.student("s").network.config["scalar_inputs"] == {"s": scale}
    labels = list(SETTINGS.grid.labels(made.schedule))
    embedded = scalar_embedding(torch.tensor(made.schedule.feeds[labels]), scale)
    assert (embedded[1:] - embedded[:-1]).norm(dim=1).min() > 1
