"""What PyTorch answered, kept while its network is gone, and the written file that is held to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import plugins
from edgedistill.agreement import compare, finite_db
from edgedistill.contract import Signature
from edgedistill.errors import CheckFailedError
from edgedistill.network import Session

from .stages import stage

TRY_ELSE = "Try other options (--dtype, --opset, --min-deployment-target) or another format, and report it with what `edgedistill env` prints."


@dataclass(frozen=True)
class Expected:
    """One call of a network in PyTorch, kept so that a written graph is checked when the network is gone.

    Fields:
        feeds: Inputs by name.
        outputs: What PyTorch answers, by name.
    """

    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Check:
    """What a written file is held to.

    Fields:
        runtime: Entry-point name of what opens the file.
        signature: Of its network.
        expected: What PyTorch answered.
        floor: dB SNR that must be reached.
        options: Of the runtime.
    """

    runtime: str
    signature: Signature
    expected: Expected
    floor: float
    options: Mapping[str, Any]


def named(path: Path) -> str:
    """Return what a file that is being written is called in messages: where it is now is nowhere for long."""
    return "/".join(path.parts[-2:])


def check_file(check: Check, path: Path, what: str) -> float:
    """Open a written file and hold its answer to PyTorch's; nothing here imports torch, unless the runtime does.

    Args:
        check: What it is held to.
        path: The file.
        what: What was written, for the message.

    Returns:
        As `check_against`.

    Raises:
        BundleError: If it cannot be opened.
        CheckFailedError: As `check_against`.
        MissingDependencyError: If the runtime is not installed.
    """
    stage("checking")
    session = plugins.find(plugins.RUNTIMES, check.runtime).open(
        path, check.signature, dict(check.options)
    )
    return check_against(check.expected, session, check.floor, what)


def check_against(expected: Expected, session: Session, floor: float, what: str) -> float:
    """Run a written graph once on what PyTorch was given.

    Args:
        expected: The reference.
        session: Runs the written file.
        floor: dB SNR that must be reached.
        what: What was written, for the message.

    Returns:
        dB SNR of the file's worst answer; 999 where every bit is equal.

    Raises:
        CheckFailedError: If it is below `floor`.
    """
    got = session(expected.feeds)
    found = {name: compare(value, got[name]).snr_db for name, value in expected.outputs.items()}
    worst = min(found, key=lambda name: found[name])
    if found[worst] < floor:
        msg = f"{what}: {found[worst]:.1f} dB SNR of `{worst}` against PyTorch, at least {floor:.0f} dB is required; it was not written. {TRY_ELSE}"
        raise CheckFailedError(msg)
    return finite_db(found[worst])
