"""Write a tiny pipeline of random weights, a folder as diffusers writes it: what loaders and exports are tried on.

python examples/make_tiny_pipeline.py --kind KIND OUT [--seed 0]

KIND is one of sd, sd2, lcm, sdxl, sdxl-lcm, controlnet, sdxl-controlnet, unconditional, class, dit.

The networks are those of the known architectures, each made narrow and shallow; the tokenizer is CLIP's
with a vocabulary of bytes and a few words. It takes seconds and a few megabytes.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from edgedistill.files import read_json, write_bytes, write_json
from edgedistill.teacher import ARCHITECTURES

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = """\
t h|th e</w>|i n|in g</w>|i n</w>|a n|an d</w>|o f</w>|c a|ca t</w>|d o|do g</w>|p h|ph o|pho t|phot o</w>|s h|i p</w>
sh ip</w>|b o|bo w|bow l</w>|f r|fr u|fru i|frui t</w>|s t|st r|str e|stre e|stree t</w>|r a|ra in</w>|s e
se a</w>""".replace("\n", "|").split("|")
LENGTH = 77
_UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}
_BLOCKS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
_UNETS: dict[str, dict[str, Any]] = {
    "edm-cifar10": {
        **_UNET,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "edm-imagenet64": {
        **_UNET,
        "attention_head_dim": 8,
        "attn_norm_num_groups": 4,
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "num_class_embeds": 8,
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "stable-diffusion-v1-5": {
        **_UNET,
        **_BLOCKS,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    },
    "stable-diffusion-xl-base-1.0": {
        **_UNET,
        **_BLOCKS,
        "addition_time_embed_dim": 4,
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 4 + 12,
        "transformer_layers_per_block": [1, 2],
    },
}
_VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": LENGTH,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 12,
}
_DIT = {
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 1000,  # the null class of diffusers' pipeline is number 1000
    "num_layers": 2,
    "out_channels": 8,
    "sample_size": 8,
}


def write(kind: str, folder: Path, seed: int = 0) -> None:
    """Write a pipeline.

    Args:
        kind: One of `KINDS`.
        folder: Folder to make.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        KINDS[kind]().save_pretrained(folder)


def _sd(**unet: Any) -> diffusers.DiffusionPipeline:
    name = "stable-diffusion-v1-5"
    kind = (
        diffusers.LatentConsistencyModelPipeline
        if "time_cond_proj_dim" in unet
        else diffusers.StableDiffusionPipeline
    )
    return kind(
        vae=_vae(name),
        text_encoder=_text_encoder(name),
        tokenizer=_tokenizer(),
        unet=tiny_unet(name, **unet),
        scheduler=_scheduler(diffusers.LCMScheduler if unet else diffusers.DDIMScheduler, name),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2() -> diffusers.DiffusionPipeline:
    """Make a pipeline of the architecture of Stable Diffusion 2.1."""
    name = "stable-diffusion-v1-5"
    unet: dict[str, Any] = {
        "attention_head_dim": [1, 2],
        "upcast_attention": True,
        "use_linear_projection": True,
    }
    text: dict[str, Any] = {"hidden_act": "gelu", "hidden_size": 32, "num_hidden_layers": 23}
    parts = _sd().components
    return diffusers.StableDiffusionPipeline(
        **parts
        | {
            "text_encoder": _text_encoder(name, **text),
            "tokenizer": _tokenizer(padding="!"),
            "unet": tiny_unet(name, cross_attention_dim=32, **unet),
            "scheduler": diffusers.DDIMScheduler.from_config(
                parts["scheduler"].config, prediction_type="v_prediction"
            ),
        },
        requires_safety_checker=False,
    )


def _lcm() -> diffusers.DiffusionPipeline:
    return _sd(time_cond_proj_dim=256)


def _controlnet() -> diffusers.DiffusionPipeline:
    parts = _sd().components
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=_side_of(parts["unet"]), requires_safety_checker=False
    )


def _sdxl_controlnet() -> diffusers.DiffusionPipeline:
    parts = _sdxl().components
    return diffusers.StableDiffusionXLControlNetPipeline(
        **parts, controlnet=_side_of(parts["unet"]), add_watermarker=False
    )


def _side_of(unet: diffusers.UNet2DConditionModel) -> diffusers.ControlNetModel:
    widths = (4, 8)  # of the embedding of the picture, which is twice as large as the latent
    side = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    for parameter in side.parameters():
        if not parameter.any():  # of the convolutions that are zero before training
            parameter.data.normal_()
    return side


def _sdxl(**unet: Any) -> diffusers.DiffusionPipeline:
    name = "stable-diffusion-xl-base-1.0"
    scheduler = diffusers.LCMScheduler if unet else diffusers.EulerDiscreteScheduler
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(name),
        text_encoder=_text_encoder(name),
        text_encoder_2=_text_encoder(name, "text_encoder_2"),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(padding="!"),
        unet=tiny_unet(name, **unet),
        scheduler=_scheduler(scheduler, name),
        add_watermarker=False,
    )


def _sdxl_lcm() -> diffusers.DiffusionPipeline:
    return _sdxl(time_cond_proj_dim=256)


def _unconditional() -> diffusers.DiffusionPipeline:
    return diffusers.DDIMPipeline(
        tiny_unet("edm-cifar10", num_class_embeds=None), diffusers.DDIMScheduler()
    )


def _classes() -> diffusers.DiffusionPipeline:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return diffusers.ConsistencyModelPipeline(tiny_unet("edm-imagenet64"), scheduler)


def _dit() -> diffusers.DiffusionPipeline:
    return diffusers.DiTPipeline(
        diffusers.DiTTransformer2DModel(**_DIT),
        _vae("stable-diffusion-v1-5"),
        diffusers.DDIMScheduler(clip_sample=False),
        id2label={number: f"thing {number}" for number in range(_DIT["num_embeds_ada_norm"])},
    )


KINDS: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sd": _sd,
    "sd2": _sd2,
    "lcm": _lcm,
    "sdxl": _sdxl,
    "sdxl-lcm": _sdxl_lcm,
    "controlnet": _controlnet,
    "sdxl-controlnet": _sdxl_controlnet,
    "unconditional": _unconditional,
    "class": _classes,
    "dit": _dit,
}


def tiny_unet(name: str, **further: Any) -> diffusers.ModelMixin:
    """Return a tiny network of a known architecture.

    Args:
        name: Of the architecture.
        **further: Settings of its configuration that are other ones.
    """
    config = {**read_json(ARCHITECTURES / name / "unet" / "config.json"), **_UNETS[name], **further}
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _vae(name: str) -> diffusers.AutoencoderKL:
    config = read_json(ARCHITECTURES / name / "vae" / "config.json")
    return diffusers.AutoencoderKL.from_config({**config, **_VAE})


def _text_encoder(
    name: str, part: str = "text_encoder", **further: Any
) -> transformers.PreTrainedModel:
    config = {**read_json(ARCHITECTURES / name / part / "config.json"), **_TEXT, **further}
    words = _vocabulary()
    tokens = {"bos_token_id": words[START], "eos_token_id": words[END], "pad_token_id": words[END]}
    settings = transformers.CLIPTextConfig(**{**config, **tokens, "vocab_size": len(words)})
    return getattr(transformers, config["architectures"][0])(settings)


def _scheduler(kind: Any, name: str) -> diffusers.SchedulerMixin:
    config = read_json(ARCHITECTURES / name / "scheduler" / "scheduler_config.json")
    return kind.from_config({k: v for k, v in config.items() if k != "_class_name"})


def _vocabulary() -> dict[str, int]:
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += [*(merge.replace(" ", "") for merge in MERGES), START, END]
    return {word: number for number, word in enumerate(words)}


def _tokenizer(padding: str = END) -> transformers.PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as place:
        words, merges = Path(place) / "vocab.json", Path(place) / "merges.txt"
        write_json(words, _vocabulary())
        write_bytes(merges, "\n".join(["#version: 0.2", *MERGES, ""]).encode())
        return transformers.CLIPTokenizerFast(
            str(words), str(merges), pad_token=padding, model_max_length=LENGTH
        )


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="OUT", type=Path)
    parser.add_argument("--kind", choices=list(KINDS), default="sd")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.kind, options.folder, options.seed)


if __name__ == "__main__":
    main()
