"""Checks of `model_index.json` and of the files that each loader opens."""

from collections.abc import Iterator, Mapping

from edgedistill.stock import WITH_CONTROLNETS

from .contracts import CONTROLNET
from .findings import Finding, check
from .folder import ENCODERS, INDEX, SCHEDULER, Folder
from .schedulers import DIFFUSERS_CLASSES

_EXPORT = "export the folder anew"
_SHARED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "FluxPipeline",
    "SanaPipeline",
)
PIPELINES: Mapping[str, tuple[str, ...]] = {
    "ort": _SHARED,
    "openvino": (
        *_SHARED,
        *("FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline"),
        *("SanaSprintPipeline", "LTXPipeline"),
    ),
    "genai": (
        *("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
        *("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"),
        *("FluxPipeline", "Flux2KleinPipeline"),
    ),
    "swift": (
        *("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
        *("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"),
        "StableDiffusionControlNetPipeline",
    ),
}
"""Classes that a loader maps to its own; openvino.genai's are those of its text-to-image pipeline."""

_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
_GENAI_CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_LEAVE_OUT = f"write [null, null] for an optional part: {', '.join(_OPTIONAL)}"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_NOT_PICKLES = ("openvino_model.bin", "openvino_tokenizer.bin", "openvino_detokenizer.bin")


def is_stable_diffusion(folder: Folder) -> bool:
    """Whether the pipeline is of the family with a UNet and CLIP: 1.x, 2.x, XL, latent consistency."""
    name = folder.pipeline
    return name.startswith(("StableDiffusion", "LatentConsistency")) and "Diffusion3" not in name


def is_xl(folder: Folder) -> bool:
    """Whether the pipeline is Stable Diffusion XL."""
    return folder.pipeline.startswith("StableDiffusionXL")


def is_known(folder: Folder, network: str) -> bool:
    """Whether loaders' contracts for a network are known here: Sana's autoencoder or T5, for example, are others."""
    if network.startswith("vae"):
        return folder.config(network).get("_class_name", _AUTOENCODERS[0]) in _AUTOENCODERS
    return is_stable_diffusion(folder) or network not in (*ENCODERS, "unet", CONTROLNET)


def without_controlnets(folder: Folder, loader: str) -> Iterator[Finding]:
    """A loader that has no ControlNets opens no pipeline with one, whatever its files are."""
    knows = loader in WITH_CONTROLNETS and not (loader == "swift" and is_xl(folder))
    if folder.is_controlled and not knows:
        yield Finding(
            INDEX,
            "a pipeline without a ControlNet: this loader has no other",
            repr(folder.pipeline),
            "run it with diffusers or edgedistill, or export the pipeline without its ControlNet too",
        )


@check("diffusers", "ort", "openvino", "genai", "swift")
def pipeline_class(folder: Folder, loader: str) -> Iterator[Finding]:
    """The class in the index is one that the loader knows, never one of another loader."""
    name = folder.pipeline
    if not folder.has(INDEX):
        yield Finding(INDEX, "a pipeline's index", "no such file", _EXPORT)
    elif not name or (loader == "diffusers" and name.startswith(("OV", "ORT"))):
        yield Finding(
            INDEX,
            "`_class_name` to be a class of diffusers",
            repr(name),
            "write the plain name, which all loaders map to theirs",
        )
    elif loader in PIPELINES and name not in PIPELINES[loader]:
        known = ", ".join(PIPELINES[loader])
        yield Finding(
            INDEX,
            f"`_class_name` to be one of {known}",
            repr(name),
            "run this pipeline with another loader, or write the class of diffusers that it is",
        )


@check("diffusers", "ort", "openvino", "genai")
def parts(folder: Folder, _: str) -> Iterator[Finding]:
    """Every part that the pipeline's class needs is named."""
    if not is_stable_diffusion(folder):
        return
    second = ("text_encoder_2", "tokenizer_2") if is_xl(folder) else ()
    control = (CONTROLNET,) if folder.is_controlled else ()
    for name in (*_PARTS, *second, *control):
        if name not in folder.entries:
            yield Finding(
                INDEX,
                f"`{name}` as [library, class]",
                str(folder.json(INDEX).get(name, "nothing")).replace("None", "null"),
                _EXPORT,
            )


@check("diffusers", "ort", "openvino")
def libraries(folder: Folder, loader: str) -> Iterator[Finding]:
    """No class comes from a private package, and the scheduler is one of diffusers'."""
    for name, (library, class_name) in folder.entries.items():
        if loader != "diffusers" and name in (*ENCODERS, "unet", "transformer", "vae"):
            continue  # their graphs are opened instead
        known = ("diffusers", "transformers", "stable_diffusion")
        if library not in known:
            yield Finding(
                INDEX,
                f"`{name}` to be of diffusers or transformers",
                f"[{library!r}, {class_name!r}]",
                "name a stock class; a private one is imported at loading",
            )
        elif name == "scheduler" and class_name not in DIFFUSERS_CLASSES:
            yield Finding(
                INDEX,
                "`scheduler` to be a stock scheduler of diffusers",
                repr(class_name),
                "name a stock scheduler that makes the same steps; ours is in sampler.json",
            )


@check("genai")
def genai_classes(folder: Folder, _: str) -> Iterator[Finding]:
    """openvino.genai compares class names with its own and throws where they differ."""
    if not is_stable_diffusion(folder):
        return
    for name, wanted in _GENAI_CLASSES.items():
        if name not in folder.entries or folder.entries[name][1] == wanted:
            continue
        tiny = folder.entries[name][1] == "AutoencoderTiny"
        yield Finding(
            INDEX,
            f"`{name}` to be {wanted}",
            repr(folder.entries[name][1]),
            "declare it AutoencoderKL in a folder for openvino.genai, which reads the exported decoder"
            if tiny
            else f"only a {wanted} runs there",
        )


@check("genai")
def genai_path(folder: Folder, _: str) -> Iterator[Finding]:
    """openvino.genai finds the tokenizer by replacing the first ``text_encoder`` of the whole path."""
    path = str(folder.root.resolve())
    if "text_encoder" in path:
        yield Finding(
            ".",
            "a path without `text_encoder`",
            path,
            "move the folder: the tokenizer is looked for at the first `text_encoder` in the path",
        )


@check("diffusers", "ort", "openvino", "genai")
def scheduler_file(folder: Folder, _: str) -> Iterator[Finding]:
    """The scheduler's configuration is there and names the class that the index names."""
    if not folder.has(SCHEDULER):
        yield Finding(SCHEDULER, "the scheduler's configuration", "no such file", _EXPORT)
        return
    told, named = folder.json(SCHEDULER).get("_class_name"), folder.entries.get("scheduler")
    if named and told != named[1]:
        yield Finding(
            SCHEDULER,
            f"`_class_name` {named[1]!r}, as {INDEX} says",
            repr(told),
            "name one scheduler in both: loaders differ in which of the two they read",
        )


@check("ort", "openvino", "genai", "swift")
def network_configs(folder: Folder, _: str) -> Iterator[Finding]:
    """Every network has its configuration."""
    for network in folder.networks:
        if not folder.has(f"{network}/config.json"):
            yield Finding(
                f"{network}/config.json", "the network's configuration", "no such file", _EXPORT
            )


@check("diffusers")
def weights(folder: Folder, _: str) -> Iterator[Finding]:
    """Every model has its configuration and its weights as safetensors."""
    for name, (library, class_name) in folder.entries.items():
        if name == "scheduler" or name.startswith("tokenizer"):
            continue
        if name == "feature_extractor":
            wanted = [f"{name}/preprocessor_config.json"]
        else:
            text = library != "diffusers" or name in ENCODERS
            stem = "model" if text else "diffusion_pytorch_model"
            wanted = [f"{name}/config.json", f"{name}/{stem}.safetensors"]
        for path in wanted:
            if not folder.has(path) and not folder.has(f"{path}.index.json"):
                there = sorted(item.name for item in (folder.root / name).glob("*"))
                yield Finding(
                    path,
                    f"a file of {class_name}",
                    ", ".join(there) or "no such folder",
                    f"{_EXPORT}, or {_LEAVE_OUT}",
                )
        yield from _shards(folder, wanted[-1])


@check("ort", "openvino")
def feature_extractor(folder: Folder, _: str) -> Iterator[Finding]:
    """Optimum's pipelines read the configuration of a feature extractor that is named, whoever needs it."""
    name = "feature_extractor"
    path = f"{name}/preprocessor_config.json"
    if name in folder.entries and not folder.has(path):
        yield Finding(
            path,
            f"a file of {folder.entries[name][1]}",
            "no such file",
            f"{_EXPORT}, or {_LEAVE_OUT}",
        )


def _shards(folder: Folder, path: str) -> Iterator[Finding]:
    index = f"{path}.index.json"
    named = folder.json(index).get("weight_map", {})
    for name in sorted(set(named.values())) if isinstance(named, dict) else ():
        shard = f"{path.split('/', maxsplit=1)[0]}/{name}"
        if not folder.has(shard):
            yield Finding(shard, f"weights that {index} names", "no such file", _EXPORT)


@check("diffusers")
def pickles(folder: Folder, _: str) -> Iterator[Finding]:
    """No weights lie there as pickles, which run code when they are read."""
    for path in sorted(folder.root.rglob("*")):
        if path.suffix in _PICKLES and path.name not in _NOT_PICKLES and _is_model(path.parts):
            yield Finding(
                path.relative_to(folder.root).as_posix(),
                "weights as safetensors",
                "a pickle",
                "save it with safe_serialization=True and remove this file",
            )


def _is_model(parts: tuple[str, ...]) -> bool:
    """Leave out what lies inside of Core ML packages and compiled models, whose weights end in .bin too."""
    return not any(part.endswith((".mlpackage", ".mlmodelc")) for part in parts)
