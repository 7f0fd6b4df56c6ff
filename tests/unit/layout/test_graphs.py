"""Graphs against the contracts of their loaders: every tensor, batches, the order of outputs, packed weights."""

import pytest
from coremltools.proto import MIL_pb2, Model_pb2

from edgedistill.layout.checking import check_layout
from edgedistill.layout.graphs import read_graph

FULL = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}
ONNX, OPENVINO = "unet/model.onnx", "unet/openvino_model.xml"
# Halves of an autoencoder at fixed sizes: pictures of 8x12 latents.
DECODER = "latent_sample f32 B,4,8,12 -> sample f32 B,3,{}"
ENCODER = "sample f32 B,3,{} -> latent_parameters f32 B,8,8,12"
HALVES = {"vae_decoder": DECODER, "vae_encoder": ENCODER}
FILES = {"model.onnx": ["ort"], "openvino_model.xml": ["openvino", "genai"]}
# fmt: off
ERRORS = [
    ({ONNX: ("sample f32 B", "sample f32 1")}, "sd", ["ort"], ONNX, "or 2 for guidance 'cfg'", "batch 1"),
    ({OPENVINO: ("sample f32 B", "sample f32 1")}, "sd", ["openvino", "genai"], OPENVINO, "or 2 for guidance 'cfg'", "batch 1"),
    ({ONNX: ("sample f32 B", "sample f32 2")}, "lcm", ["ort"], ONNX, "or 1 for guidance 'embedded'", "batch 2"),
    ({OPENVINO: ("sample f32 B", "sample f32 2")}, "lcm", ["openvino", "genai"], OPENVINO, "or 1 for guidance 'embedded'", "batch 2"),
    ({OPENVINO: ("timestep i64 ?", "timestep i64 2")}, "sd", ["genai"], OPENVINO, "`timestep` of shape [1]", "[2]"),
    *(({f"{half}/{file}": line.format("32,48")}, "sd", loaders, f"{half}/{file}", "pictures of [16, 24], 2 times the latents' [8, 12]", "[32, 48]") for half, line in HALVES.items() for file, loaders in FILES.items()),
    ({"vae_decoder/model.onnx": DECODER.format("16,12")}, "sd", ["ort"], "vae_decoder/model.onnx", "pictures of [16, 24]", "[16, 12]"),
]
WARNINGS = [
    ({ONNX: ("timestep f32", "timestep f32 B")}, "sd", ["ort"], ONNX, "rank 0", "rank 1"),
    ({ONNX: ("f32", "f16")}, "sd", ["ort"], ONNX, "`sample` of float32", "float16"),
]
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_a_graph_that_a_loader_cannot_call_is_found(assert_found, case):
    assert_found("error", case)


@pytest.mark.parametrize("case", WARNINGS)
def test_a_graph_that_a_loader_has_to_convert_for_is_found(assert_found, case):
    assert_found("warning", case)


def test_every_name_dtype_rank_and_size_of_every_graph_is_held_to(scratch, change, tensor):
    kind, loader, path, line, before, what = tensor
    name, dtype, *sizes = before.replace(",", " ").split()
    other = "f16" if dtype.startswith("i") else "i32"
    size = int(what.split()[1]) if what.startswith("size") else 0
    after, expected, found = {
        "name": (before.replace(name, "other", 1), f"`{name}`", "other"),
        "dtype": (before.replace(dtype, other, 1), f"`{name}` of {FULL[dtype]}", FULL[other]),
        "rank": (
            f"{before},1,1" if sizes else f"{before} 1,1",
            f"rank {len(sizes)}",
            f"rank {len(sizes) + 2}",
        ),
        "size": (
            f"{name} {dtype} " + ",".join("99" if i == size else s for i, s in enumerate(sizes)),
            f"`{name}` of shape [",
            "99",
        ),
    }[what.split()[0]]
    broken = f" {line} ".replace(f" {before} ", f" {after} ", 1).strip()
    assert broken != line
    change(scratch / kind, {path: broken})
    found_there = check_layout(scratch / kind, [loader])
    change(scratch / kind, {path: line})
    findings = [item for item in found_there if item.level == "error"]
    assert any(
        (item.loader, item.file) == (loader, path)
        and expected in item.expected
        and found in item.found
        for item in findings
    ), findings


def test_fixed_sizes_that_fit_the_levels_of_the_autoencoder_are_fine(folder):
    lines = {
        f"{half}/{file}": line.format("16,24") for half, line in HALVES.items() for file in FILES
    }
    assert check_layout(folder(lines), ["ort", "openvino", "genai"]) == []


def test_openvino_genai_takes_outputs_by_their_place(folder):
    path = "text_encoder_2/openvino_model.xml"
    first, second = "text_embeds f32 B,6", "last_hidden_state f32 B,n,12"
    root = folder({path: (f"{first} | {second}", f"{second} | {first}")}, "sdxl")
    (finding,) = check_layout(root, ["openvino", "genai"])
    assert (finding.loader, finding.file) == ("genai", path)
    assert finding.expected.startswith("outputs text_embeds, last_hidden_state")
    assert finding.found.startswith("outputs last_hidden_state, text_embeds")


def test_a_palette_is_told_by_its_number_of_values(change, tmp_path):
    path = tmp_path / "unet.mlpackage"
    for name, dims in (("attributes", [16]), ("inputs", [1, 1, 16, 1])):
        value = MIL_pb2.Value()
        for size in dims:
            value.type.tensorType.dimensions.add().constant.size = size
        operation = MIL_pb2.Operation(type="constexpr_lut_to_dense")
        if name == "attributes":
            operation.attributes["lut"].CopyFrom(value)
        else:
            operation.inputs["lut"].arguments.add().value.CopyFrom(value)
        change(tmp_path, {path.name: "x f16 1 -> y f16 1"})
        model = path / "Data/com.apple.CoreML/model.mlmodel"
        spec = Model_pb2.Model.FromString(model.read_bytes())
        block = spec.mlProgram.functions["main"].block_specializations["CoreML7"]
        block.operations.append(operation)
        model.write_bytes(spec.SerializeToString())
        assert read_graph(path).compression == {"constexpr_lut_to_dense 16"}
