"""The parity report in rows of text, for the terminal and the page alike."""

from edgedistill.parity import ArtifactParity, Floor, ParityReport

DEVICE = "device"
"""In the place of a runtime's name, where an app wrote arrays by itself."""
HEADERS = (
    "artifact",
    "verdict",
    "runtime",
    "precision",
    "MB",
    "forced dB",
    "free dB",
    "image dB",
    "PSNR dB",
    "max abs",
    "1-cos",
    "gain",
    "ms/call",
)
LEGEND = (
    "forced dB: SNR of the worst row's prediction, each row fed the reference's state, and that row (@). "
    "free dB: SNR of the worst row's state when the artifact runs by itself. "
    "image dB, PSNR dB (peak {peak:g}), max abs, 1-cos (one minus the cosine): the finished "
    "samples. gain: how far a changed condition moves the samples, the reference being 1; the worst condition. "
    "ms/call: median time of one network evaluation at batch {batch}."
)


def cells(item: ArtifactParity) -> list[str]:
    """Return one artifact's line under `HEADERS`."""
    image = item.image
    return [
        item.label,
        item.verdict,
        item.runtime,
        item.precision,
        f"{item.size / 1e6:.3f}" if item.size else "-",
        _worst(item.worst_forced),
        _worst(item.worst_free),
        decibel(image.snr_db if image else None),
        decibel(image.psnr_db if image else None),
        f"{image.max_abs:.2g}" if image else "-",
        f"{max(0.0, 1 - image.cosine):.1g}" if image else "-",
        _gain(item),
        "-" if item.call_ms is None else f"{item.call_ms:.1f}",
    ]


def notes(report: ParityReport) -> list[str]:
    """Return what was not compared, and why, and what of a device was."""
    written = [
        f"{item.name}: compared were {item.described}."
        for item in report.artifacts
        if item.runtime == DEVICE
    ]
    skipped = [f"{item.name} skipped: {item.skipped}" for item in report.artifacts if item.skipped]
    faint = {
        (item.precision, item.sampler, name): item.floor.faint
        for item in report.artifacts
        for name in item.faint
    }
    faintly = [
        f"No gain in {precision} for {name} (sampler {sampler}): it moves the reference's samples by less "
        f"than {least:.2g} of their size."
        for (precision, sampler, name), least in faint.items()
    ]
    return [*written, *skipped, *faintly]


def decibel(value: float | None) -> str:
    """Write dB with one digit; a dash for none, ``inf`` for equal bits."""
    return "-" if value is None else f"{value:.1f}"


def required(floor: Floor) -> str:
    """Write a floor in one line."""
    return (
        f"forced {floor.raw:g} dB, free {floor.free:g} dB, image {floor.image:g} dB, "
        f"gain 1 ± {floor.sensitivity:g}"
    )


def _worst(found: tuple[int, float] | None) -> str:
    return "-" if found is None else f"{found[1]:.1f} @{found[0]}"


def _gain(item: ArtifactParity) -> str:
    worst = max(item.sensitivity.values(), key=lambda gain: abs(gain - 1), default=None)
    return "-" if worst is None else f"{worst:.3f}"
