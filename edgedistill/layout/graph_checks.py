"""Checks of exported graphs: there, whole, with their weights, and with the loader's names, dtypes and shapes."""

import string
from collections.abc import Iterator
from pathlib import Path

from .contracts import TOLERATED, signature
from .findings import FORMATS, Finding, check
from .folder import ENCODERS, Folder
from .graphs import Graph, Tensor
from .index_checks import is_known, is_xl
from .mismatches import Mismatch, mismatches

_EXPORT = "export the network anew in this loader's dialect"


@check("ort", "openvino", "genai", "swift")
def graphs_there(folder: Folder, loader: str) -> Iterator[Finding]:
    """Every network has its graph, and it can be read."""
    for network, path in folder.graphs(FORMATS[loader]):
        optional = network == "vae_encoder" and not folder.edits
        if folder.graph(path) is None and path not in folder.damaged and not optional:
            yield Finding(path, f"the graph of {network}", "no such file", "export it")


@check("ort", "openvino", "genai")
def weights_there(folder: Folder, loader: str) -> Iterator[Finding]:
    """The weights beside a graph are there, whole, in its own folder, and in one file."""
    for _, path in folder.graphs(FORMATS[loader]):
        graph = folder.graph(path)
        if graph is None:
            continue
        for name, size in graph.weights:
            place = (Path(path).parent / name).as_posix()
            if name != Path(name).name:
                yield Finding(
                    path, "weights in its own folder", name, "save it with its weights in one file"
                )
            elif not folder.has(place):
                yield Finding(place, f"the weights of {path}", "no such file", "copy it along")
            elif (found := (folder.root / place).stat().st_size) < size:
                yield Finding(
                    place, f"{size} bytes, which {path} reads", f"{found}", "copy it anew"
                )
        yield from _scattered(path, graph)


def _scattered(path: str, graph: Graph) -> Iterator[Finding]:
    if len(graph.weights) > 1:
        names = [name for name, _ in graph.weights]
        yield Finding(
            path,
            "all weights in one file model.onnx_data",
            f"{len(names)} files, {names[0]} among them",
            "save it with all_tensors_to_one_file=True",
            "warning",
        )


@check("ort", "openvino", "genai", "swift")
def signatures(folder: Folder, loader: str) -> Iterator[Finding]:
    """Every tensor at a graph's border has the loader's name, dtype, rank and size."""
    format_ = FORMATS[loader]
    for network, path in folder.graphs(format_):
        graph = folder.graph(path)
        sizes = {**folder.sizes(network), **_state_size(graph)}
        if loader == "genai":
            sizes["labels"] = 1
        contract = signature(format_, network, sizes, stacked=is_xl(folder))
        if graph is None or contract is None or not is_known(folder, network):
            continue
        for item in mismatches(contract, graph, ordered=loader == "genai"):
            if level := _level(loader, network, item):
                yield Finding(path, item.expected, item.found, _way_out(loader, item), level)


def _state_size(graph: Graph | None) -> dict[str, list[int]]:
    """Return the size of the states that a graph takes, if it is fixed."""
    shapes = (item.shape for item in (graph.inputs if graph else ()) if item.name == "sample")
    sizes = [size for size in next(shapes, None) or () if isinstance(size, int)]
    return {"sample_size": sizes[2:]} if len(sizes) == 4 else {}


def _level(loader: str, network: str, item: Mismatch) -> str | None:
    """Return how bad a difference is, or None: nobody but Swift minds further outputs."""
    if item.what == "unknown" and item.found.startswith("output"):
        return "error" if loader == "swift" and not network.startswith("text_encoder") else None
    for rule in TOLERATED:
        same = (rule.loader, rule.what, rule.found) == (loader, item.what, item.found)
        if same and (not rule.tensors or item.tensor.rstrip(string.digits) in rule.tensors):
            return rule.level
    return "error"


def _way_out(loader: str, item: Mismatch) -> str:
    if loader != "swift":
        return _EXPORT
    if item.tensor == "timestep_cond":
        return "bake the guidance into the network: Swift never feeds it"
    if item.tensor == "encoder_hidden_states" and item.what == "rank":
        return "export channels first, [batch, dim, 1, length]; rank 3 is the contract of coreml-diffusion"
    if item.what == "unknown" and item.found.startswith("output"):
        return "give one output: Swift takes the first"
    return _EXPORT


@check("ort", "openvino", "genai", "swift")
def masks_in_half(folder: Folder, loader: str) -> Iterator[Finding]:
    """What masks attention in a text encoder of float16 is a number that float16 has."""
    for network, path in folder.graphs(FORMATS[loader]):
        graph = folder.graph(path) if network in ENCODERS else None
        if graph is None or not graph.constants.in_half:
            continue
        for name, value in graph.constants.beyond:
            yield Finding(
                path,
                "constants that float16 holds, at most 65504 either way",
                f"{value:g} in `{name}`, in a graph with weights of float16",
                "mask attention with -1e4: infinity makes NaN of products and breaks palettes",
                "warning",
            )


@check("ort", "openvino", "genai")
def scale_of_pictures(folder: Folder, loader: str) -> Iterator[Finding]:
    """Pictures are as much larger than latents as the decoder's configuration has levels, which loaders go by."""
    levels = folder.config("vae_decoder").get("block_out_channels")
    if not isinstance(levels, list) or not levels:
        return
    scale = 2 ** (len(levels) - 1)
    for network, path in folder.graphs(FORMATS[loader]):
        graph = folder.graph(path) if network.startswith("vae") else None
        sides = [_size(side) for side in (graph.inputs, graph.outputs)] if graph else [[], []]
        latent, picture = sides if network == "vae_decoder" else reversed(sides)
        wanted = [scale * size for size in latent]
        if latent and picture and picture != wanted:
            yield Finding(
                path,
                f"pictures of {wanted}, {scale} times the latents' {latent}, by `block_out_channels` of the decoder",
                str(picture),
                "take the configuration of the autoencoder that was exported",
            )


def _size(side: tuple[Tensor, ...]) -> list[int]:
    """Return height and width of the first tensor, if they are fixed."""
    shape = (side[0].shape if side else None) or ()
    sizes = [size for size in shape[2:] if isinstance(size, int)]
    return sizes if len(shape) == 4 and len(sizes) == 2 else []


@check("ort", "openvino", "genai")
def batch_fits_guidance(folder: Folder, loader: str) -> Iterator[Finding]:
    """A batch that is fixed is what a pipeline sends: two with guidance in two calls, else one."""
    for network, path in folder.graphs(FORMATS[loader]):
        graph = folder.graph(path) if network == "unet" and folder.guidance else None
        shape = graph.inputs[0].shape if graph and graph.inputs else None
        fixed = shape[0] if shape and isinstance(shape[0], int) else None
        wanted = 2 if folder.guidance == "cfg" else 1
        if fixed is not None and fixed != wanted:
            yield Finding(
                path,
                f"a free batch, or {wanted} for guidance {folder.guidance!r}",
                f"batch {fixed}",
                "export with a free batch",
            )
