"""Core ML packages for Apple's Swift package: names, outputs, batches, chunks, compiled models, Stable Diffusion 3."""

import re

import pytest

from edgedistill.layout.checking import check_layout
from edgedistill.layout.folder import INDEX

PACKAGE = "coreml/packages/Stable_Diffusion_version_tiny_{}.mlpackage"
UNET, DECODER, TEXT, MMDIT = map(PACKAGE.format, ("unet", "vae_decoder", "text_encoder", "mmdit"))
CHUNK_1, CHUNK_2 = map(PACKAGE.format, ("unet_chunk1", "unet_chunk2"))
MODEL = "coreml/Resources/{}.mlmodelc"
COMPILED = f"{MODEL}/metadata.json"
# All that Swift opens of a pipeline, compiled, by its kind.
NAMES = ("TextEncoder", "Unet", "VAEDecoder", "VAEEncoder", "SafetyChecker")
MODELS = {"sd": NAMES, "sdxl": (*NAMES, "TextEncoder2")}
FIRST = "sample f16 2,4,8,8 | timestep f16 2 -> input_2 f16 2,8,1,64"
SECOND = "input_2 f16 2,8,1,64 | encoder_hidden_states f16 2,8,1,77 -> noise_pred f32 2,4,8,8"
BOTH = {CHUNK_1: FIRST, CHUNK_2: SECOND}
ALONE = {**BOTH, UNET: ...}


def compiled(kind, without=None, more=()):
    """Return the change that compiles all models of a pipeline but one, and some more."""
    names = {*MODELS[kind], *more} - {without}
    return {COMPILED.format(name): "[]" for name in sorted(names)}


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
    *((compiled(kind, without=name), kind, ["swift"], MODEL.format(name), f"the compiled {name}", "no such model") for kind, names in MODELS.items() for name in names if name not in NAMES[3:]),
    (compiled("sd", without="Unet", more=["UnetChunk1"]), "sd", ["swift"], MODEL.format("Unet"), "Unet or UnetChunk1 and UnetChunk2", "no such model"),
    ({"coreml/Resources/Unet.mlmodelc/model.mil": ""}, "sd", ["swift"], COMPILED.format("Unet"), "description", "no such file"),
    (ALONE | {CHUNK_2: SECOND.replace("input_2", "input_3")}, "sd", ["swift"], CHUNK_2, "outputs of chunk 1", "`input_3`"),
    (ALONE | {CHUNK_2: f"{SECOND} | more f32 2"}, "sd", ["swift"], CHUNK_2, "one output `noise_pred`", "noise_pred, more"),
    ({CHUNK_1: FIRST, UNET: ...}, "sd", ["swift"], CHUNK_2.replace("tiny", "NAME"), "both chunks", "no such"),
    (BOTH | {UNET: (" -> ", " -> constexpr_lut_to_dense -> ")}, "sd", ["swift"], CHUNK_1, "constexpr_lut_to_dense", "not packed"),
]
WARNINGS = [
    *((compiled("sd", without=name), "sd", ["swift"], MODEL.format(name), f"the compiled {name}, for other models are", "no such model") for name in ("VAEEncoder", "SafetyChecker")),
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


def test_a_compiled_pipeline_is_whole_with_either_form_of_a_model(folder, tmp_path):
    for index, changes in enumerate(
        (
            compiled("sd"),
            compiled("sd", without="Unet", more=["UnetChunk1", "UnetChunk2"]),
            compiled("sd", without="TextEncoder", more=["MultilingualTextEncoderProjection"]),
        )
    ):
        root = folder(changes).rename(tmp_path / str(index))
        assert check_layout(root, ["swift"]) == []
    root = folder(compiled("sdxl"), "sdxl")
    assert check_layout(root, ["swift"]) == []


def test_sizes_of_a_picture_may_stand_in_a_row(folder):
    root = folder({UNET: ("time_ids f16 2,6", "time_ids f16 12")}, "sdxl")
    assert check_layout(root, ["swift"]) == []


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


# A size of each tensor that is held to, by its place.
HELD = {
    "latent_image_embeddings": 1,
    "token_level_text_embeddings": 2,
    "pooled_text_embeddings": 3,
    "timestep": 0,
    "denoiser_output": 1,
}


@pytest.mark.parametrize("name", HELD)
def test_swift_reads_the_transformer_of_stable_diffusion_3(folder, change, name):
    root = folder(SD3)
    assert check_layout(root, ["swift"]) == []
    tensor, dtype, sizes = re.search(rf"{name} (\w+) ([\d,]+)", TRANSFORMER).group(0, 1, 2)
    shape = sizes.split(",")
    wide = ["99" if i == HELD[name] else size for i, size in enumerate(shape)]
    for after, expected, found in (
        (tensor.replace(name, "other"), f"`{name}`", "other"),
        (tensor.replace(dtype, "i32"), f"`{name}` of float{dtype[1:]}", "int32"),
        (f"{tensor},1", f"`{name}` of shape", f"rank {len(shape) + 1}"),
        (f"{name} {dtype} {','.join(wide)}", f"`{name}` of shape", f"[{', '.join(wide)}]"),
    ):
        change(root, {MMDIT: TRANSFORMER.replace(tensor, after)})
        findings = check_layout(root, ["swift"])
        assert any(
            (item.loader, item.level, item.file) == ("swift", "error", MMDIT)
            and expected in item.expected
            and found in item.found
            for item in findings
        ), findings
