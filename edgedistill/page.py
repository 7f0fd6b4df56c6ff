"""Parts of self-contained HTML pages: text, tables, pictures and line plots; no script, nothing fetched."""

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgedistill.images import png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image


class Html(str):
    """Text that already is HTML; any other string is escaped where it enters a page."""

    __slots__ = ()


def text(content: str) -> Html:
    """Escape a string unless it already is HTML."""
    return content if isinstance(content, Html) else Html(html.escape(content))


def joined(*parts: str) -> Html:
    """Put parts one after the other."""
    return Html("\n".join(text(part) for part in parts))


def document(title: str, *parts: str) -> str:
    """Return a whole page that needs no other file."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text(title)}</h1>\n{joined(*parts)}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> Html:
    """Return a section under its own heading."""
    return Html(f"<section>\n<h2>{text(title)}</h2>\n{joined(*parts)}\n</section>")


def paragraph(content: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{text(content)}</p>")


def bullets(items: Sequence[str]) -> Html:
    """Return a list with one line per item."""
    return Html("<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>")


def code(content: str) -> Html:
    """Return text in the fixed-width face."""
    return Html(f"<code>{text(content)}</code>")


def muted(content: str) -> Html:
    """Return text of less weight than its neighbours."""
    return Html(f'<span class="muted">{text(content)}</span>')


def badge(word: str, mood: str) -> Html:
    """Return a word on a coloured ground; `mood` is ``good``, ``bad`` or ``none``."""
    return Html(f'<span class="badge {mood}">{text(word)}</span>')


def details(summary: str, *parts: str) -> Html:
    """Return content that the reader unfolds."""
    return Html(f"<details>\n<summary>{text(summary)}</summary>\n{joined(*parts)}\n</details>")


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[int] = (0,),
    prose: Sequence[int] = (),
) -> Html:
    """Return a table that scrolls sideways where the screen is narrow.

    Args:
        headers: One per column.
        rows: Cells, text or HTML.
        left: Columns of words; all others hold numbers and go to the right.
        prose: Columns of sentences, which are broken into lines.
    """
    kinds = {**dict.fromkeys(left, ' class="left"'), **dict.fromkeys(prose, ' class="prose"')}

    def line(cells: Sequence[str], tag: str) -> str:
        made = [f"<{tag}{kinds.get(i, '')}>{text(cell)}</{tag}>" for i, cell in enumerate(cells)]
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return Html(
        f'<div class="wide"><table>\n<thead>{line(headers, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def picture(image: "Image", description: str, caption: str = "", width: int | None = None) -> Html:
    """Return a picture inside of the page, its pixels kept sharp.

    Args:
        image: What to show.
        description: For readers who do not see it.
        caption: Under the picture.
        width: CSS pixels; None: one per pixel of the image.
    """
    data = base64.b64encode(png_bytes(image)).decode()
    return Html(
        f'<figure><img src="data:image/png;base64,{data}" alt="{text(description)}" '
        f'width="{width or image.width}"><figcaption>{text(caption)}</figcaption></figure>'
    )


def gallery(*figures: str) -> Html:
    """Return figures side by side, as many in a row as fit."""
    return Html(f'<div class="gallery">\n{joined(*figures)}\n</div>')


_STYLE = """
:root { --ink: #1c2126; --soft: #5d6873; --ground: #fff; --raised: #f4f6f8; --rule: #dbe1e7;
  --good: #12703c; --good-ground: #dff3e6; --bad: #a81b1b; --bad-ground: #fbe3e1;
  --c0: #1b66b5; --c1: #b5490c; --c2: #12805a; --c3: #8b3fa8; --c4: #8a6a00; --c5: #b02a6b;
  --c6: #3f7d8c; --c7: #5f5f5f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ed; --soft: #96a2ae; --ground: #14181c; --raised: #1d2329; --rule: #323b44;
  --good: #74d99a; --good-ground: #173824; --bad: #ff948a; --bad-ground: #472120;
  --c0: #6fb1f5; --c1: #f2955a; --c2: #55c99b; --c3: #cf94e8; --c4: #d9b640; --c5: #f285b5;
  --c6: #86c6d4; --c7: #b0b0b0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, ul { max-width: 46rem; margin: .4rem 0 .8rem; }
ul { padding-left: 1.2rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.muted, figcaption { color: var(--soft); }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .55rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; }
.left, th.prose { text-align: left; }
td.prose { white-space: normal; min-width: 16rem; text-align: left; }
tbody tr:hover { background: var(--raised); }
.badge { display: inline-block; padding: 0 .5em; border-radius: .3em; font-weight: 600; font-size: .92em;
  white-space: nowrap; background: var(--raised); color: var(--soft); }
.badge.good { background: var(--good-ground); color: var(--good); }
.badge.bad { background: var(--bad-ground); color: var(--bad); }
.gallery { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1.25rem; margin: .8rem 0; }
.gallery > * { width: 240px; }
.gallery div figure + figure { margin-top: .6rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; line-height: 1.4; margin-top: .35rem; max-width: 20rem; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 3px; }
details { border-top: 1px solid var(--rule); padding: .35rem 0; }
summary { cursor: pointer; }
svg { display: block; min-width: 36rem; max-width: 62rem; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); }
svg .grid { stroke: var(--rule); }
svg .floor { stroke: var(--bad); stroke-dasharray: 2 4; }
svg .name { font-size: 10px; paint-order: stroke; stroke: var(--ground); stroke-width: 4px; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
""" + "\n".join(
    f"svg .s{i} {{ stroke: var(--c{i}); }} svg .s{i} circle, svg text.s{i} {{ fill: var(--c{i}); stroke: none; }}"
    for i in range(8)
)
