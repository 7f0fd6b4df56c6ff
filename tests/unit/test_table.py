"""The table as data: JSON both ways, versions, what is malformed, what cannot be run."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import BundleError, ConfigError
from edgedistill.router import Router
from edgedistill.table import Blend, Condition, Guidance, Next, Row, SamplerTable, Stage

CALL = Row(("unet",), {"timestep": 999.0}, x0=(1.5, -1.0), next=Next(z=0.1, x0=0.9))
NOISY = dataclasses.replace(CALL, next=Next(x0=0.9, noise=0.3), noise=1)
TABLE = SamplerTable(
    stages=(
        Stage((1, 4, 4), (NOISY, dataclasses.replace(CALL, next=Next(x0=1.0, previous=(-0.2,))))),
        Stage(
            (1, 8, 8),
            (
                dataclasses.replace(
                    CALL,
                    clip=(-1.0, 1.0),
                    blend=Blend(0.9, 0.4, 4),
                    note={"kind": "ddim", "t": 9, "s": -1},
                ),
            ),
            init_noise=(0.7, 2),
            init_image=(0.3, "image"),
            carry="up_nearest",
            carry_scale=0.5,
            carry_to="small",
            carry_noise=(0.1, 3),
        ),
    ),
    noise_count=5,
    guidance=Guidance("embedded", "w", 2.0, (1.0, 4.0)),
    conditions=(
        Condition("class_labels", "class", 4),
        Condition("image", "image", shape=(1, 8, 8), value_range=(-1.0, 1.0)),
        Condition("mask", "mask", shape=(1, 8, 8)),
        Condition(
            "encoder_hidden_states",
            "text",
            encoder="text_encoder",
            tokenizer="tokenizer.json",
            length=8,
            examples=("a four",),
        ),
    ),
    router=Router("class_table", "class_labels", 2, table=(0, 0, 1, 1)),
    clamp=(-1.0, 1.0),
    annotations={"method": "test", "scheduler": {"beta_schedule": "linear"}},
)


def changed(
    table: SamplerTable = TABLE, stage: int = 0, row: int = 0, **values: Any
) -> SamplerTable:
    """Replace fields of one row."""
    rows = list(table.stages[stage].rows)
    rows[row] = dataclasses.replace(rows[row], **values)
    stages = list(table.stages)
    stages[stage] = dataclasses.replace(stages[stage], rows=tuple(rows))
    return dataclasses.replace(table, stages=tuple(stages))


finite = st.floats(allow_nan=False, allow_infinity=False)
nonzero = finite.filter(lambda value: value != 0)


@st.composite
def tables(draw: Any) -> SamplerTable:
    """Draw tables with any finite coefficients, one noise per row that wants one."""
    rows: list[Row] = []
    count = 1
    for position in range(draw(st.integers(1, 4))):
        noisy = draw(st.booleans())
        previous = tuple(draw(st.lists(finite, max_size=position)))
        coefficients = {name: draw(finite) for name in ("z", "x0", "raw")}
        noise = draw(nonzero) if noisy else 0.0
        rows.append(
            Row(
                call=("unet",),
                feeds={"timestep": draw(finite)},
                in_scale=draw(finite),
                x0=(draw(finite), draw(finite)),
                next=Next(**coefficients, noise=noise, previous=previous),
                noise=count if noisy else None,
                note={"kind": draw(st.text(max_size=5)), "t": draw(st.integers())},
            )
        )
        count += noisy
    return SamplerTable((Stage((1, 2, 2), tuple(rows), (draw(finite), 0)),), count)


@settings(derandomize=True, max_examples=50)
@given(tables())
def test_json_gives_back_every_bit(table: SamplerTable) -> None:
    assert SamplerTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "sampler.json")
    assert SamplerTable.load(tmp_path / "sampler.json") == TABLE


def test_counts() -> None:
    assert TABLE.nfe == 3
    assert len(TABLE.rows) == 3
    assert TABLE.networks == ("unet.0", "unet.1", "text_encoder")
    assert TABLE.effective_nfe == 2 / 4 + 1
    assert TABLE.stages[1].noises == (2, 3, 4)
    guided = Guidance("cfg", None, 2.0, (1.0, 4.0), {"class_labels": 10})
    conditions = (Condition("class_labels", "class", 10),)
    rows = (
        Row((), next=Next(z=1.0)),
        Row(("guide", "unet"), guidance_scale=2.0, next=Next(x0=1.0)),
    )
    table = SamplerTable((Stage((1, 2, 2), rows),), 1, guidance=guided, conditions=conditions)
    assert table.nfe == 2
    assert table.networks == ("guide", "unet")


def test_a_table_of_the_first_release_is_read() -> None:
    plain = dataclasses.replace(
        TABLE, stages=TABLE.stages[:1], noise_count=2, conditions=TABLE.conditions[:1], router=None
    )
    data = plain.to_json()
    del data["router"]
    for name in ("init_image", "carry_to", "carry_noise"):
        del data["stages"][0][name]
    for row in data["stages"][0]["rows"]:
        del row["blend"]
    data["conditions"] = [{"name": "class_labels", "kind": "class", "size": 4}]
    assert SamplerTable.from_json({**data, "spec_version": "1.0"}) == plain


@pytest.mark.parametrize("version", ["1.0", "1.7", "1"])
def test_versions_of_the_same_major_are_read(version: str) -> None:
    assert SamplerTable.from_json({**TABLE.to_json(), "spec_version": version}) == TABLE


@pytest.mark.parametrize("version", ["2.0", "10.1"])
def test_a_newer_major_version_is_refused(version: str) -> None:
    with pytest.raises(
        BundleError, match=rf"a\.json: version {version} is newer than 1\.2.* upgrade"
    ):
        SamplerTable.from_json({**TABLE.to_json(), "spec_version": version}, "a.json")


@pytest.mark.parametrize("version", [None, "", "new", [1], {}, "x" * 9999, "1" * 9999])
def test_a_malformed_version_is_refused(version: Any) -> None:
    with pytest.raises(BundleError, match=r"version (must look like '1\.2'|1+ is newer)"):
        SamplerTable.from_json({**TABLE.to_json(), "spec_version": version})


def test_a_wrong_count_of_calls_is_refused() -> None:
    with pytest.raises(BundleError, match="`nfe` says 4, but the rows make 3 calls"):
        SamplerTable.from_json({**TABLE.to_json(), "nfe": 4})


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in JSON data."""
    yield path
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def with_value(path: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(TABLE.to_json())
    if not path:
        return value
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


def refusal(data: Any) -> str:
    """Return why data is refused; empty where it makes a table that can be written again."""
    try:
        SamplerTable.from_json(data, "sampler.json").to_json()
    except BundleError as error:
        return str(error)
    return ""


STRANGE = [None, True, -1, 10**400, 2.5, float("nan"), float("inf"), "text", [], [[]], {}, {"x": 1}]
PLACES = list(places(TABLE.to_json()))


def test_strange_values_anywhere_are_refused_or_make_a_table_that_can_be_written() -> None:
    refused = [
        problem
        for path in PLACES
        for value in STRANGE
        if (problem := refusal(with_value(path, value)))
    ]
    assert all(problem.startswith("sampler.json: ") for problem in refused)
    assert len(refused) > 0.6 * len(PLACES) * len(STRANGE)


def test_a_field_too_few_or_too_many_is_refused() -> None:
    numbers = {"feeds", "note", "annotations", "space", "scheduler", "null"}
    for path in PLACES:
        value = TABLE.to_json()
        for key in path:
            value = value[key]
        if isinstance(value, dict) and not numbers & set(path):
            with pytest.raises(BundleError, match="`.*surplus` is not a setting"):
                SamplerTable.from_json(with_value(path, {**value, "surplus": 1}))
    data = TABLE.to_json()
    del data["stages"][0]["rows"][1]["call"]
    with pytest.raises(BundleError, match=r"`stages\[0\]\.rows\[1\]\.call` is missing"):
        SamplerTable.from_json(data)


@pytest.mark.parametrize("text", ["", "{", "[1]", "9" * 9999, "\x00", '{"spec_version": 1e999}'])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sampler.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"sampler\.json: "):
        SamplerTable.load(path)


FIRST, SECOND = TABLE.stages
_, PICTURE, _, TEXT = TABLE.conditions
CFG = Guidance("cfg", None, 2.0, (1.0, 4.0), {"class_labels": 10})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ()}, "needs a stage and every stage a row"),
        ({"stages": (dataclasses.replace(FIRST, rows=()),)}, "needs a stage and every stage a row"),
        ({"noise_count": 4}, r"used once and in order, got \[0, 1, 2, 3, 4\] of 4"),
        ({"noise_count": 10**12}, "used once and in order"),
        ({"stages": (SECOND,)}, "the first stage carries nothing"),
        ({"stages": (FIRST, FIRST)}, "the first stage carries nothing, every later one something"),
        (
            {"stages": (FIRST, dataclasses.replace(SECOND, shape=(1, 6, 6)))},
            r"up_nearest does not lead from \[1, 4, 4\] to \[1, 6, 6\]",
        ),
        (
            {"stages": (FIRST, dataclasses.replace(SECOND, shape=(2, 8, 8)))},
            "up_nearest does not lead",
        ),
        (
            {"stages": (FIRST, dataclasses.replace(SECOND, carry="area_down"))},
            "area_down does not lead",
        ),
        (
            {"stages": (FIRST, dataclasses.replace(SECOND, carry="identity"))},
            "identity does not lead",
        ),
        ({"stages": (FIRST, dataclasses.replace(SECOND, carry="cubic"))}, "carry must be one of"),
        (
            {"stages": (dataclasses.replace(FIRST, shape=(1, 0, 4)), SECOND)},
            "sizes must be positive",
        ),
        (
            {"stages": (dataclasses.replace(FIRST, init_noise=(float("nan"), 0)), SECOND)},
            "coefficients finite",
        ),
        ({"guidance": Guidance("strong")}, "guidance mode must be one of"),
        ({"guidance": Guidance("embedded")}, "`input` exactly when its mode is 'embedded'"),
        ({"guidance": Guidance("none", "w")}, "`input` exactly when its mode is 'embedded'"),
        ({"guidance": Guidance("cfg")}, "`null` values of conditions exactly when"),
        ({"guidance": dataclasses.replace(CFG, null={"text": 0.0})}, "`null` values of conditions"),
        ({"guidance": Guidance("embedded", "w", 5.0, (1.0, 4.0))}, "default 5.0 is outside"),
        ({"guidance": CFG}, "`guidance_scale` is there exactly when the guidance mode is 'cfg'"),
        (
            {"conditions": (Condition("prompt", "text"),)},
            "`prompt` of kind text is told by encoder, examples, length, tokenizer, got nothing",
        ),
        ({"conditions": (Condition("x", "depth"),)}, "must be one of class, text, image, mask"),
        ({"conditions": (PICTURE, PICTURE)}, "need names of their own"),
        ({"conditions": (Condition("small", "class", 4),)}, "need names of their own"),
        ({"conditions": (Condition("sample", "class", 4),)}, "need names of their own"),
        (
            {"conditions": (TEXT, dataclasses.replace(TEXT, name="other"))},
            "a table takes one text",
        ),
        ({"conditions": (dataclasses.replace(PICTURE, size=3),)}, "of kind image is told by shape"),
        (
            {"conditions": (dataclasses.replace(PICTURE, shape=(1, 0, 8)),)},
            "`image`: sizes must be positive",
        ),
        (
            {"conditions": (dataclasses.replace(PICTURE, value_range=(1.0, 1.0)),)},
            r"`image`: value range \[1\.0, 1\.0\] is empty",
        ),
        (
            {"conditions": (dataclasses.replace(PICTURE, shape=(1, 4, 4)),)},
            r"stage 1: needs a condition `image` of kind image and shape \[1, 8, 8\]",
        ),
        (
            {"conditions": (PICTURE,)},
            r"stage 1: needs a condition `mask` of kind mask and shape \[1, 8, 8\]",
        ),
        (
            {"stages": (dataclasses.replace(FIRST, carry_to="small"),)},
            "stage 0: there is nothing to carry",
        ),
        (
            {"stages": (dataclasses.replace(FIRST, carry_noise=(0.1, 1)),)},
            "stage 0: there is nothing to carry",
        ),
        (
            {"guidance": Guidance("cfg", None, 2.0, (1.0, 4.0), {"class_labels": "none"})},
            "a `null` value is a number, or for a text a text",
        ),
        ({"space": {"kind": "pixel"}}, r"space needs a `value_range` \[low, high\], got None"),
        ({"space": {"value_range": [1, 1]}}, "space needs a `value_range`"),
        ({"clamp": (1.0, -1.0)}, r"clamp range \[1\.0, -1\.0\] is empty"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TABLE, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": (float("inf"), 0.0)}, "stage 0, row 0: all coefficients must be finite"),
        ({"feeds": {"timestep": np.float64(1)}}, "finite plain numbers"),
        ({"in_scale": float("nan")}, "finite plain numbers"),
        ({"clip": (1.0, 1.0)}, r"clip range \[1\.0, 1\.0\] is empty"),
        ({"call": ()}, "calls no network and has no x0 or raw to use"),
        ({"noise": None}, "a noise index and a noise coefficient come together"),
        ({"guidance_scale": 2.0}, "`guidance_scale` is there exactly when"),
        ({"blend": Blend(float("nan"))}, "the blend's coefficients must be finite"),
        ({"blend": Blend(1.0, 0.5)}, "a blend's noise and its index come together"),
        ({"blend": Blend(1.0, 0.0, 2)}, "a blend's noise and its index come together"),
        (
            {"next": Next(x0=0.9, noise=0.3, previous=(0.1,))},
            "uses the x0 of more rows than came before it",
        ),
    ],
)
def test_rows_that_cannot_be_run_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(**change)


def test_the_x0_of_a_row_without_a_call_cannot_be_used_later() -> None:
    with pytest.raises(ConfigError, match="row 1: uses the x0 of more rows than came before it"):
        changed(call=(), next=Next(z=1.0, noise=0.3))
