"""Consistency trajectory models: the identities of jumps, exact ones of Gaussian data, and the samplers made of them."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgedistill.methods import ctm
from edgedistill.methods.context import Context
from edgedistill.methods.jumps import jump
from edgedistill.methods.targets import ddim_step, solver_step
from edgedistill.models.denoiser import Denoiser
from edgedistill.prediction import PredictionType
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule

COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.2, "sigma_max": 1.5}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FAMILIES = [(COSINE, "v_prediction"), (EDM, "edm"), (FLOW, "flow")]


class Wave(nn.Module):
    """A fixed smooth function of all inputs."""

    config = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": 3,
        "scalar_inputs": {"s": 1.0},
    }

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), 2.0))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, s: Tensor) -> Tensor:
        phase = (timestep / 300 + s / 500 + class_labels)[:, None, None, None]
        return torch.sin(self.weight * sample + phase)


@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_a_jump_of_no_length_changes_no_bit(gaussian, config: dict[str, Any], kind: str) -> None:
    d = Denoiser(Wave(), Schedule.from_config(config), PredictionType(kind))
    t, given = torch.tensor([0, 1, 300, 600, 998, 999]), {"class_labels": torch.zeros(6)}
    assert torch.equal(jump(d, gaussian.noise(0), t, t, given), gaussian.noise(0))
    moved = jump(d, gaussian.noise(0), t, t.clamp(max=998) - 1, given)[1:]
    assert (moved - gaussian.noise(0)[1:]).flatten(1).norm(dim=1).min() > 1e-5


@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_an_untrained_jump_is_the_papers_euler_step_of_the_teacher(
    stock, config: dict[str, Any], kind: str
) -> None:
    schedule = Schedule.from_config(config)
    teacher = Denoiser(stock, schedule, PredictionType(kind))
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
def test_solvers_are_of_their_order(gaussian, solver: Any, order: int) -> None:
    context = gaussian.context({**EDM, "num_train_timesteps": 1025})
    d, z = context.teacher, 4.0 * gaussian.noise(0).double()
    labels = {"class_labels": torch.zeros(6, dtype=torch.int32)}
    ends = []
    for count in (16, 32):
        state = z
        for t, s in itertools.pairwise(np.linspace(1024, 0, count + 1).astype(int)):
            state = solver_step(
                d, lambda z, t: d.x0(z, t, labels), state, *torch.tensor([[t] * 6, [s] * 6]), solver
            )
        ends.append((state - gaussian.exact(d.schedule, z, 1024, 0)).norm())
    assert 2 ** (order - 0.35) < ends[0] / ends[1] < 2 ** (order + 0.5)


@pytest.mark.parametrize(("config", "kind"), FAMILIES)
def test_a_denoiser_finds_labels_as_its_schedule_does(config: dict[str, Any], kind: str) -> None:
    schedule = Schedule.from_config(config)
    levels = np.append(np.geomspace(1e-4, 1e4, 500), schedule.levels[:-1])
    found = Denoiser(Wave(), schedule, PredictionType(kind)).label_of(torch.tensor(levels))
    assert found.tolist() == schedule.label_of(levels).tolist()


def test_jumps_that_are_trained_on_gaussian_data_are_exact_and_compose(
    gaussian, tmp_path: Path
) -> None:
    context = gaussian.context()
    longer = dataclasses.replace(gaussian.settings.consistency, iterations=400)
    settings = dataclasses.replace(gaussian.settings, adversarial=None, consistency=longer)
    untrained, student = context.student("s"), context.student("s")
    emitted = gaussian.train(ctm.plan(settings, context), tmp_path, batch_size=128, clip_norm=None)
    student.network.load_state_dict(emitted["consistency"])
    schedule, given = context.schedule, gaussian.batch(64).conditions
    labels = settings.grid.labels(schedule)

    @torch.no_grad()
    def error(d: Denoiser, path: tuple[int, ...]) -> float:
        """Relative, of the jumps along a path of labels in a row."""
        alpha, sigma = schedule.alpha_sigma(path[0])
        z = start = alpha * gaussian.batch(64, 1).x + sigma * gaussian.noise(2, 64)
        for t, s in itertools.pairwise(path):
            z = jump(d, z, torch.full((64,), t), torch.full((64,), s), given)
        wanted = gaussian.exact(schedule, start, path[0], path[-1])
        return ((z - wanted).norm() / wanted.norm()).item()

    once = list(itertools.combinations(labels, 2))
    twice = list(itertools.combinations(labels, 3))
    assert max(error(untrained, path) for path in once) > 0.1
    assert max(error(student, path) for path in once) < 1e-2
    assert max(error(student, path) for path in twice) < 2e-2


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
def test_a_table_is_the_loop_of_jumps_and_noise(gaussian, gamma: float) -> None:
    context = gaussian.context({"_class_name": "EDMEulerScheduler"})
    settings = dataclasses.replace(gaussian.settings, guidance_scale=1.5)
    table = ctm.table(settings, context, 4, gamma)
    d = Denoiser(Wave(), context.schedule, context.prediction_type)
    bank = [gaussian.noise(seed) for seed in range(table.noise_count)]
    given = {"class_labels": torch.zeros(6)}
    made = run_table(table, {"unet": runner(d)}, bank, given)
    levels = context.schedule.sigmas
    grid = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    state, labels = 80 * gaussian.noise(0), settings.grid.labels(context.schedule, 5)
    assert levels[list(labels)] == pytest.approx(grid, rel=0.01)
    for index, (t, s) in enumerate(itertools.pairwise(labels), start=1):
        wanted = math.sqrt(1 - gamma**2) * levels[s]
        k = s if index == 4 else int(np.abs(np.log(levels) - math.log(max(wanted, 1e-9))).argmin())
        state = jump(d, state, torch.full((6,), t), torch.full((6,), k), given)
        if k < s:
            state = state + math.sqrt(levels[s] ** 2 - levels[k] ** 2) * gaussian.noise(index)
    torch.testing.assert_close(made, state.clamp(-1, 1), rtol=0, atol=2e-5)
    assert table.noise_count == (1 if gamma == 0 else 4)
    assert table.rows[-1].noise is None
    assert table.guidance.default == 1.5


def test_gamma_1_is_a_consistency_model_down_to_the_lowest_level(gaussian) -> None:
    context = gaussian.context({"_class_name": "EDMEulerScheduler"})
    table = ctm.table(gaussian.settings, context, 3, 1.0)
    levels, low = context.schedule.sigmas, context.schedule.sigmas[0]
    for row in table.rows[:-1]:
        t, s = levels[row.note["t"]], levels[row.note["s"]]
        assert row.feeds["s"] == context.schedule.feeds[0]
        assert (row.next.z, row.next.x0) == pytest.approx((low / t, 1 - low / t))
        assert row.next.noise == pytest.approx(math.sqrt(s**2 - low**2))


def test_one_student_has_all_samplers(gaussian) -> None:
    emission = ctm.plan(gaussian.settings, gaussian.context()).phases[-1].emits
    assert emission.networks == {"unet": "average"}
    assert len(emission.table.rows) == 2
    counts = {name: len(table.rows) for name, table in emission.samplers.items()}
    assert counts == {"1-step": 1, "4-step": 4, "4-step-stochastic": 4}
