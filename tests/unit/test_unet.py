"""The UNet with a guidance input, its folding, its cutting and its storage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

from edgedistill.errors import BundleError, ConfigError
from edgedistill.models import store
from edgedistill.models.inputs import Inputs, scalar_embedding
from edgedistill.models.slim import CutSettings, cut
from edgedistill.models.unet import ExtendedUNet2DModel, bake_guidance, build_stock

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "num_class_embeds": 11,
}


@pytest.fixture
def stock() -> UNet2DModel:
    torch.manual_seed(0)
    return build_stock(CONFIG).eval()


def inputs(count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return x, torch.linspace(0, 999, count).round(), torch.arange(count, dtype=torch.int32)


@torch.no_grad()
def test_untrained_guidance_changes_no_bit_whatever_w(stock: UNet2DModel) -> None:
    x, t, c = inputs()
    wanted = stock(x, t, c).sample
    guided = ExtendedUNet2DModel(stock, Inputs({"w": 1000.0}))
    for w in (0.0, 0.5, 4.0):
        assert torch.equal(guided(x, t, c, w=torch.full((5,), w)), wanted)


@torch.no_grad()
def test_baked_guidance_is_a_stock_network_equal_at_its_w(stock: UNet2DModel) -> None:
    x, t, c = inputs()
    guided = ExtendedUNet2DModel(stock, Inputs({"w": 1000.0}))
    torch.nn.init.normal_(guided.time_embedding.cond_proj.weight, std=0.1)
    baked = bake_guidance(guided, 0.7)
    assert type(baked) is UNet2DModel
    same = guided(x, t, c, w=torch.full((5,), 0.7))
    other = guided(x, t, c, w=torch.full((5,), 0.2))
    torch.testing.assert_close(baked(x, t, c).sample, same, rtol=0, atol=1e-5)
    assert (other - same).abs().max() > 1e-2


def test_the_scalar_embedding_is_sines_then_cosines_of_1000_w() -> None:
    made = scalar_embedding(torch.tensor([0.0, 0.25]), 1000.0, 8)
    assert torch.equal(made[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    frequencies = 10000.0 ** (-torch.arange(4) / 3)
    wanted = torch.cat([(250 * frequencies).sin(), (250 * frequencies).cos()])
    torch.testing.assert_close(made[1], wanted, rtol=0, atol=2e-5)


def test_a_block_that_the_forward_does_not_know_is_refused() -> None:
    config = {
        **CONFIG,
        "down_block_types": ["SkipDownBlock2D"] * 2,
        "up_block_types": ["SkipUpBlock2D"] * 2,
    }
    with pytest.raises(ConfigError, match="because of: SkipDownBlock2D"):
        ExtendedUNet2DModel(build_stock(config), Inputs({"w": 1000.0}))


@torch.no_grad()
def test_nothing_cut_is_the_teacher(stock: UNet2DModel) -> None:
    x, t, c = inputs()
    assert torch.equal(cut(stock, CutSettings())(x, t, c).sample, stock(x, t, c).sample)


@pytest.mark.parametrize(
    "settings",
    [CutSettings(remove_mid_block=True), CutSettings(layers_per_block=1), CutSettings(width=0.5)],
    ids=["mid", "layers", "width"],
)
@torch.no_grad()
def test_a_cut_network_runs_is_smaller_and_nearer_to_the_teacher_than_chance(
    stock: UNet2DModel, settings: CutSettings
) -> None:
    x, t, c = inputs()
    small = cut(stock, settings)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in stock.parameters())
    wanted = stock(x, t, c).sample
    torch.manual_seed(5)
    chance = build_stock(dict(small.config)).eval()(x, t, c).sample
    assert (small(x, t, c).sample - wanted).norm() < (chance - wanted).norm()


def test_kept_layers_are_the_first_and_the_last_of_each_level(stock: UNet2DModel) -> None:
    small, full = cut(stock, CutSettings(layers_per_block=1)).state_dict(), stock.state_dict()
    pairs = {
        "down_blocks.1.resnets.0.conv1.weight": "down_blocks.1.resnets.0.conv1.weight",
        "up_blocks.0.resnets.0.conv1.weight": "up_blocks.0.resnets.0.conv1.weight",
        "up_blocks.0.resnets.1.conv1.weight": "up_blocks.0.resnets.2.conv1.weight",
        "up_blocks.1.resnets.1.conv2.weight": "up_blocks.1.resnets.2.conv2.weight",
    }
    for name, origin in pairs.items():
        assert torch.equal(small[name], full[origin]), name


def test_half_width_keeps_every_second_channel_of_hidden_and_skip_alike(stock: UNet2DModel) -> None:
    small, full = cut(stock, CutSettings(width=0.5)).state_dict(), stock.state_dict()
    # up_blocks.1.resnets.0 reads [32 hidden, 16 skip] channels.
    name = "up_blocks.1.resnets.0.conv1.weight"
    assert torch.equal(small[name], full[name][::2][:, ::2])
    assert torch.equal(small["conv_in.weight"], full["conv_in.weight"][::2])


def test_widths_that_break_normalisation_groups_are_refused(stock: UNet2DModel) -> None:
    with pytest.raises(ConfigError, match="do not divide into 4 normalisation groups"):
        cut(stock, CutSettings(width=0.6))
    with pytest.raises(ConfigError, match="must lie in .1, 2., the teacher's, got 3"):
        cut(stock, CutSettings(layers_per_block=3))


@torch.no_grad()
def test_storage_keeps_every_bit_and_a_stock_folder_opens_in_diffusers(
    stock: UNet2DModel, tmp_path: Path
) -> None:
    x, t, c = inputs()
    guided = ExtendedUNet2DModel(build_stock(CONFIG), Inputs({"w": 1000.0})).eval()
    torch.nn.init.normal_(guided.time_embedding.cond_proj.weight)
    store.save(guided, tmp_path / "guided")
    w = torch.rand(5)
    assert torch.equal(store.load(tmp_path / "guided")(x, t, c, w=w), guided(x, t, c, w=w))
    store.save(stock, tmp_path / "stock")
    opened = UNet2DModel.from_pretrained(tmp_path / "stock")
    assert torch.equal(opened(x, t, c).sample, stock(x, t, c).sample)


def test_broken_weights_are_refused_by_name(stock: UNet2DModel, tmp_path: Path) -> None:
    store.save(stock, tmp_path)
    state = {k: v.clone() for k, v in stock.state_dict().items()}
    weights = tmp_path / store.WEIGHTS
    save_file({**state, "conv_in.bias": state["conv_in.bias"] * float("nan")}, weights)
    with pytest.raises(BundleError, match="`conv_in.bias` holds NaN or infinity"):
        store.load(tmp_path)
    save_file({k: v for k, v in state.items() if k != "conv_in.bias"}, weights)
    with pytest.raises(BundleError, match="does not fit config.json at conv_in.bias"):
        store.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        store.load(tmp_path)
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(BundleError, match="diffusion_pytorch_model.bin is a pickle"):
        store.load(tmp_path)


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="`_class_name` 'Mystery' is not known"):
        store.build({"_class_name": "Mystery"}, str(tmp_path))


def test_values_that_make_no_network_are_refused_with_the_file() -> None:
    config = {**CONFIG, "_class_name": "UNet2DModel", "block_out_channels": "abc"}
    with pytest.raises(BundleError, match="here/config.json: no UNet2DModel can be built from it"):
        store.build(config, "here/config.json")
