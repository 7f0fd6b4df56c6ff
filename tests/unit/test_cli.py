import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from edgedistill import __version__, cli, plugins
from edgedistill.errors import CheckFailedError, ConfigError, ContractError
from edgedistill.terminal import aligned

HEAVY = ("torch", "diffusers", "onnx", "onnxruntime", "openvino", "coremltools", "nncf")


@pytest.fixture
def command(monkeypatch):
    """Add a command ``probe`` that does what it is told; gives the seen options."""
    seen = []

    class Module:
        action = staticmethod(lambda _options: 0)

        @classmethod
        def register(cls, commands):
            parser = commands.add_parser("probe")
            parser.add_argument("words", nargs="*")
            parser.add_argument("--two-words")

            def run(options):
                seen.append(options)
                return cls.action(options)

            parser.set_defaults(run=run)

    monkeypatch.setitem(sys.modules, "brought_probe", Module)
    point = EntryPoint("probe", "brought_probe:register", plugins.COMMANDS)
    monkeypatch.setattr(plugins, "entries", lambda _group: {"probe": point})
    Module.seen = seen
    return Module


def _fail_with(error):
    def action(_options):
        raise error

    return staticmethod(action)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ContractError("It does not fit."), 2, "edgedistill: It does not fit.\n"),
        (CheckFailedError("Too far."), 1, "edgedistill: Too far.\n"),
        (KeyboardInterrupt(), 130, "edgedistill: Interrupted.\n"),
        (
            OSError(13, "Permission denied", "/x"),
            2,
            "edgedistill: /x: Permission denied; ask for the right to it or choose another place.\n",
        ),
        (OSError("odd"), 2, "edgedistill: odd.\n"),
        (
            ModuleNotFoundError("No module named 'abc'", name="abc.d"),
            2,
            'edgedistill: `abc.d` is not installed; run: pip install "edgedistill[all]".\n',
        ),
    ],
)
def test_errors_become_one_line_and_a_status(command, capsys, error, status, line):
    command.action = _fail_with(error)
    assert cli.main(["probe"]) == status
    assert capsys.readouterr() == ("", line)


def test_our_own_bugs_keep_their_traceback(command):
    command.action = _fail_with(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError, match="bug"):
        cli.main(["probe"])
    command.action = _fail_with(ModuleNotFoundError("bug", name="edgedistill.typo"))
    with pytest.raises(ModuleNotFoundError, match="bug"):
        cli.main(["probe"])


def test_the_status_of_a_command_is_passed_on(command):
    command.action = staticmethod(lambda _options: 1)
    assert cli.main(["probe"]) == 1


@pytest.mark.parametrize(
    "words", [["--two_words", "a_b"], ["--two_words=a_b"], ["--two-words=a_b"]]
)
def test_underscores_in_options_are_dashes_and_in_values_stay(command, words):
    assert cli.main(["probe", "c_d", *words]) == 0
    (options,) = command.seen
    assert (options.two_words, options.words) == ("a_b", ["c_d"])


def test_a_wrong_option_is_one_line(command, capsys):
    assert cli.main(["probe", "--three"]) == 2
    out, err = capsys.readouterr()
    assert (out, command.seen) == ("", [])
    assert err == "edgedistill: Unrecognized arguments: --three; see `edgedistill --help`.\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["smaple"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgedistill: Unknown command 'smaple': choose one of ")
    assert err.endswith("did you mean 'sample'?\n")


def test_runtimes_have_nicknames_and_near_misses():
    assert plugins.find(plugins.RUNTIMES, "ort").__name__ == "runtimes.ort"
    assert plugins.find(plugins.RUNTIMES, "openvino").__name__ == "runtimes.ov"
    with pytest.raises(ConfigError, match="did you mean 'coreml'"):
        plugins.find(plugins.RUNTIMES, "coremll")
    with pytest.raises(ConfigError, match=r"choose one of .*onnxruntime.*torch\.$"):
        plugins.find(plugins.RUNTIMES, "zzz")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"edgedistill {__version__}\n"


@pytest.mark.parametrize("words", [[], *([name] for name in plugins.names(plugins.COMMANDS))])
def test_help_teaches_and_loads_nothing_heavy(words):
    code = (
        "import atexit, json, sys; from edgedistill.cli import main; "
        f"atexit.register(lambda: sys.stderr.write(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))); "
        f"main({[*words, '--help']!r})"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stderr) == []
    assert made.stdout.startswith(" ".join(["usage: edgedistill", *words]))
    assert re.search("examples|Exit status", made.stdout)


@pytest.mark.parametrize(
    "words", ["distill", "export onnx", "quantize", "sample", "parity", "demo", "env"]
)
def test_the_examples_of_the_help_are_command_lines_on_what_the_demo_makes(words, capsys):
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--help"])
    text = capsys.readouterr().out.replace("\\\n", " ")
    examples = re.findall(r"^  edgedistill (.*)$", text, re.MULTILINE)
    assert examples
    for line in examples:
        given = shlex.split(line.partition(" > ")[0], comments=True)
        options = cli._parser(given).parse_args(given)
        named = [getattr(options, "bundle", None), *getattr(options, "bundles", [])]
        made = {
            Path("demo/bundle"): "float",
            Path("demo/compressed"): "int8",
            Path("OUT"): "pipeline",  # what the examples of `export` write
        }
        held = [made[path] for path in named if path is not None]
        assert getattr(options, "target", None) != Path("demo/small"), "a student lies there"
        if "int8" in str(getattr(options, "artifact", "")):
            assert held == ["int8"]


def test_python_dash_m_is_the_same_command():
    words = [sys.executable, "-m", "edgedistill", "--version"]
    made = subprocess.run(words, capture_output=True, text=True, check=True)
    assert made.stdout == f"edgedistill {__version__}\n"


def test_a_closed_pipe_is_no_error():
    line = f"{sys.executable} -m edgedistill sample --help | true; echo ${{PIPESTATUS[0]}}"
    made = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "0"
    assert made.stderr == ""


def test_tables_align_numbers_to_the_right():
    assert aligned(["name", "dB"], [["a", "9.5"], ["long", "-10.25"], ["b", "inf"]]).split(
        "\n"
    ) == [
        "name      dB",
        "----  ------",
        "a        9.5",
        "long  -10.25",
        "b        inf",
    ]
