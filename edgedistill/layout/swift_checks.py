"""Checks of what Apple's Swift package alone demands: packages, batches, chunks, compression."""

from collections.abc import Iterator, Mapping

from .contracts import CONTROLLED, CONTROLNET
from .findings import Finding, check
from .folder import PACKAGES, RESOURCES, Folder
from .graphs import Graph, Shape
from .index_checks import is_xl

_COMPILED: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("TextEncoder", "MultilingualTextEncoderProjection"),
    "text_encoder_2": ("TextEncoder2",),
    "unet": ("Unet", "UnetChunk1 UnetChunk2"),
    CONTROLLED: ("ControlledUnet", "ControlledUnetChunk1 ControlledUnetChunk2"),
    CONTROLNET: ("controlnet/*",),
    "mmdit": ("MultiModalDiffusionTransformer",),
    "vae_decoder": ("VAEDecoder",),
    "vae_encoder": ("VAEEncoder",),
    "safety_checker": ("SafetyChecker",),
}
"""Names of compiled models in `RESOURCES`, by network: one of these, or all of several."""


def _sample_shape(graph: Graph | None) -> Shape | None:
    return {item.name: item.shape for item in graph.inputs}.get("sample") if graph else None


@check("swift")
def package_names(folder: Folder, _: str) -> Iterator[Finding]:
    """Packages have the names by which Apple's tools find them."""
    for path in sorted((folder.root / PACKAGES).glob("*.mlpackage")):
        if not path.name.startswith(("Stable_Diffusion_version_", "ControlNet_")):
            yield Finding(
                f"{PACKAGES}/{path.name}",
                "a name Stable_Diffusion_version_NAME_NETWORK.mlpackage",
                path.name,
                "rename it; Apple's tools find packages by name",
                "warning",
            )


@check("swift")
def swift_batch(folder: Folder, _: str) -> Iterator[Finding]:
    """The UNet's batch is what Swift sends: two with guidance, one without, always two for XL."""
    path = folder.package(folder.apples_denoiser)
    shape, mode = _sample_shape(folder.graph(path)), folder.guidance
    if not shape:
        return
    batch = shape[0]
    if folder.is_controlled:
        return
    if batch not in (1, 2):
        yield Finding(
            path, "batch 1 or 2", f"batch {batch}", "export with batch 2, or 1 with guidance baked"
        )
    elif is_xl(folder) and batch != 2:
        yield Finding(
            path,
            "batch 2, for Swift's XL always sends two time steps",
            "batch 1",
            "export with batch 2",
        )
    elif mode == "cfg" and batch == 1:
        yield Finding(
            path,
            "batch 2 for guidance 'cfg'",
            "batch 1",
            "export with batch 2, or accept two calls per step",
            "warning",
        )
    elif mode in ("none", "baked", "embedded") and batch == 2 and not is_xl(folder):
        yield Finding(
            path,
            f"batch 1 for guidance {mode!r}, where Swift sends one sample",
            "batch 2",
            "export with batch 1 and call with a guidance scale below 1",
        )


@check("swift")
def control_batch(folder: Folder, _: str) -> Iterator[Finding]:
    """Swift sends a ControlNet two time steps and its picture twice, whatever the guidance."""
    for network, path in folder.graphs("coreml"):
        shape = _sample_shape(folder.graph(path)) if network in (CONTROLNET, CONTROLLED) else None
        if shape and shape[0] != 2:
            yield Finding(
                path,
                "batch 2, for Swift sends a ControlNet two time steps",
                f"batch {shape[0]}",
                "export with batch 2, and call with a guidance scale of 1 or more",
            )


@check("swift")
def residuals(folder: Folder, _: str) -> Iterator[Finding]:
    """The UNet is fed what the ControlNets give, by name."""
    unet = folder.graph(folder.package(CONTROLLED))
    for path in folder.controlnets:
        side = folder.graph(path)
        if unet is None or side is None:
            continue
        taken = {item.name: item.shape for item in unet.inputs}
        for item in side.outputs:
            if taken.get(item.name) != item.shape:
                yield Finding(
                    path,
                    f"`{item.name}` of {taken.get(item.name)}, as {CONTROLLED} takes it",
                    str(item.shape),
                    "take a ControlNet that is for this UNet",
                )


def _inputs(graph: Graph | None) -> list[str]:
    return [item.name for item in graph.inputs] if graph else []


@check("swift")
def chunks(folder: Folder, _: str) -> Iterator[Finding]:
    """The second chunk is fed the UNet's inputs and what the first gives; it alone gives the prediction."""
    denoiser = folder.apples_denoiser
    paths = [folder.package(f"{denoiser}_chunk{number}") for number in (1, 2)]
    first, second = (folder.graph(path) for path in paths)
    if first is None or second is None:
        if first or second:
            missing = paths[0] if first is None else paths[1]
            yield Finding(missing, "both chunks of the UNet", "no such package", "export both")
        return
    known = {*_inputs(first), *_inputs(folder.graph(folder.package(denoiser)))}
    if folder.is_controlled:
        sides = filter(None, map(folder.graph, folder.controlnets))
        known |= {item.name for side in sides for item in side.outputs}
    known |= {"sample", "timestep", "encoder_hidden_states", *(item.name for item in first.outputs)}
    for name in _inputs(second):
        if name not in known:
            yield Finding(
                paths[1],
                "inputs of the UNet or outputs of chunk 1",
                f"input `{name}`",
                "chunk the UNet anew",
            )
    given = [item.name for item in second.outputs]
    if given != ["noise_pred"]:
        yield Finding(
            paths[1], "one output `noise_pred`", ", ".join(given) or "none", "chunk the UNet anew"
        )


@check("swift")
def chunks_compressed(folder: Folder, _: str) -> Iterator[Finding]:
    """Chunks win over the whole UNet, so weights packed in the one are packed in the others."""
    denoiser = folder.apples_denoiser
    whole = folder.graph(folder.package(denoiser))
    for number in (1, 2):
        path = folder.package(f"{denoiser}_chunk{number}")
        chunk = folder.graph(path)
        if whole and chunk and whole.compression != chunk.compression:
            yield Finding(
                path,
                f"weights packed as in the whole UNet: {_packing(whole)}",
                _packing(chunk),
                "compress first and chunk after",
            )


def _packing(graph: Graph) -> str:
    return ", ".join(sorted(graph.compression)) or "not packed"


@check("swift")
def one_unet(folder: Folder, _: str) -> Iterator[Finding]:
    """Where both are there, Swift takes the chunks and never the whole."""
    places = (
        (RESOURCES, "Unet{}.mlmodelc", "Chunk"),
        (RESOURCES, "ControlledUnet{}.mlmodelc", "Chunk"),
        (PACKAGES, "*_unet{}.mlpackage", "_chunk"),
        (PACKAGES, f"*_{CONTROLLED}{{}}.mlpackage", "_chunk"),
    )
    for place, pattern, chunk in places:
        whole = sorted((folder.root / place).glob(pattern.format("")))
        parts = sorted((folder.root / place).glob(pattern.format(f"{chunk}[12]")))
        if whole and len(parts) == 2:
            yield Finding(
                f"{place}/{whole[0].name}",
                "either the whole UNet or its chunks",
                f"both, {parts[0].name} too",
                "remove the one that is not meant: Swift takes the chunks",
                "warning" if place == PACKAGES else "error",
            )


@check("swift")
def all_compiled(folder: Folder, _: str) -> Iterator[Finding]:
    """Where any model is compiled, every one is that Swift opens, by its name."""
    resources = folder.root / RESOURCES
    if not any(resources.rglob("*.mlmodelc")):
        return
    for network in folder.apples_networks:
        optional = network in ("vae_encoder", "safety_checker")
        if optional and not folder.has(folder.package(network)):
            continue
        choices = _COMPILED.get(network, ())
        if not choices or any(_is_compiled(folder, names) for names in choices):
            continue
        told = (names.replace(" ", " and ") for names in choices)
        yield Finding(
            f"{RESOURCES}/{choices[0]}.mlmodelc",
            f"the compiled {' or '.join(told)}, for other models are compiled",
            "no such model",
            "run compile_on_mac.sh on a Mac, which compiles all packages",
            "warning" if optional else "error",
        )


def _is_compiled(folder: Folder, names: str) -> bool:
    """Whether all models of these names, with blanks between them, are there."""
    resources = folder.root / RESOURCES
    return all(any(resources.glob(f"{name}.mlmodelc")) for name in names.split())


@check("swift")
def compiled_models(folder: Folder, _: str) -> Iterator[Finding]:
    """A compiled model tells its inputs in `metadata.json`, which Apple's Python reads."""
    for path in sorted((folder.root / RESOURCES).rglob("*.mlmodelc")):
        if not (path / "metadata.json").is_file():
            yield Finding(
                f"{path.relative_to(folder.root).as_posix()}/metadata.json",
                "the compiler's description",
                "no such file",
                "compile the package anew on a Mac",
            )
