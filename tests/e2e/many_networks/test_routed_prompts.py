"""Students that a router chooses by prompt: the text encoder, and prompts, tokens and embeddings in."""

import dataclasses

import numpy as np
import pytest

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.errors import ContractError
from edgedistill.probes import load_probes
from edgedistill.router import route
from edgedistill.student import Student
from edgedistill.text import Tokenizer
from export.assemble import export_student
from quantize.assemble import quantize_bundle
from quantize.config import WeightOnlyConfig

pytestmark = pytest.mark.filterwarnings(
    # nncf asks an older module of torch for a name that it moved.
    "ignore:.*:DeprecationWarning:nncf"
)


@pytest.fixture(scope="module")
def prompted(build, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("prompted")
    return export_student(build("worded", folder / "student"), folder / "bundle", ["onnx"])


def test_what_the_router_reads_is_not_rounded(prompted, tmp_path):
    smaller = quantize_bundle(prompted, tmp_path / "smaller", WeightOnlyConfig("int8"))
    before = prompted.artifacts["onnx-float32"].networks["text_encoder"].path
    after = smaller.artifacts["onnx-int8-weights"].networks["text_encoder"].path
    assert smaller.path(after).read_bytes() == prompted.path(before).read_bytes()
    golden = load_probes(prompted.path("probes/golden.safetensors"))["condition.input_ids"]
    chosen = [
        route(
            prompted.table.router,
            edgedistill.load(b, "onnxruntime").networks["text_encoder"]({"input_ids": golden}),
        )
        for b in (prompted, smaller)
    ]
    assert np.array_equal(*chosen)
    assert smaller.size(smaller.artifacts["onnx-int8-weights"]) < prompted.size(
        prompted.artifacts["onnx-float32"]
    )


def test_prompts_tokens_and_embeddings_say_the_same(prompted):
    pipeline = edgedistill.load(prompted, "onnxruntime")
    prompts = ["a handwritten three", "the digit seven", "a small grey nine"]
    by_prompt = pipeline(prompt=prompts).array
    ids = Tokenizer.open(prompted.path("tokenizer.json")).encode(prompts, 12)
    assert np.array_equal(pipeline(encoder_hidden_states=ids).array, by_prompt)
    made = pipeline.networks["text_encoder"]({"input_ids": ids})
    by_embedding = pipeline(**made).array
    assert np.array_equal(by_embedding, by_prompt)
    students = route(prompted.table.router, made)
    for i, prompt in enumerate(prompts):
        assert np.array_equal(pipeline(prompt=prompt, seed=i).array[0], by_prompt[i])
        assert set(pipeline.networks.opened) == {"text_encoder", f"unet.{students[i]}"}
    assert np.abs(pipeline(3, prompt=prompts[0]).array[1] - by_prompt[1]).max() > 0.1


def test_texts_that_do_not_fit_are_refused(prompted):
    pipeline = edgedistill.load(prompted, "onnxruntime")
    with pytest.raises(ContractError, match="Number of samples, seeds, noise and conditions must"):
        pipeline(3, prompt=["one", "two"])
    with pytest.raises(ContractError, match="must be a prompt or 2 of them, tokens or embeddings"):
        pipeline(2, prompt=[1, 2])
    hidden = np.zeros((1, 12, 32), np.float32)
    with pytest.raises(ContractError, match="chosen by `pooled`, which is not given"):
        pipeline(encoder_hidden_states=hidden)


def test_a_student_that_no_example_reaches_is_refused(build, tmp_path):
    student = build("worded", tmp_path / "student")
    router = dataclasses.replace(student.table.router, bias=(1e6,))
    dataclasses.replace(
        student, table=dataclasses.replace(student.table, router=router)
    ).write_manifest()
    with pytest.raises(ContractError, match=r"no example is routed to unet\.0; add texts"):
        export_student(Student.open(student.root), tmp_path / "bundle", [])
