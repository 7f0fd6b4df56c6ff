"""Which of several students makes a sample: a table of classes, or the signs of planes over an embedding."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.config import finite
from edgedistill.errors import ContractError

CLASS_TABLE, SIGN_PLANES = "class_table", "sign_planes"


@dataclass(frozen=True)
class Router:
    """A partition of what can be asked for among students (arXiv:2410.23274); every sample has exactly one.

    Rows call `network`; student k is the network named ``{network}.{k}``.

    Fields:
        kind: ``class_table`` or ``sign_planes``.
        on: What decides: the class condition, or an embedding (batch, size) such as ``pooled``.
        students: How many there are.
        table: For ``class_table``: the student of each class.
        planes, bias: For ``sign_planes``: plane p sets bit p of the student where ``planes[p] @ embedding +
            bias[p] >= 0``; P planes part 2^P students, and of 1 there are none.
        network: The name in the rows that is routed.
    """

    kind: str
    on: str
    students: int
    table: tuple[int, ...] = ()
    planes: tuple[tuple[float, ...], ...] = ()
    bias: tuple[float, ...] = ()
    network: str = "unet"

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the students' networks, in order."""
        return tuple(f"{self.network}.{student}" for student in range(self.students))

    def problems(self) -> Iterator[str]:
        """Yield why this is no partition."""
        if self.kind == CLASS_TABLE:
            named = set(self.table)
            total = (
                named
                and len(named) == self.students
                and (min(named), max(named)) == (0, self.students - 1)
            )
            if not total or self.planes or self.bias:
                yield f"a class table must name each of {self.students} students, got {list(self.table)!r:.80}"
        elif self.kind == SIGN_PLANES:
            if self.students != 2 ** len(self.planes) or len(self.bias) != len(self.planes):
                yield f"{len(self.planes)} planes need as many biases and part {2 ** len(self.planes)} students"
            if len({len(plane) for plane in self.planes}) > 1 or self.table:
                yield "sign planes are all of one size, and come without a table"
        else:
            yield f"router kind must be {CLASS_TABLE} or {SIGN_PLANES}, got {self.kind!r}"
        if not finite(*self.bias, *(x for plane in self.planes for x in plane)):
            yield "the router's planes and biases must be finite"


def route(router: Router, given: Mapping[str, Any]) -> np.ndarray:
    """Return each sample's student.

    Args:
        router: The partition.
        given: Holds `router.on`: classes (batch,), or embeddings (batch, size).

    Returns:
        (batch,) integers in [0, `router.students`).

    Raises:
        ContractError: If `router.on` is missing or its shape or a class does not fit.
    """
    if router.on not in given:
        msg = f"The students are chosen by `{router.on}`, which is not given; give it, or the prompt it comes from."
        raise ContractError(msg)
    value = given[router.on]
    value = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if router.kind == CLASS_TABLE:
        if value.ndim != 1 or value.min() < 0 or value.max() >= len(router.table):
            msg = f"`{router.on}` must hold one class from 0 to {len(router.table) - 1} per sample, got {value.tolist()!r:.60}."
            raise ContractError(msg)
        return np.asarray(router.table)[value]
    if not router.planes:
        return np.zeros(len(value), np.int64)
    planes = np.asarray(router.planes, np.float64)
    if value.ndim != 2 or value.shape[1] != planes.shape[1]:
        msg = f"`{router.on}` must have shape (batch, {planes.shape[1]}), got {value.shape}."
        raise ContractError(msg)
    heights = value.astype(np.float64) @ planes.T + np.asarray(router.bias, np.float64)
    bits: np.ndarray = (heights >= 0) @ (1 << np.arange(len(planes)))
    return bits
