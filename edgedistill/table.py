"""The sampler as a table of numbers: stages and rows, JSON both ways.

A step is ``x0 = a_z*z + a_r*raw; z = b_z*z + b_x0*x0 + b_raw*raw + b_n*noise + sum(b_i*previous_i)``.
The rows of numbers are normative; everything under ``note`` and ``annotations`` is commentary that
`edgedistill.validate` derives again and compares. Coefficients are float64 and are written as the
shortest decimals that read back to the same bits; the state is float32.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.choices import Condition, Guidance, condition_problems, guidance_problems
from edgedistill.config import build, finite, rises
from edgedistill.errors import BundleError, ConfigError
from edgedistill.files import read_json, write_json
from edgedistill.router import CLASS_TABLE, Router

__all__ = ["Blend", "Condition", "Guidance", "Next", "Router", "Row", "SamplerTable", "Stage"]

SPEC_VERSION = "1.2"
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
class Blend:
    """Keeps a known part of the picture: ``z = mask*z + (1 - mask)*(known*image + noise*n[index])``.

    Fields:
        known: Multiplies the known image.
        noise: Multiplies the noise.
        index: Into the noise bank; None without noise.
        image, mask: Names of the conditions; the mask is 1 where the sampler draws and 0 where it keeps.
    """

    known: float
    noise: float = 0.0
    index: int | None = None
    image: str = "image"
    mask: str = "mask"


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
        blend: What is done to the state after this row, or None.
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
    blend: Blend | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Rows at one resolution.

    The first state is ``init_noise + init_image + carried``, where ``carried = carry_scale * resized + carry_noise``;
    with `carry_to` the rows' networks are given what is carried instead.

    Fields:
        shape: (channels, height, width) of the state.
        rows: At least one row.
        init_noise: (coefficient, index into the noise bank).
        init_image: (coefficient, name of an image condition), or None.
        carry: How the output of the stage before is resized, or None: one of `CARRIES`.
        carry_scale: Multiplies what is carried.
        carry_to: The network input that is given what is carried, and zeros in the stages that carry
            nothing to it; None: the first state.
        carry_noise: (coefficient, index into the noise bank) added to what is carried, or None.
    """

    shape: tuple[int, int, int]
    rows: tuple[Row, ...]
    init_noise: tuple[float, int] = (1.0, 0)
    init_image: tuple[float, str] | None = None
    carry: str | None = None
    carry_scale: float = 1.0
    carry_to: str | None = None
    carry_noise: tuple[float, int] | None = None

    @property
    def noises(self) -> tuple[int, ...]:
        """Indices into the noise bank in the order of their use."""
        used = [self.init_noise[1], self.carry_noise[1] if self.carry_noise else None]
        for row in self.rows:
            used += [row.noise, row.blend.index if row.blend else None]
        return tuple(index for index in used if index is not None)


@dataclass(frozen=True)
class SamplerTable:
    """A whole sampler.

    Fields:
        stages: One or more; the state of the last one is the output.
        noise_count: Size of the noise bank.
        state_input: The network input that takes the state.
        raw_output: The network output that is ``raw``.
        guidance, conditions: What the caller may choose.
        router: Which student makes which sample, or None for a single one.
        clamp: Range that the output is clipped to, or None.
        space: Meaning of the state: ``kind`` (pixel or latent), ``value_range`` of the output, and of latents
            ``scale`` and ``shift``: the state is ``(latent - shift) * scale``.
        decoder: The network that makes the output of the latent, or None: the last state is the output.
        encoder: The network that makes a latent of an image, for edits (see `edgedistill.edits`), or None.
        annotations: Commentary: method, scheduler configuration, prediction type, versions.
    """

    stages: tuple[Stage, ...]
    noise_count: int
    state_input: str = "sample"
    raw_output: str = "out_sample"
    guidance: Guidance = field(default_factory=Guidance)
    conditions: tuple[Condition, ...] = ()
    router: Router | None = None
    clamp: tuple[float, float] | None = None
    space: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "pixel", "value_range": [-1.0, 1.0]}
    )
    decoder: str | None = None
    encoder: str | None = None
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
        return sum(map(_evaluations, self.rows))

    @property
    def effective_nfe(self) -> float:
        """Network evaluations per sample, each counted by its share of the output's area."""
        _, height, width = self.stages[-1].shape
        return sum(
            _evaluations(row) * stage.shape[1] * stage.shape[2] / (height * width)
            for stage in self.stages
            for row in stage.rows
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that rows call, in order of first use, then of text encoder and decoder."""
        names: dict[str, None] = {}
        for name in (name for row in self.rows for name in row.call):
            routed = self.router is not None and name == self.router.network
            names |= dict.fromkeys(self.router.networks if self.router and routed else [name])
        others = [*(name for item in self.conditions for name in item.encoders), self.decoder]
        return tuple(names | dict.fromkeys(name for name in others if name is not None))

    def condition(self, kind: str) -> Condition | None:
        """Return the first condition of a kind, or None where there is none."""
        return next((item for item in self.conditions if item.kind == kind), None)

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


def _evaluations(row: Row) -> int:
    return 0 if not row.call else 1 if row.guidance_scale is None else 2


def _problems(table: SamplerTable) -> Iterator[str]:
    if not table.stages or not all(stage.rows for stage in table.stages):
        yield "every table needs a stage and every stage a row"
    conditions = {item.name: item for item in table.conditions}
    yield from _name_problems(table)
    for item in table.conditions:
        yield from condition_problems(item)
    yield from guidance_problems(table.guidance, conditions)
    before: Stage | None = None
    for index, stage in enumerate(table.stages):
        where = f"stage {index}"
        yield from _stage_problems(stage, before, where)
        yield from _picture_problems(stage, conditions, where)
        for position, row in enumerate(stage.rows):
            yield from _row_problems(row, f"{where}, row {position}", table.guidance.mode)
            needed = len(row.next.previous)
            earlier = stage.rows[max(position - needed, 0) : position]
            if len(earlier) < needed or not all(item.call for item in earlier):
                yield f"{where}, row {position}: uses the x0 of more rows than came before it"
        before = stage
    used = [index for stage in table.stages for index in stage.noises]
    if len(used) != table.noise_count or used != list(range(len(used))):
        yield f"every noise of the bank is used once and in order, got {used} of {table.noise_count}"
    yield from _range_problems(table)
    yield from _router_problems(table, conditions)


def _name_problems(table: SamplerTable) -> Iterator[str]:
    taken = [item.name for item in table.conditions]
    taken += {stage.carry_to for stage in table.stages if stage.carry_to is not None}
    if len({*taken, table.state_input}) <= len(taken):
        yield f"conditions and what is carried need names of their own, got {', '.join(sorted(taken))}"
    if sum(item.kind == "text" for item in table.conditions) > 1:
        yield "a table takes one text"


def _picture_problems(
    stage: Stage, conditions: Mapping[str, Condition], where: str
) -> Iterator[str]:
    """Check the images and masks that a stage takes from the caller: in its size, or to be encoded, a multiple of it."""
    single = (1, *stage.shape[1:])
    wanted = [] if stage.init_image is None else [(stage.init_image[1], "image", stage.shape)]
    for blend in (row.blend for row in stage.rows if row.blend is not None):
        wanted += [(blend.image, "image", stage.shape), (blend.mask, "mask", single)]
    taken = [conditions.get(name) for name, *_ in wanted]
    is_latent = any(item is not None and item.encoder is not None for item in taken)
    for name, kind, shape in dict.fromkeys(wanted):
        found = conditions.get(name)
        size = None if found is None or found.kind != kind else found.shape
        covers = size is not None and not any(
            big % small for big, small in zip(size[1:], shape[1:], strict=True)
        )
        if size != shape and not (is_latent and covers):
            yield f"{where}: needs a condition `{name}` of kind {kind} and shape {list(shape)}"


def _router_problems(table: SamplerTable, conditions: Mapping[str, Condition]) -> Iterator[str]:
    router = table.router
    if router is None:
        return
    yield from router.problems()
    if not any(router.network in row.call for row in table.rows):
        yield f"the router is for `{router.network}`, which no row calls"
    found = conditions.get(router.on)
    if router.kind == CLASS_TABLE and (found is None or found.size != len(router.table)):
        yield f"the router needs a student for each class of a condition `{router.on}`"
    if router.kind != CLASS_TABLE and not any(item.kind == "text" for item in table.conditions):
        yield f"the router takes `{router.on}` of a text, and there is no condition of that kind"


def _range_problems(table: SamplerTable) -> Iterator[str]:
    span = table.space.get("value_range")
    if not (isinstance(span, list | tuple) and len(span) == 2 and rises(*span)):
        yield f"space needs a `value_range` [low, high], got {span!r}"
    scale, shift = table.space.get("scale", 1.0), table.space.get("shift", 0.0)
    if table.decoder is not None and not (finite(scale, shift) and scale != 0):
        yield f"latents to decode need a `scale` and a `shift`, got {scale!r} and {shift!r}"
    if table.clamp is not None and not rises(*table.clamp):
        yield f"clamp range {list(table.clamp)} is empty"


def _stage_problems(stage: Stage, before: Stage | None, where: str) -> Iterator[str]:
    numbers = [stage.init_noise[0], stage.carry_scale, *(stage.carry_noise or ())]
    if min(stage.shape) < 1 or not finite(*numbers, *(stage.init_image or ())[:1]):
        yield f"{where}: sizes must be positive and coefficients finite"
    if stage.carry is not None and stage.carry not in CARRIES:
        yield f"{where}: carry must be one of {', '.join(CARRIES)}, got {stage.carry!r}"
    if (stage.carry is None) != (before is None):
        yield f"{where}: the first stage carries nothing, every later one something"
    elif before is None and (stage.carry_to, stage.carry_noise) != (None, None):
        yield f"{where}: there is nothing to carry"
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
    if not finite(*numbers, row.guidance_scale or 0.0):
        yield f"{where}: all coefficients must be finite plain numbers"
    elif row.clip is not None and not rises(*row.clip):
        yield f"{where}: clip range {list(row.clip)} is empty"
    if not row.call and (row.next.x0 != 0 or row.next.raw != 0):
        yield f"{where}: calls no network and has no x0 or raw to use"
    if (row.noise is None) != (row.next.noise == 0):
        yield f"{where}: a noise index and a noise coefficient come together"
    if row.blend is not None:
        if not finite(row.blend.known, row.blend.noise):
            yield f"{where}: the blend's coefficients must be finite"
        if (row.blend.index is None) != (row.blend.noise == 0):
            yield f"{where}: a blend's noise and its index come together"
    if (row.guidance_scale is not None) != (mode == "cfg" and bool(row.call)):
        yield f"{where}: `guidance_scale` is there exactly when the guidance mode is 'cfg'"
