"""Files that each loader opens: configurations, weights and graphs; whole, in place, and no pickles."""

import pytest

from edgedistill.layout.checking import check_layout
from edgedistill.layout.findings import FORMATS
from edgedistill.layout.folder import INDEX, SCHEDULER
from edgedistill.stock import LOADERS

PATHS = {
    "onnx": "{}/model.onnx",
    "openvino": "{}/openvino_model.xml",
    "coreml": "coreml/packages/Stable_Diffusion_version_tiny_{}.mlpackage",
}
GRAPH, XML, BIN = "unet/model.onnx", "unet/openvino_model.xml", "unet/openvino_model.bin"
PACKAGE = PATHS["coreml"].format("unet")
WEIGHTS, STEM = "unet/model.onnx_data", "diffusion_pytorch_model.safetensors"


def outside(*files):
    """Return the change that keeps weights of the ONNX UNet in other files."""
    return {GRAPH: (" -> ", f" -> {' -> '.join(files)} -> ")}


# fmt: off
ERRORS = [
    ({SCHEDULER: ...}, "sd", LOADERS[:4], SCHEDULER, "configuration", "no such file"),
    ({INDEX: {"scheduler": ["diffusers", "PNDMScheduler"]}}, "sd", LOADERS[:4], SCHEDULER, "'PNDMScheduler'", "'DDIMScheduler'"),
    *(({f"{network}/config.json": ...}, "sd", LOADERS[1:], f"{network}/config.json", "configuration", "no such file") for network in ("text_encoder", "unet", "vae_decoder", "vae_encoder")),
    *(({file: ...}, "sd", ["diffusers"], file, "a file of", "") for file in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "vae/diffusion_pytorch_model.safetensors")),
    ({"vae": ...}, "sd", ["diffusers"], "vae/config.json", "AutoencoderKL", "no such folder"),
    *(({f"{file}.index.json": {"weight_map": {"a": "part-1.safetensors"}}}, "sd", ["diffusers"], f"{file.split('/')[0]}/part-1.safetensors", f"weights that {file}.index.json names", "no such file") for file in (f"unet/{STEM}", f"vae/{STEM}", "text_encoder/model.safetensors")),
    ({INDEX: {"feature_extractor": ["transformers", "CLIPImageProcessor"]}}, "sd", LOADERS[:3], "feature_extractor/preprocessor_config.json", "a file of CLIPImageProcessor", "no such f"),
    *(({INDEX: {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}}, "sd", ["diffusers"], f"safety_checker/{file}", "a file of StableDiffusionSafetyChecker", "no such folder") for file in ("config.json", "model.safetensors")),
    ({"unet/diffusion_pytorch_model.bin": "pickle"}, "sd", ["diffusers"], "unet/diffusion_pytorch_model.bin", "safetensors", "pickle"),
    ({"text_encoder/model.ckpt": "pickle"}, "sd", ["diffusers"], "text_encoder/model.ckpt", "safetensors", "pickle"),
    *(({PATHS[format_].format(network): ...}, "sd", [loader], PATHS[format_].format(network).replace("tiny", "NAME"), f"the graph of {network}", "no such file") for loader, format_ in FORMATS.items() for network in ("text_encoder", "unet", "vae_decoder")),
    ({"text_encoder_2/model.onnx": ...}, "sdxl", ["ort"], "text_encoder_2/model.onnx", "the graph", "no such file"),
    *(({INDEX: {"_class_name": f"{family}{edit}Pipeline"}, PATHS[FORMATS[loader]].format("vae_encoder"): ...}, kind, [loader], PATHS[FORMATS[loader]].format("vae_encoder"), "the graph of vae_encoder", "no such file") for family, kind in (("StableDiffusion", "sd"), ("StableDiffusionXL", "sdxl")) for edit in ("Img2Img", "Inpaint") for loader in ("ort", "openvino")),
    ({BIN: ...}, "sd", ["openvino", "genai"], BIN, "the weights", "no such file"),
    ({BIN: ""}, "sd", ["openvino", "genai"], BIN, "8 bytes", "0"),
    ({XML: "<net>"}, "sd", ["openvino", "genai"], XML, "whole", "not an OpenVINO model"),
    ({GRAPH: "not protobuf"}, "sd", ["ort"], GRAPH, "whole", "not an ONNX model"),
    ({f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel": "not"}, "sd", ["swift"], PACKAGE, "whole", "not a whole Core ML package"),
    (outside("model.onnx_data"), "sd", ["ort"], WEIGHTS, "the weights", "no such file"),
    (outside("model.onnx_data") | {WEIGHTS: "7 bytes"}, "sd", ["ort"], WEIGHTS, "8 bytes", "7"),
    (outside("../model.onnx_data") | {"model.onnx_data": "8 bytes."}, "sd", ["ort"], GRAPH, "own folder", "../model.onnx_data"),
]
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_a_file_that_is_missing_or_cannot_be_opened_is_found(assert_found, case):
    assert_found("error", case)


def test_pictures_of_prompts_alone_are_made_without_an_encoder_of_images(folder):
    changes = {PATHS[format_].format("vae_encoder"): ... for format_ in PATHS}
    assert check_layout(folder(changes), LOADERS) == []


def test_weights_in_several_files_are_a_trap(assert_found):
    changes = outside("a", "b") | {"unet/a": "8 bytes.", "unet/b": "8 bytes."}
    assert_found("warning", (changes, "sd", ["ort"], GRAPH, "model.onnx_data", "2 files"))


def test_the_path_of_a_folder_for_openvino_genai_has_no_text_encoder_in_it(folder, tmp_path):
    root = folder().rename(tmp_path / "my_text_encoders")
    (finding,) = check_layout(root, ["diffusers", "openvino", "genai"])
    assert (finding.loader, finding.expected) == ("genai", "a path without `text_encoder`")
    assert "my_text_encoders" in finding.found
