"""Convolutions of enlarged images are written as four small ones, and nothing else is."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from edgedistill.contract import BATCH, Signature, TensorSpec
from export.enlarging import phase
from export.frozen import Frozen
from export.to_onnx import DYNAMO_OPSET, OPSET, trace_onnx

CHANNELS = 3


def written(network, path, size=(6, 10), *, dynamo=False):
    """Write a network of images; return its operations."""
    torch.manual_seed(0)
    network.requires_grad_(False)
    signature = Signature(
        (TensorSpec("input", (BATCH, CHANNELS, *size), "float32", "x"),),
        (TensorSpec("out", (BATCH, 5, "rows", "columns"), "float32", "raw"),),
    )
    opset = DYNAMO_OPSET if dynamo else OPSET
    trace_onnx(Frozen(network, signature), path, dynamo=dynamo, opset=opset)
    return [node.op_type for node in onnx.load(path).graph.node]


def drawn(network, path, given):
    """Return what the file and the network make of images."""
    (made,) = onnxruntime.InferenceSession(path).run(None, {"input": given.numpy()})
    return torch.from_numpy(made), network.double()(given.double())


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(6, 10), ("height", "width")])
def test_four_small_convolutions_draw_the_same(size, bias, dynamo, tmp_path):
    path = tmp_path / "network.onnx"
    torch.manual_seed(0)
    convolution = nn.Conv2d(CHANNELS, 5, 3, padding=1, bias=bias)
    network = nn.Sequential(nn.Upsample(scale_factor=2), convolution)
    kinds = written(network, path, size, dynamo=dynamo)
    assert sorted(kinds) == ["Concat", *4 * ["Conv"], "DepthToSpace"]
    made, want = drawn(network, path, torch.randn(2, CHANNELS, 6, 10))
    torch.testing.assert_close(made.double(), want, atol=1e-6, rtol=0)


def test_the_products_are_four_ninths_and_all_weights_are_in_them():
    weight = np.random.default_rng(0).standard_normal((5, CHANNELS, 3, 3)).astype(np.float32)
    parts = {(i, j): phase(weight, i, j) for i in (0, 1) for j in (0, 1)}
    assert 9 * sum(part.size for part in parts.values()) == 16 * weight.size
    for part in parts.values():
        np.testing.assert_allclose(part.sum((2, 3)), weight.sum((2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(parts[0, 0][..., 0, 0], weight[..., 0, 0])
    np.testing.assert_array_equal(parts[1, 1][..., 1, 1], weight[..., 2, 2])


class Twice(nn.Module):
    """The enlarged image is read by two convolutions that share their weight."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(CHANNELS, 5, 1)

    def forward(self, input):  # noqa: A002
        once = self.one(interpolate(input, scale_factor=2))
        return self.last(self.one(interpolate(once, scale_factor=2)))


def test_weights_that_two_enlargements_share_are_stored_once(tmp_path):
    path = tmp_path / "network.onnx"
    network = Twice()
    kinds = written(network, path)
    assert kinds.count("DepthToSpace") == 2
    assert len(onnx.load(path).graph.initializer) == 4 + 1 + 2
    made, want = drawn(network, path, torch.randn(2, CHANNELS, 6, 10))
    torch.testing.assert_close(made.double(), want, atol=1e-6, rtol=0)


class Added(nn.Module):
    """The enlarged image is also added."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(CHANNELS, 5, 1)

    def forward(self, input):  # noqa: A002
        large = interpolate(input, scale_factor=2)
        return self.last(self.one(large) + large)


def enlarging(convolution, **how):
    """Return a network that enlarges its images by default twice, nearest."""
    return nn.Sequential(nn.Upsample(**{"scale_factor": 2, **how}), convolution)


@pytest.mark.parametrize(
    "network",
    [
        Added(),
        enlarging(nn.Conv2d(CHANNELS, 5, 3, padding=1, stride=2)),
        enlarging(nn.Conv2d(CHANNELS, 5, 3, padding=2, dilation=2)),
        enlarging(nn.Conv2d(CHANNELS, 5, 3)),
        enlarging(nn.Conv2d(CHANNELS, 5, 1)),
        enlarging(nn.Conv2d(CHANNELS, 5, 3, padding=1), scale_factor=3),
        enlarging(nn.Conv2d(CHANNELS, 5, 3, padding=1), scale_factor=(1, 2)),
        enlarging(nn.Conv2d(CHANNELS, 5, 3, padding=1), mode="bilinear"),
        nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(CHANNELS, 3, 3, padding=1, groups=3),
            nn.Conv2d(3, 5, 1),
        ),
    ],
    ids=[
        "read twice",
        "strides",
        "dilations",
        "no padding",
        "1x1",
        "three times",
        "one direction",
        "bilinear",
        "groups",
    ],
)
def test_what_is_not_that_stays(network, tmp_path):
    path = tmp_path / "network.onnx"
    kinds = written(network, path)
    assert "Resize" in kinds
    assert "DepthToSpace" not in kinds
    made, want = drawn(network, path, torch.randn(2, CHANNELS, 6, 10))
    torch.testing.assert_close(made.double(), want, atol=1e-5, rtol=0)
