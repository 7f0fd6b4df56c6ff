"""Conditional distillation: the identities that only the right network, state and rows satisfy."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgedistill.config import build
from edgedistill.errors import ConfigError
from edgedistill.methods.codi import (
    CodiSettings,
    agreement_target,
    codi_loss,
    estimates,
    jump_grid,
    plan,
    row_times,
)
from edgedistill.methods.context import Context
from edgedistill.methods.plan import Batch, Step, Stretch
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.guide import GuidedDenoiser
from edgedistill.models.lora import LoraSettings
from edgedistill.models.slim import CutSettings, cut
from edgedistill.prediction import PredictionType
from edgedistill.probes import load_probes
from edgedistill.rows import boundary_row
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule
from edgedistill.student import EXAMPLES
from edgedistill.table import Condition, Guidance, SamplerTable, Stage
from edgedistill.teacher import Teacher
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.recipe import Recipe, recipe_class
from edgedistill.training.run import distill
from edgedistill.validate import validate

COUNT = 6
SHORT = Stretch(2)


@pytest.fixture(scope="module")
def context() -> Context:
    teacher = Teacher.open("digits")
    kind = PredictionType(teacher.prediction_type)
    return Context(
        "codi",
        Denoiser(teacher.network, Schedule.from_config(teacher.scheduler), kind),
        teacher.network,
        dict(teacher.scheduler),
        kind,
        teacher.shape,
        teacher.conditions,
        teacher.null,
    )


def draw(seed: int) -> PositionDraw:
    return PositionDraw(seed, ("test",), Slice(COUNT, 0, COUNT), torch.device("cpu"))


def images(seed: int = 0) -> Tensor:
    return torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch() -> Batch:
    labels = torch.arange(COUNT, dtype=torch.int32)
    return Batch(images(), {"class_labels": labels}, {"class_labels": labels * 0 + 10})


def perturbed(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("task", ["super_resolution", "inpainting", "edges"])
@pytest.mark.parametrize("cut", [{}, {"width": 0.5}, {"remove_mid_block": True}])
def test_an_untrained_adapter_changes_nothing_whatever_the_image(context, task, cut) -> None:
    settings = CodiSettings(task=task, cut=CutSettings(**cut))
    student = {role.name: role.module for role in plan(settings, context).roles}["student"]
    z, t = images(1) * 3, torch.tensor([0, 9, 200, 500, 800, 999])
    labels = {"class_labels": torch.arange(COUNT, dtype=torch.int32)}
    plain = context.teacher.raw(z, t, labels)
    for image in (images(2)[:, :1], torch.full((COUNT, 1, 8, 8), 1e3)):
        given = {**labels, "image": image, "mask": torch.ones(COUNT, 1, 8, 8)}
        assert torch.equal(student.raw(z, t, given), plain)
    perturbed(student.network.zero_convs)
    assert not torch.allclose(student.raw(z, t, given), plain, atol=0.1)


def test_what_lies_beneath_the_mask_is_not_seen(context) -> None:
    roles = plan(CodiSettings(task="inpainting"), context).roles
    student = {role.name: role.module for role in roles}["student"]
    perturbed(student.network.zero_convs)
    perturbed(student.network.conv_image)
    mask = torch.zeros(COUNT, 1, 8, 8)
    mask[..., 2:6, 3:7] = 1
    z, t, image = images(1), torch.full((COUNT,), 500), images(2)
    given = {"class_labels": torch.zeros(COUNT, dtype=torch.int32), "mask": mask}
    first = student.raw(z, t, {**given, "image": image})
    assert torch.equal(first, student.raw(z, t, {**given, "image": image * (1 - mask)}))
    changed = student.raw(z, t, {**given, "image": image + 0.1 * (1 - mask)})
    assert not torch.allclose(first, changed, atol=1e-3)


def test_at_label_0_the_estimate_is_the_state(context) -> None:
    z = images(4) * 2
    x0, _ = estimates(
        context.teacher, z, torch.zeros(COUNT, dtype=torch.long), batch().conditions, 10
    )
    assert torch.equal(x0, z)
    later, _ = estimates(context.teacher, z, torch.full((COUNT,), 20), batch().conditions, 10)
    plain = context.teacher.x0(z, torch.full((COUNT,), 20), batch().conditions)
    torch.testing.assert_close(later, plain, rtol=0, atol=1e-4)


class Knowing(nn.Module):
    """Predicts v as if the data were one image, and, if asked to, a little off."""

    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1}

    def __init__(self, schedule: Schedule, x: Tensor, off: float = 0.0) -> None:
        super().__init__()
        self.pairs = torch.tensor([schedule.alpha_sigma(t) for t in range(1000)]).float()
        self.x, self.off = x, off

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = self.pairs[timestep.long()].T[:, :, None, None, None]
        return (alpha * sample - self.x) / sigma + self.off * torch.cos(3 * sample + timestep[0])


def losses(context: Context, settings: CodiSettings, grid: tuple[int, ...], *off: float) -> dict:
    kind = PredictionType.V_PREDICTION
    student, average = (
        Denoiser(Knowing(context.schedule, images(), value), context.schedule, kind)
        for value in off
    )
    step = Step({"student": student, "average": average}, Batch(images(), {}, {}), draw(7))
    return codi_loss(settings, grid)(step).terms


def test_the_true_and_the_own_state_coincide_for_a_perfect_student(context) -> None:
    grid = jump_grid(context.schedule, 50, "trailing")
    by_state = {
        state: losses(context, CodiSettings(state=state), grid, 0.0, 0.1)
        for state in ("noised", "ddim")
    }
    true, own = by_state["noised"]["agreement"], by_state["ddim"]["agreement"]
    assert true.item() == pytest.approx(own.item(), rel=1e-4)
    assert true.item() > 1e-5
    assert by_state["ddim"]["guidance"].item() < 1e-9
    different = [
        losses(context, CodiSettings(state=state), grid, 0.3, 0.1)["agreement"].item()
        for state in ("noised", "ddim")
    ]
    assert different[0] != pytest.approx(different[1], rel=1e-2)


@pytest.mark.parametrize("compared", ["x", "eps"])
def test_a_jump_to_where_one_is_asks_for_nothing(context, compared: str) -> None:
    settings = CodiSettings(compared=compared)
    assert losses(context, settings, (600, 600), 0.3, 0.3)["agreement"].item() < 1e-10
    assert losses(context, settings, (600, 600), 0.3, 0.1)["agreement"].item() > 1e-4


def test_the_target_carries_no_gradient(context) -> None:
    x0, t = images(1).requires_grad_(), torch.full((COUNT,), 300)
    made = agreement_target(context.teacher, x0, images(2), t, batch().conditions, 10.0)
    assert not any(target.requires_grad for target in made)


def test_only_the_adapter_is_trained_and_it_is_small(context, tmp_path: Path) -> None:
    made = plan(CodiSettings(cut=CutSettings(remove_mid_block=True)), context)
    trained = [role.name for role in made.roles if role.trained]
    assert trained == list(made.phases[0].updates[0].roles) == ["student"]
    data = {
        "name": "tiny",
        "teacher": "digits",
        "data": "digits",
        "method": "codi",
        "codi": {"cut": {"remove_mid_block": True}, "ema": 0.0, "train": {"iterations": 3}},
        "training": {"batch_size": 4, "tensorboard": False},
    }
    student = distill(build(recipe_class("codi"), data, "test"), tmp_path / "student", quiet=True)
    base = store.load(student.root / "unet").state_dict()
    teacher = context.teacher.network.state_dict()
    assert base.keys() == teacher.keys()
    assert all(torch.equal(base[name], teacher[name]) for name in teacher)
    counts = student.provenance["parameters"]
    assert counts["adapter"] <= 0.3 * counts["unet"]
    adapter = store.load(student.root / "adapter")
    assert any(conv.weight.abs().max() > 0 for conv in adapter.zero_convs)
    assert validate(student.table) == []
    assert load_probes(student.root / EXAMPLES)["image"].shape == (32, 1, 8, 8)


@pytest.mark.parametrize("state", ["noised", "ddim"])
def test_gradients_reach_every_part_of_the_adapter_and_the_target_gives_none(
    context, state
) -> None:
    settings = CodiSettings(task="inpainting", state=state, train=SHORT)
    made = plan(settings, context)
    modules = {role.name: role.module for role in made.roles}
    for module in modules.values():
        module.requires_grad_(True)
    perturbed(modules["student"].network.zero_convs)
    (update,) = made.phases[0].updates
    terms = update.loss(Step(modules, batch(), draw(1))).terms
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in modules["student"].network.parameters())
    assert all(p.grad is None for p in modules["average"].network.parameters())
    # The base is between the adapter and the loss; nothing but the adapter is stepped.
    assert any(p.grad is not None for p in modules["base"].network.parameters())
    assert update.roles == ("student",)
    stepped = {id(p) for p in modules["student"].network.parameters()}
    assert stepped.isdisjoint(id(p) for p in modules["base"].network.parameters())
    trained = [
        (role.name, name)
        for role in made.roles
        for name, _ in role.network.named_parameters()
        if role.is_trained(name)
    ]
    assert {role for role, _ in trained} == {"student"}
    assert len(trained) == len(stepped)


def test_the_base_of_a_lone_adapter_is_the_teacher_as_it_is(context) -> None:
    other = {
        "base": cut(context.base, CutSettings(remove_mid_block=True)),
        "prediction_type": PredictionType.SAMPLE,
        "lora": LoraSettings(rank=2),
    }
    for name, value in other.items():
        changed = dataclasses.replace(context, **{name: value})
        with pytest.raises(ConfigError, match="An adapter's base.*`codi.trains: all`"):
            plan(CodiSettings(), changed)
        roles = {role.name: role for role in plan(CodiSettings(trains="all"), changed).roles}
        trained = [n for n, _ in roles["base"].network.named_parameters()]
        trained = [n for n in trained if roles["base"].is_trained(n)]
        assert trained
        assert name != "lora" or all(".lora_" in n for n in trained)


def test_low_rank_updates_are_all_that_a_network_with_channels_learns(context) -> None:
    settings = CodiSettings(control="channels", trains="all", task="inpainting")
    plain, low = (
        plan(settings, dataclasses.replace(context, lora=lora)).roles[0]
        for lora in (None, LoraSettings(rank=2))
    )
    names = [name for name, _ in low.network.named_parameters() if low.is_trained(name)]
    assert {name for name in names if ".lora_" not in name} == {"conv_image.weight"}
    assert len(names) > 1
    assert all(plain.is_trained(name) for name, _ in plain.network.named_parameters())


def test_everything_may_be_trained_and_averaged(context) -> None:
    made = plan(CodiSettings(trains="all", train=SHORT), context)
    roles = {role.name: role for role in made.roles}
    assert made.phases[0].updates[0].roles == ("base", "student")
    assert roles["base average"].follows.role == "base"
    average = roles["average"].module
    assert isinstance(average, GuidedDenoiser)
    assert average.base is roles["base average"].module
    assert made.phases[0].emits.networks == {"adapter": "average", "unet": "base average"}


def test_a_phase_before_teaches_the_task_alone(context) -> None:
    made = plan(CodiSettings(adapt=Stretch(3), train=SHORT), context)
    first, second = made.phases
    assert (first.iterations, first.emits, first.copies) == (3, None, ())
    assert (second.iterations, second.copies) == (2, (("average", "student"),))
    modules = {role.name: role.module for role in made.roles}
    terms = [phase.updates[0].loss(Step(modules, batch(), draw(1))).terms for phase in made.phases]
    assert [sorted(item) for item in terms] == [["guidance"], ["agreement", "guidance"]]


@pytest.mark.parametrize("name", ["digits_codi_super", "digits_codi_inpaint"])
def test_shipped_recipes_train_less_than_a_third(context, name: str) -> None:
    path = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    settings = Recipe.load(path).settings
    modules = {role.name: role.network for role in plan(settings, context).roles if role.trained}
    count = sum(p.numel() for module in modules.values() for p in module.parameters())
    assert count <= 0.3 * sum(p.numel() for p in context.base.parameters())


def test_an_image_may_enter_the_first_layer(context) -> None:
    made = plan(CodiSettings(control="channels", trains="all", task="inpainting"), context)
    student = made.roles[0].module
    assert [spec.name for spec in student.signature.inputs][-2:] == ["image", "mask"]
    assert made.phases[0].emits.table.networks == ("unet",)


def test_times_are_those_of_the_public_code() -> None:
    schedule = Schedule.from_config({"_class_name": "DDIMScheduler"})
    grid = jump_grid(schedule, 50, "leading")
    assert grid == tuple(range(0, 1000, 20))
    assert row_times(grid, 50, 4) == [(980, 720), (720, 460), (460, 200), (200, 0)]
    late = jump_grid(schedule, 50, "trailing")
    assert (late[0], late[1], late[-1], len(late)) == (0, 19, 999, 51)
    assert row_times(late, 50, 4) == [(999, 739), (739, 479), (479, 219), (219, 0)]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_sampler_has_as_many_rows_as_its_name_says_or_is_refused(context, spacing: str) -> None:
    grid = jump_grid(context.schedule, 50, spacing)
    possible = tuple(n for n in range(1, 51) if len(row_times(grid, 50, n)) == n)
    made = plan(CodiSettings(spacing=spacing, steps=possible), context).phases[0].emits
    assert len(made.table.rows) == 1
    assert {name: len(table.rows) for name, table in made.samplers.items()} == {
        f"{n}-step": n for n in possible[1:]
    }
    named = ", ".join(map(str, possible))
    for count in {*range(1, 51)} - {*possible}:
        with pytest.raises(ConfigError, match=rf"`steps` \[{count}\] .* choose among {named}, or"):
            plan(CodiSettings(spacing=spacing, steps=(4, count)), context)


def test_epsilon_cannot_start_where_nothing_of_x_is_left(context) -> None:
    kind = PredictionType.EPSILON
    teacher = Denoiser(context.base, context.schedule, kind)
    changed = dataclasses.replace(context, teacher=teacher, prediction_type=kind)
    plan(CodiSettings(), changed)
    with pytest.raises(ConfigError, match="cannot start where alpha is 4.9e-05"):
        plan(CodiSettings(spacing="trailing"), changed)


def toy(feeds: dict) -> dict:
    """A smooth guess of v, by class."""
    tone = np.asarray(feeds["class_labels"], np.float64)[:, None, None, None]
    return {"out_sample": np.sin(feeds["sample"] + feeds["timestep"] / 300 + tone)}


def test_the_table_is_the_loop_of_the_public_code(context) -> None:
    table = plan(CodiSettings(control="channels", trains="all"), context).phases[0].emits.table
    z = np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    labels = np.arange(3)
    wide = dataclasses.replace(table, clamp=None)
    got = run_table(wide, {"unet": toy}, [z], {"class_labels": labels})
    for t, s in [(980, 720), (720, 460), (460, 200), (200, 0)]:
        (alpha, sigma), (alpha_s, sigma_s) = map(context.schedule.alpha_sigma, (t, s))
        v = toy({"class_labels": labels, "sample": z, "timestep": t})["out_sample"]
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
        x0 = c_skip * z + c_out * (alpha * z - sigma * v)
        z = alpha_s * x0 + sigma_s * (alpha * v + sigma * z)
    assert np.abs(got - z).max() < 1e-12


def test_known_pixels_may_be_kept(context) -> None:
    settings = CodiSettings(task="inpainting", control="channels", trains="all", keeps=True)
    table = plan(settings, context).phases[0].emits.table
    assert validate(table) == []
    mask = np.zeros((3, 1, 8, 8))
    mask[:, :, 2:5] = 1
    image = np.random.default_rng(1).uniform(-1, 1, (3, 1, 8, 8))
    z = np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    given = {"class_labels": np.arange(3), "image": image, "mask": mask}
    made = run_table(table, {"unet": toy}, [z], given)
    assert np.array_equal(made[mask == 0], image[mask == 0])
    assert not np.any(made[mask == 1] == image[mask == 1])


def test_guidance_of_0_is_the_unconditional_branch(context) -> None:
    row = boundary_row(context.schedule, 980, 0, "v_prediction", guidance_scale=0.0)
    cfg = Guidance("cfg", None, 0.0, (0.0, 2.0), {"class_labels": 10})
    classes = (Condition("class_labels", "class", 10),)
    table = SamplerTable((Stage((1, 8, 8), (row,)),), 1, guidance=cfg, conditions=classes)
    z = np.random.default_rng(0).standard_normal((3, 1, 8, 8))
    seen = []
    run_table(table, {"unet": toy}, [z], {"class_labels": np.arange(3)}, seen.append)
    null = toy({"class_labels": np.full(3, 10), "sample": z, "timestep": 980.0})["out_sample"]
    assert np.array_equal(seen[0].raw, null)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, r"`steps` must lie in \[1, 50\]"),
        ({"steps": (51,)}, r"`steps` must lie in \[1, 50\]"),
        ({"control": "channels"}, "set `trains: all` and leave `cut` out"),
        ({"agreement": 0.0, "guidance": 0.0}, "nor the first two both 0"),
        ({"agreement": -1.0}, "must not be negative"),
        ({"keeps": True}, "`keeps` is for inpainting"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodiSettings(**changes)


def test_a_factor_must_divide_the_images(context) -> None:
    with pytest.raises(ConfigError, match="`factor` 3 does not divide images of 8x8"):
        plan(CodiSettings(factor=3), context)
