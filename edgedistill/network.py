"""A runtime's session behind its signature: names, dtypes, shapes and batches put right once."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import BundleError, ContractError

# Takes and gives arrays by name; what it gives is the caller's, later calls leave it alone.
Session = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class CheckedNetwork:
    """Calls a session with exactly what its signature says.

    Scalars are repeated over the batch, dtypes are cast, a batch other than the graph's fixed batch
    is cut into pieces and the last piece is padded by repeating its first sample.

    Args:
        name: The network's name, for messages.
        signature: What the session takes and gives; its batch is fixed or free.
        session: Maps input arrays to output arrays by name.
    """

    def __init__(self, name: str, signature: Signature, session: Session) -> None:
        self.name = name
        self.signature = signature
        self.session = session

    def __call__(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the outputs for a batch; arrays in `given` that are not inputs are left out.

        Raises:
            ContractError: If an input is missing, a shape does not fit, or an output is missing or
                not finite.
        """
        feeds = self.feeds(given)
        batch = len(next(iter(feeds.values())))
        fixed = self.signature.batch
        outputs = self.session(feeds) if fixed in (None, batch) else self._in_pieces(feeds, batch)
        return {spec.name: self._checked(spec.name, outputs) for spec in self.signature.outputs}

    def feeds(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return what the session is fed: the inputs among `given`, one entry per sample each.

        Raises:
            ContractError: If an input is missing or a shape does not fit.
        """
        batch = next((np.shape(a)[0] for a in given.values() if np.ndim(a) > 0), 1)
        feeds = {
            spec.name: _as_batch(given[spec.name], batch, spec.dtype)
            for spec in self.signature.inputs
            if spec.name in given
        }
        self.signature.with_batch("batch").check(feeds)
        return feeds

    def _checked(self, name: str, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in outputs:
            msg = f"Network `{self.name}` returned no `{name}`, only: {', '.join(outputs)}; export it anew."
            raise ContractError(msg)
        if not np.isfinite(outputs[name]).all():
            msg = f"Network `{self.name}` returned NaN or infinity in `{name}`; its weights or its precision are broken."
            raise ContractError(msg)
        return outputs[name]

    def _in_pieces(self, feeds: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
        size = self.signature.batch or batch
        pieces = []
        for start in range(0, batch, size):
            piece = {name: value[start : start + size] for name, value in feeds.items()}
            lacking = size - min(size, batch - start)
            if lacking:
                piece = {
                    name: np.concatenate([value, np.repeat(value[:1], lacking, axis=0)])
                    for name, value in piece.items()
                }
            pieces.append({k: v[: size - lacking] for k, v in self.session(piece).items()})
        return {name: np.concatenate([item[name] for item in pieces]) for name in pieces[0]}


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
        got, wanted = sorted(found), sorted(spec.name for spec in specs)
        if got != wanted:
            msg = f"{path}: its {what} are {', '.join(got)}, but the manifest says {', '.join(wanted)}; export it anew."
            raise BundleError(msg)


def _as_batch(value: Any, batch: int, dtype: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim == 0:
        array = np.full((batch,), array)
    return np.ascontiguousarray(array, dtype=dtype)
