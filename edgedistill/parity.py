"""Parity of artifacts with their reference: the one table of floors, and the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edgedistill.agreement import Agreement
from edgedistill.errors import ConfigError
from edgedistill.tables import DEFAULT


@dataclass(frozen=True)
class Floor:
    """What an artifact of one precision must reach.

    Fields:
        raw: dB SNR of each row's raw prediction, teacher-forced: the network alone, before guidance of two
            calls, which magnifies their rounding by up to sqrt(g^2 + (g - 1)^2) at scale g.
        free: dB SNR of each row's state, free-running: errors have piled up.
        image: dB SNR of the finished samples.
        sensitivity: Largest distance from 1 of the gain (see `edgedistill.agreement.response_gain`) for every condition.
        reason: Why these numbers.
        rounding: How far rounding may move the samples along a response, as a share of their size: two fifths of
            float16's 2e-3 (54 dB), in which Core ML runs its smaller weights too; 0.37 were seen on a tiny pipeline.
    """

    raw: float
    free: float
    image: float
    sensitivity: float
    reason: str
    rounding: float = 8e-4

    @property
    def faint(self) -> float:
        """The least response, as a share of the samples, whose gain rounding moves by `sensitivity` at most."""
        return self.rounding / self.sensitivity

    def excuses(self, gain: float, share: float) -> bool:
        """Tell whether a gain is no measure: the response is fainter than `faint`, and rounding can have made the gain.

        A faint condition that a graph ignores, or takes for another, is not excused.

        Args:
            gain: See `edgedistill.agreement.response_gain`.
            share: See `edgedistill.agreement.response_share`.
        """
        return share < self.faint and abs(gain - 1) <= self.sensitivity + self.rounding / share


FLOORS: Mapping[str, Floor] = {
    "float32": Floor(
        100.0,
        100.0,
        100.0,
        0.001,
        "Only the order of summation differs. A weight off by half, a bias off by 0.01 or the wrong GELU "
        "leaves 63 to 89 dB, so a lower floor would hide a wrong graph.",
        1e-6,
    ),
    "float16": Floor(
        50.0,
        45.0,
        45.0,
        0.02,
        "Rounding to 11 bits leaves 52 to 57 dB where the timestep embedding stays in float32; "
        "41 dB at the noisiest timestep is what it gives when it does not.",
    ),
    "int8-weights": Floor(
        33.0,
        30.0,
        30.0,
        0.1,
        "256 levels per output channel, activations untouched: 40 dB on the digits student, 37 on random "
        "weights, 35 on a text-to-image UNet of 860 million; 2 to 3 dB are left for other weights.",
    ),
    "palette6": Floor(
        23.0,
        20.0,
        20.0,
        0.15,
        "64 values per weight tensor: 32 dB on the digits student, 26 on random weights.",
    ),
    "palette4": Floor(
        10.0,
        8.0,
        8.0,
        0.3,
        "16 values per weight tensor, two bits (12 dB) below palette6: for trying out, not for shipping.",
    ),
    "int8": Floor(
        25.0,
        24.0,
        24.0,
        0.2,
        "256 levels for weights and for activations, whose range is shared by all rows: 32 dB on the digits "
        "student, 29 on random weights; calibration off the student's rows or on too few leaves 9 to 18.",
    ),
}


def floor_of(precision: str) -> Floor:
    """Return the floor of a precision.

    Raises:
        ConfigError: If there is none.
    """
    if precision not in FLOORS:
        msg = f"No parity floor for precision {precision!r}; there is one for: {', '.join(FLOORS)}."
        raise ConfigError(msg)
    return FLOORS[precision]


@dataclass(frozen=True)
class RowParity:
    """One row of the table.

    Fields:
        index: Position in the table.
        timestep: The label the network is fed; None where no network is called.
        raw, x0, next: Teacher-forced, from the reference's state: the prediction, the estimate of x and
            the state after the row; the first two are None where no network is called. The prediction is
            the network's own: where guidance makes one of two calls, it is both calls' together.
        free: Free-running, from this artifact's own state: the state after the row.
        raw, x0, next, free: None also where a device wrote no such array.
        guided: Teacher-forced, the prediction after guidance of two calls; else None.
    """

    index: int
    timestep: float | None
    raw: Agreement | None
    x0: Agreement | None
    next: Agreement | None
    free: Agreement | None
    guided: Agreement | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        forced = {"raw": self.raw, "guided": self.guided, "x0": self.x0, "next": self.next}
        return {
            "index": self.index,
            "timestep": self.timestep,
            "teacher_forced": {k: v.to_json() for k, v in forced.items() if v is not None},
            "free_running": {} if self.free is None else {"next": self.free.to_json()},
        }


@dataclass(frozen=True)
class ArtifactParity:
    """One artifact against the reference, on one sampler.

    Fields:
        name, runtime, format, precision: As in the manifest.
        size: Bytes on disk.
        sampler: Name of the sampler.
        described: What ran it, in the runtime's own words.
        rows, image: The comparisons; empty and None where it was skipped or broke.
        sensitivity: Gain of the output's response to each condition, by the condition's name.
        faint: Conditions whose response in the reference is too small for a gain (see `Floor.excuses`).
        load_ms: Milliseconds to open it.
        call_ms: Median milliseconds of one network evaluation of the whole probe batch.
        skipped: Why it was not run, and how to run it; None if it was.
        broken: Why it could not finish; None if it did.
        output: Its samples (batch, channels, height, width); not part of the JSON.
        reference: The reference's of the same noise and conditions; not part of the JSON.
    """

    name: str
    runtime: str
    format: str
    precision: str
    size: int
    sampler: str = DEFAULT
    described: str = ""
    rows: tuple[RowParity, ...] = ()
    image: Agreement | None = None
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    faint: tuple[str, ...] = ()
    load_ms: float | None = None
    call_ms: float | None = None
    skipped: str | None = None
    broken: str | None = None
    output: np.ndarray | None = field(default=None, repr=False, compare=False)
    reference: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def label(self) -> str:
        """Its name, with that of a sampler that is not the default."""
        return self.name if self.sampler == DEFAULT else f"{self.name}, {self.sampler}"

    @property
    def floor(self) -> Floor:
        """What its precision must reach."""
        return floor_of(self.precision)

    @property
    def worst_forced(self) -> tuple[int, float] | None:
        """Row and dB SNR of the worst raw prediction, teacher-forced."""
        found = [(row.index, row.raw.snr_db) for row in self.rows if row.raw is not None]
        return min(found, key=lambda item: item[1], default=None)

    @property
    def worst_free(self) -> tuple[int, float] | None:
        """Row and dB SNR of the worst state, free-running."""
        found = [(row.index, row.free.snr_db) for row in self.rows if row.free is not None]
        return min(found, key=lambda item: item[1], default=None)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence per measure below its floor."""
        who = f"{self.runtime} {self.precision} {self.label!r}"
        if self.broken is not None:
            return (f"{who}: {self.broken}",)
        measured = [
            (self.worst_forced, self.floor.raw, "teacher-forced"),
            (self.worst_free, self.floor.free, "free-running"),
        ]
        found = [
            f"{who}: {worst[1]:.1f} dB SNR at row {worst[0]} ({how}) against the reference, "
            f"at least {floor:.1f} dB is required."
            for worst, floor, how in measured
            if worst is not None and worst[1] < floor
        ]
        if self.image is not None and self.image.snr_db < self.floor.image:
            found.append(
                f"{who}: {self.image.snr_db:.1f} dB SNR of the samples against the reference, "
                f"at least {self.floor.image:.1f} dB is required (largest difference {self.image.max_abs:.3g})."
            )
        allowed = self.floor.sensitivity
        found += [
            f"{who}: a change of `{name}` moves the samples {gain:.3f} times as far as the reference's, "
            f"{1 - allowed:.3f} to {1 + allowed:.3f} is required."
            for name, gain in self.sensitivity.items()
            if abs(gain - 1) > allowed
        ]
        return tuple(found)

    @property
    def verdict(self) -> str:
        """``ok``, ``failed`` or ``skipped``."""
        if self.skipped is not None:
            return "skipped"
        return "failed" if self.failures else "ok"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        named = (
            "name",
            "sampler",
            "runtime",
            "format",
            "precision",
            "verdict",
            "described",
            "size",
        )
        return {
            **{name: getattr(self, name) for name in named},
            "load_ms": self.load_ms,
            "call_ms": self.call_ms,
            "rows": [row.to_json() for row in self.rows],
            "image": self.image and self.image.to_json(),
            "sensitivity": dict(self.sensitivity),
            "faint": list(self.faint),
            "failures": list(self.failures),
            "skipped": self.skipped,
        }


@dataclass(frozen=True)
class ParityReport:
    """Every artifact of one student against the reference.

    Fields:
        name, fingerprint: Of the student, as in the manifest.
        batch: Samples in the probe.
        value_range: Values of black and white.
        artifacts: In the order of the bundles.
        environment: Versions, for the reader of the report.
        reference: The reference's samples of the default sampler (batch, channels, height, width); not part of the JSON.
    """

    name: str
    fingerprint: str
    batch: int
    value_range: tuple[float, float]
    artifacts: tuple[ArtifactParity, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    reference: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def failures(self) -> tuple[str, ...]:
        """Every artifact's failures."""
        return tuple(sentence for item in self.artifacts for sentence in item.failures)

    @property
    def ok(self) -> bool:
        """Whether at least one artifact was run and none failed."""
        verdicts = {item.verdict for item in self.artifacts}
        return "ok" in verdicts and "failed" not in verdicts

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions of the artifacts, in order of first appearance."""
        return tuple(dict.fromkeys(item.precision for item in self.artifacts))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "ok": self.ok,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "batch": self.batch,
            "value_range": list(self.value_range),
            "artifacts": [item.to_json() for item in self.artifacts],
            "floors": {name: asdict(floor_of(name)) for name in self.precisions},
            "environment": dict(self.environment),
        }
