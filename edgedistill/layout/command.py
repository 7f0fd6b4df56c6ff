"""`edgedistill check-layout`: print what would go wrong in other people's loaders."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill.arguments import add_command, add_json
from edgedistill.stock import LOADERS

from .checking import check_layout, loaders_of
from .findings import Finding

_EPILOG = """\
examples:
  edgedistill check-layout pipeline
  edgedistill check-layout pipeline --loader genai
  edgedistill check-layout pipeline --loader all --json > findings.json

Reads configurations and the borders of graphs; no weight is loaded and nothing is run.
Exit status: 0 nothing but warnings, 1 a loader would not open it or would give wrong pictures, 2 bad input.
"""


def register(commands: Any) -> None:
    """Add `edgedistill check-layout`."""
    parser = add_command(
        commands,
        "check-layout",
        "say what would go wrong in other people's loaders",
        "Check a pipeline folder against what diffusers, optimum (ONNX Runtime, OpenVINO),\n"
        "openvino-genai and Apple's Swift package expect of it.",
        _EPILOG,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="the folder with model_index.json"
    )
    parser.add_argument(
        "--loader",
        choices=[*LOADERS, "all"],
        help="whose view to take (default: those that the folder holds graphs or weights for)",
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    chosen = {None: loaders_of(options.folder), "all": LOADERS}
    loaders = chosen.get(options.loader, (options.loader,))
    findings = check_layout(options.folder, loaders)
    if options.json:
        listed = [asdict(item) for item in findings]
        print(json.dumps({"loaders": loaders, "findings": listed}, indent=1))
    else:
        for loader in loaders:
            _print(loader, [item for item in findings if item.loader == loader])
    return int(any(item.level == "error" for item in findings))


def _print(loader: str, findings: Sequence[Finding]) -> None:
    print(f"{loader}: {_count(findings)}")
    for item in findings:
        print(f"  {item.level}: {item.file}")
        print(f"    expected: {item.expected}")
        print(f"    found:    {item.found}")
        print(f"    do this:  {item.way_out}")


def _count(findings: Sequence[Finding]) -> str:
    levels = [item.level for item in findings]
    counts = {level: levels.count(level) for level in ("error", "warning")}
    told = [f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count]
    return ", ".join(told) or "fine"
