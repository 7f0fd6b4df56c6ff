"""Convolutions of enlarged images, computed of the small ones: what the pixels would be repeated for is in the weights.

Every pixel twice in both directions, then a convolution of 3x3, as UNets and decoders enlarge: each of the four pixels
that one becomes sees only 2x2 different ones. So four convolutions of 2x2, whose weights are sums of the 3x3, give the
same with 4/9 of the products, and their images are put side by side. Weights grow by 7/9 of those layers'.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np

from edgedistill.errors import require

Source = Callable[[], np.ndarray]
_PLAIN = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1]}
# By place among the pixels that one becomes: the rows (or columns) of the 3x3 that fall on the first and on the
# second of the two that are seen.
_FALLS = (((0,), (1, 2)), ((0, 1), (2,)))


def split_enlarged(graph: Any, sources: MutableMapping[str, Source], reads: Iterable[str]) -> None:
    """Replace convolutions of enlarged images in an ONNX graph, where nothing else reads the enlarged ones.

    Args:
        graph: Changed in place.
        sources: Where the values of weights and constants come from, by name; those of the new weights are added.
        reads: The names that its nodes read, as often as they do, those inside of branches too.
    """
    readers = Counter([*reads, *(value.name for value in graph.output)])
    enlarged = {
        node.output[0]: node
        for node in graph.node
        if _doubles(node, sources) and readers[node.output[0]] == 1
    }
    nodes: list[Any] = []
    gone = set()
    for node in graph.node:
        if _is_plain(node, sources) and (before := enlarged.get(node.input[0])):
            nodes += _split(node, before.input[0], sources)
            gone.add(before.output[0])
        else:
            nodes.append(node)
    kept = [node for node in nodes if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)


def phase(weight: np.ndarray, down: int, right: int) -> np.ndarray:
    """Return the weights of one of the four convolutions.

    Args:
        weight: float (out, in, 3, 3).
        down, right: 0 or 1; the place among the pixels that one becomes.

    Returns:
        As the weight, (out, in, 2, 2); it sees the pixel, and the one before (0) or behind it (1).
    """
    wide = weight.astype(np.float64)
    rows = np.stack([wide[:, :, list(falls)].sum(2) for falls in _FALLS[down]], 2)
    cells = np.stack([rows[..., list(falls)].sum(-1) for falls in _FALLS[right]], -1)
    return cells.astype(weight.dtype)


def _split(node: Any, small: str, sources: MutableMapping[str, Source]) -> Iterator[Any]:
    """Give the nodes that compute what a convolution of an enlarged image does."""
    make: Callable[..., Any] = require("onnx.helper", "onnx").make_node
    weight, (made,) = node.input[1], node.output
    parts = []
    for down, right in itertools.product((0, 1), (0, 1)):
        ending = f"_{down}{right}"
        sources[weight + ending] = functools.partial(_phase_of, sources[weight], down, right)
        parts.append(made + ending)
        taken = [small, weight + ending, *node.input[2:]]
        pads = [1 - down, 1 - right, down, right]
        yield make("Conv", taken, parts[-1:], node.name + ending, kernel_shape=[2, 2], pads=pads)
    yield make("Concat", parts, [f"{made}_parts"], f"{node.name}_parts", axis=1)
    yield make("DepthToSpace", [f"{made}_parts"], [made], node.name, blocksize=2, mode="DCR")


def _phase_of(weight: Source, down: int, right: int) -> np.ndarray:
    return phase(weight(), down, right)


def _doubles(node: Any, sources: MutableMapping[str, Source]) -> bool:
    """Tell whether a node repeats every pixel in both directions."""
    if node.op_type != "Resize" or len(node.input) != 3 or node.input[2] not in sources:
        return False
    said = _attributes(node)
    how = (said["mode"], said["coordinate_transformation_mode"], said["nearest_mode"])
    repeats = how == (b"nearest", b"asymmetric", b"floor")
    return repeats and sources[node.input[2]]().tolist() == [1, 1, 2, 2]


def _is_plain(node: Any, sources: MutableMapping[str, Source]) -> bool:
    """Tell whether a node is a convolution of 3x3 that keeps the size, of one group."""
    if node.op_type != "Conv" or node.input[1] not in sources:
        return False
    said = _attributes(node)
    return said.get("group", 1) == 1 and _PLAIN.items() <= said.items()


def _attributes(node: Any) -> dict[str, Any]:
    read = require("onnx.helper", "onnx").get_attribute_value
    return {
        item.name: list(value) if item.type == item.INTS else value
        for item in node.attribute
        for value in [read(item)]
    }
