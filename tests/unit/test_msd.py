"""Multi-student distillation: partitions, the data of each student, one student as DMD2, joining, dispatch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.methods import dmd2, msd
from edgedistill.methods.context import Context
from edgedistill.methods.partition import class_ranges, principal_planes
from edgedistill.methods.plan import Batch, Emission, OptimizerSettings, Plan, Step, Stretch, Subset
from edgedistill.methods.scores import ScoreSettings, match_scores
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.run import torch_networks
from edgedistill.models.slim import CutSettings, cut
from edgedistill.models.unet import build_stock
from edgedistill.prediction import PredictionType
from edgedistill.router import route
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule
from edgedistill.student import Student
from edgedistill.table import Condition
from edgedistill.training.checkpoint import CheckpointFolder
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.join import join
from edgedistill.training.logs import Unwatched
from edgedistill.training.loop import Trainer
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill
from edgedistill.training.settings import TrainingSettings
from edgedistill.validate import validate

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
SCHEDULE = Schedule.from_config(CONFIG)
SHAPE, CLASSES = (1, 8, 8), 5
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
    "num_class_embeds": CLASSES + 1,
}
ADAM = OptimizerSettings("adam", 1e-3, decay="constant")
STAGE = dmd2.StageSettings(3, ADAM, student_gan=0.1, critic_gan=0.1, regression=0.1)
DMD2 = dmd2.DMD2Settings(
    guidance_scale=1.5,
    student_every=2,
    pairs=dmd2.PairSettings(40, 2),
    match=dataclasses.replace(STAGE, student_gan=0.0, critic_gan=0.0),
    adversarial=STAGE,
)


class Labelled:
    """Data whose every number is its class, and some that a test remembers the batches of."""

    def __init__(self, chosen: Subset | None = None) -> None:
        labels = np.arange(1000) * 7 % CLASSES
        asked = {"class_labels": labels, "pooled": np.eye(CLASSES)[labels]}
        kept = labels if chosen is None else labels[chosen(asked)]
        self.labels = torch.from_numpy(kept).int()
        self.seen: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Batch:
        return self.batch(0, Slice(count, 0, count), torch.device("cpu"))

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        index = torch.arange(start + part.start, start + part.stop) % len(self)
        labels = self.labels[index].to(device)
        self.seen |= set(labels.tolist())
        x = (labels.float() / CLASSES)[:, None, None, None].expand(-1, *SHAPE)
        return Batch(
            x, {"class_labels": labels}, {"class_labels": torch.full_like(labels, CLASSES)}
        )


class Prompts(Labelled):
    """The same, with a prompt for each class."""

    def batch(self, start: int, part: Slice, device: torch.device) -> Batch:
        batch = super().batch(start, part, device)
        pooled = torch.nn.functional.one_hot(batch.conditions["class_labels"].long(), CLASSES)
        return dataclasses.replace(batch, conditions={**batch.conditions, "pooled": pooled.float()})


TEXT = Condition(
    "encoder_hidden_states",
    "text",
    encoder="text_encoder",
    tokenizer="tokenizer.json",
    length=4,
    examples=("a",),
)


def teacher() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(build_stock(UNET).eval(), SCHEDULE, PredictionType("v_prediction"))


def context(smaller: CutSettings | None = None, **fields: Any) -> Context:
    whole = teacher()
    base = whole.network if smaller is None else cut(whole.network, smaller)
    classes = (Condition("class_labels", "class", CLASSES),)
    given = {"null": {"class_labels": CLASSES}, "samples": Labelled(), "conditions": classes}
    return Context(
        method="msd",
        teacher=whole,
        base=base,
        scheduler=CONFIG,
        prediction_type=PredictionType("v_prediction"),
        shape=SHAPE,
        **{**given, **fields},
    )


def run(plan: Plan, folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Labelled]]:
    """Train; return the last students' weights and the data by subset."""
    emitted: dict[str, dict[str, Tensor]] = {}

    def emit(emission: Emission, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        assert emission.networks.keys() == states.keys()
        emitted.clear()
        emitted.update(
            {name: {k: v.clone() for k, v in state.items()} for name, state in states.items()}
        )

    data = {"data": Labelled(), **{name: Labelled(s) for name, s in plan.subsets.items()}}
    settings = TrainingSettings(batch_size=8, clip_norm=1.0)
    checkpoints = CheckpointFolder(folder, "print")
    Trainer(plan, data, settings, 0, checkpoints, emit, Unwatched(), Accelerator()).run()
    return emitted, data


@pytest.mark.parametrize(("classes", "students"), [(10, 1), (10, 2), (10, 3), (10, 10), (1000, 4)])
def test_class_ranges_cover_everything_once_and_are_equal_within_one(
    classes: int, students: int
) -> None:
    router = class_ranges(classes, students)
    assert list(router.problems()) == []
    table = route(router, {"class_labels": np.arange(classes)})
    assert list(table) == sorted(table)
    sizes = np.bincount(table, minlength=students)
    assert sizes.sum() == classes
    assert sizes.max() - sizes.min() <= 1


def test_planes_part_embeddings_about_equally_and_near_ones_together() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(10, 16)) * 3
    kinds = np.arange(1000) % 10
    points = centres[kinds] + 0.2 * draw.normal(size=(1000, 16))
    for students, least in ((2, 490), (4, 200), (8, 80)):
        router = principal_planes(points, students)
        assert list(router.problems()) == []
        found = route(router, {"pooled": points})
        assert np.bincount(found, minlength=students).min() >= least, students
        assert np.array_equal(found, route(router, {"pooled": points.astype(np.float32)}))
        again = principal_planes(points[::-1], students)
        assert np.array_equal(route(again, {"pooled": points}), found)
    halves = [
        np.mean(route(principal_planes(points, 2), {"pooled": points})[kinds == k])
        for k in range(10)
    ]
    assert sum(share in (0.0, 1.0) for share in halves) >= 8


def test_equal_prompts_stay_together_and_too_few_are_refused() -> None:
    three = np.repeat(np.eye(3), [50, 30, 20], axis=0)
    sizes = np.bincount(route(principal_planes(three, 2), {"pooled": three}))
    assert sorted(sizes) == [50, 50]
    with pytest.raises(ConfigError, match="too alike to part them among 4"):
        principal_planes(three, 4)
    assert principal_planes(three, 1).planes == ()
    with pytest.raises(ConfigError, match="1, 2, 4, 8, ... students, got 3"):
        principal_planes(three, 3)
    with pytest.raises(ConfigError, match="6 students cannot share 5 classes"):
        class_ranges(5, 6)


@pytest.mark.parametrize("parted", ["classes", "prompts"])
def test_one_student_is_dmd2_bit_for_bit(tmp_path: Path, parted: str) -> None:
    told: dict[str, Any] = {}
    if parted == "prompts":
        told = {"conditions": (TEXT, *context().conditions), "samples": Prompts()}
    single, _ = run(dmd2.plan(DMD2, context(**told)), tmp_path / "dmd2")
    settings = msd.MSDSettings(students=1, dmd2=DMD2)
    routed, _ = run(msd.plan(settings, context(**told)), tmp_path / "msd")
    assert routed.keys() == {"unet.0"}
    for name, value in single["unet"].items():
        assert torch.equal(value, routed["unet.0"][name]), name


def test_each_student_sees_its_part_and_its_critic_starts_anew(tmp_path: Path) -> None:
    plan = msd.plan(msd.MSDSettings(students=2, dmd2=DMD2), context())
    emitted, data = run(plan, tmp_path)
    assert emitted.keys() == {"unet.0", "unet.1"}
    assert (data["part 0"].seen, data["part 1"].seen, data["data"].seen) == (
        {0, 1, 2},
        {3, 4},
        set(),
    )
    assert [phase.name for phase in plan.phases] == [
        "student 0: match", "student 0: adversarial", "student 1: match", "student 1: adversarial",
    ]  # fmt: skip
    assert plan.phases[2].copies == (("teacher", "fake"), ("blank", "head"))
    assert [phase.emits is not None for phase in plan.phases] == [False, False, False, True]
    last = plan.phases[-1].emits
    assert last.table.networks == ("unet.0", "unet.1")
    assert validate(last.table) == []


@pytest.mark.parametrize(("shared", "wanted"), [(True, {0, 1, 2, 3, 4}), (False, {3, 4})])
def test_pairs_are_of_all_classes_unless_they_are_not_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: bool, wanted: set[int]
) -> None:
    seen: set[int] = set()
    sample = dmd2.Pairs.sample

    def watched(*arguments: Any) -> Any:
        noise, batch = sample(*arguments)
        seen.update(batch.conditions["class_labels"].tolist())
        return noise, batch

    monkeypatch.setattr(dmd2.Pairs, "sample", watched)
    only = dataclasses.replace(DMD2, warm_up=Stretch(4, ADAM), match=None)
    settings = msd.MSDSettings(students=2, only=1, share_pairs=shared, dmd2=only)
    run(msd.plan(settings, context()), tmp_path)
    assert seen == wanted


def step_of(plan: Plan, student: str) -> Step:
    part = Slice(8, 0, 8)
    roles = {role.name: role.module for role in plan.roles}
    draw = PositionDraw(0, ("test",), part, torch.device("cpu"))
    return Step({**roles, "student": roles[student]}, Labelled().first(8), draw)


def test_a_student_that_is_the_teacher_has_its_scores_already() -> None:
    plan = msd.plan(msd.MSDSettings(students=1, dmd2=DMD2), context())
    step = step_of(plan, "student 0")
    losses = match_scores(step.roles["teacher"], step.roles["student"], step, 1.0)
    assert {name: value.item() for name, value in losses.terms.items()} == {
        "scores": 0.0,
        "features": 0.0,
    }


def test_smaller_students_match_scores_first_and_features_where_widths_agree(
    tmp_path: Path,
) -> None:
    score = ScoreSettings(60, OptimizerSettings("adam", 1e-3), features=1.0)
    settings = msd.MSDSettings(students=2, only=0, score=score, dmd2=DMD2)
    plan = msd.plan(settings, context(CutSettings(remove_mid_block=True)))
    assert plan.phases[0].name == "student 0: scores"
    step = step_of(plan, "student 0")
    first = plan.phases[0].updates[0].loss(step).terms
    assert set(first) == {"scores", "features"}
    run(dataclasses.replace(plan, phases=plan.phases[:1]), tmp_path)
    after = plan.phases[0].updates[0].loss(step_of(plan, "student 0")).terms
    assert all(after[name] < 0.7 * first[name] for name in first)
    with pytest.raises(ConfigError, match="set `features` of the score stage to 0"):
        msd.plan(settings, context(CutSettings(width=0.5)))
    narrow = dataclasses.replace(settings, score=dataclasses.replace(score, features=0.0))
    plan = msd.plan(narrow, context(CutSettings(width=0.5)))
    assert set(plan.phases[0].updates[0].loss(step_of(plan, "student 0")).terms) == {"scores"}


def test_a_broken_student_changes_the_others_samples_by_nothing() -> None:
    table = msd.plan(msd.MSDSettings(students=2, dmd2=DMD2), context()).phases[-1].emits.table
    networks = {"unet.0": teacher().network, "unet.1": teacher().network}
    noise = [torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(0))]
    given = {"class_labels": torch.arange(10, dtype=torch.int32) % CLASSES}
    before = run_table(table, torch_networks(networks), noise, given)
    for parameter in networks["unet.1"].parameters():
        parameter.data.fill_(float("nan"))
    after = run_table(table, torch_networks(networks), noise, given)
    first = given["class_labels"] <= 2
    assert torch.equal(before[first], after[first])
    assert bool(after[~first].isnan().all())


def test_prompts_are_parted_by_planes_through_their_embeddings() -> None:
    settings = msd.MSDSettings(students=2, dmd2=DMD2)
    router = msd.partition(settings, context(conditions=(TEXT,), samples=Prompts()))
    assert (router.kind, router.on, router.students) == ("sign_planes", "pooled", 2)
    parts = [msd.part_of(router, k)({"pooled": np.eye(CLASSES)}) for k in range(2)]
    assert np.array_equal(parts[0], ~parts[1])
    assert sorted(part.sum() for part in parts) == [2, 3]
    with pytest.raises(ConfigError, match="this teacher has neither"):
        msd.partition(settings, context(conditions=()))


def test_examples_that_there_are_none_of_part_nothing() -> None:
    settings = msd.MSDSettings(students=2, dmd2=DMD2, through="examples")
    told: dict[str, Any] = {"conditions": (TEXT,), "samples": Prompts()}
    router = msd.partition(settings, context(**told, examples=np.eye(3)))
    assert len(router.planes[0]) == 3
    with pytest.raises(ConfigError, match="there are none; set `through: data`"):
        msd.partition(settings, context(**told))


RECIPE = """
name: msd
teacher: digits
data: digits
method: msd
msd:
  students: 2
  dmd2:
    guidance_scale: 1.5
    match: {iterations: 2, optimizer: {learning_rate: 1.0e-4}}
    adversarial: null
training: {batch_size: 4, tensorboard: false}
"""


def test_students_of_different_runs_are_joined_to_what_one_run_writes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    parts = []
    for k in range(2):
        folder = tmp_path / f"part-{k}"
        parts.append(distill(Recipe.load(path, [f"msd.only={k}"]), folder, quiet=True).root)
    student = join(parts, tmp_path / "joined")
    whole = distill(Recipe.load(path), tmp_path / "whole", quiet=True)
    assert (student.name, student.table) == (whole.name, whole.table)
    assert student.signatures == whole.signatures
    assert student.provenance["parameters"] == whole.provenance["parameters"]
    names = [
        {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        for root in (student.root, whole.root)
    ]
    assert names[0] == {name for name in names[1] if not name.startswith("training/")}
    student.verify()
    # The first student's run is the first half of the whole one.
    weights = [
        root / "unet.0" / "diffusion_pytorch_model.safetensors"
        for root in (student.root, whole.root)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(ConfigError, match="No part holds unet.1"):
        join(parts[:1], tmp_path / "half")
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        join(parts, tmp_path / "joined")
    other = distill(
        Recipe.load(path, ["msd.only=0", "seed=1"]), tmp_path / "other", quiet=True
    ).root
    with pytest.raises(ConfigError, match="hold different networks `unet.0`"):
        join([*parts, other], tmp_path / "twice")
    three = distill(
        Recipe.load(path, ["msd.only=2", "msd.students=3"]), tmp_path / "three", quiet=True
    ).root
    with pytest.raises(ConfigError, match="have different samplers"):
        join([*parts, three], tmp_path / "mixed")
    assert Student.open(tmp_path / "joined").fingerprint == student.fingerprint


def test_numbers_that_name_no_student_are_refused() -> None:
    with pytest.raises(ConfigError, match="`only` must name a student from 0 to 1, got 2"):
        msd.MSDSettings(students=2, only=2)
    with pytest.raises(ConfigError, match="`students` and `embeddings` must be at least 1"):
        msd.MSDSettings(students=0)
