"""A pipeline folder as the checks see it: configurations, graphs and tables, each read once."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgedistill.contract import LENGTH
from edgedistill.errors import BundleError, ContractError
from edgedistill.files import read_json
from edgedistill.table import SamplerTable
from edgedistill.tables import DEFAULT, Tables, further_names, table_file

from .contracts import CONTROLLED, CONTROLNET
from .findings import FORMATS
from .graphs import Graph, read_graph

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
PACKAGES = "coreml/packages"
RESOURCES = "coreml/Resources"
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
APPLE = {"mmdit": "transformer", CONTROLLED: "unet"}
"""Networks by the names of packages that are other ones."""
DENOISERS = ("unet", "transformer")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Folder:
    """A folder whose files are read when they are asked for; what cannot be read is in `damaged`.

    Attributes:
        root: The folder.
        damaged: Why a file could not be read, by its path in the folder; known once it was asked for.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.damaged: dict[str, str] = {}
        self._graphs: dict[str, Graph | None] = {}
        self._json: dict[str, Any] = {}

    def has(self, path: str) -> bool:
        """Say whether a file or folder is there."""
        return (self.root / path).exists()

    def json(self, path: str) -> Mapping[str, Any]:
        """Return a JSON object; empty where the file is missing or damaged."""
        if path not in self._json:
            self._json[path] = self._read_json(path)
        return self._json[path]

    def _read_json(self, path: str) -> Mapping[str, Any]:
        if not self.has(path):
            return {}
        try:
            found = read_json(self.root / path)
        except BundleError as error:
            self.damaged[path] = str(error)
            return {}
        if isinstance(found, dict):
            return found
        self.damaged[path] = f"a JSON {type(found).__name__}, not an object"
        return {}

    def graph(self, path: str) -> Graph | None:
        """Return the border of a graph; None where the file is missing or damaged."""
        if path not in self._graphs:
            self._graphs[path] = self._read_graph(path)
        return self._graphs[path]

    def _read_graph(self, path: str) -> Graph | None:
        if not self.has(path):
            return None
        try:
            return read_graph(self.root / path)
        except (BundleError, ContractError) as error:
            self.damaged[path] = str(error)
            return None

    @property
    def pipeline(self) -> str:
        """The pipeline's class, such as ``"StableDiffusionPipeline"``; empty where it is not told."""
        return str(self.json(INDEX).get("_class_name", ""))

    @property
    def entries(self) -> dict[str, tuple[str, str]]:
        """Library and class of every part that the pipeline has, as `INDEX` tells them."""
        return {
            name: (str(value[0]), str(value[1]))
            for name, value in self.json(INDEX).items()
            if isinstance(value, list) and len(value) == 2 and value != [None, None]
        }

    @property
    def is_latent(self) -> bool:
        """Whether the pipeline denoises latents."""
        return "vae" in self.entries

    @property
    def is_controlled(self) -> bool:
        """Whether the pipeline has a ControlNet."""
        return "ControlNet" in self.pipeline

    @property
    def edits(self) -> bool:
        """Whether the pipeline starts from an image, which it has to encode."""
        return "Img2Img" in self.pipeline or "Inpaint" in self.pipeline

    @property
    def apples_denoiser(self) -> str:
        """What Apple's tools call the denoiser."""
        if "transformer" in self.entries:
            return "mmdit"
        return CONTROLLED if self.is_controlled else "unet"

    @property
    def networks(self) -> tuple[str, ...]:
        """Folders of the networks that a text-to-image call needs, and of what else is there of them."""
        control = (CONTROLNET,) if self.is_controlled else ()
        named = tuple(name for name in (*ENCODERS, *DENOISERS, *control) if name in self.entries)
        if not self.is_latent:
            return named
        encoder = ("vae_encoder",) if self.edits or self.has("vae_encoder") else ()
        return (*named, "vae_decoder", *encoder)

    @property
    def apples_networks(self) -> tuple[str, ...]:
        """The same by the names of Apple's tools, and the safety checker where its package is there."""
        names = (self.apples_denoiser if name in DENOISERS else name for name in self.networks)
        checker = ("safety_checker",) if self.has(self.package("safety_checker")) else ()
        return (*names, *checker)

    def config(self, network: str) -> Mapping[str, Any]:
        """Return a network's configuration."""
        return self.json(f"{network}/config.json")

    def graphs(self, format_: str) -> Iterator[tuple[str, str]]:
        """Yield every network's name and the path of its graph, whether it is there or not."""
        if format_ != "coreml":
            yield from ((name, f"{name}/{FILES[format_]}") for name in self.networks)
            return
        denoiser = self.apples_denoiser
        whole, chunk = self.package(denoiser), self.package(f"{denoiser}_chunk1")
        in_chunks = self.has(chunk) and not self.has(whole)
        for name in self.apples_networks:
            if name == CONTROLNET:
                yield from ((name, path) for path in self.controlnets)
            elif name != denoiser or not in_chunks:
                yield name, self.package(name)

    def package(self, network: str) -> str:
        """Return the path of a Core ML package; where there is none, the one that it should have."""
        found = sorted((self.root / PACKAGES).glob(f"*_{network}.mlpackage"))
        name = found[0].name if found else f"Stable_Diffusion_version_NAME_{network}.mlpackage"
        return f"{PACKAGES}/{name}"

    @property
    def controlnets(self) -> list[str]:
        """Paths of the ControlNets' packages; where there is none, the one that there should be."""
        found = sorted((self.root / PACKAGES).glob("ControlNet_*.mlpackage"))
        names = [path.name for path in found] or ["ControlNet_NAME.mlpackage"]
        return [f"{PACKAGES}/{name}" for name in names]

    def sizes(self, network: str) -> dict[str, Any]:
        """Return the sizes and switches that fix a network's signature, from every configuration."""
        own = dict(self.config(APPLE.get(network, network)))
        text = self.config("text_encoder")
        own[LENGTH] = text.get("max_position_embeddings")
        if network in ("vae_decoder", "vae_encoder"):
            latent = own.get("latent_channels")
            own["moments"] = 2 * latent if isinstance(latent, int) else None
        if network in ("unet", CONTROLLED):
            own["projection_dim"] = self.config("text_encoder_2").get("projection_dim")
        return own

    @functools.cached_property
    def tables(self) -> Tables:
        """The sampler tables that can be read; the default is the one of stock schedulers."""
        further = (self.root / "samplers").glob("*.json")
        names = [DEFAULT, *further_names(f"samplers/{path.name}" for path in further)]
        found = {name: self._read_table(table_file(name)) for name in names}
        return {name: table for name, table in found.items() if table is not None}

    def _read_table(self, path: str) -> SamplerTable | None:
        if not self.has(path):
            return None
        try:
            return SamplerTable.load(self.root / path)
        except BundleError as error:
            self.damaged[path] = str(error)
            return None

    @property
    def table(self) -> SamplerTable | None:
        """The default table."""
        return self.tables.get(DEFAULT)

    @property
    def guidance(self) -> str | None:
        """How guidance enters, as the default table tells: ``none``, ``cfg``, ``embedded`` or ``baked``."""
        return self.table.guidance.mode if self.table else None

    def holds(self, loader: str) -> bool:
        """Say whether the folder holds any graph or weights that a loader opens."""
        patterns = {
            "onnx": "*/model.onnx",
            "openvino": "*/openvino_model.xml",
            "coreml": f"{PACKAGES}/*.mlpackage",
        }
        pattern = patterns.get(FORMATS.get(loader, ""), "*/*.safetensors")
        return any(self.root.glob(pattern))
