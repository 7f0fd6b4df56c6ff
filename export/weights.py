"""Weights into an ONNX file one at a time: moved as the graph would move them, in one file beside it where they are large."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from edgedistill.errors import require

from .enlarging import Source, split_enlarged

EXTERNAL_ABOVE = (
    400_000_000  # bytes of weights; one protobuf message is held whole, and ends at 2 GiB
)
_INLINE_BELOW = 1024  # bytes; shapes stay readable in the graph
_PAGE = 4096  # bytes; what starts on a page can be mapped
# They give the bits of what they take in another order or shape.
MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def save_graph(
    model: Any, weights: Mapping[str, Tensor], path: Path, moves: frozenset[str] = MOVES
) -> None:
    """Write an ONNX model whose weights are still inputs, holding one weight in memory at a time.

    Nodes that only move a weight are replaced by the moved weight, as PyTorch's exporter replaces them, and
    convolutions of enlarged images by smaller ones.

    Args:
        model: Changed in place: inputs become initializers.
        weights: Their values by name.
        path: The ``.onnx`` file; above `EXTERNAL_ABOVE` the weights go to ``.onnx_data`` beside it.
        moves: Operations that are carried out, of `MOVES`.
    """
    graph = model.graph
    sources = _take_sources(graph, weights)
    split_enlarged(graph, sources, _reads(graph))
    _fold(graph, sources, set(weights), moves)
    used = dict.fromkeys(name for name in _reads(graph) if name in sources)
    size = sum(value.nbytes for value in weights.values()) + sum(
        len(item.raw_data) for item in graph.initializer
    )
    data = path.with_name(f"{path.name}_data") if size > EXTERNAL_ABOVE else None
    with data.open("wb") if data else contextlib.nullcontext() as stream:
        graph.initializer.extend(_stored(name, sources[name](), stream) for name in used)
    require("onnx", "onnx").save(model, path)


def _take_sources(graph: Any, weights: Mapping[str, Tensor]) -> dict[str, Source]:
    """Take weights and constants out of inputs and initializers; return where their values come from."""
    to_array = require("onnx.numpy_helper", "onnx").to_array
    held = {item.name: item for item in graph.initializer}
    _keep(graph.input, lambda item: item.name not in weights)
    _keep(graph.initializer, lambda _item: False)
    return {
        **{name: value.detach().numpy for name, value in weights.items()},
        **{name: functools.partial(to_array, item) for name, item in held.items()},
        **{
            node.output[0]: functools.partial(to_array, node.attribute[0].t)
            for node in graph.node
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        },
    }


def _fold(
    graph: Any, sources: dict[str, Source], of_weights: set[str], moves: frozenset[str]
) -> None:
    """Replace nodes that move weights by sources, and drop constants that nothing reads any more."""
    moved: dict[object, str] = {}
    renamed: dict[str, str] = {}
    folded = set()
    for node in graph.node:
        given = {name: renamed.get(name, name) for name in node.input if name}
        read = set(given.values())
        is_move = node.op_type in moves and of_weights & read and read <= set(sources)
        if not is_move:
            continue
        (made,) = node.output
        # What is moved alike twice, as by two layers that share their weight, is one.
        key = (
            node.op_type,
            *(name if name in of_weights else sources[name]().tobytes() for name in given.values()),
            *(item.SerializeToString() for item in node.attribute),
        )
        renamed[made] = moved.setdefault(key, made)
        sources.setdefault(
            renamed[made], _moved(node, {name: sources[held] for name, held in given.items()})
        )
        of_weights.add(renamed[made])
        folded.add(made)
    _keep(graph.node, lambda node: node.output[0] not in folded)
    _rename(graph, renamed)
    read = {*_reads(graph), *(value.name for value in graph.output)}
    _keep(graph.node, lambda node: node.op_type != "Constant" or node.output[0] in read)
    for node in graph.node:
        if node.op_type == "Constant":
            sources.pop(node.output[0], None)


def _moved(node: Any, given: Mapping[str, Source]) -> Source:
    evaluator = require("onnx.reference", "onnx").ReferenceEvaluator

    def move() -> np.ndarray:
        return evaluator(node).run(None, {name: source() for name, source in given.items()})[0]

    return move


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Let the nodes of a graph read other names, those inside of branches too."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for inner in _inner(node):
            _rename(inner, names)


def _reads(graph: Any) -> Iterator[str]:
    """Give the names that the nodes of a graph read, those inside of branches too."""
    for node in graph.node:
        yield from node.input
        for inner in _inner(node):
            yield from _reads(inner)


def _inner(node: Any) -> list[Any]:
    """Return the branches of a node."""
    return [item.g for item in node.attribute if item.HasField("g")]


def _keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Keep the items of a repeated field that are wanted."""
    kept = [item for item in items if wanted(item)]
    del items[:]
    items.extend(kept)


def _stored(name: str, value: np.ndarray, stream: BinaryIO | None) -> Any:
    """Return a tensor of the graph, or one that points to where it was appended to the file of weights."""
    onnx = require("onnx", "onnx")
    if stream is None or value.nbytes < _INLINE_BELOW:
        return onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
    stream.write(bytes(-stream.tell() % _PAGE))
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    pointer = onnx.TensorProto(
        name=name, dims=value.shape, data_type=kind, data_location=onnx.TensorProto.EXTERNAL
    )
    where = {"location": Path(stream.name).name, "offset": stream.tell(), "length": value.nbytes}
    for key, said in where.items():
        pointer.external_data.add(key=key, value=str(said))
    stream.write(np.asarray(value, order="C").data)
    return pointer
