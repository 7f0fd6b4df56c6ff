"""The sampler as a table of numbers: stages and rows, JSON both ways.

A step is ``x0 = a_z*z + a_r*raw; z = b_z*z + b_x0*x0 + b_raw*raw + b_n*noise + sum(b_i*previous_i)``.
The rows of numbers are normative; everything under ``note`` and ``annotations`` is commentary that
`edgedistill.validate` derives again and compares. Coefficients are float64 and are written as the
shortest decimals that read back to the same bits; the state is float32.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.config import build
from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json, write_json

SPEC_VERSION = "1.0"
GUIDANCE_MODES = ("none", "cfg", "embedded", "baked")
CONDITION_KINDS = ("class",)
CARRIES = ("identity", "up_nearest", "area_down")


@dataclass(frozen=True)
class Next:
    """Coefficients of the state after a row.

    Fields:
        z, x0, raw, noise: Multiply the state, the estimate of x, the raw prediction, the noise.
        previous: Multiply the x0 of the last row, of the one before it, and so on (multistep solvers).
    """

    z: float = 0.0
    x0: float = 0.0
    raw: float = 0.0
    noise: float = 0.0
    previous: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Fields:
        call: Names of the networks to call in order, outputs of one feeding the next; empty: none.
        feeds: Numbers fed to the network by input name, such as ``{"timestep": 999.0}``.
        in_scale: Multiplies the state before the network sees it.
        guidance_scale: g of ``uncond + g*(cond - uncond)``; None: a single call.
        x0: (a_z, a_r) of ``x0 = a_z*z + a_r*raw``.
        clip: Range that x0 is clipped to, or None.
        next: Coefficients of the state after this row.
        noise: Index into the noise bank, or None.
        note: Commentary: ``t``, ``s``, ``kind``.
    """

    call: tuple[str, ...]
    feeds: Mapping[str, float] = field(default_factory=dict)
    in_scale: float = 1.0
    guidance_scale: float | None = None
    x0: tuple[float, float] = (1.0, 0.0)
    clip: tuple[float, float] | None = None
    next: Next = field(default_factory=Next)
    noise: int | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Rows at one resolution.

    Fields:
        shape: (channels, height, width) of the state.
        rows: At least one row.
        init_noise: (coefficient, index into the noise bank) of the first state.
        carry: How the output of the stage before enters the first state, or None: one of `CARRIES`.
        carry_scale: Multiplies what is carried.
    """

    shape: tuple[int, int, int]
    rows: tuple[Row, ...]
    init_noise: tuple[float, int] = (1.0, 0)
    carry: str | None = None
    carry_scale: float = 1.0


@dataclass(frozen=True)
class Guidance:
    """How guidance enters.

    Fields:
        mode: ``none``; ``cfg`` (two calls per row); ``embedded`` (a network input); ``baked``.
        input: The network input, for ``embedded``; it is fed ``scale - 1`` (Meng's w).
        default: guidance_scale g used when the caller gives none; g = 1 is no guidance.
        range: Smallest and largest g that the network was trained for.
        null: Values of the conditions that stand for "no condition", for ``cfg``.
    """

    mode: str = "none"
    input: str | None = None
    default: float = 1.0
    range: tuple[float, float] = (1.0, 1.0)
    null: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """One thing the caller supplies per sample.

    Fields:
        name: The network input it feeds.
        kind: ``class`` for now; ``text`` and ``image`` belong to later networks.
        size: Number of classes the caller may choose from; None where that has no meaning.
    """

    name: str
    kind: str
    size: int | None = None


@dataclass(frozen=True)
class SamplerTable:
    """A whole sampler.

    Fields:
        stages: One or more; the state of the last one is the output.
        noise_count: Size of the noise bank.
        state_input: The network input that takes the state.
        raw_output: The network output that is ``raw``.
        guidance, conditions: What the caller may choose.
        clamp: Range that the output is clipped to, or None.
        space: Meaning of the output: ``kind`` (pixel or latent), ``value_range``, ``scale``, ``shift``.
        annotations: Commentary: method, scheduler configuration, prediction type, versions.
    """

    stages: tuple[Stage, ...]
    noise_count: int
    state_input: str = "sample"
    raw_output: str = "out_sample"
    guidance: Guidance = field(default_factory=Guidance)
    conditions: tuple[Condition, ...] = ()
    clamp: tuple[float, float] | None = None
    space: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "pixel", "value_range": [-1.0, 1.0]}
    )
    annotations: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            msg = "The sampler table cannot be run: " + "; ".join(problems[:5]) + "."
            raise ConfigError(msg)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows of all stages in order."""
        return tuple(row for stage in self.stages for row in stage.rows)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, counted: unbaked guidance doubles a row."""
        return sum((2 if row.guidance_scale is not None else 1) for row in self.rows if row.call)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that rows call, in order of first use."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.call))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        body = _plain(dataclasses.asdict(self))
        return {"spec_version": SPEC_VERSION, "nfe": self.nfe, **body}

    @classmethod
    def from_json(cls, data: Any, source: str = "sampler table") -> "SamplerTable":
        """Read what `to_json` wrote.

        Raises:
            BundleError: If the version is newer than this reader, a field is unknown, missing or of
                the wrong type, or the numbers contradict each other.
        """
        if not isinstance(data, dict):
            msg = f"{source}: expected a JSON object, got {type(data).__name__}."
            raise BundleError(msg)
        check_version(data.get("spec_version"), SPEC_VERSION, source)
        body = {key: value for key, value in data.items() if key not in ("spec_version", "nfe")}
        try:
            table = build(cls, body, source)
        except ConfigError as error:
            raise BundleError(str(error)) from error
        if data.get("nfe") != table.nfe:
            msg = f"{source}: `nfe` says {data.get('nfe')!r}, but the rows make {table.nfe} calls."
            raise BundleError(msg)
        return table

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "SamplerTable":
        """Read a table from a JSON file.

        Raises:
            BundleError: As `from_json`, or if the file is missing or no JSON.
        """
        return cls.from_json(read_json(path), str(path))


def check_version(found: Any, known: str, source: str) -> None:
    """Refuse data whose major version is newer than the one this reader knows.

    Raises:
        BundleError: If the version is missing, malformed or of a newer major.
    """
    try:
        major = int(str(found).split(".")[0])
    except ValueError:
        msg = f"{source}: version must look like {known!r}, got {found!r}."
        raise BundleError(msg) from None
    if major > int(known.split(".", maxsplit=1)[0]):
        msg = f"{source}: version {found} is newer than {known}, the newest this release reads; upgrade edgedistill."
        raise BundleError(msg)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _problems(table: SamplerTable) -> Iterator[str]:
    if not table.stages or not all(stage.rows for stage in table.stages):
        yield "every table needs a stage and every stage a row"
    yield from _guidance_problems(table.guidance, {item.name for item in table.conditions})
    if unknown := sorted({item.kind for item in table.conditions} - set(CONDITION_KINDS)):
        yield f"condition kind must be {' or '.join(CONDITION_KINDS)}, got {', '.join(unknown)}"
    used: list[int] = []
    before: Stage | None = None
    for index, stage in enumerate(table.stages):
        yield from _stage_problems(stage, before, f"stage {index}")
        used.append(stage.init_noise[1])
        for position, row in enumerate(stage.rows):
            yield from _row_problems(row, f"stage {index}, row {position}", table.guidance.mode)
            used += [] if row.noise is None else [row.noise]
            needed = len(row.next.previous)
            earlier = stage.rows[max(position - needed, 0) : position]
            if len(earlier) < needed or not all(item.call for item in earlier):
                yield f"stage {index}, row {position}: uses the x0 of more rows than came before it"
        before = stage
    if len(used) != table.noise_count or used != list(range(len(used))):
        yield f"every noise of the bank is used once and in order, got {used} of {table.noise_count}"
    yield from _range_problems(table)


def _range_problems(table: SamplerTable) -> Iterator[str]:
    span = table.space.get("value_range")
    if not (isinstance(span, list | tuple) and len(span) == 2 and _rise(*span)):
        yield f"space needs a `value_range` [low, high], got {span!r}"
    if table.clamp is not None and not _rise(*table.clamp):
        yield f"clamp range {list(table.clamp)} is empty"


def _guidance_problems(guidance: Guidance, conditions: set[str]) -> Iterator[str]:
    if guidance.mode not in GUIDANCE_MODES:
        yield f"guidance mode must be one of {', '.join(GUIDANCE_MODES)}, got {guidance.mode!r}"
    if (guidance.mode == "embedded") != (guidance.input is not None):
        yield "guidance has an `input` exactly when its mode is 'embedded'"
    if (guidance.mode == "cfg") != bool(guidance.null) or not set(guidance.null) <= conditions:
        yield "guidance has `null` values of conditions exactly when its mode is 'cfg'"
    low, high = guidance.range
    if not _finite(low, high, guidance.default) or not low <= guidance.default <= high:
        yield f"guidance default {guidance.default} is outside of its range [{low}, {high}]"


def _stage_problems(stage: Stage, before: Stage | None, where: str) -> Iterator[str]:
    if min(stage.shape) < 1 or not _finite(stage.init_noise[0], stage.carry_scale):
        yield f"{where}: sizes must be positive and coefficients finite"
    if stage.carry is not None and stage.carry not in CARRIES:
        yield f"{where}: carry must be one of {', '.join(CARRIES)}, got {stage.carry!r}"
    if (stage.carry is None) != (before is None):
        yield f"{where}: the first stage carries nothing, every later one something"
    elif before is not None and not _carries(before.shape, str(stage.carry), stage.shape):
        yield f"{where}: {stage.carry} does not lead from {list(before.shape)} to {list(stage.shape)}"


def _carries(before: tuple[int, ...], carry: str, after: tuple[int, ...]) -> bool:
    if carry == "identity":
        return before == after
    small, large = (before, after) if carry == "up_nearest" else (after, before)
    sizes = zip(large, small, strict=True)
    return before[0] == after[0] and all(high % max(low, 1) == 0 for high, low in sizes)


def _row_problems(row: Row, where: str, mode: str) -> Iterator[str]:
    numbers = [*row.feeds.values(), row.in_scale, *row.x0, *(row.clip or ())]
    numbers += [row.next.z, row.next.x0, row.next.raw, row.next.noise, *row.next.previous]
    if not _finite(*numbers, row.guidance_scale or 0.0):
        yield f"{where}: all coefficients must be finite plain numbers"
    elif row.clip is not None and not _rise(*row.clip):
        yield f"{where}: clip range {list(row.clip)} is empty"
    if not row.call and (row.next.x0 != 0 or row.next.raw != 0):
        yield f"{where}: calls no network and has no x0 or raw to use"
    if (row.noise is None) != (row.next.noise == 0):
        yield f"{where}: a noise index and a noise coefficient come together"
    if (row.guidance_scale is not None) != (mode == "cfg" and bool(row.call)):
        yield f"{where}: `guidance_scale` is there exactly when the guidance mode is 'cfg'"


def _finite(*numbers: Any) -> bool:
    # A numpy float64 would lift a float32 state to float64, so the type is looked at too.
    top = sys.float_info.max
    return all(type(item) in (int, float) and -top <= item <= top for item in numbers)


def _rise(low: Any, high: Any) -> bool:
    return _finite(low, high) and low < high
