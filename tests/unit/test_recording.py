"""Graphs are recorded without computing them and without reading a weight."""

import onnx
import pytest
import torch
from torch import nn

from edgedistill.contract import Signature, TensorSpec
from export.frozen import Frozen, examples
from export.recording import record
from export.to_onnx import _without_known_warnings, trace_onnx

WIDE = Signature(
    (TensorSpec("sample", (1, 4, 8, 8), "float32", "x"),),
    (TensorSpec("out_sample", (1, 4, 8, 8), "float32", "raw"),),
)


class Block(nn.Module):
    """What networks are made of: convolutions of all kinds, norms, attention, parts that are halved."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.same = nn.Conv2d(16, 16, 3, padding="same")
        self.up = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.linear = nn.Linear(16, 32)
        self.tied = nn.Linear(16, 32)
        self.tied.weight = self.linear.weight
        self.last = nn.Conv2d(16, 4, 1)
        self.register_buffer("scale", torch.rand(16, 1, 1))

    def forward(self, sample):
        state = self.norm(self.down(self.up(self.same(self.first(sample))))) * self.scale
        state += state.clone().mul_(2)
        flat = state.flatten(2).transpose(1, 2)
        gate, value = (self.linear(flat) + self.tied(flat)).chunk(2, dim=-1)
        heads = nn.functional.scaled_dot_product_attention(gate, value, flat)
        return self.last(
            torch.cat([heads, flat], 1).chunk(2, 1)[0].transpose(1, 2).reshape(state.shape)
        )


@pytest.fixture
def frozen():
    torch.manual_seed(0)
    return Frozen(Block().eval().requires_grad_(False), WIDE)


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node if node.op_type != "Identity"]


def test_the_record_is_the_one_that_real_values_give(frozen, tmp_path):
    with _without_known_warnings():
        torch.onnx.export(
            frozen, examples(WIDE), tmp_path / "real.onnx", opset_version=17, dynamo=False
        )
    trace_onnx(frozen, tmp_path / "blank.onnx")
    assert sorted(kinds(tmp_path / "blank.onnx")) == sorted(kinds(tmp_path / "real.onnx"))


def test_nothing_large_is_computed_and_no_weight_is_read(tmp_path):
    """Weights on the meta device have no values, so that reading one would raise."""
    empty = Frozen(Block().eval().requires_grad_(False).to("meta"), WIDE)
    with _without_known_warnings():
        weights = record(empty, tmp_path / "graph.onnx", 17)
    assert all(value.is_meta for value in weights.values())
    assert (tmp_path / "graph.onnx").stat().st_size < 40_000


def test_the_network_is_left_as_it_was(frozen, tmp_path):
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    trace_onnx(frozen, tmp_path / "graph.onnx")
    graph = onnx.load(tmp_path / "graph.onnx").graph
    assert sum(item.dims == [16, 32] for item in graph.initializer) == 1, "tied weights are one"
    after = frozen.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert frozen.network.tied.weight is frozen.network.linear.weight
