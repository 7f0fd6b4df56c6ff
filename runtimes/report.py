"""The parity report as one self-contained HTML page."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from edgedistill import images, page
from edgedistill.page import Html
from edgedistill.parity import ArtifactParity, ParityReport, RowParity, floor_of
from edgedistill.plot import line_plot
from edgedistill.tables import DEFAULT

from .summary import HEADERS, LEGEND, cells, decibel, notes, required

_MOODS = {"ok": "good", "failed": "bad", "skipped": "none"}
_SHOWN = 16
_GRID_WIDTH = 240
_DARK = 32


def render(report: ParityReport) -> str:
    """Return the page."""
    return page.document(
        f"Parity of {report.name}",
        page.paragraph(_verdict(report)),
        page.bullets([page.joined(page.badge("failed", "bad"), s) for s in report.failures])
        if report.failures
        else "",
        *parity_sections(report),
        environment(report.environment),
    )


def parity_sections(report: ParityReport) -> list[Html]:
    """Return all that a page can show of a report, in reading order."""
    return [
        summary(report),
        rows(report),
        samples(report),
        numbers(report),
        floors(report),
    ]


def summary(report: ParityReport) -> Html:
    """Return the table with one line per artifact."""
    width = report.value_range[1] - report.value_range[0]
    verdict = HEADERS.index("verdict")
    lines = [cells(item) for item in report.artifacts]
    for line in lines:
        line[verdict] = page.badge(line[verdict], _MOODS[line[verdict]])
    told = notes(report)
    return page.section(
        "Every artifact against PyTorch",
        page.table(HEADERS, lines, left=(0, 1, 2, 3)),
        page.bullets(told) if told else "",
        page.paragraph(page.muted(LEGEND.format(peak=width, batch=report.batch))),
    )


def rows(report: ParityReport) -> Html:
    """Return the per-row plots of one sampler, teacher-forced and free-running."""
    return page.section(
        "Row by row",
        page.paragraph(
            "Teacher-forced: every row is fed the reference's state, so that only the network's own error "
            "shows. Free-running: each row goes on from the last, so that errors pile up. "
            "Dashed: what each precision must reach. On the upper edge: no bit differs."
        ),
        _plot(report, "raw prediction, teacher-forced", _forced_db, lambda f: floor_of(f).raw),
        _plot(report, "state, free-running", _free_db, lambda f: floor_of(f).free),
    )


def samples(report: ParityReport) -> Html:
    """Return grids of one sampler side by side, and under each its difference from the reference."""
    if report.reference is None:
        return Html("")
    figures = [_grid(report.reference[:_SHOWN], report, "PyTorch, the reference", "")]
    for item in _of_one_sampler(report):
        if item.output is not None and item.reference is not None:
            reference, shown = item.reference[:_SHOWN], item.output[:_SHOWN]
            note = f"{decibel(item.image.snr_db if item.image else None)} dB SNR"
            grids = _grid(shown, report, item.name, note)
            figures.append(page.joined(grids, _difference(reference, shown, item.name, report)))
    return page.section(
        "Samples from the same noise",
        page.paragraph(
            "Under each sheet its difference from the reference: black is none, white the amount that the "
            "caption states; for colour, the largest of the channels."
        ),
        page.gallery(*[Html(f"<div>{figure}</div>") for figure in figures]),
    )


def numbers(report: ParityReport) -> Html:
    """Return every number of every row, to unfold."""
    return page.section(
        "All numbers",
        *[
            page.details(
                f"{item.label}: {item.described}, loaded in {item.load_ms or 0:.0f} ms",
                page.table(
                    (
                        "row",
                        "timestep",
                        "raw dB",
                        "guided dB",
                        "x0 dB",
                        "next dB",
                        "free dB",
                        "raw max",
                        "free max",
                    ),
                    [_row_cells(row) for row in item.rows],
                    left=(),
                ),
            )
            for item in report.artifacts
            if item.rows
        ],
    )


def floors(report: ParityReport) -> Html:
    """Return what each precision must reach, with the reason."""
    lines = [[p, required(floor_of(p)), floor_of(p).reason] for p in report.precisions]
    return page.section(
        "What is required, and why",
        page.table(("precision", "at least", "because"), lines, left=(0,), prose=(1, 2)),
    )


def environment(versions: Mapping[str, str]) -> Html:
    """Return the versions under which the numbers came about."""
    return page.section(
        "Made with",
        page.table(("what", "version"), [[k, v] for k, v in versions.items()], left=(0, 1)),
    )


def _of_one_sampler(report: ParityReport) -> list[ArtifactParity]:
    """Return what ran the default sampler; where nothing did, what ran the same as the first."""
    names = [item.sampler for item in report.artifacts]
    shown = DEFAULT if DEFAULT in names else names[0]
    return [item for item in report.artifacts if item.sampler == shown]


def _verdict(report: ParityReport) -> Html:
    counts = {word: sum(i.verdict == word for i in report.artifacts) for word in _MOODS}
    run = counts["ok"] + counts["failed"]
    sentence = f"{counts['ok']} of {run} artifacts agree with the PyTorch reference"
    sentence += f"; {counts['skipped']} skipped." if counts["skipped"] else "."
    mark = page.badge("passed", "good") if report.ok else page.badge("failed", "bad")
    student = page.muted(f"Student {report.fingerprint[:12]}, {report.batch} samples in the probe.")
    return page.joined(mark, sentence, student)


def _plot(
    report: ParityReport,
    title: str,
    measure: Callable[[RowParity], float | None],
    floor: Callable[[str], float],
) -> Html:
    shown = [item for item in _of_one_sampler(report) if item.rows]
    ticks = [] if not shown else [_tick(row) for row in shown[0].rows]
    # Several precisions may share a floor: one line, all names.
    names: dict[float, list[str]] = {}
    for precision in dict.fromkeys(item.precision for item in shown):
        names.setdefault(floor(precision), []).append(precision)
    return line_plot(
        {item.name: [measure(row) for row in item.rows] for item in shown},
        ticks,
        x_label="row (timestep)",
        y_label=f"dB SNR: {title}",
        floors={f"{', '.join(words)} ≥ {value:g}": value for value, words in names.items()},
    )


def _tick(row: RowParity) -> str:
    return str(row.index) if row.timestep is None else f"{row.index} (t={row.timestep:g})"


def _forced_db(row: RowParity) -> float | None:
    return row.raw.snr_db if row.raw else None


def _free_db(row: RowParity) -> float | None:
    return row.free.snr_db if row.free else None


def _grid(arrays: np.ndarray, report: ParityReport, title: str, note: str) -> Html:
    sheet = images.grid(arrays, value_range=report.value_range)
    caption = page.joined(Html(f"<strong>{page.text(title)}</strong>"), note)
    return page.picture(sheet, f"samples of {title}", caption, _GRID_WIDTH)


def _difference(reference: np.ndarray, got: np.ndarray, title: str, report: ParityReport) -> Html:
    """Show the absolute difference; white stands for its largest value, rounded up to 1, 2 or 5."""
    apart = np.abs(got - reference).max(axis=1, keepdims=True)
    largest = float(apart.max())
    if largest == 0:
        return Html("<figure><figcaption>No difference in any bit.</figcaption></figure>")
    white = _round_up(largest)
    times = (report.value_range[1] - report.value_range[0]) / white
    sheet = images.grid(apart, value_range=(0.0, white), rule=_DARK)
    shown = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    caption = f"difference, amplified {shown} times: white = {white:g}"
    return page.picture(sheet, f"difference of {title} from the reference", caption, _GRID_WIDTH)


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= value)


def _row_cells(row: RowParity) -> list[str]:
    raw, guided, x0 = row.raw, row.guided, row.x0
    return [
        str(row.index),
        "-" if row.timestep is None else f"{row.timestep:g}",
        decibel(raw.snr_db if raw else None),
        decibel(guided.snr_db if guided else None),
        decibel(x0.snr_db if x0 else None),
        decibel(row.next.snr_db if row.next else None),
        decibel(_free_db(row)),
        f"{raw.max_abs:.2g}" if raw else "-",
        f"{row.free.max_abs:.2g}" if row.free else "-",
    ]
