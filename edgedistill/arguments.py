"""What the commands have in common: a parser that teaches, and arguments that mean the same everywhere."""

import argparse
from pathlib import Path
from typing import Any

from edgedistill.errors import ConfigError


def add_command(
    commands: Any, name: str, short: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Add a command whose texts are printed line by line as they are written.

    Args:
        commands: What `add_subparsers` returned.
        name: The command's word.
        short: Its line in the list of commands.
        description: What it does, above its options.
        epilog: Examples and exit status, below them.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_target(parser: argparse.ArgumentParser, metavar: str) -> None:
    """Add the folder to write, by position or with ``-o``, and ``--overwrite``; see `target_of`."""
    parser.add_argument(
        "target", metavar=metavar, type=Path, nargs="?", help="folder to make or to add to"
    )
    parser.add_argument("-o", "--output", metavar=metavar, type=Path, help="the same")
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace a {metavar}, whatever it holds"
    )


def target_of(options: argparse.Namespace, metavar: str) -> Path:
    """Return the folder to write.

    Raises:
        ConfigError: If it is not given, or both ways.
    """
    given: list[Path] = [path for path in (options.target, options.output) if path is not None]
    if len(given) != 1:
        msg = f"Name the folder to write once, as {metavar} or with -o; got {len(given)}."
        raise ConfigError(msg)
    return given[0]


def positive(value: str) -> int:
    """Read a whole number of at least 1."""
    if not value.isdigit() or int(value) < 1:
        msg = f"must be a whole number of at least 1, got {value!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(value)
