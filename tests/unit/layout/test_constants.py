"""Masks of attention that float16 has no number for: minus infinity, or the least number of float32."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from coremltools.proto import Model_pb2
from onnx import numpy_helper

from edgedistill.layout.checking import check_layout
from edgedistill.layout.findings import FORMATS

PATHS = {
    "onnx": "text_encoder/model.onnx",
    "openvino": "text_encoder/openvino_model.xml",
    "coreml": "coreml/packages/Stable_Diffusion_version_tiny_text_encoder.mlpackage",
}
LEAST = float(np.finfo(np.float32).min)
HALF = np.zeros(4, np.float16)
Add = Callable[[Path, dict[str, np.ndarray]], None]


def _mask(value: float, dtype: type[np.floating], size: int = 7) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.triu(np.full((size, size), value), 1).astype(dtype)


def _to_onnx(path: Path, constants: dict[str, np.ndarray]) -> None:
    model = onnx.load(path)
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    onnx.save(model, path)


def _as_nodes(path: Path, constants: dict[str, np.ndarray]) -> None:
    model = onnx.load(path)
    for name, value in constants.items():
        tensor = numpy_helper.from_array(value)
        model.graph.node.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
    onnx.save(model, path)


def _beside_onnx(path: Path, constants: dict[str, np.ndarray]) -> None:
    model, data = onnx.load(path), b""
    for name, value in constants.items():
        tensor = numpy_helper.from_array(value, name)
        onnx.external_data_helper.set_external_data(
            tensor, "model.onnx_data", len(data), value.nbytes
        )
        data += tensor.raw_data
        tensor.ClearField("raw_data")
        model.graph.initializer.append(tensor)
    onnx.save(model, path)
    path.with_name("model.onnx_data").write_bytes(data)


def _to_openvino(path: Path, constants: dict[str, np.ndarray]) -> None:
    data, layers = path.with_suffix(".bin").read_bytes(), ""
    for name, value in constants.items():
        kind = {"float16": "f16", "float32": "f32"}[value.dtype.name]
        layers += f'<layer id="{name}" name="{name}" type="Const"><data element_type="{kind}" offset="{len(data)}" size="{value.nbytes}"/></layer>'
        data += value.tobytes()
    path.write_text(path.read_text().replace("</layers>", f"{layers}</layers>"))
    path.with_suffix(".bin").write_bytes(data)


def _to_core_ml(path: Path, constants: dict[str, np.ndarray], *, beside: bool = False) -> None:
    model = path / "Data/com.apple.CoreML/model.mlmodel"
    spec, data = Model_pb2.Model.FromString(model.read_bytes()), bytes(64)
    block = spec.mlProgram.functions["main"].block_specializations["CoreML7"]
    for name, held in constants.items():
        operation = block.operations.add(type="const")
        operation.outputs.add(name=name)
        value = operation.attributes["val"]
        value.type.tensorType.dataType = {"float16": 10, "float32": 11}[held.dtype.name]
        for size in held.shape:
            value.type.tensorType.dimensions.add().constant.size = size
        if beside:
            value.blobFileValue.fileName = "@model_path/weights/weight.bin"
            value.blobFileValue.offset = len(data)
            start = len(data) + 64
            data += struct.pack("<IIQQ", 0xDEADBEEF, 1, held.nbytes, start).ljust(64, b"\0")
            data += held.tobytes()
        elif held.dtype == np.float16:
            value.immediateValue.tensor.bytes.values = held.tobytes()
        else:
            value.immediateValue.tensor.floats.values.extend(held.ravel().tolist())
    model.write_bytes(spec.SerializeToString())
    (path / "Data/com.apple.CoreML/weights/weight.bin").write_bytes(data)


def _beside_core_ml(path: Path, constants: dict[str, np.ndarray]) -> None:
    _to_core_ml(path, constants, beside=True)


WAYS: dict[str, tuple[str, Add]] = {
    "initializers": ("onnx", _to_onnx),
    "nodes": ("onnx", _as_nodes),
    "beside the graph": ("onnx", _beside_onnx),
    "OpenVINO": ("openvino", _to_openvino),
    "Core ML": ("coreml", _to_core_ml),
    "weights of Core ML": ("coreml", _beside_core_ml),
}
LOADERS = {form: [k for k, held in FORMATS.items() if held == form] for form in PATHS}


def _warnings(root: Path, form: str) -> list[tuple[str, str, str]]:
    found = check_layout(root, LOADERS[form])
    return [(i.loader, i.file, i.found) for i in found if "float16 holds" in i.expected]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (-np.inf, np.float16, "-inf"),
        (LEAST, np.float32, "-3.40282e+38"),
        (-np.inf, np.float32, "-inf"),
        (np.nan, np.float16, "nan"),
    ],
)
def test_a_mask_that_float16_has_no_number_for_is_found(
    folder, way: str, value: float, dtype: type[np.floating], told: str
) -> None:
    root = folder()
    form, add = WAYS[way]
    add(root / PATHS[form], {"weight": HALF, "mask": _mask(value, dtype)})
    wanted = f"{told} in `mask`, in a graph with weights of float16"
    assert _warnings(root, form) == [(loader, PATHS[form], wanted) for loader in LOADERS[form]]


@pytest.mark.parametrize("way", WAYS)
def test_masks_that_fit_or_are_of_float32_and_large_weights_are_not_minded(
    folder, way: str
) -> None:
    form, add = WAYS[way]
    for constants in (
        {"weight": HALF, "mask": _mask(-1e4, np.float16)},
        {"weight": HALF, "mask": _mask(-65504, np.float32)},
        {"mask": _mask(LEAST, np.float32)},
        {"weight": HALF, "weights": _mask(-np.inf, np.float16, 256)},
    ):
        root = folder()
        add(root / PATHS[form], constants)
        assert _warnings(root, form) == []
        for path in root.parent.iterdir():
            shutil.rmtree(path)


def test_other_networks_may_hold_infinity(folder) -> None:
    root = folder()
    _to_onnx(root / "unet/model.onnx", {"weight": HALF, "mask": _mask(-np.inf, np.float16)})
    assert _warnings(root, "onnx") == []
