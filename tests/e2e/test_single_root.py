"""One exported folder opens in diffusers, optimum, OpenVINO GenAI and our runtimes, and gives the same picture."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.bundle import Bundle
from edgedistill.files import read_json
from edgedistill.layout.checking import check_layout
from edgedistill.models import store
from edgedistill.models.source import open_source
from edgedistill.noise import noise_bank
from edgedistill.pipeline import load
from edgedistill.plans import PORTABLE
from edgedistill.student import Student
from export.assemble import export_student
from export.formats import ExportOptions
from export.single_root import layout_for
from quantize.config import WeightOnlyConfig

pytestmark = [
    # The loaders' own: torch.jit where optimum is imported, "\." in a pattern of optimum-intel, a tokenizer's regular
    # expression and its files that are left open in openvino-tokenizers, SWIG's types in openvino-genai.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning"),
]
SINGLE_ROOT = "single-root"
PROMPT = "a cat and a dog"
STEPS = (1, 2, 4, 8)
DDIM = {**PORTABLE, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# By the kind of the pipeline: its folder, its scheduler (None: its own), how it is guided, in how many steps.
KINDS: dict[str, tuple[str, dict | None, float | None, Sequence[int]]] = {
    "sd": ("sd", DDIM, None, STEPS),
    "sd-cfg": ("sd", DDIM, 3.0, STEPS),
    "sd2": ("sd2", {**DDIM, "prediction_type": "v_prediction"}, None, (1, 4)),
    "lcm": ("lcm", None, 4.5, STEPS),
    "sdxl": ("sdxl", DDIM, None, STEPS),
    "sdxl-cfg": ("sdxl", DDIM, 3.0, STEPS),
    "sdxl-lcm": ("sdxl-lcm", None, 4.5, STEPS),
}
LATENTS, GREY = 1e-4, 1 / 255 + 1e-4  # OpenVINO GenAI cuts off where others round


def student_of(pipelines: Path, kind: str) -> Student:
    """Open a pipeline with one sampler per number of steps, the first of them the default."""
    folder, scheduler, scale, steps = KINDS[kind]
    made = [
        open_source(pipelines / folder, num_steps=count, guidance_scale=scale, scheduler=scheduler)
        for count in steps
    ]
    further = {f"steps{count}": one.table for count, one in zip(steps, made, strict=True)}
    return dataclasses.replace(made[0], further=further)


class Exported:
    """A single root, and how its kind is called."""

    def __init__(
        self, kind: str, bundle: Bundle, samplers: Mapping[int, str] | None = None
    ) -> None:
        self.bundle, self.root = bundle, bundle.root
        _, _, self.scale, self.steps = KINDS[kind]
        self.samplers = samplers or {steps: f"steps{steps}" for steps in self.steps}
        self.opened: dict[str, Any] = {}

    def noise(self, steps: int) -> list[np.ndarray]:
        return noise_bank(self.bundle.samplers[self.samplers[steps]], [5])

    def ours(self, runtime: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the last latents, and the picture in [0, 1] with its channels last."""
        if runtime not in self.opened:
            self.opened[runtime] = load(self.bundle, runtime)
        states = []
        made = self.opened[runtime](
            prompt=PROMPT,
            sampler=self.samplers[steps],
            noise=self.noise(steps),
            observe=lambda trace: states.append(trace.next),
        )
        return states[-1], made.array.transpose(0, 2, 3, 1) / 2 + 0.5

    def theirs(self, pipe: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
        """Call a pipeline of diffusers' kind with our noise, twice: for latents and for the picture."""
        first, *fresh = (torch.from_numpy(array) for array in self.noise(steps))
        pipe.set_progress_bar_config(disable=True)
        made = []
        for kind in ("latent", "np"):
            left = iter(fresh)
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_lcm.randn_tensor",
                lambda *_, left=left, **__: next(left),
            )
            found = pipe(
                PROMPT,
                latents=first.clone(),
                num_inference_steps=steps,
                guidance_scale=self.scale or 1.0,
                output_type=kind,
            )
            made.append(np.asarray(found.images))
        return made[0], made[1]


@pytest.fixture(scope="module")
def exports(tiny_pipelines, tmp_path_factory) -> Callable[[str], Exported]:
    """Export a kind of pipeline as ONNX and OpenVINO, once."""
    held: dict[str, Exported] = {}
    place = tmp_path_factory.mktemp("roots")

    def export(kind: str) -> Exported:
        if kind not in held:
            options = ExportOptions(layout=SINGLE_ROOT)
            student = student_of(tiny_pipelines, kind)
            made = export_student(student, place / kind, ["onnx", "openvino"], options)
            held[kind] = Exported(kind, made)
        return held[kind]

    return export


def open_diffusers(root: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(root)


def open_ort(root: Path) -> Any:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra `interop`")
    return optimum.ORTDiffusionPipeline.from_pretrained(root)


def open_ov(root: Path) -> Any:
    optimum = pytest.importorskip("optimum.intel", reason="needs the extra `interop`")
    f32 = {"INFERENCE_PRECISION_HINT": "f32"}
    return optimum.OVDiffusionPipeline.from_pretrained(root, ov_config=f32)


LOADERS = {"diffusers": open_diffusers, "optimum-onnx": open_ort, "optimum-intel": open_ov}
CLASSES = {
    "sd": "StableDiffusionPipeline",
    "sd-cfg": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "lcm": "LatentConsistencyModelPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-cfg": "StableDiffusionXLPipeline",
    "sdxl-lcm": "StableDiffusionXLPipeline",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_make_our_latents_and_our_picture(
    exports, kind: str, loader: str, monkeypatch
) -> None:
    exported = exports(kind)
    monkeypatch.setattr(logging.getLogger("diffusers"), "disabled", True)
    pipe = LOADERS[loader](exported.root)
    assert type(pipe).__name__.removeprefix("ORT").removeprefix("OV") == CLASSES[kind]
    for steps in exported.steps:
        latents, picture = exported.theirs(pipe, steps, monkeypatch)
        own_latents, own_picture = exported.ours("torch", steps)
        np.testing.assert_allclose(latents, own_latents, atol=LATENTS)
        np.testing.assert_allclose(picture, own_picture.clip(0, 1), atol=LATENTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_openvino_genai_makes_our_latents_and_our_picture(exports, kind: str) -> None:
    genai = pytest.importorskip("openvino_genai", reason="needs openvino-genai")
    pytest.importorskip("openvino_tokenizers", reason="needs openvino-tokenizers")
    import openvino as ov

    exported = exports(kind)
    pipe = genai.Text2ImagePipeline(exported.root, "CPU", INFERENCE_PRECISION_HINT="f32")

    class Given(genai.Generator):
        def __init__(self, noise: list[np.ndarray]) -> None:
            super().__init__()
            self.left = iter(noise)

        def randn_tensor(self, shape: Any) -> Any:
            # It draws once more behind the last step of an LCM, and leaves it.
            return ov.Tensor(next(self.left, np.zeros(list(shape), np.float32)).copy())

    for steps in exported.steps:
        settings = {"guidance_scale": exported.scale or 1.0, "num_inference_steps": steps}
        sides = {"height": 16, "width": 16}
        for _ in range(9):
            states: list[Any] = []
            told = {"callback": lambda *step, states=states: states.append(step[2])}
            settings["generator"] = Given(exported.noise(steps))
            shown = pipe.generate(PROMPT, **settings, **sides, **told)
            if len(states) == steps:
                break  # else it was done before its thread for callbacks came to the last, which it drops
        own_latents, own_picture = exported.ours("torch", steps)
        np.testing.assert_allclose(states[steps - 1].data, own_latents, atol=LATENTS)
        np.testing.assert_allclose(shown.data / np.float32(255), own_picture.clip(0, 1), atol=GREY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_our_runtimes_speak_the_dialects_of_loaders(exports, kind: str, runtime: str) -> None:
    exported = exports(kind)
    for steps in exported.steps:
        for own, reference in zip(
            exported.ours(runtime, steps), exported.ours("torch", steps), strict=True
        ):
            np.testing.assert_allclose(own, reference, atol=LATENTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd2", "sdxl-lcm"])
def test_apples_graphs_make_our_latents_and_our_picture(
    tiny_pipelines, tmp_path, kind: str
) -> None:
    options = ExportOptions(layout=SINGLE_ROOT, dtype="float32")
    student = student_of(tiny_pipelines, kind)
    made = export_student(student, tmp_path / "root", ["coreml"], options)
    exported = Exported(kind, made)
    for steps in exported.steps:
        for own, reference in zip(
            exported.ours("coreml", steps), exported.ours("torch", steps), strict=True
        ):
            np.testing.assert_allclose(own, reference, atol=LATENTS)


@pytest.mark.slow
def test_without_guidance_our_onnx_runner_leaves_its_inputs_alone(exports) -> None:
    """optimum-onnx writes the prediction over the latents where nothing copied them in between (IO binding)."""
    exported = exports("sd")
    network = load(exported.bundle, "onnxruntime").networks["unet"]
    state = exported.noise(4)[0]
    given = {
        "sample": state.copy(),
        "timestep": 999.0,
        "encoder_hidden_states": np.zeros((1, 77, 16), np.float32),
    }
    first = network(given)["out_sample"]
    kept = first.copy()
    network({**given, "timestep": 0.0})
    np.testing.assert_array_equal(given["sample"], state)
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, given["sample"])


@pytest.mark.slow
def test_io_binding_spoils_their_student_without_guidance_and_not_ours(
    exports, monkeypatch
) -> None:
    exported = exports("sd")
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra `interop`")
    monkeypatch.setattr(logging.getLogger("diffusers"), "disabled", True)
    reference = exported.ours("torch", 4)[0]
    np.testing.assert_allclose(exported.ours("onnxruntime", 4)[0], reference, atol=LATENTS)
    unbound, bound = (
        exported.theirs(
            optimum.ORTDiffusionPipeline.from_pretrained(exported.root, use_io_binding=binding),
            4,
            monkeypatch,
        )[0]
        for binding in (False, True)
    )
    np.testing.assert_allclose(unbound, reference, atol=LATENTS)
    if np.abs(bound - unbound).max() <= LATENTS:
        pytest.skip("the installed optimum-onnx no longer writes over the latents")
    assert np.abs(bound - unbound).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_free_sizes_make_pictures_of_any(tiny_pipelines, tmp_path, form, monkeypatch) -> None:
    student = open_source(tiny_pipelines / "sd", num_steps=2, scheduler=DDIM)
    options = ExportOptions(layout=SINGLE_ROOT, free_sizes=True)
    root = export_student(student, tmp_path / "root", [form], options).root
    monkeypatch.setattr(logging.getLogger("diffusers"), "disabled", True)
    noise = torch.randn(2, 4, 20, 12, generator=torch.Generator().manual_seed(0))
    made = []
    for name in ("diffusers", {"onnx": "optimum-onnx", "openvino": "optimum-intel"}[form]):
        pipe = LOADERS[name](root)
        pipe.set_progress_bar_config(disable=True)
        settings = {"height": 40, "width": 24, "num_inference_steps": 2, "guidance_scale": 1.0}
        made.append(pipe([PROMPT] * 2, latents=noise, output_type="np", **settings).images)
    assert made[0].shape == (2, 40, 24, 3)
    np.testing.assert_allclose(made[1], made[0], atol=LATENTS)


@pytest.mark.slow
def test_a_student_with_guidance_as_input_is_a_latent_consistency_model(
    tiny_pipelines, tmp_path, monkeypatch
) -> None:
    source = open_source(tiny_pipelines / "lcm", num_steps=1, guidance_scale=4.5)
    folder = shutil.copytree(tiny_pipelines / "lcm", tmp_path / "student")
    store.save(store.load(folder / "unet"), folder / "unet")
    config = read_json(folder / "unet/config.json")
    assert config["_class_name"] == "ExtendedUNet2DConditionModel"
    dataclasses.replace(source, root=folder).write_manifest()
    student = Student.open(folder)
    assert layout_for(student, tmp_path / "root", None) == SINGLE_ROOT
    made = export_student(student, tmp_path / "root", ["onnx"], ExportOptions(layout=SINGLE_ROOT))
    exported = Exported("lcm", made, {1: "default"})
    pipe = open_diffusers(made.root)
    assert type(pipe).__name__ == "LatentConsistencyModelPipeline"
    picture = exported.theirs(pipe, 1, monkeypatch)[1]
    for runtime in ("torch", "onnxruntime"):
        np.testing.assert_allclose(exported.ours(runtime, 1)[1].clip(0, 1), picture, atol=LATENTS)


@pytest.mark.slow
def test_smaller_networks_take_the_place_of_their_sources(exports, tmp_path, monkeypatch) -> None:
    from quantize.assemble import quantize_bundle

    exported = exports("sd")
    made = quantize_bundle(
        exported.bundle, tmp_path / "root", WeightOnlyConfig(), only=["openvino"]
    )
    networks = made.artifacts["openvino-int8-weights"].networks
    assert networks["unet"].path == "unet/openvino_model.xml"
    smaller = Exported("sd", made)
    monkeypatch.setattr(logging.getLogger("diffusers"), "disabled", True)
    theirs = exported.theirs(open_ov(made.root), 2, monkeypatch)[1]
    np.testing.assert_allclose(theirs, smaller.ours("openvino", 2)[1].clip(0, 1), atol=LATENTS)
    assert np.abs(theirs - exported.ours("openvino", 2)[1]).max() > LATENTS
    both = quantize_bundle(exported.bundle, exported.root, WeightOnlyConfig(), only=["openvino"])
    assert both.artifacts["openvino-int8-weights"].networks["unet"].path == (
        "openvino/int8-weights/unet.xml"
    )
    assert both.single_root


@pytest.mark.slow
def test_a_small_autoencoder_runs_in_every_loader_that_its_folder_is_for(
    with_small_autoencoder, tmp_path, monkeypatch
) -> None:
    student = with_small_autoencoder
    options = ExportOptions(layout=SINGLE_ROOT)
    made = export_student(student, tmp_path / "root", ["onnx"], options)
    assert read_json(made.root / "model_index.json")["vae"] == ["diffusers", "AutoencoderTiny"]
    found = check_layout(made.root, ["diffusers", "ort"])
    assert [item for item in found if item.level == "error"] == []
    exported = Exported("sd", made, {2: "default"})
    monkeypatch.setattr(logging.getLogger("diffusers"), "disabled", True)
    _, own = exported.ours("torch", 2)
    np.testing.assert_allclose(exported.ours("onnxruntime", 2)[1], own, atol=LATENTS)
    for open_one in (open_diffusers, open_ort):
        _, picture = exported.theirs(open_one(made.root), 2, monkeypatch)
        np.testing.assert_allclose(picture, own.clip(0, 1), atol=LATENTS)
    # OpenVINO GenAI compares the class with its own, so that the index changes with the format.
    both = export_student(student, tmp_path / "root", ["openvino"], options)
    assert read_json(both.root / "model_index.json")["vae"] == ["diffusers", "AutoencoderKL"]
    errors = [
        item
        for item in check_layout(both.root, ["diffusers", "ort", "openvino", "genai"])
        if item.level == "error"
    ]
    assert {item.loader for item in errors} == {"diffusers"}
