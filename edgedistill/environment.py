"""`edgedistill env`: which packages are there, which extras work, and pairs known to break one another."""

import argparse
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from edgedistill import __version__
from edgedistill.arguments import add_command, add_json
from edgedistill.known_bad import fits, installed, known_bad, notes
from edgedistill.terminal import aligned

_REQUIREMENT = re.compile(
    r"""^(?P<name>[\w.-]+)\s*(?P<bounds>[^;\[\]]*?)\s*(;.*extra\s*==\s*['"](?P<extra>[\w-]+)['"].*)?$"""
)
_NOT_FOR_USE = ("all", "dev")


@dataclass(frozen=True)
class Requirement:
    """A package that an extra asks for; `verdict` is ``ok``, ``missing`` or ``unsupported``."""

    package: str
    bounds: str
    version: str | None
    verdict: str


def register(commands: Any) -> None:
    """Add `edgedistill env`."""
    parser = add_command(
        commands,
        "env",
        "print versions and say which extras work",
        "Print the versions of everything that matters here and say which extras work.\n"
        "No package is imported. Paste the output into bug reports.",
        "Exit status: 0 fine or merely not installed, 1 two packages are known to break each other.\n\n"
        "examples:\n  edgedistill env\n  edgedistill env --json > environment.json",
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def versions() -> dict[str, str]:
    """Return platform and versions of every installed package that an extra asks for, for reports."""
    packages = {item.package: item.version for items in extras().values() for item in items}
    return {
        "edgedistill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        **{name: version for name, version in sorted(packages.items()) if version is not None},
    }


def extras() -> dict[str, list[Requirement]]:
    """Return what each extra asks for and what is there; ``core`` is what every use needs."""
    found: dict[str, list[Requirement]] = {"core": []}
    for line in metadata.requires("edgedistill") or []:
        match = _REQUIREMENT.match(line)
        extra = (match["extra"] or "core") if match else "all"
        if match and extra not in _NOT_FOR_USE:
            found.setdefault(extra, []).append(_requirement(match["name"], match["bounds"]))
    return found


def _requirement(package: str, bounds: str) -> Requirement:
    version = installed(package)
    if version is None:
        return Requirement(package, bounds, None, "missing")
    return Requirement(package, bounds, version, "ok" if fits(version, bounds) else "unsupported")


def _run(options: argparse.Namespace) -> int:
    found, broken = extras(), known_bad()
    if options.json:
        listed = {extra: [asdict(item) for item in items] for extra, items in found.items()}
        told = {"extras": listed, "known_bad": broken, "notes": notes()}
        print(json.dumps({"versions": versions(), **told}, indent=1))
        return int(bool(broken))
    print("\n".join(f"{name}: {value}" for name, value in list(versions().items())[:4]), end="\n\n")
    rows = [
        [extra, item.package, item.version or "-", item.bounds, item.verdict]
        for extra, items in found.items()
        for item in items
    ]
    print(aligned(["extra", "package", "version", "wanted", "verdict"], rows), end="\n\n")
    for extra, items in found.items():
        print(f"{extra}: {_advice(extra, items)}")
    for sentence in broken:
        print(f"known to fail: {sentence}")
    for sentence in notes():
        print(f"note: {sentence}")
    return int(bool(broken))


def _advice(extra: str, items: list[Requirement]) -> str:
    wrong = [f"{item.package} {item.verdict}" for item in items if item.verdict != "ok"]
    if not wrong:
        return "ready"
    package = "edgedistill" if extra == "core" else f"edgedistill[{extra}]"
    return f'{", ".join(wrong)}; run: pip install "{package}"'
