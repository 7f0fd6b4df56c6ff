"""PyTorch, the reference: float32, eval mode, numpy in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import ConfigError, require
from edgedistill.network import Session

from .options import accept


def open(path: Path, signature: Signature, options: Mapping[str, Any]) -> Session:  # noqa: A001
    """Open a folder of config.json and safetensors.

    Args:
        path: The network's folder.
        signature: Its inputs and outputs.
        options: ``device`` (``"cpu"``, ``"cuda"``, ``"mps"``) and ``threads`` (0: torch's own choice).

    Raises:
        BundleError: If the folder does not hold a whole network of this release.
        ConfigError: If an option is unknown or the device is not there.
        MissingDependencyError: If torch or diffusers is not installed.
    """
    torch = require("torch", "train")
    require("edgedistill.models", "train")  # before diffusers, which it keeps quiet
    require("diffusers", "train")
    from edgedistill.models import store

    chosen = _chosen(options)
    device = _device(torch, chosen["device"])
    if chosen["threads"]:
        torch.set_num_threads(int(chosen["threads"]))
    network = store.load_as(path, signature).to(device)
    outputs = [spec.name for spec in signature.outputs]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # torch.tensor copies: the network may write into what it is given, and feeds may be read-only.
        inputs = {
            spec.name: torch.tensor(feeds[spec.name], device=device) for spec in signature.inputs
        }
        with torch.inference_mode():
            made = store.call_outputs(network, inputs)
        return {name: value.cpu().numpy() for name, value in zip(outputs, made, strict=True)}

    return run


def describe(options: Mapping[str, Any]) -> str:
    """Say what runs a network under these options: version and device."""
    return f"PyTorch {require('torch', 'train').__version__} ({_chosen(options)['device']})"


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    chosen = accept("torch", options, device="cpu", threads=0)
    return {**chosen, "device": str(chosen["device"]).lower()}


def _device(torch: Any, name: str) -> str:
    backends = {"cpu": torch.cpu, "cuda": torch.cuda, "mps": torch.backends.mps}
    available = [key for key, backend in backends.items() if backend.is_available()]
    if name not in available:
        msg = f"PyTorch has no device {name!r} here; it has: {', '.join(available)}."
        raise ConfigError(msg)
    return name
