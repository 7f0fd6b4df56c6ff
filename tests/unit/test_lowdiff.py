"""The cascade: the identities that only the right loss, network and table satisfy."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from edgedistill.config import build
from edgedistill.errors import ConfigError, ContractError
from edgedistill.methods.context import Context
from edgedistill.methods.lowdiff import (
    LowdiffSettings,
    cascade_loss,
    draw_times,
    plan,
    prediction_error,
    stage_shapes,
    stage_times,
    told_image,
)
from edgedistill.methods.plan import Batch, Step
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import sample_torch, torch_networks
from edgedistill.network import CheckedNetwork
from edgedistill.noise import noise_bank
from edgedistill.prediction import PredictionType, x0_coefficients
from edgedistill.sampler import enter_stage, resize, run_row
from edgedistill.schedule import Schedule
from edgedistill.student import Student
from edgedistill.teacher import Teacher
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.recipe import recipe_class
from edgedistill.training.run import distill
from edgedistill.validate import validate

COUNT = 6
TWO = {"factors": (2, 1), "steps": ((4, 2),)}


@pytest.fixture(scope="module")
def context() -> Context:
    teacher = Teacher.open("digits")
    kind = PredictionType(teacher.prediction_type)
    return Context(
        "lowdiff",
        Denoiser(teacher.network, Schedule.from_config(teacher.scheduler), kind),
        teacher.network,
        dict(teacher.scheduler),
        kind,
        teacher.shape,
        teacher.conditions,
        teacher.null,
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Student:
    """A student of a short training, mostly at the larger size."""
    data = {
        "name": "tiny",
        "teacher": "digits",
        "data": "digits",
        "method": "lowdiff",
        "lowdiff": {
            "factors": [2, 1],
            "shares": [0.2, 0.8],
            "steps": [[4, 2], [2, 1]],
            "ema": 0.9,
            "train": {"iterations": 100, "optimizer": {"learning_rate": 0.003}},
        },
        "training": {"batch_size": 32, "tensorboard": False},
    }
    recipe = build(recipe_class("lowdiff"), data, "test")
    return distill(recipe, tmp_path_factory.mktemp("lowdiff") / "student", quiet=True)


def draw(seed: int, count: int = COUNT) -> PositionDraw:
    return PositionDraw(seed, ("test",), Slice(count, 0, count), torch.device("cpu"))


def batch() -> Batch:
    x = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(x, {"class_labels": torch.arange(COUNT, dtype=torch.int32)}, {})


def test_one_stage_is_the_plain_trainer(context) -> None:
    settings = LowdiffSettings(factors=(1,), steps=((4,),))
    shapes = stage_shapes(settings.factors, context.shape)
    made = copy.deepcopy(plan(settings, context).roles[0].module)
    made.network.requires_grad_(True)
    loss = cascade_loss(settings, shapes)(Step({"student": made}, batch(), draw(5))).terms["unet_8"]
    loss.backward()

    plain, numbers = context.copy_of_teacher(), draw(5)
    plain.network.requires_grad_(True)
    x = batch().x
    t, noise = numbers.integers(0, 1000), numbers.normal(1, 8, 8)
    alpha, sigma = plain.alpha_sigma(t)
    v = plain.raw(alpha * x + sigma * noise, t, batch().conditions)
    expected = (v - (alpha * noise - sigma * x)).square().mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(made.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_an_untrained_network_looks_at_neither_image_nor_size(context) -> None:
    student = plan(LowdiffSettings(**TWO), context).roles[0].module
    for size in (4, 8):
        z, t = torch.randn(COUNT, 1, size, size), torch.tensor([0, 1, 99, 400, 800, 999])
        plain = context.teacher.raw(z, t, batch().conditions)
        for value in (0.0, 1e3):
            told = {"r": torch.full((COUNT,), value), "image": torch.full_like(z, value)}
            assert torch.equal(student.raw(z, t, {**batch().conditions, **told}), plain)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_what_is_enlarged_comes_back_bit_for_bit(factor: int) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 6, 4)).astype(np.float32)
    large = resize(x, "up_nearest", (3, 6 * factor, 4 * factor))
    assert np.array_equal(resize(large, "area_down", (3, 6, 4)), x)


def test_a_stage_refuses_the_shapes_of_another(student: Student) -> None:
    (network,) = {student.folder(name) for name in ("unet_4", "unet_8")}
    module = store.load(network)
    session = torch_networks({"unet": module})["unet"]

    def run(feeds: dict) -> dict:
        return {"out_sample": session(feeds)["out_sample"].numpy()}

    for name, size in (("unet_4", 4), ("unet_8", 8)):
        checked = CheckedNetwork(name, student.signatures[name], run)
        feeds = {"timestep": 999.0, "class_labels": 3, "r": 1.0}
        for side in (4, 8):
            picture = np.zeros((2, 1, side, side), np.float32)
            given = {**feeds, "sample": picture, "image": picture}
            if side == size:
                assert checked(given)["out_sample"].shape == (2, 1, side, side)
            else:
                with pytest.raises(ContractError, match=f"`sample` must have shape 2x1x{size}"):
                    checked(given)


def test_effective_evaluations_are_counted_operations(student: Student) -> None:
    modules = {name: store.load(student.folder(name)) for name in student.signatures}
    table = student.table
    assert table.effective_nfe == table.annotations["effective_nfe"] == 4 / 4 + 2
    with FlopCounterMode(display=False) as counter:
        sample_torch(modules, table, 2)
    whole = counter.get_total_flops()
    z, told = torch.zeros(2, 1, 8, 8), {"r": torch.ones(2), "image": torch.zeros(2, 1, 8, 8)}
    labels = torch.zeros(2, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        modules["unet_8"](z, torch.zeros(2), labels, **told)
    assert whole / counter.get_total_flops() == pytest.approx(table.effective_nfe, rel=0.05)


def test_swapping_the_small_images_swaps_what_they_show(student: Student) -> None:
    modules = {name: store.load(student.folder(name)) for name in student.signatures}
    networks, table = torch_networks(modules), student.table
    first, second = table.stages
    count = 32
    noise = [torch.from_numpy(item) for item in noise_bank(table, range(count))]
    given = {"class_labels": torch.zeros(count, dtype=torch.int32)}

    def run(stage, before: Tensor | None) -> Tensor:
        z, told = enter_stage(table, stage, noise, given, before)
        for row in stage.rows:
            z = run_row(table, row, networks, z, noise, told).next
        return z

    def correlation(a: Tensor, b: Tensor) -> float:
        pair = [(item - item.mean(0)).flatten() for item in (a, b)]
        return torch.corrcoef(torch.stack(pair))[0, 1].item()

    small = run(first, None)
    for before in (small, small.flip(0)):
        kept = resize(run(second, before), "area_down", first.shape)
        assert correlation(kept, before) > 0.5
        assert correlation(kept, before.flip(0)) < 0.3


def test_one_set_of_weights_is_written_for_every_size(student: Student) -> None:
    assert sorted(path.parent.name for path in student.root.rglob("*.safetensors")) == ["unet_8"]
    assert dict(student.folders) == {"unet_4": "unet_8"}
    assert student.signatures["unet_4"].inputs[0].shape[2:] == (4, 4)
    assert list(student.samplers) == ["default", "2-1-step"]
    assert [validate(table) for table in student.samplers.values()] == [[], []]
    first, second = student.table.stages
    assert first.rows[0].feeds == {"timestep": 999.0, "r": 0.5}
    assert second.rows[0].feeds == {"timestep": 999.0, "r": 1.0}
    assert (first.carry_to, second.carry, second.carry_to) == (None, "up_nearest", "image")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "edm", "flow"])
def test_the_loss_is_the_error_of_what_is_predicted(context, kind: str) -> None:
    prediction = PredictionType(kind)
    denoiser = Denoiser(context.teacher.network, context.schedule, prediction)
    x, t = batch().x, torch.tensor([100, 200, 300, 500, 700, 900])
    alpha, sigma = denoiser.alpha_sigma(t)
    z = alpha * x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    raw = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    a_z, a_r = x0_coefficients(prediction, alpha, sigma)
    expected = (raw - (x - a_z * z) / a_r).square().mean()
    assert prediction_error(denoiser, z, t, raw, x).item() == pytest.approx(
        expected.item(), rel=1e-3
    )


def test_noise_levels_of_edm_are_lognormal(context) -> None:
    schedule = Schedule.from_config({"_class_name": "EDMEulerScheduler"})
    denoiser = Denoiser(context.teacher.network, schedule, PredictionType.EDM)
    labels = draw_times(LowdiffSettings(), denoiser, draw(0, 20000))
    logs = np.log(schedule.sigmas[labels.numpy()])
    assert (logs.mean(), logs.std()) == pytest.approx((-1.2, 1.2), abs=0.03)


def test_the_smaller_image_is_noised_and_sometimes_dropped() -> None:
    x = batch().x[:1].repeat(4000, 1, 1, 1)
    step = Step({}, Batch(x, {}, {}), draw(0, 4000))
    settings = LowdiffSettings(**TWO, image_noise=(0.1, 0.3), image_dropout=0.25)
    made = told_image(settings, step, (1, 4, 4), (1, 8, 8))
    dropped = (made == 0).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    exact = resize(resize(x, "area_down", (1, 4, 4)), "up_nearest", (1, 8, 8))
    spread = (made - exact)[~dropped].flatten(1).std(1)
    assert spread.mean().item() == pytest.approx(0.2, abs=0.01)
    assert spread.min() > 0.05


def test_stages_are_trained_on_by_their_shares() -> None:
    settings = LowdiffSettings(factors=(4, 2, 1), shares=(2.0, 1.0, 1.0), steps=((1, 1, 1),))
    parts = np.arange(0, 1 << 20, 1 << 10)
    counts = np.bincount([settings.stage(int(part)) for part in parts])
    assert counts.tolist() == [512, 256, 256]


def test_times_are_the_trailing_grid_or_favour_low_noise(context) -> None:
    for count in (1, 2, 3, 7, 16, 50):
        expected = context.schedule.timesteps(count, "trailing")
        assert stage_times(1000, count, 1.0) == expected
    assert stage_times(1000, 4, 1.5) == (999, 649, 353, 124)
    with pytest.raises(ConfigError, match="closer than the schedule's 1000 labels"):
        stage_times(1000, 50, 3.0)


def test_random_weights_depend_on_the_seed_alone(context) -> None:
    settings = LowdiffSettings(**TWO, start="random")
    first, second = (plan(settings, context).roles[0].module.network for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.conv_in.weight, context.teacher.network.conv_in.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": (1, 2)}, "`factors` must fall to 1"),
        ({"factors": (3, 2, 1)}, "each a multiple of the next"),
        ({"factors": (2,)}, "`factors` must fall to 1"),
        ({"steps": ((4, 2),)}, "must hold 3 numbers of rows"),
        ({"steps": ()}, "must hold 3 numbers of rows"),
        ({"shares": (1.0, 1.0)}, "`shares` must hold 3 positive numbers"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LowdiffSettings(**changes)


def test_factors_must_divide_the_images() -> None:
    with pytest.raises(ConfigError, match=r"`factors` \[3, 1\] do not all divide images of 8x8"):
        stage_shapes((3, 1), (1, 8, 8))


def test_the_shipped_recipe_is_read(context) -> None:
    path = Path(__file__).parents[2] / "examples" / "digits_lowdiff.yaml"
    recipe = recipe_class("lowdiff").load(path)
    assert len(plan(recipe.settings, context).phases) == 1
