"""Every op of the Core ML evaluator against an independent answer: coremltools' constant folding, or a formula."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ContractError

ct = pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813 its authors' spelling
from coremltools.converters.mil.mil import types  # noqa: E402

from runtimes.mil import MilProgram, plan  # noqa: E402
from runtimes.mil.registry import OPS  # noqa: E402

Arrays = dict[str, Any]

IOS17, IOS18 = ct.target.iOS17, ct.target.iOS18
TYPES = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32, "bool": types.bool}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def uniform(low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(low, high, shape).astype(np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def evaluated(op: str, fed: Arrays, attributes: Arrays, opset: Any = IOS17) -> list[np.ndarray]:
    """Run a program of one op on our evaluator; arrays in `fed` are its inputs."""
    arrays = {
        f"{name}_{i}": array
        for name, value in fed.items()
        for i, array in enumerate(value if isinstance(value, list) else [value])
    }
    specs = [mb.TensorSpec(a.shape, dtype=TYPES[a.dtype.name]) for a in arrays.values()]

    def build(*variables: Any) -> Any:
        given = dict(zip(arrays, variables, strict=True))
        inputs = {
            name: [given[f"{name}_{i}"] for i in range(len(value))]
            if isinstance(value, list)
            else given[f"{name}_0"]
            for name, value in fed.items()
        }
        return getattr(mb, op)(**inputs, **attributes)

    program = mb.program(input_specs=specs, opset_version=opset)(_named(build, list(arrays)))
    ours = MilProgram(program.functions["main"], "iOS17")
    made = ours.run(arrays)
    return [made[port.name] for port in ours.outputs]


def folded(op: str, fed: Arrays, attributes: Arrays, opset: Any = IOS17) -> list[np.ndarray]:
    """Let coremltools work the same op out from constants."""
    found: list[np.ndarray] = []

    def build(unused: Any) -> Any:
        made = getattr(mb, op)(**fed, **attributes)
        found.extend(var.val for var in (made if isinstance(made, list | tuple) else [made]))
        return mb.identity(x=unused)

    mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=opset)(build)
    return found


def _named(build: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """Give a function the parameter names that coremltools reads from its code."""
    scope: dict[str, Any] = {"build": build}
    exec(f"def main({', '.join(names)}): return build({', '.join(names)})", scope)
    return scope["main"]


def check(got: list[np.ndarray], wanted: list[Any], tolerance: float = 2e-6) -> None:
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert theirs is not None, "coremltools did not fold it; give a formula instead"
        assert ours.shape == np.shape(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


X, Y = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=2)
SMALL = uniform(-0.9, 0.9, 3, 4)
POSITIVE = uniform(0.1, 4, 3, 4)
N, J = integers(7, -7, 5, 0), integers(2, 2, 5, 3)
TRUE = np.array([True, True, False, False])
MIXED = np.array([True, False, True, False])

UNARY = [
    *[(op, X) for op in ("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor")],
    *[(op, X) for op in ("relu", "relu6", "round", "sigmoid", "sign", "sin", "sinh", "square")],
    *[(op, X) for op in ("identity", "softplus", "softsign", "tan", "tanh", "gelu", "softmax")],
    *[(op, SMALL) for op in ("acos", "asin", "atanh")],
    *[(op, POSITIVE) for op in ("inverse", "log", "rsqrt", "sqrt")],
    ("logical_not", MIXED),
]
REDUCTIONS = [
    "reduce_l1_norm",
    "reduce_l2_norm",
    "reduce_log_sum",
    "reduce_log_sum_exp",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_prod",
    "reduce_sum",
    "reduce_sum_square",
]
FOLDED: list[tuple[str, Arrays, Arrays]] = [
    *[(op, {"x": x}, {}) for op, x in UNARY],
    *[(op, {"x": X, "y": Y}, {}) for op in ("add", "sub", "mul", "real_div", "maximum", "minimum")],
    *[
        (op, {"x": N, "y": J}, {})
        for op in ("add", "mul", "floor_div", "mod", "equal", "not_equal")
    ],
    *[(op, {"x": N, "y": J}, {}) for op in ("greater", "greater_equal", "less", "less_equal")],
    *[(f"logical_{op}", {"x": TRUE, "y": MIXED}, {}) for op in ("and", "or", "xor")],
    ("pow", {"x": POSITIVE, "y": SMALL}, {}),
    ("select", {"cond": MIXED, "a": N, "b": J}, {}),
    ("cast", {"x": X * 9}, {"dtype": "int32"}),
    ("cast", {"x": N}, {"dtype": "bool"}),
    ("cast", {"x": N}, {"dtype": "fp32"}),
    ("cast", {"x": X}, {"dtype": "fp16"}),
    ("clip", {"x": X}, {"alpha": -0.5, "beta": 0.25}),
    ("elu", {"x": X}, {"alpha": 0.7}),
    ("leaky_relu", {"x": X}, {"alpha": 0.1}),
    ("gelu", {"x": X}, {"mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": X}, {"mode": "SIGMOID_APPROXIMATION"}),
    ("log", {"x": POSITIVE}, {"epsilon": 0.5}),
    ("rsqrt", {"x": POSITIVE}, {"epsilon": 0.5}),
    ("inverse", {"x": POSITIVE}, {"epsilon": 0.5}),
    ("softmax", {"x": X}, {"axis": 1}),
    *[(op, {"x": POSITIVE}, {"axes": [-1], "keep_dims": True}) for op in REDUCTIONS],
    *[(op, {"x": POSITIVE}, {"axes": [0, 1], "keep_dims": False}) for op in REDUCTIONS],
    ("reduce_argmax", {"x": X}, {"axis": 1, "keep_dims": False}),
    ("reduce_argmin", {"x": X}, {"axis": -1, "keep_dims": True}),
    ("cumsum", {"x": X}, {"axis": 2, "exclusive": False, "reverse": True}),
    ("reshape", {"x": X}, {"shape": [6, -1]}),
    ("transpose", {"x": X}, {"perm": [0, 2, 3, 1]}),
    ("expand_dims", {"x": X}, {"axes": [-1, 1]}),
    ("squeeze", {"x": X[:, :, :1, :1]}, {"axes": [2, -1]}),
    ("squeeze", {"x": X[:1, :, :1]}, {}),
    ("concat", {"values": [X, Y]}, {"axis": 1}),
    ("stack", {"values": [X, Y]}, {"axis": 2}),
    ("split", {"x": X}, {"num_splits": 2, "axis": -1}),
    ("split", {"x": X}, {"split_sizes": [1, 2], "axis": 1}),
    ("slice_by_index", {"x": X}, {"begin": [0, 1, 0, 1], "end": [2, 3, -1, 2]}),
    (
        "slice_by_index",
        {"x": X},
        {
            "begin": [1, 1, 3, 1],
            "end": [0, 1, 3, 2],
            "stride": [1, 1, 1, 2],
            "begin_mask": [False, True, True, False],
            "end_mask": [True, True, False, True],
            "squeeze_mask": [True, False, False, False],
        },
    ),
    ("slice_by_size", {"x": X}, {"begin": [0, 1, 2, 0], "size": [2, 2, -1, 3]}),
    ("reverse", {"x": X}, {"axes": [1, -1]}),
    ("tile", {"x": X}, {"reps": [1, 2, 1, 3]}),
    ("pad", {"x": X}, {"pad": [0, 0, 1, 2], "mode": "constant", "constant_val": 0.5}),
    ("pad", {"x": X}, {"pad": [1, 2, 2, 1], "mode": "reflect"}),
    ("pad", {"x": X}, {"pad": [0, 0, 0, 0, 1, 0, 2, 1], "mode": "replicate"}),
    ("gather", {"x": X, "indices": integers(2, 0, 1, 1)}, {"axis": 1}),
    ("gather_along_axis", {"x": POSITIVE, "indices": N[None] % 3}, {"axis": 0}),
    ("shape", {"x": X}, {}),
    ("fill", {}, {"shape": [2, 3], "value": 0.25}),
    ("range_1d", {}, {"start": 2, "end": 11, "step": 3}),
    ("linear", {"x": SMALL}, {"weight": normal(5, 4), "bias": normal(5)}),
    ("matmul", {"x": X, "y": Y}, {"transpose_x": True, "transpose_y": False}),
    ("matmul", {"x": X, "y": Y}, {"transpose_x": False, "transpose_y": True}),
    ("layer_norm", {"x": X}, {"axes": [-1], "gamma": normal(4), "beta": normal(4, seed=3)}),
    ("layer_norm", {"x": X}, {"axes": [2, 3], "epsilon": 0.1}),
]


@pytest.mark.parametrize(
    ("op", "fed", "attributes"), FOLDED, ids=[f"{c[0]}-{i}" for i, c in enumerate(FOLDED)]
)
def test_an_op_equals_coremltools_constant_folding(op: str, fed: Arrays, attributes: Arrays):
    check(evaluated(op, fed, attributes), folded(op, fed, attributes))


def test_every_op_of_the_evaluator_has_an_answer_here():
    folded_ops = {case[0] for case in FOLDED}
    unpacking = {name for name in OPS if name.startswith("constexpr_")}  # test_mil_constexpr.py
    assert set(OPS) - unpacking == folded_ops | set(FORMULAS) | TESTED_BELOW


TESTED_BELOW = {
    "conv",
    "batch_norm",
    "instance_norm",
    "max_pool",
    "avg_pool",
    "quantize",
    "dequantize",
    "scaled_dot_product_attention",
}
FORMULAS: dict[str, tuple[Arrays, Arrays, Any]] = {
    "silu": ({"x": X}, {}, X / (1 + np.exp(-X))),
    "concat": (
        {"values": [X, Y]},
        {"axis": -1, "interleave": True},
        np.stack([X, Y], -1).reshape(2, 3, 4, 8),
    ),
    "cumsum": ({"x": X}, {"axis": 3, "exclusive": True}, np.cumsum(X, 3) - X),
    "fill_like": ({"ref_tensor": X}, {"value": 2.5}, np.full_like(X, 2.5)),
    "einsum": (
        {"values": [X, Y.reshape(2, 4, 4, 3)]},
        {"equation": "nchw,nwhu->nchu"},
        np.einsum("nchw,nwhu->nchu", X, Y.reshape(2, 4, 4, 3)),
    ),
    "gather": ({"x": X, "indices": integers(-1, 0)}, {"axis": 2}, X[:, :, [-1, 0]]),
    "gather_nd": ({"x": X, "indices": N.reshape(2, 2) % 2}, {}, X[[1, 1], [1, 0]]),
    "upsample_nearest_neighbor": (
        {"x": X},
        {"scale_factor_height": 2, "scale_factor_width": 3},
        X.repeat(2, 2).repeat(3, 3),
    ),
    "resize_nearest_neighbor": (
        {"x": X},
        {"target_size_height": 8, "target_size_width": 2},
        X.repeat(2, 2)[..., ::2],
    ),
    "pixel_shuffle": (
        {"x": X.reshape(2, 12, 2, 2)},
        {"upscale_factor": 2},
        X.reshape(2, 3, 2, 2, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(2, 3, 4, 4),
    ),
    "pixel_unshuffle": (
        {"x": X},
        {"downscale_factor": np.uint32(2)},
        X.reshape(2, 3, 2, 2, 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 2),
    ),
}


@pytest.mark.parametrize("op", FORMULAS)
def test_an_op_that_coremltools_does_not_fold_equals_its_formula(op: str):
    fed, attributes, wanted = FORMULAS[op]
    check(evaluated(op, fed, attributes), [wanted])


IMAGE, WEIGHT, BIAS = normal(2, 4, 7, 7), normal(6, 4, 3, 3, seed=5), normal(6, seed=6)
GAMMA, BETA = normal(4)[:, None, None], normal(4, seed=3)[:, None, None]


def around(x: np.ndarray, before: int, after: int, value: float = 0.0) -> np.ndarray:
    return np.pad(x, [(0, 0), (0, 0), (before, after), (before, after)], constant_values=value)


def windows(x: np.ndarray, size: int, stride: int, dilation: int = 1) -> np.ndarray:
    """Return (batch, channels, rows, columns, size, size): what a kernel sees at each place."""
    reach = dilation * (size - 1) + 1
    views = np.lib.stride_tricks.sliding_window_view(x, (reach, reach), axis=(2, 3))
    return views[:, :, ::stride, ::stride, ::dilation, ::dilation]


def convolved(x: np.ndarray, weight: np.ndarray, stride: int = 1, dilation: int = 1) -> np.ndarray:
    return np.einsum("nchwij,ocij->nohw", windows(x, weight.shape[2], stride, dilation), weight)


def test_conv_with_uneven_padding_stride_and_bias():
    attributes = {"weight": WEIGHT, "bias": BIAS, "strides": [2, 2]}
    got = evaluated("conv", {"x": IMAGE}, {**attributes, "pad_type": "custom", "pad": [1, 2, 1, 2]})
    check(got, [convolved(around(IMAGE, 1, 2), WEIGHT, 2) + BIAS[:, None, None]], 2e-5)


def test_conv_pads_to_the_same_size_with_the_odd_zero_last_or_first():
    x = IMAGE[:, :, :6, :6]
    for pad_type, before, after in (("same", 0, 1), ("same_lower", 1, 0)):
        attributes = {"weight": WEIGHT, "pad_type": pad_type, "strides": [2, 2]}
        got = evaluated("conv", {"x": x}, attributes)
        check(got, [convolved(around(x, before, after), WEIGHT, 2)], 2e-5)


def test_conv_with_dilation():
    got = evaluated("conv", {"x": IMAGE}, {"weight": WEIGHT, "dilations": [2, 2]})
    check(got, [convolved(IMAGE, WEIGHT, dilation=2)], 2e-5)


def test_conv_in_groups():
    weight = WEIGHT[:, :2]
    got = evaluated("conv", {"x": IMAGE}, {"weight": weight, "groups": 2})
    halves = [convolved(IMAGE[:, :2], weight[:3]), convolved(IMAGE[:, 2:], weight[3:])]
    check(got, [np.concatenate(halves, 1)], 2e-5)


def test_batch_norm():
    mean, variance = GAMMA.ravel(), BETA.ravel() ** 2
    scales = {"gamma": BETA.ravel(), "beta": GAMMA.ravel(), "epsilon": np.float32(0.1)}
    got = evaluated("batch_norm", {"x": IMAGE}, {"mean": mean, "variance": variance, **scales})
    check(got, [(IMAGE - GAMMA) / np.sqrt(BETA**2 + 0.1) * BETA + GAMMA])


def test_instance_norm():
    scales = {"gamma": GAMMA.ravel(), "beta": BETA.ravel(), "epsilon": np.float32(0.01)}
    got = evaluated("instance_norm", {"x": IMAGE}, scales)
    spread = np.sqrt(IMAGE.var((2, 3), keepdims=True) + 0.01)
    check(got, [(IMAGE - IMAGE.mean((2, 3), keepdims=True)) / spread * GAMMA + BETA])


def test_pools_with_and_without_their_padding():
    pool = {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}
    holes, edged = windows(around(IMAGE, 1, 1, np.nan), 2, 2), windows(around(IMAGE, 1, 1), 2, 2)
    check(evaluated("max_pool", {"x": IMAGE}, pool), [np.nanmax(holes, (4, 5))])
    check(evaluated("avg_pool", {"x": IMAGE}, pool), [edged.mean((4, 5))])
    inner = {**pool, "exclude_padding_from_average": True}
    check(evaluated("avg_pool", {"x": IMAGE}, inner), [np.nanmean(holes, (4, 5))])


def test_attention_with_a_mask():
    fed = {name: normal(2, 5, 8, seed=i) for i, name in enumerate(("query", "key", "value"))}
    got = evaluated("scaled_dot_product_attention", fed, {}, IOS18)
    check(got, folded("scaled_dot_product_attention", fed, {}, IOS18))
    mask = normal(2, 5, 5) > 0
    mask[..., 0] = True
    masked = {**fed, "attn_mask": mask}
    logits = fed["query"] @ fed["key"].swapaxes(1, 2) / np.sqrt(8)
    weights = np.where(mask, np.exp(logits), 0)
    wanted = weights / weights.sum(-1, keepdims=True) @ fed["value"]
    check(evaluated("scaled_dot_product_attention", masked, {}, IOS18), [wanted])


@pytest.mark.parametrize("per_axis", [False, True])
def test_quantize_and_dequantize_are_their_formulas(per_axis: bool):
    scale = np.float32([0.05, 0.01, 0.2]) if per_axis else np.float32(0.05)
    zero = np.int8([3, -2, 0]) if per_axis else np.int8(3)
    along = (slice(None), None, None) if per_axis else ()
    axis = {"axis": 1} if per_axis else {}
    levels = np.clip(np.rint(X / scale[along]) + zero[along], -128, 127)

    @mb.program(input_specs=[mb.TensorSpec(X.shape)], opset_version=IOS17)
    def program(x):
        coded = mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype="int8", **axis)
        return mb.dequantize(input=coded, scale=scale, zero_point=zero, **axis)

    seen: dict[str, np.ndarray] = {}
    ours = MilProgram(program.functions["main"], "iOS17")
    made = ours.run({"x": X}, lambda op, _, value: seen.update({op: value.copy()}))
    np.testing.assert_array_equal(seen["quantize"], levels)
    check(list(made.values()), [(levels - zero[along]) * scale[along]])


def test_every_float16_result_is_the_rounded_float32_one():
    x, y = normal(1000).astype(np.float16), normal(1000, seed=1).astype(np.float16)
    (got,) = evaluated("mul", {"x": x, "y": y}, {})
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, (x.astype(np.float32) * y).astype(np.float16))


def test_a_large_constant_stays_as_it_is_stored_and_computes_as_a_small_one(monkeypatch):
    x, weight = normal(2, 6).astype(np.float32), normal(4, 6, seed=1).astype(np.float16)
    fed, constants = {"x": x.astype(np.float16)}, {"weight": weight}
    (small,) = evaluated("linear", fed, constants)
    monkeypatch.setattr(plan, "_LARGE", weight.size)
    kept = plan._tensor(weight, "fp16")
    assert str(kept.dtype) == "torch.float16"
    assert kept.data_ptr() == weight.ctypes.data
    (large,) = evaluated("linear", fed, constants)
    np.testing.assert_array_equal(large, small)


def test_float16_overflows_as_it_would_on_a_device():
    (got,) = evaluated("square", {"x": np.float16([255, 257])}, {})
    np.testing.assert_array_equal(got, [np.float16(65025), np.inf])


def test_an_unknown_op_is_refused_by_name():
    with pytest.raises(ContractError, match=r"op `band_part` \(op set iOS17\); run the package on"):
        evaluated("band_part", {"x": SMALL}, {"lower": 0, "upper": 1})


def test_an_unknown_input_of_a_known_op_is_refused(monkeypatch):
    known = OPS["clip"]
    defaults = {name: known.defaults[name] for name in ("x", "alpha")}
    monkeypatch.setitem(OPS, "clip", type(known)(known.run, defaults, known.tensors))
    with pytest.raises(ContractError, match="does not know the input beta of the op `clip`"):
        evaluated("clip", {"x": X}, {"alpha": 0.0, "beta": 1.0})


def test_slicing_backwards_is_refused():
    attributes = {"begin": [3], "end": [0], "stride": [-1]}
    with pytest.raises(ContractError, match="slices forwards only"):
        evaluated("slice_by_index", {"x": normal(4)}, attributes)
