"""What pictures are controlled by, and how well samplers follow it."""

import numpy as np
import pytest
import torch

from edgedistill.data import load_digits
from edgedistill.data.controls import (
    CHANCES,
    control_conditions,
    control_error,
    controls_of,
    edges,
    hole,
    impose,
)
from edgedistill.data.dataset import Images
from edgedistill.errors import ConfigError
from edgedistill.evaluation.conditional import follow_teacher, measured, trial
from edgedistill.evaluation.report import Evaluator
from edgedistill.models.run import sample_torch
from edgedistill.teacher import Teacher

TASKS = ("super_resolution", "inpainting", "edges")


def pictures(count: int = 40, channels: int = 3, height: int = 8, width: int = 12) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.uniform(-1, 1, (count, channels, height, width)).astype(np.float32)


def chances(count: int = 40) -> np.ndarray:
    return np.random.default_rng(1).random((count, CHANCES), dtype=np.float32)


@pytest.mark.parametrize("task", TASKS)
def test_controls_are_what_their_conditions_say_in_both_libraries(task: str) -> None:
    x, luck = pictures(), chances()
    made = controls_of(task, x, luck)
    conditions = {item.name: item for item in control_conditions(task, x.shape[1:])}
    assert made.keys() == conditions.keys()
    for name, value in made.items():
        low, high = conditions[name].value_range or (0.0, 1.0)
        assert value.shape[1:] == conditions[name].shape
        assert value.dtype == np.float32
        assert low <= value.min() < value.max() <= high
    same = controls_of(task, torch.from_numpy(x), torch.from_numpy(luck))
    assert all(np.allclose(made[name], same[name].numpy(), atol=1e-6) for name in made)
    assert control_error(task, x, made) < 1e-12
    assert control_error(task, x[::-1], made) > 0.01


def test_holes_are_rectangles_of_half_to_three_quarters_anywhere() -> None:
    masks = hole(pictures(2000), chances(2000))
    assert set(np.unique(masks)) == {0.0, 1.0}
    rows, columns = masks.max(axis=3).sum(2)[:, 0], masks.max(axis=2).sum(2)[:, 0]
    assert np.array_equal(masks.sum((1, 2, 3)), rows * columns)
    assert set(rows) == {4, 5, 6}
    assert set(columns) == {6, 7, 8, 9}
    assert np.array_equal(masks.max(axis=(0, 1)), np.ones((8, 12)))


def test_edges_are_slopes() -> None:
    ramp = np.broadcast_to(np.linspace(-1, 1, 12, dtype=np.float32), (1, 2, 8, 12))
    found = edges(ramp)
    assert np.allclose(found[..., 1:-1], 2 / 11)
    assert np.allclose(found[..., [0, -1]], 1 / 11)
    assert edges(ramp * 0 + 0.3).max() < 1e-5


@pytest.mark.parametrize("task", ["super_resolution", "inpainting"])
def test_what_was_told_is_put_back_and_nothing_else_is_changed(task: str) -> None:
    x, other = pictures(), pictures()[::-1]
    made = controls_of(task, x, chances())
    right = impose(task, other, x, made)
    assert control_error(task, right, made) < 1e-12
    assert np.allclose(impose(task, right, x, made), right, atol=1e-6)
    told = controls_of(task, other, chances())
    assert np.allclose(impose(task, right, other, told), other, atol=1e-6)


def test_edges_cannot_be_put_back() -> None:
    with pytest.raises(ConfigError, match="only super-resolution and inpainting are linear"):
        impose("edges", pictures(), pictures(), {})


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    train, test = load_digits("train"), load_digits("test")
    few = Images(test.images[:80], test.labels[:80])
    return Evaluator(train, few)


@pytest.mark.parametrize("task", ["super_resolution", "inpainting"])
def test_a_teacher_that_is_put_right_follows_better_than_one_that_is_not(
    task: str, evaluator: Evaluator
) -> None:
    teacher, given = Teacher.open("digits"), trial(evaluator, task)
    perfect = measured("truth", 0, given.images, given, evaluator)
    assert (perfect.control_error, perfect.error) == pytest.approx((0, 0), abs=1e-12)
    assert perfect.frechet < 1e-6
    table = teacher.table(2)
    free = sample_torch({"unet": teacher.network}, table, 80, class_labels=given.labels)
    alone = measured("alone", 2, free, given, evaluator)
    tried = follow_teacher(teacher, given, evaluator, 2, spacings=("trailing",))
    assert [item.nfe for item in tried] == [2, 2, 2, 2]
    found = min(tried, key=lambda item: item.frechet)
    assert found.control_error < 0.7 * alone.control_error
    assert found.error < 0.8 * alone.error
    assert found.name.startswith("teacher, 2 steps, g=1, trailing")
