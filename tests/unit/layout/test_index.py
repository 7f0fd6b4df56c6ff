"""The index of a pipeline: its class and parts, held against each loader and the configurations."""

import pytest

from edgedistill.layout.folder import INDEX
from edgedistill.stock import LOADERS

VAE = "vae_decoder/config.json"
# fmt: off
ERRORS = [
    ({INDEX: ...}, "sd", LOADERS, INDEX, "index", "no such file"),
    ({INDEX: "{"}, "sd", LOADERS, INDEX, "a whole file", "not a JSON file"),
    ({INDEX: "[]"}, "sd", LOADERS, INDEX, "a whole file", "a JSON list"),
    ({INDEX: {"_class_name": ...}}, "sd", LOADERS, INDEX, "`_class_name`", "''"),
    *(({INDEX: {"_class_name": f"{prefix}StableDiffusionPipeline"}}, "sd", LOADERS, INDEX, "`_class_name`", f"'{prefix}StableDiffusionPipeline'") for prefix in ("OV", "ORT")),
    ({INDEX: {"_class_name": "DDPMPipeline"}}, "sd", LOADERS[1:], INDEX, "`_class_name`", "'DDPMPipeline'"),
    ({INDEX: {"_class_name": "StableDiffusionImg2ImgPipeline"}}, "sd", ["genai"], INDEX, "one of StableDiffusionPipeline", "Img2Img"),
    *(({INDEX: {part: [None, None]}}, "sd", LOADERS[:4], INDEX, f"`{part}`", "[null, null]") for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae")),
    ({INDEX: {"text_encoder_2": ...}}, "sdxl", LOADERS[:4], INDEX, "`text_encoder_2`", "nothing"),
    ({INDEX: {"scheduler": ["mine", "MyScheduler"]}}, "sd", LOADERS[:3], INDEX, "`scheduler`", "'mine'"),
    ({INDEX: {"scheduler": ["diffusers", "MyScheduler"]}}, "sd", LOADERS[:3], INDEX, "stock scheduler", "'MyScheduler'"),
    ({INDEX: {"tokenizer": ["mine", "CLIPTokenizer"]}}, "sd", LOADERS[:3], INDEX, "`tokenizer`", "'mine'"),
    ({INDEX: {"unet": ["mine", "UNet2DConditionModel"]}}, "sd", ["diffusers"], INDEX, "`unet`", "'mine'"),
    ({INDEX: {"text_encoder": ["transformers", "T5EncoderModel"]}}, "sd", ["genai"], INDEX, "CLIPTextModel", "'T5EncoderModel'"),
    ({INDEX: {"text_encoder_2": ["transformers", "CLIPTextModel"]}}, "sdxl", ["genai"], INDEX, "CLIPTextModelWithProjection", "'CLIPTextModel'"),
    ({INDEX: {"unet": ["diffusers", "UNet2DModel"]}}, "sd", ["genai"], INDEX, "UNet2DConditionModel", "'UNet2DModel'"),
    ({INDEX: {"vae": ["diffusers", "AutoencoderTiny"]}}, "sd", ["genai"], INDEX, "AutoencoderKL", "'AutoencoderTiny'"),
    ({"vae/config.json": {"_class_name": "AutoencoderTiny"}}, "sd", ["diffusers"], INDEX, "`vae` to be AutoencoderTiny", "'AutoencoderKL'"),
    ({VAE: {"_class_name": "AutoencoderTiny"}}, "sd", LOADERS[1:4], VAE, "`scaling_factor` 1.0", "0.18215"),
]
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_an_index_that_a_loader_cannot_take_is_found(assert_found, case):
    assert_found("error", case)
