"""A guide is silent at first, leaves its base alone, and fits any base by that base's own shapes."""

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from edgedistill import pipeline
from edgedistill.data import load_digits
from edgedistill.errors import BundleError, ConfigError
from edgedistill.methods import guide
from edgedistill.methods.context import Context
from edgedistill.methods.guided import PhaseSettings
from edgedistill.methods.plan import Batch, Step
from edgedistill.methods.targets import cfg_combine
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.models.extend import extend
from edgedistill.models.guide import GuidedDenoiser, TinyGuide, tiny_guide
from edgedistill.models.inputs import SCALES, Inputs
from edgedistill.models.replace import replace_network
from edgedistill.models.residuals import residual_encoder
from edgedistill.models.run import sample_torch, torch_networks
from edgedistill.models.slim import CutSettings, cut
from edgedistill.noise import noise_bank
from edgedistill.prediction import PredictionType
from edgedistill.sampler import run_table
from edgedistill.schedule import Schedule
from edgedistill.student import Student
from edgedistill.table import Guidance
from edgedistill.teacher import Teacher
from edgedistill.training.draw import PositionDraw, Slice
from edgedistill.training.recipe import Recipe
from edgedistill.training.run import distill
from edgedistill.validate import validate
from export.assemble import export_student
from export.formats import ExportOptions

RECIPE = Path(__file__).parents[2] / "examples" / "digits_guide.yaml"
TEACHER = Teacher.open("digits")
SCHEDULE = Schedule.from_config(TEACHER.scheduler)
KIND = PredictionType(TEACHER.prediction_type)
FORMATS = ["onnx", "openvino", "coreml"]
SETTINGS = guide.GuideSettings(
    guidance_scale=(1.0, 2.0), start_steps=4, steps=(4, 2), widths=(8, 8), embedding_dim=16
)
TEXTUAL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def context(**changes: Any) -> Context:
    teacher = Denoiser(TEACHER.network, SCHEDULE, KIND)
    made = Context(
        "guide",
        teacher,
        TEACHER.network,
        TEACHER.scheduler,
        KIND,
        TEACHER.shape,
        TEACHER.conditions,
        TEACHER.null,
    )
    return dataclasses.replace(made, **changes)


def pair(guiding: nn.Module, network: nn.Module = TEACHER.network) -> GuidedDenoiser:
    base = Denoiser(extend(network, Inputs(residuals=True)), SCHEDULE, KIND)
    return GuidedDenoiser(guiding, base)


def guides() -> dict[str, nn.Module]:
    base = extend(TEACHER.network, Inputs(residuals=True))
    return {
        "tiny": tiny_guide(TEACHER.network, (8, 16), 32),
        "full": residual_encoder(TEACHER.network, base, Inputs({"w": SCALES["w"]})),
    }


def held_out() -> tuple[Tensor, Tensor, Tensor]:
    """Noised digits, times and classes."""
    data, generator = load_digits("test"), torch.Generator().manual_seed(0)
    x, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels).int()
    t = torch.randint(0, 1000, (len(x),), generator=generator)
    alpha, sigma = context().teacher.alpha_sigma(t)
    return alpha * x + sigma * torch.randn(x.shape, generator=generator), t, labels


def share_of_guidance_missed(guided: GuidedDenoiser, network: nn.Module, w: float) -> float:
    """Error to the guided network, over that of the network without guidance."""
    z, t, labels = held_out()
    plain = Denoiser(network, SCHEDULE, KIND)
    weight = torch.full((len(z),), w)
    with torch.no_grad():
        conditional = plain.raw(z, t, {"class_labels": labels})
        null = plain.raw(z, t, {"class_labels": torch.full_like(labels, 10)})
        wanted = cfg_combine(conditional, null, weight)
        got = guided.raw(z, t, {"class_labels": labels, "w": weight})
    return ((got - wanted).norm() / (conditional - wanted).norm()).item()


def digest(state: dict[str, Tensor]) -> str:
    made = hashlib.sha256()
    for name in sorted(state):
        made.update(name.encode() + state[name].numpy().tobytes())
    return made.hexdigest()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A guide after a short first stage."""
    sets = ["guide.fold.iterations=120", "guide.start_steps=8", "guide.steps=[8]", "guide.ema=0.9"]
    sets += ["training.preview_every=0", "training.tensorboard=false", "training.batch_size=32"]
    return distill(Recipe.load(RECIPE, sets), tmp_path_factory.mktemp("guide") / "s", quiet=True)


@pytest.mark.parametrize("size", ["tiny", "full"])
@torch.no_grad()
def test_an_untrained_guide_changes_no_bit(size: str) -> None:
    z, t, labels = (value[:16] for value in held_out())
    guided = pair(guides()[size])
    wanted = context().teacher.raw(z, t, {"class_labels": labels})
    for w in (0.0, 1.0):
        given = {"class_labels": labels, "w": torch.full((16,), w)}
        assert torch.equal(guided.raw(z, t, given), wanted)
    for conv in guided.network.zero_convs:
        nn.init.normal_(conv.weight, std=0.1)
    assert (guided.raw(z, t, given) - wanted).abs().max() > 0.01


@torch.no_grad()
def test_the_same_holds_for_a_network_that_reads_text() -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(**TEXTUAL).eval()
    guiding = tiny_guide(network, (8, 16), 16).eval()
    guided = pair(guiding, network)
    plain = Denoiser(network, SCHEDULE, KIND)
    z, t, text = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.randn(3, 5, 12)
    given = {"encoder_hidden_states": text, "w": torch.ones(3)}
    torch.testing.assert_close(guided.raw(z, t, given), plain.raw(z, t, given), rtol=0, atol=1e-6)
    for conv in guiding.zero_convs:
        nn.init.normal_(conv.weight, std=0.1)
    other = {**given, "encoder_hidden_states": text + 1}
    residuals = [store.call_outputs(guiding, guiding_inputs(z, t, c)) for c in (given, other)]
    assert all(not torch.equal(a, b) for a, b in zip(*residuals, strict=True))


def guiding_inputs(z: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"sample": z, "timestep": t.float(), **conditions}


@pytest.mark.parametrize(
    "network",
    [
        TEACHER.network,
        cut(TEACHER.network, CutSettings(remove_mid_block=True)),
        cut(TEACHER.network, CutSettings(width=0.5)),
        UNet2DModel(
            sample_size=(12, 7),
            block_out_channels=(8, 16, 24),
            norm_num_groups=8,
            layers_per_block=3,
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
        ),
    ],
    ids=["stock", "no middle", "narrow", "odd"],
)
@torch.no_grad()
def test_residuals_have_the_shapes_of_the_base_s_own_skips_and_middle(network: nn.Module) -> None:
    base = extend(network, Inputs(residuals=True))
    config = store.config_of(network)
    size = config["sample_size"]
    shape = tuple(size) if isinstance(size, list | tuple) else (size, size)
    sample = torch.zeros(2, config["in_channels"], *shape)
    labels = torch.zeros(2, dtype=torch.int32) if config["num_class_embeds"] else None
    embedding = base._embed(sample, torch.zeros(2), labels, {})
    skips, middle = base.encode(sample, embedding, {})
    made = tiny_guide(network, [8] * len(config["block_out_channels"]), 16).signature.outputs
    assert [spec.shape[1:] for spec in made] == [tuple(v.shape[1:]) for v in (*skips, middle)]


def test_a_tiny_guide_of_stable_diffusion_is_under_one_and_a_half_per_cent() -> None:
    with torch.device("meta"):
        base = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        made = tiny_guide(base, guide.GuideSettings().widths, guide.GuideSettings().embedding_dim)
    counts = [sum(p.numel() for p in network.parameters()) for network in (base, made)]
    assert counts == [859_520_964, 6_124_704]
    assert counts[1] / counts[0] < 0.015
    channels = [320] * 4 + [640] * 3 + [1280] * 6
    sizes = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4
    assert [spec.shape[1:] for spec in made.signature.outputs] == [
        (width, size, size) for width, size in zip(channels, sizes, strict=True)
    ]


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_gradients_reach_the_guide_alone_and_copies_share_the_base(size: Any) -> None:
    plan = guide.plan(dataclasses.replace(SETTINGS, size=size), context())
    modules = {role.name: role.module for role in plan.roles}
    assert modules["previous"].base is modules["student"].base is modules["base"]
    assert modules["previous"].network is not modules["student"].network
    assert {role.name for role in plan.roles if role.trained} == {"student"}
    for role in plan.roles:
        role.network.requires_grad_(role.trained)
    labels = torch.arange(4, dtype=torch.int32)
    batch = Batch(
        torch.randn(4, 1, 8, 8), {"class_labels": labels}, {"class_labels": labels * 0 + 10}
    )
    for index, phase in enumerate(plan.phases):
        draw = PositionDraw(0, (index,), Slice(4, 0, 4), torch.device("cpu"))
        (term,) = phase.updates[0].loss(Step(modules, batch, draw)).terms.values()
        term.backward()
    assert all(p.grad is None for n in ("base", "teacher") for p in modules[n].parameters())
    assert all(conv.weight.grad.abs().max() > 0 for conv in modules["student"].network.zero_convs)


def test_what_is_emitted_calls_the_guide_then_the_base() -> None:
    plan = guide.plan(SETTINGS, context())
    for phase, rows in zip(plan.phases, (4, 2), strict=True):
        assert phase.emits.networks == {"guide": "average", "unet": "base"}
        table = phase.emits.table
        assert [row.call for row in table.rows] == [("guide", "unet")] * rows
        assert (table.nfe, table.guidance.mode, table.guidance.input) == (rows, "embedded", "w")
        assert validate(table) == []


def test_without_the_guide_the_base_samples_as_the_stock_network_does() -> None:
    plan = guide.plan(SETTINGS, context())
    table = plan.phases[0].emits.table
    rows = tuple(dataclasses.replace(row, call=("unet",)) for row in table.rows)
    alone = dataclasses.replace(
        table, stages=(dataclasses.replace(table.stages[0], rows=rows),), guidance=Guidance()
    )
    base = extend(TEACHER.network, Inputs(residuals=True))
    noise = [torch.from_numpy(array) for array in noise_bank(table, range(6))]
    labels = {"class_labels": torch.arange(6)}
    silent = {
        spec.name: torch.zeros(6, *spec.shape[1:])
        for spec in store.signature(base).inputs
        if spec.kind == "residual"
    }
    made = run_table(alone, torch_networks({"unet": base}), noise, {**labels, **silent})
    stock = run_table(alone, torch_networks({"unet": TEACHER.network}), noise, labels)
    assert torch.equal(made, stock)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_an_untrained_guide_is_silent_on_every_runtime(size: str, tmp_path: Path) -> None:
    table = guide.plan(SETTINGS, context()).phases[0].emits.table
    modules = {"guide": guides()[size], "unet": extend(TEACHER.network, Inputs(residuals=True))}
    for name, module in modules.items():
        store.save(module, tmp_path / "s" / name)
    signatures = {name: store.signature(module) for name, module in modules.items()}
    Student(tmp_path / "s", "silent", table, signatures).write_manifest()
    options = ExportOptions(dtype="float32")
    bundle = export_student(Student.open(tmp_path / "s"), tmp_path / "b", FORMATS, options)
    zeros = {
        spec.name: np.zeros((5, *spec.shape[1:]), np.float32)
        for spec in signatures["guide"].outputs
    }
    for artifact in (f"{name}-float32" for name in FORMATS):
        opened = pipeline.load(bundle, artifact=artifact)
        z = np.random.default_rng(0).standard_normal((5, 1, 8, 8), np.float32)
        labels = np.arange(5, dtype=np.int32)
        given = {"sample": z, "timestep": 700.0, "class_labels": labels, "w": np.ones(5)}
        residuals = opened.networks["guide"](given)
        assert all(not value.any() for value in residuals.values()), artifact
        together = opened.networks["unet"]({**given, **residuals})["out_sample"]
        alone = opened.networks["unet"]({**given, **zeros})["out_sample"]
        np.testing.assert_array_equal(together, alone)
        with torch.no_grad():
            stock = TEACHER.network(
                torch.from_numpy(z), torch.full((5,), 700.0), torch.from_numpy(labels)
            ).sample.numpy()
        np.testing.assert_allclose(together, stock, rtol=0, atol=2e-5)


def test_training_leaves_the_base_as_it_was(trained: Student) -> None:
    base = store.load(trained.root / "unet").state_dict()
    assert digest(base) == digest(TEACHER.network.state_dict())
    parameters = trained.provenance["parameters"]
    assert parameters["guide"] < 0.15 * parameters["unet"]


def test_a_trained_guide_does_what_the_second_pass_did(trained: Student) -> None:
    guided = pair(store.load(trained.root / "guide"))
    for w in (0.5, 1.0):
        assert share_of_guidance_missed(guided, TEACHER.network, w) < 0.8


def test_the_same_guide_serves_a_base_that_it_never_saw(trained: Student, tmp_path: Path) -> None:
    other, generator = copy.deepcopy(TEACHER.network), torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        if parameter.ndim > 1:  # of rank 1, as a small LoRA
            flat = parameter.data.flatten(1)
            u, v = (torch.randn(n, 1, generator=generator) for n in flat.shape)
            flat += 0.1 * flat.norm() * (u @ v.T) / (u.norm() * v.norm())
    store.save(other, tmp_path / "other")
    plugged = replace_network(trained, "unet", tmp_path / "other", tmp_path / "plugged")
    base = store.load(plugged.root / "unet").state_dict()
    assert digest(base) == digest(other.state_dict()) != digest(TEACHER.network.state_dict())
    guided = pair(store.load(plugged.root / "guide"), other)
    assert share_of_guidance_missed(guided, other, 1.0) < 0.9
    plugged.verify()
    modules = {name: store.load(plugged.root / name) for name in plugged.signatures}
    apart = sample_torch(modules, plugged.table, 4, guidance_scale=2.0) - sample_torch(
        modules, plugged.table, 4, guidance_scale=1.0
    )
    assert np.abs(apart).max() > 0.05


def test_residuals_grow_with_the_guidance_where_noise_is_strong(trained: Student) -> None:
    guiding = store.load(trained.root / "guide")
    z, _, labels = held_out()
    norms = []
    for w in (0.25, 0.5, 0.75, 1.0):
        given = {"class_labels": labels, "w": torch.full((len(z),), w)}
        with torch.no_grad():
            made = store.call_outputs(
                guiding, guiding_inputs(z, torch.full((len(z),), 950.0), given)
            )
        norms.append(sum(value.square().sum() for value in made).sqrt().item())
    assert norms == sorted(norms)
    assert norms[-1] > 1.2 * norms[0]


def test_only_a_network_that_fits_is_put_in_place(trained: Student, tmp_path: Path) -> None:
    store.save(cut(TEACHER.network, CutSettings(width=0.5)), tmp_path / "narrow")
    with pytest.raises(BundleError, match="parameters are not those of the student's network"):
        replace_network(trained, "unet", tmp_path / "narrow", tmp_path / "made")
    with pytest.raises(BundleError, match="no network 'vae', only: guide, unet"):
        replace_network(trained, "vae", tmp_path / "narrow", tmp_path / "made")
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        replace_network(trained, "unet", trained.root / "unet", tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"widths": (8,)}, {}, "needs 2 widths, multiples of 8, got .8."),
        ({"widths": (8, 12)}, {}, "multiples of 8"),
        ({}, {"prediction_type": PredictionType.SAMPLE}, "base is the teacher as it is"),
        ({}, {"base": copy.deepcopy(TEACHER.network)}, "base is the teacher as it is"),
        ({}, {"null": {}}, "no null condition"),
        (
            {},
            {
                "teacher": Denoiser(TEACHER.network, SCHEDULE, PredictionType.EPSILON),
                "prediction_type": PredictionType.EPSILON,
            },
            "x0 is lost in rounding; a guide's base",
        ),
    ],
)
def test_what_makes_no_guide_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        guide.plan(dataclasses.replace(SETTINGS, **settings), context(**changes))


def test_first_weights_are_a_function_of_the_seed() -> None:
    made = [tiny_guide(TEACHER.network, (8, 8), 16, seed).state_dict() for seed in (0, 0, 1)]
    assert digest(made[0]) == digest(made[1]) != digest(made[2])
    assert isinstance(store.build(tiny_guide(TEACHER.network, (8, 8), 16).config), TinyGuide)


def test_the_encoder_setting_reaches_the_guided_pair() -> None:
    settings = dataclasses.replace(
        SETTINGS, direction="encode", halve=PhaseSettings(3), fold=PhaseSettings(3)
    )
    table = guide.plan(settings, context()).phases[-1].emits.table
    assert table.annotations["direction"] == "encode"
    assert [row.call for row in table.rows] == [("guide", "unet")] * 2
