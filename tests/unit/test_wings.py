"""What exports, compresses and runs students does not know how they were made."""

import ast
import re
from pathlib import Path

import pytest

from edgedistill.methods.registry import METHODS

ROOT = Path(__file__).parents[2]
WINGS = ("export", "quantize", "runtimes")
ENGLISH = {"guide", "guided"}  # words of their own, which count where they are a string
NAMED = re.compile(rf"\b(edgedistill\.methods|{'|'.join(set(METHODS) - ENGLISH)})\b", re.IGNORECASE)


def strings(source: str) -> set[str]:
    """Return the values of all string literals."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {node.value for node in nodes if isinstance(node.value, str)}


@pytest.mark.parametrize("wing", WINGS)
def test_no_wing_names_a_method(wing: str) -> None:
    sources = {path: path.read_text() for path in (ROOT / wing).rglob("*.py")}
    assert len(sources) > 5
    named = {path: NAMED.findall(source) for path, source in sources.items()}
    named |= {
        path: strings(source) & ENGLISH for path, source in sources.items() if not named[path]
    }
    assert {path.name: found for path, found in named.items() if found} == {}


def test_a_name_would_be_found() -> None:
    assert NAMED.findall("from edgedistill.methods.sfd import x  # as in DMD2") == [
        "edgedistill.methods",
        "sfd",
        "DMD2",
    ]
    assert strings('f(x.guided, "guide") or {"guided": 1}') & ENGLISH == ENGLISH
