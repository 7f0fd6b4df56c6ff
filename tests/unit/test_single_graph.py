"""A sampler as one module: the null text of guidance, with the text encoder inside and outside."""

import pytest
import torch

from edgedistill.contract import Signature, TensorSpec
from edgedistill.sampler import NULL, TOKENS, run_table
from edgedistill.table import Condition, Guidance, Next, Row, SamplerTable, Stage
from export.single_graph import Generator


def spec(name, *shape, dtype="float32", kind="x"):
    return TensorSpec(name, ("batch", *shape), dtype, kind)


class Encoder(torch.nn.Module):
    signature = Signature(
        (spec(TOKENS, 3, dtype="int32", kind="tokens"),),
        (spec("words", 3, 1, kind="text"), spec("pooled", 1, kind="pooled")),
    )

    def forward(self, input_ids):
        words = input_ids.float()[..., None]
        return words, words.sum(1) + 1


class Denoiser(torch.nn.Module):
    signature = Signature(
        (
            spec("sample", 1, 2, 2),
            spec("timestep", kind="t"),
            spec("words", 3, 1, kind="text"),
            spec("pooled", 1, kind="pooled"),
        ),
        (spec("out_sample", 1, 2, 2, kind="raw"),),
    )

    def forward(self, sample, timestep, words, pooled):
        told = words.mean((1, 2)) + 10 * pooled[:, 0] + timestep
        return sample * 0.5 + told[:, None, None, None]


NETWORKS = {"unet": Denoiser(), "text_encoder": Encoder()}
SIGNATURES = {name: network.signature for name, network in NETWORKS.items()}


def table_of(null) -> SamplerTable:
    row = Row(("unet",), {"timestep": 7.0}, guidance_scale=2.0, x0=(0.0, 1.0), next=Next(x0=1.0))
    text = Condition(
        "words",
        "text",
        encoder="text_encoder",
        tokenizer="tokenizer.json",
        length=3,
        examples=("a",),
    )
    guidance = Guidance("cfg", None, 2.0, (2.0, 2.0), {"words": null})
    return SamplerTable((Stage((1, 2, 2), (row,)),), 1, guidance=guidance, conditions=(text,))


def call(name):
    def run(given):
        names = [item.name for item in SIGNATURES[name].inputs]
        inputs = [torch.as_tensor(given[item]) for item in names]
        made = NETWORKS[name](*inputs)
        made = made if isinstance(made, tuple) else (made,)
        return dict(zip((item.name for item in SIGNATURES[name].outputs), made, strict=True))

    return run


@pytest.mark.parametrize("null", ["", 0.0, 3.0])
def test_the_null_text_is_that_of_the_loop(null):
    table = table_of(null)
    noise, ids = torch.ones(2, 1, 2, 2), torch.tensor([[1, 2, 3], [4, 5, 6]])
    nothing = torch.full((1, 3), 9)
    given = {TOKENS: ids}
    if isinstance(null, str):
        given[NULL + TOKENS] = nothing.expand(2, 3)
    wanted = run_table(table, {name: call(name) for name in NETWORKS}, [noise], given)
    options = {"tokenize": lambda *_: nothing.numpy()}
    inside = Generator(table, NETWORKS, SIGNATURES, **options)
    assert torch.equal(inside(noise_0=noise, input_ids=ids), wanted)
    outside = Generator(table, NETWORKS, SIGNATURES, text_inside=False, **options)
    words, pooled = NETWORKS["text_encoder"](ids)
    assert torch.equal(outside(noise_0=noise, words=words, pooled=pooled), wanted)
    assert list(outside.networks) == ["unet"]
