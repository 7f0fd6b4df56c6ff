"""A session behind its signature: dtypes, repeated scalars, batches in pieces, refusals."""

from pathlib import Path

import numpy as np
import pytest

from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError, ContractError
from edgedistill.network import CheckedNetwork, check_graph

SIGNATURE = Signature(
    (
        TensorSpec("sample", ("batch", 1, 2, 2), "float32", "x"),
        TensorSpec("timestep", ("batch",), "float32", "t"),
        TensorSpec("class_labels", ("batch",), "int32", "class"),
    ),
    (TensorSpec("out_sample", ("batch", 1, 2, 2), "float32", "raw"),),
)


class Session:
    """Adds timestep and class to the sample, and remembers what it was fed."""

    def __init__(self):
        self.fed = []

    def __call__(self, feeds):
        self.fed.append(feeds)
        shift = feeds["timestep"] + feeds["class_labels"]
        return {"out_sample": feeds["sample"] + shift[:, None, None, None].astype(np.float32)}


def given(rng, count):
    return {
        "sample": rng.standard_normal((count, 1, 2, 2)),
        "timestep": 5.0,
        "class_labels": np.arange(count),
        "unused": np.zeros((count, 7)),
    }


@pytest.mark.parametrize("size", ["batch", 1, 2, 3, 5, 8])
def test_the_answer_does_not_depend_on_the_graphs_batch(rng, size):
    session = Session()
    feeds = given(rng, 5)
    network = CheckedNetwork("unet", SIGNATURE.with_batch(size), session)
    expected = feeds["sample"].astype(np.float32) + (5 + np.arange(5, dtype=np.float32)).reshape(
        5, 1, 1, 1
    )
    np.testing.assert_array_equal(network(feeds)["out_sample"], expected)
    batches = [len(fed["sample"]) for fed in session.fed]
    assert batches == ([5] if size in ("batch", 5) else [size] * -(-5 // size))


def test_the_session_is_fed_as_the_signature_says(rng):
    session = Session()
    CheckedNetwork("unet", SIGNATURE, session)(given(rng, 3))
    (fed,) = session.fed
    assert {name: (value.dtype.name, value.shape) for name, value in fed.items()} == {
        "sample": ("float32", (3, 1, 2, 2)),
        "timestep": ("float32", (3,)),
        "class_labels": ("int32", (3,)),
    }
    assert all(value.flags.c_contiguous for value in fed.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": np.zeros((3, 1, 4, 4))}, "`sample` must have shape 3x1x2x2, got 3x1x4x4"),
        ({"timestep": np.zeros(2)}, "`timestep` must have shape 3, got 2"),
        ({"class_labels": None}, "'class_labels' are missing"),
    ],
)
def test_what_does_not_fit_is_refused(rng, change, message):
    feeds = {k: v for k, v in {**given(rng, 3), **change}.items() if v is not None}
    with pytest.raises(ContractError, match=message):
        CheckedNetwork("unet", SIGNATURE, Session())(feeds)


@pytest.mark.parametrize("size", ["batch", 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_is_refused(rng, size, bad):
    def broken(feeds):
        return {"out_sample": np.where(feeds["class_labels"].reshape(-1, 1, 1, 1) == 2, bad, 0)}

    with pytest.raises(ContractError, match="`unet` returned NaN or infinity in `out_sample`"):
        CheckedNetwork("unet", SIGNATURE.with_batch(size), broken)(given(rng, 4))


def test_an_answer_under_another_name_is_refused(rng):
    with pytest.raises(ContractError, match="returned no `out_sample`, only: raw"):
        CheckedNetwork("unet", SIGNATURE, lambda feeds: {"raw": feeds["sample"]})(given(rng, 1))


def test_a_graph_with_other_names_is_refused():
    inputs = ["w", "sample", "timestep"]
    with pytest.raises(BundleError, match="inputs are sample, timestep, w, but the manifest says"):
        check_graph(Path("x.onnx"), SIGNATURE, inputs, ["out_sample"])
    with pytest.raises(BundleError, match="outputs are y, but the manifest says out_sample"):
        check_graph(Path("x.onnx"), SIGNATURE, [s.name for s in SIGNATURE.inputs], ["y"])
