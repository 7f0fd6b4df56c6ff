"""Small constants of exported graphs that float16 has no number for; of large ones, the weights, only the type is read."""

import functools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

_SMALL = 1 << 16  # values; a mask of 77 tokens has 5929
_MOST = float(np.finfo(np.float16).max)
_Dtype = type[np.floating[Any]]
_ONNX_DTYPES: Mapping[int, _Dtype] = {1: np.float32, 10: np.float16}
_OPENVINO_DTYPES: Mapping[str, _Dtype] = {"f32": np.float32, "f16": np.float16}
_CORE_ML_DTYPES: Mapping[int, _Dtype] = {10: np.float16, 11: np.float32}
_BLOB = struct.Struct("<IIQQ")  # in a file of Core ML's weights: mark, type, bytes, where they lie
_BLOB_MARK = 0xDEADBEEF


@dataclass(frozen=True)
class Constants:
    """What float16 makes of a graph's constants.

    Fields:
        in_half: Whether any is stored in float16.
        beyond: Name and first such value of each small one that holds infinity, or more than float16 does.
    """

    in_half: bool = False
    beyond: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class _Constant:
    """One constant; `read` gives its bytes, or None where they are not there."""

    name: str
    dtype: _Dtype
    count: int
    read: Callable[[], bytes | None]


def of_onnx(model: Any, folder: Path) -> Constants:
    """Look at the constants of a parsed ONNX model that lies in a folder."""
    return _looked_at(_in_onnx(model, folder))


def of_openvino(root: ET.Element, weights: Path) -> Constants:
    """Look at the constants of a parsed OpenVINO model with the file of its weights."""
    return _looked_at(_in_openvino(root, weights))


def of_core_ml(program: Any, package: Path) -> Constants:
    """Look at the constants of an ML Program of a package."""
    return _looked_at(_in_core_ml(program, package / "Data/com.apple.CoreML"))


def _looked_at(constants: Iterable[_Constant]) -> Constants:
    in_half, beyond = False, []
    for item in constants:
        in_half |= item.dtype is np.float16
        data = item.read() if 0 < item.count < _SMALL else None
        if data is None or len(data) != item.count * np.dtype(item.dtype).itemsize:
            continue  # that weights are not whole is another check's
        values = np.frombuffer(data, item.dtype).astype(np.float32)
        if (broken := values[~(np.abs(values) <= _MOST)]).size:
            beyond.append((item.name, float(broken[0])))
    return Constants(in_half, tuple(beyond))


def _in_onnx(model: Any, folder: Path) -> Iterator[_Constant]:
    named = [(tensor.name, tensor) for tensor in model.graph.initializer]
    named += [
        (node.output[0], attribute.t)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.HasField("t")
    ]
    for name, tensor in named:
        if (dtype := _ONNX_DTYPES.get(tensor.data_type)) is not None:
            read = functools.partial(_onnx_bytes, tensor, folder)
            yield _Constant(name, dtype, math.prod(tensor.dims), read)


def _onnx_bytes(tensor: Any, folder: Path) -> bytes | None:
    told = {entry.key: entry.value for entry in tensor.external_data}
    if "location" in told:
        place = folder / Path(told["location"]).name
        return _part(place, int(told.get("offset", 0)), int(told.get("length", 0)))
    if tensor.raw_data:
        return bytes(tensor.raw_data)
    if tensor.data_type == 1:
        return np.asarray(tensor.float_data, np.float32).tobytes()
    return np.asarray(tensor.int32_data, np.uint16).tobytes()


def _in_openvino(root: ET.Element, weights: Path) -> Iterator[_Constant]:
    for layer in root.iterfind("layers/layer[@type='Const']"):
        data = layer.find("data")
        told: Mapping[str, str] = {} if data is None else data.attrib
        dtype = _OPENVINO_DTYPES.get(told.get("element_type", ""))
        if dtype is not None:
            size = int(told.get("size", 0))
            read = functools.partial(_part, weights, int(told.get("offset", 0)), size)
            yield _Constant(layer.get("name", ""), dtype, size // np.dtype(dtype).itemsize, read)


def _in_core_ml(program: Any, folder: Path) -> Iterator[_Constant]:
    for function in program.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                name = operation.outputs[0].name if operation.outputs else operation.type
                for value in _core_ml_values(operation):
                    kind = value.type.tensorType
                    if (dtype := _CORE_ML_DTYPES.get(kind.dataType)) is not None:
                        count = math.prod(size.constant.size for size in kind.dimensions)
                        read = functools.partial(_core_ml_bytes, value, folder)
                        yield _Constant(name, dtype, count, read)


def _core_ml_values(operation: Any) -> Iterator[Any]:
    """Yield the constants that an operation is or takes."""
    yield from (value for name, value in operation.attributes.items() if name != "name")
    for given in operation.inputs.values():
        yield from (item.value for item in given.arguments if item.HasField("value"))


def _core_ml_bytes(value: Any, folder: Path) -> bytes | None:
    if value.HasField("blobFileValue"):
        blob = value.blobFileValue
        place = folder / "weights" / Path(blob.fileName).name
        header = _part(place, blob.offset, _BLOB.size) or b""
        if len(header) != _BLOB.size:
            return None
        mark, _, size, start = _BLOB.unpack(header)
        return _part(place, start, size) if mark == _BLOB_MARK else None
    tensor = value.immediateValue.tensor
    if tensor.HasField("bytes"):
        return bytes(tensor.bytes.values)
    return np.asarray(tensor.floats.values, np.float32).tobytes()


def _part(path: Path, start: int, size: int) -> bytes | None:
    """Return bytes of a file, or None where it is not there."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(size)
