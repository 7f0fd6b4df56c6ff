"""Packages that do not work together are warned of by every command that uses them, before weights are read."""

from importlib import metadata
from typing import Any

import pytest

from edgedistill.errors import ConfigError

PAIR = {"openvino-tokenizers": "2024.1.0", "openvino": "2026.4.1"}
WARNING = "known to fail: openvino-tokenizers 2024.1.0 with openvino 2026.4.1"
STOPPED = "the work begins"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of packages that seem to be there, to be filled in."""
    held: dict[str, str] = {}
    version = metadata.version

    def told(name: str) -> str:
        return held.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", told)
    return held


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the work of each command end where it begins."""

    def stop(*_: Any, **__: Any) -> None:
        raise ConfigError(STOPPED)

    import edgedistill.pipeline
    import quantize.assemble
    import runtimes.verify

    for module, name in (
        (edgedistill.pipeline, "load"),
        (runtimes.verify, "verify"),
        (quantize.assemble, "quantize_bundle"),
    ):
        monkeypatch.setattr(module, name, stop)


def command(name: str, bundle: Any, folder: Any) -> tuple[Any, ...]:
    return {
        "sample": ("sample", bundle.root, "-n", "1", "-o", folder / "x.png"),
        "parity": ("parity", bundle.root),
        "quantize": ("quantize", bundle.root, folder / "small", "--weight-format", "int8"),
    }[name]


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("name", "words", "warned"),
    [
        ("sample", ["--runtime", "openvino"], True),
        ("sample", ["--runtime", "ov"], True),
        ("sample", ["--artifact", "openvino-float32"], True),
        ("sample", ["--runtime", "onnxruntime"], False),
        ("sample", ["--artifact", "onnx-float32"], False),
        ("sample", [], False),  # the first artifact is of ONNX Runtime
        ("parity", [], True),
        ("parity", ["--runtime", "ov"], True),
        ("parity", ["--artifact", "openvino-float16"], True),
        ("parity", ["--runtime", "onnxruntime", "torch"], False),
        ("parity", ["--artifact", "onnx-float32"], False),
        ("quantize", [], True),
        ("quantize", ["--only", "openvino"], True),
        ("quantize", ["--only", "onnx"], False),
    ],
)
def test_a_bad_pair_is_warned_of_before_the_work_where_the_runtime_uses_it(
    run, bundle, pretended, tmp_path, name: str, words: list[str], warned: bool
) -> None:
    pretended.update(PAIR)
    status, _, err = run(*command(name, bundle, tmp_path), *words)
    assert (status, STOPPED in err) == (2, True)
    assert (WARNING in err) == warned
    assert not warned or err.index(WARNING) < err.index(STOPPED)


@pytest.mark.usefixtures("stopped")
def test_sampling_with_onnx_runtime_asks_for_no_version(
    run, bundle, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: pytest.fail(f"asks for {name}"))
    words = command("sample", bundle, tmp_path)
    assert run(*words, "--runtime", "onnxruntime")[0] == 2
