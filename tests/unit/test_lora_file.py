"""LoRA files as kohya's scripts write them: which layer a name means, and what is added to its weight."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from edgedistill.errors import BundleError
from edgedistill.models import store
from edgedistill.models.lora_file import add_updates, read_lora
from edgedistill.models.lora_names import flat_names

RANK, ALPHA, SCALE = 2, 3.0, 0.7
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
OLD = ("input_blocks", "middle_block", "output_blocks", "out_", "time_embed_", "label_emb")


def layers_of(root: Path, part: str) -> dict[str, Tensor]:
    """Return the weights of a network that are matrices or kernels, by the layer's name."""
    state = store.load(root / part).state_dict()
    return {
        name.removesuffix(".weight"): value
        for name, value in state.items()
        if name.endswith(".weight") and value.ndim > 1 and "embeddings" not in name
    }


def factors(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (up, down) for a weight, kernels where it is one."""
    ones = [1] * (weight.ndim - 2)
    up = torch.randn((len(weight), RANK, *ones), generator=generator) / 10
    return up, torch.randn((RANK, *weight.shape[1:]), generator=generator) / 10


def write(path: Path, named: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """Write factors by kohya's names."""
    held: dict[str, Tensor] = {}
    for name, (up, down) in named.items():
        held |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        held[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(held, path)
    return path


def test_every_layer_of_the_unet_and_the_text_encoder_is_found(
    tiny_pipelines: Path, tmp_path: Path
) -> None:
    root, generator = tiny_pipelines / "sd", torch.Generator().manual_seed(0)
    parts = {part: layers_of(root, part) for part in ("unet", "text_encoder")}
    made = {
        (part, name): factors(weight, generator)
        for part, layers in parts.items()
        for name, weight in layers.items()
    }
    named = {PREFIXES[part] + name.replace(".", "_"): pair for (part, name), pair in made.items()}
    held = read_lora(write(tmp_path / "lora.safetensors", named))
    assert set(held) == set(parts)
    for part, layers in parts.items():
        assert len(held[part]) == len(layers) > 10
        state = store.load(root / part).state_dict()
        before = dict(state)
        add_updates(state, held[part], SCALE, "lora")
        for name, weight in layers.items():
            up, down = made[part, name]
            update = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            assert torch.equal(state[f"{name}.weight"], weight + update * (SCALE * ALPHA / RANK))
        same = [name for name in before if name.removesuffix(".weight") not in layers]
        assert all(torch.equal(state[name], before[name]) for name in same)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_names_of_the_older_unet_mean_what_diffusers_takes_them_for(
    tiny_pipelines: Path, tmp_path: Path
) -> None:
    root, generator = tiny_pipelines / "sdxl", torch.Generator().manual_seed(0)
    held = layers_of(root, "unet")
    old = {layer: flat for flat, layer in flat_names(held).items() if flat.startswith(OLD)}
    assert set(held) == set(old)
    # Those of transformers, which kohya's scripts train unless they are told to train more.
    wanted = [name for name in old if ".attentions." in name]
    named = {PREFIXES["unet"] + old[n]: factors(held[n], generator) for n in wanted}
    name = "text_model.encoder.layers.1.mlp.fc1"
    weight = layers_of(root, "text_encoder_2")[name]
    named[PREFIXES["text_encoder_2"] + name.replace(".", "_")] = factors(weight, generator)
    file = write(tmp_path / "lora.safetensors", named)
    pipeline = StableDiffusionXLPipeline.from_pretrained(root)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora(lora_scale=SCALE)
    pipeline.unload_lora_weights()
    for part, updates in read_lora(file).items():
        state = store.load(root / part).state_dict()
        before = dict(state)
        add_updates(state, updates, SCALE, str(file))
        fused = getattr(pipeline, part).state_dict()
        assert sum(not torch.equal(state[key], before[key]) for key in state) == len(updates)
        for key, value in state.items():
            torch.testing.assert_close(value, fused[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("input_blocks_7_0_skip_connection", "down_blocks.2.resnets.0.conv_shortcut"),
        ("input_blocks_8_0_out_layers_3", "down_blocks.2.resnets.1.conv2"),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_1_proj_out", "up_blocks.1.attentions.2.proj_out"),
        ("output_blocks_8_0_in_layers_2", "up_blocks.2.resnets.2.conv1"),
    ],
)
def test_blocks_are_counted_as_in_stable_diffusion_xl(name: str, layer: str) -> None:
    resnets = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
    layers = [f"mid_block.resnets.{i}.{end}" for i in range(2) for end in resnets]
    for side, count in (("down", 2), ("up", 3)):
        for block in range(3):
            ends = [f"resnets.{i}.{end}" for i in range(count) for end in resnets]
            if block != (0 if side == "down" else 2):
                ends += [
                    f"attentions.{i}.proj_{way}" for i in range(count) for way in ("in", "out")
                ]
            if block < 2:
                ends.append(f"{side}samplers.0.conv")
            layers += [f"{side}_blocks.{block}.{end}" for end in ends]
    assert flat_names(layers)[name] == layer


def test_what_is_no_such_update_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors", {"lora_unet_x_y": (torch.ones(3, 2), torch.ones(2, 3))}
    )
    with pytest.raises(BundleError, match="updates `x_y.weight` of 3x3, which the network has not"):
        add_updates({"x.z.weight": torch.ones(3, 3)}, read_lora(path)["unet"], 1.0, str(path))
    save_file({"lora_unet_x.dora_scale": torch.ones(3)}, path)
    with pytest.raises(BundleError, match="is no update as diffusers, peft or kohya write it"):
        read_lora(path)
