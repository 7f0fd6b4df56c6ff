"""Pipelines with a ControlNet: who opens them, and every tensor between it and its denoiser."""

import itertools
import re

import pytest

from edgedistill.files import read_json
from edgedistill.layout.checking import check_layout
from edgedistill.layout.folder import INDEX

PACKAGE = "coreml/packages/Stable_Diffusion_version_tiny_{}.mlpackage"
SIDE, UNET = "coreml/packages/ControlNet_edges.mlpackage", PACKAGE.format("control-unet")
CONFIG, CLASS = "controlnet/config.json", "StableDiffusionControlNetPipeline"
MODEL = "coreml/Resources/{}.mlmodelc"
COMPILED = MODEL.format("controlnet/Edges")
FULL = {"f16": "float16", "i32": "int32"}
INPUTS = "sample f16 2,4,8,8 | timestep f16 2 | encoder_hidden_states f16 2,8,1,77"
SHAPES = ["8,8,8", "8,8,8", "8,4,4", "16,4,4", "16,4,4"]
RESIDUALS = " | ".join(f"additional_residual_{i} {{0}} 2,{shape}" for i, shape in enumerate(SHAPES))
# A ControlNet and its UNet, as Apple's converter declares them.
LINES = {
    SIDE: f"{INPUTS} | controlnet_cond f16 2,3,16,16 -> {RESIDUALS.format('f32')}",
    UNET: f"{INPUTS} | {RESIDUALS.format('f16')} -> noise_pred f32 2,4,8,8",
}


@pytest.fixture
def controlled(folder, change):
    """A folder with a ControlNet and, for Swift, the UNet that takes it."""
    root = folder()
    config = read_json(root / "unet/config.json")
    config |= {"layers_per_block": 1, "conditioning_channels": 3}
    changes = {
        **LINES,
        PACKAGE.format("unet"): ...,
        INDEX: {"_class_name": CLASS, "controlnet": ["diffusers", "ControlNetModel"]},
        "unet/config.json": config,
        CONFIG: config,
        "controlnet/diffusion_pytorch_model.safetensors": "",
    }
    return change(root, changes)


def test_who_opens_a_pipeline_with_a_controlnet(controlled, change):
    assert check_layout(controlled, ["diffusers", "swift"]) == []
    for loader in ("ort", "openvino", "genai"):
        (found,) = check_layout(controlled, [loader])
        assert (found.file, found.found) == (INDEX, repr(CLASS))
        assert found.expected == "a pipeline without a ControlNet: this loader has no other"
    change(controlled, {INDEX: {"_class_name": "StableDiffusionXLControlNetPipeline"}})
    assert [item.found for item in check_layout(controlled, ["swift"])] == [
        "'StableDiffusionXLControlNetPipeline'"
    ]


@pytest.mark.parametrize("path", LINES)
def test_every_tensor_between_a_controlnet_and_its_denoiser_is_held_to(controlled, change, path):
    line = LINES[path]
    for tensor in re.split(r" -> | \| ", line):
        name, dtype, *sizes = tensor.replace(",", " ").split()
        # Swift converts what the UNet gives, and adds the residuals up as they are.
        other = "f16" if name.startswith("additional") and dtype == "f32" else "i32"
        wide = ["99" if i == min(1, len(sizes) - 1) else size for i, size in enumerate(sizes)]
        for after, expected, told in (
            (tensor.replace(name, "other"), f"`{name}`", "other"),
            (tensor.replace(dtype, other), f"`{name}` of float{dtype[1:]}", FULL[other]),
            (f"{tensor},1", f"rank {len(sizes)}", f"rank {len(sizes) + 1}"),
            (f"{name} {dtype} {','.join(wide)}", f"`{name}` of ", "99"),
        ):
            broken = f" {line} ".replace(f" {tensor} ", f" {after} ").strip()
            assert broken != line
            change(controlled, {path: broken})
            found = [item for item in check_layout(controlled, ["swift"]) if item.level == "error"]
            assert any(
                (item.loader, item.file) == ("swift", path)
                and expected in item.expected
                and told in item.found
                for item in found
            ), broken


# fmt: off
LACKING = [
    ({SIDE: ...}, "swift", "coreml/packages/ControlNet_NAME", "graph of controlnet", "no such file"),
    ({UNET: ...}, "swift", "control-unet.mlpackage", "the graph of control-unet", "no such file"),
    ({CONFIG: ...}, "swift", CONFIG, "configuration", "no such file"),
    *(({CONFIG: {key: ...}}, "swift", CONFIG, f"`{key}`, ", "no such key") for key in ("cross_attention_dim", "block_out_channels", "layers_per_block")),
    ({CONFIG: ...}, "diffusers", CONFIG, "ControlNetModel", "diffusion_pytorch_model.safetensors"),
    ({INDEX: {"controlnet": ...}}, "diffusers", INDEX, "`controlnet` as [library", "nothing"),
    ({CONFIG: {"layers_per_block": 2}}, "swift", SIDE, "additional_residual_6", "outputs additional"),
    ({CONFIG: {"block_out_channels": []}}, "swift", SIDE, "outputs ", "`additional_residual_0`"),
    ({f"{COMPILED}/a": ""}, "swift", f"{COMPILED}/metadata.json", "the compiler's description", "no such file"),
    ({f"{COMPILED}/a": ""}, "swift", MODEL.format("ControlledUnet"), "ControlledUnet or ControlledUnetChunk1 and ControlledUnetChunk2", "no such model"),
    ({f"{MODEL.format('ControlledUnet')}/a": ""}, "swift", MODEL.format("controlnet/*"), "the compiled controlnet/*", "no such model"),
]
# fmt: on


@pytest.mark.parametrize(
    ("changes", "loader", "file", "expected", "found"), LACKING, ids=itertools.count()
)
def test_what_a_pipeline_with_a_controlnet_lacks(
    controlled, change, changes, loader, file, expected, found
):
    change(controlled, changes)
    findings = check_layout(controlled, [loader])
    assert any(
        (item.loader, item.level) == (loader, "error")
        and file in item.file
        and expected in item.expected
        and found in item.found
        for item in findings
    ), findings


def test_swift_calls_a_controlnet_with_two_samples_for_one_unet(controlled, change):
    single = {
        path: line.replace(" 2,", " 1,").replace("timestep f16 2", "timestep f16 1")
        for path, line in LINES.items()
    }
    found = check_layout(change(controlled, single), ["swift"])
    assert {(item.file, item.found) for item in found} == {(path, "batch 1") for path in LINES}
    wide = {
        **LINES,
        SIDE: LINES[SIDE].replace(" 2,16,4,4", " 2,32,4,4"),
        CONFIG: {"block_out_channels": [8, 32]},
    }
    found = check_layout(change(controlled, wide), ["swift"])
    assert [item.found for item in found] == ["(2, 32, 4, 4)"] * 2
    assert "`additional_residual_3` of (2, 16, 4, 4), as control-unet" in found[0].expected
