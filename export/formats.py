"""What a student can be exported to: formats, their precisions, their writers and options."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import ConfigError, not_installed

from .layouts import BUNDLE, LAYOUTS, SINGLE_ROOT, place
from .worker import AUTO, ISOLATE

if TYPE_CHECKING:
    from torch import nn

    from edgedistill.contract import Signature

DTYPES = ("float32", "float16")
OPSETS = range(13, 27)  # what both exporters write
DEPLOYMENT_TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")
ALL = "all"
OWN, PORTABLE, SWIFT = "own", "portable", "swift"
SCHEDULERS = (OWN, PORTABLE, SWIFT)  # whose steps a pipeline takes; see `export.samplers`
_GRAPH = ("single_graph", "text_inside")
_ROOT = ("layout", "free_sizes")
Settings = Mapping[str, Any]
Writer = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Fields:
        dtype: One of `DTYPES`; None: all that a format has.
        batch: Fixed batch size of the graphs; None: free.
        opset, dynamo: See `export.to_onnx.write_onnx`.
        deployment_target: See `export.to_coreml.write_coreml`.
        overwrite: Replace a bundle that is there, whatever it holds.
        single_graph: Name of the sampler that becomes one graph; None: one graph per network.
        text_inside: Whether the text encoder belongs to that graph.
        layout: One of `export.layouts.LAYOUTS`; a single root holds one precision of each format.
        free_sizes: Leave height and width free in a single root, Core ML apart.
        isolate: Whether a network is written in a process of its own: one of `export.worker.ISOLATE`.
        networks: Names of those that become graphs; none: all.
        max_memory: Bytes that may be used: what is estimated to take more is refused, and `isolate` chosen by it;
            None: whatever there is.
    """

    dtype: str | None = None
    batch: int | None = 1
    opset: int | None = None
    dynamo: bool = False
    deployment_target: str = "iOS17"
    overwrite: bool = False
    single_graph: str | None = None
    text_inside: bool = True
    layout: str = BUNDLE
    free_sizes: bool = False
    isolate: str = AUTO
    networks: tuple[str, ...] = ()
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            msg = f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}."
            raise ConfigError(msg)
        if self.isolate not in ISOLATE:
            msg = f"`isolate` must be one of {', '.join(ISOLATE)}, got {self.isolate!r}."
            raise ConfigError(msg)
        if self.batch is not None and self.batch < 1:
            msg = f"`batch` must be 1 or more, got {self.batch}."
            raise ConfigError(msg)
        if self.opset is not None and self.opset not in OPSETS:
            msg = f"`opset` must lie from {OPSETS[0]} to {OPSETS[-1]}, got {self.opset}."
            raise ConfigError(msg)
        if self.deployment_target not in DEPLOYMENT_TARGETS:
            msg = f"`deployment_target` must be one of {', '.join(DEPLOYMENT_TARGETS)}, got {self.deployment_target!r}."
            raise ConfigError(msg)
        if self.networks and self.single_graph is not None:
            msg = "A single graph is of all networks: leave `networks` out."
            raise ConfigError(msg)
        if self.layout not in LAYOUTS:
            msg = f"`layout` must be one of {', '.join(LAYOUTS)}, got {self.layout!r}."
            raise ConfigError(msg)


@dataclass(frozen=True)
class Format:
    """One way to write a network.

    Fields:
        runtime: Entry-point name of what opens it.
        suffix: Of the file.
        precisions: What it is written in, the one to ship first.
        settings: Fields of `ExportOptions` that change the file.
        modules: What must be installed to write it and to run it once; the format's extra brings them.
        write: Takes (network, signature, path, precision, settings, consume=whether the network is of no use
            afterwards), returns what made the file and its ``snr_db``.
    """

    runtime: str
    suffix: str
    precisions: tuple[str, ...]
    settings: tuple[str, ...]
    modules: tuple[str, ...]
    write: Writer


def _onnx(
    network: "nn.Module",
    signature: "Signature",
    path: Path,
    _precision: str,
    settings: Settings,
    *,
    consume: bool,
) -> dict[str, Any]:
    from .to_onnx import write_onnx

    opset, dynamo = settings["opset"], settings["dynamo"]
    return write_onnx(network, signature, path, opset=opset, dynamo=dynamo, consume=consume)


def _openvino(
    network: "nn.Module",
    signature: "Signature",
    path: Path,
    precision: str,
    _settings: Settings,
    *,
    consume: bool,
) -> dict[str, Any]:
    from .to_openvino import write_openvino

    return write_openvino(network, signature, path, precision=precision, consume=consume)


def _coreml(
    network: "nn.Module",
    signature: "Signature",
    path: Path,
    precision: str,
    settings: Settings,
    *,
    consume: bool,
) -> dict[str, Any]:
    from .to_coreml import write_coreml

    target = settings["deployment_target"]
    return write_coreml(
        network, signature, path, precision=precision, deployment_target=target, consume=consume
    )


FORMATS: Mapping[str, Format] = {
    "onnx": Format(
        "onnxruntime",
        ".onnx",
        ("float32",),
        ("batch", "opset", "dynamo"),
        ("onnx", "onnxruntime"),
        _onnx,
    ),
    "openvino": Format(
        "openvino", ".xml", ("float32", "float16"), ("batch",), ("onnx", "openvino"), _openvino
    ),
    # A phone runs float16; the float32 twin is what proves the graph right.
    "coreml": Format(
        "coreml",
        ".mlpackage",
        ("float16", "float32"),
        ("batch", "deployment_target"),
        ("coremltools",),
        _coreml,
    ),
}


@dataclass(frozen=True)
class Job:
    """One artifact to write.

    Fields:
        name: Of the artifact, such as ``"onnx-float32"``.
        format: Name in `FORMATS`.
        precision: One of the format's.
        settings: The options that change the file, by name.
    """

    name: str
    format: str
    precision: str
    settings: Settings

    @property
    def layout(self) -> str:
        """One of `export.layouts.LAYOUTS`."""
        return str(self.settings.get("layout", BUNDLE))

    def path(self, network: str, model: str, *, controlled: bool = False) -> str:
        """Return where the file of a network of a model lies, which may take residuals of a ControlNet."""
        kind, suffix = self.name.removeprefix(f"{self.format}-"), FORMATS[self.format].suffix
        told: dict[str, Any] = {"model": model, "controlled": controlled}
        return place(self.layout, self.format, kind, network, suffix, **told)

    @property
    def sampler(self) -> str | None:
        """Name of the sampler that becomes one graph, or None."""
        return self.settings.get("single_graph")


def jobs(formats: Iterable[str], options: ExportOptions) -> list[Job]:
    """Return the artifacts that formats and options ask for, in order.

    Raises:
        ConfigError: If a format is unknown or is not written in the dtype asked for.
    """
    names = list(formats)
    return list(_jobs(list(FORMATS) if names == [ALL] else names, options))


def _jobs(names: Iterable[str], options: ExportOptions) -> Iterator[Job]:
    for name in names:
        if name not in FORMATS:
            msg = f"Unknown format {name!r}: choose one of {', '.join(FORMATS)} or {ALL!r}."
            raise ConfigError(msg)
        held = FORMATS[name].precisions
        if options.dtype not in (None, *held):
            msg = f"{name} is written in {' and '.join(held)} only, got {options.dtype!r}; leave the dtype out or choose another format."
            raise ConfigError(msg)
        fields = [*FORMATS[name].settings, *(_GRAPH if options.single_graph else ())]
        if options.layout == SINGLE_ROOT and options.single_graph is None:
            # Loaders call with as many samples as they like; Core ML's batch is the loader's.
            fields = [*(field for field in fields if field != "batch"), *_ROOT]
            held = held[:1]
        settings = {field: getattr(options, field) for field in fields}
        for precision in held if options.dtype is None else (options.dtype,):
            yield Job(f"{name}-{precision}{_ending(options)}", name, precision, settings)


def require_modules(wanted: Iterable[Job]) -> None:
    """Refuse artifacts whose packages are not installed; none of them is imported.

    Raises:
        MissingDependencyError: If one is not.
    """
    for job in wanted:
        further = ("onnxscript",) if job.settings.get("dynamo") else ()
        for module in (*FORMATS[job.format].modules, *further):
            if importlib.util.find_spec(module) is None:
                extra = "onnx" if module.startswith("onnx") else job.format
                raise not_installed(module, extra)


def _ending(options: ExportOptions) -> str:
    if options.single_graph is None:
        return ""
    from edgedistill.tables import DEFAULT  # with numpy, which `--help` can do without

    return "-graph" if options.single_graph == DEFAULT else f"-graph-{options.single_graph}"
