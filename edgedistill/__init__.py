"""edgedistill: from a diffusion teacher to a few-step student on a phone or a CPU, proved by numbers.

>>> import edgedistill
>>> pipeline = edgedistill.load("demo/bundle", runtime="openvino")  # doctest: +SKIP
>>> pipeline(n=10, seed=0).images[3].save("three.png")  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedistill.bundle import Bundle as Bundle
    from edgedistill.errors import EdgeDistillError as EdgeDistillError
    from edgedistill.pipeline import Pipeline as Pipeline
    from edgedistill.pipeline import Samples as Samples
    from edgedistill.pipeline import load as load
    from edgedistill.table import SamplerTable as SamplerTable
    from edgedistill.tiling import Tiling as Tiling

__version__ = "0.1.0"
_HOMES = {
    "Bundle": "bundle",
    "EdgeDistillError": "errors",
    "Pipeline": "pipeline",
    "SamplerTable": "table",
    "Samples": "pipeline",
    "Tiling": "tiling",
    "load": "pipeline",
}
__all__ = ["Bundle", "EdgeDistillError", "Pipeline", "SamplerTable", "Samples", "Tiling", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'edgedistill' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"edgedistill.{_HOMES[name]}"), name)
