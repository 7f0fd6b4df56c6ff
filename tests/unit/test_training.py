"""The loop on small closed-form problems: it converges, resumes bit for bit, and stops on NaN."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgedistill.errors import TrainingError
from edgedistill.methods import guided
from edgedistill.methods.context import Context
from edgedistill.methods.halving import Halving
from edgedistill.methods.plan import (
    Batch,
    Emission,
    Losses,
    OptimizerSettings,
    Phase,
    Plan,
    Role,
    Step,
    Update,
)
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import torch_networks
from edgedistill.prediction import PredictionType
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, Guidance
from edgedistill.training.checkpoint import CheckpointFolder, Position
from edgedistill.training.describe import Stopwatch, timed_iterations
from edgedistill.training.draw import EpochOrder, PositionDraw, Slice
from edgedistill.training.loop import Trainer, Watcher, curve
from edgedistill.training.settings import TrainingSettings

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
}
SCHEDULE = Schedule.from_config(CONFIG)
MEAN, SPREAD = 0.3, 0.5
SHAPE = (1, 2, 2)


class Affine(nn.Module):
    """x0 = scale[t] * z + shift[t]: exact for Gaussian data, so training can reach the optimum."""

    config = {
        "sample_size": 2,
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": 2,
        "scalar_inputs": {"w": 1000.0},
    }

    def __init__(self) -> None:
        super().__init__()
        alpha = torch.tensor(SCHEDULE.alphas)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + torch.tensor(SCHEDULE.sigmas) ** 2)
        self.scale = nn.Parameter(gain.float())
        self.shift = nn.Parameter((MEAN - gain * alpha * MEAN).float())

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, w: Tensor) -> Tensor:  # noqa: ARG002
        t = timestep.long()
        return self.scale[t][:, None, None, None] * sample + self.shift[t][:, None, None, None]


class AffineTeacher(Affine):
    """The same without a guidance input."""

    config = {k: v for k, v in Affine.config.items() if k != "scalar_inputs"}

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sample, timestep, class_labels, timestep)


class Gaussians:
    """Endless Gaussian data, a function of the position."""

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        draw = PositionDraw(7, (start,), part, device)
        count = part.stop - part.start
        labels = torch.zeros(count, dtype=torch.int32)
        return Batch(
            MEAN + SPREAD * draw.normal(*SHAPE),
            {"class_labels": labels},
            {"class_labels": labels + 1},
        )


class Silent:
    """A watcher that remembers losses and may stop the run."""

    def __init__(self, stop_at: tuple[int, int] | None = None) -> None:
        self.stop_at = stop_at
        self.losses: list[float] = []
        self.closed = False

    def begin(self, phase: Phase, position: Position) -> None: ...

    def step(self, phase: Phase, position: Position, losses: Mapping[str, float]) -> None:  # noqa: ARG002
        self.losses += losses.values()
        if (position.phase, position.iteration) == self.stop_at:
            raise KeyboardInterrupt

    def preview(self, student: Emission, position: Position, networks: Any) -> None: ...

    def end(self) -> None:
        self.closed = True


class GaussianContext(Context):
    """Students of Gaussian data are affine."""

    @classmethod
    def make(cls) -> "GaussianContext":
        kind = PredictionType("sample")
        teacher = Denoiser(AffineTeacher(), SCHEDULE, kind)
        classes = (Condition("class_labels", "class", 1),)
        return cls(
            "guided", teacher, Affine(), CONFIG, kind, SHAPE, classes, null={"class_labels": 1}
        )

    def student(self, *scalars: str, **inputs: Any) -> Denoiser:
        assert scalars == ("w",)
        assert not inputs
        return Denoiser(Affine(), SCHEDULE, self.prediction_type)


def gaussian_plan(iterations: int, ema: float | None = None, **changes: Any) -> Plan:
    adam = OptimizerSettings(learning_rate=0.02, decay="cosine")
    settings = guided.GuidedSettings(
        guidance_scale=(1.0, 2.0),
        start_steps=4,
        steps=(2, 1),
        fold=guided.PhaseSettings(1, OptimizerSettings(learning_rate=1e-9), "snr_plus_one"),
        halve=guided.PhaseSettings(iterations, adam),
        ema=ema,
        **changes,
    )
    return guided.plan(settings, GaussianContext.make())


def trainer(
    plan: Plan,
    folder: Path,
    watcher: Watcher,
    emitted: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    def emit(emission: Emission, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        if emitted is not None:
            emitted[emission.name] = {k: v.clone() for k, v in states["unet"].items()}

    return Trainer(
        plan,
        {"data": Gaussians()},
        TrainingSettings(**{"batch_size": 32, "checkpoint_every": 3, "log_every": 1, **settings}),
        0,
        CheckpointFolder(folder, "print"),
        emit,
        watcher,
        Accelerator(),
    )


def test_halved_students_of_gaussian_data_equal_the_teacher_of_twice_the_steps(
    tmp_path: Path,
) -> None:
    plan = gaussian_plan(400)
    emitted: dict[str, Any] = {}
    before = {"4": plan.phases[0].preview.table, "student": Affine()}
    trainer(plan, tmp_path, Silent(), emitted, clip_norm=None, checkpoint_every=1000).run()
    noise = [torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))]
    given = {"class_labels": torch.zeros(64, dtype=torch.int32), "w": torch.zeros(64)}
    teacher = run_table(before["4"], torch_networks({"unet": before["student"]}), noise, given)
    for phase in plan.phases[1:]:
        student = Affine()
        student.load_state_dict(emitted[phase.emits.name])
        made = run_table(phase.emits.table, torch_networks({"unet": student}), noise, given)
        assert (made - teacher).abs().max() < 1e-3, phase.name


def test_halved_encoders_of_gaussian_data_equal_the_encoder_of_twice_the_steps(
    tmp_path: Path,
) -> None:
    plan = gaussian_plan(400, direction="encode")
    emitted: dict[str, Any] = {"4-step": Affine().state_dict()}
    table = Halving(GaussianContext.make(), Guidance(), {"unet": "student"}, 10).deterministic(4)
    tables = {"4-step": table, **{p.emits.name: p.emits.table for p in plan.phases[1:]}}
    trainer(plan, tmp_path, Silent(), emitted, clip_norm=None, checkpoint_every=1000).run()
    image = MEAN + SPREAD * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    given = {"class_labels": torch.zeros(64), "w": torch.zeros(64), "image": image}
    made = {}
    for name, state in emitted.items():
        student = Affine()
        student.load_state_dict(state)
        networks = torch_networks({"unet": student})
        made[name] = run_table(tables[name], networks, [torch.zeros_like(image)], given)
        assert (made[name] - made["4-step"]).abs().max() < 1e-3, name


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("stop_at", [(0, 1), (1, 2), (1, 3), (1, 7), (2, 10)])
def test_a_stopped_run_ends_with_the_same_bits(
    tmp_path: Path, stop_at: tuple[int, int], ema: float | None
) -> None:
    whole: dict[str, Any] = {}
    trainer(gaussian_plan(10, ema), tmp_path / "whole", Silent(), whole).run()
    pieces: dict[str, Any] = {}
    stopped = Silent(stop_at)
    with pytest.raises(KeyboardInterrupt):
        trainer(gaussian_plan(10, ema), tmp_path / "pieces", stopped, pieces).run()
    assert stopped.closed
    trainer(gaussian_plan(10, ema), tmp_path / "pieces", Silent(), pieces).run()
    for name, state in whole.items():
        for key, value in state.items():
            assert torch.equal(value, pieces[name][key]), (name, key)


def test_accumulation_gives_the_losses_of_one_batch(tmp_path: Path) -> None:
    one, four = Silent(), Silent()
    trainer(gaussian_plan(5), tmp_path / "1", one).run()
    trainer(gaussian_plan(5), tmp_path / "4", four, gradient_accumulation=4).run()
    torch.testing.assert_close(one.losses, four.losses, rtol=1e-5, atol=1e-9)
    assert len(one.losses) == 1 + 5 + 5


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    trainer(gaussian_plan(4), tmp_path, Silent()).run()
    with pytest.raises(TrainingError, match="belongs to a run with other settings"):
        CheckpointFolder(tmp_path, "other").newest()
    newest = sorted(tmp_path.iterdir())[-1]
    (newest / "state.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(TrainingError, match=f"damaged .*remove {newest.name}"):
        CheckpointFolder(tmp_path, "print").newest()


def nan_plan(bad: set[int]) -> Plan:
    role = Role("student", Denoiser(Affine(), SCHEDULE, PredictionType("sample")), trained=True)
    calls = iter(range(1000))

    def loss(step: Step) -> Losses:
        t = torch.full((len(step.batch.x),), 500)
        value = step.roles["student"].x0(step.batch.x, t, {**step.batch.conditions, "w": t}).mean()
        return Losses({"mean": value * (float("nan") if next(calls) in bad else 1.0)})

    return Plan(
        (role,), (Phase("only", 6, (Update("student", ("student",), loss, OptimizerSettings()),)),)
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="Phase 'only', iteration 2, update 'student': not finite .mean nan"
    ):
        trainer(nan_plan({2}), tmp_path, Silent(), checkpoint_every=1).run()
    assert (
        json.loads((sorted(tmp_path.iterdir())[-1] / "position.json").read_text())["iteration"] == 2
    )


def test_such_steps_can_be_left_out_up_to_a_limit(tmp_path: Path) -> None:
    plan = nan_plan({2})
    trainer(plan, tmp_path / "a", Silent(), nan_policy="skip").run()
    assert all(bool(torch.isfinite(p).all()) for p in plan.roles[0].network.parameters())
    with pytest.raises(TrainingError, match="iteration 3"):
        trainer(nan_plan({1, 2, 3}), tmp_path / "b", Silent(), nan_policy="skip", nan_limit=2).run()


def test_every_and_offset_choose_the_iterations_and_unroll_carries_the_state(
    tmp_path: Path,
) -> None:
    seen: list[tuple[str, int, Any]] = []

    def loss(name: str) -> Any:
        def run(step: Step) -> Losses:
            seen.append((name, step.index, step.carry))
            total = sum(p.sum() for p in step.roles["student"].network.parameters()) * 0.0
            return Losses({"zero": total}, carry=step.index + 10)

        return run

    role = Role("student", Denoiser(Affine(), SCHEDULE, PredictionType("sample")), trained=True)
    updates = (
        Update("a", ("student",), loss("a"), OptimizerSettings(), unroll=2),
        Update("b", ("student",), loss("b"), OptimizerSettings(), every=2, offset=1),
    )
    trainer(Plan((role,), (Phase("only", 3, updates),)), tmp_path, Silent()).run()
    a = [("a", 0, None), ("a", 1, 10)]
    assert seen == [*a, *a, ("b", 0, None), *a]


@pytest.mark.parametrize(
    ("dues", "wanted", "mean"),
    [
        ([(1, 0)], 4, 2.0),  # every update every time
        ([(10, 0), (1, 0)], 11, 2.1),  # DMD2's student once in ten iterations of the critic
        ([(5, 0), (1, 0)], 6, 2.2),
        ([(2, 0), (2, 1)], 4, 1.5),  # CTM's student and critic in turn
    ],
)
def test_a_dry_run_times_whole_cycles_of_updates_that_have_run_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dues: list[tuple[int, int]],
    wanted: int,
    mean: float,
) -> None:
    now = 0.0

    def loss(seconds: float, first: list[bool]) -> Any:
        def run(step: Step) -> Losses:
            nonlocal now
            now += seconds + 100 * (not first)  # what is made once
            first.append(True)
            total = sum(p.sum() for p in step.roles["student"].network.parameters()) * 0.0
            return Losses({"zero": total})

        return run

    role = Role("student", Denoiser(Affine(), SCHEDULE, PredictionType("sample")), trained=True)
    costs = [2.0] if len(dues) == 1 else [1.0, 2.0]
    updates = tuple(
        Update(f"{cost}", ("student",), loss(cost, []), OptimizerSettings(), *due)
        for cost, due in zip(costs, dues, strict=True)
    )
    phase = Phase("only", 1000, updates)
    count = timed_iterations(phase, 4)
    assert count == wanted
    watch = Stopwatch()
    monkeypatch.setattr("time.perf_counter", lambda: now)
    plan = Plan((role,), (dataclasses.replace(phase, iterations=count),))
    trainer(plan, tmp_path, watch).run()
    assert watch.seconds["only"] == pytest.approx(mean)


def test_randomness_depends_on_the_position_alone_and_not_on_the_split() -> None:
    whole = PositionDraw(0, (1, 2), Slice(8, 0, 8), torch.device("cpu"))
    halves = [PositionDraw(0, (1, 2), Slice(8, i, i + 4), torch.device("cpu")) for i in (0, 4)]
    assert torch.equal(whole.normal(3), torch.cat([half.normal(3) for half in halves]))
    assert torch.equal(whole.integers(0, 9), torch.cat([half.integers(0, 9) for half in halves]))
    assert halves[0].shared_integer(0, 1000) == halves[1].shared_integer(0, 1000)
    other = PositionDraw(0, (1, 3), Slice(8, 0, 8), torch.device("cpu"))
    assert not torch.equal(whole.normal(3), other.normal(3))


def test_every_epoch_shows_each_sample_once_in_its_own_order() -> None:
    order = EpochOrder(0, 10)
    indices = order.indices(0, 30).reshape(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in indices)
    assert not torch.equal(indices[0], indices[1])
    assert torch.equal(EpochOrder(0, 10).indices(7, 6), order.indices(0, 30)[7:13])


@pytest.mark.parametrize(
    ("decay", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)]
)
def test_learning_rate_curves(decay: Any, middle: float, end: float) -> None:
    settings = OptimizerSettings(warmup=10, decay=decay)
    assert curve(settings, 0, 110) == pytest.approx(1 / 11)
    assert curve(settings, 10, 110) == 1
    assert curve(settings, 60, 110) == pytest.approx(middle)
    assert curve(settings, 110, 110) == pytest.approx(end)
