"""OpenVINO: one network, compiled for the shapes it is given, float32 inside unless asked otherwise."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ConfigError
from edgedistill.network import Session, check_graph
from edgedistill.telemetry import require_silent

from .mapped import passing
from .options import accept

PRECISIONS = ("f32", "f16", "bf16", "auto")


def open(path: Path, signature: Signature, options: Mapping[str, Any]) -> Session:  # noqa: A001
    """Open an OpenVINO model; one of free shapes is compiled when it is first called.

    Args:
        path: The ``.xml`` file; its weights lie beside it as ``.bin``.
        signature: Its inputs and outputs.
        options: ``device`` (``"CPU"``); ``precision`` of the arithmetic: ``"f32"``, the default, or ``"f16"``,
            ``"bf16"``, ``"auto"`` (the plugin's choice: bf16 on newer Xeons, which costs about 90 dB);
            ``threads`` (0: the plugin's choice).

    Raises:
        BundleError: If OpenVINO cannot read the file, or its names are not the signature's.
        ConfigError: If an option is unknown or the device is not there.
        MissingDependencyError: If openvino is not installed.
    """
    ov = require_silent("openvino", "openvino")
    chosen = _chosen(options)
    core = ov.Core()
    device = _device(core, chosen["device"])
    compiled = _Compiled(ov, core, path, device, _settings(chosen))
    model = compiled.read()
    outputs = [port.get_any_name() for port in model.outputs]
    check_graph(path, signature, (port.get_any_name() for port in model.inputs), outputs)
    if not model.is_dynamic():
        compiled.request({port.get_any_name(): tuple(port.shape) for port in model.inputs})

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        request = compiled.request({name: array.shape for name, array in feeds.items()})
        made = request.infer(dict(feeds))
        # The request writes its next answer over this memory.
        return {name: np.array(made[name]) for name in outputs}

    return run


class _Compiled:
    """A model, compiled for the shapes of its first call, which is the fastest, and for any once others come.

    What was compiled for the first is given up before: the weights are never held twice.
    """

    def __init__(
        self, ov: Any, core: Any, path: Path, device: str, settings: Mapping[str, Any]
    ) -> None:
        self.ov, self.core, self.path, self.device, self.settings = ov, core, path, device, settings
        self.shapes: Mapping[str, tuple[int, ...]] | None = None  # None: any
        self.known: Any = None
        self.weights: np.ndarray | None = None  # what is compiled points into them

    def read(self) -> Any:
        """Read the model; its weights are not in memory before it is compiled."""
        return self._told(self.core.read_model, str(self.path))

    def request(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        """Return what runs inputs of these shapes."""
        if self.known is None or self.shapes not in (None, shapes):
            self.shapes = shapes if self.known is None else None
            self.known = self.weights = None
            with self._passing() as model:
                if self.shapes is not None:
                    model.reshape({name: list(shape) for name, shape in shapes.items()})
                compiled = self._told(self.core.compile_model, model, self.device, self.settings)
            self.known = compiled.create_infer_request()
        return self.known

    @contextlib.contextmanager
    def _passing(self) -> Iterator[Any]:
        """Give the model, whose weights are not held beside what is compiled of them."""
        weights = self.path.with_suffix(".bin")
        if not weights.is_file() or not weights.stat().st_size:
            yield self.read()
            return
        with passing(weights) as array:
            self.weights = array
            held = self.ov.Tensor(array, shared_memory=True)
            yield self._told(self.core.read_model, self.path.read_bytes(), held)

    def _told(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1].strip()
            msg = f"{self.path}: OpenVINO cannot compile it for {self.device} ({reason}); export it anew."
            raise BundleError(msg) from error


def describe(options: Mapping[str, Any]) -> str:
    """Say what runs a network under these options: version, device and precision of the arithmetic."""
    version: str = require_silent("openvino", "openvino").__version__
    chosen = _chosen(options)
    return (
        f"OpenVINO {version.split('-', maxsplit=1)[0]} ({chosen['device']}, {chosen['precision']})"
    )


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    chosen = accept("openvino", options, device="CPU", precision="f32", threads=0)
    if (precision := chosen["precision"]) not in PRECISIONS:
        msg = f"OpenVINO's `precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}."
        raise ConfigError(msg)
    return {**chosen, "device": str(chosen["device"]).upper()}


def _device(core: Any, device: str) -> str:
    if device in ("CPU", "AUTO"):  # asking for what else there is costs 60 ms
        return device
    available: list[str] = core.available_devices
    if device not in available:
        msg = f"OpenVINO finds no device {device!r} here; it finds: {', '.join(available)}."
        raise ConfigError(msg)
    return device


def _settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    precision = chosen["precision"]
    settings = {} if precision == "auto" else {"INFERENCE_PRECISION_HINT": precision}
    if chosen["threads"]:
        settings["INFERENCE_NUM_THREADS"] = int(chosen["threads"])
    return settings
