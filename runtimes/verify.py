"""Every artifact of a bundle against the golden tensors: row by row, as a whole, and in its response to conditions."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgedistill.agreement import Agreement, compare, response_gain, response_share
from edgedistill.bundle import Artifact, Bundle
from edgedistill.environment import versions
from edgedistill.errors import ConfigError, ContractError, MissingDependencyError
from edgedistill.generator import GENERATOR, run_generator
from edgedistill.parity import ArtifactParity, ParityReport, RowParity, floor_of
from edgedistill.pipeline import Pipeline, why_not
from edgedistill.plugins import ALIASES, RUNTIMES, find
from edgedistill.probes import CALLS, Golden
from edgedistill.sampler import Network, RowTrace, run_table
from edgedistill.table import Row, SamplerTable
from edgedistill.tables import DEFAULT, golden_file

Progress = Callable[[Sequence[tuple[Bundle, Artifact]]], Iterable[tuple[Bundle, Artifact]]]
Goldens = Mapping[str, Golden]  # by sampler, the default first
SHARED = ("threads",)
"""Options that mean the same to every runtime."""


def verify(
    bundles: Sequence[Bundle],
    *,
    runtimes: Sequence[str] = (),
    artifacts: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    progress: Progress = iter,
) -> ParityReport:
    """Compare artifacts with the golden tensors of every sampler.

    Args:
        bundles: One or more bundles of one student; an artifact that several hold is compared once.
        runtimes: Names of the runtimes to verify; none: all. One that is named must be installed, one
            that is not named is skipped, with a note, where it is not.
        artifacts: Names of the artifacts to verify; none: all.
        options: Handed to every runtime; those that each has words of its own for, to one alone.
        progress: Wraps the sequence of what is to be compared, for a bar.

    Raises:
        ConfigError: If the bundles are of several students, nothing fits the names, or options of one runtime
            meet artifacts of several.
        MissingDependencyError: If a named runtime, or every runtime, is not installed.
    """
    names = [ALIASES.get(name, name) for name in runtimes]
    for name in names:
        find(RUNTIMES, name)
    if len({bundle.fingerprint for bundle in bundles}) != 1:
        msg = f"Only bundles of one student can be compared, got {len(bundles)} with different fingerprints."
        raise ConfigError(msg)
    first = bundles[0]
    goldens = {
        name: Golden.load(first.path(golden_file(name)), table)
        for name, table in first.samplers.items()
    }
    low, high = first.table.space["value_range"]
    chosen = _choose(bundles, names, artifacts)
    _refuse_mixed(chosen, options or {})
    compared = tuple(
        entry
        for bundle, artifact in progress(chosen)
        for entry in _verify_or_skip(bundle, artifact, goldens, options or {}, must=bool(names))
    )
    if all(item.skipped for item in compared):
        msg = f"Nothing could be compared: {compared[0].skipped}"
        raise MissingDependencyError(msg)
    return ParityReport(
        first.name,
        first.fingerprint,
        len(goldens[DEFAULT].output),
        (low, high),
        compared,
        versions(),
        goldens[DEFAULT].output,
    )


def _choose(
    bundles: Sequence[Bundle], runtimes: Sequence[str], artifacts: Sequence[str]
) -> list[tuple[Bundle, Artifact]]:
    held = {
        name: (bundle, artifact)
        for bundle in reversed(bundles)
        for name, artifact in bundle.artifacts.items()
    }
    order = dict.fromkeys(name for bundle in bundles for name in bundle.artifacts)
    if unknown := sorted(set(artifacts) - set(held)):
        msg = f"No artifact {', '.join(map(repr, unknown))}; there is: {', '.join(order)}."
        raise ConfigError(msg)
    chosen = [
        held[name]
        for name in order
        if (not artifacts or name in artifacts)
        and (not runtimes or held[name][1].runtime in runtimes)
    ]
    if not chosen:
        msg = f"No artifact for {', '.join(runtimes)}; there is: {', '.join(order) or 'nothing'}."
        raise ConfigError(msg)
    return chosen


def _refuse_mixed(chosen: Sequence[tuple[Bundle, Artifact]], options: Mapping[str, Any]) -> None:
    """Refuse options in one runtime's own words where others would be handed them too."""
    runtimes = list(dict.fromkeys(artifact.runtime for _, artifact in chosen))
    own = [name for name in options if name not in SHARED]
    if own and len(runtimes) > 1:
        msg = f"{' and '.join(own)}: each runtime has words of its own for it, and the artifacts are for {', '.join(runtimes)}; choose one, such as with --runtime {runtimes[-1]}."
        raise ConfigError(msg)


def _verify_or_skip(
    bundle: Bundle, artifact: Artifact, goldens: Goldens, options: Mapping[str, Any], *, must: bool
) -> Iterator[ArtifactParity]:
    """Yield what became of an artifact: an entry per sampler, or a single one where it was not run."""
    floor_of(artifact.precision)
    entry = ArtifactParity(
        artifact.name, artifact.runtime, artifact.format, artifact.precision, bundle.size(artifact)
    )
    if reason := why_not(bundle, artifact):
        yield replace(entry, skipped=reason)
        return
    try:
        start = time.perf_counter()
        pipeline = Pipeline(bundle, artifact, options)
        load_ms = 1000 * (time.perf_counter() - start)
    except MissingDependencyError as error:
        if must:
            raise
        yield replace(entry, skipped=str(error))
        return
    except ContractError as error:
        yield replace(entry, broken=str(error))
        return
    entry = replace(entry, load_ms=load_ms, described=pipeline.runtime.describe(options))
    chosen = goldens if artifact.sampler is None else {artifact.sampler: goldens[artifact.sampler]}
    for sampler, golden in chosen.items():
        named = replace(entry, sampler=sampler)
        try:
            held = as_called(golden, bundle.samplers[sampler], artifact)
            yield _verify_sampler(named, pipeline, pipeline.samplers[sampler], held)
        except ContractError as error:
            yield replace(named, broken=str(error))


def as_called(golden: Golden, table: SamplerTable, artifact: Artifact) -> Golden:
    """Return the golden samples that an artifact can make: those at the guidance scale that lies in its graphs."""
    told, scale = table.guidance.input, artifact.guidance_scale
    return golden if told is None or scale is None else golden.at(told, scale - 1)


def _verify_sampler(
    entry: ArtifactParity, pipeline: Pipeline, table: SamplerTable, golden: Golden
) -> ArtifactParity:
    if pipeline.artifact.sampler is not None:
        return _verify_graph(entry, pipeline, table, golden)
    networks = {name: _Timed(pipeline.networks[name]) for name in table.networks}
    forced: list[RowTrace] = []
    run_table(table, networks, golden.noise, golden.conditions, forced.append, golden.rows)
    free: list[np.ndarray] = []
    output = run_table(
        table, networks, golden.noise, golden.conditions, lambda trace: free.append(trace.next)
    )
    return replace(
        finished(entry, table, golden, output),
        rows=tuple(map(_row, forced, free, golden.rows)),
        call_ms=_call_ms(table, networks),
    )


def _verify_graph(
    entry: ArtifactParity, pipeline: Pipeline, table: SamplerTable, golden: Golden
) -> ArtifactParity:
    """Compare a sampler that is one graph: it has no rows to show."""
    networks = {name: _Timed(network) for name, network in pipeline.networks.items()}
    for _ in range(2):  # the first call warms up
        output = run_generator(table, networks, golden.noise, golden.conditions)
    call_ms = networks[GENERATOR].median_ms
    return replace(finished(entry, table, golden, output), call_ms=call_ms)


def finished(
    entry: ArtifactParity, table: SamplerTable, golden: Golden, output: np.ndarray
) -> ArtifactParity:
    """Add what the finished samples tell."""
    low, high = table.space["value_range"]
    responses = _responses(golden, output)
    gains = {name: response_gain(*both) for name, both in responses.items()}
    shares = {name: response_share(own, golden.output) for name, (own, _) in responses.items()}
    faint = tuple(name for name in gains if entry.floor.excuses(gains[name], shares[name]))
    return replace(
        entry,
        image=compare(golden.output, output, peak=high - low),
        sensitivity={name: gain for name, gain in gains.items() if name not in faint},
        faint=faint,
        output=output,
        reference=golden.output,
    )


def _call_ms(table: SamplerTable, networks: "Mapping[str, _Timed]") -> float:
    """Return what the dearest row costs; of several students it takes the slowest."""

    def cost(name: str) -> float:
        routed = table.router is not None and name == table.router.network
        names = table.router.networks if table.router and routed else (name,)
        return max(networks[item].median_ms for item in names)

    return max((sum(map(cost, row.call)) for row in table.rows), default=0.0)


class _Timed:
    """A network that takes the time of its calls; the first one, which warms up, does not count."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.seconds: list[float] = []

    def __call__(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        start = time.perf_counter()
        outputs = self.network(given)
        self.seconds.append(time.perf_counter() - start)
        return outputs

    @property
    def median_ms(self) -> float:
        return 1000 * statistics.median(self.seconds[1:] or self.seconds or [0.0])


def _row(trace: RowTrace, free: np.ndarray, kept: Mapping[str, np.ndarray]) -> RowParity:
    made = {"raw": trace.raw, "x0": trace.x0, "next": trace.next}
    made |= dict(zip(CALLS, trace.calls, strict=False))
    return compare_row(trace.index, trace.row, kept, made, free)


def compare_row(
    index: int,
    row: Row,
    kept: Mapping[str, np.ndarray],
    made: Mapping[str, np.ndarray | None],
    free: np.ndarray | None,
) -> RowParity:
    """Compare what a row made with what the reference made of it.

    Args:
        index: Its position in the table.
        row: It.
        kept: The reference's tensors, as in `Golden.rows`.
        made: Others under the same names, teacher-forced; what is not known may lack.
        free: The state after the row, free-running; None: not known.
    """
    guided = _optional(kept.get("raw"), made.get("raw"))
    calls = [name for name in CALLS if name in kept and name in made]
    # Without the calls of a guided row, what guidance made of them stands in, as in bundles written before they were kept.
    alone = guided
    if calls:
        wanted, got = (np.concatenate([side[name] for name in calls]) for side in (kept, made))
        alone = compare(wanted, got)
    return RowParity(
        index,
        next(iter(row.feeds.values()), None),
        alone,
        _optional(kept.get("x0"), made.get("x0")),
        _optional(kept["next"], made.get("next")),
        _optional(kept["next"], free),
        guided if any(name in made for name in CALLS) else None,
    )


def _optional(reference: np.ndarray | None, got: np.ndarray | None) -> Agreement | None:
    return None if reference is None or got is None else compare(reference, got)


def _responses(golden: Golden, output: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the reference's response to each condition and the output's, over all pairs that differ in it alone."""
    changes: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for name, i, j in golden.pairs():
        wanted, got = changes.setdefault(name, ([], []))
        wanted.append(golden.output[i] - golden.output[j])
        got.append(output[i] - output[j])
    return {name: (np.stack(wanted), np.stack(got)) for name, (wanted, got) in changes.items()}
