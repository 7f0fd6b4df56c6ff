"""Networks that read text are cut as others are: nothing cut is the teacher, and every kept weight is one of its own."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.models import store
from edgedistill.models.slim import CutSettings, cut

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
# What Stable Diffusion XL has beside: heads and transformers by level, and pooled text with sizes.
XL = {
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}


def network(**changes: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = store.build({**CONFIG, **changes}).eval()
    assert isinstance(made, UNet2DConditionModel)
    return made


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    given = {}
    for spec in store.signature(model).inputs:
        shape = [3, *(5 if size == "length" else int(size) for size in spec.shape[1:])]
        value = torch.randn(shape, generator=generator)
        given[spec.name] = 500 + 100 * value if spec.kind == "t" else value
    return store.call(model, given)


@pytest.mark.parametrize("changes", [{}, XL], ids=["plain", "xl"])
def test_nothing_cut_is_the_teacher(changes: dict[str, object]) -> None:
    teacher = network(**changes)
    small = cut(teacher, CutSettings())
    assert type(small) is UNet2DConditionModel
    assert torch.equal(answer(small), answer(teacher))


@pytest.mark.parametrize("changes", [{}, XL], ids=["plain", "xl"])
@pytest.mark.parametrize(
    "settings",
    [CutSettings(remove_mid_block=True), CutSettings(layers_per_block=1), CutSettings(width=0.5)],
    ids=["mid", "layers", "width"],
)
def test_a_cut_network_is_smaller_and_nearer_to_the_teacher_than_chance(
    settings: CutSettings, changes: dict[str, object]
) -> None:
    teacher = network(**changes)
    small = cut(teacher, settings)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in teacher.parameters())
    torch.manual_seed(5)
    chance = store.build(store.config_of(small)).eval()
    wanted = answer(teacher)
    assert (answer(small) - wanted).norm() < (answer(chance) - wanted).norm()


def test_kept_layers_are_the_first_and_the_last_with_their_attention() -> None:
    teacher = network()
    small, full = cut(teacher, CutSettings(layers_per_block=1)).state_dict(), teacher.state_dict()
    for own, theirs in {
        "down_blocks.0.attentions.0": "down_blocks.0.attentions.0",
        "up_blocks.1.attentions.0": "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1": "up_blocks.1.attentions.2",
        "up_blocks.1.resnets.1": "up_blocks.1.resnets.2",
    }.items():
        names = [name for name in small if name.startswith(f"{own}.")]
        assert names
        for name in names:
            assert torch.equal(small[name], full[name.replace(own, theirs, 1)]), name


def test_half_width_keeps_every_second_channel_and_reads_all_of_the_text() -> None:
    teacher = network()
    small, full = cut(teacher, CutSettings(width=0.5)).state_dict(), teacher.state_dict()
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    keys = f"{block}.attn2.to_k.weight"
    assert torch.equal(small[keys], full[keys][::2])
    hidden, gate = full[f"{block}.ff.net.0.proj.weight"].chunk(2)
    expected = torch.cat([hidden[::2, ::2], gate[::2, ::2]])
    assert torch.equal(small[f"{block}.ff.net.0.proj.weight"], expected)
    # up_blocks.1.resnets.0 reads [32 hidden, 16 skip] channels.
    name = "up_blocks.1.resnets.0.conv1.weight"
    assert torch.equal(small[name], full[name][::2][:, ::2])


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="No smaller network can be cut from a Linear"):
        cut(nn.Linear(2, 2), CutSettings())
    uneven = network(layers_per_block=[1, 2])
    with pytest.raises(ConfigError, match=r"the teacher's levels differ, having \[1, 2\]"):
        cut(uneven, CutSettings(layers_per_block=1))
    assert cut(uneven, CutSettings(remove_mid_block=True)).mid_block is None
    with pytest.raises(ConfigError, match="must lie in .1, 2., the teacher's, got 0"):
        cut(network(), CutSettings(layers_per_block=0))
