"""PyTorch, the reference: float32, eval mode, numpy in and out."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import ConfigError, require
from edgedistill.network import Session
from edgedistill.weight_files import weights_in

from .options import accept

_shared: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()
"""Networks that sessions use a part of, by device and files: an autoencoder is read once for both halves."""


@dataclass(frozen=True)
class _Part:
    """A session.

    Fields:
        network: What is called.
        whole: What it is a part of; other parts share it as long as this session is there.
        signature: Of `network`.
        device: It lies on.
    """

    network: Any
    whole: Any
    signature: Signature
    device: str

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        from edgedistill.models import store

        # torch.tensor copies: the network may write into what it is given, and feeds may be read-only.
        inputs = {
            spec.name: torch.tensor(feeds[spec.name], device=self.device)
            for spec in self.signature.inputs
        }
        with torch.inference_mode():
            made = store.call_outputs(self.network, inputs)
        outputs = [spec.name for spec in self.signature.outputs]
        return {name: value.cpu().numpy() for name, value in zip(outputs, made, strict=True)}


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
    states = [(part.resolve(), part.stat()) for part in weights_in(path) if part.is_file()]
    key = (device, *((part, state.st_ino, state.st_mtime_ns) for part, state in states))
    whole = _shared.get(key)
    if whole is None:
        whole = store.load(path).to(device)
    network = store.facing(whole, signature).to(device)
    if network is not whole:
        _shared[key] = whole
    return _Part(network, whole, signature, device)


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
