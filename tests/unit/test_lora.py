"""Low-rank updates: zero at first, merged to a stock network, and all that is trained."""

import re
from pathlib import Path

import pytest
import torch

from edgedistill.config import build
from edgedistill.errors import ConfigError
from edgedistill.methods.plan import Batch, Plan, Step
from edgedistill.methods.registry import METHODS
from edgedistill.models import store
from edgedistill.models.extend import extend
from edgedistill.models.inputs import Inputs
from edgedistill.models.lora import LoraSettings, has_updates, inject, is_trained, merged
from edgedistill.student import Student
from edgedistill.teacher import Teacher
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.prepare import context_of
from edgedistill.training.recipe import Recipe, recipe_class
from edgedistill.training.run import distill

RECIPE = Path(__file__).parents[2] / "examples" / "digits_guided.yaml"
SHORT = [
    "guided.start_steps=2",
    "guided.steps=[2, 1]",
    "guided.fold.iterations=3",
    "guided.halve.iterations=3",
    "training.batch_size=8",
    "training.preview_every=0",
    "training.tensorboard=false",
]


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(3, 1, 8, 8, generator=generator),
        "timestep": torch.tensor([0.0, 500.0, 999.0]),
        "class_labels": torch.tensor([0, 1, 2]),
        "w": torch.tensor([0.0, 0.5, 1.0]),
    }


@torch.no_grad()
def test_untrained_updates_change_nothing_and_trained_ones_merge_into_a_stock_network() -> None:
    teacher = Teacher.open("digits").network
    plain = extend(teacher, Inputs({"w": 1000.0}))
    network = inject(extend(teacher, Inputs({"w": 1000.0})), LoraSettings(rank=4, alpha=8))
    assert has_updates(network)
    assert not has_updates(plain)
    assert torch.equal(network(**inputs()), plain(**inputs()))
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    changed = network(**inputs())
    assert (changed - plain(**inputs())).abs().max() > 1e-2
    plain.load_state_dict(merged(network, network.state_dict()))
    torch.testing.assert_close(plain(**inputs()), changed, rtol=0, atol=1e-5)


def test_only_updates_and_added_inputs_are_trained_and_the_student_is_an_ordinary_folder(
    tmp_path: Path,
) -> None:
    recipe = Recipe.load(RECIPE, [*SHORT, "lora={rank: 4}"])
    student = distill(recipe, tmp_path / "student", quiet=True)
    assert Student.open(student.root).provenance["recipe"]["lora"]["rank"] == 4
    before = Teacher.open("digits").network.state_dict()
    after = store.load(student.root / "unet").state_dict()
    assert set(after) - set(before) == {"time_embedding.cond_proj.weight"}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [
        n for n in moved if not re.search("conv[12].weight|time_emb_proj.weight|to_[qkv]|to_out", n)
    ]
    for name in moved:
        change = (after[name] - before[name]).flatten(1).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 4, name


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no layer whose name ends with to_nothing"):
        inject(torch.nn.Linear(2, 2), LoraSettings(targets=("to_nothing",)))
    network = Teacher.open("digits").network
    assert not is_trained("conv_in.weight", network)
    assert is_trained("time_embedding.cond_proj.weight", network)


def plan_of(method: str, teacher: str = "digits", **settings: object) -> Plan:
    data = {"name": "low", "teacher": teacher, "data": teacher, "method": method, method: settings}
    recipe = build(recipe_class(method), {**data, "lora": {"rank": 2}}, "test")
    context = context_of(recipe, Teacher.open(teacher), None)
    return METHODS[method].plan(recipe.settings, context)


@pytest.mark.parametrize(
    ("teacher", "whole"),
    [
        ("digits", {"conv_image.weight"}),
        ("captioned_digits", {"conv_in.weight", "conv_in.bias"}),
    ],
)
def test_a_smaller_image_is_learnt_to_be_seen(teacher: str, whole: set[str]) -> None:
    plan = plan_of("lowdiff", teacher, factors=[2, 1], shares=[0.01, 0.99], steps=[[1, 1]])
    (student, _) = plan.roles
    for name, parameter in student.network.named_parameters():
        parameter.requires_grad_(student.is_trained(name))
    trained = {n: p for n, p in student.network.named_parameters() if p.requires_grad}
    added = {"time_embedding.cond_proj.weight", *whole}
    assert {name for name in trained if ".lora_" not in name} == added
    generator = torch.Generator().manual_seed(0)
    given = {
        spec.name: torch.randn(4, 5, int(spec.shape[-1]), generator=generator)
        if spec.kind == "text"
        else torch.zeros(4, dtype=torch.int32)
        for spec in Teacher.open(teacher).signature.inputs
        if spec.kind in ("text", "class")
    }
    batch = Batch(torch.randn(4, 1, 8, 8, generator=generator), given, {})
    draw = PositionDraw(0, ("larger",), Slice(4, 0, 4), torch.device("cpu"))
    losses = plan.phases[0].updates[0].loss(Step({"student": student.module}, batch, draw)).terms
    assert list(losses) == ["unet_8"]
    losses["unet_8"].backward()
    # Of a wider first layer, the channels behind the state's are the image's.
    stem = trained[min(whole - {"conv_in.bias"})].grad[:, -1]
    assert stem.abs().max() > 0


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("guide", {"widths": [8, 8]}, "A guide's base stays as it is.*leave `lora` out"),
        ("codi", {}, "An adapter's base stays as it is.*leave `lora` out"),
        (
            "lowdiff",
            {"factors": [1], "steps": [[2]], "start": "random"},
            "Low-rank updates of random weights.*`lowdiff.start: teacher`",
        ),
    ],
)
def test_updates_that_nothing_would_train_are_refused(
    method: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(method, **settings)
