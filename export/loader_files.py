"""The files around the graphs by which loaders open a pipeline: index, scheduler, tokenizers, configurations."""

import importlib.util
import shutil
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from edgedistill.errors import ContractError, require
from edgedistill.files import read_json, write_bytes, write_json
from edgedistill.plans import PORTABLE_STEPS
from edgedistill.schedule import betas_of
from edgedistill.stock import objections
from edgedistill.student import Student
from edgedistill.swift import write_swift_sources
from edgedistill.tables import tokenizers_of
from edgedistill.telemetry import require_silent

from .formats import PORTABLE, Job
from .layouts import CONTROLNET, INDEX, RESOURCES, SOURCES

SCHEDULER = "scheduler/scheduler_config.json"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_SETTINGS, _MARKS = "tokenizer_config.json", "special_tokens_map.json"
_NEEDED = (_VOCABULARY, _MERGES, _SETTINGS, _MARKS)
"""What loaders read of a tokenizer; what a source lacks of it is made of the rest."""
_TOKENIZER_FILES = (*_NEEDED, "tokenizer.json", "added_tokens.json")
_OPENVINO_TOKENIZER = "openvino_tokenizer.xml"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_HALVES = ("vae_decoder", "vae_encoder")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_CONVERTER = "openvino_tokenizers"
_COMPILE = "compile_on_mac.sh"
_OURS = ("scalar_inputs", "image_channels", "residual_inputs", "mask_input")


def write_loader_files(student: Student, root: Path, formats: Collection[str]) -> None:
    """Write what loaders read beside the graphs and the weights.

    Args:
        student: One of which `why_not` has nothing to say.
        root: The folder; the networks' own folders with their ``config.json`` are there.
        formats: Of the artifacts that it holds.
    """
    tokenizers = _tokenizers(student)
    for name in tokenizers:
        _write_tokenizer(student, root / name)
        if "openvino" in formats and _converts():
            _write_openvino_tokenizer(root / name)
    write_json(root / SCHEDULER, _scheduler(student, formats))
    for name in _HALVES:
        if name in student.signatures:
            (root / name).mkdir(exist_ok=True)
            shutil.copy2(student.folder(name) / "config.json", root / name / "config.json")
    if "coreml" in formats:
        _write_apples(student, root)
    write_json(root / INDEX, _index(student, tokenizers, formats))


def notes(root: Path, formats: Collection[str]) -> Iterator[str]:
    """Say what a root cannot do because a package is not installed that writes a file of it.

    Args:
        root: A single root.
        formats: Of the artifacts that it holds.
    """
    held = [name for name in _TOKENIZERS if (root / name).is_dir()] if "openvino" in formats else []
    if lacking := [name for name in held if not (root / name / _OPENVINO_TOKENIZER).is_file()]:
        files = ", ".join(f"{name}/{_OPENVINO_TOKENIZER}" for name in lacking)
        yield (
            f"{root}: has no {files}, without which OpenVINO GenAI reads no prompt (the other loaders do): "
            f'{_CONVERTER} is not installed; run: pip install "edgedistill[interop]", then this export again, '
            "which adds what lacks."
        )


def why_not(student: Student) -> str | None:
    """Say what a student has that no pipeline of the loaders has, or return None."""
    import diffusers

    table = student.table
    scheduler: Mapping[str, Any] = table.annotations.get("scheduler") or {}
    if not hasattr(diffusers, str(scheduler.get("_class_name"))):
        return "a sampler that no scheduler of diffusers makes"
    rows = [row for row in table.rows if row.call]
    if reasons := objections(scheduler, len(rows), table)["diffusers"]:
        return f"a sampler that its {scheduler['_class_name']} does not make: {reasons[0]}"
    for name in tokenizers_of(student.samplers):
        path = student.root / name
        if path.is_dir() and all((path / word).is_file() for word in (_VOCABULARY, _MERGES)):
            continue
        model = read_json(path / "tokenizer.json" if path.is_dir() else path)["model"]
        if model.get("type") != "BPE" or not {_START, _END} <= set(model["vocab"]):
            return f"a tokenizer that is not CLIP's but a {model.get('type')}"
    return None


def _scheduler(student: Student, formats: Collection[str]) -> dict[str, Any]:
    """Return the configuration of the stock scheduler that makes the steps of a student's table."""
    import diffusers

    held = {**student.table.annotations["scheduler"], "_diffusers_version": diffusers.__version__}
    if "openvino" in formats and held.get("beta_schedule") in ("linear", "scaled_linear"):
        # The line that openvino.genai 2026.4 draws ends one beta early, which is 0.3 % of the last alpha.
        held["trained_betas"] = betas_of(held).tolist()
    return held


def make_stock(folder: Path) -> None:
    """Give a denoiser with the one further input w the name of the stock class, which has a place for it."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("_class_name") == "ExtendedUNet2DConditionModel":
        stock = {key: value for key, value in config.items() if key not in _OURS}
        write_json(path, {**stock, "_class_name": "UNet2DConditionModel"})


def pipeline_class(student: Student) -> str:
    """Return the class of diffusers' that loaders know a student as."""
    config = read_json(student.folder("unet") / "config.json")
    of = "ControlNet" if CONTROLNET in student.signatures else ""
    if config.get("addition_embed_type") == "text_time":
        return f"StableDiffusionXL{of}Pipeline"
    if of:
        return f"StableDiffusion{of}Pipeline"
    if student.table.guidance.mode == "embedded":
        return "LatentConsistencyModelPipeline"
    return "StableDiffusionPipeline"


def _index(
    student: Student, tokenizers: Collection[str], formats: Collection[str]
) -> dict[str, Any]:
    import diffusers

    # OpenVINO GenAI opens no other class, and runs a small decoder under that name; diffusers wants its own.
    vae = "AutoencoderKL"
    if "openvino" not in formats:
        vae = str(read_json(student.folder("vae_decoder") / "config.json")["_class_name"])
    kind = pipeline_class(student)
    second, controlled = (name in student.signatures for name in ("text_encoder_2", CONTROLNET))
    index: dict[str, Any] = {
        "_class_name": kind,
        "_diffusers_version": diffusers.__version__,
        **({CONTROLNET: ["diffusers", "ControlNetModel"]} if controlled else {}),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", student.table.annotations["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        **({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]} if second else {}),
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
    }
    if second:
        source = student.root / INDEX
        held = read_json(source) if source.is_file() else {}
        zeros = held.get("force_zeros_for_empty_prompt", True)
        return {**index, "force_zeros_for_empty_prompt": zeros}
    return {**index, "requires_safety_checker": False, "safety_checker": [None, None]}


def _tokenizers(student: Student) -> list[str]:
    """Return the folders of the tokenizers of a student's text encoders."""
    pairs = zip(_TOKENIZERS, ("text_encoder", "text_encoder_2"), strict=True)
    return [name for name, encoder in pairs if encoder in student.signatures]


def _write_tokenizer(student: Student, folder: Path) -> None:
    """Copy a tokenizer's files; of those that loaders need, what lacks is made of the others, whatever was there."""
    source = student.root / folder.name
    folder.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    if source.is_dir():
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
    else:
        held = tokenizers_of(student.samplers)[_TOKENIZERS.index(folder.name)]
        shutil.copy2(student.root / held, folder / "tokenizer.json")
    if not all((folder / name).is_file() for name in (_VOCABULARY, _MERGES)):
        _derive_words(folder)
    settings = _settings(student, folder)
    if not (folder / _SETTINGS).is_file():
        write_json(folder / _SETTINGS, settings)
    if not (folder / _MARKS).is_file():
        write_json(folder / _MARKS, dict(_marks({**settings, **read_json(folder / _SETTINGS)})))


def _derive_words(folder: Path) -> None:
    model = read_json(folder / "tokenizer.json")["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_json(folder / _VOCABULARY, model["vocab"])
    write_bytes(folder / _MERGES, "\n".join(["#version: 0.2", *pairs, ""]).encode())


def _settings(student: Student, folder: Path) -> dict[str, Any]:
    text = student.table.condition("text")
    file = folder / "tokenizer.json"
    padding = (read_json(file).get("padding") if file.is_file() else None) or {}
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text.length if text else None,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": padding.get("pad_token", _END),
    }


def _marks(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the words that begin, end and fill prompts, which settings may hold with how they are stripped."""
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if (held := settings.get(name)) is not None:
            yield name, held["content"] if isinstance(held, dict) else held


def _converts() -> bool:
    """Say whether tokenizers can be written as OpenVINO GenAI reads them."""
    return importlib.util.find_spec(_CONVERTER) is not None


def _write_openvino_tokenizer(folder: Path) -> None:
    """Write the tokenizer as OpenVINO GenAI reads it."""
    ov = require_silent("openvino", "openvino")
    converter = require(_CONVERTER, "interop")
    from transformers import CLIPTokenizerFast

    fast = CLIPTokenizerFast.from_pretrained(folder)
    model = converter.convert_tokenizer(fast, with_detokenizer=False)
    ov.save_model(model, folder / _OPENVINO_TOKENIZER, compress_to_fp16=False)


def _write_apples(student: Student, root: Path) -> None:
    """Write what Apple's package reads beside compiled models, what compiles them, and sources that run any table."""
    (root / RESOURCES).mkdir(parents=True, exist_ok=True)
    for name in (_VOCABULARY, _MERGES):
        shutil.copy2(root / "tokenizer" / name, root / RESOURCES / name)
    script = resources.files("export").joinpath("assets", _COMPILE).read_bytes()
    write_bytes(root / "coreml" / _COMPILE, script)
    (root / "coreml" / _COMPILE).chmod(0o755)
    write_swift_sources(root / SOURCES, student.samplers)


def check_jobs(student: Student, wanted: Collection[Job]) -> None:
    """Refuse what a loader could not run.

    Args:
        student: One of which `why_not` has nothing to say.
        wanted: What will be written to a single root.

    Raises:
        ContractError: If Apple's package has no such pipeline; if sizes shall be free beside a ControlNet,
            whose own are not; or if OpenVINO, whose loaders tell whole timesteps, would be told a fraction.
    """
    if any(job.format == "openvino" and job.sampler is None for job in wanted):
        _refuse_fractions(student)
    controlled = CONTROLNET in student.signatures
    if controlled and any(job.settings.get("free_sizes") for job in wanted):
        msg = f"{student.root}: a ControlNet is exported at one size; leave --dynamic out, or give height and width."
        raise ContractError(msg)
    apples = any(job.format == "coreml" for job in wanted)
    if apples and controlled and "text_encoder_2" in student.signatures:
        msg = f"{student.root}: Apple's package has no ControlNets for Stable Diffusion XL; export with --layout bundle."
        raise ContractError(msg)


def _refuse_fractions(student: Student) -> None:
    for name, table in student.samplers.items():
        for index, row in enumerate(table.rows):
            if broken := [time for time in row.feeds.values() if not float(time).is_integer()]:
                steps = ", ".join(map(str, PORTABLE_STEPS))
                msg = f"{student.root}: row {index} of the sampler {name!r} tells the network the timestep {broken[0]:g}, and OpenVINO's loaders tell whole ones only; ask for {steps} steps with --scheduler {PORTABLE}, or export with --layout bundle."
                raise ContractError(msg)
