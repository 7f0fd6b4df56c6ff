"""A runtime's session behind its signature: names, dtypes, shapes and batches put right once."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgedistill.contract import Signature
from edgedistill.errors import ContractError

Session = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class CheckedNetwork:
    """Calls a session with exactly what its signature says.

    Scalars are repeated over the batch, dtypes are cast, a batch larger than the graph's fixed batch
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
            ContractError: If an input is missing, a shape does not fit, or an output is not finite.
        """
        batch = next((np.shape(a)[0] for a in given.values() if np.ndim(a) > 0), 1)
        feeds = {
            spec.name: _as_batch(given[spec.name], batch, spec.dtype)
            for spec in self.signature.inputs
            if spec.name in given
        }
        self.signature.with_batch("batch").check(feeds)
        fixed = self.signature.batch
        outputs = self.session(feeds) if fixed in (None, batch) else self._in_pieces(feeds, batch)
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                msg = f"Network `{self.name}` returned NaN or infinity in `{name}`; its weights or its precision are broken."
                raise ContractError(msg)
        return dict(outputs)

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
            # A session may hand out a view of memory that its next call writes over.
            pieces.append(
                {k: np.array(v[: size - lacking]) for k, v in self.session(piece).items()}
            )
        return {name: np.concatenate([item[name] for item in pieces]) for name in pieces[0]}


def _as_batch(value: Any, batch: int, dtype: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim == 0:
        array = np.full((batch,), array)
    return np.ascontiguousarray(array, dtype=dtype)
