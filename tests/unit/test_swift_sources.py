"""The Swift sources: golden vectors that are right, noise that is numpy's, and a field for every key of a table.

No Swift compiler runs here: what is checked of the sources is their text, the arithmetic in Python.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgedistill import choices, router, swift, table
from edgedistill.files import read_json
from edgedistill.plans import portable
from edgedistill.sampler import run_table
from edgedistill.table import SamplerTable

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "edgedistill" / "assets" / "swift"
GOLDEN = read_json(ASSETS / swift.GOLDEN)
SD = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
F = np.float32


def script() -> ModuleType:
    path = ROOT / "examples" / "make_swift_golden.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(name: str) -> Any:
    return next(item for item in GOLDEN["cases"] if item["name"] == name)


def test_golden_vectors_are_those_that_the_sampler_makes() -> None:
    tables = {item["name"]: SamplerTable.from_json(item["table"]) for item in GOLDEN["cases"]}
    assert tables == script().tables()
    made = swift.golden(tables)
    assert made["noise"] == GOLDEN["noise"]
    for found, item in zip(made["cases"], GOLDEN["cases"], strict=True):
        assert {**found, "table": None} == {**item, "table": None}


def test_golden_vectors_use_all_that_a_table_can_say() -> None:
    """Every field of every part has, in some case, a value that is not its default."""
    tables = [SamplerTable.from_json(item["table"]) for item in GOLDEN["cases"]]
    stages = [stage for item in tables for stage in item.stages]
    rows = [row for stage in stages for row in stage.rows]
    blends = [row.blend for row in rows if row.blend is not None]
    parts = {
        "stage": (stages, {"shape", "rows"}),
        "row": (rows, {"call", "note"}),
        "next": ([row.next for row in rows], set()),
        "blend": (blends, {"known", "image", "mask"}),
        "guidance": ([item.guidance for item in tables], set()),
        "table": (tables, {"stages", "noise_count", "state_input", "raw_output", "encoder"}),
        "router": ([item.router for item in tables if item.router], {"network"}),
    }
    for name, (found, left_out) in parts.items():
        for item in dataclasses.fields(found[0]):
            values = {str(getattr(part, item.name)) for part in found}
            assert item.name in left_out or len(values) > 1, (name, item.name)
    assert {row.call for row in rows} >= {(), ("unet",), ("guide", "unet")}


def test_golden_runs_differ_by_what_they_are_given() -> None:
    """A wrong mask, class, guidance, null text or router would show."""
    for name, changes in (
        ("inpainting", {"mask": np.zeros((1, 1, 4, 4), F)}),
        ("image to image", {"image": np.zeros((1, 2, 4, 4), F)}),
        ("portable, guided", {"class_labels": np.array([0])}),
        ("routed by class", {"class_labels": np.array([0])}),
        ("routed by text, latent", {"pooled": np.full((1, 3), -9, F)}),
        ("routed by text, latent", {"null.input_ids": np.full((1, 5), 900)}),
        ("inpainting of latents", {"mask": np.ones((1, 1, 8, 8), F)}),
    ):
        item = case(name)
        made = SamplerTable.from_json(item["table"])
        networks = {key: swift.stand_in(key, made) for key in made.networks}
        given = {
            key: np.resize(np.array(value["values"]), value["shape"])
            for key, value in item["conditions"].items()
        }
        noise = swift.noise_bank(made, [item["seed"]])
        run = [run_table(made, networks, noise, {**given, **more}) for more in ({}, changes)]
        assert np.abs(run[0] - run[1]).max() > 1e-3, (name, list(changes))


class Normals:
    """NormalSource.swift in Python, number by number."""

    def __init__(self, seed: int) -> None:
        self.key, self.halves = seed, self._halves()
        edge, area = 3.6541528853610088, 0.004928673233974658
        x = [edge] * 256
        for i in range(254, 0, -1):
            x[i] = math.sqrt(-2 * math.log(area / x[i + 1] + math.exp(-0.5 * x[i + 1] ** 2)))
        x[0] = area / math.exp(-0.5 * edge * edge)
        self.widths = [F(right / 2**23) for right in x]
        self.heights = [F(1), *(F(math.exp(-0.5 * right * right)) for right in x[1:])]
        inner = [edge, 0.0, *x[1:255]]
        self.inside = [round(a / b * 2**23) for a, b in zip(inner, x, strict=True)]
        self.edge = edge

    def _halves(self) -> Iterator[int]:
        low, counter = 2**64 - 1, 0
        while True:
            counter += 1
            a, b, c, d, k0, k1 = counter, 0, 0, 0, self.key, 0
            for _ in range(10):
                first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
                a, b, c, d = second >> 64 ^ b ^ k0, second & low, first >> 64 ^ d ^ k1, first & low
                k0, k1 = k0 + 0x9E3779B97F4A7C15 & low, k1 + 0xBB67AE8584CAA73B & low
            for bits in (a, b, c, d):
                yield bits & 0xFFFFFFFF
                yield bits >> 32

    def uniform(self) -> np.float32:
        return F(next(self.halves) >> 8) * F(2**-24)

    def next(self) -> np.float32:
        while True:
            bits = next(self.halves)
            layer, distance = bits & 0xFF, bits >> 9
            x = F(1 if bits & 0x100 == 0 else -1) * F(distance) * self.widths[layer]
            if distance < self.inside[layer]:
                return x
            if layer == 0:
                return self.tail(distance)
            above, below = self.heights[layer - 1], self.heights[layer]
            if float((above - below) * self.uniform() + below) < math.exp(-0.5 * float(x) ** 2):
                return x

    def tail(self, distance: int) -> np.float32:
        while True:
            reach = -F(1 / self.edge) * np.log1p(-self.uniform())
            drop = -np.log1p(-self.uniform())
            if drop + drop > reach * reach:
                return F(self.edge) + reach if distance & 0x100 == 0 else -(F(self.edge) + reach)


def test_noise_by_the_swift_recipe_is_numpys() -> None:
    count, stride = GOLDEN["noise"]["count"], GOLDEN["noise"]["stride"]
    source = Normals(GOLDEN["noise"]["seed"])
    made = np.array([source.next() for _ in range(count)], F)
    generator = np.random.Generator(np.random.Philox(key=GOLDEN["noise"]["seed"]))
    expected = generator.standard_normal(count, dtype=F)
    assert np.abs(expected).max() > source.edge  # the tail was met
    np.testing.assert_array_max_ulp(made, expected, 1)
    np.testing.assert_array_equal(
        made[np.abs(made) < source.edge], expected[np.abs(made) < source.edge]
    )
    np.testing.assert_array_equal(np.array(GOLDEN["noise"]["values"], F), expected[::stride])


def properties(struct: str) -> set[str]:
    """Return the stored properties of a Swift struct."""
    source = (ASSETS / "SamplerTable.swift").read_text()
    found = re.search(
        rf"^( *)(?:public )?struct {struct}\b.*?^\1}}", source, re.DOTALL | re.MULTILINE
    )
    assert found is not None
    indent = found[1] + "    "
    lines = re.findall(rf"^{indent}(?:public )?let ([\w`, ]+): .*", found[0], re.MULTILINE)
    return {name.strip(" `") for line in lines for name in line.split(",")}


@pytest.mark.parametrize(
    ("kind", "commentary"),
    [
        (table.Next, set()),
        (table.Blend, set()),
        (table.Row, {"note"}),
        (table.Stage, set()),
        # Which edits a caller may make is not the table's own sampling.
        (table.SamplerTable, {"annotations", "encoder"}),
        # `input` and `null` say what the mode does.
        (choices.Guidance, {"mode"}),
        # How many students there are follows from the partition.
        (router.Router, {"students"}),
        # What a caller may choose from.
        (choices.Condition, {"size", "shape", "value_range", "tokenizer", "length", "examples"}),
    ],
)
def test_swift_reads_every_key_of_a_table(kind: Any, commentary: set[str]) -> None:
    keys = {item.name for item in dataclasses.fields(kind)} - commentary
    more = {"spec_version"} if kind is table.SamplerTable else set()
    assert properties(kind.__name__) == keys | more
    source = (ASSETS / "SamplerTable.swift").read_text()
    for key in keys:
        assert len(re.findall(rf"\b{key}\b", source)) > 1, f"{key} is read and not used"


def test_swift_knows_the_tables_version_and_names() -> None:
    source = (ASSETS / "SamplerTable.swift").read_text()
    assert f'hasPrefix("{table.SPEC_VERSION.split(".")[0]}.")' in source
    for name in (
        "input_ids",
        "latent_sample",
        "null.",
        "text",
        "image",
        *("class_table", "sign_planes"),
    ):
        assert f'"{name}"' in source
    for name in swift.SOURCES:
        text = (ASSETS / name).read_text()
        assert re.findall(r"^import (\w+)", text, re.MULTILINE) in (
            ["Foundation"],
            ["Foundation", "XCTest"],
        )
        assert all(text.count(a) == text.count(b) for a, b in ("()", "{}", "[]")), name


def test_sources_are_written_beside_packages(tmp_path: Path) -> None:
    made = portable({**SD, "clip_sample": False}, 2, shape=(4, 64, 64)).table
    paths = swift.write_swift_sources(tmp_path / "swift", {"default": made})
    assert [path.name for path in paths] == [*swift.SOURCES, "golden.json"]
    assert all(path.is_file() for path in paths)
    (only,) = read_json(paths[-1])["cases"]
    assert (only["output"]["stride"], len(only["output"]["values"])) == (256, 64)
    assert SamplerTable.from_json(only["table"]) == made
