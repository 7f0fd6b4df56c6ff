"""Every method under teachers of zero terminal SNR, of a flow and of x0: finite losses and gradients, valid tables."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods import dmd2
from edgedistill.methods.context import Context
from edgedistill.methods.jumps import GridSettings
from edgedistill.methods.plan import Batch, Plan, Step, Stretch, Update
from edgedistill.methods.registry import METHODS
from edgedistill.methods.sfd import SecondSettings
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.unet import build_stock
from edgedistill.prediction import prediction_of
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, SamplerTable
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.validate import validate

SHAPE, CLASSES, COUNT = (1, 8, 8), 3, 16
SCHEDULERS: dict[str, dict[str, Any]] = {
    "zero terminal SNR": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "x0": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "sample",
    },
}
GAN = dmd2.StageSettings(4, student_gan=0.1, critic_gan=0.1, regression=0.1)
DMD2 = {
    "labels": (999, 499),
    "guidance_scale": 1.5,
    "warm_up": Stretch(4),
    "pairs": dmd2.PairSettings(16, 2),
    "adversarial": GAN,
}
# The polynomial grid asks for more labels near the noise than the last two schedules have.
CTM = {
    "solver": "dpm",
    "most_steps": 3,
    "guidance_scale": 1.5,
    "grid": GridSettings("trailing", points=8),
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "guided": ("guided", {"start_steps": 4, "steps": (4, 2, 1)}),
    "guided, stochastic": (
        "guided",
        {"start_steps": 4, "steps": (4,), "sampler": "stochastic"},
    ),
    "guided, encoding": ("guided", {"start_steps": 4, "steps": (2,), "direction": "encode"}),
    "guide": ("guide", {"start_steps": 2, "steps": (1,), "widths": (8, 8), "embedding_dim": 16}),
    "dmd2": ("dmd2", DMD2),
    "msd": ("msd", {"students": 2, "dmd2": dmd2.DMD2Settings(**DMD2)}),
    "ctm": ("ctm", CTM),
    "lowdiff": ("lowdiff", {"factors": (2, 1), "steps": ((3, 2),)}),
    "sfd": ("sfd", {"stamps": (3, 5), "inserted": 1, "second": SecondSettings(inserted=1)}),
    "sfd, trailing": ("sfd", {"stamps": (3,), "grid": "trailing", "analytic_first": False}),
    "codi, leading": ("codi", {"jumps": 10, "steps": (2,)}),
    "codi, trailing": ("codi", {"jumps": 10, "steps": (2,), "spacing": "trailing"}),
}


class Ends(PositionDraw):
    """Whole numbers from the ends of their ranges alone, in turn: the noisiest label, the cleanest."""

    def integers(self, low: int, high: int) -> Tensor:
        return torch.where(super().integers(0, 2) == 0, low, high - 1)


class Data:
    """Gaussian images of some classes."""

    def __len__(self) -> int:
        return COUNT

    def first(self, count: int) -> Batch:
        labels = torch.arange(count, dtype=torch.int32) % CLASSES
        x = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        null = {"class_labels": torch.full_like(labels, CLASSES)}
        return Batch(x, {"class_labels": labels}, null)


def context(method: str, scheduler: dict[str, Any]) -> Context:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_stock(
            {
                "sample_size": 8,
                "in_channels": 1,
                "out_channels": 1,
                "down_block_types": ["DownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D"],
                "block_out_channels": [8, 16],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "add_attention": False,
                "num_class_embeds": CLASSES + 1,
            }
        ).eval()
    kind = prediction_of(scheduler)
    return Context(
        method,
        Denoiser(
            network.requires_grad_(requires_grad=False), Schedule.from_config(scheduler), kind
        ),
        network,
        scheduler,
        kind,
        SHAPE,
        (Condition("class_labels", "class", CLASSES),),
        {"class_labels": CLASSES},
        samples=Data(),
    )


def tables(plan: Plan) -> Iterator[SamplerTable]:
    for phase in plan.phases:
        for student in filter(None, (phase.preview, phase.emits)):
            yield from (student.table, *student.samplers.values())


def backward(plan: Plan, update: Update, draws: type[PositionDraw], memo: dict[str, Any]) -> None:
    """Run the positions of an update, and refuse what is not finite."""
    modules = {role.name: role.module for role in plan.roles}
    stepped = [role for role in plan.roles if role.name in update.roles]
    carry, done, index = None, False, 0
    while not done and index < update.unroll:
        for module in modules.values():
            module.zero_grad()
        draw = draws(0, (update.name, index), Slice(COUNT, 0, COUNT), torch.device("cpu"))
        losses = update.loss(Step(modules, Data().first(COUNT), draw, index, carry, memo))
        for name, value in losses.terms.items():
            assert torch.isfinite(value), (update.name, index, name)
        if losses.terms:
            torch.stack(list(losses.terms.values())).sum().backward()
            gradients = [p.grad for r in stepped for p in r.network.parameters() if p.requires_grad]
            found = [gradient for gradient in gradients if gradient is not None]
            assert all(bool(torch.isfinite(gradient).all()) for gradient in found), update.name
            assert max(float(gradient.abs().max()) for gradient in found) > 0, update.name
        carry, done, index = losses.carry, losses.done, index + 1


def test_every_method_is_here() -> None:
    assert {method for method, _ in SETTINGS.values()} == set(METHODS)


@pytest.mark.parametrize("draws", [PositionDraw, Ends], ids=["anywhere", "ends"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize(("method", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_losses_and_gradients_are_finite_and_tables_are_those_of_their_notes(
    method: str, settings: dict[str, Any], scheduler: dict[str, Any], draws: type[PositionDraw]
) -> None:
    known = METHODS[method]
    plan = known.plan(known.settings(**settings), context(method, scheduler))
    for role in plan.roles:
        for name, parameter in role.network.named_parameters():
            parameter.requires_grad_(role.is_trained(name))
    for phase in plan.phases:
        memo: dict[str, Any] = {}
        for update in phase.updates:
            backward(plan, update, draws, memo)
    assert [validate(table) for table in tables(plan)] == [[] for _ in tables(plan)]


@pytest.mark.parametrize("name", ["flow", "x0"])
def test_a_grid_that_a_schedule_is_too_coarse_for_is_refused_before_any_work(name: str) -> None:
    settings = METHODS["ctm"].settings(**{**CTM, "grid": GridSettings("polynomial", points=18)})
    with pytest.raises(ConfigError, match="too coarse for 18 time stamps .* ask for fewer"):
        METHODS["ctm"].plan(settings, context("ctm", SCHEDULERS[name]))
