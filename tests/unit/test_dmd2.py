"""DMD2 against closed forms: the gradient, the critic's pace, backward simulation, a Gaussian that is reached."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgedistill.errors import ConfigError, ContractError
from edgedistill.methods import dmd2
from edgedistill.methods.context import Context
from edgedistill.methods.losses import matching_loss, prediction_mse
from edgedistill.methods.plan import Batch, Losses, OptimizerSettings, Plan, Step, Stretch
from edgedistill.methods.targets import matching_gradient
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import torch_networks
from edgedistill.models.unet import build_stock
from edgedistill.prediction import PredictionType
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule
from edgedistill.table import Condition
from edgedistill.training.checkpoint import CheckpointFolder
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.logs import Unwatched
from edgedistill.training.loop import Trainer
from edgedistill.training.settings import TrainingSettings
from edgedistill.validate import validate

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
SCHEDULE = Schedule.from_config(CONFIG)
MEAN, SPREAD = 0.3, 0.5
SHAPE = (1, 8, 8)
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
    "num_class_embeds": 3,
}
ADAM = OptimizerSettings("adam", 1e-3, decay="constant")


def context(network: nn.Module | None = None, kind: str = "v_prediction", **fields: Any) -> Context:
    if network is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_stock(UNET).eval()
    prediction = PredictionType(kind)
    return Context(
        "dmd2",
        Denoiser(network, SCHEDULE, prediction),
        network,
        {**CONFIG, "prediction_type": kind},
        prediction,
        SHAPE,
        (Condition("class_labels", "class", 2),),
        **{"null": {"class_labels": 2}, "samples": Gaussians(), **fields},
    )


class Gaussians:
    """Data whose every number is Gaussian; two classes."""

    def __len__(self) -> int:
        return 1000

    def first(self, count: int) -> Batch:
        return self.batch(0, Slice(count, 0, count), torch.device("cpu"))

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        draw = PositionDraw(7, (start,), part, device)
        labels = draw.integers(0, 2).int()
        null = {"class_labels": torch.full_like(labels, 2)}
        return Batch(MEAN + SPREAD * draw.normal(*SHAPE), {"class_labels": labels}, null)


def settings(**changes: Any) -> dmd2.DMD2Settings:
    stage = dmd2.StageSettings(4, ADAM)
    return dmd2.DMD2Settings(
        **{
            "guidance_scale": 1.0,
            "student_every": 5,
            "match": stage,
            "adversarial": None,
            **changes,
        }
    )


def step_of(plan: Plan, batch: int = 8, place: str = "test", **fields: Any) -> Step:
    part = Slice(batch, 0, batch)
    roles = {role.name: role.module for role in plan.roles}
    draw = PositionDraw(0, (place,), part, torch.device("cpu"))
    return Step(roles, Gaussians().batch(0, part, torch.device("cpu")), draw, **fields)


def run(plan: Plan, folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> Any:
    trainer: Any = kind(
        plan,
        {"data": Gaussians()},
        TrainingSettings(**{"batch_size": 8, "clip_norm": None, **changes}),
        0,
        CheckpointFolder(folder, "print"),
        lambda *_: None,
        Unwatched(),
        Accelerator(),
    )
    trainer.run()
    return trainer


def test_a_fake_score_that_is_the_teacher_leaves_no_gradient_but_the_gan_s() -> None:
    stage = dmd2.StageSettings(1, ADAM, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(settings(match=stage), context())
    step = step_of(plan)
    update = plan.phases[0].updates[0]
    terms = update.loss(step).terms
    assert terms["matching"].item() == 0
    student = list(step.roles["student"].parameters())
    gradients = torch.autograd.grad(terms["matching"], student, retain_graph=True)
    assert all(float(g.abs().max()) == 0 for g in gradients)
    gradients = torch.autograd.grad(terms["gan"], student, allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) > 1e-6


def test_the_derivative_by_the_images_is_the_gradient_over_how_many_numbers_there_are() -> None:
    draw = torch.Generator().manual_seed(0)
    images, real, fake = (torch.randn(6, *SHAPE, generator=draw) for _ in range(3))
    images.requires_grad_()
    gradient = matching_gradient(images.detach(), real, fake)
    scale = (images - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, ((fake - real) / scale).detach(), rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(matching_loss(images, gradient), images)
    torch.testing.assert_close(found, gradient / images.numel(), rtol=0, atol=1e-9)


def test_a_perfect_image_has_no_gradient_rather_than_none() -> None:
    same = torch.ones(2, *SHAPE)
    assert torch.equal(matching_gradient(same, same, same + 1), torch.zeros_like(same))


def test_the_critic_takes_k_steps_for_each_of_the_student_and_nothing_else_moves(
    tmp_path: Path,
) -> None:
    stage = dmd2.StageSettings(15, ADAM, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(settings(match=stage), context())
    before = {role.name: [p.clone() for p in role.network.parameters()] for role in plan.roles}
    trainer = run(plan, tmp_path)
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


def test_what_leaks_into_the_critic_is_dropped_and_it_sees_the_images_made_before_the_step() -> (
    None
):
    stage = dmd2.StageSettings(1, ADAM, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(settings(match=stage), context())
    student, critic = plan.phases[0].updates
    assert student.zero_also == critic.roles == ("fake", "head")
    step = step_of(plan)
    student.loss(step)
    images = step.memo[dmd2.IMAGES]
    assert not images.requires_grad
    for parameter in step.roles["student"].parameters():
        parameter.data.add_(1.0)
    given = step_of(plan, memo={dmd2.IMAGES: images}, place="critic")
    other = step_of(plan, place="critic", memo={dmd2.IMAGES: images + 1})
    fresh = step_of(plan, place="critic")
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: bool
) -> None:
    stage = dmd2.StageSettings(7, ADAM, student_gan=0.5, critic_gan=0.5)
    plan = dmd2.plan(settings(match=stage, student_every=3), context())
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
    trainer = run(watched, tmp_path, kind=Watched)
    given = [any(images is own for own in stored) for images in learnt]
    assert given == [True, False, False] * 2 + [True]
    assert all(own is got for own, got in zip(stored, learnt[::3], strict=True))
    after = [held for name, held in trainer.left if name == "student"]
    # Without `zero_also` the GAN's gradients would stay in both.
    assert after == [[] if dropped else ["fake", "head"]] * 3


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_backward_simulation_comes_to_the_states_of_the_sampler(row: int) -> None:
    labels = (999, 749, 499, 249)
    plan = dmd2.plan(settings(labels=labels), context())
    table = plan.phases[0].emits.table
    student = plan.roles[-1].module
    batch = Gaussians().first(4)
    draw = torch.Generator().manual_seed(1)
    noises = [torch.randn(4, *SHAPE, generator=draw) for _ in labels]
    traces: list[Any] = []
    networks = torch_networks({"unet": student.network})
    run_table(table, networks, noises, batch.conditions, traces.append)
    made = dmd2.evaluate(table, student, noises[: row + 1], batch)
    assert torch.equal(made.detach(), traces[row].x0)
    # The state as the paper says it: pure noise, then the last x0 with fresh noise at the next label.
    z = noises[0]
    if row:
        alpha, sigma = SCHEDULE.alpha_sigma(labels[row])
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


def test_every_evaluation_is_trained_and_all_of_a_batch_the_same_one() -> None:
    plan = dmd2.plan(settings(labels=(999, 749, 499, 249)), context())
    table, student = plan.phases[0].emits.table, plan.roles[-1].module
    told: list[Tensor] = []
    student.network.register_forward_pre_hook(
        lambda *call: told.append(call[2]["timestep"]), with_kwargs=True
    )
    last = []
    for place in range(40):
        told.clear()
        with torch.no_grad():
            dmd2.generate(table, student, step_of(plan, 2, f"{place}"))
        assert all(float(t.min()) == float(t.max()) for t in told)
        assert [float(t[0]) for t in told] == [999, 749, 499, 249][: len(told)]
        last.append(len(told))
    assert {*last} == {1, 2, 3, 4}


def test_the_tables_are_those_of_their_notes_and_pure_noise_may_have_any_label() -> None:
    for labels in ((999,), (399,), (999, 749, 499, 249)):
        table = dmd2.student_table(settings(labels=labels, guidance_scale=1.5), context())
        assert validate(table) == []
        assert table.nfe == table.noise_count == len(labels)
        assert [row.feeds["timestep"] for row in table.rows] == list(labels)
        assert table.stages[0].init_noise == (1.0, 0)
        assert table.guidance.mode == "baked"
        assert table.guidance.default == 1.5
        assert (table.rows[-1].next.x0, table.rows[-1].noise) == (1.0, None)


class Affine(nn.Module):
    """x0 = gain[t] * z + shift[t], the exact denoiser of Gaussian data when it begins."""

    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 3}

    def __init__(self, mean: float, spread: float) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
        self.fit(mean, spread)

    def fit(self, mean: float, spread: float) -> None:
        alpha, sigma = torch.tensor(SCHEDULE.alphas), torch.tensor(SCHEDULE.sigmas)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        self.gain.data = gain.float()
        self.shift.data = (mean - gain * alpha * mean).float()

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002
        t = timestep.long()
        return self.gain[t][:, None, None, None] * sample + self.shift[t][:, None, None, None]


def test_matching_alone_moves_samples_onto_the_data_and_rests_there() -> None:
    teacher = Denoiser(Affine(MEAN, SPREAD), SCHEDULE, PredictionType("sample"))
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(200, *SHAPE, generator=draw)
    # The student is x = scale * noise + shift, whose own score is known at every step of it.
    scale, shift = torch.tensor(0.2, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=0.02)
    fake = Denoiser(Affine(0.0, 1.0), SCHEDULE, PredictionType("sample"))
    method = dmd2.Distillation(settings(), context())
    for place in range(200):
        images = scale * noise + shift
        fake.network.fit(shift.item(), scale.item())
        step = Step(
            {"teacher": teacher, "fake": fake},
            Batch(images, {"class_labels": torch.zeros(200, dtype=torch.int32)}, {}),
            PositionDraw(0, (place,), Slice(200, 0, 200), torch.device("cpu")),
        )
        optimizer.zero_grad()
        method._matching(step, images).backward()
        optimizer.step()
    assert shift.item() == pytest.approx(MEAN, abs=0.02)
    assert scale.item() == pytest.approx(SPREAD, abs=0.02)


MODES, WIDTH = torch.tensor([[-0.6, 0.2], [0.6, -0.3]]), 0.2


def posterior_mean(
    z: Tensor, centres: Tensor, spread: float, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Return E[x | z] of x that is Gaussian around one of some centres (count, 2), each as likely; z is (batch, 2)."""
    gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
    exponent = -(z[:, None] - alpha[:, None] * centres).square().sum(2)
    weights = (exponent / (2 * (alpha**2 * spread**2 + sigma**2))).softmax(1)
    means = centres + gain[:, None] * (z[:, None] - alpha[:, None] * centres)
    return (weights[:, :, None] * means).sum(1)


@torch.no_grad()
def test_matching_spreads_free_particles_over_both_modes_of_a_mixture() -> None:
    draw, moves = torch.Generator().manual_seed(0), 400
    particles = 1.5 * torch.randn(300, 2, generator=draw)
    for move in range(moves):
        t = torch.randint(20, 980, (len(particles),), generator=draw)
        alpha, sigma = (
            torch.tensor(v)[t][:, None].float() for v in (SCHEDULE.alphas, SCHEDULE.sigmas)
        )
        z = alpha * particles + sigma * torch.randn(particles.shape, generator=draw)
        real = posterior_mean(z, MODES, WIDTH, alpha, sigma)
        # What a fake score learns of the particles themselves, nearly.
        fake = posterior_mean(z, particles, WIDTH / 4, alpha, sigma)
        gradient = matching_gradient(*(v[:, :, None, None] for v in (particles, real, fake)))
        particles = particles - 0.05 * (1 - move / moves) * gradient[:, :, 0, 0]
    nearest, mode = (particles[:, None] - MODES).square().mean(2).sqrt().min(1)
    assert (nearest < 2 * WIDTH).float().mean() >= 0.95
    assert torch.bincount(mode, minlength=2).min() > 0.4 * len(particles)
    # Drawn by the teacher alone, all would fall into one point of each mode.
    spreads = torch.stack([particles[mode == k].std(0).mean() for k in range(2)])
    assert ((spreads / WIDTH - 1).abs() < 0.2).all()


@torch.no_grad()
def test_the_mean_gradient_is_nothing_where_the_student_makes_data() -> None:
    draw = torch.Generator().manual_seed(0)
    x = MEAN + SPREAD * torch.randn(4000, *SHAPE, generator=draw)
    teacher = Denoiser(Affine(MEAN, SPREAD), SCHEDULE, PredictionType("sample"))
    t = torch.full((4000,), 400)
    alpha, sigma = teacher.alpha_sigma(t)
    z = alpha * x + sigma * torch.randn(x.shape, generator=draw)
    real = teacher.x0(z, t, {"class_labels": t})
    # What a fake score learns of these images: the regression of x on z.
    gain = ((x - x.mean()) * (z - z.mean())).mean() / z.var()
    learnt = x.mean() + gain * (z - z.mean())
    assert abs(matching_gradient(x, real, learnt).mean().item()) < 0.01
    assert abs(matching_gradient(x, real, learnt - 0.1).mean().item()) > 0.2


def test_the_head_fits_the_middle_of_its_network_and_nothing_else() -> None:
    method = dmd2.Distillation(settings(), context())
    head, fake = method.head(), context().teacher
    z, t = torch.zeros(3, *SHAPE), torch.zeros(3, dtype=torch.int64)
    _, features = fake.tapped(z, t, {"class_labels": torch.zeros(3, dtype=torch.int32)})
    assert head.shape == tuple(features.shape[1:]) == (16, 4, 4)
    assert head(features).shape == (3,)
    with pytest.raises(ContractError, match=r"made for features of \(16, 4, 4\), got \(16, 2, 2\)"):
        head(features[..., :2, :2])
    cut = build_stock({**UNET, "mid_block_type": None})
    with pytest.raises(ConfigError, match="without a middle block has no features to tap"):
        dmd2.plan(settings(), context(cut))


def test_pairs_are_the_teacher_s_samples_whenever_they_are_made(tmp_path: Path) -> None:
    chosen = settings(warm_up=Stretch(2, ADAM), pairs=dmd2.PairSettings(70, 3), guidance_scale=1.5)
    method, teacher = dmd2.Distillation(chosen, context()), context().teacher
    for place in ("first", "second"):
        draw = PositionDraw(0, (place,), Slice(8, 0, 8), torch.device("cpu"))
        noise, batch = method.pairs.sample(teacher, draw)
    # A resumed run makes the pairs at another step, and finds the same ones.
    draw = PositionDraw(0, ("second",), Slice(8, 0, 8), torch.device("cpu"))
    resumed = dmd2.Distillation(chosen, context()).pairs.sample(teacher, draw)
    assert torch.equal(noise, resumed[0])
    assert torch.equal(batch.x, resumed[1].x)
    z = noise
    for t, s in ((999, 666), (666, 332), (332, -1)):
        time = torch.full((8,), t)
        x0 = 1.5 * teacher.x0(z, time, batch.conditions) - 0.5 * teacher.x0(z, time, batch.null)
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        after = SCHEDULE.alpha_sigma(s)
        z = (after[0] * x0 + after[1] * (z - alpha * x0) / sigma).detach()
    torch.testing.assert_close(batch.x, z, rtol=0, atol=1e-4)
    plan = dmd2.plan(chosen, context())
    assert [phase.name for phase in plan.phases] == ["warm-up", "match"]
    run(plan, tmp_path)


def test_regression_trains_every_evaluation_on_the_teacher_s_samples() -> None:
    chosen = settings(labels=(999, 499), warm_up=Stretch(2, ADAM), pairs=dmd2.PairSettings(70, 3))
    plan = dmd2.plan(chosen, context())
    student, loss = plan.roles[-1].module, plan.phases[0].updates[0].loss
    seen: list[tuple[float, Tensor]] = []
    student.network.register_forward_pre_hook(
        lambda *call: seen.append((call[2]["timestep"][0].item(), call[2]["sample"])),
        with_kwargs=True,
    )
    pairs = dmd2.Distillation(chosen, context()).pairs
    alpha, sigma = SCHEDULE.alpha_sigma(499)
    for place in range(8):
        loss(step_of(plan, 64, f"{place}"))
        draw = PositionDraw(0, (f"{place}",), Slice(64, 0, 64), torch.device("cpu"))
        noise, batch = pairs.sample(context().teacher, draw)
        label, z = seen[-1]
        fresh = noise if label == 999 else (z - alpha * batch.x) / sigma
        assert torch.equal(z, noise) == (label == 999)
        assert abs(fresh.mean().item()) < 0.06
        assert fresh.std().item() == pytest.approx(1.0, abs=0.05)
    assert {label for label, _ in seen} == {999, 499}


def test_students_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot start where alpha is 4.9e-05"):
        dmd2.plan(settings(), context(kind="epsilon"))
    dmd2.plan(settings(labels=(749,)), context(kind="epsilon"))
    with pytest.raises(ConfigError, match="no null condition"):
        dmd2.plan(settings(guidance_scale=2.0), context(null={}))
    with pytest.raises(ConfigError, match=r"Timestep must lie in \[-1, 999\], got 1000"):
        dmd2.plan(settings(labels=(1000,)), context())
    with pytest.raises(ConfigError, match="one or more falling labels"):
        settings(labels=(249, 499))
    with pytest.raises(ConfigError, match="One of `match` and `adversarial`"):
        settings(match=None)
    with pytest.raises(ConfigError, match="`student_every` at least 1"):
        settings(student_every=0)
    with pytest.raises(
        ConfigError, match="`student_gan` 0.1 would fool a head that `critic_gan` 0"
    ):
        dmd2.StageSettings(student_gan=0.1)
    with pytest.raises(ConfigError, match="must not be negative"):
        dmd2.StageSettings(critic_gan=-0.1)
    with pytest.raises(ConfigError, match="`iterations` must be at least 1"):
        dmd2.StageSettings(0)
    assert dmd2.StageSettings(critic_gan=0.1).has_gan
