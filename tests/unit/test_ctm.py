"""Consistency trajectory models: the identities of their jumps, losses and samplers, and Gaussian data."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.methods import ctm, losses
from edgedistill.methods.context import Context
from edgedistill.methods.jumps import GridSettings, jump
from edgedistill.methods.losses import balance, critic_loss, distance, fooling_loss
from edgedistill.methods.plan import Batch, OptimizerSettings, Plan, Step, Stretch
from edgedistill.methods.targets import cfg_combine, ddim_step, solver_step
from edgedistill.models.critic import Critic
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule
from edgedistill.table import Condition
from edgedistill.training.checkpoint import CheckpointFolder
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.logs import Unwatched
from edgedistill.training.loop import Trainer
from edgedistill.training.settings import TrainingSettings

COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.2, "sigma_max": 1.5}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FAMILIES = [(COSINE, "v_prediction"), (EDM, "edm"), (FLOW, "flow")]
MEAN, SPREAD = 0.3, 0.5
SHAPE = (1, 4, 4)
POINTS = 9
ADAM = OptimizerSettings(learning_rate=0.01, decay="cosine")
SETTINGS = ctm.CtmSettings(
    grid=GridSettings(points=POINTS),
    most_steps=POINTS - 1,
    average=0.9,
    consistency=Stretch(4, ADAM),
    adversarial=ctm.AdversarialSettings(4, ADAM, critic="pixels", width=4),
    steps=(2, 1, 4),
)


class Gaussian(nn.Module):
    """The exact denoiser of Gaussian data, by the level that an EDM network is told; classes shift the mean."""

    config = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "num_class_embeds": 3}

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.full((1, 1), MEAN))
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        self.seen.append((timestep, class_labels))
        label = np.searchsorted(self.schedule.feeds, timestep.double().numpy() - 1e-6)
        alpha, sigma, scale = (
            torch.tensor(values[label]).float()[:, None, None, None]
            for values in (self.schedule.alphas, self.schedule.sigmas, self.schedule.in_scales)
        )
        z = sample / scale
        mean = self.mean + 0.2 * class_labels[:, None, None, None]
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return mean + gain * (z - alpha * mean)


class Told(Gaussian):
    """The same as a student, which does not heed s."""

    config = {**Gaussian.config, "scalar_inputs": {"s": 1.0}}

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, s: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        return super().forward(sample, timestep, class_labels)


class Jumper(nn.Module):
    """x0 = scale[t, s] * z + shift[t, s] on a grid: holds the exact jumps of Gaussian data."""

    config = {**Gaussian.config, "scalar_inputs": {"s": 1.0}}

    def __init__(self, schedule: Schedule, labels: tuple[int, ...]) -> None:
        super().__init__()
        self.labels = torch.tensor(labels)
        self.feeds = torch.tensor(schedule.feeds[list(labels)]).float()
        self.in_scales = torch.tensor(schedule.in_scales[list(labels)]).float()
        self.seen: list[tuple[Tensor, ...]] = []
        count = len(labels)
        alpha, sigma = (torch.tensor(a[list(labels)]) for a in (schedule.alphas, schedule.sigmas))
        gain = (alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)).float()
        # A step of the teacher to every s, as with an input that is zero at first.
        start = torch.stack([gain, MEAN * (1 - gain * alpha.float())])
        self.jumps = nn.Parameter(start[:, :, None].repeat(1, 1, count))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, s: Tensor) -> Tensor:
        self.seen.append((timestep, s, class_labels))
        t, to = ((value[:, None] - self.feeds).abs().argmin(1) for value in (timestep, s))
        scale, shift = self.jumps[:, t, to][:, :, None, None, None]
        return scale * sample / self.in_scales[t][:, None, None, None] + shift


class Wave(nn.Module):
    """A fixed smooth function of all inputs."""

    config = Jumper.config

    def __init__(self, seed: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), 2.0 + seed))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, s: Tensor) -> Tensor:
        phase = (timestep / 300 + s / 500 + class_labels)[:, None, None, None]
        return torch.sin(self.weight * sample + phase)


class GaussianContext(Context):
    """Students of Gaussian data have a number for every jump of the grid."""

    def student(self, *scalars: str, **inputs: Any) -> Denoiser:
        assert (scalars, inputs) == (("s",), {})
        labels = SETTINGS.grid.labels(self.schedule)
        return Denoiser(Jumper(self.schedule, labels), self.schedule, self.prediction_type)


def gaussian_context(config: dict[str, Any] = EDM) -> GaussianContext:
    schedule, kind = Schedule.from_config(config), PredictionType("sample")
    return GaussianContext(
        "ctm",
        Denoiser(Gaussian(schedule), schedule, kind),
        nn.Identity(),
        config,
        kind,
        SHAPE,
        (Condition("class_labels", "class", 2),),
        {"class_labels": 2},
    )


def gaussian_batch(count: int, seed: int = 0) -> Batch:
    x = MEAN + SPREAD * noise(seed, count)
    labels = torch.zeros(count, dtype=torch.int32)
    return Batch(x, {"class_labels": labels}, {"class_labels": labels + 2})


class Gaussians:
    """Endless Gaussian data, a function of the position."""

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:  # noqa: ARG002
        return gaussian_batch(part.stop - part.start, start)


def noise(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def draw(count: int, *position: int) -> PositionDraw:
    return PositionDraw(3, position, Slice(count, 0, count), torch.device("cpu"))


def step_of(plan: Plan, count: int = 6, *position: int) -> Step:
    roles = {role.name: role.module for role in plan.roles}
    for role in plan.roles:
        role.network.requires_grad_(role.trained)
    return Step(roles, gaussian_batch(count), draw(count, *position))


def stock() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=5,
    ).eval()


def exact(schedule: Schedule, z: Tensor, t: int, s: int) -> Tensor:
    """Where the probability-flow ODE of Gaussian data leads from t to s: quantiles keep their place."""
    (a, b), (c, d) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    place = (z - a * MEAN) / math.hypot(a * SPREAD, b)
    return c * MEAN + place * math.hypot(c * SPREAD, d)


@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_a_jump_of_no_length_changes_no_bit(config: dict[str, Any], kind: str) -> None:
    d = Denoiser(Wave(), Schedule.from_config(config), PredictionType(kind))
    t, given = torch.tensor([0, 1, 300, 600, 998, 999]), {"class_labels": torch.zeros(6)}
    assert torch.equal(jump(d, noise(0), t, t, given), noise(0))
    moved = jump(d, noise(0), t, t.clamp(max=998) - 1, given)[1:]
    assert (moved - noise(0)[1:]).flatten(1).norm(dim=1).min() > 1e-5


@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_an_untrained_jump_is_the_papers_euler_step_of_the_teacher(
    config: dict[str, Any], kind: str
) -> None:
    schedule = Schedule.from_config(config)
    teacher = Denoiser(stock(), schedule, PredictionType(kind))
    context = Context("ctm", teacher, teacher.network, config, PredictionType(kind), (1, 8, 8), ())
    student = context.student("s")
    z, t = torch.randn(4, 1, 8, 8), torch.tensor([900, 700, 400, 20])
    s, labels = torch.tensor([899, 100, 0, 10]), {"class_labels": torch.arange(4)}
    x0 = teacher.x0(z, t, labels)
    made = jump(student, z, t, s, labels)
    assert torch.equal(made, ddim_step(teacher, z, x0, t, s))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = teacher.alpha_sigma(t), teacher.alpha_sigma(s)
    share = (sigma_s / alpha_s) / (sigma_t / alpha_t)
    torch.testing.assert_close(
        made / alpha_s, share * z / alpha_t + (1 - share) * x0, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpm", 2)])
def test_solvers_are_of_their_order(solver: Any, order: int) -> None:
    context = gaussian_context({**EDM, "num_train_timesteps": 1025})
    d, z = context.teacher, 4.0 * noise(0).double()
    labels = {"class_labels": torch.zeros(6, dtype=torch.int32)}
    ends = []
    for count in (16, 32):
        state = z
        for t, s in itertools.pairwise(np.linspace(1024, 0, count + 1).astype(int)):
            state = solver_step(
                d, lambda z, t: d.x0(z, t, labels), state, *torch.tensor([[t] * 6, [s] * 6]), solver
            )
        ends.append((state - exact(d.schedule, z, 1024, 0)).norm())
    assert 2 ** (order - 0.35) < ends[0] / ends[1] < 2 ** (order + 0.5)


@pytest.mark.parametrize(("kind", "power"), [("weighted", 1), ("uniform", 0), ("global", 1)])
def test_times_are_drawn_as_the_code_draws_them(kind: Any, power: int) -> None:
    settings = dataclasses.replace(SETTINGS, steps_drawn=kind, most_steps=5)
    counts, ends = np.zeros(5), []
    for index in range(3000):
        times = ctm.draw_times(settings, draw(8, index))
        counts[times.steps - 1] += 1
        u = times.t + times.steps
        assert times.t.min() >= 0
        assert (u <= times.s).all()
        assert times.s.max() <= POINTS - 1
        assert kind != "global" or torch.equal(u, times.s)
        if times.steps == 2:
            ends += times.s[times.t == 4].tolist()
    wanted = np.arange(1, 6) ** power
    assert np.abs(counts / 3000 - wanted / wanted.sum()).max() < 0.03
    if kind != "global":
        shares = np.bincount(ends, minlength=POINTS)[6:] / len(ends)
        assert np.abs(shares - 1 / 3).max() < 0.08


def test_gradients_reach_the_student_alone() -> None:
    plan = ctm.plan(SETTINGS, gaussian_context())
    step = step_of(plan)
    z = 3 * noise(1)
    t, s = torch.full((6,), 900), torch.full((6,), 300)
    ctm.image_of(step, z, t, s).square().sum().backward()
    assert [name for name, module in step.roles.items() if _has_gradient(module)] == ["student"]
    points = torch.tensor(SETTINGS.grid.labels(step.roles["student"].schedule))
    target = ctm.target_of(SETTINGS, points, ctm.Times(t * 0, t * 0 + 5, 3), step, z)
    assert not target.requires_grad


def _has_gradient(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_the_target_of_a_whole_path_is_where_the_teacher_ends_and_the_average_jumps_on() -> None:
    settings = dataclasses.replace(SETTINGS, guidance_scale=1.5, solver="ddim")
    context = gaussian_context()
    step = step_of(ctm.plan(settings, context))
    d, given = context.teacher, step.batch.conditions
    labels = settings.grid.labels(context.schedule)
    times = ctm.Times(torch.full((6,), 1), torch.full((6,), 4), 3)
    made = ctm.target_of(settings, torch.tensor(labels), times, step, noise(2))
    state = noise(2)
    for t, s in itertools.pairwise(torch.tensor(labels[1:5])[:, None].expand(-1, 6)):
        guided = cfg_combine(
            d.x0(state, t, given), d.x0(state, t, step.batch.null), torch.full((6,), 0.5)
        )
        state = ddim_step(d, state, guided, t, s)
    end = torch.zeros(6, dtype=torch.long)
    wanted = jump(step.roles["average"], state, torch.full((6,), labels[4]), end, given)
    assert torch.equal(made, wanted)


def test_a_student_that_learns_from_itself_never_asks_the_teacher() -> None:
    settings = dataclasses.replace(SETTINGS, self_learn=True)
    context = gaussian_context()
    step = step_of(ctm.plan(settings, context))
    points = torch.tensor(settings.grid.labels(context.schedule))
    places = torch.zeros(6, dtype=torch.long)
    made = ctm.target_of(settings, points, ctm.Times(places, places + 4, 3), step, noise(2))
    assert context.teacher.network.seen == []
    asked = ctm.target_of(SETTINGS, points, ctm.Times(places, places + 4, 3), step, noise(2))
    assert len(context.teacher.network.seen) == 6  # twice for each of Heun's steps
    # Untrained, the student is its teacher.
    torch.testing.assert_close(made, asked)


def test_the_denoising_loss_moves_only_the_jumps_of_no_length() -> None:
    plan = ctm.plan(dataclasses.replace(SETTINGS, adversarial=None), gaussian_context())
    step = step_of(plan, 512)
    student = step.roles["student"].network
    losses = plan.phases[0].updates[0].loss(step)
    t, s, _ = student.seen[-1]
    assert torch.equal(t, s)
    losses.terms["denoising"].backward()
    moved = student.jumps.grad
    assert moved.abs().sum() > 0
    assert torch.equal(moved, torch.diag_embed(moved.diagonal(dim1=1, dim2=2)))


@pytest.mark.parametrize(("guidance_scale", "mean"), [(1.0, MEAN), (1.5, MEAN - 0.2)])
def test_the_denoising_loss_is_least_at_the_denoiser_which_is_guided_where_the_teacher_is(
    guidance_scale: float, mean: float
) -> None:
    context = gaussian_context()
    settings = dataclasses.replace(SETTINGS, guidance_scale=guidance_scale, adversarial=None)
    plan = ctm.plan(settings, context)
    slopes = []
    for offset in (-0.05, 0.05):
        network = Told(context.schedule)
        torch.nn.init.constant_(network.mean, mean + offset)
        student = Denoiser(network, context.schedule, context.prediction_type)
        step = step_of(plan, 4096)
        roles = {**step.roles, "student": student, "average": student}
        terms = plan.phases[0].updates[0].loss(dataclasses.replace(step, roles=roles)).terms
        slopes += torch.autograd.grad(terms["denoising"], network.mean)
    assert slopes[0] < 0 < slopes[1]


def test_levels_of_the_denoising_loss() -> None:
    schedule = gaussian_context({"_class_name": "EDMEulerScheduler"}).schedule
    one_kind = dataclasses.replace(SETTINGS.denoising, share=1.0)
    settings = dataclasses.replace(SETTINGS, denoising=one_kind)
    logarithms = ctm.denoising_levels(settings, schedule, draw(20000)).log()
    assert abs(logarithms.mean() + 1.2) < 0.03
    assert abs(logarithms.std() - 1.2) < 0.03
    other = dataclasses.replace(SETTINGS, denoising=dataclasses.replace(one_kind, share=0.0))
    levels = ctm.denoising_levels(other, schedule, draw(20000))
    lowest = (80 ** (1 / 7) + 0.7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert levels.max() == pytest.approx(80, rel=1e-2)
    assert levels.min() == pytest.approx(lowest, rel=1e-2)


@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_a_denoiser_finds_labels_as_its_schedule_does(config: dict[str, Any], kind: str) -> None:
    schedule = Schedule.from_config(config)
    levels = np.append(np.geomspace(1e-4, 1e4, 500), schedule.levels[:-1])
    found = Denoiser(Wave(), schedule, PredictionType(kind)).label_of(torch.tensor(levels))
    assert found.tolist() == schedule.label_of(levels).tolist()


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


def test_distances_and_the_two_sides_of_a_critic() -> None:
    a, b = noise(0), noise(1)
    assert distance(a, b, "l2").item() == pytest.approx(((a - b) ** 2).mean().item())
    far = distance(1e3 * a, 1e3 * b, "pseudo_huber").item()
    assert far == pytest.approx(1e3 * (a - b).flatten(1).norm(dim=1).mean().item() / 16, rel=1e-3)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert critic_loss(real, fake, "hinge").item() == pytest.approx(0.25 + 0.5)
    assert fooling_loss(fake, "hinge").item() == 1.5
    undecided = critic_loss(0 * real, 0 * fake, "non_saturating").item()
    assert undecided == pytest.approx(2 * math.log(2))


def test_a_critic_scores_images_by_their_class_and_is_made_of_its_seed() -> None:
    images, labels = noise(0), torch.tensor([0, 1, 2, 0, 1, 2])
    critic, again = (Critic(1, 4, 3, width=4, seed=5) for _ in range(2))
    assert torch.equal(critic(images, labels), again(images, labels))
    assert not torch.equal(critic(images, labels), critic(images, labels.flip(0)))
    assert critic(images, labels).shape == (6,)


def runner(denoiser: Denoiser) -> Callable[[Any], dict[str, Tensor]]:
    """Return the network as tables call it."""

    def run(given: Any) -> dict[str, Tensor]:
        count = len(given["sample"])
        inputs = {k: v if v.ndim else v.expand(count) for k, v in map(_tensor, given.items())}
        return {"out_sample": denoiser.network(**inputs)}

    return run


def _tensor(item: tuple[str, Any]) -> tuple[str, Tensor]:
    return item[0], torch.as_tensor(item[1], dtype=torch.float32)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_table_is_the_loop_of_jumps_and_noise(gamma: float) -> None:
    context = gaussian_context({"_class_name": "EDMEulerScheduler"})
    settings = dataclasses.replace(SETTINGS, guidance_scale=1.5)
    table = ctm.table(settings, context, 4, gamma)
    d = Denoiser(Wave(), context.schedule, context.prediction_type)
    bank = [noise(seed) for seed in range(table.noise_count)]
    given = {"class_labels": torch.zeros(6)}
    made = run_table(table, {"unet": runner(d)}, bank, given)
    levels = context.schedule.sigmas
    grid = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    state, labels = 80 * noise(0), settings.grid.labels(context.schedule, 5)
    assert levels[list(labels)] == pytest.approx(grid, rel=0.01)
    for index, (t, s) in enumerate(itertools.pairwise(labels), start=1):
        wanted = math.sqrt(1 - gamma**2) * levels[s]
        k = s if index == 4 else int(np.abs(np.log(levels) - math.log(max(wanted, 1e-9))).argmin())
        state = jump(d, state, torch.full((6,), t), torch.full((6,), k), given)
        if k < s:
            state = state + math.sqrt(levels[s] ** 2 - levels[k] ** 2) * noise(index)
    torch.testing.assert_close(made, state.clamp(-1, 1), rtol=0, atol=2e-5)
    assert table.noise_count == (1 if gamma == 0 else 4)
    assert table.rows[-1].noise is None
    assert table.guidance.default == 1.5


def test_gamma_1_is_a_consistency_model_down_to_the_lowest_level() -> None:
    context = gaussian_context({"_class_name": "EDMEulerScheduler"})
    table = ctm.table(SETTINGS, context, 3, 1.0)
    levels, low = context.schedule.sigmas, context.schedule.sigmas[0]
    for row in table.rows[:-1]:
        t, s = levels[row.note["t"]], levels[row.note["s"]]
        assert row.feeds["s"] == context.schedule.feeds[0]
        assert (row.next.z, row.next.x0) == pytest.approx((low / t, 1 - low / t))
        assert row.next.noise == pytest.approx(math.sqrt(s**2 - low**2))


def train(plan: Plan, folder: Path, **settings: Any) -> dict[str, Any]:
    """Run a plan on Gaussian data; return the networks of its students."""
    emitted: dict[str, Any] = {}
    Trainer(
        plan,
        {"data": Gaussians()},
        TrainingSettings(**{"checkpoint_every": 10000, **settings}),
        0,
        CheckpointFolder(folder, "print"),
        lambda emission, states: emitted.update({emission.name: copy.deepcopy(states["unet"])}),
        Unwatched(),
        Accelerator(),
    ).run()
    return emitted


def test_jumps_that_are_trained_on_gaussian_data_are_exact_and_compose(tmp_path: Path) -> None:
    context = gaussian_context()
    longer = Stretch(400, ADAM)
    settings = dataclasses.replace(SETTINGS, adversarial=None, consistency=longer)
    untrained, student = context.student("s"), context.student("s")
    emitted = train(ctm.plan(settings, context), tmp_path, batch_size=128, clip_norm=None)
    student.network.load_state_dict(emitted["consistency"])
    schedule, given = context.schedule, gaussian_batch(64).conditions
    labels = settings.grid.labels(schedule)

    @torch.no_grad()
    def error(d: Denoiser, path: tuple[int, ...]) -> float:
        """Relative, of the jumps along a path of labels in a row."""
        alpha, sigma = schedule.alpha_sigma(path[0])
        z = start = alpha * (MEAN + SPREAD * noise(1, 64)) + sigma * noise(2, 64)
        for t, s in itertools.pairwise(path):
            z = jump(d, z, torch.full((64,), t), torch.full((64,), s), given)
        wanted = exact(schedule, start, path[0], path[-1])
        return ((z - wanted).norm() / wanted.norm()).item()

    once = list(itertools.combinations(labels, 2))
    twice = list(itertools.combinations(labels, 3))
    assert max(error(untrained, path) for path in once) > 0.1
    assert max(error(student, path) for path in once) < 1e-2
    assert max(error(student, path) for path in twice) < 2e-2


def test_the_critic_takes_turns_with_the_student_and_the_average_is_what_comes_out(
    tmp_path: Path,
) -> None:
    plan = ctm.plan(SETTINGS, gaussian_context())
    assert [phase.name for phase in plan.phases] == ["consistency", "adversarial"]
    assert [(u.name, u.every, u.offset) for u in plan.phases[1].updates] == [
        ("student", 2, 0),
        ("critic", 2, 1),
    ]
    critic = plan.roles[-1].module
    before = [p.clone() for p in critic.parameters()]
    emitted = train(plan, tmp_path, batch_size=8)
    assert not all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))
    average = {role.name: role.network for role in plan.roles}["average"]
    assert torch.equal(emitted["adversarial"]["jumps"], average.jumps)
    assert not torch.equal(emitted["adversarial"]["jumps"], emitted["consistency"]["jumps"])


def test_a_critic_may_see_the_features_of_the_teacher() -> None:
    against = dataclasses.replace(SETTINGS.adversarial, critic="teacher", noise=0.3)
    settings = dataclasses.replace(SETTINGS, adversarial=against)
    kind, schedule = PredictionType("v_prediction"), Schedule.from_config(COSINE)
    teacher = Denoiser(stock(), schedule, kind)
    classes = (Condition("class_labels", "class", 4),)
    base = stock()
    context = Context("ctm", teacher, base, COSINE, kind, (1, 8, 8), classes, {"class_labels": 4})
    settings = dataclasses.replace(settings, grid=GridSettings("trailing", POINTS), solver="dpm")
    plan = ctm.plan(settings, context)
    roles = {role.name: role.module for role in plan.roles}
    for role in plan.roles:
        role.network.requires_grad_(role.trained)
    labels = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    batch = Batch(
        torch.randn(4, 1, 8, 8), {"class_labels": labels}, {"class_labels": 0 * labels + 4}
    )
    terms = plan.phases[1].updates[0].loss(Step(roles, batch, draw(4))).terms
    terms["adversarial"].backward()
    assert _has_gradient(roles["student"])
    assert not _has_gradient(roles["teacher"])


def test_one_student_has_all_samplers() -> None:
    emission = ctm.plan(SETTINGS, gaussian_context()).phases[-1].emits
    assert emission.networks == {"unet": "average"}
    assert len(emission.table.rows) == 2
    counts = {name: len(table.rows) for name, table in emission.samplers.items()}
    assert counts == {"1-step": 1, "4-step": 4, "4-step-stochastic": 4}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"most_steps": POINTS}, "`most_steps` must lie in"),
        ({"steps": (1, 1)}, "`steps` must be different"),
        ({"self_learn": True, "guidance_scale": 2.0}, "no guidance to learn"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(SETTINGS, **changes)


def test_a_critic_of_features_sees_images_at_labels_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"`critic: teacher`, a share of labels, not above 1, got 1\.5"
    ):
        ctm.AdversarialSettings(noise=1.5)
    with pytest.raises(ConfigError, match="`noise` must not be negative"):
        ctm.AdversarialSettings(critic="pixels", noise=-0.5)
    assert ctm.AdversarialSettings(critic="pixels", noise=1.5).noise == 1.5
