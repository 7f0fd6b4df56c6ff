import base64
import io
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from edgedistill import page
from edgedistill.images import grid, to_uint8
from edgedistill.plot import Axis, line_plot


def _points(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline points="([^"]*)"', svg)
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in found]


def _plot(series, **changes) -> str:
    ticks = [str(i) for i in range(max(map(len, series.values())))]
    return line_plot(series, ticks, x_label="row", y_label="dB", **changes)


def test_text_is_escaped_once_and_html_is_left_alone():
    assert page.text("a < b & c") == "a &lt; b &amp; c"
    assert page.text(page.text("a < b")) == "a &lt; b"
    assert page.paragraph('<img src="x">') == "<p>&lt;img src=&quot;x&quot;&gt;</p>"


EVIL = "<script>alert(1)</script>"


@pytest.mark.parametrize(
    "made",
    [
        page.document(EVIL, EVIL),
        page.section(EVIL, EVIL),
        page.details(EVIL, EVIL),
        page.bullets([EVIL]),
        page.code(EVIL),
        page.muted(EVIL),
        page.badge(EVIL, "good"),
        page.gallery(EVIL),
        page.table([EVIL], [[EVIL]]),
        page.picture(Image.new("L", (2, 2)), EVIL, EVIL),
        _plot({EVIL: [1.0, 2.0]}, floors={EVIL: 1.0}),
        line_plot({"a": [1.0]}, [EVIL], x_label=EVIL, y_label=EVIL),
    ],
    ids=lambda made: made[:20],
)
def test_every_part_escapes_what_it_is_given(made):
    assert "<script" not in made
    assert "&lt;script&gt;" in made


def test_a_document_is_whole_and_readable_on_a_phone_and_in_the_dark():
    made = page.document("Title", page.paragraph("text"))
    assert made.startswith("<!DOCTYPE html>")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in made
    assert "@media (prefers-color-scheme: dark)" in made
    assert "http" not in made


def test_table_puts_numbers_right_and_words_where_told():
    made = page.table(["a", "b", "c"], [["x", "1", "why"]], left=(0,), prose=(2,))
    assert '<tr><td class="left">x</td><td>1</td><td class="prose">why</td></tr>' in made


def test_a_picture_travels_inside_of_the_page_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    made = page.picture(Image.fromarray(pixels), "noise", "caption", width=70)
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', made)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert np.array_equal(np.asarray(image), pixels)
    assert 'width="70"' in made
    assert 'alt="noise"' in made


def test_a_plot_is_well_formed_and_keeps_order_and_proportion():
    svg = _plot({"a": [10.0, 20.0, 30.0], "b": [0.0, None, 40.0]})
    ET.fromstring(svg)
    rising, gap = _points(svg)
    assert len(gap) == 2
    (x0, y0), (x1, y1), (x2, y2) = rising
    assert x0 < x1 < x2
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert gap[0][1] > y0 > y2 > gap[1][1]


def test_infinity_lies_on_the_upper_edge():
    ((_, top), (_, low)), other = _points(_plot({"a": [math.inf, 50.0], "b": [120.0, 120.0]}))
    assert top < other[0][1] < low


def test_a_plot_without_a_finite_value_is_still_a_plot():
    ET.fromstring(_plot({"a": [math.inf, math.inf]}))


def test_a_logarithmic_axis_spaces_decades_evenly():
    axis = Axis(1e-4, 1.0, is_log=True)
    heights = [axis.height(value) for value in axis.ticks()]
    assert axis.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert np.diff(heights) == pytest.approx([np.diff(heights)[0]] * 4)
    svg = _plot({"a": [1e-3, 1e-2, 1e-1]}, is_log=True)
    ((_, y0), (_, y1), (_, y2)) = _points(svg)[0]
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)


def test_labels_of_lines_that_end_together_do_not_touch():
    svg = _plot({f"line {i}": [100.0, 100.0 + i / 100] for i in range(10)})
    ys = [float(y) for y in re.findall(r'<text class="s\d" x="[\d.]+" y="([\d.]+)"', svg)]
    assert len(ys) == 10
    assert np.diff(sorted(ys)).min() >= 14.9


def test_floors_are_drawn_at_their_value():
    svg = _plot({"a": [0.0, 100.0]}, floors={"least": 100.0})
    (y,) = re.findall(r'<line class="floor" [^>]*y1="([\d.]+)"', svg)
    assert float(y) == pytest.approx(_points(svg)[0][1][1], abs=0.11)


def test_grid_lays_samples_out_in_rows():
    samples = np.stack([np.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    sheet = np.asarray(grid(samples, columns=2, scale=3, rule=7))
    assert sheet.shape == (15, 15)
    assert [sheet[2, 2], sheet[2, 9], sheet[9, 2], sheet[9, 9], sheet[0, 0]] == [0, 128, 255, 7, 7]


def test_pixels_are_rounded_and_clipped():
    values = np.array([-2.0, -1.0, 0.0, 0.999, 2.0], np.float32).reshape(1, 1, 1, 5)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]
