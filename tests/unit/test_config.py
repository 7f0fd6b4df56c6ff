"""Strict settings."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from edgedistill.config import build, override
from edgedistill.errors import ConfigError
from edgedistill.training.recipe import recipe_class


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    size: int = 1
    inner: Inner = field(default_factory=Inner)
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    maybe: Inner | None = None


def test_nested_mappings_become_dataclasses_with_their_types() -> None:
    data = {
        "name": "n",
        "inner": {"rate": 2},
        "pair": [1, 2],
        "many": [3, 4],
        "maybe": {"kind": "b"},
    }
    made = build(Outer, data, "file")
    assert made == Outer("n", 1, Inner(2.0), (1.0, 2.0), (3, 4), Inner(kind="b"))
    assert isinstance(made.inner.rate, float)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert build(Outer, override({"name": "n"}, ["inner.rate=1e-3"]), "file").inner.rate == 1e-3


def test_all_problems_are_named_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"sise": 2, "inner": {"kind": "c", "rate": "fast"}, "pair": [1]}, "my.yaml")
    message = str(caught.value)
    for part in (
        "my.yaml:",
        "`sise` is not a setting (did you mean `size`?)",
        "`name` is missing",
        "`inner.kind` must be one of a, b, got 'c'",
        "`inner.rate` must be a number, got 'fast'",
        "`pair` must hold 2 values",
    ):
        assert part in message


@pytest.mark.parametrize("value", [True, 1.5, "1", None])
def test_a_whole_number_is_nothing_else(value: object) -> None:
    with pytest.raises(ConfigError, match="`size` must be a whole number"):
        build(Outer, {"name": "n", "size": value}, "file")


def test_overrides_leave_the_original_alone_and_need_an_equals_sign() -> None:
    data = {"name": "n", "inner": {"rate": 1.0}}
    assert override(data, ["inner.rate=3", "many=[1, 2]"])["inner"] == {"rate": 3}
    assert data == {"name": "n", "inner": {"rate": 1.0}}
    with pytest.raises(ConfigError, match="write it as key=value"):
        override(data, ["inner.rate"])
    with pytest.raises(ConfigError, match="`name` is a value, not a group"):
        override(data, ["name.x=1"])


@pytest.mark.parametrize(
    "guided",
    [
        {"start_steps": 6, "steps": [3]},
        {"start_steps": 12, "steps": [3, 12]},
        {"start_steps": 6, "steps": [6], "sampler": "stochastic"},
        {"start_steps": 1, "steps": [1]},
    ],
    ids=str,
)
def test_any_number_of_steps_is_halved_as_often_as_it_can_be(guided: dict[str, object]) -> None:
    data = {"name": "n", "teacher": "digits", "data": "digits", "guided": guided}
    assert build(recipe_class("guided"), data, "r.yaml").settings.steps == tuple(guided["steps"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guided": {"steps": [3]}}, "must be halvings of `start_steps` 16"),
        ({"guided": {"steps": [1], "start_steps": 12}}, "which are .12, 6, 3."),
        ({"guided": {"steps": [2], "start_steps": 10}}, "which are .10, 5."),
        ({"guided": {"steps": [3, 1], "start_steps": 6}}, "which are .6, 3."),
        (
            {"guided": {"steps": [2], "start_steps": 6, "sampler": "stochastic"}},
            "twice as many rows where the sampler is stochastic",
        ),
        ({"guided": {"guidance_scale": [0.0, 2.0]}}, "must be \\[low, high\\] with 1 <= low"),
        (
            {"guided": {"sampler": "stochastic", "steps": [4, 2]}},
            "trains one student of an even number",
        ),
        ({"training": {"batch_size": 10, "gradient_accumulation": 3}}, "must be a multiple of"),
        ({"student": {"width": 1.5}}, "`width` must lie in"),
        ({"seed": -1}, "`seed` must not be negative"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(
            recipe_class("guided"),
            {"name": "n", "teacher": "digits", "data": "digits", **change},
            "r.yaml",
        )
