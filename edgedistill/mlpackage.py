"""Core ML packages on disk: coremltools without its talk, folders that are whole or not there."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from edgedistill.errors import BundleError, ContractError, require
from edgedistill.files import written_aside

Checked = TypeVar("Checked")


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[ModuleType]:
    """Import coremltools and keep its notes and progress bars off the terminal.

    On Linux it reports at import that Core ML is not there, and later every pass it makes. Exceptions
    come through.

    Raises:
        MissingDependencyError: If coremltools is not installed.
    """
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            # The converter leaves the removal of its folder of weights to the garbage collector.
            warnings.filterwarnings("ignore", "Implicitly cleaning up", category=ResourceWarning)
            yield require("coremltools", "coreml")
    finally:
        log.setLevel(level)


def read_package(path: Path) -> Any:
    """Read an ``.mlpackage`` as a coremltools model that is not handed to Core ML.

    Raises:
        BundleError: If there is no package, or it cannot be read.
        ContractError: If it is not an ML Program.
        MissingDependencyError: If coremltools is not installed.
    """
    if not (path / "Manifest.json").is_file():
        msg = f"{path}: not a Core ML package: it holds no Manifest.json."
        raise BundleError(msg)
    with quiet_coremltools() as coremltools:
        decode_error = require("google.protobuf.message", "coreml").DecodeError
        try:
            model = coremltools.models.MLModel(str(path), skip_model_load=True)
        except (RuntimeError, OSError, ValueError, decode_error) as error:
            msg = f"{path}: not a whole Core ML package ({error}); export it anew."
            raise BundleError(msg) from error
        kind = model.get_spec().WhichOneof("Type")
    if kind != "mlProgram":
        msg = f"{path}: holds a {kind}, not an ML Program; convert with convert_to='mlprogram'."
        raise ContractError(msg)
    return model


def write_package(model: Any, path: Path, check: Callable[[Path], Checked]) -> Checked:
    """Save a coremltools model aside, check the saved package, and rename it into place.

    Args:
        model: The model to save.
        path: The ``.mlpackage`` folder to make or replace.
        check: Called with the saved package; what it raises leaves `path` as it was.

    Returns:
        What `check` returned.
    """
    with written_aside(path) as aside:
        package = aside / path.name
        model.save(str(package))
        result = check(package)
        for item in package.iterdir():
            item.rename(aside / item.name)
        package.rmdir()
        for file in aside.rglob("*.mlmodel"):
            file.chmod(0o644)  # coremltools leaves it readable by its owner only
    return result
