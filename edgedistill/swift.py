"""What an app in Swift needs to run sampler tables: source files, and golden vectors to test them with.

The vectors come from a stand-in for networks that is plain arithmetic, so that Swift computes the same: every
network answers with a bounded function of its state and of the first value of each of its other inputs.
"""

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.files import write_bytes, write_json
from edgedistill.noise import noise_bank
from edgedistill.sampler import IMAGE, LATENT, NULL, TOKENS, run_table
from edgedistill.table import Condition, SamplerTable
from edgedistill.tables import Tables

SOURCES = ("SamplerTable.swift", "Tensor.swift", "NormalSource.swift", "SamplerTableTests.swift")
GOLDEN = "golden.json"
RESIDUAL = "residual"
SEED = 7
MOST_VALUES = 64
_LONG = {"seed": 3, "count": 40_000, "stride": 997}
_PATTERN = (0.5, -1.0, 0.25, 1.0, -0.75, 0.0, -0.25)  # repeated where a condition needs more

Arrays = Mapping[str, Any]


def write_swift_sources(folder: Path, tables: Tables) -> list[Path]:
    """Write the Swift files, and golden vectors of the tables, which the test file among them reads.

    Args:
        folder: Where they go.
        tables: By name.

    Returns:
        Paths of all files written.
    """
    assets = resources.files("edgedistill") / "assets" / "swift"
    for name in SOURCES:
        write_bytes(folder / name, (assets / name).read_bytes())
    write_json(folder / GOLDEN, golden(tables))
    return [folder / name for name in (*SOURCES, GOLDEN)]


def golden(tables: Tables) -> dict[str, Any]:
    """Return golden vectors as JSON data: a long stream of noise, and for each table a run.

    A vector holds every `stride`-th value, so that real tables do not make large files.
    """
    generator = np.random.Generator(np.random.Philox(key=_LONG["seed"]))
    stream = generator.standard_normal(_LONG["count"], dtype=np.float32)
    return {
        "noise": {**_LONG, "values": _plain(stream[:: _LONG["stride"]])},
        "cases": [_case(name, table) for name, table in tables.items()],
    }


def _case(name: str, table: SamplerTable) -> dict[str, Any]:
    noise = noise_bank(table, [SEED])
    given = _conditions(table)
    arrays = {key: _repeated(**item) for key, item in given.items()}
    if (told := table.guidance.input) is not None:
        arrays[told] = np.full((1,), table.guidance.default - 1, np.float32)
    networks = {called: stand_in(called, table) for called in table.networks}
    made = run_table(table, networks, noise, arrays)
    return {
        "name": name,
        "table": table.to_json(),
        "seed": SEED,
        "conditions": given,
        "noise": _strided(np.concatenate([entry.ravel() for entry in noise])),
        "output": {"shape": list(made.shape), **_strided(made.ravel())},
    }


def stand_in(name: str, table: SamplerTable) -> Callable[[Arrays], Arrays]:
    """Return what stands for the network of a name; SamplerTableTests.swift has the same."""
    gain = np.float32(0.5 + 0.01 * (ord(name[-1]) % 16))
    text = table.condition("text")

    def call(inputs: Arrays) -> Arrays:
        if text is not None and name in text.encoders:
            tokens = inputs[TOKENS][..., None].astype(np.float32)
            return {text.name: tokens * gain * np.float32(0.01)}
        if name.startswith("vae_encoder"):
            wanted = (1, *table.stages[0].shape)
            return {LATENT: np.resize(inputs[IMAGE], wanted) * np.float32(0.5)}
        if LATENT in inputs:
            return {"sample": inputs[LATENT] * np.float32(0.5)}
        state = inputs[table.state_input]
        if name == "guide":
            return {RESIDUAL: state * np.float32(0.1)}
        others = {*inputs} - {table.state_input}
        bias = np.float32(0)
        for place, other in enumerate(sorted(key for key in others if not key.startswith(NULL))):
            first = np.float32(np.ravel(inputs[other])[0])
            bias += np.float32(0.1 * (place + 1)) * first / (10 + abs(first))
        return {table.raw_output: state * gain / (1 + abs(state)) + bias}

    return call


def _conditions(table: SamplerTable) -> dict[str, dict[str, Any]]:
    """Return shape and repeated values of all that the caller gives."""
    given: dict[str, dict[str, Any]] = {}
    for item in table.conditions:
        if item.kind == "text":
            shape = [1, *([len(item.encoders)] if item.further else []), item.length]
            given[TOKENS] = {"shape": shape, "values": [3, 1, 4, 1, 5]}
            if isinstance(table.guidance.null.get(item.name), str):
                given[NULL + TOKENS] = {"shape": shape, "values": [2, 7]}
        else:
            given[item.name] = _condition(item)
    router = table.router
    if router is not None and router.planes and router.on not in given:
        given[router.on] = {"shape": [1, len(router.planes[0])], "values": list(_PATTERN)}
    return given


def _condition(item: Condition) -> dict[str, Any]:
    if item.kind == "class":
        return {"shape": [1], "values": [(item.size or 2) - 1]}
    if item.kind == "mask":
        return {"shape": [1, *(item.shape or ())], "values": [1, 0, 0]}
    if item.kind == "size":
        return {"shape": [1, len(item.whole_size)], "values": list(item.whole_size)}
    return {"shape": [1, *(item.shape or ())], "values": list(_PATTERN)}


def _repeated(shape: list[int], values: list[float]) -> np.ndarray:
    kind = (
        np.int64 if all(type(value) is int for value in values) and len(shape) < 4 else np.float32
    )
    return np.resize(np.array(values, kind), shape)


def _strided(values: np.ndarray) -> dict[str, Any]:
    stride = -(-len(values) // MOST_VALUES)
    return {"stride": stride, "values": _plain(values[::stride])}


def _plain(values: np.ndarray) -> list[float]:
    """Return float32 numbers as the shortest decimals that read back to the same bits."""
    return [float(str(value)) for value in values]
