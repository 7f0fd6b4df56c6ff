"""The reference is the student's own network, in float32, and nothing else opens as one."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import edgedistill
from edgedistill.errors import BundleError, ConfigError
from edgedistill.models import store
from edgedistill.models.source import open_source
from edgedistill.probes import load_probes
from export.frozen import examples
from runtimes import torch_reference


@pytest.fixture
def folder(student, tmp_path):
    return shutil.copytree(student.root / "unet", tmp_path / "unet")


def test_it_is_the_students_network_to_the_bit(student):
    signature = student.signatures["unet"].with_batch(3)
    names = [spec.name for spec in signature.inputs]
    inputs = dict(zip(names, examples(signature), strict=True))
    session = torch_reference.open(student.root / "unet", signature, {"threads": 1})
    with torch.inference_mode():
        expected = store.call(store.load(student.root / "unet"), inputs).numpy()
    got = session({name: value.numpy() for name, value in inputs.items()})["out_sample"]
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32


def test_opening_it_says_nothing(student):
    """diffusers would warn that `optimum`, which our extras bring, comes in several distributions."""
    code = (
        "import sys; from pathlib import Path; from edgedistill.student import Student; "
        "from runtimes import torch_reference; s = Student.open(sys.argv[1]); "
        "torch_reference.open(s.root / 'unet', s.signatures['unet'], {})"
    )
    words = [sys.executable, "-c", code, str(student.root)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_it_takes_arrays_that_may_not_be_written(student):
    signature = student.signatures["unet"].with_batch(1)
    feeds = {s.name: t.numpy() for s, t in zip(signature.inputs, examples(signature), strict=True)}
    for value in feeds.values():
        value.flags.writeable = False
    session = torch_reference.open(student.root / "unet", signature, {})
    assert np.isfinite(session(feeds)["out_sample"]).all()


def test_a_bundle_replays_its_golden_samples(bundle):
    golden = load_probes(bundle.path("probes/golden.safetensors"))
    pipeline = edgedistill.load(bundle, runtime="torch")
    made = pipeline(class_labels=golden["condition.class_labels"][:4], seed=[0, 1, 2, 3]).array
    # Another batch may take another summation order inside of torch.
    np.testing.assert_allclose(made, golden["output"][:4], atol=1e-5)


def test_a_pickle_is_refused_and_not_read(folder, student):
    weights = folder / store.WEIGHTS
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(BundleError, match=r"model\.bin is a pickle, .* convert it to safetensors"):
        torch_reference.open(folder, student.signatures["unet"], {})
    (folder / "diffusion_pytorch_model.bin").rename(weights)
    with pytest.raises(BundleError, match="not a whole safetensors file .* never pickle"):
        torch_reference.open(folder, student.signatures["unet"], {})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(folder, student, bad):
    state = load_file(folder / store.WEIGHTS)
    state["conv_out.bias"][0] = bad
    save_file(state, folder / store.WEIGHTS)
    with pytest.raises(BundleError, match=r"`conv_out\.bias` holds NaN or infinity"):
        torch_reference.open(folder, student.signatures["unet"], {})


def test_both_halves_of_an_autoencoder_are_read_once_while_one_is_open(tiny_pipelines, monkeypatch):
    source = open_source(tiny_pipelines / "sd", num_steps=1)
    read = []
    monkeypatch.setattr(
        store, "load", lambda folder, load=store.load: read.append(folder.name) or load(folder)
    )
    wanted = {}
    for together in (False, True):
        held = []
        for name in ("vae_decoder", "vae_encoder"):
            signature = source.signatures[name].with_batch(1)
            names = [spec.name for spec in signature.inputs]
            feeds = {n: v.numpy() for n, v in zip(names, examples(signature), strict=True)}
            session = torch_reference.open(source.folder(name), signature, {})
            held += [session] if together else []
            for output, got in session(feeds).items():
                np.testing.assert_array_equal(got, wanted.setdefault((name, output), got))
            del session
        assert read == (["vae"] if together else ["vae", "vae"])
        read.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 11}, "'torch' has no option 'speed'; it takes: device, threads"),
        ({"device": "tpu"}, "PyTorch has no device 'tpu' here; it has: cpu"),
    ],
)
def test_options_that_cannot_be_are_refused(student, options, message):
    with pytest.raises(ConfigError, match=message):
        torch_reference.open(student.root / "unet", student.signatures["unet"], options)


def test_it_says_what_it_is():
    assert torch_reference.describe({}) == f"PyTorch {torch.__version__} (cpu)"
    assert torch_reference.describe({"device": "CUDA"}) == f"PyTorch {torch.__version__} (cuda)"
