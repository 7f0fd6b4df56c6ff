"""A student that reads prompts gives the same pictures on every runtime, the text encoder among its networks."""

import numpy as np
import pytest

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.models import store
from edgedistill.student import Student
from edgedistill.teacher import Teacher
from export.assemble import export_student

PROMPTS = ["a handwritten three", "the digit seven", "an image of a zero"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.open("captioned_digits")


@pytest.fixture(scope="module")
def bundle(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The guided teacher at 2 steps, which calls every network twice per step."""
    folder = tmp_path_factory.mktemp("reader")
    store.save(teacher.network, folder / "student" / "unet")
    signatures = {"unet": teacher.signature, **teacher.save_parts(folder / "student")[0]}
    table = teacher.table(2, guidance_scale=2.0)
    Student(folder / "student", "reader", table, signatures).write_manifest()
    student = Student.open(folder / "student")
    return export_student(student, folder / "bundle", ["onnx", "openvino", "coreml"])


@pytest.mark.parametrize(
    ("artifact", "worst"),
    [
        ("onnx-float32", 1e-5),
        ("openvino-float32", 1e-5),
        ("coreml-float32", 1e-5),
        ("coreml-float16", 2e-2),
    ],
)
def test_prompts_become_the_same_pictures(
    bundle: Bundle, teacher: Teacher, artifact: str, worst: float
) -> None:
    runtime = bundle.artifacts[artifact].runtime
    pipeline = edgedistill.load(bundle.root, runtime=runtime, artifact=artifact)
    made = pipeline(3, seed=5, encoder_hidden_states=PROMPTS).array
    table = pipeline.table
    expected = teacher.sample(table, 3, seed=5, encoder_hidden_states=PROMPTS)
    assert np.abs(made - expected).max() <= worst
    others = pipeline(3, seed=5, encoder_hidden_states=PROMPTS[::-1]).array
    assert np.abs(made - others)[[0, 2]].max() > 0.5


def test_the_text_encoder_answers_alike_on_every_runtime(bundle: Bundle, teacher: Teacher) -> None:
    tokens = teacher.tokenizer.encode(PROMPTS, 12)
    expected = teacher.embed(PROMPTS)
    for artifact in ("torch-float32", "onnx-float32", "openvino-float32", "coreml-float32"):
        runtime = bundle.artifacts[artifact].runtime
        encoder = edgedistill.load(bundle.root, runtime=runtime, artifact=artifact).networks[
            "text_encoder"
        ]
        made = encoder({"input_ids": tokens})
        for name, value in expected.items():
            np.testing.assert_allclose(made[name], value, atol=1e-4, err_msg=artifact)
