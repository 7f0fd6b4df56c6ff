"""Probes: tensors met on a table's own rows, for parity (golden) and for quantization (calibration)."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.conditions import Tokenize, network_conditions
from edgedistill.contract import Feeds
from edgedistill.errors import BundleError, ContractError
from edgedistill.files import write_bytes
from edgedistill.network import CheckedNetwork
from edgedistill.noise import Bank, noise_bank
from edgedistill.sampler import IMAGE, TOKENS, Network, RowTrace, run_table
from edgedistill.table import SamplerTable

Probes = dict[str, np.ndarray]
Examples = Mapping[str, np.ndarray]  # (examples, channels, height, width) by the condition's name
Call = tuple[Feeds, Feeds]  # what a network is fed, and what it answers
GOLDEN_SAMPLES = 8
CALLS = ("conditional", "unconditional")


def golden_samples(
    table: SamplerTable,
    examples: Examples | None = None,
    tokenize: Tokenize | None = None,
    samples: int = GOLDEN_SAMPLES,
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Choose samples that also show what each condition does.

    The second half repeats the noise and conditions of the first, with one condition changed per sample:
    to the next class, to another text or image, or to the far end of the guidance range. Without
    conditions all noise differs.

    Args:
        table: The sampler.
        examples: Images and masks by condition, taken in turn; left out ones are drawn.
        tokenize: Turns prompts into tokens; None where there are none.
        samples: How many; of routed students at least two for each.

    Returns:
        A seed per sample, and arrays (count, ...) by input name.
    """
    count = max(samples, 2 * table.router.students if table.router else 0)
    half, changes = count // 2, _changes(table)
    if not changes:
        return list(range(count)), example_conditions(table, count, examples, tokenize)
    # One value more than samples: what the last one is changed to.
    first = example_conditions(table, half + 1, examples, tokenize)
    conditions = {name: np.concatenate([v[:half], v[:half]]) for name, v in first.items()}
    for index, (name, change) in zip(range(half, 2 * half), itertools.cycle(changes), strict=False):
        conditions[name][index] = change(first[name], index - half)
    return [*range(half)] * 2, conditions


def _changes(table: SamplerTable) -> list[tuple[str, Callable[[np.ndarray, int], Any]]]:
    """Return, for each input that has more than one value, what sample i of an array is changed to."""
    found: list[tuple[str, Callable[[np.ndarray, int], Any]]] = []
    for item in table.conditions:
        if item.kind == "class":
            if item.size is not None and item.size > 1:
                found.append((item.name, functools.partial(_next_class, item.size)))
        elif item.kind == "text":
            if len(set(item.examples or ())) > 1:
                found.append((TOKENS, _another))
        elif item.kind != "size":
            found.append((item.name, _another))
    guidance = table.guidance
    low, high = guidance.range
    if guidance.input is not None and low < high:
        far = high if high - guidance.default >= guidance.default - low else low
        found.append((guidance.input, lambda *_: far - 1))
    return found


def _next_class(size: int, values: np.ndarray, index: int) -> int:
    return int(values[index] + 1) % size


def _another(values: np.ndarray, index: int) -> np.ndarray:
    """Return the next entry that differs."""
    later = [*values[index + 1 :], *values[:index]]
    return next((item for item in later if (item != values[index]).any()), values[index])


def example_conditions(
    table: SamplerTable,
    count: int,
    examples: Examples | None = None,
    tokenize: Tokenize | None = None,
) -> dict[str, np.ndarray]:
    """Return conditions that a caller might give: classes and texts in turn, images and masks of `examples`."""
    given = {}
    for item in table.conditions:
        held = (examples or {}).get(item.name)
        if held is not None:
            given[item.name] = np.resize(held, (count, *held.shape[1:]))
        elif item.kind in ("image", "mask") and item.shape is not None:
            given[item.name] = _drawn(item.shape, item.value_range, count)
    router = table.router
    if router is not None and router.table:
        given[router.on] = np.resize(_by_turns(router.table), count)
    return network_conditions(table, count, None, given, tokenize)


def _by_turns(students: Sequence[int]) -> list[int]:
    """Return all classes, those of different students by turns."""
    before = [students[:label].count(student) for label, student in enumerate(students)]
    return sorted(range(len(students)), key=lambda label: (before[label], students[label]))


def _drawn(
    shape: tuple[int, int, int], value_range: tuple[float, float] | None, count: int
) -> np.ndarray:
    """Draw images of flat patches, or masks of zeros and ones, always the same."""
    generator = np.random.Generator(np.random.Philox(key=0))
    channels, height, width = shape
    values = generator.random((count, channels, 4, 4), dtype=np.float32)
    rows, columns = (np.arange(size) * 4 // size for size in (height, width))
    values = values[:, :, rows][..., columns]
    if value_range is None:
        return np.rint(values)
    low, high = value_range
    return (low + values * (high - low)).astype(np.float32).clip(low, high)


def spread_conditions(
    table: SamplerTable,
    count: int,
    examples: Examples | None = None,
    tokenize: Tokenize | None = None,
) -> dict[str, np.ndarray]:
    """Return conditions that cover what the caller may choose.

    Classes, texts and examples come in turn, classes of different students by turns; the guidance weight rises evenly over the trained range.

    Returns:
        Arrays (count, ...) by input name.
    """
    conditions = example_conditions(table, count, examples, tokenize)
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
        rows: Per row ``state``, ``raw``, ``x0``, ``next``; no ``raw`` and ``x0`` where no network is called;
            also ``conditional`` and ``unconditional`` where guidance makes ``raw`` of two calls, but in
            bundles that were written before these were kept.
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

    def at(self, condition: str, value: float) -> "Golden":
        """Return the samples with this value of a condition, which networks that hold the value do not take.

        Raises:
            ContractError: If there are none.
        """
        kept = self.conditions[condition] == np.float32(value)
        if not kept.any():
            msg = f"None of the golden samples has {value:g} as `{condition}`; export the bundle anew."
            raise ContractError(msg)
        others = {name: held for name, held in self.conditions.items() if name != condition}
        return replace(self, conditions=others).part(kept)

    def part(self, which: Any) -> "Golden":
        """Return some of the samples: a slice of them, or those where a mask (batch,) is true."""
        return Golden(
            [bank[which] for bank in self.noise],
            {name: held[which] for name, held in self.conditions.items()},
            [{what: held[which] for what, held in row.items()} for row in self.rows],
            self.output[which],
        )

    def pairs(self) -> Iterator[tuple[str, int, int]]:
        """Yield (condition, i, j) for samples of equal noise that differ in this one condition."""
        for i, j in itertools.combinations(range(len(self.output)), 2):
            if all(np.array_equal(bank[i], bank[j]) for bank in self.noise):
                differing = [k for k, v in self.conditions.items() if (v[i] != v[j]).any()]
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
        conditions: Network inputs (len(seeds), ...) by name.

    Returns:
        ``noise.{k}`` for each entry of the bank; ``condition.{name}``; for each row i ``row.{i}.state``,
        ``row.{i}.raw``, ``row.{i}.x0`` (both absent where no network is called) and ``row.{i}.next``;
        where guidance makes ``raw`` of two calls, these as ``row.{i}.conditional`` and
        ``row.{i}.unconditional``; ``output``. Whole numbers are int32, all else is float32.
    """
    bank = noise_bank(table, seeds)
    probes = {f"noise.{index}": array for index, array in enumerate(bank)}
    probes |= {f"condition.{name}": value for name, value in conditions.items()}

    def keep(trace: RowTrace) -> None:
        for what in ("state", "raw", "x0", "next"):
            if getattr(trace, what) is not None:
                probes[f"row.{trace.index}.{what}"] = getattr(trace, what)
        for what, made in zip(CALLS, trace.calls, strict=False):
            probes[f"row.{trace.index}.{what}"] = made

    probes["output"] = run_table(table, networks, bank, conditions, keep)
    return {name: _plain(value) for name, value in probes.items()}


def record_calibration(
    runs: Iterable[tuple[SamplerTable, Mapping[str, np.ndarray]]],
    networks: Mapping[str, CheckedNetwork],
    seeds: Sequence[int],
) -> Probes:
    """Run tables and keep what each network is fed.

    Args:
        runs: Tables over the same networks, each with network inputs (len(seeds), ...) by name.
        networks: The reference, by network name.
        seeds: One per sample; other ones than the golden seeds.

    Returns:
        ``{network}.{input}``: (samples, ...) in the order of the calls, dtypes as fed.
    """
    kept: dict[str, list[np.ndarray]] = {}
    for table, conditions in runs:
        calls = record_calls(table, networks, noise_bank(table, seeds), conditions)
        for network, made in calls.items():
            for feeds, _ in made:
                for name, value in feeds.items():
                    kept.setdefault(f"{network}.{name}", []).append(value)
    return {name: np.concatenate(values) for name, values in kept.items()}


def record_calls(
    table: SamplerTable,
    networks: Mapping[str, CheckedNetwork],
    noise: Bank,
    conditions: Feeds,
) -> dict[str, list[Call]]:
    """Run a table and keep what each network that it calls is fed and answers, call after call.

    What makes latents of images for edits is fed the samples.
    """
    calls: dict[str, list[Call]] = {}

    def tapped(name: str, network: CheckedNetwork) -> Network:
        def call(given: Mapping[str, Any]) -> Mapping[str, Any]:
            outputs = network(given)
            calls.setdefault(name, []).append((network.feeds(given), outputs))
            return outputs

        return call

    taps = {name: tapped(name, network) for name, network in networks.items()}
    output = run_table(table, taps, noise, conditions)
    if table.encoder is not None:
        taps[table.encoder]({IMAGE: output})
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
    further = [name for name in CALLS if prefix + name in held]
    return {name: held[prefix + name] for name in (*needed, *further)}


def _plain(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32)
