"""Bundle to smaller bundle: which artifacts, in what order, each checked before the whole is written."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgedistill import plugins
from edgedistill.agreement import compare, finite_db
from edgedistill.bundle import REFERENCE, Artifact, Bundle, NetworkFile
from edgedistill.drafts import Draft, start_from, write_bundle
from edgedistill.errors import CheckFailedError, ConfigError, ContractError
from edgedistill.network import CheckedNetwork
from edgedistill.pipeline import Pipeline
from edgedistill.probes import Call, Golden, record_calls
from edgedistill.router import SIGN_PLANES
from edgedistill.tables import golden_file

from .calibration import calibration_batches
from .config import FORMATS, WAYS, Config, PtqConfig
from .with_nncf import Progress, compress_nncf

LEAST_DB = 10.0
NOT_ASKED = "not asked for"
_SOURCES = {"coreml": ("float16", "float32")}


@dataclass(frozen=True)
class Job:
    """One artifact to make.

    Fields:
        source: The float artifact.
        result: What it becomes, networks in order, still without `made_with`.
        kept: Why a network stays as it is, by name.
        carried: What an earlier run into the same target made smaller, how by name; it is kept so.
    """

    source: Artifact
    result: Artifact
    kept: Mapping[str, str]
    carried: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What can be made of a bundle.

    Fields:
        jobs: At least one.
        left_out: Why not, by format.
    """

    jobs: tuple[Job, ...]
    left_out: Mapping[str, str]


def plan(
    bundle: Bundle, config: Config, only: Sequence[str] = (), networks: Collection[str] = ()
) -> Plan:
    """Choose what to make smaller.

    Args:
        bundle: Holds the float artifacts.
        config: What to do to them.
        only: Formats to choose from; none: all that the bundle holds.
        networks: Names of those to make smaller, beside which the others stay as they are; none: all.

    Raises:
        ConfigError: If nothing can be made, or not of every format in `only`, or there is no such network.
    """
    if unknown := sorted(set(only) - set(FORMATS)):
        msg = f"Unknown format {', '.join(map(repr, unknown))}: choose of {', '.join(FORMATS)}."
        raise ConfigError(msg)
    way = WAYS[config.precision]
    held = {item.format for item in bundle.artifacts.values()}
    kept = _kept(bundle, networks)
    jobs, left_out = [], {}
    for name in only or [name for name in FORMATS if name in held]:
        source = _source(bundle, name)
        if name not in way.formats:
            left_out[name] = way.elsewhere
        elif source is None:
            left_out[name] = f"the bundle holds no {' or '.join(_precisions(name))} artifact of it"
        elif set(source.networks) <= set(kept):
            left_out[name] = "all of its networks stay as they are"
        else:
            jobs.append(Job(source, _result(source, config.precision, kept), kept))
    if not jobs or (only and left_out):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        msg = (
            f"{bundle.root}: {config.precision} cannot be made ({reasons or 'no format to make it of'}). "
            f"The bundle holds: {', '.join(bundle.artifacts) or 'nothing'}."
        )
        raise ConfigError(msg)
    return Plan(tuple(jobs), left_out)


def quantize_bundle(
    bundle: Bundle,
    target: Path,
    config: Config,
    *,
    only: Sequence[str] = (),
    networks: Collection[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda items, _: items,
) -> Bundle:
    """Write a bundle with the smaller artifacts and the PyTorch reference.

    A bundle of the same student at `target` keeps what it holds and gets the new artifacts added; it
    may be `bundle` itself. Networks that are not in `networks`, but were made smaller in the same way by an
    earlier call, stay small. Nothing at `target` changes unless everything was made and checked.

    Args:
        bundle: The source.
        target: Folder to make or to add to.
        config: What to do.
        only, networks: As `plan`.
        overwrite: Replace a bundle at `target`, whatever it holds.
        progress: Wraps each sequence that takes time; its second argument says what it is.

    Raises:
        BundleError: If `target` is something else than a bundle, or one of another student and
            `overwrite` is not given; or if the bundle holds no probes.
        CheckFailedError: If a smaller network's answer is not finite or is less than 10 dB SNR from
            its source's on a held-out call.
        ConfigError: As `plan`; or if `bundle` itself would be replaced.
        MissingDependencyError: If a package is not installed.
    """
    jobs = plan(bundle, config, only, networks).jobs
    if overwrite and target.resolve() == bundle.root.resolve():
        msg = f"{target}: cannot replace the bundle that it is made from; leave --overwrite out to add to it."
        raise ConfigError(msg)
    reference = {k: item for k, item in bundle.artifacts.items() if k == REFERENCE}
    base = start_from(target, replace(bundle, artifacts=reference), overwrite=overwrite)
    if bundle.single_root:
        jobs = tuple(_in_place(job, base) for job in jobs)
    jobs = tuple(_carrying(job, base) for job in jobs)

    def fill(draft: Draft) -> None:
        for job in progress(jobs, "quantize"):
            for name in job.carried:
                path = job.result.networks[name].path
                base.copy(path, (draft.root / path).parent)
            draft.add(_make(bundle, job, config, draft.root, progress))

    made = {job.result.name for job in jobs}
    return write_bundle(target, base, fill, [name for name in base.artifacts if name not in made])


def _precisions(format_: str) -> tuple[str, ...]:
    return _SOURCES.get(format_, ("float32",))


def _source(bundle: Bundle, format_: str) -> Artifact | None:
    held = {
        item.precision: item
        for item in bundle.artifacts.values()
        if item.format == format_ and item.sampler is None
    }
    return next((held[name] for name in _precisions(format_) if name in held), None)


def _kept(bundle: Bundle, networks: Collection[str]) -> dict[str, str]:
    """Return the networks that stay as they are, and why.

    Those whose answers decide which student draws a sample stay in any case: a rounded one may choose another.
    """
    held = {name: None for item in bundle.artifacts.values() for name in item.networks}
    if unknown := sorted(set(networks) - set(held)):
        msg = f"{bundle.root}: no network {', '.join(map(repr, unknown))}; the bundle holds: {', '.join(held)}."
        raise ConfigError(msg)
    kept = {name: NOT_ASKED for name in held if networks and name not in networks}
    for table in bundle.samplers.values():
        text = table.condition("text")
        if table.router is not None and table.router.kind == SIGN_PLANES and text is not None:
            kept |= dict.fromkeys(text.encoders, "the router chooses students by its answer")
    return kept


def _result(source: Artifact, precision: str, kept: Collection[str]) -> Artifact:
    folder = PurePosixPath(source.format, precision)

    def place(name: str, path: PurePosixPath) -> str:
        if name in kept:
            return str(folder / name / path.name)
        return str(folder / (_first_of(source, str(path)) + path.suffix))

    networks = {
        name: NetworkFile(place(name, PurePosixPath(file.path)), file.signature)
        for name, file in source.networks.items()
    }
    name = f"{source.format}-{precision}"
    return replace(source, name=name, precision=precision, networks=networks, made_with={})


def _in_place(job: Job, base: Bundle) -> Job:
    """Let smaller networks lie where loaders look for them, if nothing of their format does."""
    taken = {item.format for item in base.artifacts.values() if item.name != job.result.name}
    if job.result.format in taken:
        return job
    return replace(job, result=replace(job.result, networks=job.source.networks))


def _carrying(job: Job, base: Bundle) -> Job:
    """Let what is not asked for stay as small as an earlier run made it of the same source."""
    held = base.artifacts.get(job.result.name)
    if held is None or held.made_with.get("source") != job.source.name:
        return job
    made = held.made_with["networks"]
    anew = {file.path for name, file in job.result.networks.items() if name not in job.kept}
    small = {
        name: file
        for name, file in held.networks.items()
        if job.kept.get(name) == NOT_ASKED and "kept" not in made[name] and file.path not in anew
    }
    result = replace(job.result, networks={**job.result.networks, **small})
    return replace(job, result=result, carried={name: made[name] for name in small})


def _make(bundle: Bundle, job: Job, config: Config, root: Path, progress: Progress) -> Artifact:
    made: dict[str, Any] = {}
    calls = _held_out_calls(bundle, job.source)
    runtime = plugins.find(plugins.RUNTIMES, job.result.runtime)
    for name, file in job.result.networks.items():
        source, path = bundle.path(job.source.networks[name].path), root / file.path
        if name in job.carried:
            made[name] = job.carried[name]
            continue
        if name in job.kept:
            bundle.copy(job.source.networks[name].path, path.parent)
            made[name] = {"kept": job.kept[name], "snr_db": finite_db(math.inf)}
            continue
        if not path.exists():  # several names may stand for one file
            made[name] = _compress(bundle, name, job, config, (source, path), progress)
        else:
            made[name] = {"same_as": _first_of(job.result, file.path)}
        network = CheckedNetwork(name, file.signature, runtime.open(path, file.signature, {}))
        made[name]["snr_db"] = _worst_db(job, network, calls.get(name, []))
    return replace(job.result, made_with={"source": job.source.name, "networks": made})


def _first_of(artifact: Artifact, path: str) -> str:
    return next(name for name, file in artifact.networks.items() if file.path == path)


def _compress(
    bundle: Bundle,
    name: str,
    job: Job,
    config: Config,
    paths: tuple[Path, Path],
    progress: Progress,
) -> dict[str, Any]:
    if isinstance(config, PtqConfig):
        signature = job.source.networks[name].signature
        batches = calibration_batches(bundle, name, signature, config.subset_size)
        return compress_nncf(*paths, job.source.format, config, batches, progress)
    if job.source.format == "coreml":
        from .with_coremltools import compress_coreml

        return compress_coreml(*paths, config.weight_format)
    return compress_nncf(*paths, job.source.format, config)


def _held_out_calls(bundle: Bundle, source: Artifact) -> dict[str, list[Call]]:
    """Return what the source's networks are fed and answer on golden samples, row by row of every table.

    One sample will do, but for several students, who answer for samples of their own.
    """
    calls: dict[str, list[Call]] = {}
    pipeline = Pipeline(bundle, source)
    for sampler, table in pipeline.samplers.items():
        golden = Golden.load(bundle.root / golden_file(sampler), table)
        count = 1 if table.router is None else None
        noise = [array[:count] for array in golden.noise]
        conditions = {name: value[:count] for name, value in golden.conditions.items()}
        for name, made in record_calls(table, pipeline.networks, noise, conditions).items():
            calls.setdefault(name, []).extend(made)
    return calls


def _worst_db(job: Job, network: CheckedNetwork, calls: Sequence[Call]) -> float:
    what = f"{job.result.name}, network `{network.name}`"
    try:
        worst = min(_decibels(network, calls), default=finite_db(math.inf))
    except ContractError as error:
        msg = f"{what}: {error} Nothing was written. {_way_out(job)}"
        raise CheckFailedError(msg) from error
    if worst < LEAST_DB:
        msg = (
            f"{what}: {worst:.1f} dB SNR against {job.source.name} on a held-out call, at least {LEAST_DB:.0f} dB "
            f"is required; nothing was written. {_way_out(job)}"
        )
        raise CheckFailedError(msg)
    return worst


def _way_out(job: Job) -> str:
    if job.result.precision == PtqConfig().precision:
        return "Calibrate on more samples, keep more of it in float with --ignored-scope, or quantize the weights alone with --weight-format int8."
    return "Take a --weight-format of more bits, or leave this network as it is: --networks names those to make smaller."


def _decibels(network: CheckedNetwork, calls: Sequence[Call]) -> Iterator[float]:
    for feeds, wanted in calls:
        got = network(feeds)
        for name, value in wanted.items():
            yield finite_db(compare(value, got[name]).snr_db)
