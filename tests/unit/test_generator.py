"""The border of a sampler that is one graph."""

import dataclasses

import numpy as np
import pytest

from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import ContractError
from edgedistill.generator import GENERATOR, OUTPUT, generator_signature, run_generator
from edgedistill.table import Blend, Condition, Guidance, Next, Row, SamplerTable, Stage

TEXT = Condition(
    "encoder_hidden_states",
    "text",
    encoder="text_encoder",
    tokenizer="tokenizer.json",
    length=7,
    examples=("a",),
)
PICTURE = Condition("image", "image", shape=(1, 4, 4), value_range=(-1.0, 1.0))
MASK = Condition("mask", "mask", shape=(1, 4, 4))
ROWS = (
    Row(
        ("guide", "unet"), {"timestep": 9.0}, guidance_scale=2.0, next=Next(x0=1, noise=1), noise=1
    ),
    Row(("unet",), {"timestep": 4.0}, guidance_scale=2.0, next=Next(x0=1.0), blend=Blend(1.0)),
)
TABLE = SamplerTable(
    stages=(Stage((1, 4, 4), ROWS),),
    noise_count=2,
    guidance=Guidance("cfg", null={TEXT.name: ""}),
    conditions=(TEXT, PICTURE, MASK),
    decoder="decoder",
)


def spec(name: str, *shape: int, dtype: str = "float32", kind: str = "x") -> TensorSpec:
    return TensorSpec(name, ("batch", *shape), dtype, kind)


SAMPLE, TIME = spec("sample", 1, 4, 4), spec("timestep", kind="t")
EMBEDDED = spec(TEXT.name, 7, 8, kind="text")
HINT, RAW = spec("hint", 1, 4, 4), spec("out_sample", 1, 4, 4, kind="raw")
TOKENS = spec("input_ids", 7, dtype="int32", kind="tokens")
SIGNATURES = {
    "guide": Signature((SAMPLE, TIME, spec("scale", kind="w")), (HINT,)),
    "unet": Signature((SAMPLE, TIME, EMBEDDED), (RAW,)),
    "text_encoder": Signature((TOKENS,), (EMBEDDED, spec("pooled", 8, kind="pooled"))),
    "decoder": Signature((spec("latent_sample", 1, 4, 4),), (spec("picture", 3, 8, 8),)),
}


@pytest.mark.parametrize(
    ("inside", "text"), [(True, "input_ids"), (False, "encoder_hidden_states")]
)
def test_a_graph_takes_what_neither_the_table_nor_a_network_makes(inside, text):
    made = generator_signature(TABLE, SIGNATURES, text_inside=inside)
    names = [item.name for item in made.inputs]
    assert sorted(names) == sorted(["noise_0", "noise_1", "scale", text, "image", "mask"])
    assert names[:2] == ["noise_0", "noise_1"]
    assert made.batch is None
    # ONNX has one name for one tensor, and this graph is given an `image` too.
    output = TensorSpec(OUTPUT, ("batch", 3, 8, 8), "float32", "image", "image_out")
    assert made.outputs == (output,)


def test_several_encoders_read_tokens_of_their_own():
    text = dataclasses.replace(TEXT, further={"second": "other.json"})
    table = dataclasses.replace(TABLE, conditions=(text, PICTURE, MASK))
    signatures = {**SIGNATURES, "second": SIGNATURES["text_encoder"]}
    tokens = generator_signature(table, signatures).input("tokens")
    assert tokens.shape == ("batch", 2, 7)


def test_each_noise_has_the_shape_of_its_stage():
    small = Stage((1, 2, 2), (Row((), next=Next(z=1.0)),))
    large = Stage(
        (1, 4, 4), (Row((), next=Next(z=1.0)),), (1.0, 1), carry="up_nearest", carry_noise=(0.5, 2)
    )
    table = SamplerTable((small, large), 3)
    made = generator_signature(table, {})
    assert [item.shape[1:] for item in made.inputs] == [(1, 2, 2), (1, 4, 4), (1, 4, 4)]
    assert made.outputs[0].shape == ("batch", 1, 4, 4)
    assert made.outputs[0].graph_name == OUTPUT


def test_the_text_is_read_outside_only_where_its_encoder_is_there():
    fed = []

    def generator(given):
        fed.append(given)
        return {OUTPUT: given["noise_0"]}

    def encoder(given):
        return {TEXT.name: given["input_ids"] + 1}

    noise = [np.zeros((2, 1, 4, 4), np.float32)] * 2
    ids = np.ones((2, 7), np.int32)
    given = {"input_ids": ids, "null.input_ids": ids}
    run_generator(TABLE, {GENERATOR: generator}, noise, given)
    assert set(fed[0]) == {"noise_0", "noise_1", "input_ids"}
    run_generator(TABLE, {GENERATOR: generator, "text_encoder": encoder}, noise, given)
    assert set(fed[1]) == {"noise_0", "noise_1", "input_ids", TEXT.name}
    assert np.array_equal(fed[1][TEXT.name], ids + 1)
    with pytest.raises(ContractError, match="a noise bank of 2 arrays, got 1"):
        run_generator(TABLE, {GENERATOR: generator}, noise[:1], given)
