"""A stock UNet2DConditionModel with further inputs: nothing changes at first, and w opens in diffusers' own class."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from edgedistill.errors import ConfigError
from edgedistill.models import store
from edgedistill.models.extend import bake, extend
from edgedistill.models.inputs import Inputs
from edgedistill.models.residuals import residual_encoder


@pytest.fixture
def stock() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def feeds(network: torch.nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for spec in store.signature(network).inputs:
        shape = [2, *(5 if size == "length" else int(size) for size in spec.shape[1:])]
        value = torch.randn(shape, generator=generator)
        made[spec.name] = 500 + 100 * value if spec.kind in ("t", "s") else value
    return made


@torch.no_grad()
def test_untrained_inputs_change_nothing_and_storage_keeps_every_bit(
    stock: UNet2DConditionModel, tmp_path: Path
) -> None:
    network = extend(stock, Inputs({"w": 1000.0, "s": 1.0}, image_channels=2, residuals=True))
    given = feeds(network)
    zeros = {n: v * 0 if n.startswith("residual_") else v for n, v in given.items()}
    wanted = stock(*(given[n] for n in ("sample", "timestep", "encoder_hidden_states"))).sample
    torch.testing.assert_close(network(**zeros), wanted, rtol=0, atol=1e-6)
    assert (network(**given) - wanted).abs().max() > 1e-2
    store.save(network, tmp_path)
    assert torch.equal(store.load(tmp_path)(**given), network(**given))


@torch.no_grad()
def test_a_student_of_w_opens_in_diffusers_and_takes_the_embedding_of_its_pipelines(
    stock: UNet2DConditionModel, tmp_path: Path
) -> None:
    from diffusers import LatentConsistencyModelPipeline

    network = extend(stock, Inputs({"w": 1000.0}))
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.1)
    store.save(network, tmp_path)
    opened = UNet2DConditionModel.from_pretrained(tmp_path)
    given = feeds(network)
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    embedding = embed(None, given["w"], opened.config.time_cond_proj_dim)
    made = opened(
        given["sample"],
        given["timestep"],
        given["encoder_hidden_states"],
        timestep_cond=embedding,
    ).sample
    torch.testing.assert_close(made, network(**given), rtol=0, atol=1e-5)


@torch.no_grad()
def test_baked_guidance_is_a_stock_network_equal_at_its_w(
    stock: UNet2DConditionModel, tmp_path: Path
) -> None:
    network = extend(stock, Inputs({"w": 1000.0}))
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.1)
    baked = bake(network, 0.7)
    assert type(baked) is UNet2DConditionModel
    assert baked.config.time_cond_proj_dim is None
    given = feeds(network)
    plain = {name: value for name, value in given.items() if name != "w"}
    same, other = (network(**{**plain, "w": torch.full((2,), w)}) for w in (0.7, 0.2))
    torch.testing.assert_close(baked(**plain).sample, same, rtol=0, atol=1e-5)
    assert (other - same).abs().max() > 1e-2
    store.save(baked, tmp_path)
    assert "w" not in {spec.name for spec in store.signature(store.load(tmp_path)).inputs}
    opened = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(opened(**plain).sample, baked(**plain).sample)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Inputs({"w": 1000.0, "s": 1.0}), "this one takes: w, s"),
        (Inputs({"w": 1000.0}, image_channels=2), "this one takes: w, image"),
        (Inputs(residuals=True), "this one takes: residuals"),
    ],
)
def test_only_guidance_is_baked(stock: UNet2DConditionModel, inputs: Inputs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bake(extend(stock, inputs), 0.7)
    with pytest.raises(ConfigError, match="cannot be baked into a UNet2DConditionModel"):
        bake(stock, 0.7)


@torch.no_grad()
def test_a_mask_hides_what_is_drawn_and_is_seen(stock: UNet2DConditionModel) -> None:
    network = extend(stock, Inputs(image_channels=4, mask=True))
    torch.nn.init.normal_(network.conv_in.weight)
    given = feeds(network)
    drawn = {**given, "mask": torch.ones_like(given["mask"])}
    other = {**drawn, "image": drawn["image"] + 1}
    assert torch.equal(network(**drawn), network(**other))
    kept = {**drawn, "mask": torch.zeros_like(drawn["mask"])}
    assert not torch.equal(network(**drawn), network(**kept))
    assert not torch.equal(network(**kept), network(**{**kept, "image": other["image"]}))


@torch.no_grad()
def test_a_copied_encoder_answers_with_what_its_base_has_there(
    stock: UNet2DConditionModel, tmp_path: Path
) -> None:
    base = extend(stock, Inputs(residuals=True))
    encoder = residual_encoder(stock, base, Inputs({"w": 1000.0}, image_channels=1))
    given = feeds(encoder)
    shapes = [spec.shape[1:] for spec in store.signature(base).inputs if spec.kind == "residual"]
    made = encoder(**given)
    assert [tuple(value.shape[1:]) for value in made] == shapes
    assert all(value.abs().max() == 0 for value in made)
    met: list[Tensor] = []
    for block in (stock.conv_in, *stock.down_blocks, stock.mid_block):
        block.register_forward_hook(lambda *call: met.append(call[2]))
    stock(*(given[n] for n in ("sample", "timestep", "encoder_hidden_states")))
    skips = [met[0], *(skip for _, made in met[1:-1] for skip in made), met[-1]]
    for conv in encoder.zero_convs:
        torch.nn.init.eye_(conv.weight[..., 0, 0])
    for value, skip in zip(encoder(**given), skips, strict=True):
        torch.testing.assert_close(value, skip, rtol=0, atol=1e-5)
    store.save(encoder, tmp_path)
    for value, again in zip(encoder(**given), store.load(tmp_path)(**given), strict=True):
        assert torch.equal(value, again)
