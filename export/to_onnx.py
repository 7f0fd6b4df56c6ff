"""One network to one ONNX file: traced, cleaned, checked, run once beside PyTorch, then put in place."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgedistill.contract import BATCH, Signature
from edgedistill.errors import CheckFailedError, ConfigError, require
from edgedistill.files import written_beside
from edgedistill.parity import floor_of

from .checking import TRY_ELSE, Check, check_file, named
from .frozen import Frozen, examples, expected_of, free_axes
from .group_norm import SummedByRows
from .recording import record
from .weights import MOVES, save_graph
from .worker import called

OPSET = 17  # what every runtime of the last years reads
DYNAMO_OPSET = 20  # the newer exporter writes no older one without converting
_NOTES = ("doc_string", "metadata_props")


def write_onnx(
    network: nn.Module,
    signature: Signature,
    path: Path,
    *,
    opset: int | None = None,
    dynamo: bool = False,
    consume: bool = False,
) -> dict[str, Any]:
    """Write a network as ONNX.

    Args:
        network: In eval mode, without gradients.
        signature: Declared names, dtypes and shapes; the batch is fixed or free.
        path: The ``.onnx`` file to write; large weights go to one ``.onnx_data`` beside it.
        opset: Version of the operator set; None: `OPSET`, or `DYNAMO_OPSET` with `dynamo`.
        dynamo: Use the newer exporter. It gives half the nodes and takes twenty times as long.
        consume: Give the network's memory back once it is written, before the file is opened; it is of no use
            afterwards. A large file is opened in a process that never imports torch.

    Returns:
        What made it: exporter, opset, versions, and ``snr_db`` against PyTorch.

    Raises:
        CheckFailedError: If the graph is not valid ONNX, or leaves the float32 floor.
        ConfigError: If the exporter cannot write the opset.
        MissingDependencyError: If onnx or onnxruntime is not installed.
    """
    onnx = require("onnx", "onnx")
    opset = opset or (DYNAMO_OPSET if dynamo else OPSET)
    frozen = Frozen(network, signature)
    expected = expected_of(frozen)
    alone = consume and frozen.is_large
    with written_beside(path) as made:
        trace_onnx(frozen, made, opset=opset, dynamo=dynamo)
        if consume:
            frozen.release()
        try:
            onnx.checker.check_model(made, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = " ".join(str(error).split())
            msg = f"{named(path)}: not valid ONNX of opset {opset} ({reason}); it was not written. {TRY_ELSE}"
            raise CheckFailedError(msg) from error
        check = Check("onnxruntime", signature, expected, floor_of("float32").raw, {})
        snr_db = called(check_file, check, made, named(path), alone=alone, what=named(path))
    return {
        "exporter": "torch.onnx dynamo" if dynamo else "torch.onnx TorchScript",
        "opset": opset,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "snr_db": snr_db,
    }


def trace_onnx(
    frozen: Frozen,
    path: Path,
    *,
    opset: int = OPSET,
    dynamo: bool = False,
    transposed: bool = True,
) -> None:
    """Trace to an ONNX file with declared names and shapes and nothing that tells where it was made.

    Args:
        frozen: The network.
        path: The file to write.
        opset, dynamo: As of `write_onnx`.
        transposed: Store weights as matrix products read them, else as the network has them, with a node each.
    """
    onnx = require("onnx", "onnx")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / path.name
        with _without_known_warnings(), SummedByRows(free=_free_sides(frozen.signature)):
            weights = (_export_dynamo if dynamo else record)(frozen, raw, opset)
        model = onnx.load(raw)
    written = next(item.version for item in model.opset_import if not item.domain)
    if written != opset:
        msg = f"This exporter cannot write opset {opset}, it wrote {written}; ask for that one, or leave --dynamo out."
        raise ConfigError(msg)
    _strip(model)
    graph = model.graph
    graph.name = path.stem
    for values, specs in (
        (graph.input, frozen.signature.inputs),
        (graph.output, frozen.signature.outputs),
    ):
        for value, spec in zip(values, specs, strict=False):  # the weights follow
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
            value.CopyFrom(onnx.helper.make_tensor_value_info(spec.name, kind, spec.shape))
    save_graph(model, weights, path, MOVES if transposed else MOVES - {"Transpose"})


def _free_sides(signature: Signature) -> bool:
    """Tell whether any size but the batch is free."""
    sizes = (size for spec in signature.inputs for size in spec.shape)
    return any(isinstance(size, str) and size != BATCH for size in sizes)


def _export_dynamo(frozen: Frozen, path: Path, opset: int) -> Mapping[str, Tensor]:
    """Write the graph with its weights inside, so that none is left to add."""
    require("onnxscript", "onnx")
    inputs, outputs = frozen.signature.inputs, frozen.signature.outputs
    free = [free_axes(spec) for spec in inputs]
    sizes = {name: torch.export.Dim(name) for axes in free for name in axes.values()}
    shapes = tuple({axis: sizes[name] for axis, name in axes.items()} for axes in free)
    torch.onnx.export(
        frozen,
        examples(frozen.signature),
        path,
        opset_version=opset,
        input_names=[spec.name for spec in inputs],
        output_names=[spec.name for spec in outputs],
        dynamic_shapes=(shapes,) if sizes else None,
        dynamo=True,
        verbose=False,
    )
    return {}


def _strip(message: Any) -> None:
    """Remove notes from a protobuf message and all it holds: they carry stack traces with local paths."""
    for field, value in message.ListFields():
        if field.name in _NOTES:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                _strip(item)


@contextlib.contextmanager
def _without_known_warnings() -> Iterator[None]:
    from torch.jit import TracerWarning  # type: ignore[attr-defined]

    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)  # it says that torchvision is not there; nothing here needs it
    try:
        with warnings.catch_warnings():
            # The exporter that is chosen on purpose, and torch's own use of its old parts.
            warnings.filterwarnings("ignore", ".*legacy TorchScript", DeprecationWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx")
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)
            # Size checks become constants of the graph, which they are.
            warnings.filterwarnings("ignore", category=TracerWarning)
            # Padding on one side, of an autoencoder's encoder, reverses a list of numbers.
            warnings.filterwarnings("ignore", "Constant folding - Only steps=1", UserWarning)
            # All inputs share the one free axis on purpose.
            warnings.filterwarnings("ignore", "# The axis name: batch", UserWarning)
            yield
    finally:
        registry.setLevel(level)
