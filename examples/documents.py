"""What scripts write into the documents: tables, what they were measured with, and the place between their markers."""

import os
import platform
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from edgedistill.files import write_bytes

WIDTH = 140
BEGIN, END = "<!-- written by examples/{} --docs -->\n", "<!-- end of what it wrote -->\n"
CPU_INFO = Path("/proc/cpuinfo")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a table in Markdown.

    Args:
        headers: Names of the columns.
        rows: One cell per column each.
        texts: How many of the first columns are texts; the others are numbers.
    """
    marks = "---|" * texts + "---:|" * (len(headers) - texts)
    lines = [f"| {' | '.join(row)} |" for row in (headers, *rows)]
    return "\n".join([lines[0], f"|{marks}", *lines[1:]])


def paragraphs(*texts: str) -> str:
    """Return texts as paragraphs of lines no longer than `WIDTH`."""
    return "\n\n".join(textwrap.fill(text, WIDTH) for text in texts)


def listed(names: Iterable[str], found: Mapping[str, str | None]) -> str:
    """Return the versions of the packages that are there, as a phrase.

    Args:
        names: Of the packages that figures depend on.
        found: What `edgedistill.environment.versions` returned.
    """
    return ", ".join(f"{name} {found[name]}" for name in names if found.get(name))


def machine() -> str:
    """Return the number and kind of processors."""
    lines: Iterator[str] = iter(CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else ())
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores, {next(models, platform.processor() or platform.machine())}"


def put(text: str, path: Path, script: str) -> None:
    """Replace what stands between a script's markers in a file."""
    begin = BEGIN.format(script)
    before, begun, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        msg = f"{path}: lacks the lines {begin.strip()} and {END.strip()}."
        raise SystemExit(msg)
    write_bytes(path, f"{before}{begun}\n{text}\n{ended}{after}".encode())
