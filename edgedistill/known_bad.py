"""Packages that install together and do not work together: what is known, and what of it is installed.

Only the packages' metadata is read, so that a command can tell before it loads a weight.
"""

import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib import metadata

_BOUND = re.compile(r"(<=|>=|==|!=|<|>)\s*([\d.]+)")
_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


COMMANDS = ("export", "quantize", "sample", "parity")
"""What uses packages that bundles are written with or run on."""


@dataclass(frozen=True)
class Pair:
    """Two packages that do not work together.

    Fields:
        package, other: Their names in the registry.
        bounds, other_bounds: Of the versions; for `other` also ``same``: the releases (two numbers) must be equal.
        extras: Those of this distribution that use both.
        what_happens: If they meet.
        way_out: What to run.
        source: Where it is told or was seen.
        commands: Those that it keeps from working.
        fails: False for what works but was not tested by its makers.
    """

    package: str
    bounds: str
    other: str
    other_bounds: str
    extras: tuple[str, ...]
    what_happens: str
    way_out: str
    source: str
    commands: tuple[str, ...] = COMMANDS
    fails: bool = True


_RELEASES = "they want different releases of optimum"
_BINARY = "its library does not load into another release of OpenVINO"
PAIRS = (
    Pair(
        *("coremltools", "<=9.0", "numpy", ">=2.4"),
        ("coreml",),
        "conversion to Core ML fails",
        'pip install "numpy<2.4"',
        "apple/coremltools#2633",
        ("export", "quantize"),
    ),
    Pair(
        *("optimum-onnx", "<=0.1.0", "optimum-intel", ">=2.0"),
        ("interop",),
        _RELEASES,
        'pip install "optimum-intel<2" "optimum<2.2"',
        "their metadata",
    ),
    Pair(
        *("optimum-onnx", "<=0.1.0", "optimum", ">=2.2"),
        ("interop",),
        "it wants optimum 2.1",
        'pip install "optimum<2.2"',
        "metadata of optimum-onnx 0.1.0",
    ),
    Pair(
        *("optimum-intel", ">=2.2,<2.3", "optimum", "<2.3"),
        ("interop",),
        "it wants optimum 2.3",
        'pip install "optimum>=2.3,<2.4"',
        "metadata of optimum-intel 2.2.0",
    ),
    Pair(
        *("optimum-onnx", "<=0.1.0", "transformers", ">=4.58"),
        ("interop",),
        "it wants transformers below 4.58",
        'pip install "transformers<4.58"',
        "metadata of optimum-onnx 0.1.0",
    ),
    Pair(
        *("optimum-intel", ">=1.27,<2", "transformers", ">=4.58"),
        ("interop",),
        "it wants transformers below 4.58",
        'pip install "transformers<4.58"',
        "metadata of optimum-intel 1.27.0",
    ),
    Pair(
        *("optimum-intel", ">=2.2,<2.3", "transformers", ">=5.6"),
        ("interop",),
        "it wants transformers below 5.6",
        'pip install "transformers<5.6"',
        "metadata of optimum-intel 2.2.0",
    ),
    Pair(
        *("openvino-tokenizers", "", "openvino", "same"),
        ("openvino", "interop"),
        _BINARY,
        "pip install -U openvino openvino-tokenizers",
        "metadata of openvino-tokenizers 2026.4.1",
    ),
    Pair(
        *("openvino-genai", "", "openvino-tokenizers", "same"),
        ("interop",),
        _BINARY,
        "pip install -U openvino-genai openvino-tokenizers openvino",
        "metadata of openvino-genai 2026.4.1",
    ),
    Pair(
        *("coremltools", "<=9.0", "torch", ">=2.8"),
        ("coreml",),
        "its makers tested up to torch 2.7; exports are made with 2.13",
        "edgedistill parity BUNDLE",
        "coremltools/_deps of 9.0",
        fails=False,
    ),
    Pair(
        *("coremltools", "<=9.0", "scikit-learn", ">=1.5.2"),
        ("coreml",),
        "its makers tested up to scikit-learn 1.5.1; palettes are made with 1.9",
        "edgedistill parity BUNDLE",
        "coremltools/_deps of 9.0",
        fails=False,
    ),
)
_MAC = "coreml: Xcode's compiler `xcrun coremlcompiler` is not there; run: xcode-select --install"
_NO_MAC = "coreml: packages are written and evaluated here; Core ML itself compiles and runs them on a Mac alone"


def known_bad(extras: Collection[str] | None = None, command: str | None = None) -> list[str]:
    """Return one sentence per pair of installed packages that do not work together.

    Args:
        extras: Only pairs that one of these uses; None: all.
        command: Only pairs that keep this one of `COMMANDS` from working; None: all.
    """
    return [
        f"{_met(pair)}: {pair.what_happens} ({pair.source}); run: {pair.way_out}"
        for pair in _meeting(extras)
        if pair.fails and command in (None, *pair.commands)
    ]


def notes() -> list[str]:
    """Return what works here and is worth knowing: untested pairs, and compilers that are not here."""
    untested = [
        f"{_met(pair)}: {pair.what_happens} ({pair.source}); to be sure: {pair.way_out}"
        for pair in _meeting(None)
        if not pair.fails
    ]
    return [*untested, *_compilers()]


def warn_known_bad(extras: Collection[str], command: str) -> None:
    """Say on stderr which packages of these extras do not work together, before a command's work begins."""
    for sentence in known_bad(extras, command):
        sys.stderr.write(f"edgedistill: known to fail: {sentence}\n")


def installed(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fits(version: str, bounds: str) -> bool:
    """Say whether a version lies within bounds such as ``">=1.26,<2.4"``; suffixes are not looked at."""
    return all(
        _COMPARE[sign](_padded(version), _padded(bound)) for sign, bound in _BOUND.findall(bounds)
    )


def _meeting(extras: Collection[str] | None) -> Iterator[Pair]:
    """Yield the pairs that are both installed in versions that do not work together."""
    for pair in PAIRS:
        if extras is not None and set(extras).isdisjoint(pair.extras):
            continue  # looking up a version takes a good part of a millisecond
        first, second = installed(pair.package), installed(pair.other)
        if first and second and _is_bad(pair, first, second):
            yield pair


def _is_bad(pair: Pair, first: str, second: str) -> bool:
    if pair.other_bounds == "same":
        return _padded(first)[:2] != _padded(second)[:2]
    return fits(first, pair.bounds) and fits(second, pair.other_bounds)


def _met(pair: Pair) -> str:
    return f"{pair.package} {installed(pair.package)} with {pair.other} {installed(pair.other)}"


def _compilers() -> list[str]:
    """Return what is to be said of Core ML's compiler where Core ML can be written."""
    if installed("coremltools") is None:
        return []
    if platform.system() != "Darwin":
        return [_NO_MAC]
    return [] if shutil.which("xcrun") else [_MAC]


def _padded(version: str) -> tuple[int, ...]:
    numbers = re.match(r"[\d.]*", version)
    parts = [int(part) for part in numbers[0].split(".") if part] if numbers else []
    return tuple((parts + [0] * 4)[:4])
