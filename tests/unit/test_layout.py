"""A minimal folder for every loader, and each line of the loaders' contracts broken, one at a time.

The signatures below are written by hand from the loaders' own sources, apart from those that are checked.
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2
from onnx import helper

from edgedistill.cli import main
from edgedistill.compiler import compile_scheduler
from edgedistill.errors import BundleError, ConfigError
from edgedistill.layout.checking import check_layout, loaders_of
from edgedistill.layout.findings import FORMATS
from edgedistill.layout.graphs import read_graph
from edgedistill.plans import swift
from edgedistill.stock import LOADERS
from edgedistill.table import Condition, Guidance

# "name dtype sizes" per tensor, inputs left of the arrow; words are free sizes, in Core ML 1 and 8.
UNET = "sample f32 B,4,h,w | timestep f32 | encoder_hidden_states f32 B,n,8{more} -> out_sample f32 B,4,h,w"
APPLE_UNET = "sample f16 {b},4,8,8 | timestep f16 {b} | encoder_hidden_states f16 {b},{dim},1,77{more} -> noise_pred f32 {b},4,8,8"
TEXT = "input_ids i64 B,n -> last_hidden_state f32 B,n,8 | pooler_output f32 B,8"
INNER = " | ".join(f"hidden_states.{i} f32 B,n,{{}}" for i in range(3))
TEXT_XL = f"{TEXT} | {INNER.format(8, 8, 8)}"
TEXT_XL_2 = f"input_ids i64 B,n -> text_embeds f32 B,6 | last_hidden_state f32 B,n,12 | {INNER.format(12, 12, 12)}"
HALVES = {
    "vae_decoder": "latent_sample f32 B,4,h,w -> sample f32 B,3,H,W",
    "vae_encoder": "sample f32 B,3,H,W -> latent_parameters f32 B,8,h,w",
}
APPLE_HALVES = {
    "vae_decoder": "z f16 1,4,8,8 -> image f32 1,3,16,16",
    "vae_encoder": "x f16 1,3,16,16 -> latent f32 1,8,8,8",
    "safety_checker": "clip_input f16 1,3,224,224 | images f16 1,512,512,3 | adjustment f16 1 -> filtered_images f32 1,512,512,3 | has_nsfw_concepts f32 1 | concept_scores f32 1,17",
}
APPLE_TEXT = "input_ids f32 1,77 -> {} f32 1,77,{} | pooled_outputs f32 1,{}"


def _graphs(kind: str) -> dict[str, dict[str, str]]:
    """Return the graphs of a pipeline by format and network."""
    extra = {
        "sd": "",
        "lcm": " | timestep_cond f32 B,256",
        "sdxl": " | text_embeds f32 B,6 | time_ids f32 B,6",
    }[kind]
    unet = UNET.replace("B,n,8", "B,n,20" if kind == "sdxl" else "B,n,8").format(more=extra)
    text = {"text_encoder": TEXT}
    apple = {"text_encoder": APPLE_TEXT.format("last_hidden_state", 8, 8)}
    if kind == "sdxl":
        text = {"text_encoder": TEXT_XL, "text_encoder_2": TEXT_XL_2}
        apple = {
            "text_encoder": APPLE_TEXT.format("hidden_embeds", 8, 8),
            "text_encoder_2": APPLE_TEXT.format("hidden_embeds", 12, 6),
        }
    more = " | text_embeds f16 2,6 | time_ids f16 2,6" if kind == "sdxl" else ""
    apple_unet = APPLE_UNET.format(
        b=1 if kind == "lcm" else 2, dim=20 if kind == "sdxl" else 8, more=more
    )
    return {
        "onnx": {"unet": unet, **text, **HALVES},
        "openvino": {"unet": unet.replace("timestep f32", "timestep i64 ?"), **text, **HALVES},
        "coreml": {"unet": apple_unet, **apple, **APPLE_HALVES},
    }


ONNX = {"f32": 1, "i32": 6, "i64": 7, "f16": 10}
OPENVINO = {"f32": "FP32", "f16": "FP16", "i64": "I64", "i32": "I32"}
CORE_ML = {"f32": 65568, "f16": 65552, "i32": 131104}
FULL = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}


def _tensors(side: str) -> list[tuple[str, str, list[str]]]:
    """Read one side of a line above."""
    parts = [[*item.split(), ""][:3] for item in side.split(" | ")]
    return [(name, dtype, sizes.split(",") if sizes else []) for name, dtype, sizes in parts]


def _write_graph(path: Path, line: str) -> None:
    """Write a graph with nothing between its inputs and outputs."""
    inputs, outputs = map(_tensors, line.split(" -> "))
    writer = {".onnx": _write_onnx, ".xml": _write_openvino, ".mlpackage": _write_core_ml}
    path.parent.mkdir(parents=True, exist_ok=True)
    writer[path.suffix](path, inputs, outputs)


def _write_onnx(path, inputs, outputs) -> None:
    sides = [
        [
            helper.make_tensor_value_info(
                name, ONNX[dtype], [int(size) if size.isdigit() else size for size in sizes]
            )
            for name, dtype, sizes in side
        ]
        for side in (inputs, outputs)
    ]
    onnx.save(helper.make_model(helper.make_graph([], "made", *sides)), path)


def _write_openvino(path, inputs, outputs) -> None:
    def port(name, dtype, sizes):
        dims = "".join(f"<dim>{size if size.isdigit() else -1}</dim>" for size in sizes)
        return f'<output><port id="2" precision="{OPENVINO[dtype]}" names="{name}">{dims}</port></output>'

    layers, edges = [], []
    for i, item in enumerate(inputs):
        layers.append(f'<layer id="{i}" name="p{i}" type="Parameter">{port(*item)}</layer>')
    for i, item in enumerate(outputs, start=100):
        layers.append(f'<layer id="{i}" name="l{i}" type="Relu">{port(*item)}</layer>')
        layers.append(f'<layer id="{i + 100}" name="r{i}" type="Result"/>')
        edges.append(f'<edge from-layer="{i}" from-port="2" to-layer="{i + 100}" to-port="0"/>')
    layers.append('<layer id="999" type="Const"><data offset="0" size="8"/></layer>')
    text = f"<net><layers>{''.join(layers)}</layers><edges>{''.join(edges)}</edges></net>"
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".bin").write_bytes(bytes(8))


def _write_core_ml(path, inputs, outputs, operations=()) -> None:
    spec = Model_pb2.Model(specificationVersion=8)
    for side, features in ((inputs, spec.description.input), (outputs, spec.description.output)):
        for name, dtype, sizes in side:
            array = FeatureTypes_pb2.ArrayFeatureType(
                shape=map(int, sizes), dataType=CORE_ML[dtype]
            )
            features.add(name=name).type.multiArrayType.CopyFrom(array)
    block = MIL_pb2.Block(operations=[MIL_pb2.Operation(type=name) for name in operations])
    function = MIL_pb2.Function(opset="CoreML7", block_specializations={"CoreML7": block})
    spec.mlProgram.CopyFrom(MIL_pb2.Program(version=1, functions={"main": function}))
    item = {"author": "com.apple.CoreML", "description": "", "name": "model.mlmodel"}
    item["path"] = "com.apple.CoreML/model.mlmodel"
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {"A": item}}
    (path / "Data/com.apple.CoreML/weights").mkdir(parents=True, exist_ok=True)
    (path / "Data" / item["path"]).write_bytes(spec.SerializeToString())
    _save(path / "Manifest.json", manifest | {"rootModelIdentifier": "A"})


def _path(format_: str, network: str) -> str:
    if format_ == "coreml":
        return f"coreml/packages/Stable_Diffusion_version_tiny_{network}.mlpackage"
    return f"{network}/{'model.onnx' if format_ == 'onnx' else 'openvino_model.xml'}"


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = {"num_train_timesteps": 1000, **BETAS, "prediction_type": "epsilon"}
DDIM = {
    "_class_name": "DDIMScheduler",
    **NOISE,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "trailing",
}
LCM = {
    "_class_name": "LCMScheduler",
    **NOISE,
    "clip_sample": False,
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
}
EULER = {"_class_name": "EulerDiscreteScheduler", **NOISE, "timestep_spacing": "linspace"}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "in_channels": 3,
    "latent_channels": 4,
    "out_channels": 3,
    "scaling_factor": 0.18215,
}
PROMPT = Condition(
    "encoder_hidden_states",
    "text",
    encoder="text_encoder",
    tokenizer="tokenizer",
    length=77,
    examples=("a",),
)
MODES = {
    "cfg": Guidance("cfg", None, 7.5, (1.0, 10.0), {"encoder_hidden_states": ""}),
    "embedded": Guidance("embedded", "w", 8.0, (2.0, 14.0)),
    "none": Guidance(),
}
PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "lcm": "LatentConsistencyModelPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def _save(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def _table(root: Path, config: dict, steps: int, mode: str, name: str = "sampler.json") -> None:
    table = compile_scheduler(
        config, steps, shape=(4, 8, 8), guidance=MODES[mode], conditions=(PROMPT,)
    )
    (root / name).parent.mkdir(exist_ok=True)
    table.save(root / name)


def _configs(kind: str) -> dict[str, dict]:
    text = {
        "hidden_size": 8,
        "max_position_embeddings": 77,
        "num_hidden_layers": 2,
        "projection_dim": 8,
        "vocab_size": 5,
    }
    unet = {
        "block_out_channels": [8, 16],
        "cross_attention_dim": 20 if kind == "sdxl" else 8,
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "time_cond_proj_dim": 256 if kind == "lcm" else None,
    }
    configs = {"text_encoder": text, "unet": unet}
    configs |= dict.fromkeys(("vae", "vae_decoder", "vae_encoder"), VAE)
    if kind == "sdxl":
        unet |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 1}
        configs["text_encoder_2"] = {**text, "hidden_size": 12, "projection_dim": 6}
    return configs


def _write(root: Path, kind: str) -> None:
    """Write a folder that every loader opens."""
    scheduler, steps = (LCM, 4) if kind == "lcm" else (DDIM, 2)
    index = {
        "_class_name": PIPELINES[kind],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    if kind == "sdxl":
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    _save(root / "model_index.json", index)
    _save(root / "scheduler/scheduler_config.json", scheduler)
    for name, config in _configs(kind).items():
        _save(root / name / "config.json", config)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        (root / name / f"{stem}.safetensors").touch()
    for name in [name for name in index if name.startswith("tokenizer")]:
        _write_tokenizer(root / name)
    _write_words(root / "coreml/Resources")
    for format_, networks in _graphs(kind).items():
        for network, line in networks.items():
            _write_graph(root / _path(format_, network), line)
    _table(root, scheduler, steps, "embedded" if kind == "lcm" else "cfg")
    (root / "samplers").mkdir()
    swift(NOISE, 2, shape=(4, 8, 8)).table.save(root / "samplers/swift.json")


def _write_words(folder: Path) -> None:
    words = ["a", "b", "ab", "<|startoftext|>", "<|endoftext|>"]
    _save(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")


def _write_tokenizer(folder: Path) -> None:
    _write_words(folder)
    _save(folder / "tokenizer_config.json", {"model_max_length": 77})
    _save(folder / "special_tokens_map.json", {})
    _write_graph(folder / "openvino_tokenizer.xml", "text i64 B -> input_ids i64 B,n")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Folders that nothing is wrong with, by kind; never written to."""
    root = tmp_path_factory.mktemp("valid")
    for kind in PIPELINES:
        _write(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def scratch(valid, tmp_path_factory):
    """The same folders, whose graphs a test breaks and mends: hundreds of copies would take a minute."""
    return Path(shutil.copytree(valid, tmp_path_factory.mktemp("scratch"), dirs_exist_ok=True))


@pytest.fixture
def folder(valid, tmp_path):
    """Copy the folder of a kind to break it."""

    def copy(kind: str = "sd") -> Path:
        return Path(shutil.copytree(valid / kind, tmp_path / kind))

    return copy


@pytest.mark.parametrize("kind", PIPELINES)
def test_nothing_is_found_in_a_folder_that_every_loader_opens(valid, kind):
    assert loaders_of(valid / kind) == LOADERS
    assert check_layout(valid / kind, LOADERS) == []


def _broken_tensors():
    """Yield every tensor of every graph without its name, or with another dtype, rank or size."""
    for kind, loader in itertools.product(PIPELINES, LOADERS[1:]):
        for network, line in _graphs(kind)[FORMATS[loader]].items():
            if kind != "sd" and network.startswith(("vae", "safety")):
                continue  # the same as in the first kind
            for name, dtype, sizes in itertools.chain(*map(_tensors, line.split(" -> "))):
                for what in _breaks(loader, name, sizes):
                    yield pytest.param(
                        (kind, loader, network, line, name, dtype, sizes, what),
                        id=f"{kind}-{loader}-{network}-{name}-{what}",
                    )


def _breaks(loader, name, sizes):
    yield from ("name", "dtype", "rank")
    free = name == "concept_scores" or "hidden_states." in name
    numbers = [i for i, size in enumerate(sizes) if size.isdigit()]
    fixed = {"coreml": [i for i in numbers if i == 1 and len(sizes) > 1]}.get(
        FORMATS[loader], numbers
    )
    if fixed and not free:
        yield f"size {fixed[-1]}"


@pytest.mark.parametrize("broken", list(_broken_tensors()))
def test_every_name_dtype_rank_and_size_of_every_graph_is_held_to(scratch, broken):
    kind, loader, network, line, name, dtype, sizes, what = broken
    path, shape = _path(FORMATS[loader], network), ",".join(sizes)
    before = " ".join([name, dtype, *([shape] if shape else [])])
    other = "f16" if dtype.startswith("i") else "i32"
    size = int(what.split()[1]) if what.startswith("size") else 0
    after, expected, found = {
        "name": (before.replace(name, "other", 1), f"`{name}`", "other"),
        "dtype": (before.replace(dtype, other, 1), f"`{name}` of {FULL[dtype]}", FULL[other]),
        "rank": (
            f"{before},1,1" if shape else f"{before} 1,1",
            f"rank {len(sizes)}",
            f"rank {len(sizes) + 2}",
        ),
        "size": (
            f"{name} {dtype} " + ",".join("99" if i == size else s for i, s in enumerate(sizes)),
            f"`{name}` of shape [",
            "99",
        ),
    }[what.split()[0]]
    padded = f" {line} ".replace(f" {before} ", f" {after} ", 1).strip()
    assert padded != line
    _write_graph(scratch / kind / path, padded)
    found_there = check_layout(scratch / kind, [loader])
    _write_graph(scratch / kind / path, line)
    findings = [item for item in found_there if item.level == "error"]
    assert any(
        (item.loader, item.file) == (loader, path)
        and expected in item.expected
        and found in item.found
        for item in findings
    ), findings


def _edit(name: str, *keys: str, to: object = None):
    """Return what sets a key of a JSON file, or removes it."""

    def edit(root: Path) -> None:
        data = json.loads((root / name).read_text(encoding="utf-8"))
        inner = data
        for key in keys[:-1]:
            inner = inner[int(key) if isinstance(inner, list) else key]
        last = int(keys[-1]) if isinstance(inner, list) else keys[-1]
        if to is Ellipsis:
            del inner[last]
        else:
            inner[last] = to
        _save(root / name, data)

    return edit


def _index(*keys: str, to: object = None):
    return _edit("model_index.json", *keys, to=to)


def _scheduler(**keys: object):
    def edit(root: Path) -> None:
        for key, value in keys.items():
            _edit("scheduler/scheduler_config.json", key, to=value)(root)
            if key == "_class_name":
                _index("scheduler", "1", to=value)(root)

    return edit


def _remove(name: str):
    def edit(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def _text(name: str, text: str):
    def edit(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")

    return edit


def _graph(format_: str, network: str, old: str, new: str, kind: str = "sd"):
    def edit(root: Path) -> None:
        line = _graphs(kind)[format_][network]
        assert old in line
        _write_graph(root / _path(format_, network), line.replace(old, new))

    return edit


def _sampler(config: dict, steps: int, mode: str = "cfg", name: str = "sampler.json"):
    def edit(root: Path) -> None:
        _save(root / "scheduler/scheduler_config.json", config)
        _index("scheduler", "1", to=config["_class_name"])(root)
        _table(root, config, steps, mode, name)

    return edit


def _external(*names: str, size: int = 8, write: bool = True):
    """Return what moves weights of the ONNX UNet to other files."""

    def edit(root: Path) -> None:
        path = root / "unet/model.onnx"
        model = onnx.load(path)
        for name in names:
            tensor = model.graph.initializer.add(name=f"of {name}", data_type=1, dims=[2])
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", "0"), ("length", "8")):
                tensor.external_data.add(key=key, value=value)
            if write:
                (path.parent / name).write_bytes(bytes(size))
        path.write_bytes(model.SerializeToString())

    return edit


CHUNK_1 = "sample f16 2,4,8,8 | timestep f16 2 -> input_2 f16 2,8,1,64"
CHUNK_2 = "input_2 f16 2,8,1,64 | encoder_hidden_states f16 2,8,1,77 -> noise_pred f32 2,4,8,8"


def _chunks(
    second: str = CHUNK_2, whole: tuple[str, ...] | None = None, packed: tuple[str, ...] = ()
):
    """Return what writes two chunks of the UNet; `whole` and `packed` are how weights are packed."""

    def edit(root: Path) -> None:
        for number, line in ((1, CHUNK_1), (2, second)):
            _write_core_ml(
                root / _path("coreml", f"unet_chunk{number}"),
                *map(_tensors, line.split(" -> ")),
                packed,
            )
        if whole is None:
            _remove(_path("coreml", "unet"))(root)
        else:
            line = _graphs("sd")["coreml"]["unet"]
            _write_core_ml(
                root / _path("coreml", "unet"), *map(_tensors, line.split(" -> ")), whole
            )

    return edit


def _split_einsum_v2(root: Path) -> None:
    wide = "sample f16 2,4,24,40"  # 960 queries, which are no tiles of 512
    _graph("coreml", "unet", "sample f16 2,4,8,8", wide)(root)
    artifact = {
        "format": "coreml",
        "networks": {"unet": {"path": _path("coreml", "unet")}},
        "made_with": {"attention_implementation": "SPLIT_EINSUM_V2"},
    }
    _save(root / "edgedistill.json", {"artifacts": {"coreml-float16": artifact}})


def _both(*edits):
    def edit(root: Path) -> None:
        for step in edits:
            step(root)

    return edit


UNET_JSON, TEXT_JSON = "unet/config.json", "text_encoder/config.json"
VAE_JSON, INDEX_JSON = "vae_decoder/config.json", "model_index.json"


def _tiny(root):
    """Put a small autoencoder in place of the other: its encoder gives latents without a distribution."""
    for name in ("vae", "vae_decoder", "vae_encoder"):
        _edit(f"{name}/config.json", "_class_name", to="AutoencoderTiny")(root)
        _edit(f"{name}/config.json", "scaling_factor", to=1.0)(root)
    line = HALVES["vae_encoder"].replace("latent_parameters f32 B,8", "latent_sample f32 B,4")
    for format_ in ("onnx", "openvino"):
        _write_graph(root / _path(format_, "vae_encoder"), line)


SCHEDULER_JSON = "scheduler/scheduler_config.json"
PACKAGE = _path("coreml", "unet")
MODELC = "coreml/Resources/{}.mlmodelc/metadata.json"
SINGLE = "LatentConsistencyModelPipeline"
NOT_COMPILED = ("PNDM", "EulerAncestralDiscrete", "LMSDiscrete")

# fmt: off
# what is broken, kind of pipeline, loaders, file, in expected, in found
ERRORS = [
    # the index
    (_remove(INDEX_JSON), "sd", LOADERS, INDEX_JSON, "index", "no such file"),
    (_text(INDEX_JSON, "{"), "sd", LOADERS, INDEX_JSON, "a whole file", "not a JSON file"),
    (_text(INDEX_JSON, "[]"), "sd", LOADERS, INDEX_JSON, "a whole file", "a JSON list"),
    (_index("_class_name", to=...), "sd", LOADERS, INDEX_JSON, "`_class_name`", "''"),
    *((_index("_class_name", to=f"{prefix}StableDiffusionPipeline"), "sd", LOADERS, INDEX_JSON, "`_class_name`", f"'{prefix}StableDiffusionPipeline'") for prefix in ("OV", "ORT")),
    (_index("_class_name", to="DDPMPipeline"), "sd", LOADERS[1:], INDEX_JSON, "`_class_name`", "'DDPMPipeline'"),
    (_index("_class_name", to="StableDiffusionImg2ImgPipeline"), "sd", ["genai"], INDEX_JSON, "one of StableDiffusionPipeline", "Img2Img"),
    *((_index(part, to=[None, None]), "sd", LOADERS[:4], INDEX_JSON, f"`{part}`", "[null, null]") for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae")),
    (_index("text_encoder_2", to=...), "sdxl", LOADERS[:4], INDEX_JSON, "`text_encoder_2`", "nothing"),
    (_index("scheduler", to=["mine", "MyScheduler"]), "sd", LOADERS[:3], INDEX_JSON, "`scheduler`", "'mine'"),
    (_index("scheduler", to=["diffusers", "MyScheduler"]), "sd", LOADERS[:3], INDEX_JSON, "stock scheduler", "'MyScheduler'"),
    (_index("tokenizer", to=["mine", "CLIPTokenizer"]), "sd", LOADERS[:3], INDEX_JSON, "`tokenizer`", "'mine'"),
    (_index("unet", to=["mine", "UNet2DConditionModel"]), "sd", ["diffusers"], INDEX_JSON, "`unet`", "'mine'"),
    (_index("text_encoder", "1", to="T5EncoderModel"), "sd", ["genai"], INDEX_JSON, "CLIPTextModel", "'T5EncoderModel'"),
    (_index("text_encoder_2", "1", to="CLIPTextModel"), "sdxl", ["genai"], INDEX_JSON, "CLIPTextModelWithProjection", "'CLIPTextModel'"),
    (_index("unet", "1", to="UNet2DModel"), "sd", ["genai"], INDEX_JSON, "UNet2DConditionModel", "'UNet2DModel'"),
    (_index("vae", "1", to="AutoencoderTiny"), "sd", ["genai"], INDEX_JSON, "AutoencoderKL", "'AutoencoderTiny'"),
    (_edit("vae/config.json", "_class_name", to="AutoencoderTiny"), "sd", ["diffusers"], INDEX_JSON, "`vae` to be AutoencoderTiny", "'AutoencoderKL'"),
    (_edit(VAE_JSON, "_class_name", to="AutoencoderTiny"), "sd", LOADERS[1:4], VAE_JSON, "`scaling_factor` 1.0", "0.18215"),
    # files
    (_remove(SCHEDULER_JSON), "sd", LOADERS[:4], SCHEDULER_JSON, "configuration", "no such file"),
    (_index("scheduler", "1", to="PNDMScheduler"), "sd", LOADERS[:4], SCHEDULER_JSON, "'PNDMScheduler'", "'DDIMScheduler'"),
    *((_remove(f"{network}/config.json"), "sd", LOADERS[1:], f"{network}/config.json", "configuration", "no such file") for network in ("text_encoder", "unet", "vae_decoder", "vae_encoder")),
    *((_remove(f"{name}/{file}"), "sd", ["diffusers"], f"{name}/{file}", "a file of", "") for name, file in (("text_encoder", "model.safetensors"), ("unet", "diffusion_pytorch_model.safetensors"), ("unet", "config.json"), ("vae", "diffusion_pytorch_model.safetensors"))),
    (_remove("vae"), "sd", ["diffusers"], "vae/config.json", "AutoencoderKL", "no such folder"),
    (_text("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "part-1.safetensors"}}'), "sd", ["diffusers"], "unet/part-1.safetensors", "weights", "no such file"),
    (_text("unet/diffusion_pytorch_model.bin", "pickle"), "sd", ["diffusers"], "unet/diffusion_pytorch_model.bin", "safetensors", "pickle"),
    (_text("text_encoder/model.ckpt", "pickle"), "sd", ["diffusers"], "text_encoder/model.ckpt", "safetensors", "pickle"),
    *((_remove(_path(format_, network)), "sd", [loader], _path(format_, network).replace("tiny", "NAME"), f"the graph of {network}", "no such file") for loader, format_ in FORMATS.items() for network in ("text_encoder", "unet", "vae_decoder")),
    (_remove(_path("onnx", "text_encoder_2")), "sdxl", ["ort"], "text_encoder_2/model.onnx", "the graph", "no such file"),
    (_remove("unet/openvino_model.bin"), "sd", ["openvino", "genai"], "unet/openvino_model.bin", "the weights", "no such file"),
    (_text("unet/openvino_model.bin", ""), "sd", ["openvino", "genai"], "unet/openvino_model.bin", "8 bytes", "0"),
    (_text("unet/openvino_model.xml", "<net>"), "sd", ["openvino", "genai"], "unet/openvino_model.xml", "whole", "not an OpenVINO model"),
    (_text("unet/model.onnx", "not protobuf"), "sd", ["ort"], "unet/model.onnx", "whole", "not an ONNX model"),
    (_text(f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel", "not"), "sd", ["swift"], PACKAGE, "whole", "not a whole Core ML package"),
    (_external("model.onnx_data", write=False), "sd", ["ort"], "unet/model.onnx_data", "the weights", "no such file"),
    (_external("model.onnx_data", size=7), "sd", ["ort"], "unet/model.onnx_data", "8 bytes", "7"),
    (_external("../model.onnx_data"), "sd", ["ort"], "unet/model.onnx", "own folder", "../model.onnx_data"),
    # configurations
    *((_edit(UNET_JSON, key, to=...), "sdxl", LOADERS[1:], UNET_JSON, f"`{key}`", "no such key") for key in ("in_channels", "sample_size", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim")),
    *((_edit(TEXT_JSON, key, to=...), "sd", LOADERS[1:], TEXT_JSON, f"`{key}`", "no such key") for key in ("max_position_embeddings", "num_hidden_layers", "hidden_size", "vocab_size")),
    (_edit("text_encoder_2/config.json", "projection_dim", to=...), "sdxl", LOADERS[1:], "text_encoder_2/config.json", "`projection_dim`", "no such key"),
    *((_edit(VAE_JSON, key, to=...), "sd", LOADERS[1:], VAE_JSON, f"`{key}`", "no such key") for key in ("scaling_factor", "latent_channels", "in_channels", "out_channels", "block_out_channels")),
    (_edit("vae_encoder/config.json", "scaling_factor", to=1.0), "sd", LOADERS[1:], "vae_encoder/config.json", "0.18215", "1.0"),
    (_edit(TEXT_JSON, "hidden_size", to=16), "sd", LOADERS, UNET_JSON, "`cross_attention_dim` 16", "8"),
    (_edit(UNET_JSON, "out_channels", to=8), "sd", LOADERS, UNET_JSON, "`out_channels` 4", "8"),
    # guidance
    (_edit(UNET_JSON, "time_cond_proj_dim", to=None), "lcm", LOADERS[:4], UNET_JSON, "'embedded'", "null"),
    (_edit(UNET_JSON, "time_cond_proj_dim", to=256), "sd", LOADERS[:4], UNET_JSON, "null, for the guidance mode", "256"),
    (_edit(UNET_JSON, "time_cond_proj_dim", to=256), "sd", LOADERS[1:4], "unet/", "input `timestep_cond`", "inputs sample"),
    (_index("_class_name", to=SINGLE), "sd", LOADERS[:4], UNET_JSON, SINGLE, "null"),
    (_graph("onnx", "unet", "sample f32 B", "sample f32 1"), "sd", ["ort"], "unet/model.onnx", "or 2 for guidance 'cfg'", "batch 1"),
    (_graph("openvino", "unet", "sample f32 B", "sample f32 2", "lcm"), "lcm", ["openvino", "genai"], "unet/openvino_model.xml", "or 1 for guidance 'embedded'", "batch 2"),
    (_graph("openvino", "unet", "timestep i64 ?", "timestep i64 2"), "sd", ["genai"], "unet/openvino_model.xml", "`timestep` of shape [1]", "[2]"),
    # tokenizers
    *((_remove(f"tokenizer/{file}"), "sd", LOADERS[:3], f"tokenizer/{file}", "tokenizer", "no such file") for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")),
    *((_remove(f"tokenizer_2/openvino_tokenizer.{end}"), "sdxl", ["genai"], f"tokenizer_2/openvino_tokenizer.{end}", "an OpenVINO model", "no such file") for end in ("xml", "bin")),
    (lambda root: _write_graph(root / "tokenizer/openvino_tokenizer.xml", "text i64 B -> ids i64 B,n"), "sd", ["genai"], "tokenizer/openvino_tokenizer.xml", "`input_ids`", "outputs ids"),
    (_edit(TEXT_JSON, "vocab_size", to=4), "sd", LOADERS[:3], "tokenizer/vocab.json", "at most 4", "5"),
    (_edit("tokenizer/vocab.json", "<|endoftext|>", to=...), "sd", LOADERS[:3], "tokenizer/vocab.json", "<|endoftext|>", "no such word"),
    (_text("tokenizer/merges.txt", "#version: 0.2\na b\nb b\n"), "sd", LOADERS[:3], "tokenizer/merges.txt", "a word of vocab.json", "1 others, such as 'b b'"),
    # schedulers
    (_scheduler(clip_sample=True), "sd", LOADERS[:4], SCHEDULER_JSON, "`clip_sample` false", "True"),
    (_scheduler(clip_sample=...), "sd", LOADERS[:4], SCHEDULER_JSON, "`clip_sample` false", "which is true"),
    (_scheduler(thresholding=True), "sd", ["genai"], SCHEDULER_JSON, "`thresholding` false", "True"),
    (_scheduler(beta_schedule="squaredcos_cap_v2"), "sd", ["genai"], SCHEDULER_JSON, "scaled_linear", "'squaredcos_cap_v2'"),
    (_scheduler(timestep_spacing="karras"), "sd", ["genai"], SCHEDULER_JSON, "trailing", "'karras'"),
    *((_scheduler(_class_name=f"{name}Scheduler"), "sd", ["genai"], SCHEDULER_JSON, "`_class_name` to be one of LCMScheduler", f"'{name}Scheduler'") for name in ("DDPM", "DPMSolverMultistep", "UniPCMultistep", "TCD", "HeunDiscrete")),
    *((_scheduler(prediction_type=kind), "lcm", ["genai"], SCHEDULER_JSON, "'epsilon' with LCMScheduler", f"'{kind}'") for kind in ("v_prediction", "sample")),
    (_scheduler(_class_name="DDIMScheduler"), "lcm", LOADERS[:3], SCHEDULER_JSON, "LCMScheduler in a", "'DDIMScheduler'"),
    *((_sampler(DDIM, steps), "sd", ["genai"], SCHEDULER_JSON, f"the {steps} steps", "-1") for steps in (9, 11, 12, 18, 21, 22, 30)),
    (_scheduler(timestep_spacing="leading"), "sd", LOADERS[:4], SCHEDULER_JSON, "the 2 steps of sampler.json", "the table's 999"),
    (_scheduler(original_inference_steps=40), "lcm", LOADERS[:4], SCHEDULER_JSON, "the 4 steps of sampler.json", "share of the state"),
    *((_scheduler(**{key: value}), "sd", ["swift"], SCHEDULER_JSON, f"`{key}`", repr(value)) for key, value in (("beta_start", 0.001), ("beta_end", 0.02), ("beta_schedule", "linear"), ("num_train_timesteps", 500), ("prediction_type", "v_prediction"))),
    (_sampler(EULER, 5), "sd", ["swift"], "sampler.json", "whole time steps", "749.25"),
    (_text("samplers/swift.json", "{"), "sd", LOADERS, "samplers/swift.json", "whole", "not a JSON file"),
    # Swift
    *((_remove(f"coreml/Resources/{file}"), "sd", ["swift"], f"coreml/Resources/{file}", "tokenizer", "no such file") for file in ("vocab.json", "merges.txt")),
    (_text("coreml/Resources/merges.txt", "#version: 0.2\n"), "sd", ["swift"], "coreml/Resources/merges.txt", "the bytes of tokenizer/merges.txt", "others"),
    (_graph("coreml", "unet", "noise_pred f32 2,4,8,8", "noise_pred f32 2,4,8,8 | more f32 2,4,8,8"), "sd", ["swift"], PACKAGE, "outputs noise_pred", "output `more`"),
    (_graph("coreml", "vae_decoder", "image f32 1,3,16,16", "image f32 1,3,16,16 | more f32 1"), "sd", ["swift"], _path("coreml", "vae_decoder"), "outputs image", "output `more`"),
    (_graph("coreml", "unet", "sample f16", "timestep_cond f16 1,256 | sample f16", "lcm"), "lcm", ["swift"], PACKAGE, "inputs sample", "`timestep_cond`"),
    (_graph("coreml", "unet", "2,8,1,77", "2,77,8"), "sd", ["swift"], PACKAGE, "rank 4", "rank 3"),
    (_graph("coreml", "unet", "timestep f16 2", "timestep f16 1"), "sd", ["swift"], PACKAGE, "with batch 2", "[1]"),
    (_graph("coreml", "unet", " 2,", " 3,"), "sd", ["swift"], PACKAGE, "batch 1 or 2", "batch 3"),
    (_graph("coreml", "unet", " 2,", " 1,", "sdxl"), "sdxl", ["swift"], PACKAGE, "batch 2", "batch 1"),
    (_graph("coreml", "unet", " 1,", " 2,", "lcm"), "lcm", ["swift"], PACKAGE, "batch 1 for guidance 'embedded'", "batch 2"),
    (_both(_text(MODELC.format("Unet"), "[]"), _text(MODELC.format("UnetChunk1"), "[]"), _text(MODELC.format("UnetChunk2"), "[]")), "sd", ["swift"], "coreml/Resources/Unet.mlmodelc", "either", "UnetChunk1.mlmodelc"),
    (_text("coreml/Resources/Unet.mlmodelc/model.mil", ""), "sd", ["swift"], MODELC.format("Unet"), "description", "no such file"),
    (_chunks(second=CHUNK_2.replace("input_2", "input_3")), "sd", ["swift"], _path("coreml", "unet_chunk2"), "outputs of chunk 1", "`input_3`"),
    (_chunks(second=CHUNK_2 + " | more f32 2"), "sd", ["swift"], _path("coreml", "unet_chunk2"), "one output `noise_pred`", "noise_pred, more"),
    (_both(_chunks(), _remove(_path("coreml", "unet_chunk2"))), "sd", ["swift"], _path("coreml", "unet_chunk2").replace("tiny", "NAME"), "both chunks", "no such"),
    (_chunks(whole=("constexpr_lut_to_dense",)), "sd", ["swift"], _path("coreml", "unet_chunk1"), "constexpr_lut_to_dense", "not packed"),
    (_split_einsum_v2, "sd", ["swift"], PACKAGE, "multiples of 512", "960"),
]
WARNINGS = [
    (_graph("onnx", "unet", "timestep f32", "timestep f32 B"), "sd", ["ort"], "unet/model.onnx", "rank 0", "rank 1"),
    (_graph("onnx", "unet", "f32", "f16"), "sd", ["ort"], "unet/model.onnx", "`sample` of float32", "float16"),
    (_external("a", "b"), "sd", ["ort"], "unet/model.onnx", "model.onnx_data", "2 files"),
    (_edit(UNET_JSON, "time_cond_proj_dim", to=...), "sd", ["ort", "openvino"], UNET_JSON, "`time_cond_proj_dim`", "no such key"),
    (_scheduler(beta_start=...), "sd", LOADERS[:4], SCHEDULER_JSON, "`beta_start`", "no such key"),
    (_sampler(DDIM, 2, "none"), "sd", ["ort"], INDEX_JSON, "IO binding turned off", "garbage"),
    *((_both(_scheduler(_class_name=f"{name}Scheduler"), _index("scheduler", "1", to=f"{name}Scheduler")), "sd", LOADERS[:4], SCHEDULER_JSON, "the 2 steps of sampler.json", "not known") for name in NOT_COMPILED),
    (_graph("coreml", "unet", " 2,", " 1,"), "sd", ["swift"], PACKAGE, "batch 2 for guidance 'cfg'", "batch 1"),
    (_remove("samplers"), "sd", ["swift"], "sampler.json", "linspace with 1, 2, 3 steps", "none"),
    (_tiny, "sd", ["genai"], "vae_encoder/config.json", "AutoencoderKL for image-to-image", "AutoencoderTiny"),
    (_chunks(whole=()), "sd", ["swift"], PACKAGE, "either", "unet_chunk1"),
    (lambda root: (root / PACKAGE).rename(root / "coreml/packages/mine_unet.mlpackage"), "sd", ["swift"], "coreml/packages/mine_unet.mlpackage", "Stable_Diffusion_version_", "mine"),
]
# fmt: on


@pytest.mark.parametrize(
    ("level", "case"),
    [("error", case) for case in ERRORS] + [("warning", case) for case in WARNINGS],
)
def test_every_bad_combination_is_found_with_loader_file_expected_and_found(folder, level, case):
    edit, kind, loaders, file, expected, found = case
    root = folder(kind)
    edit(root)
    for loader in loaders:
        findings = check_layout(root, [loader])
        assert any(
            (item.loader, item.level) == (loader, level)
            and item.file.startswith(file)
            and expected in item.expected
            and found in item.found
            and item.way_out
            for item in findings
        ), f"{loader}: {findings}"


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_a_scheduler_that_genai_has_is_no_error(folder, name):
    root = folder("sd")
    _both(
        _scheduler(_class_name=f"{name}Scheduler"), _index("scheduler", "1", to=f"{name}Scheduler")
    )(root)
    assert [item for item in check_layout(root, LOADERS) if item.level == "error"] == []


def test_a_small_autoencoder_suits_all_but_the_class_that_is_declared(folder):
    root = folder("sd")
    _tiny(root)
    assert check_layout(root, ["ort", "openvino"]) == []
    (found,) = check_layout(root, ["diffusers"])
    assert (found.file, found.found) == (INDEX_JSON, "'AutoencoderKL'")


MMDIT = "latent_image_embeddings f16 2,4,8,8 | token_level_text_embeddings f16 2,32,1,154 | pooled_text_embeddings f16 2,16,1,1 | timestep f16 2 -> denoiser_output f32 2,4,8,8"


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
def test_swift_reads_the_transformer_of_stable_diffusion_3(folder, old, new, expected, found):
    root = folder()
    _index("_class_name", to="StableDiffusion3Pipeline")(root)
    _index("unet", to=...)(root)
    _index("transformer", to=["diffusers", "SD3Transformer2DModel"])(root)
    _save(root / "transformer/config.json", {"in_channels": 4})
    _write_graph(root / _path("coreml", "mmdit"), MMDIT)
    assert check_layout(root, ["swift"]) == []
    _write_graph(root / _path("coreml", "mmdit"), MMDIT.replace(old, new, 1))
    findings = check_layout(root, ["swift"])
    assert any(expected in item.expected and found in item.found for item in findings), findings


@pytest.mark.parametrize(
    "edit",
    [
        _index("scheduler", to=["diffusers", ["DDIMScheduler"]]),
        _index("unet", to={"a": 1}),
        _index("_class_name", to=3),
        _scheduler(num_train_timesteps="many"),
        _scheduler(beta_schedule=["linear"]),
        _scheduler(_class_name={"a": 1}),
        _edit("unet/config.json", "cross_attention_dim", to="wide"),
        _edit("vae_decoder/config.json", "latent_channels", to="four"),
        _edit("text_encoder/config.json", "num_hidden_layers", to="two"),
        _text("tokenizer/vocab.json", "[]"),
        _text("sampler.json", '{"stages": 3}'),
        _text("unet/openvino_model.xml", '<net><layers><layer type="Const"><data size="x"/></layer></layers></net>'),
        _text("coreml/packages/Stable_Diffusion_version_tiny_unet.mlpackage/Manifest.json", "{"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_a_finding_and_never_a_crash(folder, edit):
    root = folder()
    edit(root)
    assert check_layout(root, LOADERS) != []


@pytest.mark.parametrize(
    "edit",
    [
        _edit("unet/config.json", "block_out_channels", to=3),
        _text("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": 3}'),
        _text("edgedistill.json", '{"artifacts": {"a": {"format": "coreml", "networks": 3}}}'),
        _text("edgedistill.json", '{"artifacts": [1]}'),
    ],
)
def test_what_is_malformed_and_not_needed_is_passed_over(folder, edit):
    root = folder()
    edit(root)
    assert check_layout(root, LOADERS) == []


def test_chunks_alone_and_what_costs_nothing_are_fine(folder):
    root = folder()
    _both(
        _chunks(),
        _graph("coreml", "vae_decoder", "z f16", "z f32"),
        _graph("coreml", "text_encoder", "last_hidden_state f32", "last_hidden_state f16"),
        _graph("openvino", "text_encoder", "input_ids i64", "input_ids i32"),
    )(root)
    assert check_layout(root, ["swift", "genai"]) == []


def test_openvino_genai_takes_outputs_by_their_place(folder):
    root = folder("sdxl")
    line = _graphs("sdxl")["openvino"]["text_encoder_2"]
    first, second = "text_embeds f32 B,6", "last_hidden_state f32 B,n,12"
    swapped = line.replace(f"{first} | {second}", f"{second} | {first}")
    _write_graph(root / "text_encoder_2/openvino_model.xml", swapped)
    (finding,) = check_layout(root, ["openvino", "genai"])
    assert (finding.loader, finding.file) == ("genai", "text_encoder_2/openvino_model.xml")
    assert finding.expected.startswith("outputs text_embeds, last_hidden_state")
    assert finding.found.startswith("outputs last_hidden_state, text_embeds")


def test_the_path_of_a_folder_for_openvino_genai_has_no_text_encoder_in_it(folder, tmp_path):
    root = folder().rename(tmp_path / "my_text_encoders")
    (finding,) = check_layout(root, ["diffusers", "openvino", "genai"])
    assert (finding.loader, finding.expected) == ("genai", "a path without `text_encoder`")
    assert "my_text_encoders" in finding.found


def test_a_palette_is_told_by_its_number_of_values(tmp_path):
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
        _write_core_ml(path, [], [], [])
        model = path / "Data/com.apple.CoreML/model.mlmodel"
        spec = Model_pb2.Model.FromString(model.read_bytes())
        block = spec.mlProgram.functions["main"].block_specializations["CoreML7"]
        block.operations.append(operation)
        model.write_bytes(spec.SerializeToString())
        assert read_graph(path).compression == {"constexpr_lut_to_dense 16"}


def test_only_loaders_that_the_folder_is_meant_for_are_asked(folder, tmp_path):
    root = folder()
    for path in root.rglob("openvino_*"):
        path.unlink()
    shutil.rmtree(root / "coreml")
    assert loaders_of(root) == ("diffusers", "ort")
    assert check_layout(root) == []
    assert {item.loader for item in check_layout(root, LOADERS)} == {"openvino", "genai", "swift"}
    assert loaders_of(tmp_path) == ("diffusers",)


def test_what_cannot_be_checked_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"nowhere: no such folder"):
        check_layout(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"Unknown loader 'tensorrt': choose of diffusers, ort"):
        check_layout(tmp_path, ["tensorrt"])


RESIDUALS = ["8,8,8", "8,8,8", "8,4,4", "16,4,4", "16,4,4"]
CONTROL = ["coreml/packages/ControlNet_edges.mlpackage", _path("coreml", "control-unet")]
CONTROL_CLASS = "StableDiffusionControlNetPipeline"


def _residuals(dtype: str) -> str:
    return " | ".join(
        f"additional_residual_{i} {dtype} 2,{shape}" for i, shape in enumerate(RESIDUALS)
    )


def _control_lines() -> list[str]:
    """Return the graphs of a ControlNet and of its UNet, as Apple's converter declares them."""
    inputs, output = _graphs("sd")["coreml"]["unet"].split(" -> ")
    side = f"{inputs} | controlnet_cond f16 2,3,16,16 -> {_residuals('f32')}"
    return [side, f"{inputs} | {_residuals('f16')} -> {output}"]


def _controlled(root: Path) -> Path:
    """Give a folder a ControlNet, and to Swift the UNet that takes it."""
    _remove(PACKAGE)(root)
    for path, line in zip(CONTROL, _control_lines(), strict=True):
        _write_graph(root / path, line)
    _index("_class_name", to=CONTROL_CLASS)(root)
    _index("controlnet", to=["diffusers", "ControlNetModel"])(root)
    config = _configs("sd")["unet"] | {"layers_per_block": 1, "conditioning_channels": 3}
    for name in ("unet", "controlnet"):
        _save(root / name / "config.json", config)
    (root / "controlnet/diffusion_pytorch_model.safetensors").touch()
    return root


def test_who_opens_a_pipeline_with_a_controlnet(folder):
    root = _controlled(folder())
    assert check_layout(root, ["diffusers", "swift"]) == []
    for loader in ("ort", "openvino", "genai"):
        (found,) = check_layout(root, [loader])
        assert (found.file, found.found) == (INDEX_JSON, repr(CONTROL_CLASS))
        assert found.expected == "a pipeline without a ControlNet: this loader has no other"
    _index("_class_name", to="StableDiffusionXLControlNetPipeline")(root)
    assert [item.found for item in check_layout(root, ["swift"])] == [
        "'StableDiffusionXLControlNetPipeline'"
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_every_tensor_between_a_controlnet_and_its_denoiser_is_held_to(folder, number):
    root, path, line = _controlled(folder()), CONTROL[number], _control_lines()[number]
    for name, dtype, sizes in itertools.chain(*map(_tensors, line.split(" -> "))):
        before = f" {name} {dtype} {','.join(sizes)} "
        other = "f16" if dtype == "f32" else "i32"
        for after, expected in (
            (before.replace(name, "other"), f"`{name}`"),
            (before.replace(dtype, other), f"`{name}` of {FULL[dtype]}"),
            (f"{before.rstrip()},1 ", f"rank {len(sizes)}"),
            (f" {name} {dtype} {','.join([sizes[0], '99', *sizes[2:]])} ", f"`{name}` of "),
        ):
            broken = f" {line} ".replace(before, after).strip()
            if broken == line or (name, other) == ("noise_pred", "f16"):
                continue  # a timestep has one size; Swift converts what the UNet gives
            _write_graph(root / path, broken)
            found = [item for item in check_layout(root, ["swift"]) if item.level == "error"]
            assert any(item.file == path and expected in item.expected for item in found), broken


@pytest.mark.parametrize(
    ("edit", "loader", "file", "expected"),
    [
        (_remove(CONTROL[0]), "swift", "coreml/packages/ControlNet_NAME", "graph of controlnet"),
        (_remove(CONTROL[1]), "swift", "control-unet.mlpackage", "the graph of control-unet"),
        (_remove("controlnet/config.json"), "swift", "controlnet/config.json", "configuration"),
        (_remove("controlnet/config.json"), "diffusers", "controlnet/config", "ControlNetModel"),
        (_index("controlnet", to=Ellipsis), "diffusers", INDEX_JSON, "`controlnet` as [library"),
        (
            _edit("controlnet/config.json", "layers_per_block", to=2),
            *("swift", CONTROL[0], "additional_residual_6"),
        ),
        (
            _edit("controlnet/config.json", "block_out_channels", to=[]),
            *("swift", CONTROL[0], "outputs "),
        ),
        (
            _text(MODELC.format("controlnet/Edges").replace("metadata.json", "a"), ""),
            *("swift", MODELC.format("controlnet/Edges"), "the compiler's description"),
        ),
    ],
    ids=itertools.count(),
)
def test_what_a_pipeline_with_a_controlnet_lacks(folder, edit, loader, file, expected):
    root = _controlled(folder())
    edit(root)
    found = check_layout(root, [loader])
    assert any(file in item.file and expected in item.expected for item in found), found


def test_swift_calls_a_controlnet_with_two_samples_for_one_unet(folder):
    root = _controlled(folder())
    for path, line in zip(CONTROL, _control_lines(), strict=True):
        _write_graph(
            root / path, line.replace(" 2,", " 1,").replace("timestep f16 2", "timestep f16 1")
        )
    found = check_layout(root, ["swift"])
    assert {(item.file, item.found) for item in found} == {(path, "batch 1") for path in CONTROL}
    for path, line in zip(CONTROL, _control_lines(), strict=True):
        _write_graph(root / path, line)
    wide = _control_lines()[0].replace(" 2,16,4,4", " 2,32,4,4")
    _write_graph(root / CONTROL[0], wide)
    _edit("controlnet/config.json", "block_out_channels", to=[8, 32])(root)
    found = check_layout(root, ["swift"])
    assert [item.found for item in found] == ["(2, 32, 4, 4)"] * 2
    assert "`additional_residual_3` of (2, 16, 4, 4), as control-unet" in found[0].expected


def test_nothing_of_torch_is_needed(valid):
    blocked = "sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers']))"
    code = f"import sys; {blocked}; from edgedistill.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check-layout", str(valid / "sdxl"), "--loader", "all"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout.count("fine")) == (0, 5), made.stdout + made.stderr


def test_the_command_prints_findings_and_fails_on_errors(folder, capsys):
    root = folder()
    assert main(["check-layout", str(root)]) == 0
    assert capsys.readouterr().out.split() == [w for name in LOADERS for w in (f"{name}:", "fine")]
    _external("a", "b")(root)
    assert main(["check-layout", str(root), "--loader", "ort"]) == 0
    assert "ort: 1 warning\n  warning: unet/model.onnx\n" in capsys.readouterr().out
    assert main(["check-layout", str(root), "--runtime", "ort"]) == 2
    assert "--runtime" in capsys.readouterr().err
    (root / "unet/model.onnx").unlink()
    assert main(["check-layout", str(root), "--loader", "all", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["loaders"] == list(LOADERS)
    assert told["findings"] == [
        {
            "file": "unet/model.onnx",
            "expected": "the graph of unet",
            "found": "no such file",
            "way_out": "export it",
            "level": "error",
            "loader": "ort",
        }
    ]
