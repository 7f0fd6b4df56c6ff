"""Sums of many values in a written graph are as precise as PyTorch's."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgedistill.contract import BATCH, Signature, TensorSpec
from export.frozen import Frozen
from export.to_onnx import trace_onnx

CHANNELS, GROUPS = 4, 2


def written(path, size, opset, *, batch=BATCH):
    """Write a group normalization of images of a size; return it and its operations."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(GROUPS, CHANNELS, eps=1e-3).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    shape = (batch, CHANNELS, *size)
    signature = Signature(
        (TensorSpec("input", shape, "float32", "x"),),
        (TensorSpec("out", shape, "float32", "raw"),),
    )
    trace_onnx(Frozen(norm, signature), path, opset=opset)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    return norm, kinds


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_many_values_keep_their_digits(opset, batch, tmp_path):
    path = tmp_path / "norm.onnx"
    norm, kinds = written(path, (512, 768), opset, batch=batch)
    assert "InstanceNormalization" not in kinds
    count = 1 if batch == 1 else 2
    scale = torch.tensor([0.01, 1, 3, 0.2]).reshape(1, CHANNELS, 1, 1)
    given = scale * torch.randn(count, CHANNELS, 512, 768) + 5 * scale
    (made,) = onnxruntime.InferenceSession(path).run(None, {"input": given.numpy()})
    want = norm.double()(given.double())
    error = (torch.from_numpy(made) - want).square().mean() / want.square().mean()
    assert -10 * error.log10() > 120  # 114 where values are added one after another


@pytest.mark.parametrize("size", [(16, 24), ("height", "width")])
def test_few_values_and_free_sizes_are_left_to_the_runtime(size, tmp_path):
    _, kinds = written(tmp_path / "norm.onnx", size, 17)
    assert "InstanceNormalization" in kinds
    assert "ReduceL2" not in kinds


def test_free_sizes_may_be_traced_large(tmp_path):
    path = tmp_path / "norm.onnx"
    torch.manual_seed(0)
    # Traced at 16x24, which is 256x384 behind the enlargement: many values of a group.
    network = nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1),
        nn.Upsample(scale_factor=16),
        nn.GroupNorm(GROUPS, CHANNELS),
    ).requires_grad_(False)
    signature = Signature(
        (TensorSpec("input", (BATCH, CHANNELS, "height", "width"), "float32", "x"),),
        (TensorSpec("out", (BATCH, CHANNELS, "rows", "columns"), "float32", "raw"),),
    )
    trace_onnx(Frozen(network, signature), path)
    given = torch.randn(1, CHANNELS, 5, 7)
    (made,) = onnxruntime.InferenceSession(path).run(None, {"input": given.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), network(given), atol=1e-5, rtol=0)


def test_sizes_behind_an_enlargement_are_known_though_the_batch_is_free(tmp_path):
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.GroupNorm(GROUPS, CHANNELS))
    signature = Signature(
        (TensorSpec("input", (BATCH, CHANNELS, 256, 384), "float32", "x"),),
        (TensorSpec("out", (BATCH, CHANNELS, 512, 768), "float32", "raw"),),
    )
    path = tmp_path / "norm.onnx"
    trace_onnx(Frozen(network.requires_grad_(False), signature), path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("ReduceL2") == 1
    assert "InstanceNormalization" not in kinds
    assert "Expand" not in kinds
