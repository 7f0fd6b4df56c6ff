"""The pass that makes Core ML programs float16: as coremltools' own, without its memory."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")
from coremltools import PassPipeline  # noqa: E402
from coremltools.converters.mil.mil.passes.defs.quantization import add_fp16_cast  # noqa: E402

from edgedistill.contract import Signature, TensorSpec  # noqa: E402
from edgedistill.mlpackage import quiet_coremltools  # noqa: E402
from export import coreml_float16  # noqa: E402
from export.frozen import Frozen  # noqa: E402
from export.recording import trace  # noqa: E402
from export.to_coreml import convert_coreml  # noqa: E402
from runtimes.mil import MilProgram  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",  # coremltools converts TorchScript
    "ignore:Conversion of an array:DeprecationWarning",  # apple/coremltools#2633
    "ignore:Implicitly cleaning up:ResourceWarning",
)
SIGNATURE = Signature(
    (TensorSpec("x", (2, 8), "float32", "x"),), (TensorSpec("raw", (2, 8), "float32", "raw"),)
)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        self.last.weight.data[0, 0] = 1e-9  # float16 makes it nothing

    def forward(self, x):
        frequencies = torch.exp(torch.arange(8) * -0.1)
        return self.last(torch.relu(self.first(x))) + torch.sin(100 * x * frequencies)


def frozen():
    torch.manual_seed(0)
    return Frozen(Layers().requires_grad_(requires_grad=False), SIGNATURE)


def answer(target, package):
    with quiet_coremltools() as coremltools:
        convert_coreml(coremltools, target, "float16", "iOS17", consume=True).save(str(package))
    x = np.linspace(-3, 3, 16, dtype=np.float32).reshape(2, 8)
    return MilProgram.load(package).run({"x": x})["raw"]


@pytest.mark.parametrize(
    "values",
    [
        (0.5, -65504.0),
        (65519.0,),
        (-65536.0, 1.0),
        (np.inf, -np.inf),
        (np.inf, 7e4),
        (1e38, -3e38),
        (np.nan, 1.0),
        (np.nan, 1e6),
        (),
    ],
)
def test_overflow_is_what_coremltools_takes_for_it(values):
    value = np.array(values, np.float32)
    var = SimpleNamespace(is_tensor_or_scalar_of=lambda dtype: dtype == "fp32", val=value)
    var.op = SimpleNamespace(op_type="const", val=var)
    operation = SimpleNamespace(inputs={"x": [var]})
    with np.errstate(invalid="ignore"):
        theirs = add_fp16_cast.fp16_overflow(operation)
        assert coreml_float16.halve.fp16_overflow(operation) == theirs


def test_weights_that_are_put_aside_are_the_same(tmp_path, monkeypatch):
    kept = answer(frozen(), tmp_path / "kept.mlpackage")
    monkeypatch.setattr(coreml_float16, "_LARGE", 100)
    places = []
    aside = coreml_float16.halve._aside
    monkeypatch.setattr(
        coreml_float16.halve, "_aside", lambda self, v: places.append(v.shape) or aside(self, v)
    )
    assert np.array_equal(answer(frozen(), tmp_path / "aside.mlpackage"), kept)
    assert sorted(places) == [(8, 32), (32, 8)]


def test_the_pipeline_keeps_every_other_pass_in_its_order():
    stock = PassPipeline.DEFAULT.passes
    ours = coreml_float16.passes(stock)
    assert [name for name in ours if not name.startswith("edgedistill::")] == [
        name for name in stock if name != "common::add_fp16_cast"
    ]
    assert ours.index("edgedistill::halve") == stock.index("common::add_fp16_cast")
    before = ours[ours.index("edgedistill::give_back") - 1]
    assert before == "common::dead_code_elimination"


def test_a_trace_holds_the_tensors_of_the_network_and_folds_what_hangs_on_none():
    target = frozen()
    traced = trace(target)
    theirs = {name: value.data_ptr() for name, value in target.named_parameters()}
    assert {name: value.data_ptr() for name, value in traced.named_parameters()} == theirs
    kinds = {node.kind() for node in traced.forward.graph.nodes()}
    assert "aten::sin" in kinds
    assert not {"aten::exp", "aten::arange"} & kinds
    x = torch.ones(2, 8)
    assert torch.equal(traced(x), target(x))
