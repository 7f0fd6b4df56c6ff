"""Configurations of the networks: the keys that loaders read, agreement among them, and with the guidance."""

import pytest

from edgedistill.layout.checking import check_layout
from edgedistill.layout.folder import INDEX
from edgedistill.stock import LOADERS

UNET, TEXT, TEXT_2 = "unet/config.json", "text_encoder/config.json", "text_encoder_2/config.json"
WHOLE, VAE, ENCODER = (f"{name}/config.json" for name in ("vae", "vae_decoder", "vae_encoder"))
AUTOENCODER = {
    "scaling_factor": (0.18215, 1.0),
    "latent_channels": (4, 8),
    "in_channels": (3, 1),
    "out_channels": (3, 1),
    "block_out_channels": ([8, 16], [8, 16, 32]),
}  # what the folders have, and another value
# A small autoencoder in place of the other: its encoder gives latents without a distribution.
SMALL = {"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}
LATENTS = ("latent_parameters f32 B,8", "latent_sample f32 B,4")
TINY = {
    **dict.fromkeys((WHOLE, VAE, ENCODER), SMALL),
    **dict.fromkeys(("vae_encoder/model.onnx", "vae_encoder/openvino_model.xml"), LATENTS),
}
SINGLE = "LatentConsistencyModelPipeline"
ADDING = ("StableDiffusion3Pipeline", "FluxPipeline")  # a shift, to latents
# fmt: off
ERRORS = [
    *(({UNET: {key: ...}}, "sdxl", LOADERS[1:], UNET, f"`{key}`", "no such key") for key in ("in_channels", "sample_size", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim")),
    *(({TEXT: {key: ...}}, "sd", LOADERS[1:], TEXT, f"`{key}`", "no such key") for key in ("max_position_embeddings", "num_hidden_layers", "hidden_size", "vocab_size")),
    ({TEXT_2: {"projection_dim": ...}}, "sdxl", LOADERS[1:], TEXT_2, "`projection_dim`", "no such key"),
    *(({VAE: {key: ...}}, "sd", LOADERS[1:], VAE, f"`{key}`", "no such key") for key in ("scaling_factor", "latent_channels", "in_channels", "out_channels", "block_out_channels")),
    *(({UNET: {key: "none"}}, "sdxl", LOADERS[1:], UNET, f"`{key}`, ", "'none'") for key in ("in_channels", "sample_size", "cross_attention_dim", "addition_time_embed_dim")),
    *(({TEXT: {key: "none"}}, "sd", LOADERS[1:], TEXT, f"`{key}`, int", "'none'") for key in ("max_position_embeddings", "num_hidden_layers", "hidden_size", "vocab_size")),
    *(({VAE: {key: "none"}}, "sd", LOADERS[1:], VAE, f"`{key}`, ", "'none'") for key in AUTOENCODER),
    *(({half: {key: other}}, "sd", LOADERS[1:], half, f"`{key}` {whole}, as vae/config.json says", str(other)) for half in (VAE, ENCODER) for key, (whole, other) in AUTOENCODER.items()),
    *(({half: {"shift_factor": 0.1}}, "sd", LOADERS[1:], half, "`shift_factor` 0, as vae/config.json says", "0.1") for half in (VAE, ENCODER)),
    ({WHOLE: {"shift_factor": 0.1}}, "sd", LOADERS[1:], VAE, "`shift_factor` 0.1, as vae/config.json says", "0"),
    *(({INDEX: {"_class_name": name}}, "sd", LOADERS[:1], WHOLE, f"`shift_factor`, int or float, which a {name} adds", "no such key") for name in ADDING),
    *(({INDEX: {"_class_name": name}, VAE: {"shift_factor": "a"}}, "sd", LOADERS[1:4], VAE, f"`shift_factor`, int or float, which a {name} adds", "'a'") for name in ADDING),
    (TINY | {WHOLE: {**SMALL, "latent_channels": 16}}, "sd", LOADERS[:1], WHOLE, "`latent_channels` 4 of AutoencoderTiny", "16"),
    (TINY | {VAE: {**SMALL, "latent_channels": 16}}, "sd", LOADERS[1:4], VAE, "`latent_channels` 4 of AutoencoderTiny", "16"),
    *((TINY | {file: {**SMALL, "scaling_factor": 0.5}}, "sd", loaders, file, "`scaling_factor` 1.0 of AutoencoderTiny", "0.5") for file, loaders in ((WHOLE, LOADERS[:1]), (VAE, LOADERS[1:4]))),
    ({TEXT: {"hidden_size": 16}}, "sd", LOADERS, UNET, "`cross_attention_dim` 16", "8"),
    ({UNET: {"out_channels": 8}}, "sd", LOADERS, UNET, "`out_channels` 4", "8"),
    ({UNET: {"time_cond_proj_dim": None}}, "lcm", LOADERS[:4], UNET, "'embedded'", "null"),
    ({UNET: {"time_cond_proj_dim": 256}}, "sd", LOADERS[:4], UNET, "null, for the guidance mode", "256"),
    ({UNET: {"time_cond_proj_dim": 256}}, "sd", LOADERS[1:4], "unet/", "input `timestep_cond`", "inputs sample"),
    ({INDEX: {"_class_name": SINGLE}}, "sd", LOADERS[:4], UNET, SINGLE, "null"),
]
WARNINGS = [
    *(({part: {"shift_factor": 0.1} for part in (WHOLE, VAE, ENCODER)}, kind, loaders, file, "`shift_factor` 0: of the loaders", "0.1") for kind in ("sd", "sdxl", "lcm") for file, loaders in ((WHOLE, LOADERS[:1]), (VAE, LOADERS[1:4]), (ENCODER, LOADERS[1:4]))),
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


@pytest.mark.parametrize("told", [None, 0, 0.0])
def test_a_shift_that_is_none_is_fine_however_it_is_told(folder, told):
    assert check_layout(folder({VAE: {"shift_factor": told}}), LOADERS) == []


def test_a_small_autoencoder_has_four_channels_only_beside_a_unet(folder):
    more = {file: {**SMALL, "latent_channels": 16, "shift_factor": 0.0} for file in (WHOLE, VAE)}
    found = check_layout(folder(TINY | more | {INDEX: {"_class_name": ADDING[0]}}), LOADERS[:4])
    assert not any("of AutoencoderTiny" in item.expected for item in found)


def test_an_autoencoder_of_another_family_is_not_held_to_what_is_known_of_one(folder):
    deep = {"_class_name": "AutoencoderDC", "encoder_block_out_channels": [8, 16]}
    deep |= dict.fromkeys(("block_out_channels", "out_channels"), ...)
    files = {
        INDEX: {
            "_class_name": "SanaPipeline",
            "unet": ...,
            "transformer": ["diffusers", "SanaTransformer2DModel"],
        },
        **dict.fromkeys((WHOLE, VAE, ENCODER), deep),
        "vae_encoder/model.onnx": LATENTS,
        "transformer/config.json": {},
        "transformer/model.onnx": "hidden_states f32 B,4,h,w -> out_sample f32 B,4,h,w",
    }
    assert check_layout(folder(files), ["ort"]) == []
