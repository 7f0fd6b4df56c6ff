"""A runtime's session behind its signature: names, dtypes, shapes, dialects and batches put right once."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import BATCH, Feeds, Signature, TensorSpec
from edgedistill.errors import BundleError, ContractError

# Takes and gives arrays by name; what it gives is the caller's, later calls leave it alone.
Session = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class CheckedNetwork:
    """Calls a session with exactly what its signature says.

    Scalars are repeated over the batch, dtypes are cast, a batch other than the graph's fixed batch
    is cut into pieces and the last piece is padded by repeating its first sample. A graph that speaks
    another dialect is spoken to in it: see `in_dialect`.

    Args:
        name: The network's name, for messages.
        signature: What the session takes and gives; its batch is fixed or free.
        session: Maps input arrays to output arrays by their names in the graph.
    """

    def __init__(self, name: str, signature: Signature, session: Session) -> None:
        self.name = name
        self.signature = signature
        self.session = session
        self._wanted = Signature(tuple(map(_plain, signature.inputs)), ()).with_batch(BATCH)

    def __call__(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the outputs for a batch; arrays in `given` that are not inputs are left out.

        Raises:
            ContractError: If an input is missing, a shape does not fit, or an output is missing or
                not finite.
        """
        feeds = self.feeds(given)
        pieces = self._pieces(feeds)
        made = [self._run(feeds, piece) for piece in pieces]
        if len(made) == 1:
            return made[0]
        places = np.argsort(np.concatenate(pieces))
        return {name: np.concatenate([part[name] for part in made])[places] for name in made[0]}

    def feeds(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return what the network is given: the inputs among `given`, one entry per sample each.

        Raises:
            ContractError: If an input is missing or a shape does not fit.
        """
        batch = next((np.shape(a)[0] for a in given.values() if np.ndim(a) > 0), 1)
        feeds = {
            spec.name: _as_batch(given[spec.name], batch, spec.dtype)
            for spec in self._wanted.inputs
            if spec.name in given
        }
        self._wanted.check(feeds)
        return feeds

    def _pieces(self, feeds: Feeds) -> list[np.ndarray]:
        """Return which samples go together: as many as the graph takes, of one label where it takes one."""
        batch = len(next(iter(feeds.values())))
        size = self.signature.batch or batch
        groups = [np.arange(batch)]
        for spec in self.signature.inputs:
            if not spec.shape:
                labels = feeds[spec.name]
                groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        return [
            group[start : start + size] for group in groups for start in range(0, len(group), size)
        ]

    def _run(self, feeds: Feeds, piece: np.ndarray) -> dict[str, np.ndarray]:
        batch = len(next(iter(feeds.values())))
        lacking = (self.signature.batch or len(piece)) - len(piece)
        if len(piece) < batch or lacking:
            index = np.concatenate([piece, np.repeat(piece[:1], lacking)])
            feeds = {name: value[index] for name, value in feeds.items()}
        outputs = self.session(in_dialect(self.signature, feeds))
        return {
            spec.name: self._checked(spec, outputs)[: len(piece)] for spec in self.signature.outputs
        }

    def _checked(self, spec: TensorSpec, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        name = spec.graph_name
        if name not in outputs:
            msg = f"Network `{self.name}` returned no `{name}`, only: {', '.join(outputs)}; export it anew."
            raise ContractError(msg)
        made = outputs[name]
        if spec.kind == "moments":  # the mean, then the logarithm of the variance
            made = made[:, : made.shape[1] // 2]
        if not np.isfinite(made).all():
            msg = f"Network `{self.name}` returned NaN or infinity in `{name}`; its weights or its precision are broken."
            raise ContractError(msg)
        return made


def in_dialect(signature: Signature, feeds: Feeds) -> dict[str, np.ndarray]:
    """Return what a graph is fed: arrays by its names, of its dtypes and ranks.

    A timestep of rank 0 is the label of all samples. A guidance weight of rank 2 is its sinusoid of that
    width, diffusers' ``timestep_cond``. A text of rank 4 is (batch, dim, 1, length), as Apple's.

    Args:
        signature: The graph's; shape, dtype and kind say what each input is.
        feeds: One entry per sample, by the names used here: timestep and guidance weight (batch,), text
            (batch, length, dim).

    Raises:
        ContractError: If a whole timestep is wanted and a fraction given, or one for all samples and
            they differ.
    """
    return {
        spec.graph_name: np.ascontiguousarray(_spoken(spec, feeds[spec.name]), dtype=spec.dtype)
        if spec.shape
        else np.asarray(_spoken(spec, feeds[spec.name]), dtype=spec.dtype)
        for spec in signature.inputs
    }


def _spoken(spec: TensorSpec, value: np.ndarray) -> np.ndarray:
    match spec.kind, len(spec.shape):
        case "t", rank:
            if spec.dtype.startswith("int") and (value != np.rint(value)).any():
                msg = f"`{spec.name}`: this graph takes whole timesteps, got {value.tolist()!r:.60}; use a table of whole ones, or another format."
                raise ContractError(msg)
            if rank == 0 and (value != value[0]).any():
                msg = f"`{spec.name}`: this graph takes one timestep for all samples, got {value.tolist()!r:.60}."
                raise ContractError(msg)
            return value if rank else value[0]
        case "w", 2:
            return guidance_embedding(value, int(spec.shape[1]))
        case "text", 4:
            return value.transpose(0, 2, 1)[:, :, None]
    return value


def _plain(spec: TensorSpec) -> TensorSpec:
    """Return the input as it is called here, of which `spec` is the dialect."""
    shape, dtype = spec.shape, spec.dtype
    match spec.kind, len(shape):
        case ("t", _) | ("w", 2):
            shape, dtype = (shape or (BATCH,))[:1], "float32"
        case "text", 4:
            shape = (shape[0], shape[3], shape[1])
        case "tokens", _:
            dtype = "int32"
    return dataclasses.replace(spec, shape=shape, dtype=dtype, graph=None)


def guidance_embedding(w: np.ndarray, width: int) -> np.ndarray:
    """Return sines and cosines of ``1000 * w``, as diffusers' `get_guidance_scale_embedding`.

    Args:
        w: (batch,) guidance scale - 1.
        width: Even.

    Returns:
        float32 (batch, width): all sines, then all cosines.
    """
    half = width // 2
    step = np.float32(math.log(10000.0) / (half - 1))
    # Rounded once: a frequency that is one bit off moves an angle of thousands of radians.
    frequencies = np.exp(np.float64(np.arange(half, dtype=np.float32) * -step)).astype(np.float32)
    angles = (w.astype(np.float32) * 1000)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def check_graph(
    path: Path, signature: Signature, inputs: Iterable[str], outputs: Iterable[str]
) -> None:
    """Refuse a graph whose names are not those of its signature.

    Raises:
        BundleError: If a name is missing or unknown.
    """
    for what, found, specs in (
        ("inputs", inputs, signature.inputs),
        ("outputs", outputs, signature.outputs),
    ):
        got, wanted = sorted(found), sorted(spec.graph_name for spec in specs)
        if got != wanted:
            msg = f"{path}: its {what} are {', '.join(got)}, but the manifest says {', '.join(wanted)}; export it anew."
            raise BundleError(msg)


def _as_batch(value: Any, batch: int, dtype: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim == 0:
        array = np.full((batch,), array)
    return np.ascontiguousarray(array, dtype=dtype)
