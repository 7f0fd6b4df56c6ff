"""Probes: tensors met on a table's own rows, for parity (golden) and for quantization (calibration)."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.conditions import network_conditions
from edgedistill.contract import Feeds
from edgedistill.errors import BundleError
from edgedistill.files import write_bytes
from edgedistill.network import CheckedNetwork
from edgedistill.noise import Bank, noise_bank
from edgedistill.sampler import Network, RowTrace, run_table
from edgedistill.table import SamplerTable

Probes = dict[str, np.ndarray]
Call = tuple[Feeds, Feeds]  # what a network is fed, and what it answers
GOLDEN_SAMPLES = 8


def golden_samples(table: SamplerTable) -> tuple[list[int], dict[str, np.ndarray]]:
    """Choose `GOLDEN_SAMPLES` samples that also show what each condition does.

    The second half repeats the noise and conditions of the first, with one condition changed per sample:
    to the next class, or to the far end of the guidance range. Without conditions all noise differs.

    Returns:
        A seed per sample, and arrays (count,) by input name.
    """
    half = GOLDEN_SAMPLES // 2
    changes = _changes(table)
    if not changes:
        return list(range(GOLDEN_SAMPLES)), network_conditions(table, GOLDEN_SAMPLES, None, {})
    first = network_conditions(table, half, None, {})
    conditions = {name: np.concatenate([value, value]) for name, value in first.items()}
    for index, (name, change) in zip(range(half, 2 * half), itertools.cycle(changes), strict=False):
        conditions[name][index] = change(conditions[name][index])
    return [*range(half)] * 2, conditions


def _changes(table: SamplerTable) -> list[tuple[str, Callable[[Any], Any]]]:
    """Return, for each condition that has more than one value, how to get another one."""
    found: list[tuple[str, Callable[[Any], Any]]] = [
        (condition.name, functools.partial(_next_class, condition.size))
        for condition in table.conditions
        if condition.size is not None and condition.size > 1
    ]
    guidance = table.guidance
    low, high = guidance.range
    if guidance.input is not None and low < high:
        far = high if high - guidance.default >= guidance.default - low else low
        found.append((guidance.input, lambda _: far - 1))
    return found


def _next_class(size: int, value: int) -> int:
    return (value + 1) % size


def spread_conditions(table: SamplerTable, count: int) -> dict[str, np.ndarray]:
    """Return conditions that cover what the caller may choose.

    Classes come in turn, as in `network_conditions`; the guidance weight rises evenly over the
    trained range.

    Returns:
        Arrays (count,) by input name.
    """
    conditions = network_conditions(table, count, None, {})
    if table.guidance.input is not None:
        scales = np.linspace(*table.guidance.range, count, dtype=np.float32)
        conditions[table.guidance.input] = scales - 1
    return conditions


@dataclass(frozen=True)
class Golden:
    """What the reference did from one noise bank.

    Fields:
        noise: The bank, float32 (batch, channels, height, width) each.
        conditions: Network inputs by name, one entry per sample, guidance included.
        rows: Per row ``state``, ``raw``, ``x0``, ``next``; no ``raw`` and ``x0`` where no network is called.
        output: The finished samples.
    """

    noise: Bank
    conditions: Mapping[str, np.ndarray]
    rows: Sequence[Mapping[str, np.ndarray]]
    output: np.ndarray

    @classmethod
    def load(cls, path: Path, table: SamplerTable) -> "Golden":
        """Read the golden tensors of a table.

        Raises:
            BundleError: If the file is missing or damaged, or lacks a tensor that the table calls for.
        """
        held = load_probes(path)
        try:
            rows = [_numbered(held, f"row.{i}.", row.call) for i, row in enumerate(table.rows)]
            noise = [held[f"noise.{k}"] for k in range(table.noise_count)]
            return cls(noise, _under(held, "condition."), rows, held["output"])
        except KeyError as error:
            msg = f"{path}: no {error} there, which the sampler table calls for; export the bundle anew."
            raise BundleError(msg) from error

    def pairs(self) -> Iterator[tuple[str, int, int]]:
        """Yield (condition, i, j) for samples of equal noise that differ in this one condition."""
        for i, j in itertools.combinations(range(len(self.output)), 2):
            if all(np.array_equal(bank[i], bank[j]) for bank in self.noise):
                differing = [name for name, v in self.conditions.items() if v[i] != v[j]]
                if len(differing) == 1:
                    yield differing[0], i, j


def record_golden(
    table: SamplerTable,
    networks: Mapping[str, Network],
    seeds: Sequence[int],
    conditions: Mapping[str, np.ndarray],
) -> Probes:
    """Run a table and keep everything that another runtime must reproduce.

    Args:
        table: The sampler.
        networks: The reference, by network name.
        seeds: One per sample.
        conditions: Network inputs (len(seeds),) by name.

    Returns:
        ``noise.{k}`` for each entry of the bank; ``condition.{name}``; for each row i ``row.{i}.state``,
        ``row.{i}.raw``, ``row.{i}.x0`` (both absent where no network is called) and ``row.{i}.next``;
        ``output``. Whole numbers are int32, all else is float32.
    """
    bank = noise_bank(table, seeds)
    probes = {f"noise.{index}": array for index, array in enumerate(bank)}
    probes |= {f"condition.{name}": value for name, value in conditions.items()}

    def keep(trace: RowTrace) -> None:
        for what in ("state", "raw", "x0", "next"):
            if getattr(trace, what) is not None:
                probes[f"row.{trace.index}.{what}"] = getattr(trace, what)

    probes["output"] = run_table(table, networks, bank, conditions, keep)
    return {name: _plain(value) for name, value in probes.items()}


def record_calibration(
    table: SamplerTable,
    networks: Mapping[str, CheckedNetwork],
    seeds: Sequence[int],
    conditions: Mapping[str, np.ndarray],
) -> Probes:
    """Run a table and keep what each network is fed.

    Args:
        table: The sampler.
        networks: The reference, by network name.
        seeds: One per sample; other ones than the golden seeds.
        conditions: Network inputs (len(seeds),) by name.

    Returns:
        ``{network}.{input}``: (calls * len(seeds), ...) in the order of the calls, dtypes as fed.
    """
    calls = record_calls(table, networks, noise_bank(table, seeds), conditions)
    return {
        f"{network}.{name}": np.concatenate([feeds[name] for feeds, _ in made])
        for network, made in calls.items()
        for name in made[0][0]
    }


def record_calls(
    table: SamplerTable,
    networks: Mapping[str, CheckedNetwork],
    noise: Bank,
    conditions: Feeds,
) -> dict[str, list[Call]]:
    """Run a table and keep what each network that it calls is fed and answers, call after call."""
    calls: dict[str, list[Call]] = {}

    def tapped(name: str, network: CheckedNetwork) -> Network:
        def call(given: Mapping[str, Any]) -> Mapping[str, Any]:
            outputs = network(given)
            calls.setdefault(name, []).append((network.feeds(given), outputs))
            return outputs

        return call

    taps = {name: tapped(name, network) for name, network in networks.items()}
    run_table(table, taps, noise, conditions)
    return calls


def save_probes(probes: Mapping[str, np.ndarray], path: Path) -> None:
    """Write probes as safetensors; the file appears whole or not at all."""
    from safetensors.numpy import save

    write_bytes(path, save({name: np.ascontiguousarray(v) for name, v in probes.items()}))


def load_probes(path: Path) -> Probes:
    """Read what `save_probes` wrote.

    Raises:
        BundleError: If the file is missing or is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except FileNotFoundError as error:
        msg = f"{path}: no such file; the bundle was written without probes, export it anew."
        raise BundleError(msg) from error
    except SafetensorError as error:
        msg = f"{path}: not a whole safetensors file ({error}); get the bundle anew."
        raise BundleError(msg) from error


def _under(held: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): v for name, v in held.items() if name.startswith(prefix)}


def _numbered(
    held: Mapping[str, np.ndarray], prefix: str, calls: Sequence[str]
) -> dict[str, np.ndarray]:
    needed = ("state", "raw", "x0", "next") if calls else ("state", "next")
    return {name: held[prefix + name] for name in needed}


def _plain(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32)
