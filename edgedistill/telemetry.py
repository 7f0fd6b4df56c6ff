"""OpenVINO and NNCF report every import to a server; here they are imported without that."""

import sys
from types import ModuleType

from edgedistill.errors import require


def require_silent(module: str, extra: str) -> ModuleType:
    """Import OpenVINO, NNCF or a part of them with usage reports off.

    Both go on without reports where the package that sends them is not installed, so that package is
    hidden before their first import.

    Raises:
        MissingDependencyError: If the module's package is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return require(module, extra)
