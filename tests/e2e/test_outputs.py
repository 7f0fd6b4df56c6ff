"""`edgedistill parity BUNDLE --outputs FILE`: what an app wrote, against the golden tensors."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgedistill.agreement import snr_db
from edgedistill.bundle import GOLDEN, Bundle
from runtimes.outputs import verify_outputs
from runtimes.report import render


@pytest.fixture
def golden(handmade):
    return load_file(handmade / GOLDEN)


@pytest.fixture
def written(tmp_path):
    """Write arrays as a device does."""

    def write(**arrays):
        path = tmp_path / "device.safetensors"
        save_file({name.replace("_", "."): value for name, value in arrays.items()}, path)
        return path

    return write


def half(values):
    return values.astype(np.float16)


def test_the_golden_tensors_themselves_are_equal(run, handmade):
    words = ["--outputs", handmade / GOLDEN, "--precision", "float32"]
    status, out, err = run("parity", handmade, *words)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "handmade, 4 samples from the same noise"
    line = out.splitlines()[4].split()
    assert f"golden.safetensors: compared were 7 of 7 golden tensors, from {handmade}" in out
    assert line[:6] == ["golden.safetensors", "ok", "device", "float32", "-", "inf"]


def test_a_free_running_app_is_compared_by_states_and_samples(run, handmade, golden, written):
    path = written(row_0_next=half(golden["row.0.next"]), output=half(golden["output"]))
    status, out, err = run(
        "parity",
        handmade,
        "--outputs",
        path,
        "--artifact",
        "fake-float32",
        "--precision",
        "float16",
        "--json",
    )
    (item,) = json.loads(out)["artifacts"]
    assert (status, err, item["verdict"]) == (0, "", "ok")
    (row,) = item["rows"]
    assert row["teacher_forced"] == {}
    expected = snr_db(golden["row.0.next"], half(golden["row.0.next"]))
    assert row["free_running"]["next"]["snr_db"] == pytest.approx(expected)
    assert item["image"]["snr_db"] == pytest.approx(
        snr_db(golden["output"], half(golden["output"]))
    )
    assert set(item["sensitivity"]) == {"class_labels", "w"}
    assert item["described"] == f"2 of 7 golden tensors, from {path}"


def test_an_artifact_brings_its_floors(run, make, golden, written):
    bundle = make({"small": ("fake", "int8")})
    path = written(row_1_raw=golden["row.1.raw"] * np.float32(1.01))
    status, out, _ = run("parity", bundle, "--outputs", path, "--artifact", "small", "--json")
    assert status == 0
    assert json.loads(out)["artifacts"][0]["precision"] == "int8"
    status, out, err = run("parity", bundle, "--outputs", path, "--precision", "float16")
    assert status == 1
    assert "40.0 @1" in out
    assert err == (
        "edgedistill: device float16 'device.safetensors': 40.0 dB SNR at row 1 (teacher-forced) "
        "against the reference, at least 50.0 dB is required.\n"
    )


def test_the_first_samples_will_do(run, handmade, golden, written):
    path = written(output=golden["output"][:1], noise_0=golden["noise.0"][:1])
    status, out, _ = run("parity", handmade, "--outputs", path, "--precision", "float32", "--json")
    report = json.loads(out)
    assert (status, report["batch"]) == (0, 1)
    assert report["artifacts"][0]["sensitivity"] == {}


def test_where_guidance_lies_in_the_graphs_the_samples_are_those_of_its_scale(
    handmade, golden, written
):
    bundle = Bundle.open(handmade)
    baked = dataclasses.replace(bundle.artifacts["fake-float32"], name="baked", guidance_scale=2.0)
    bundle = dataclasses.replace(bundle, artifacts={"baked": baked})
    path = written(output=golden["output"][golden["condition.w"] == 1])
    report = verify_outputs(bundle, path, artifact="baked")
    assert (report.ok, report.batch) == (True, 2)


def test_what_is_not_finite_fails(run, handmade, golden, written):
    path = written(output=golden["output"] * np.float32("nan"))
    status, _, err = run("parity", handmade, "--outputs", path, "--precision", "float16")
    assert status == 1
    assert err.endswith("device float16 'device.safetensors': NaN or infinity in output.\n")


def test_the_page_takes_what_is_there(run, handmade, golden, written, tmp_path):
    page = tmp_path / "p.html"
    words = ["--precision", "float32", "--report", page]
    for arrays in (
        {"row_1_raw": golden["row.1.raw"]},
        {"row_0_next": golden["row.0.next"]},
        {"output": golden["output"]},
    ):
        assert run("parity", handmade, "--outputs", written(**arrays), *words)[0] == 0
        assert ("No difference in any bit" in page.read_text()) == ("output" in arrays)


def test_the_page_shows_another_sampler_where_it_is_the_only_one(handmade, golden, written):
    path = written(output=golden["output"], row_0_next=golden["row.0.next"])
    report = verify_outputs(Bundle.open(handmade), path, precision="float32")
    (item,) = report.artifacts
    other = dataclasses.replace(item, sampler="swift")
    page = render(dataclasses.replace(report, artifacts=(other,)))
    assert "No difference in any bit" in page
    assert "polyline" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda _: {"raw": np.zeros(4, np.float32)},
            "raw is no golden tensor; what is compared is named `output`",
        ),
        (
            lambda g: {"output": g["output"].transpose(0, 2, 3, 1)},
            "output must be 4x1x8x8.* got 4x8x8x1",
        ),
        (
            lambda g: {"output": np.repeat(g["output"], 2, axis=0)},
            "output must be 4x1x8x8.* got 8x1x8x8",
        ),
        (
            lambda g: {"output": g["output"], "noise_1": g["noise.0"]},
            "noise.1 is what the device was fed",
        ),
        (lambda g: {"row_0_x0": g["row.0.x0"]}, "nothing in it has a floor"),
        (lambda _: {"output": np.zeros((), np.float32)}, "got a number"),
    ],
)
def test_what_cannot_be_compared_is_said(run, handmade, golden, written, change, message):
    path = written(**{k: v.copy(order="C") for k, v in change(golden).items()})
    status, out, err = run("parity", handmade, "--outputs", path, "--precision", "float32")
    assert (status, out) == (2, "")
    assert re.search(message, err)


def test_what_is_no_safetensors_is_said(run, handmade, tmp_path):
    (tmp_path / "x").write_bytes(b"x" * 100)
    words = ["parity", handmade, "--precision", "float32", "--outputs"]
    assert "not a whole safetensors file" in run(*words, tmp_path / "x")[2]
    assert run(*words, tmp_path / "none")[0] == 2


def test_options_that_say_nothing_of_it_are_refused(run, handmade):
    for words, message in (
        (["--precision", "float16"], "--precision: only with --outputs"),
        (["--outputs", "x"], "x: say whose floors it must reach, such as --precision float16"),
        (
            ["--outputs", "x", "--runtime", "torch", "--threads", 1],
            "--runtime, --threads: not with --outputs",
        ),
        (["--outputs", "x", "--precision", "int2"], "No parity floor for precision 'int2'"),
        (["--outputs", "x", "--precision", "int8", "--sampler", "swift"], "No sampler 'swift'"),
        (["--outputs", "x", "--artifact", "a", "b"], "at most the one artifact"),
    ):
        status, _, err = run("parity", handmade, *words)
        assert status == 2
        assert message in err
