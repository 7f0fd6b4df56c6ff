"""Every op that unpacks compressed weights, against coremltools' own unpacking."""

from typing import Any

import numpy as np
import pytest

ct = pytest.importorskip("coremltools")
from coremltools.converters.mil.mil import Builder as mb  # noqa: E402, N813 its authors' spelling
from coremltools.converters.mil.mil import types  # noqa: E402

from runtimes.mil import MilProgram  # noqa: E402
from runtimes.mil.registry import OPS  # noqa: E402

IOS17, IOS18 = ct.target.iOS17, ct.target.iOS18
NUMBERS = np.random.default_rng(0)


def codes(bits: int, *shape: int) -> np.ndarray:
    kind = types.nptype_from_builtin(getattr(types, f"uint{bits}"))
    return NUMBERS.integers(0, 2**bits, shape).astype(kind)


def normal(*shape: int) -> np.ndarray:
    return NUMBERS.standard_normal(shape).astype(np.float32)


BYTES, LEVELS = NUMBERS.integers(-128, 128, (6, 4)).astype(np.int8), codes(2, 6, 4)
MASK = codes(1, 6, 4)
KEPT = int(MASK.sum())
SCALES, OFFSETS = normal(3, 2), NUMBERS.integers(-9, 9, (3, 2)).astype(np.int8)
TABLES, VECTORS = normal(2, 1, 4, 1), normal(1, 1, 4, 3)
SPARSE_LEVELS = {"indices_mask": MASK, "indices_nonzero_data": codes(2, KEPT)}
SPARSE_BYTES = {"data_mask": MASK, "nonzero_data": BYTES.ravel()[:KEPT]}


def packed(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint8)


CASES: list[tuple[str, dict[str, Any], Any]] = [
    (
        "affine_dequantize",
        {"quantized_data": BYTES, "zero_point": np.int8(5), "scale": np.float32(0.1), "axis": 0},
        IOS17,
    ),
    (
        "affine_dequantize",
        {"quantized_data": BYTES, "zero_point": BYTES[0], "scale": normal(4), "axis": 1},
        IOS17,
    ),
    ("cast", {"source_val": normal(3, 4).astype(np.float16), "output_dtype": "fp32"}, IOS17),
    (
        "lut_to_dense",
        {"indices": packed(0xE4, 0x1B, 0x02), "lut": normal(4), "shape": np.uint32([3, 3])},
        IOS17,
    ),
    (
        "lut_to_dense",
        {"indices": packed(17, 200, 3), "lut": normal(64), "shape": np.uint32([2, 2])},
        IOS17,
    ),
    (
        "sparse_to_dense",
        {"nonzero_data": normal(5), "mask": packed(0xB1, 0x01), "shape": np.uint32([3, 3])},
        IOS17,
    ),
    ("blockwise_shift_scale", {"data": BYTES, "scale": SCALES}, IOS18),
    ("blockwise_shift_scale", {"data": BYTES, "scale": SCALES, "offset": OFFSETS}, IOS18),
    ("lut_to_dense", {"indices": LEVELS, "lut": TABLES}, IOS18),
    ("lut_to_dense", {"indices": LEVELS, "lut": VECTORS, "vector_axis": 0}, IOS18),
    ("lut_to_dense", {"indices": LEVELS, "lut": VECTORS, "vector_axis": -1}, IOS18),
    ("sparse_to_dense", {"nonzero_data": normal(KEPT), "mask": MASK}, IOS18),
    ("lut_to_sparse", {**SPARSE_LEVELS, "lut": TABLES}, IOS18),
    ("lut_to_sparse", {**SPARSE_LEVELS, "lut": VECTORS, "vector_axis": 1}, IOS18),
    (
        "sparse_blockwise_shift_scale",
        {**SPARSE_BYTES, "scale": SCALES, "offset": OFFSETS},
        IOS18,
    ),
]


@pytest.mark.parametrize(
    ("op", "stored", "opset"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_a_compressed_weight_unpacks_as_coremltools_unpacks_it(
    op: str, stored: dict[str, Any], opset: Any
):
    theirs: list[np.ndarray] = []

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=opset)
    def program(unused):  # noqa: ARG001 a program needs an input
        made = getattr(mb, f"constexpr_{op}")(**stored)
        first = made[0] if isinstance(made, list | tuple) else made
        values = first.op.materialized_val_inference()
        theirs.extend(values if isinstance(values, tuple) else [values])
        return made

    ours = list(MilProgram(program.functions["main"], "").run({"unused": np.zeros(1)}).values())
    assert [a.shape for a in ours] == [a.shape for a in theirs]
    for got, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, wanted.astype(got.dtype), rtol=1e-6)


def test_every_op_that_unpacks_is_tried():
    assert {f"constexpr_{op}" for op, _, _ in CASES} == {n for n in OPS if n[:10] == "constexpr_"}


def test_the_bits_of_packed_indices_are_read_from_the_least_significant_up():
    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=IOS17)
    def program(unused):  # noqa: ARG001 a program needs an input
        return mb.constexpr_lut_to_dense(
            indices=packed(0b01101100, 0b11),
            lut=np.arange(4, dtype=np.float32),
            shape=np.uint32([5]),
        )

    made = MilProgram(program.functions["main"], "").run({"unused": np.zeros(1)})
    np.testing.assert_array_equal(next(iter(made.values())), [0, 3, 2, 1, 3])


def test_a_table_of_quantized_values_unpacks_through_both_ops():
    table = np.arange(4, dtype=np.int8).reshape(1, 1, 4, 1)

    @mb.program(input_specs=[mb.TensorSpec(LEVELS.shape)], opset_version=IOS18)
    def program(x):
        scale = np.full((1, 1, 1, 1), 0.5, np.float32)
        lut = mb.constexpr_blockwise_shift_scale(data=table, scale=scale)
        return mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=LEVELS, lut=lut))

    made = MilProgram(program.functions["main"], "").run({"x": np.zeros(LEVELS.shape)})
    np.testing.assert_array_equal(next(iter(made.values())), LEVELS * 0.5)
