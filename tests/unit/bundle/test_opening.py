"""A bundle opens only if it is whole."""

import dataclasses

import pytest

from edgedistill import manifest as manifests
from edgedistill.bundle import Bundle
from edgedistill.drafts import write_bundle
from edgedistill.errors import BundleError
from edgedistill.files import sha256
from edgedistill.manifest import MANIFEST


def test_a_bundle_survives_the_round_trip(parts, small, tmp_path):
    opened = Bundle.open(str(tmp_path / "small"))
    assert opened == dataclasses.replace(small, root=tmp_path / "small")
    assert sorted(parts.snapshot(small.root)) == sorted([*parts.files, MANIFEST])
    assert opened.artifacts["onnx-float32"].networks["unet"].signature == parts.signature
    assert opened.provenance == {"method": "none"}
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_artifact_is_found_by_name_and_by_runtime(small):
    assert small.artifact().name == "torch-float32"
    assert small.artifact(runtime="onnxruntime").name == "onnx-float32"
    assert small.artifact("onnx-float32").runtime == "onnxruntime"
    for wanted in (("onnx-float32", "torch"), ("onnx-int8", None), (None, "coreml")):
        with pytest.raises(BundleError, match=r"the bundle holds: torch-float32 \(torch\), onnx"):
            small.artifact(*wanted)


def test_the_weights_beside_a_graph_are_counted_and_kept(parts, small, tmp_path):
    assert small.size(small.artifact("onnx-float32")) == len(parts.files[0]) + len(parts.files[1])
    assert small.size(small.artifact("torch-float32")) == len(parts.files[4]) + len(parts.files[5])
    twin = write_bundle(tmp_path / "twin", small, lambda _: None, ["onnx-float32"])
    assert sorted(parts.snapshot(twin.root)) == sorted([*parts.files[:4], MANIFEST])


def test_one_flipped_bit_is_found_in_every_file(small, listed_or_manifest):
    name = listed_or_manifest
    path = small.root / name
    whole = path.read_bytes()
    message = "damaged|not a JSON|not an edgedistill" if name == MANIFEST else f"{name}: damaged"
    for position in (0, len(whole) // 3, len(whole) // 2, len(whole) - 2):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=message):
            Bundle.open(small.root)
    path.write_bytes(whole)
    assert Bundle.open(small.root).name == "small"


def flip(path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged)


def test_a_file_that_is_not_read_is_not_hashed(small, listed):
    flip(small.root / listed)
    if listed == "sampler.json":
        with pytest.raises(BundleError, match=f"{listed}: damaged"):
            Bundle.open(small.root, whole=False)
        return
    opened = Bundle.open(small.root, whole=False)
    network = "onnx/float32/unet.onnx" if listed.startswith("onnx") else "torch/float32/unet"
    damaged = "probes" if listed.startswith("probes") else network
    for path in {"onnx/float32/unet.onnx", "torch/float32/unet", "probes"} - {damaged}:
        assert opened.path(path) == small.root / path
    for _ in range(2):
        with pytest.raises(BundleError, match=f"{listed}: damaged: its SHA-256"):
            opened.path(damaged)


def test_a_hash_is_taken_once(parts, small, monkeypatch):
    taken = []

    def recorded(path):
        taken.append(path.name)
        return sha256(path)

    monkeypatch.setattr(manifests, "sha256", recorded)
    opened = Bundle.open(small.root, whole=False)
    for _ in range(2):
        opened.path("onnx/float32/unet.onnx")
    assert taken == ["sampler.json", "unet.onnx", "unet.onnx_data"]
    Bundle.open(small.root)
    assert sorted(taken[3:]) == sorted(name.rsplit("/", 1)[-1] for name in parts.files)


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_of_another_size_is_found_whether_read_or_not(small, listed, whole):
    with (small.root / listed).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(BundleError, match=f"{listed}: damaged: it has"):
        Bundle.open(small.root, whole=whole)


def test_a_missing_file_is_named(small, listed):
    (small.root / listed).unlink()
    with pytest.raises(BundleError, match=f"{listed}: missing; the manifest lists it"):
        Bundle.open(small.root)
