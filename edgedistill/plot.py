"""Line plots as inline SVG: labels at the lines' ends, values shown where the pointer rests."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgedistill.page import Html, text

_WIDTH, _HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 190, 24, 44
_COLOURS = 8


@dataclass(frozen=True)
class Axis:
    """The vertical axis: from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def height(self, value: float) -> float:
        """Return the y coordinate of a value; one beyond the axis lies on its edge."""
        low, high, value = (
            math.log10(item) if self.is_log else item for item in (self.low, self.high, value)
        )
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        """Return a handful of round values."""
        if self.is_log:
            powers = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [10.0**power for power in powers]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_plot(
    series: Mapping[str, Sequence[float | None]],
    ticks: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    floors: Mapping[str, float] | None = None,
    is_log: bool = False,
) -> Html:
    """Draw lines over evenly spaced positions.

    Args:
        series: Values by name; None leaves a gap, infinity lies on the upper edge.
        ticks: Name of each position.
        x_label: Under the horizontal axis.
        y_label: Over the vertical axis.
        floors: Dashed horizontal lines by name.
        is_log: Logarithmic vertical axis.
    """
    floors = floors or {}
    axis = _axis(
        [v for line in series.values() for v in line] + list(floors.values()), is_log=is_log
    )
    parts = [_frame(axis, ticks, x_label, y_label)]
    parts += [
        _line(axis, name, values, ticks, index)
        for index, (name, values) in enumerate(series.items())
    ]
    parts += _floors(axis, floors)
    parts += _labels(axis, series)
    return Html(
        f'<div class="wide"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{text(y_label)} over {text(x_label)}">{"".join(parts)}</svg></div>'
    )


def _axis(values: Sequence[float | None], *, is_log: bool) -> Axis:
    finite = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not is_log)]
    low, high = min(finite, default=1.0), max(finite, default=10.0)
    if is_log:
        return Axis(
            10.0 ** math.floor(math.log10(low)), 10.0 ** (math.floor(math.log10(high)) + 1), is_log
        )
    step = _round_step(max(high - low, 1e-9) / 5)
    return Axis(math.floor(low / step) * step, (math.floor(high / step) + 1) * step)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)


def _across(index: int, count: int) -> float:
    inner = _WIDTH - _LEFT - _RIGHT
    return _LEFT + inner * ((index + 0.5) / count if count < 3 else index / (count - 1))


def _frame(axis: Axis, ticks: Sequence[str], x_label: str, y_label: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    lines = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{axis.height(v):.1f}" y2="{axis.height(v):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{axis.height(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in axis.ticks()
    ]
    every = max(1, -(-len(ticks) // 12))
    names = [
        f'<text x="{_across(i, len(ticks)):.1f}" y="{bottom + 18}" text-anchor="middle">{text(name)}</text>'
        for i, name in enumerate(ticks)
        if i % every == 0
    ]
    titles = (
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{text(x_label)}</text>'
        f'<text x="{_LEFT - 44}" y="12">{text(y_label)}</text>'
    )
    return "".join(lines + names) + titles


def _floors(axis: Axis, floors: Mapping[str, float]) -> list[str]:
    heights = {name: axis.height(value) for name, value in floors.items()}
    lines = [
        f'<line class="floor" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        for y in heights.values()
    ]
    names = [
        f'<text class="name" x="{_LEFT + 24}" y="{y + 3:.1f}">{text(name)}</text>'
        for name, y in _apart(heights, 11.0).items()
    ]
    return lines + names


def _line(
    axis: Axis, name: str, values: Sequence[float | None], ticks: Sequence[str], index: int
) -> str:
    points = [
        (_across(i, len(values)), axis.height(value), value, ticks[i])
        for i, value in enumerate(values)
        if value is not None
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
        f"<title>{text(name)}, {text(tick)}: {value:.4g}</title></circle>"
        for x, y, value, tick in points
    )
    dash = ' stroke-dasharray="7 4"' if index >= _COLOURS else ""
    return f'<g class="s{index % _COLOURS}"><polyline points="{path}"{dash}/>{dots}</g>'


def _labels(axis: Axis, series: Mapping[str, Sequence[float | None]]) -> list[str]:
    """Name each line at its right end."""
    ends = {
        name: axis.height(next(v for v in reversed(values) if v is not None))
        for name, values in series.items()
        if any(v is not None for v in values)
    }
    heights = _apart(ends, 15.0)
    return [
        f'<text class="s{index % _COLOURS}" x="{_WIDTH - _RIGHT + 12}" y="{heights[name] + 4:.1f}">'
        f"{text(name)}</text>"
        for index, name in enumerate(series)
        if name in heights
    ]


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Push labels apart, upwards from the lowest, which stays above the axis."""
    placed: dict[str, float] = {}
    limit = float(_HEIGHT - _BOTTOM)
    for name in sorted(heights, key=lambda key: -heights[key]):
        placed[name] = min(heights[name], limit)
        limit = placed[name] - gap
    return placed
