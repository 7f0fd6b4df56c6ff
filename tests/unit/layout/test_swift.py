"""Core ML packages for Apple's Swift package: names, outputs, batches, chunks, compiled models, Stable Diffusion 3."""

import pytest

from edgedistill.layout.checking import check_layout
from edgedistill.layout.folder import INDEX

PACKAGE = "coreml/packages/Stable_Diffusion_version_tiny_{}.mlpackage"
UNET, DECODER, TEXT, MMDIT = map(PACKAGE.format, ("unet", "vae_decoder", "text_encoder", "mmdit"))
CHUNK_1, CHUNK_2 = map(PACKAGE.format, ("unet_chunk1", "unet_chunk2"))
COMPILED = "coreml/Resources/{}.mlmodelc/metadata.json"
FIRST = "sample f16 2,4,8,8 | timestep f16 2 -> input_2 f16 2,8,1,64"
SECOND = "input_2 f16 2,8,1,64 | encoder_hidden_states f16 2,8,1,77 -> noise_pred f32 2,4,8,8"
BOTH = {CHUNK_1: FIRST, CHUNK_2: SECOND}
ALONE = {**BOTH, UNET: ...}
# fmt: off
ERRORS = [
    ({UNET: ("noise_pred f32 2,4,8,8", "noise_pred f32 2,4,8,8 | more f32 2,4,8,8")}, "sd", ["swift"], UNET, "outputs noise_pred", "output `more`"),
    ({DECODER: ("image f32 1,3,16,16", "image f32 1,3,16,16 | more f32 1")}, "sd", ["swift"], DECODER, "outputs image", "output `more`"),
    ({UNET: ("sample f16", "timestep_cond f16 1,256 | sample f16")}, "lcm", ["swift"], UNET, "inputs sample", "`timestep_cond`"),
    ({UNET: ("2,8,1,77", "2,77,8")}, "sd", ["swift"], UNET, "rank 4", "rank 3"),
    ({UNET: ("timestep f16 2", "timestep f16 1")}, "sd", ["swift"], UNET, "with batch 2", "[1]"),
    ({UNET: (" 2,", " 3,")}, "sd", ["swift"], UNET, "batch 1 or 2", "batch 3"),
    ({UNET: (" 2,", " 1,")}, "sdxl", ["swift"], UNET, "batch 2", "batch 1"),
    ({UNET: (" 1,", " 2,")}, "lcm", ["swift"], UNET, "batch 1 for guidance 'embedded'", "batch 2"),
    ({COMPILED.format(name): "[]" for name in ("Unet", "UnetChunk1", "UnetChunk2")}, "sd", ["swift"], "coreml/Resources/Unet.mlmodelc", "either", "UnetChunk1.mlmodelc"),
    ({"coreml/Resources/Unet.mlmodelc/model.mil": ""}, "sd", ["swift"], COMPILED.format("Unet"), "description", "no such file"),
    (ALONE | {CHUNK_2: SECOND.replace("input_2", "input_3")}, "sd", ["swift"], CHUNK_2, "outputs of chunk 1", "`input_3`"),
    (ALONE | {CHUNK_2: f"{SECOND} | more f32 2"}, "sd", ["swift"], CHUNK_2, "one output `noise_pred`", "noise_pred, more"),
    ({CHUNK_1: FIRST, UNET: ...}, "sd", ["swift"], CHUNK_2.replace("tiny", "NAME"), "both chunks", "no such"),
    (BOTH | {UNET: (" -> ", " -> constexpr_lut_to_dense -> ")}, "sd", ["swift"], CHUNK_1, "constexpr_lut_to_dense", "not packed"),
]
WARNINGS = [
    ({UNET: (" 2,", " 1,")}, "sd", ["swift"], UNET, "batch 2 for guidance 'cfg'", "batch 1"),
    (BOTH, "sd", ["swift"], UNET, "either", "unet_chunk1"),
]
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_a_package_that_swift_cannot_open_or_run_is_found(assert_found, case):
    assert_found("error", case)


@pytest.mark.parametrize("case", WARNINGS)
def test_a_package_with_a_trap_is_found(assert_found, case):
    assert_found("warning", case)


def test_a_package_that_swifts_tools_do_not_look_for_is_found(folder):
    root, renamed = folder(), PACKAGE.replace("Stable_Diffusion_version_tiny", "mine")
    (root / UNET).rename(root / renamed.format("unet"))
    (found,) = check_layout(root, ["swift"])
    assert (found.loader, found.level) == ("swift", "warning")
    assert found.file == renamed.format("unet")
    assert "Stable_Diffusion_version_" in found.expected
    assert "mine" in found.found
    assert found.way_out


def test_chunks_alone_and_what_costs_nothing_are_fine(folder):
    changes = {
        DECODER: ("z f16", "z f32"),
        TEXT: ("last_hidden_state f32", "last_hidden_state f16"),
        "text_encoder/openvino_model.xml": ("input_ids i64", "input_ids i32"),
    }
    assert check_layout(folder(ALONE | changes), ["swift", "genai"]) == []


TRANSFORMER = "latent_image_embeddings f16 2,4,8,8 | token_level_text_embeddings f16 2,32,1,154 | pooled_text_embeddings f16 2,16,1,1 | timestep f16 2 -> denoiser_output f32 2,4,8,8"
SD3 = {
    INDEX: {
        "_class_name": "StableDiffusion3Pipeline",
        "unet": ...,
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    },
    "transformer/config.json": {"in_channels": 4},
    MMDIT: TRANSFORMER,
}


@pytest.mark.parametrize(
    ("old", "new", "expected", "found"),
    [
        ("latent_image", "image", "`latent_image_embeddings`", "image_embeddings"),
        ("2,4,8,8 |", "2,5,8,8 |", "[batch, 4, height, width]", "[2, 5, 8, 8]"),
        ("2,32,1,154", "2,154,32", "rank 4", "rank 3"),
        ("2,16,1,1", "2,16", "rank 4", "rank 2"),
        ("timestep f16 2", "timestep f16 1", "`timestep` of shape [2]", "[1]"),
        ("timestep f16", "timestep i32", "`timestep` of float16", "int32"),
        ("denoiser_output", "noise_pred", "`denoiser_output`", "noise_pred"),
    ],
)
def test_swift_reads_the_transformer_of_stable_diffusion_3(
    folder, change, old, new, expected, found
):
    root = folder(SD3)
    assert check_layout(root, ["swift"]) == []
    change(root, {MMDIT: TRANSFORMER.replace(old, new, 1)})
    findings = check_layout(root, ["swift"])
    assert any(expected in item.expected and found in item.found for item in findings), findings
