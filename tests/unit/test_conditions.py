"""What a caller may give, one by one or for all, and what becomes of it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from edgedistill.conditions import entries, network_conditions
from edgedistill.errors import ContractError
from edgedistill.probes import golden_samples, spread_conditions
from edgedistill.router import Router
from edgedistill.table import Condition, Guidance, Row, SamplerTable, Stage

SHAPE = (1, 4, 4)
TEXT = Condition(
    "encoder_hidden_states",
    "text",
    encoder="text_encoder",
    tokenizer="tokenizer.json",
    length=5,
    examples=("zero", "one", "two"),
)
IMAGE = Condition("image", "image", shape=SHAPE, value_range=(-1.0, 1.0))
MASK = Condition("mask", "mask", shape=SHAPE)
ROW = Row(("unet",), x0=(0.0, 1.0))


def table(*conditions: Condition, **fields) -> SamplerTable:
    return SamplerTable((Stage(SHAPE, (ROW,)),), 1, conditions=conditions, **fields)


def tokenize(prompts: Sequence[str], length: int) -> np.ndarray:
    rows = [[ord(letter) for letter in prompt[:length].ljust(length)] for prompt in prompts]
    return np.array(rows, np.int32)


def words(made: np.ndarray) -> list[str]:
    return ["".join(map(chr, row)).strip() for row in made]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["zero", "one", "two", "zero"]),
        ("nine", ["nine"] * 4),
        (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        (("nine",), ["nine"] * 4),
        (tokenize(["w", "x", "y", "z"], 5), ["w", "x", "y", "z"]),
    ],
)
def test_prompts_become_tokens(given, expected):
    held = {} if given is None else {TEXT.name: given}
    made = network_conditions(table(TEXT), 4, None, held, tokenize)
    assert list(made) == ["input_ids"]
    assert made["input_ids"].dtype == np.int32
    assert words(made["input_ids"]) == expected


def test_the_null_text_goes_along_for_guidance():
    cfg = Guidance("cfg", None, 2.0, (1.0, 4.0), {TEXT.name: "none"})
    row = dataclasses.replace(ROW, guidance_scale=2.0)
    guided = SamplerTable((Stage(SHAPE, (row,)),), 1, guidance=cfg, conditions=(TEXT,))
    made = network_conditions(guided, 2, None, {TEXT.name: "six"}, tokenize)
    assert words(made["input_ids"]) == ["six", "six"]
    assert words(made["null.input_ids"]) == ["none", "none"]


def test_embeddings_are_taken_as_they_are_with_what_the_router_asks_for():
    router = Router("sign_planes", "pooled", 2, planes=((1.0, 0.0),), bias=(0.0,))
    hidden = np.ones((2, 5, 2))
    pooled = np.ones((2, 2))
    held = {TEXT.name: hidden, "pooled": pooled}
    made = network_conditions(table(TEXT, router=router), 2, None, held)
    assert {name: (v.shape, v.dtype) for name, v in made.items()} == {
        "pooled": ((2, 2), np.float32),
        TEXT.name: ((2, 5, 2), np.float32),
    }
    with pytest.raises(ContractError, match="Unknown condition pooled"):
        network_conditions(table(TEXT), 2, None, held)


@pytest.mark.parametrize("value", [-1.0, 0.25, 1.0])
def test_pictures_may_be_arrays_or_images_one_for_all_or_one_each(value):
    grey = round((value + 1) * 127.5)
    picture = Image.fromarray(np.full((4, 4), grey, np.uint8))
    level = np.float32(grey / 127.5 - 1)
    for given in (picture, [picture] * 3, np.full(SHAPE, level), np.full((3, *SHAPE), level)):
        made = network_conditions(table(IMAGE), 3, None, {"image": given})["image"]
        assert made.shape == (3, *SHAPE)
        assert made.dtype == np.float32
        assert np.allclose(made, level, atol=1e-6)
    mask = Image.fromarray(np.eye(4, dtype=np.uint8) * 255)
    made = network_conditions(table(MASK), 1, None, {"mask": mask})["mask"]
    assert np.array_equal(made[0, 0], np.eye(4))
    rgb = dataclasses.replace(IMAGE, shape=(3, 4, 4))
    made = network_conditions(table(rgb), 1, None, {"image": picture.convert("RGB")})["image"]
    assert made.shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("condition", "given", "message"),
    [
        (TEXT, [1, 2], "must be a prompt or 2 of them, tokens or embeddings"),
        (TEXT, ["a", "b", "c"], "must be one text or 2 of them, got 3"),
        (IMAGE, None, "`image` is missing; give images of 1x4x4"),
        (IMAGE, np.zeros((3, *SHAPE)), "`image` must be 2x1x4x4, got 3x1x4x4"),
        (
            IMAGE,
            np.zeros((1, 8, 8)),
            "`image` must be 2x1x4x4, got 1x1x8x8; images are not resized",
        ),
        (IMAGE, np.full(SHAPE, np.nan), r"`image` must lie in \[-1, 1\]"),
        (MASK, np.full(SHAPE, 255), r"`mask` must lie in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(condition, given, message):
    held = {} if given is None else {condition.name: given}
    with pytest.raises(ContractError, match=message):
        network_conditions(table(condition), 2, None, held, tokenize)


def test_prompts_need_a_tokenizer():
    with pytest.raises(ContractError, match="no tokenizer to read prompts with"):
        network_conditions(table(TEXT), 1, None, {TEXT.name: "six"})


@pytest.mark.parametrize(
    ("condition", "value", "count"),
    [
        (TEXT, "six", None),
        (TEXT, ["six", "two"], 2),
        (TEXT, np.zeros((3, 5), np.int32), 3),
        (TEXT, np.zeros((3, 5, 2)), 3),
        (IMAGE, np.zeros(SHAPE), None),
        (IMAGE, np.zeros((2, *SHAPE)), 2),
        (IMAGE, Image.new("L", (4, 4)), None),
        (IMAGE, Image.new("RGB", (4, 4)), None),
        (Condition("class_labels", "class", 10), 3, None),
        (Condition("class_labels", "class", 10), np.array([3, 1]), 2),
    ],
)
def test_values_tell_how_many_samples_they_are_for(condition, value, count):
    assert entries(condition, value) == count


def test_golden_samples_change_each_text_and_picture_alone():
    held = table(TEXT, IMAGE)
    seeds, given = golden_samples(held, None, tokenize)
    assert seeds == [0, 1, 2, 3] * 2
    tokens, images = (
        [(given[name][i] != given[name][i + 4]).any() for i in range(4)]
        for name in ("input_ids", "image")
    )
    assert tokens == [True, False, True, False]
    assert images == [False, True, False, True]
    own = np.linspace(-1, 1, 3 * 16).reshape(3, *SHAPE)
    made = spread_conditions(held, 4, {"image": own}, tokenize)["image"]
    assert np.allclose(made, own[[0, 1, 2, 0]])


def test_golden_samples_meet_every_student():
    students = (0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7)
    router = Router("class_table", "class_labels", 8, table=students)
    routed = table(Condition("class_labels", "class", 12), router=router)
    seeds, given = golden_samples(routed)
    assert len(seeds) == 16
    assert {students[label] for label in given["class_labels"][:8]} == set(range(8))
    assert {students[k] for k in spread_conditions(routed, 32)["class_labels"]} == set(range(8))
