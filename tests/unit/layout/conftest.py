"""Minimal folders that every loader opens, and changes to them, by what the files hold.

A graph is written as a line: "name dtype sizes" per tensor, inputs left of the arrow and outputs right of it; words are
free sizes, in Core ML 1 and 8. Between two arrows stands what is inside: a Core ML operation, a file of ONNX weights.
The signatures below are written by hand from the loaders' own sources, apart from those that are checked.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2
from onnx import helper

from edgedistill.compiler import compile_scheduler
from edgedistill.files import read_json
from edgedistill.layout.checking import check_layout
from edgedistill.layout.findings import FORMATS
from edgedistill.plans import swift
from edgedistill.stock import LOADERS
from edgedistill.table import Condition, Guidance, SamplerTable

PATHS = {
    "onnx": "{}/model.onnx",
    "openvino": "{}/openvino_model.xml",
    "coreml": "coreml/packages/Stable_Diffusion_version_tiny_{}.mlpackage",
}
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


def _lines(kind: str) -> dict[str, str]:
    """Return the same by their files."""
    graphs = _graphs(kind).items()
    return {PATHS[f].format(name): line for f, named in graphs for name, line in named.items()}


NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
STOCK = {**NOISE, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}
DDIM = {
    "_class_name": "DDIMScheduler",
    **STOCK,
    "thresholding": False,
    "timestep_spacing": "trailing",
}
LCM = {
    "_class_name": "LCMScheduler",
    **STOCK,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
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


def _table(config: Mapping[str, Any], steps: int, mode: str) -> SamplerTable:
    return compile_scheduler(
        config, steps, shape=(4, 8, 8), guidance=MODES[mode], conditions=(PROMPT,)
    )


VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "in_channels": 3,
    "latent_channels": 4,
    "out_channels": 3,
    "scaling_factor": 0.18215,
}
WORDS = {
    "vocab.json": {"a": 0, "b": 1, "ab": 2, "<|startoftext|>": 3, "<|endoftext|>": 4},
    "merges.txt": "#version: 0.2\na b\n",
}
TOKENIZER = {
    **WORDS,
    "tokenizer_config.json": {"model_max_length": 77},
    "special_tokens_map.json": {},
    "openvino_tokenizer.xml": "text i64 B -> input_ids i64 B,n",
}
PIPELINES = {
    "sd": "StableDiffusionPipeline",
    "lcm": "LatentConsistencyModelPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def _configs(kind: str) -> dict[str, dict[str, Any]]:
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


def _files(kind: str) -> dict[str, object]:
    """Return the files of a folder that every loader opens."""
    scheduler, steps, mode = (LCM, 4, "embedded") if kind == "lcm" else (DDIM, 2, "cfg")
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
    files = {"model_index.json": index, "scheduler/scheduler_config.json": scheduler}
    for name, config in _configs(kind).items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        files |= {f"{name}/config.json": config, f"{name}/{stem}.safetensors": ""}
    for name in [name for name in index if name.startswith("tokenizer")]:
        files |= {f"{name}/{file}": held for file, held in TOKENIZER.items()}
    files |= {f"coreml/Resources/{file}": held for file, held in WORDS.items()}
    files["sampler.json"] = _table(scheduler, steps, mode)
    files["samplers/swift.json"] = swift(NOISE, 2, shape=(4, 8, 8)).table
    return files | _lines(kind)


def _write(path: Path, held: object) -> None:
    """Write a table, a graph from its line, another text, or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(held, SamplerTable):
        held.save(path)
    elif isinstance(held, str) and " -> " in held:
        _write_graph(path, held)
    else:
        text = held if isinstance(held, str) else json.dumps(held)
        path.write_text(text, encoding="utf-8")


Side = list[tuple[str, str, list[str]]]
ONNX = {"f32": 1, "i32": 6, "i64": 7, "f16": 10}
OPENVINO = {"f32": "FP32", "f16": "FP16", "i64": "I64", "i32": "I32"}
CORE_ML = {"f32": 65568, "f16": 65552, "i32": 131104}


def _write_graph(path: Path, line: str) -> None:
    inputs, *inside, outputs = line.split(" -> ")
    writer = {".onnx": _write_onnx, ".xml": _write_openvino, ".mlpackage": _write_core_ml}
    writer[path.suffix](path, _tensors(inputs), inside, _tensors(outputs))


def _tensors(side: str) -> Side:
    parts = [item.replace(",", " ").split() for item in side.split(" | ")]
    return [(name, dtype, sizes) for name, dtype, *sizes in parts]


def _write_onnx(path: Path, inputs: Side, inside: list[str], outputs: Side) -> None:
    sides = [
        [
            helper.make_tensor_value_info(
                name, ONNX[dtype], [int(size) if size.isdigit() else size for size in sizes]
            )
            for name, dtype, sizes in side
        ]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph([], "made", *sides)
    for file in inside:
        weights = graph.initializer.add(name=f"of {file}", data_type=ONNX["f32"], dims=[2])
        weights.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", "0"), ("length", "8")):
            weights.external_data.add(key=key, value=value)
    onnx.save(helper.make_model(graph), path)


def _write_openvino(path: Path, inputs: Side, inside: list[str], outputs: Side) -> None:
    def port(name: str, dtype: str, sizes: list[str]) -> str:
        dims = "".join(f"<dim>{size if size.isdigit() else -1}</dim>" for size in sizes)
        return f'<output><port id="2" precision="{OPENVINO[dtype]}" names="{name}">{dims}</port></output>'

    assert not inside
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


def _write_core_ml(path: Path, inputs: Side, inside: list[str], outputs: Side) -> None:
    spec = Model_pb2.Model(specificationVersion=8)
    for side, features in ((inputs, spec.description.input), (outputs, spec.description.output)):
        for name, dtype, sizes in side:
            array = FeatureTypes_pb2.ArrayFeatureType(
                shape=map(int, sizes), dataType=CORE_ML[dtype]
            )
            features.add(name=name).type.multiArrayType.CopyFrom(array)
    block = MIL_pb2.Block(operations=[MIL_pb2.Operation(type=name) for name in inside])
    function = MIL_pb2.Function(opset="CoreML7", block_specializations={"CoreML7": block})
    spec.mlProgram.CopyFrom(MIL_pb2.Program(version=1, functions={"main": function}))
    item = {"author": "com.apple.CoreML", "description": "", "name": "model.mlmodel"}
    item["path"] = "com.apple.CoreML/model.mlmodel"
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {"A": item}}
    (path / "Data/com.apple.CoreML/weights").mkdir(parents=True, exist_ok=True)
    (path / "Data" / item["path"]).write_bytes(spec.SerializeToString())
    _write(path / "Manifest.json", manifest | {"rootModelIdentifier": "A"})


def _changed(data: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**data, **keys}.items() if value is not ...}


def _change(root: Path, files: Mapping[str, object]) -> Path:
    for name, to in files.items():
        path = root / name
        if to is ...:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif isinstance(to, dict) and path.exists():
            _write(path, _changed(read_json(path), to))
        else:
            _write(path, to)
    return root


@pytest.fixture(scope="session")
def change() -> Callable[[Path, Mapping[str, object]], Path]:
    """Change files of a folder by what they are to hold; a dict sets keys of JSON; `...` removes a key or a file."""
    return _change


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that nothing is wrong with, by kind; never written to."""
    root = tmp_path_factory.mktemp("valid")
    for kind in PIPELINES:
        _change(root / kind, _files(kind))
    return root


@pytest.fixture(scope="module")
def scratch(valid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folders, whose graphs a test breaks and mends: hundreds of copies would take a minute."""
    return Path(shutil.copytree(valid, tmp_path_factory.mktemp("scratch"), dirs_exist_ok=True))


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the folder of a kind and change its files; of a pair (old, new) the text is replaced in a graph's line."""

    def copy(changes: Mapping[str, object] | None = None, kind: str = "sd") -> Path:
        lines, files = _lines(kind), {}
        for name, to in (changes or {}).items():
            files[name] = to
            if isinstance(to, tuple):
                assert to[0] in lines[name]
                files[name] = lines[name].replace(*to)
        return _change(Path(shutil.copytree(valid / kind, tmp_path / kind)), files)

    return copy


@pytest.fixture(scope="session")
def table() -> Callable[..., SamplerTable]:
    """Compile the scheduler of the folders, with other keys, to steps."""
    return lambda steps, mode="cfg", **keys: _table(_changed(DDIM, keys), steps, mode)


@pytest.fixture
def assert_found(folder: Callable[..., Path]) -> Callable[[str, tuple[Any, ...]], None]:
    """Assert that each loader has a finding of a level; case: changes, kind, loaders, file, in expected, in found."""

    def check(level: str, case: tuple[Any, ...]) -> None:
        changes, kind, loaders, file, expected, found = case
        root = folder(changes, kind)
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

    return check


def _every_tensor() -> Iterator[Any]:
    """Yield what of a tensor there is to break: its name, its dtype, its rank and a size."""
    for kind, loader in itertools.product(PIPELINES, LOADERS[1:]):
        for network, line in _graphs(kind)[FORMATS[loader]].items():
            if kind != "sd" and network.startswith(("vae", "safety")):
                continue  # the same as in the first kind
            path = PATHS[FORMATS[loader]].format(network)
            for tensor in re.split(r" -> | \| ", line):
                ((name, _, sizes),) = _tensors(tensor)
                for what in ("name", "dtype", "rank", *_fixed(loader, name, sizes)):
                    yield pytest.param(
                        (kind, loader, path, line, tensor, what),
                        id=f"{kind}-{loader}-{network}-{name}-{what}",
                    )


def _fixed(loader: str, name: str, sizes: list[str]) -> list[str]:
    """Return the last size that is held to, if there is one."""
    if name == "concept_scores" or "hidden_states." in name:
        return []
    fixed = [i for i, size in enumerate(sizes) if size.isdigit()]
    if FORMATS[loader] == "coreml":
        fixed = [i for i in fixed if i == 1 and len(sizes) > 1]
    return [f"size {i}" for i in fixed[-1:]]


@pytest.fixture(params=_every_tensor())
def tensor(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Every tensor of every graph: kind, loader, file, line, tensor in it, and what of it to break."""
    return request.param
