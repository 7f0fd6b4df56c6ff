"""The parity report in rows of text, for the terminal and the page alike."""

import math

from edgedistill.parity import Agreement, ArtifactParity, Floor

HEADERS = (
    "artifact",
    "runtime",
    "precision",
    "MiB",
    "forced dB",
    "free dB",
    "image dB",
    "PSNR dB",
    "max abs",
    "cosine",
    "gain",
    "ms/call",
    "verdict",
)
LEGEND = (
    "forced dB: SNR of the worst row's prediction, each row fed the reference's state, and that row (@). "
    "free dB: SNR of the worst row's state when the artifact runs by itself. "
    "image dB, PSNR dB (peak {peak:g}), max abs, cosine: the finished samples. "
    "gain: response to a changed condition against the reference's, 1 is the same. "
    "ms/call: median time of one network evaluation at batch {batch}."
)


def cells(item: ArtifactParity) -> list[str]:
    """Return one artifact's line under `HEADERS`."""
    image = item.image
    return [
        item.name,
        item.runtime,
        item.precision,
        f"{item.size / 2**20:.2f}",
        _worst(item.worst_forced),
        _worst(item.worst_free),
        decibel(image.snr_db if image else None),
        decibel(image.psnr_db if image else None),
        f"{image.max_abs:.2g}" if image else "-",
        cosine(image),
        " ".join(f"{gain:.3f}" for gain in item.sensitivity.values()) or "-",
        "-" if item.call_ms is None else f"{item.call_ms:.3g}",
        item.verdict,
    ]


def decibel(value: float | None) -> str:
    """Write dB with one digit; a dash for none, ``inf`` for equal bits."""
    return "-" if value is None else f"{value:.1f}"


def cosine(agreement: Agreement | None) -> str:
    """Write a cosine with as many digits as its distance from 1 needs."""
    if agreement is None:
        return "-"
    distance = abs(1 - agreement.cosine)
    digits = 4 if distance > 1e-4 else min(10, 1 - math.floor(math.log10(max(distance, 1e-9))))
    return f"{agreement.cosine:.{digits}f}"


def required(floor: Floor) -> str:
    """Write a floor in one line."""
    return (
        f"forced {floor.raw:g} dB, free {floor.free:g} dB, image {floor.image:g} dB, "
        f"gain 1 ± {floor.sensitivity:g}"
    )


def _worst(found: tuple[int, float] | None) -> str:
    return "-" if found is None else f"{found[1]:.1f} @{found[0]}"
