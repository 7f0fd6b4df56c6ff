"""A session behind its signature: dtypes, repeated scalars, batches in pieces, refusals."""

from pathlib import Path

import numpy as np
import pytest

from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError, ContractError
from edgedistill.network import CheckedNetwork, check_graph, guidance_embedding, in_dialect

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


DIALECT = Signature(
    (
        TensorSpec("sample", ("batch", 1, 2, 2), "float32", "x", "x"),
        TensorSpec("timestep", (), "float32", "t"),
        TensorSpec("encoder_hidden_states", ("batch", 3, 1, 5), "float32", "text"),
        TensorSpec("w", ("batch", 8), "float32", "w", "timestep_cond"),
    ),
    (TensorSpec("latent_sample", ("batch", 2, 2, 2), "float32", "moments", "latent_parameters"),),
)


def speak(feeds):
    """Answer with moments whose mean tells sample, timestep, text and guidance apart."""
    assert feeds["timestep"].shape == ()
    text = (feeds["encoder_hidden_states"] * np.arange(5)).sum((1, 2, 3))
    numbers = feeds["timestep"] + text + feeds["timestep_cond"] @ np.arange(8)
    mean = feeds["x"] + numbers[:, None, None, None]
    moments = np.concatenate([mean, np.full_like(mean, np.inf)], axis=1)
    return {"latent_parameters": moments.astype(np.float32)}


@pytest.mark.parametrize("size", ["batch", 1, 2])
def test_a_graph_of_another_dialect_is_spoken_to_in_it(rng, size):
    feeds = {
        "sample": rng.standard_normal((5, 1, 2, 2), dtype=np.float32),
        "timestep": np.array([3, 9, 9, 0.5, 3], np.float32),
        "encoder_hidden_states": rng.standard_normal((5, 5, 3), dtype=np.float32),
        "w": np.arange(5, dtype=np.float32),
    }
    made = CheckedNetwork("unet", DIALECT.with_batch(size), speak)(feeds)["latent_sample"]
    text = (feeds["encoder_hidden_states"] * np.arange(5)[:, None]).sum((1, 2))
    numbers = feeds["timestep"] + text + guidance_embedding(feeds["w"], 8) @ np.arange(8)
    expected = feeds["sample"] + numbers[:, None, None, None]
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_names_in_the_graph_are_those_that_are_checked():
    names = ["x", "timestep", "encoder_hidden_states", "timestep_cond"]
    check_graph(Path("x.onnx"), DIALECT, names, ["latent_parameters"])
    with pytest.raises(BundleError, match="the manifest says latent_parameters"):
        check_graph(Path("x.onnx"), DIALECT, names, ["latent_sample"])


def test_whole_timesteps_and_tokens_as_numbers():
    inputs = (
        TensorSpec("input_ids", ("batch", 2), "float32", "tokens"),
        TensorSpec("timestep", ("batch",), "int64", "t"),
    )
    signature = Signature(inputs, (TensorSpec("out", ("batch", 2), "float32", "raw"),))
    network = CheckedNetwork("unet", signature, lambda _: {"out": np.zeros((2, 2), np.float32)})
    tokens = np.array([[1, 2], [3, 4]])
    fed = in_dialect(signature, network.feeds({"input_ids": tokens, "timestep": 999.0}))
    assert {k: v.dtype.name for k, v in fed.items()} == {
        "input_ids": "float32",
        "timestep": "int64",
    }
    np.testing.assert_array_equal(fed["timestep"], [999, 999])
    with pytest.raises(ContractError, match=r"takes whole timesteps, got \[999.5, 999.5\]"):
        network({"input_ids": tokens, "timestep": 999.5})


def test_one_timestep_for_all_cannot_be_two():
    feeds = {spec.name: np.zeros((2, 1), np.float32) for spec in DIALECT.inputs}
    with pytest.raises(ContractError, match="takes one timestep for all samples"):
        in_dialect(DIALECT, {**feeds, "timestep": np.array([1.0, 2.0])})


@pytest.mark.parametrize("width", [8, 256])
def test_the_guidance_embedding_is_diffusers(width):
    import torch
    from diffusers import LatentConsistencyModelPipeline

    w = np.array([0, 0.5, 7.5, 13], np.float32)
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    theirs = embed(None, torch.from_numpy(w), embedding_dim=width).numpy()
    # Of angles up to 13000 float32 keeps 1e-3.
    np.testing.assert_allclose(guidance_embedding(w, width), theirs, atol=1e-3)
