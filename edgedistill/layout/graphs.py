"""Borders of exported graphs, read without their weights but for small constants: ONNX, OpenVINO IR, Core ML packages."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from edgedistill.errors import BundleError, require
from edgedistill.mlpackage import read_package

from .constants import Constants, of_core_ml, of_onnx, of_openvino

Shape = tuple[int | str, ...]
_ONNX_DTYPES = {1: "float32", 6: "int32", 7: "int64", 8: "string", 9: "bool", 10: "float16"}
_OPENVINO_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}
_CORE_ML_DTYPES = {65568: "float32", 65552: "float16", 65600: "float64", 131104: "int32"}


@dataclass(frozen=True)
class Tensor:
    """One tensor at the border of a graph; a size that is a word is free, a shape of None is not stated."""

    name: str
    dtype: str
    shape: Shape | None


@dataclass(frozen=True)
class Graph:
    """What a graph takes and gives.

    Fields:
        inputs, outputs: In the order of the file.
        weights: What lies beside the file: name and the number of bytes that the graph reads of it.
        compression: Ways in which weights are packed, such as ``"constexpr_lut_to_dense 16"``, a palette
            of 16 values.
        constants: What float16 makes of the constants.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[tuple[str, int], ...] = ()
    compression: frozenset[str] = frozenset()
    constants: Constants = field(default_factory=Constants)


def read_graph(path: Path) -> Graph:
    """Read the border of a graph; its kind is told by the name's ending.

    Raises:
        BundleError: If the file is damaged.
        ContractError: If a Core ML package holds no ML Program.
        MissingDependencyError: If ``onnx`` or ``coremltools`` is needed and not installed.
    """
    readers = {".onnx": _read_onnx, ".xml": _read_openvino, ".mlpackage": _read_core_ml}
    return readers[path.suffix](path)


def _read_onnx(path: Path) -> Graph:
    onnx = require("onnx", "onnx")
    decode_error = require("google.protobuf.message", "onnx").DecodeError
    try:
        return _of_onnx(onnx.load(str(path), load_external_data=False), path.parent)
    except (decode_error, OSError, ValueError) as error:
        raise _damaged(path, "an ONNX model", error) from error


def _of_onnx(model: Any, folder: Path) -> Graph:
    initializers = {item.name for item in model.graph.initializer}
    inputs = (item for item in model.graph.input if item.name not in initializers)
    return Graph(
        tuple(map(_onnx_tensor, inputs)),
        tuple(map(_onnx_tensor, model.graph.output)),
        _onnx_weights(model.graph.initializer),
        constants=of_onnx(model, folder),
    )


def _onnx_tensor(value: Any) -> Tensor:
    kind = value.type.tensor_type
    dtype = _ONNX_DTYPES.get(kind.elem_type, f"type {kind.elem_type}")
    if not kind.HasField("shape"):
        return Tensor(value.name, dtype, None)
    sizes = tuple(
        int(size.dim_value) if size.HasField("dim_value") else (size.dim_param or "?")
        for size in kind.shape.dim
    )
    return Tensor(value.name, dtype, sizes)


def _onnx_weights(initializers: Iterable[Any]) -> tuple[tuple[str, int], ...]:
    ends: dict[str, int] = {}
    for item in initializers:
        told = {entry.key: entry.value for entry in item.external_data}
        if "location" in told:
            end = int(told.get("offset", 0)) + int(told.get("length", 0))
            ends[told["location"]] = max(ends.get(told["location"], 0), end)
    return tuple(ends.items())


def _read_openvino(path: Path) -> Graph:
    try:
        # expat itself limits how far entities may grow.
        root = ET.parse(path).getroot()  # noqa: S314
        return _of_openvino(root, path.with_suffix(".bin"))
    except (ET.ParseError, OSError, ValueError) as error:
        raise _damaged(path, "an OpenVINO model", error) from error


def _of_openvino(root: ET.Element, weights: Path) -> Graph:
    layers = {layer.get("id"): layer for layer in root.iterfind("layers/layer")}
    sources = {
        edge.get("to-layer"): (edge.get("from-layer"), edge.get("from-port"))
        for edge in root.iterfind("edges/edge")
    }
    inputs, outputs, end = [], [], 0
    for name, layer in layers.items():
        if layer.get("type") == "Parameter":
            inputs.append(_openvino_tensor(layer.find("output/port"), layer))
        elif layer.get("type") == "Result":
            source, port = sources.get(name, (None, None))
            given = layers[source].find(f"output/port[@id='{port}']") if source in layers else None
            outputs.append(_openvino_tensor(given, layer))
        elif layer.get("type") == "Const" and (data := layer.find("data")) is not None:
            end = max(end, int(data.get("offset", 0)) + int(data.get("size", 0)))
    return Graph(
        tuple(inputs),
        tuple(outputs),
        ((weights.name, end),),
        constants=of_openvino(root, weights),
    )


def _openvino_tensor(port: ET.Element | None, layer: ET.Element) -> Tensor:
    """Return a tensor by the port that gives it; several names of one tensor are parted by commas."""
    if port is None:
        return Tensor(layer.get("name", ""), "unknown", None)
    name = (port.get("names") or layer.get("name") or "").split(",", maxsplit=1)[0]
    precision = port.get("precision", "").lower().replace("fp", "f")  # FP32 is f32 elsewhere
    dtype = _OPENVINO_DTYPES.get(precision, precision or "unknown")
    data = layer.find("data")
    if data is not None and data.get("shape") == "...":
        return Tensor(name, dtype, None)
    sizes = (int(size.text or -1) for size in port.iterfind("dim"))
    return Tensor(name, dtype, tuple("?" if size < 0 else size for size in sizes))


def _read_core_ml(path: Path) -> Graph:
    spec = read_package(path).get_spec()
    return Graph(
        tuple(map(_core_ml_tensor, spec.description.input)),
        tuple(map(_core_ml_tensor, spec.description.output)),
        compression=_core_ml_compression(spec.mlProgram),
        constants=of_core_ml(spec.mlProgram, path),
    )


def _core_ml_tensor(feature: Any) -> Tensor:
    array = feature.type.multiArrayType
    return Tensor(
        feature.name,
        _CORE_ML_DTYPES.get(array.dataType, feature.type.WhichOneof("Type")),
        tuple(int(size) for size in array.shape),
    )


def _core_ml_compression(program: Any) -> frozenset[str]:
    """Return the ways in which weights are packed; a palette is told by its number of values."""
    return frozenset(
        " ".join([operation.type, *_palette(operation)])
        for function in program.functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
        if operation.type.startswith("constexpr_")
    )


def _palette(operation: Any) -> list[str]:
    """Return the number of values of a palette, in a list; of other packings nothing."""
    if "lut" in operation.attributes:  # until iOS 17: a vector
        lut = operation.attributes["lut"]
    elif "lut" in operation.inputs:  # since iOS 18: (groups of each axis..., values, vector)
        lut = operation.inputs["lut"].arguments[0].value
    else:
        return []
    sizes = [size.constant.size for size in lut.type.tensorType.dimensions]
    return [str(sizes[-2:][0])] if sizes else []


def _damaged(path: Path, what: str, error: Exception) -> BundleError:
    return BundleError(f"{path}: not {what} that is whole ({error}); export it anew.")
