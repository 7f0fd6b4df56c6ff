"""OpenVINO, NNCF and ONNX Runtime report their use to a server; here they are imported without that."""

import os
import sys
from types import ModuleType

from edgedistill.errors import require


def require_silent(module: str, extra: str) -> ModuleType:
    """Import OpenVINO, NNCF, ONNX Runtime or a part of them with usage reports off.

    The first two go on without reports where the package that sends them is not installed, so that
    package is hidden before their first import. ONNX Runtime (from 1.29 on, on Linux and macOS too)
    reads a variable when it is imported.

    Raises:
        MissingDependencyError: If the module's package is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return require(module, extra)
