"""`edgedistill sample` and `edgedistill parity` on a hand-written bundle and on the exported one."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgedistill
from edgedistill.compiler import compile_scheduler
from edgedistill.noise import noise_bank
from edgedistill.sampler import run_table
from edgedistill.table import Condition, Guidance

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_sample_writes_an_enlarged_sheet_and_says_what_it_made(run, handmade, tmp_path):
    status, out, err = run(
        "sample", handmade, "--runtime", "fake", "-n", 9, "-o", tmp_path / "g.png"
    )
    assert (status, err) == (0, "")
    assert "9 samples of handmade (fake-float32, 2 evaluations each) on numpy in" in out
    scale = -(-256 // 24)
    with Image.open(tmp_path / "g.png") as sheet:
        assert sheet.size == (3 * (8 * scale + 1) + 1,) * 2


def test_sample_json_and_arrays_are_those_of_the_python_face(run, handmade, tmp_path):
    arrays = tmp_path / "a.npy"
    words = ["sample", handmade, "-n", 4, "--seed", 5, "-o", tmp_path / "g.png", "--npy", arrays]
    status, out, _ = run(*words, "--class", 2, 0, "--guidance_scale", 3, "--json", "--threads", 1)
    made = json.loads(out)
    assert status == 0
    assert (made["samples"], made["seed"], made["nfe"]) == (4, 5, 2)
    assert (made["runtime"], made["npy"]) == ("fake", str(arrays))
    pipeline = edgedistill.load(handmade, runtime="fake")
    expected = pipeline(4, seed=5, guidance_scale=3.0, class_labels=[2, 0, 2, 0])
    assert np.array_equal(np.load(arrays), expected.array)


def test_runtime_options_reach_the_runtime(run, handmade, fake, tmp_path):
    words = ["--device", "GPU", "--threads", 2, "-o", tmp_path / "g.png", "-n", 1, "--scale", 1]
    status, out, _ = run("sample", handmade, *words)
    assert status == 0
    assert fake.options == {"device": "GPU", "threads": 2}
    assert "on numpy device=GPU threads=2 in" in out
    with Image.open(tmp_path / "g.png") as sheet:
        assert sheet.size == (10, 10)


def test_words_of_one_runtime_are_not_handed_to_others(run, make, fake):
    both = make({"a": ("fake", "float32"), "b": ("torch", "float32")})
    words = ["parity", both, "--device", "GPU", "--inference-precision", "f16", "--threads", 2]
    status, _, err = run(*words)
    assert status == 2
    assert "device and precision: each runtime has words of its own for it" in err
    assert "the artifacts are for fake, torch; choose one, such as with --runtime torch" in err
    assert run(*words, "--runtime", "fake")[0] == 0
    assert fake.options == {"device": "GPU", "precision": "f16", "threads": 2}


def test_seeds_make_a_sample_the_same_in_every_batch(handmade):
    pipeline = edgedistill.load(handmade, runtime="fake")
    many = pipeline(5, seed=3, class_labels=1).array
    assert np.array_equal(many[2:3], pipeline(seed=np.int64(5), class_labels=1).array)
    assert np.array_equal(many[[4, 0]], pipeline(seed=[7, 3], class_labels=1).array)


def test_parity_of_an_exact_runtime_passes_with_infinite_db(run, handmade):
    status, out, err = run("parity", handmade, "--json")
    report = json.loads(out)
    (artifact,) = report["artifacts"]
    assert (status, err, report["ok"], artifact["verdict"]) == (0, "", True, "ok")
    assert [row["teacher_forced"]["raw"]["snr_db"] for row in artifact["rows"]] == [999.0, 999.0]
    assert [row["timestep"] for row in artifact["rows"]] == [999.0, 499.0]
    assert artifact["image"] == {"snr_db": 999.0, "psnr_db": 999.0, "max_abs": 0.0, "cosine": 1.0}
    assert artifact["sensitivity"] == pytest.approx({"class_labels": 1.0, "w": 1.0}, abs=1e-12)
    assert report["floors"]["float32"]["raw"] == 100.0


def test_parity_table_names_every_artifact_once(run, handmade):
    status, out, _ = run("parity", handmade)
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "handmade, 4 samples from the same noise"
    assert [line.split()[0] for line in lines[2:5]] == ["artifact", "-" * 12, "fake-float32"]
    assert lines[4].split()[1:6] == ["ok", "fake", "float32", "0.000", "inf"]


def test_an_error_in_one_row_is_named_with_its_row_and_floor(run, handmade, fake):
    """A relative error of 1e-3 in the second row is 60 dB there, and leaves the first row alone."""
    fake.spoil = lambda raw, feeds: raw * (1.001 if feeds["timestep"][0] < 500 else 1.0)
    status, out, err = run("parity", handmade)
    assert status == 1
    assert "60.0 @1" in out
    assert err.splitlines()[0] == (
        "edgedistill: fake float32 'fake-float32': 60.0 dB SNR at row 1 (teacher-forced) "
        "against the reference, at least 100.0 dB is required."
    )
    assert "row 0" not in err


def test_teacher_forcing_hides_earlier_errors_and_free_running_shows_them(run, handmade, fake):
    fake.spoil = lambda raw, feeds: raw * (1.001 if feeds["timestep"][0] > 500 else 1.0)
    (artifact,) = json.loads(run("parity", handmade, "--json")[1])["artifacts"]
    first, second = artifact["rows"]
    assert first["teacher_forced"]["raw"]["snr_db"] == pytest.approx(60.0, abs=0.01)
    assert second["teacher_forced"]["raw"]["snr_db"] == 999.0
    assert 40 < second["free_running"]["next"]["snr_db"] < 80


def test_a_collapsed_response_fails_although_every_db_floor_holds(run, make, fake, predict):
    """The guidance weight moves the prediction a tenth as far as it should; 0.3 off is allowed to int8."""
    bundle = make({"fake-int8": ("fake", "int8")})

    def collapse(share):
        return lambda raw, feeds: (
            raw + share * (predict({**feeds, "w": feeds["w"] * 0 + 1})["out_sample"] - raw)
        )

    fake.spoil = collapse(0.1)
    assert run("parity", bundle)[0] == 0
    fake.spoil = collapse(0.9)
    status, _, err = run("parity", bundle)
    (sentence,) = err.splitlines()
    assert status == 1
    assert re.search(r"a change of `w` moves the samples 0\.1\d\d times as far", sentence)


def test_a_response_of_rounding_size_is_named_and_not_judged(run, make, monkeypatch):
    bundle = make({"fake-int8": ("fake", "int8")})
    monkeypatch.setattr("edgedistill.parity.Floor.faint", 0.5)
    status, out, _ = run("parity", bundle)
    assert status == 0
    told = (
        "No gain in int8 for w (sampler default): it moves the reference's samples by less than 0.5"
    )
    assert told in out
    _, out, _ = run("parity", bundle, "--json")
    (item,) = json.loads(out)["artifacts"]
    assert "w" in item["faint"]
    assert "w" not in item["sensitivity"]


def test_a_broken_network_fails_its_artifact_and_not_the_run(run, make, fake):
    bundle = make({"good": ("fake", "int8"), "bad": ("fake", "float32")})
    calls = []

    def break_second(raw, _feeds):
        calls.append(1)
        return raw * np.float32("nan") if len(calls) > 4 else raw

    fake.spoil = break_second
    status, out, err = run("parity", bundle, "--json")
    assert status == 1
    assert [item["verdict"] for item in json.loads(out)["artifacts"]] == ["ok", "failed"]
    assert "fake float32 'bad': Network `denoiser` returned NaN or infinity" in err


def test_a_missing_runtime_is_skipped_with_its_pip_line_unless_asked_for(run, make):
    bundle = make({"here": ("fake", "float32"), "gone": ("absent", "float32")})
    status, out, err = run("parity", bundle)
    assert (status, err) == (0, "")
    assert (
        'gone skipped: `no_such_package` is not installed; run: pip install "edgedistill[absent]".'
        in out
    )
    status, out, err = run("parity", bundle, "--runtime", "absent")
    assert (status, out) == (2, "")
    assert "no_such_package" in err
    assert run("parity", bundle, "--artifact", "gone")[0] == 2


def test_left_to_choose_sample_takes_what_is_installed(run, make, tmp_path):
    bundle = make({"gone": ("absent", "float32"), "here": ("fake", "float32")})
    status, out, _ = run("sample", bundle, "-n", "2", "-o", tmp_path / "a.png", "--json")
    assert (status, json.loads(out)["artifact"]) == (0, "here")
    lone = make({"gone": ("absent", "float32")}, "lone")
    status, _, err = run("sample", lone, "-n", "2", "-o", tmp_path / "b.png")
    assert status == 2
    assert "no_such_package" in err


def test_two_bundles_of_one_student_land_in_one_report(run, make):
    first = make({"a": ("fake", "float32")}, "first")
    second = make({"a": ("fake", "float32"), "b": ("fake", "int8")}, "second")
    report = json.loads(run("parity", first, second, "--json")[1])
    assert [item["name"] for item in report["artifacts"]] == ["a", "b"]
    assert set(report["floors"]) == {"float32", "int8"}


class _Page(HTMLParser):
    """Collects tags, and every address that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_holds_everything_and_fetches_nothing(run, make, fake, tmp_path):
    fake.spoil = lambda raw, _: raw + np.float32(1e-6)
    bundle = make({"a<b": ("fake", "float32"), "gone": ("absent", "int8")})
    status, _, err = run("parity", bundle, "--report", tmp_path / "p.html")
    assert (status, err) == (0, "")
    html = (tmp_path / "p.html").read_text()
    page = _Page()
    page.feed(html)
    assert "a&lt;b" in html
    assert "a<b" not in html
    assert page.tags.count("svg") == 2
    assert page.tags.count("img") == 3
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "url(" not in html
    assert "white = 2e-06" in html


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_parity_of_the_exported_bundle(run, bundle, runtime):
    status, out, err = run("parity", bundle.root, "--runtime", runtime, "--json")
    assert (status, err) == (0, "")
    for artifact in json.loads(out)["artifacts"]:
        assert artifact["runtime"] == runtime
        worst = min(row["teacher_forced"]["raw"]["snr_db"] for row in artifact["rows"])
        assert worst >= {"float32": 100, "float16": 50}[artifact["precision"]]
        assert set(artifact["sensitivity"]) == {"class_labels", "w"}
        assert artifact["call_ms"] > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_sampling_needs_no_framework_and_equals_a_sampler_without_us(bundle, runtime, tmp_path):
    """In a process where torch and its kin cannot be imported; beside `examples/bare_sampler.py`."""
    words = ["sample", str(bundle.root), "--runtime", runtime, "-n", "5"]
    words += ["-o", str(tmp_path / "g.png"), "--npy", str(tmp_path / "a.npy")]
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'safetensors.torch', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        f"from edgedistill.cli import main\nsys.exit(main({words!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    bare = bare_sampler().sample(bundle.root, runtime, 5)
    assert np.array_equal(bare, np.load(tmp_path / "a.npy"))


def bare_sampler():
    spec = importlib.util.spec_from_file_location("bare_sampler", EXAMPLES / "bare_sampler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DPMSolverMultistepScheduler"},
        {"_class_name": "DDIMScheduler", "clip_sample": True},
    ],
)
def test_the_bare_sampler_looks_back_and_clips(config, tmp_path, monkeypatch):
    table = compile_scheduler(config, 5, shape=(1, 4, 4))
    assert any(row.clip or row.next.previous for row in table.rows)
    table.save(tmp_path / "sampler.json")
    file = {"path": "x", "signature": {"inputs": [{"shape": ["batch", 1, 4, 4]}]}}
    artifact = {"runtime": "onnxruntime", "networks": {"unet": file}}
    (tmp_path / "edgedistill.json").write_text(json.dumps({"artifacts": {"a": artifact}}))

    def answer(feeds):
        return np.tanh(feeds["sample"]) * np.float32(0.9)

    bare = bare_sampler()
    monkeypatch.setattr(bare, "open_network", lambda *_: answer)
    networks = {"unet": lambda feeds: {"out_sample": answer(feeds)}}
    expected = run_table(table, networks, noise_bank(table, [0, 1, 2]), {})
    assert np.array_equal(bare.sample(tmp_path, "onnxruntime", 3), expected)


def test_the_bare_sampler_names_what_it_does_not_do(tmp_path):
    guided = compile_scheduler(
        {"_class_name": "DDIMScheduler"},
        2,
        shape=(4, 8, 8),
        network=("controlnet", "unet"),
        guidance=Guidance("cfg", None, 3.0, (1.0, 3.0), {"text": 0}),
        conditions=(
            Condition(
                "text",
                "text",
                encoder="text_encoder",
                tokenizer="tokenizer.json",
                length=4,
                examples=("a",),
            ),
        ),
        decoder="vae_decoder",
    )
    guided.save(tmp_path / "sampler.json")
    with pytest.raises(SystemExit) as stopped:
        bare_sampler().sample(tmp_path, "onnxruntime", 1)
    assert str(stopped.value).endswith(
        "beyond this example: decoder, a text condition, rows that call no network, or two, guidance_scale."
    )
