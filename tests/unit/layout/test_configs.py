"""Configurations of the networks: the keys that loaders read, agreement among them, and with the guidance."""

import pytest

from edgedistill.layout.checking import check_layout
from edgedistill.layout.folder import INDEX
from edgedistill.stock import LOADERS

UNET, TEXT, TEXT_2 = "unet/config.json", "text_encoder/config.json", "text_encoder_2/config.json"
VAE, ENCODER = "vae_decoder/config.json", "vae_encoder/config.json"
# A small autoencoder in place of the other: its encoder gives latents without a distribution.
SMALL = {"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}
LATENTS = ("latent_parameters f32 B,8", "latent_sample f32 B,4")
TINY = {
    **dict.fromkeys(("vae/config.json", VAE, ENCODER), SMALL),
    **dict.fromkeys(("vae_encoder/model.onnx", "vae_encoder/openvino_model.xml"), LATENTS),
}
SINGLE = "LatentConsistencyModelPipeline"
# fmt: off
ERRORS = [
    *(({UNET: {key: ...}}, "sdxl", LOADERS[1:], UNET, f"`{key}`", "no such key") for key in ("in_channels", "sample_size", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim")),
    *(({TEXT: {key: ...}}, "sd", LOADERS[1:], TEXT, f"`{key}`", "no such key") for key in ("max_position_embeddings", "num_hidden_layers", "hidden_size", "vocab_size")),
    ({TEXT_2: {"projection_dim": ...}}, "sdxl", LOADERS[1:], TEXT_2, "`projection_dim`", "no such key"),
    *(({VAE: {key: ...}}, "sd", LOADERS[1:], VAE, f"`{key}`", "no such key") for key in ("scaling_factor", "latent_channels", "in_channels", "out_channels", "block_out_channels")),
    ({ENCODER: {"scaling_factor": 1.0}}, "sd", LOADERS[1:], ENCODER, "0.18215", "1.0"),
    ({TEXT: {"hidden_size": 16}}, "sd", LOADERS, UNET, "`cross_attention_dim` 16", "8"),
    ({UNET: {"out_channels": 8}}, "sd", LOADERS, UNET, "`out_channels` 4", "8"),
    ({UNET: {"time_cond_proj_dim": None}}, "lcm", LOADERS[:4], UNET, "'embedded'", "null"),
    ({UNET: {"time_cond_proj_dim": 256}}, "sd", LOADERS[:4], UNET, "null, for the guidance mode", "256"),
    ({UNET: {"time_cond_proj_dim": 256}}, "sd", LOADERS[1:4], "unet/", "input `timestep_cond`", "inputs sample"),
    ({INDEX: {"_class_name": SINGLE}}, "sd", LOADERS[:4], UNET, SINGLE, "null"),
]
WARNINGS = [
    ({UNET: {"time_cond_proj_dim": ...}}, "sd", ["ort", "openvino"], UNET, "`time_cond_proj_dim`", "no such key"),
    (TINY, "sd", ["genai"], ENCODER, "AutoencoderKL for image-to-image", "AutoencoderTiny"),
]
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_a_configuration_that_lacks_a_key_or_contradicts_another_is_found(assert_found, case):
    assert_found("error", case)


@pytest.mark.parametrize("case", WARNINGS)
def test_a_configuration_with_a_trap_is_found(assert_found, case):
    assert_found("warning", case)


def test_tables_without_guidance_are_a_trap_for_optimum(assert_found, table):
    changes = {"sampler.json": table(2, "none")}
    assert_found("warning", (changes, "sd", ["ort"], INDEX, "IO binding turned off", "garbage"))


def test_a_small_autoencoder_suits_all_but_the_class_that_is_declared(folder):
    root = folder(TINY)
    assert check_layout(root, ["ort", "openvino"]) == []
    (found,) = check_layout(root, ["diffusers"])
    assert (found.file, found.found) == (INDEX, "'AutoencoderKL'")
