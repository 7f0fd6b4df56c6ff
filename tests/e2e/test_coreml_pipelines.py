"""Pipelines as Core ML packages: what Apple's Swift package opens, and what the evaluator draws with them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgedistill.agreement import snr_db
from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.layout.checking import check_layout
from edgedistill.layout.graphs import read_graph
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions

pytestmark = pytest.mark.slow
PROMPTS = ["a cat and a dog", "a ship in the rain"]
LATENTS, GREY = 1e-4, 1 / 255
Drawn = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def xl_root(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Stable Diffusion XL in two steps that an unmodified Swift package takes, as the command writes it."""
    root = tmp_path_factory.mktemp("xl") / "root"
    asked = ["--layout", "single-root", "--scheduler", "swift"]
    asked += ["--num-inference-steps", "2", "--guidance-scale", "3"]
    assert main(["export", "coreml", "-m", str(tiny_pipelines / "sdxl"), str(root), *asked]) == 0
    return Bundle.open(root)


def test_swift_finds_nothing_amiss_in_stable_diffusion_xl(xl_root: Bundle) -> None:
    assert check_layout(xl_root.root, ["swift"]) == []


# By network, what contracts name: tensors that go in, the one that Swift takes or all that come out.
APPLES_XL = {
    "text_encoder": (
        {"input_ids": (1, 77)},
        {"hidden_embeds": (1, 77, 16), "pooled_outputs": (1, 16)},
    ),
    "text_encoder_2": (
        {"input_ids": (1, 77)},
        {"hidden_embeds": (1, 77, 16), "pooled_outputs": (1, 12)},
    ),
    "unet": (
        {
            "sample": (2, 4, 8, 8),
            "timestep": (2,),
            "encoder_hidden_states": (2, 32, 1, 77),
            "text_embeds": (2, 12),
            "time_ids": (2, 6),
        },
        {"noise_pred": (2, 4, 8, 8)},
    ),
    "vae_decoder": ({"z": (1, 4, 8, 8)}, {"image": (1, 3, 16, 16)}),
    "vae_encoder": ({"x": (1, 3, 16, 16)}, {"latent": (1, 8, 8, 8)}),
}


def test_packages_of_stable_diffusion_xl_take_and_give_what_swift_sends_and_reads(
    xl_root: Bundle,
) -> None:
    folder = xl_root.root / "coreml/packages"
    paths = {name: folder / f"Stable_Diffusion_version_sdxl_{name}.mlpackage" for name in APPLES_XL}
    assert {*folder.iterdir()} == {*paths.values()}
    graphs = {name: read_graph(path) for name, path in paths.items()}
    found = {
        name: tuple(
            {item.name: item.shape for item in side} for side in (graph.inputs, graph.outputs)
        )
        for name, graph in graphs.items()
    }
    assert found == APPLES_XL
    assert {
        item.dtype for graph in graphs.values() for item in (*graph.inputs, *graph.outputs)
    } == {"float32"}


def test_packages_of_stable_diffusion_xl_draw_what_torch_draws(
    xl_root: Bundle, drawn: Drawn
) -> None:
    pairs = zip(
        *(drawn(xl_root, runtime, prompt=PROMPTS) for runtime in ("coreml", "torch")), strict=True
    )
    for ours, reference in pairs:
        assert snr_db(reference, ours) >= 45.0


DRAWING = ("text_encoder", "unet", "vae_decoder")
# By a name, the pipeline: its kind, its guidance, in how many steps, in which layout.
TEXT: dict[str, tuple[str, float | None, Sequence[int], str]] = {
    "sd": ("sd", None, (1, 2, 4, 8), "single-root"),
    "sd-cfg": ("sd", 3.0, (1, 2, 4, 8), "single-root"),
    "lcm": ("lcm", 4.5, (1, 4), "bundle"),
}


@pytest.mark.parametrize("name", TEXT)
def test_packages_in_float32_draw_what_torch_draws_whatever_the_steps(
    name: str, opened: Callable[..., Student], drawn: Drawn, tmp_path: Path
) -> None:
    kind, scale, steps, layout = TEXT[name]
    options = ExportOptions(dtype="float32", layout=layout, networks=DRAWING)
    bundle = export_student(opened(kind, scale, steps), tmp_path / "out", ["coreml"], options)
    for count in steps:
        asked = {"sampler": f"steps{count}", "prompt": PROMPTS}
        (latents, image), (wanted, reference) = (
            drawn(bundle, runtime, **asked) for runtime in ("coreml", "torch")
        )
        np.testing.assert_allclose(latents, wanted, atol=LATENTS)
        np.testing.assert_allclose(image, reference, atol=GREY)
        assert np.abs(wanted[0] - wanted[1]).max() > 0.05
