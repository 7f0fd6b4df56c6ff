"""Where a graph differs from its contract."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgedistill.contract import Signature, TensorSpec

from .graphs import Graph, Tensor


@dataclass(frozen=True)
class Mismatch:
    """One difference.

    Fields:
        what: ``missing``, ``unknown``, ``order``, ``dtype``, ``precision`` (both are floats), ``rank``, ``size``.
        tensor: The tensor's name.
        expected, found: In words.
    """

    what: str
    tensor: str
    expected: str
    found: str


def mismatches(contract: Signature, graph: Graph, *, ordered: bool = False) -> Iterator[Mismatch]:
    """Yield where a graph differs from its contract.

    Args:
        contract: What is expected; sizes that are words are free, equal words are equal sizes.
        graph: What is there.
        ordered: Whether the loader finds outputs by their place.
    """
    sizes: dict[str, int] = {}
    for side, wanted, found in (
        ("input", contract.inputs, graph.inputs),
        ("output", contract.outputs, graph.outputs),
    ):
        yield from _names(side, [item.name for item in wanted], [item.name for item in found])
        there = {item.name: item for item in found}
        for spec in wanted:
            if spec.name in there:
                yield from _tensor(side, spec, there[spec.name], sizes)
    expected = [item.name for item in contract.outputs]
    given = [item.name for item in graph.outputs]
    if ordered and set(given) == set(expected) and given != expected:
        yield Mismatch(
            "order", expected[0], f"outputs {', '.join(expected)}", f"outputs {', '.join(given)}"
        )


def _names(side: str, wanted: Sequence[str], found: Sequence[str]) -> Iterator[Mismatch]:
    listed = f"{side}s {', '.join(found) or 'none'}"
    for name in wanted:
        if name not in found:
            yield Mismatch("missing", name, f"{side} `{name}`", listed)
    for name in found:
        if name not in wanted:
            yield Mismatch("unknown", name, f"{side}s {', '.join(wanted)}", f"{side} `{name}`")


def _tensor(
    side: str, spec: TensorSpec, found: Tensor, sizes: dict[str, int]
) -> Iterator[Mismatch]:
    what = f"{side} `{spec.name}`"
    if found.dtype != spec.dtype:
        floats = spec.dtype.startswith("float") and found.dtype.startswith("float")
        kind = "precision" if floats else "dtype"
        yield Mismatch(kind, spec.name, f"{what} of {spec.dtype}", found.dtype)
    if found.shape is None:
        return
    shape = f"{what} of shape {_text(spec.shape)}"
    if len(found.shape) != len(spec.shape):
        told = f"{shape}, rank {len(spec.shape)}"
        yield Mismatch("rank", spec.name, told, f"rank {len(found.shape)}")
        return
    for want, got in zip(spec.shape, found.shape, strict=True):
        if isinstance(got, str):
            continue  # it takes any size
        held = want if isinstance(want, int) else sizes.setdefault(want, got)
        if got != held:
            size = f" with {want} {held}" if isinstance(want, str) else ""
            yield Mismatch("size", spec.name, shape + size, _text(found.shape))
            return


def _text(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
