"""OpenVINO models before and after NNCF: read, count, write."""

from pathlib import Path
from typing import Any

from edgedistill.files import native_writer
from edgedistill.telemetry import require_silent

_WEIGHTED = {
    "Convolution": 1,
    "ConvolutionBackpropData": 1,
    "GroupConvolution": 1,
    "GroupConvolutionBackpropData": 1,
    "MatMul": 1,
    "Gather": 0,
}
_BETWEEN = ("Convert", "Subtract", "Multiply", "Reshape", "FakeQuantize")


def read(path: Path) -> Any:
    """Read a model."""
    return require_silent("openvino", "openvino").Core().read_model(path)


def backend_params(_path: Path) -> dict[str, Any]:
    """Return what NNCF must be told of where the weights lie: nothing."""
    return {}


def write(model: Any, path: Path) -> tuple[int, int]:
    """Write a model, float weights as they are; return how many weights are integers and how many are not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with native_writer("OpenVINO", path):
        require_silent("openvino", "openvino").save_model(model, path, compress_to_fp16=False)
    types = [
        _weight_type(op, _WEIGHTED[op.get_type_name()])
        for op in model.get_ops()
        if op.get_type_name() in _WEIGHTED
    ]
    return types.count("integer"), types.count("float")


def _weight_type(operation: Any, port: int) -> str | None:
    node = operation.input_value(port).get_node()
    while node.get_type_name() in _BETWEEN:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) < 2:
        return None
    return "integer" if node.get_element_type().is_integral() else "float"
