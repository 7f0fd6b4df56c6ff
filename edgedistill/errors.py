"""Every error that edgedistill raises on purpose.

::

    EdgeDistillError
    ├── ConfigError             (ValueError)      a setting, recipe or command line that cannot be
    ├── ContractError           (ValueError)      an array, network or call that does not fit its signature
    ├── BundleError             (ValueError)      a folder or file that is missing, damaged, unsafe or too new
    ├── MissingDependencyError  (ImportError)     an optional package that this work needs
    ├── TrainingError           (RuntimeError)    a run that cannot go on (NaN, a stopped process, a full disk)
    └── CheckFailedError        (AssertionError)  everything ran, and a number is below its threshold

The command line turns ``CheckFailedError`` into exit status 1 and all others into 2.
"""

import importlib
from types import ModuleType


class EdgeDistillError(Exception):
    """Root of the tree; its message is one sentence that says what to do."""

    exit_status = 2


class ConfigError(EdgeDistillError, ValueError):
    """A setting, recipe or command line that cannot be."""


class ContractError(EdgeDistillError, ValueError):
    """An array, network or call that does not fit its signature."""


class BundleError(EdgeDistillError, ValueError):
    """A folder or file that is missing, damaged, unsafe or too new."""


class MissingDependencyError(EdgeDistillError, ImportError):
    """An optional package that this work needs is not installed."""


class TrainingError(EdgeDistillError, RuntimeError):
    """A training run that cannot go on."""


class CheckFailedError(EdgeDistillError, AssertionError):
    """Everything ran, and a number is below its threshold."""

    exit_status = 1


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: Dotted name of the module to import, such as ``"onnxruntime"``.
        extra: The extra of this distribution that installs it, such as ``"onnx"``.

    Raises:
        MissingDependencyError: If the module's package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".", maxsplit=1)[0]:
            raise
        raise not_installed(error.name, extra) from error


def not_installed(module: str, extra: str) -> MissingDependencyError:
    """Return the error that says which extra brings a module."""
    msg = f'`{module}` is not installed; run: pip install "edgedistill[{extra}]".'
    return MissingDependencyError(msg)
