"""What a single root holds, where, and what cannot be one."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from edgedistill.agreement import snr_db
from edgedistill.bundle import Bundle
from edgedistill.errors import BundleError, ConfigError, ContractError
from edgedistill.files import read_json, write_json
from edgedistill.layout.checking import check_layout
from edgedistill.models import store
from edgedistill.models.source import EMBEDDED_RANGE, open_source
from edgedistill.noise import noise_bank
from edgedistill.pipeline import load
from edgedistill.plans import PORTABLE
from edgedistill.student import Student
from edgedistill.teacher import Teacher
from edgedistill.text import Tokenizer
from export.assemble import export_student
from export.formats import ExportOptions
from export.layouts import place
from export.single_root import layout_for, resized
from quantize.assemble import plan
from quantize.config import WeightOnlyConfig
from runtimes.report import render
from runtimes.verify import verify

pytestmark = [
    # openvino-tokenizers' own: a tokenizer's regular expression, and what transformers says when it is read.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SINGLE_ROOT = "single-root"
PROMPT = "a cat and a dog"
DDIM = {**PORTABLE, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NETWORKS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def onnx_root(tiny_pipelines, tmp_path_factory) -> Bundle:
    student = open_source(tiny_pipelines / "sd", num_steps=1, scheduler=DDIM)
    target = tmp_path_factory.mktemp("root") / "sd"
    return export_student(student, target, ["onnx"], ExportOptions(layout=SINGLE_ROOT))


def test_files_lie_where_loaders_look(onnx_root: Bundle) -> None:
    root = onnx_root.root
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    expected = {f"{name}/{file}" for name in NETWORKS for file in ("config.json", "model.onnx")}
    expected |= {f"tokenizer/{name}" for name in ("vocab.json", "merges.txt")}
    expected |= {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert expected <= files
    torch_files = onnx_root.artifacts["torch-float32"].networks
    assert {name: file.path for name, file in torch_files.items()} == {
        "text_encoder": "text_encoder",
        "unet": "unet",
        "vae_decoder": "vae",
        "vae_encoder": "vae",
    }


def test_the_index_names_stock_classes_only(onnx_root: Bundle) -> None:
    index = read_json(onnx_root.root / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    entries = {name: tuple(entry) for name, entry in index.items() if isinstance(entry, list)}
    assert entries == {
        "feature_extractor": (None, None),
        "image_encoder": (None, None),
        "safety_checker": (None, None),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }


def test_another_format_joins_and_another_precision_is_refused(
    onnx_root: Bundle, tiny_pipelines, tmp_path
) -> None:
    target = shutil.copytree(onnx_root.root, tmp_path / "root")
    student = open_source(tiny_pipelines / "sd", num_steps=1, scheduler=DDIM)
    half = ExportOptions(layout=SINGLE_ROOT, dtype="float16")
    both = export_student(student, target, ["openvino"], half)
    assert sorted(both.artifacts) == ["onnx-float32", "openvino-float16", "torch-float32"]
    assert (target / "unet/model.onnx").read_bytes() == onnx_root.path(
        "unet/model.onnx"
    ).read_bytes()
    assert layout_for(student, target, None) == SINGLE_ROOT
    with pytest.raises(BundleError, match="holds openvino in float16, and loaders look for one"):
        export_student(student, target, ["openvino"], ExportOptions(layout=SINGLE_ROOT))
    other = open_source(tiny_pipelines / "sd", num_steps=2, scheduler=DDIM)
    with pytest.raises(
        BundleError, match="holds 'sd' with other samplers .default there: 1 rows of"
    ):
        export_student(other, target, ["openvino"], half)
    with pytest.raises(BundleError, match="where a path itself holds `text_encoder`"):
        export_student(
            student, tmp_path / "text_encoder_1", ["onnx"], ExportOptions(layout=SINGLE_ROOT)
        )


def test_no_loader_objects(onnx_root: Bundle) -> None:
    found = check_layout(onnx_root.root, ["diffusers", "ort"])
    assert [finding for finding in found if finding.level == "error"] == []


@pytest.fixture(scope="module")
def lcm_root(tiny_pipelines, tmp_path_factory) -> Bundle:
    """Graphs that take a guidance scale, which Apple's packages, that hold one, joined."""
    student = open_source(tiny_pipelines / "lcm", num_steps=2, guidance_scale=4.5)
    root, options = tmp_path_factory.mktemp("lcm") / "root", ExportOptions(layout=SINGLE_ROOT)
    first = export_student(student, root, ["onnx"], options)
    made = export_student(student, root, ["coreml"], options)
    assert made.fingerprint == first.fingerprint
    assert export_student(student, root, ["onnx", "coreml"], options) == made
    return made


@pytest.mark.slow
def test_apples_packages_hold_one_guidance_scale(lcm_root: Bundle) -> None:
    root = lcm_root.root
    packages = {path.name for path in (root / "coreml/packages").iterdir()}
    assert packages == {f"Stable_Diffusion_version_lcm_{name}.mlpackage" for name in NETWORKS}
    assert {path.name for path in (root / "coreml/Resources").iterdir()} == {
        "vocab.json",
        "merges.txt",
    }
    assert (root / "coreml/compile_on_mac.sh").stat().st_mode & 0o100
    errors = [item for item in check_layout(root, ["swift"]) if item.level == "error"]
    assert errors == []
    scales = {name: item.guidance_scale for name, item in lcm_root.artifacts.items()}
    assert scales == {"torch-float32": None, "onnx-float32": None, "coreml-float16": 4.5}
    smaller = plan(lcm_root, WeightOnlyConfig("palette6"), ["coreml"]).jobs[0].result
    assert smaller.guidance_scale == 4.5
    assert lcm_root.table.guidance.range == EMBEDDED_RANGE
    ours, reference = (
        load(lcm_root, runtime)(prompt=PROMPT, seed=5).array for runtime in ("coreml", "torch")
    )
    assert snr_db(reference, ours) >= 45.0
    one, other = (
        load(lcm_root, "onnxruntime")(prompt=PROMPT, seed=5, guidance_scale=scale).array
        for scale in (4.5, 2.0)
    )
    assert snr_db(reference, one) >= 100.0 > snr_db(reference, other)
    with pytest.raises(ContractError, match="guidance is 'baked' at scale 4.5"):
        load(lcm_root, "coreml")(prompt=PROMPT, guidance_scale=2.0)


@pytest.mark.slow
def test_the_script_compiles_what_apples_swift_package_looks_for(
    lcm_root: Bundle, tmp_path
) -> None:
    folder = shutil.copytree(lcm_root.root / "coreml", tmp_path / "coreml")
    for name, script in (
        ("xcrun", 'mkdir "$4/any.mlmodelc"; echo "$3" > "$4/any.mlmodelc/made"'),
        ("edgedistill", 'echo "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    paths = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", folder / "compile_on_mac.sh"], env=paths, check=True)
    made = {path.parent.name: path.read_text() for path in folder.glob("Resources/*/made")}
    names = ("TextEncoder", "Unet", "VAEDecoder", "VAEEncoder")
    assert made == {
        f"{name}.mlmodelc": f"packages/Stable_Diffusion_version_lcm_{network}.mlpackage\n"
        for name, network in zip(names, NETWORKS, strict=True)
    }
    # What is verified is what was compiled: the runtime finds it beside the package.
    told = (folder / "report.json").read_text()
    assert told == "parity .. --runtime coreml --device all --compiled --json\n"
    for name, network in zip(names, NETWORKS, strict=True):
        beside = folder / f"packages/Stable_Diffusion_version_lcm_{network}.mlmodelc"
        assert beside.resolve() == (folder / f"Resources/{name}.mlmodelc").resolve()


def test_a_pipeline_is_called_as_where_it_is_from(tiny_pipelines, tmp_path) -> None:
    folder = shutil.copytree(tiny_pipelines / "sd", tmp_path / "a copy")
    index = read_json(folder / "model_index.json")
    for told, name in (
        ("owner/model-1.5", "owner/model-1.5"),
        ("/home/me/model", "a copy"),
        (None, "a copy"),
    ):
        write_json(folder / "model_index.json", {**index, "_name_or_path": told})
        assert open_source(folder, num_steps=1).name == name
    package = place(SINGLE_ROOT, "coreml", "float16", "unet", ".mlpackage", model="owner/a copy")
    assert package == "coreml/packages/Stable_Diffusion_version_owner_a_copy_unet.mlpackage"


@pytest.mark.slow
def test_parity_of_a_scale_that_lies_in_the_graphs_is_on_samples_of_that_scale(
    lcm_root: Bundle,
) -> None:
    report = verify([lcm_root])
    compared = {item.name: item for item in report.artifacts}
    assert report.failures == ()
    assert "w" in compared["onnx-float32"].sensitivity
    apples = compared["coreml-float16"]
    assert apples.output.shape == apples.reference.shape
    assert len(apples.output) == 6  # of 8, two of which are of the far end of the range
    assert {*apples.sensitivity, *apples.faint} == {"input_ids"}
    assert "coreml-float16" in render(report)


def test_pixel_students_stay_bundles(student, tmp_path) -> None:
    assert layout_for(student, tmp_path, None) == "bundle"
    with pytest.raises(ConfigError, match=r"loaders know no pipeline with networks unet \(Ext"):
        layout_for(student, tmp_path, SINGLE_ROOT)


def test_words_are_made_of_a_single_file(onnx_root: Bundle, tiny_pipelines, tmp_path) -> None:
    from transformers import CLIPTokenizer

    import export.loader_files as files

    source = tiny_pipelines / "sd" / "tokenizer"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(
        (source / "tokenizer.json").read_bytes()
    )
    files._derive_words(tmp_path / "tokenizer")
    made = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", model_max_length=77)
    prompts = [PROMPT, "", "a bowl of fruit, 3 ships!"]
    theirs = made(prompts, padding="max_length", truncation=True, return_tensors="np").input_ids
    ours = Tokenizer.open(onnx_root.root / "tokenizer").encode(prompts, 77)
    np.testing.assert_array_equal(theirs, ours)


def test_what_no_loader_could_run_stays_a_bundle(tiny_pipelines, tmp_path) -> None:
    student = open_source(tiny_pipelines / "sd", num_steps=1, scheduler=DDIM)
    assert layout_for(student, tmp_path, None) == SINGLE_ROOT
    (row,) = student.table.rows
    (stage,) = student.table.stages
    earlier = dataclasses.replace(stage, rows=(dataclasses.replace(row, feeds={"timestep": 9.0}),))
    for change, problem in (
        ({"stages": (earlier,)}, "a sampler that its DDIMScheduler does not make: at step 0 its"),
        ({"annotations": {}}, "a sampler that no scheduler of diffusers makes"),
    ):
        other = dataclasses.replace(student, table=dataclasses.replace(student.table, **change))
        assert layout_for(other, tmp_path, None) == "bundle"
        with pytest.raises(ConfigError, match=f"loaders know no pipeline with {problem}"):
            layout_for(other, tmp_path, SINGLE_ROOT)


def test_the_openvino_tokenizer_reads_as_ours(onnx_root: Bundle, tmp_path) -> None:
    pytest.importorskip("openvino_tokenizers", reason="needs openvino-tokenizers")
    import openvino as ov

    import export.loader_files as files

    folder = shutil.copytree(onnx_root.root / "tokenizer", tmp_path / "tokenizer")
    files._write_openvino_tokenizer(folder)
    compiled = ov.Core().compile_model(folder / "openvino_tokenizer.xml", "CPU")
    for prompt in (PROMPT, "", "a bowl of fruit, 3 ships!"):
        ids = compiled([prompt])["input_ids"][0]
        np.testing.assert_array_equal(
            ids, Tokenizer.open(folder).encode([prompt], 77)[0][: len(ids)]
        )


def test_another_size_is_another_signature(tiny_pipelines) -> None:
    student = open_source(tiny_pipelines / "sd", num_steps=1, scheduler=DDIM)
    tall = resized(student, 32, None)
    assert tall.table.stages[0].shape == (4, 16, 8)
    assert tall.signatures["unet"].inputs[0].shape == ("batch", 4, 16, 8)
    assert tall.signatures["vae_decoder"].outputs[0].shape == ("batch", 3, 32, 16)
    with pytest.raises(ConfigError, match="of 4, got 30 and 16; the nearest are 32 and 16"):
        resized(student, 30, None)
    assert resized(student, None, None, latents=(16, None)) == tall
    assert resized(student, 32, None, latents=(16, 8)) == tall
    with pytest.raises(ConfigError, match="latent of 8 x any makes no image of 32 x 16; say one"):
        resized(student, 32, None, latents=(8, None))
    pixels = open_source(tiny_pipelines / "class", num_steps=1)
    with pytest.raises(ConfigError, match="it has no vae_decoder; leave height and width out"):
        resized(pixels, 32, None)


def distilled(source: Path, root: Path) -> Student:
    """Write what a distillation of a pipeline in two steps writes, the network as it was."""
    teacher = Teacher.open(source)
    store.save(teacher.network, root / "unet")
    signatures, folders = teacher.save_parts(root)
    signatures = {"unet": teacher.signature, **signatures}
    table = teacher.complete(teacher.table(2, spacing="trailing"))
    Student(root, "distilled", table, signatures, folders=folders).write_manifest()
    return Student.open(root)


# diffusers 0.39 converts tensors in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("kind", "fill"), [("sd", {"": "<|endoftext|>"}), ("sdxl", {"_2": "!"})])
def test_a_distilled_student_opens_in_loaders_as_well(
    kind: str, fill: dict[str, str], tiny_pipelines: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    student = distilled(tiny_pipelines / kind, tmp_path / "student")
    assert not any(path.is_dir() for path in student.root.glob("tokenizer*"))
    options = ExportOptions(layout=SINGLE_ROOT)
    made = export_student(student, tmp_path / "root", ["onnx"], options)
    found = check_layout(made.root, ["diffusers", "ort"])
    assert [item for item in found if item.level == "error"] == []
    for ending, pad in fill.items():
        marks = read_json(made.root / f"tokenizer{ending}" / "special_tokens_map.json")
        start, end = "<|startoftext|>", "<|endoftext|>"
        assert marks == {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    noise = noise_bank(made.table, [5])
    pipe = DiffusionPipeline.from_pretrained(made.root)
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    theirs = pipe(PROMPT, latents=torch.from_numpy(noise[0]), **asked).images
    ours = load(made, "onnxruntime")(prompt=PROMPT, noise=noise).array
    np.testing.assert_allclose(ours.transpose(0, 2, 3, 1) / 2 + 0.5, theirs, atol=1e-4)


def test_marks_are_made_of_a_tokenizer_s_own_settings(tiny_pipelines, tmp_path) -> None:
    from transformers import CLIPTokenizer

    import export.loader_files as files

    source = Path(shutil.copytree(tiny_pipelines / "sd", tmp_path / "sd"))
    folder = source / "tokenizer"
    for name in ("special_tokens_map.json", "tokenizer.json"):
        (folder / name).unlink()
    settings = read_json(folder / "tokenizer_config.json")
    told = {"__type": "AddedToken", "content": "!", "lstrip": False}
    write_json(folder / "tokenizer_config.json", {**settings, "pad_token": told})
    files._write_tokenizer(open_source(source, num_steps=1), tmp_path / "tokenizer")
    made = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (made.pad_token, made.bos_token) == ("!", "<|startoftext|>")
    assert read_json(tmp_path / "tokenizer" / "special_tokens_map.json")["pad_token"] == "!"


def test_a_tokenizer_that_was_not_converted_is_told_of_and_joins_later(
    run, tiny_pipelines, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("openvino_tokenizers", reason="needs openvino-tokenizers")
    root = tmp_path / "root"
    converted = root / "tokenizer/openvino_tokenizer.xml"
    command = ("export", "openvino", "-m", tiny_pipelines / "sd", root, "--steps", 1)
    with monkeypatch.context() as without:
        without.setattr("export.loader_files._converts", lambda: False)
        for done in ("Written", "Nothing to write"):
            status, told, noted = run(*command)
            assert (status, told.splitlines()[-1].startswith(done)) == (0, True)
            assert f"{root}: has no tokenizer/openvino_tokenizer.xml" in noted
            assert 'pip install "edgedistill[interop]"' in noted
            assert not converted.exists()
    graph = (root / "unet/openvino_model.xml").read_bytes()
    for done in ("Written", "Nothing to write"):
        status, told, noted = run(*command)
        assert (status, told.splitlines()[-1].startswith(done)) == (0, True)
        assert "interop" not in noted
        assert converted.is_file()
    assert (root / "unet/openvino_model.xml").read_bytes() == graph
    assert Bundle.open(root).artifacts.keys() == {"torch-float32", "openvino-float32"}
