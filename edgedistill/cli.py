"""The command line: finds commands through entry points, turns our errors into one line and a status."""

import argparse
import os
import sys
from collections.abc import Sequence

from edgedistill import __version__, plugins
from edgedistill.errors import EdgeDistillError

DESCRIPTION = """\
Take a diffusion model from a GPU teacher to a phone or an Intel CPU, and prove that it still is the
same model: distil a few-step student, export it to ONNX, OpenVINO and Core ML, compress it, sample
from it on every runtime, and compare each with PyTorch."""
EPILOG = """\
Results go to stdout (add --json for machines), progress to stderr.
Exit status: 0 fine, 1 a check failed, 2 bad input.
`edgedistill COMMAND --help` explains each command with examples."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 a check failed, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser(arguments).parse_args(arguments)
        status: int = options.run(options) or 0
    except EdgeDistillError as error:
        return _complain(str(error), error.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}.", 2)
    except KeyboardInterrupt:
        return _complain("Interrupted.", 130)
    return status


def _complain(message: str, status: int) -> int:
    print(f"edgedistill: {message}", file=sys.stderr)
    return status


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgedistill",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgedistill {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Only the module of the command at hand is imported: a cold start pays for nothing else.
    first = next((item for item in arguments if not item.startswith("-")), None)
    wanted = (
        [first] if first in plugins.names(plugins.COMMANDS) else plugins.names(plugins.COMMANDS)
    )
    for name in wanted:
        plugins.find(plugins.COMMANDS, str(name))(commands)
    return parser
