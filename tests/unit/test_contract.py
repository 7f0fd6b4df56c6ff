"""Signatures: what they refuse and what they keep."""

import numpy as np
import pytest

from edgedistill.contract import BATCH, LENGTH, Signature, TensorSpec
from edgedistill.errors import ContractError

SAMPLE = TensorSpec("sample", (BATCH, 1, 8, 8), "float32", "x")
TIME = TensorSpec("timestep", (BATCH,), "float32", "t")
SIGNATURE = Signature((SAMPLE, TIME), (TensorSpec("out", (BATCH, 1, 8, 8), "float32", "raw"),))


def feeds(batch: int = 2, times: int = 2) -> dict[str, np.ndarray]:
    return {"sample": np.zeros((batch, 1, 8, 8)), "timestep": np.zeros(times)}


def test_json_brings_back_the_same() -> None:
    assert Signature.from_json(SIGNATURE.to_json()) == SIGNATURE
    assert Signature.from_json(SIGNATURE.with_batch(3).to_json()).batch == 3
    assert SIGNATURE.batch is None


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((0, 1, 8, 8), "float32", "at least 1, got"), ((1,), "float64", "must be one of float16")],
)
def test_specs_that_cannot_be_are_refused(shape: tuple[int, ...], dtype: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        TensorSpec("sample", shape, dtype, "x")


def test_a_free_size_must_be_the_same_everywhere() -> None:
    SIGNATURE.check(feeds(2, 2))
    with pytest.raises(ContractError, match="Input `timestep` must have shape 2, got 3"):
        SIGNATURE.check(feeds(2, 3))
    with pytest.raises(ContractError, match="Input `sample` must have shape 1x1x8x8, got 2x1x8x8"):
        SIGNATURE.with_batch(1).check(feeds(2, 1))


def test_names_that_are_missing_or_unknown_are_listed() -> None:
    with pytest.raises(ContractError, match="Inputs 'timestep' are missing.*sample, timestep"):
        SIGNATURE.check({"sample": feeds()["sample"]})
    with pytest.raises(ContractError, match="Inputs 'guidance' are unknown"):
        SIGNATURE.check({**feeds(), "guidance": np.zeros(2)})


def test_free_sizes_are_bound_by_name_on_both_sides() -> None:
    text = TensorSpec("text", (BATCH, LENGTH, 4), "float32", "text")
    bound = Signature((SAMPLE, text), (text,)).bind(length=7)
    assert [spec.shape for spec in bound.inputs] == [(BATCH, 1, 8, 8), (BATCH, 7, 4)]
    assert bound.outputs[0].shape == (BATCH, 7, 4)
    assert bound.bind(length=9) == bound


def test_a_name_in_the_graph_survives_json_and_every_change() -> None:
    spec = TensorSpec("w", (BATCH, LENGTH), "float32", "w", "timestep_cond")
    scalar = TensorSpec("timestep", (), "float32", "t")
    signature = Signature((spec, scalar), ())
    assert Signature.from_json(signature.to_json()) == signature
    assert "graph" not in scalar.to_json()
    bound = signature.with_batch(2).bind(length=7)
    assert [item.graph_name for item in bound.inputs] == ["timestep_cond", "timestep"]
    assert [item.shape for item in bound.inputs] == [(2, 7), ()]
