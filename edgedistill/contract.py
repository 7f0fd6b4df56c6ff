"""What a network takes and gives: names, dtypes and shapes that trainer, exporter and runtimes share."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.errors import ContractError

Feeds = Mapping[str, np.ndarray]
BATCH = "batch"
LENGTH = "length"
"""Tokens of a prompt, where the network does not fix them."""
DTYPES = ("float16", "float32", "int32", "int64")


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor at the border of a network.

    Fields:
        name: What everything here calls it, such as ``"sample"``.
        shape: Sizes in the graph; a string stands for a free size (``"batch"``), equal wherever it is repeated.
        dtype: In the graph, one of ``DTYPES``.
        kind: What it means: ``x`` (state), ``t`` (timestep label), ``class``, ``w`` (guidance),
            ``raw`` (prediction); ``tokens`` of prompts, ``text`` and ``pooled`` (their embeddings);
            ``size`` of the picture; ``image``, ``latent``, ``moments`` (mean and log-variance of latents);
            further kinds belong to later networks.
        graph: The name in the exported graph where it is another; see `edgedistill.network`.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    kind: str
    graph: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            msg = f"`{self.name}`: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}."
            raise ContractError(msg)
        if any(isinstance(size, int) and size < 1 for size in self.shape):
            msg = f"`{self.name}`: sizes must be at least 1, got {list(self.shape)}."
            raise ContractError(msg)

    @property
    def graph_name(self) -> str:
        """The name in the exported graph."""
        return self.graph or self.name

    def with_batch(self, batch: int | str) -> "TensorSpec":
        """Return the same tensor with its leading size, if it has one, set to `batch`."""
        if not self.shape:
            return self
        return dataclasses.replace(self, shape=(batch, *self.shape[1:]))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "kind": self.kind,
            **({"graph": self.graph} if self.graph else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TensorSpec":
        """Read what `to_json` wrote."""
        shape = tuple(data["shape"])
        return cls(data["name"], shape, data["dtype"], data["kind"], data.get("graph"))


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one network, in the order of its graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batch(self) -> int | None:
        """The fixed batch size, or None when it is free."""
        size = self.inputs[0].shape[0]
        return size if isinstance(size, int) else None

    def with_batch(self, batch: int | str) -> "Signature":
        """Return the same signature with every leading size set to `batch`."""
        return Signature(
            tuple(spec.with_batch(batch) for spec in self.inputs),
            tuple(spec.with_batch(batch) for spec in self.outputs),
        )

    def bind(self, **sizes: int) -> "Signature":
        """Return the same signature with free sizes set by name, such as ``bind(length=77)``."""
        return Signature(
            *(
                tuple(
                    dataclasses.replace(
                        spec, shape=tuple(sizes.get(str(size), size) for size in spec.shape)
                    )
                    for spec in side
                )
                for side in (self.inputs, self.outputs)
            )
        )

    def input(self, kind: str) -> TensorSpec | None:
        """Return the input of a kind, or None where there is none."""
        return next((spec for spec in self.inputs if spec.kind == kind), None)

    def check(self, feeds: Feeds) -> None:
        """Refuse feeds whose names or shapes do not fit the inputs.

        Raises:
            ContractError: If a name is missing or unknown, or a shape differs.
        """
        expected = {spec.name for spec in self.inputs}
        for problem, names in (
            ("missing", sorted(expected - set(feeds))),
            ("unknown", sorted(set(feeds) - expected)),
        ):
            if names:
                wanted = ", ".join(spec.name for spec in self.inputs)
                msg = f"Inputs {', '.join(map(repr, names))} are {problem}; the network takes: {wanted}."
                raise ContractError(msg)
        free: dict[str, int] = {}
        for spec in self.inputs:
            shape = np.shape(feeds[spec.name])
            fits = len(shape) == len(spec.shape) and all(
                got == (want if isinstance(want, int) else free.setdefault(want, got))
                for got, want in zip(shape, spec.shape, strict=True)
            )
            if not fits:
                wanted = "x".join(str(free.get(str(size), size)) for size in spec.shape)
                got = "x".join(map(str, shape)) or "a scalar"
                msg = f"Input `{spec.name}` must have shape {wanted}, got {got}."
                raise ContractError(msg)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Signature":
        """Read what `to_json` wrote."""
        return cls(
            tuple(TensorSpec.from_json(item) for item in data["inputs"]),
            tuple(TensorSpec.from_json(item) for item in data["outputs"]),
        )


def residual_shapes(config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Return (channels, height, width) of every residual that a UNet takes: skips, then middle.

    Args:
        config: Of the UNet, or of its ControlNet.
    """
    size = config["sample_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    widths = config["block_out_channels"]
    shapes = [(widths[0], height, width)]
    for level, channels in enumerate(widths):
        shapes += [(channels, height, width)] * config["layers_per_block"]
        if level < len(widths) - 1:
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((channels, height, width))
    return [*shapes, (widths[-1], height, width)]
