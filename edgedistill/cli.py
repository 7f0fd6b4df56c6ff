"""The command line: finds commands through entry points, turns our errors into one line and a status."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from edgedistill import __version__, plugins
from edgedistill.errors import ConfigError, EdgeDistillError, not_installed

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
    try:
        return execute(sys.argv[1:] if arguments is None else arguments)
    except EdgeDistillError as error:
        return _complain(str(error), error.exit_status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from edgedistill.files import way_out

        where = f"{error.filename}: " if error.filename else ""
        advice = f"; {way_out(error)}" if way_out(error) else ""
        return _complain(f"{where}{error.strerror or error}{advice}.", 2)
    except KeyboardInterrupt:
        return _complain("Interrupted.", 130)


def execute(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; what goes wrong is raised.

    Raises:
        EdgeDistillError: Of any kind; a package that is not installed is named with the extra that brings it.
    """
    arguments = [_kebab(item) for item in arguments]
    options = _parser(arguments).parse_args(arguments)
    try:
        return options.run(options) or 0
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in plugins.PACKAGES:
            raise
        raise not_installed(error.name, getattr(options, "extra", "all")) from error


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, like every other of ours."""

    def error(self, message: str) -> NoReturn:
        msg = f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`."
        raise ConfigError(msg)


def _complain(message: str, status: int) -> int:
    print(f"edgedistill: {message}", file=sys.stderr)
    return status


def _kebab(argument: str) -> str:
    """Accept ``--guidance_scale`` for ``--guidance-scale``; a value after ``=`` stays as it is."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return option.replace("_", "-") + equals + value


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="edgedistill",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgedistill {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Only the module of the command at hand is imported: a cold start pays for nothing else.
    wanted = next((item for item in arguments if not item.startswith("-")), None)
    for name in plugins.names(plugins.COMMANDS) if wanted is None else [wanted]:
        plugins.find(plugins.COMMANDS, name)(commands)
    return parser
