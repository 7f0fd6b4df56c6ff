"""The public face of a bundle: `load` it on a runtime, call it, get samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgedistill import plugins
from edgedistill.bundle import Artifact, Bundle
from edgedistill.conditions import network_conditions
from edgedistill.contract import Signature
from edgedistill.errors import ContractError, MissingDependencyError
from edgedistill.network import CheckedNetwork, Session
from edgedistill.noise import Bank, bank_shapes, noise_bank
from edgedistill.sampler import Observer, run_table

if TYPE_CHECKING:
    from PIL.Image import Image


class Runtime(Protocol):
    """What an entry point of the group ``edgedistill.runtimes`` must be (a module will do)."""

    def open(self, path: Path, signature: Signature, options: Mapping[str, Any]) -> Session:
        """Open one network file and return a callable over arrays by name."""

    def describe(self) -> str:
        """Say in a few words what runs the network, such as ``"ONNX Runtime 1.31 (CPU)"``."""


@dataclass(frozen=True)
class Samples:
    """What a pipeline returns.

    Fields:
        array: float32 (batch, channels, height, width) in the table's value range.
        value_range: Values of black and white.
    """

    array: np.ndarray
    value_range: tuple[float, float] = (-1.0, 1.0)

    @property
    def images(self) -> "list[Image]":
        """One PIL image per sample."""
        from edgedistill.images import to_pil

        return to_pil(self.array, self.value_range)

    def grid(self, columns: int | None = None, scale: int = 1) -> "Image":
        """All samples on one sheet."""
        from edgedistill.images import grid

        return grid(self.array, columns, self.value_range, scale)


class Pipeline:
    """An artifact of a bundle, opened on a runtime, with the bundle's sampler table.

    Args:
        bundle: An opened bundle.
        artifact: Which artifact to run.
        options: Handed to the runtime, such as ``{"device": "GPU"}``.
    """

    def __init__(
        self, bundle: Bundle, artifact: Artifact, options: Mapping[str, Any] | None = None
    ) -> None:
        self.bundle = bundle
        self.artifact = artifact
        self.table = bundle.table
        self.runtime: Runtime = plugins.find(plugins.RUNTIMES, artifact.runtime)
        self.networks = {
            name: CheckedNetwork(
                name,
                file.signature,
                self.runtime.open(bundle.path(file.path), file.signature, options or {}),
            )
            for name, file in artifact.networks.items()
        }

    def __call__(
        self,
        n: int | None = None,
        *,
        seed: int | Sequence[int] = 0,
        guidance_scale: float | None = None,
        noise: Bank | None = None,
        observe: Observer | None = None,
        **conditions: Any,
    ) -> Samples:
        """Sample.

        Args:
            n: Number of samples; None: as many as the seeds, the noise or the conditions say, else 1.
            seed: Of the first sample; sample i uses ``seed + i``, whatever the batch. Or one per sample.
            guidance_scale: g, where 1 is no guidance; None: the table's default.
            noise: A noise bank to use instead of the seeds.
            observe: Called after every row with its `RowTrace`.
            **conditions: One entry per sample, or one for all, by name: ``class_labels=[3, 1, 4]``. A class
                condition that is left out runs through all classes in turn.

        Raises:
            ContractError: If a condition is unknown or out of range, guidance is not this model's to
                choose, or the noise does not fit.
        """
        count = _count(n, seed, noise, conditions)
        bank = noise if noise is not None else noise_bank(self.table, _seeds(seed, count))
        self._check_noise(bank, count)
        given = network_conditions(self.table, count, guidance_scale, conditions)
        array = run_table(self.table, self.networks, bank, given, observe)
        low, high = self.table.space["value_range"]
        return Samples(np.asarray(array), (low, high))

    def _check_noise(self, bank: Bank, count: int) -> None:
        shapes = bank_shapes(self.table)
        if len(bank) != len(shapes):
            msg = f"The noise bank must hold {len(shapes)} arrays, got {len(bank)}."
            raise ContractError(msg)
        for index, (array, shape) in enumerate(zip(bank, shapes, strict=True)):
            if array.shape != (count, *shape) or array.dtype != np.float32:
                wanted = "x".join(map(str, (count, *shape)))
                msg = f"Noise {index} must be float32 {wanted}, got {array.dtype} {'x'.join(map(str, array.shape))}."
                raise ContractError(msg)


def load(
    bundle: Bundle | Path | str,
    runtime: str | None = None,
    artifact: str | None = None,
    **options: Any,
) -> Pipeline:
    """Open a bundle on a runtime.

    Args:
        bundle: A bundle or its folder.
        runtime: ``torch``, ``onnxruntime``, ``openvino``, ``coreml``, or one that another distribution
            registers; None: the runtime of the artifact.
        artifact: Name of an artifact; None: the first of the runtime. Where both are None: the first
            artifact whose runtime is installed, PyTorch last.
        **options: Handed to the runtime.

    Raises:
        ConfigError: If the runtime is unknown.
        BundleError: If the bundle does not hold, or has no such artifact.
        MissingDependencyError: If the runtime's package is not installed.
    """
    if runtime is not None:
        runtime = plugins.ALIASES.get(runtime, runtime)
        plugins.find(plugins.RUNTIMES, runtime)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if runtime is None and artifact is None:
        return _load_first(opened, options)
    return Pipeline(opened, opened.artifact(artifact, runtime), options)


def _load_first(bundle: Bundle, options: Mapping[str, Any]) -> Pipeline:
    """Open the first artifact whose runtime is installed; where none is, say what the first one lacks."""
    ordered = sorted(bundle.artifacts.values(), key=lambda item: item.runtime == "torch")
    missing: list[MissingDependencyError] = []
    for item in ordered:
        try:
            return Pipeline(bundle, item, options)
        except MissingDependencyError as error:
            missing.append(error)
    if missing:
        raise missing[0]
    return Pipeline(bundle, bundle.artifact(), options)


def _count(n: int | None, seed: Any, noise: Bank | None, conditions: Mapping[str, Any]) -> int:
    sizes = [len(value) for value in conditions.values() if np.ndim(value) == 1]
    sizes += [] if np.ndim(seed) == 0 else [len(seed)]
    sizes += [] if not noise else [len(noise[0])]
    count = n if n is not None else (sizes[0] if sizes else 1)
    if count < 1 or any(size != count for size in sizes):
        msg = f"Number of samples, seeds, noise and conditions must agree, got n={n} and {sizes}."
        raise ContractError(msg)
    return count


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    first = [int(item) for item in np.atleast_1d(np.asarray(seed, dtype=object))]
    return [first[0] + i for i in range(count)] if np.ndim(seed) == 0 else first
