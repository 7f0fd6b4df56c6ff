"""Every sample has exactly one student, the same everywhere; nobody else's student touches it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import ConfigError, ContractError
from edgedistill.router import Router, route
from edgedistill.sampler import run_table
from edgedistill.table import Condition, Guidance, Next, Row, SamplerTable, Stage

CLASSES = Router("class_table", "class_labels", 3, table=(0, 2, 1, 1, 0, 2))
PLANES = Router("sign_planes", "pooled", 4, planes=((1.0, -1.0), (0.5, 2.0)), bias=(0.0, -1.0))
# pooled, student: bit 0 is x - y >= 0, bit 1 is x/2 + 2y - 1 >= 0; zero, of either sign, counts as above.
GOLDEN = [
    ((0.0, 0.0), 1),
    ((-0.0, 0.0), 1),
    ((1.0, 1.0), 3),
    ((2.0, 0.0), 3),
    ((0.0, 0.5), 2),
    ((0.4, 0.4), 3),
    ((0.0, 0.49999997), 0),
    ((0.0, 0.25), 0),
    ((-2.0, 1.0), 2),
    ((-2.0000002, 1.0), 0),
    ((3.0, -4.0), 1),
    ((1e-30, 0.0), 1),
    ((-1e-30, 0.0), 0),
]
SHAPE = (1, 2, 2)
ROWS = tuple(
    Row(("unet",), {"timestep": t}, guidance_scale=2.0, next=Next(z=0.5, raw=0.5))
    for t in (900.0, 400.0)
)
TABLE = SamplerTable(
    (Stage(SHAPE, ROWS),),
    1,
    guidance=Guidance("cfg", None, 2.0, (1.0, 4.0), {"class_labels": 6}),
    conditions=(Condition("class_labels", "class", 6),),
    router=CLASSES,
)


def student(number: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def call(feeds: Mapping[str, Any]) -> dict[str, Any]:
        shift = feeds["class_labels"].reshape(-1, 1, 1, 1) / 8
        z = feeds["sample"]
        return {"out_sample": z * (feeds["timestep"] / 1024) + (number + 1) * z * z + shift}

    return call


STUDENTS = {f"unet.{number}": student(number) for number in range(3)}
LABELS = np.array([5, 0, 3, 3, 1, 2, 4])
NOISE = np.random.default_rng(0).standard_normal((7, *SHAPE)).astype(np.float32)


def test_golden_vectors() -> None:
    pooled = np.array([point for point, _ in GOLDEN], np.float32)
    assert route(PLANES, {"pooled": pooled}).tolist() == [student for _, student in GOLDEN]
    assert route(PLANES, {"pooled": torch.from_numpy(pooled)}).tolist() == [k for _, k in GOLDEN]
    labels = np.arange(6)
    assert route(CLASSES, {"class_labels": labels}).tolist() == [0, 2, 1, 1, 0, 2]
    assert route(CLASSES, {"class_labels": torch.from_numpy(labels)}).tolist() == [0, 2, 1, 1, 0, 2]


finite = st.floats(-1e6, 1e6, width=32)


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=9))
def test_any_embedding_has_one_student_whatever_its_neighbours(points: list[Any]) -> None:
    pooled = np.array(points, np.float32)
    together = route(PLANES, {"pooled": pooled})
    assert ((together >= 0) & (together < 4)).all()
    alone = [route(PLANES, {"pooled": pooled[i : i + 1]})[0] for i in range(len(pooled))]
    assert together.tolist() == alone


def test_the_table_names_every_student() -> None:
    assert TABLE.networks == ("unet.0", "unet.1", "unet.2")
    assert TABLE.nfe == 4
    assert SamplerTable.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_routed_batch_is_each_sample_alone_through_its_student(library: str) -> None:
    convert = {"numpy": np.asarray, "torch": torch.as_tensor}[library]
    plain = dataclasses.replace(TABLE, router=None)
    given = {"class_labels": convert(LABELS)}
    got = run_table(TABLE, STUDENTS, [convert(NOISE)], given)
    for i, label in enumerate(LABELS):
        network = STUDENTS[f"unet.{CLASSES.table[label]}"]
        one = {"class_labels": convert(LABELS[i : i + 1])}
        alone = run_table(plain, {"unet": network}, [convert(NOISE[i : i + 1])], one)
        assert np.array_equal(np.asarray(got[i]), np.asarray(alone[0]))


def test_a_broken_student_breaks_its_own_samples_alone() -> None:
    given = {"class_labels": LABELS}
    before = run_table(TABLE, STUDENTS, [NOISE], given)
    broken = {**STUDENTS, "unet.1": lambda feeds: {"out_sample": feeds["sample"] * 0 + 9}}
    after = run_table(TABLE, broken, [NOISE], given)
    mine = np.isin(LABELS, [2, 3])
    assert np.array_equal(after[~mine], before[~mine])
    assert (np.abs(after[mine] - before[mine]).max((1, 2, 3)) > 1).all()


def test_students_that_nobody_needs_may_be_missing() -> None:
    given = {"class_labels": np.array([0, 4])}
    only = {"unet.0": STUDENTS["unet.0"]}
    got = run_table(TABLE, only, [NOISE[:2]], given)
    assert np.array_equal(got, run_table(TABLE, STUDENTS, [NOISE[:2]], given))
    with pytest.raises(ContractError, match=r"a network that is not there: unet\.1"):
        run_table(TABLE, only, [NOISE[:1]], {"class_labels": np.array([2])})


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (dataclasses.replace(CLASSES, table=(0, 1, 1, 1, 0, 1)), "must name each of 3 students"),
        (dataclasses.replace(CLASSES, table=(0, 2, 1, 1, 0, 3)), "must name each of 3 students"),
        (dataclasses.replace(CLASSES, table=(0, 2, 1, 1, -1, 0)), "must name each of 3 students"),
        (dataclasses.replace(CLASSES, students=10**30), "must name each of"),
        (dataclasses.replace(CLASSES, table=(0, 2, 1)), "a student for each class of a condition"),
        (dataclasses.replace(CLASSES, on="labels"), "a student for each class of a condition"),
        (
            dataclasses.replace(CLASSES, network="net"),
            "the router is for `net`, which no row calls",
        ),
        (dataclasses.replace(CLASSES, kind="kmeans"), "must be class_table or sign_planes"),
        (PLANES, "takes `pooled` of a text, and there is no condition of that kind"),
        (dataclasses.replace(PLANES, students=3), "2 planes need as many biases and part 4"),
        (dataclasses.replace(PLANES, bias=(0.0,)), "2 planes need as many biases and part 4"),
        (dataclasses.replace(PLANES, bias=(0.0, float("nan"))), "biases must be finite"),
        (dataclasses.replace(PLANES, planes=((1.0,), (1.0, 2.0))), "all of one size"),
        (dataclasses.replace(PLANES, table=(0,)), "and come without a table"),
    ],
)
def test_routers_that_are_no_partition_are_refused(router: Router, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TABLE, router=router)


def test_one_student_needs_no_plane() -> None:
    alone = Router("sign_planes", "pooled", 1)
    assert list(alone.problems()) == []
    assert route(alone, {"pooled": np.ones((3, 2))}).tolist() == [0, 0, 0]


def test_what_cannot_be_routed_is_refused() -> None:
    with pytest.raises(ContractError, match="chosen by `pooled`, which is not given"):
        route(PLANES, {})
    with pytest.raises(ContractError, match=r"must have shape \(batch, 2\), got \(3, 5\)"):
        route(PLANES, {"pooled": np.zeros((3, 5))})
    with pytest.raises(ContractError, match="one class from 0 to 5 per sample"):
        route(CLASSES, {"class_labels": np.array([6])})
