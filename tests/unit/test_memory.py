"""What saves memory and time leaves the result: gradient checkpointing, compilation; what cannot is refused."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.methods.registry import METHODS
from edgedistill.models import store
from edgedistill.models.extend import extend
from edgedistill.models.inputs import Inputs
from edgedistill.models.residuals import residual_encoder
from edgedistill.training import run
from edgedistill.training.describe import describe
from edgedistill.training.memory import checkpoint_blocks
from edgedistill.training.recipe import Recipe, recipe_class
from edgedistill.training.settings import TrainingSettings

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
INPUTS = Inputs({"w": 1000.0}, image_channels=1)


def plain() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=3,
        **BLOCKS,
    )


def conditional() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        **BLOCKS,
    )


def encoder(stock: nn.Module) -> nn.Module:
    made = residual_encoder(stock, extend(stock, Inputs(residuals=True)), INPUTS)
    for conv in made.zero_convs:
        nn.init.normal_(conv.weight)
    return made


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "plain extended": lambda: extend(plain(), INPUTS),
    "plain encoder": lambda: encoder(plain()),
    "conditional": conditional,
    "conditional extended": lambda: extend(conditional(), INPUTS),
    "conditional encoder": lambda: encoder(conditional()),
}


def feeds(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for spec in store.signature(network).inputs:
        shape = [2, *(5 if size == "length" else int(size) for size in spec.shape[1:])]
        value = torch.randn(shape, generator=generator)
        made[spec.name] = value.long().clamp(0, 2) if spec.kind == "class" else value
    return made


def gradients(network: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of a loss, and how often the first layer of residuals was run for them."""
    runs: list[None] = []
    first = network.down_blocks[0].resnets[0]
    handle = first.register_forward_pre_hook(lambda *_: runs.append(None))
    network.zero_grad()
    loss = sum(value.square().mean() for value in store.call_outputs(network, feeds(network)))
    loss.backward()
    handle.remove()
    made = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return made, len(runs)


@pytest.mark.parametrize("kind", NETWORKS)
def test_blocks_that_are_run_again_give_the_same_gradients(kind: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[kind]()
    expected, once = gradients(network)
    checkpoint_blocks(network)
    made, twice = gradients(network)
    assert (once, twice) == (1, 2)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], value) for name, value in expected.items())


def recipe(**training: object) -> Recipe:
    return recipe_class("sfd")(
        name="short",
        teacher="digits",
        data="digits",
        method="sfd",
        sfd=METHODS["sfd"].settings(stamps=(3,), inserted=0),
        training=TrainingSettings(batch_size=4, **training),
    )


def test_the_plan_shows_the_memory_that_it_saves() -> None:
    def activations(**training: object) -> int:
        phase = describe(recipe(**training), is_sketch=True)["phases"][0]
        return phase["updates"][0]["activation_bytes"]

    whole, saved = activations(), activations(gradient_checkpointing=True)
    assert saved < 0.5 * whole
    assert 1.9 < whole / activations(gradient_accumulation=2) < 2.1


def test_the_plan_counts_the_largest_of_what_is_drawn() -> None:
    path = Path(__file__).parents[2] / "examples" / "digits_lowdiff.yaml"
    flops = {}
    for factors in ("[2,1]", "[1]"):
        steps = "[[1,1]]" if factors == "[2,1]" else "[[1]]"
        chosen = [f"lowdiff.factors={factors}", "lowdiff.shares=[]", f"lowdiff.steps={steps}"]
        plan = describe(Recipe.load(path, chosen), is_sketch=True)
        flops[factors] = plan["phases"][0]["updates"][0]["forward_flops"]
    assert 1 < flops["[2,1]"] / flops["[1]"] < 1.2  # the image's stem comes on top


def test_settings_that_leave_the_weights_as_they_are_do_not_make_another_recipe() -> None:
    assert recipe().fingerprint == recipe(gradient_checkpointing=True, log_every=1).fingerprint
    assert recipe().fingerprint != recipe(tf32=True).fingerprint


@pytest.mark.slow
def test_compiled_and_checkpointed_runs_end_with_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["sfd.main.iterations=2", "training.tensorboard=false", "training.batch_size=4"]
    path = Path(__file__).parents[2] / "examples" / "digits_sfd.yaml"
    # The compiler's graphs, run by torch itself: what it makes of them takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    states = []
    for name, further in {
        "as it is": [],
        "compiled": ["training.compile=true"],
        "checkpointed": ["training.gradient_checkpointing=true"],
    }.items():
        chosen = [*short, *further]
        student = run.distill(Recipe.load(path, chosen), tmp_path / name, quiet=True)
        states.append(store.load(student.folder("unet")).state_dict())
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for key, value in states[0].items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_networks_that_are_cut_up_among_processes_are_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    monkeypatch.setattr(run, "Accelerator", lambda **_: cutting)
    prepared = SimpleNamespace(recipe=recipe(), plan=SimpleNamespace(phases=()))
    with pytest.raises(ConfigError, match=f"configured for {kind}.*FSDP with fsdp_version: 2"):
        run.start(prepared)


def test_no_previews_are_drawn_of_networks_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    cutting = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    monkeypatch.setattr(run, "Accelerator", lambda **_: cutting)
    asks = recipe(preview_every=1)
    with pytest.raises(ConfigError, match="--set training.preview_every=0"):
        run.start(SimpleNamespace(recipe=asks, plan=SimpleNamespace(phases=())))
