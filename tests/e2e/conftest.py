"""What is opened end to end: a hand-written bundle for a runtime of a few lines; recipes made short."""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgedistill import bundle as bundles
from edgedistill import cli, drafts, plugins, probes
from edgedistill.config import read_yaml
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import require
from edgedistill.files import read_json
from edgedistill.network import CheckedNetwork
from edgedistill.noise import noise_bank
from edgedistill.pipeline import load
from edgedistill.plans import PORTABLE
from edgedistill.table import Condition, Guidance, Next, Row, SamplerTable, Stage
from edgedistill.teacher import PACKAGED

if TYPE_CHECKING:
    from edgedistill.student import Student
    from edgedistill.training.recipe import Recipe

SHAPE = (1, 8, 8)
SIGNATURE = Signature(
    (
        TensorSpec("sample", ("batch", *SHAPE), "float32", "x"),
        TensorSpec("timestep", ("batch",), "float32", "t"),
        TensorSpec("class_labels", ("batch",), "int32", "class"),
        TensorSpec("w", ("batch",), "float32", "w"),
    ),
    (TensorSpec("out_sample", ("batch", *SHAPE), "float32", "raw"),),
)
TABLE = SamplerTable(
    stages=(
        Stage(
            SHAPE,
            (
                Row(
                    ("denoiser",),
                    {"timestep": 999.0},
                    x0=(0.1, -0.9),
                    next=Next(x0=0.8, noise=0.6),
                    noise=1,
                ),
                Row(("denoiser",), {"timestep": 499.0}, x0=(0.8, -0.6), next=Next(x0=1.0)),
            ),
        ),
    ),
    noise_count=2,
    guidance=Guidance("embedded", "w", 2.0, (1.0, 4.0)),
    conditions=(Condition("class_labels", "class", 3),),
    clamp=(-1.0, 1.0),
)
W_RESPONSE = 0.02
GOLDEN_SEEDS = [0, 0, 0, 1]
GOLDEN_CONDITIONS = {
    "class_labels": np.array([0, 1, 0, 2], np.int32),
    "w": np.array([1, 1, 3, 0], np.float32),
}


def _predict(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stand in for a network: smooth, and moved by every input."""
    z, t, k, w = (feeds[spec.name] for spec in SIGNATURE.inputs)
    shift = np.sin(np.arange(64, dtype=np.float32).reshape(SHAPE) * (1 + k[:, None, None, None]))
    raw = np.tanh(z * (t / 1000)[:, None, None, None]) - shift * (
        0.3 + W_RESPONSE * w[:, None, None, None]
    )
    return {"out_sample": raw.astype(np.float32)}


class FakeRuntime:
    """A runtime whose answers a test can spoil."""

    def __init__(self) -> None:
        self.options = {}
        self.spoil = lambda raw, _feeds: raw

    def open(self, path, signature, options):
        assert path.read_text() == "weights"
        assert signature == SIGNATURE
        self.options = dict(options)
        return lambda feeds: {"out_sample": self.spoil(_predict(feeds)["out_sample"], feeds)}

    def describe(self, options) -> str:
        return " ".join(["numpy", *(f"{name}={value}" for name, value in options.items())])


class AbsentRuntime:
    """A runtime whose package is not installed."""

    def open(self, *_):
        require("no_such_package", "absent")

    def describe(self, *_) -> str:
        raise AssertionError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """Two runtimes that another distribution seems to bring: ``fake`` and ``absent``."""
    runtime = FakeRuntime()
    held = plugins.entries(plugins.RUNTIMES)
    brought = {}
    for name, module in (("fake", runtime), ("absent", AbsentRuntime())):
        monkeypatch.setitem(sys.modules, f"brought_{name}", module)
        brought[name] = EntryPoint(name, f"brought_{name}", plugins.RUNTIMES)
    commands = plugins.entries(plugins.COMMANDS)
    monkeypatch.setattr(
        plugins,
        "entries",
        lambda group: {**held, **brought} if group == plugins.RUNTIMES else commands,
    )
    return runtime


@pytest.fixture
def predict() -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The fake runtime's network, unspoiled."""
    return _predict


@pytest.fixture
def make(tmp_path: Path, fake: FakeRuntime) -> Callable[..., Path]:
    """Write a bundle of artifacts name: (runtime, precision), all with the same network."""
    assert fake.describe({}) == "numpy"
    return lambda artifacts, name="bundle": _write(tmp_path / name, artifacts)


@pytest.fixture
def handmade(make: Callable[..., Path]) -> Path:
    """A bundle with one exact float32 artifact for ``fake``."""
    return make({"fake-float32": ("fake", "float32")})


def _write(root: Path, artifacts: dict[str, tuple[str, str]]) -> Path:
    held = {}
    for name, (runtime, precision) in artifacts.items():
        path = root / runtime / precision / f"{len(held)}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("weights")
        file = bundles.NetworkFile(path.relative_to(root).as_posix(), SIGNATURE)
        held[name] = bundles.Artifact(name, runtime, runtime, precision, {"denoiser": file})
    network = CheckedNetwork("denoiser", SIGNATURE, _predict)
    golden = probes.record_golden(TABLE, {"denoiser": network}, GOLDEN_SEEDS, GOLDEN_CONDITIONS)
    probes.save_probes(golden, root / bundles.GOLDEN)
    drafts.write_manifest(bundles.Bundle(root, "handmade", "f" * 64, TABLE, held))
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process; gives status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(item) for item in arguments])
        return status, *capsys.readouterr()

    return call


ONE_LEVEL = {
    "UNet2DModel": {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
    "UNet2DConditionModel": {
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
}
SHORT = {"batch_size": 4, "count": 16, "iterations": 4, "preview_every": 0, "warmup": 0}
SHORTER = {
    "guide": ("guide.start_steps=4", "guide.steps=[4,2]", "guide.widths=[8]"),
    "guided": ("guided.start_steps=4",),
    "lowdiff": ("lowdiff.steps=[[2,2],[1,1]]",),
}


@pytest.fixture(scope="session")
def tiny_teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged teachers with random networks of one level, folders by their names."""
    import torch

    from edgedistill.models import store

    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    for name, packaged in PACKAGED.items():
        shutil.copytree(packaged, root / name)
        config = read_json(packaged / "unet" / "config.json")
        config |= {"block_out_channels": [16], **ONE_LEVEL[config["_class_name"]]}
        store.save(store.build(config), root / name / "unet")
    return root


@pytest.fixture(scope="session")
def short(tiny_teachers: Path) -> "Callable[..., Recipe]":
    """Open a recipe of a packaged teacher with the tiny one in its place and 4 iterations per phase."""
    from edgedistill.training.recipe import Recipe

    def load(path: Path, *further: str) -> Recipe:
        settings = read_yaml(path)
        sets = [f"teacher={tiny_teachers / settings['teacher']}", "training.tensorboard=false"]
        sets += [*_shortened(settings), *SHORTER.get(settings["method"], ())]
        return Recipe.load(path, [*sets, *further])

    return load


def _shortened(settings: Mapping[str, Any], group: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _shortened(value, f"{group}{key}.")
        elif key in SHORT:
            yield f"{group}{key}={SHORT[key]}"


DDIM = {**PORTABLE, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Unclipped, the estimates of a random network in pixels reach hundreds, of which float32 keeps no 1e-4.
OF_KIND = {"sd": DDIM, "sdxl": DDIM, "class": {**DDIM, "clip_sample": True}}


@pytest.fixture(scope="session")
def opened(tiny_pipelines: Path) -> "Callable[..., Student]":
    """Open a tiny pipeline with a sampler per number of steps, ``steps1`` and so on, the first the default."""
    from edgedistill.models.source import open_source

    def call(kind: str, scale: float | None, steps: Sequence[int]) -> "Student":
        scheduler = OF_KIND.get(kind)
        made = {
            f"steps{count}": open_source(
                tiny_pipelines / kind, num_steps=count, guidance_scale=scale, scheduler=scheduler
            )
            for count in steps
        }
        first = next(iter(made.values()))
        return dataclasses.replace(first, further={name: one.table for name, one in made.items()})

    return call


@pytest.fixture(scope="session")
def drawn() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Run a bundle from seeds 5 and 6; gives the last latents, and the images in [0, 1]."""

    def call(
        bundle: bundles.Bundle, runtime: str, sampler: str | None = None, **asked: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        table = bundle.samplers[sampler or "default"]
        states: list[np.ndarray] = []
        made = load(bundle, runtime)(
            sampler=sampler,
            noise=noise_bank(table, [5, 6]),
            observe=lambda trace: states.append(trace.next),
            **asked,
        )
        return states[-1], made.array / 2 + 0.5

    return call
