"""A bundle changes only as a whole, and keeps what others put into it."""

import dataclasses
import json

import numpy as np
import pytest

from edgedistill import drafts
from edgedistill import manifest as manifests
from edgedistill.bundle import Bundle, NetworkFile
from edgedistill.drafts import write_bundle
from edgedistill.errors import BundleError
from edgedistill.files import sha256
from edgedistill.manifest import MANIFEST
from edgedistill.table import Row, SamplerTable, Stage


def test_what_is_no_bundle_is_not_replaced(parts, small, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        write_bundle(tmp_path / "home", small, parts.fill)
    assert parts.snapshot(tmp_path / "home") == {"thesis.tex": b"years of work"}
    (tmp_path / "note").write_text("a file")
    with pytest.raises(BundleError, match="note: exists and is not a bundle"):
        write_bundle(tmp_path / "note", small, parts.fill)
    assert (tmp_path / "note").read_text() == "a file"
    (tmp_path / "empty").mkdir()
    assert write_bundle(tmp_path / "empty", small, parts.fill).name == "small"


def test_a_writer_that_fails_leaves_the_old_bundle(parts, small, tmp_path):
    before = parts.snapshot(small.root)

    def fail(draft):
        parts.fill(draft)
        msg = "something broke"
        raise ArithmeticError(msg)

    with pytest.raises(ArithmeticError):
        write_bundle(small.root, small, fail)
    assert parts.snapshot(small.root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


OTHERS = {
    "README.md": "a card",
    "coreml/report.json": "what a Mac said",
    "coreml/Resources/Unet.mlmodelc/model.mil": "compiled of a package",
    "onnx/float32/unet.optimized.onnx": "made of a graph",
}


def put_others(small) -> None:
    """Put beside the files of a bundle what no manifest lists."""
    for name, text in OTHERS.items():
        (small.root / name).parent.mkdir(parents=True, exist_ok=True)
        (small.root / name).write_text(text)
    (small.root / "latest").symlink_to("onnx")


def others_in(root) -> set[str]:
    held = set(json.loads((root / MANIFEST).read_text())["files"])
    assert not held & {*OTHERS, "latest"}
    there = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_symlink() or p.is_file()}
    return there - held - {MANIFEST}


def test_what_the_manifest_does_not_list_stays_where_it_was(small):
    put_others(small)
    added = write_bundle(small.root, small, lambda _: None, small.artifacts)
    assert others_in(small.root) == {*OTHERS, "latest"}
    assert (small.root / "latest").readlink().name == "onnx"
    assert {name: (small.root / name).read_text() for name in OTHERS} == OTHERS
    (small.root / "README.md").write_text("a card that was edited")
    assert Bundle.open(small.root) == added


def test_what_may_be_made_of_a_replaced_artifact_goes_with_it(parts, small):
    put_others(small)

    def anew(draft):
        for name in ("onnx/float32/unet.onnx", "README.md"):
            (draft.root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.root / name).write_text("new")
        draft.add(parts.artifact("onnx", "onnx/float32/unet.onnx"))

    write_bundle(small.root, small, anew, ["torch-float32"])
    assert {name for name in OTHERS if (small.root / name).is_file()} == {
        "README.md",
        "coreml/report.json",
        "coreml/Resources/Unet.mlmodelc/model.mil",
    }
    assert (small.root / "README.md").read_text() == "new"


def test_another_bundle_in_its_place_gets_nothing_of_it(parts, small):
    put_others(small)
    fresh = Bundle(small.root.parent, "new", "e" * 64, small.table, {}, {})
    write_bundle(small.root, fresh, parts.fill)
    assert others_in(small.root) == set()


def test_what_is_kept_is_neither_copied_nor_hashed_again(small, monkeypatch):
    large = small.root / "onnx/float32/unet.onnx_data"
    before, taken = large.stat().st_ino, []

    def recorded(path):
        taken.append(path.name)
        return sha256(path)

    monkeypatch.setattr(drafts, "sha256", recorded)
    monkeypatch.setattr(manifests, "sha256", recorded)
    for _ in range(2):
        small = write_bundle(small.root, small, lambda _: None, small.artifacts)
    assert large.stat().st_ino == before
    # Of tables and probes, which are written or copied; the rest was hashed when it was written.
    assert set(taken) == {"sampler.json", "golden.safetensors"}
    assert Bundle.open(small.root) == small


def test_where_the_system_has_no_links_what_is_kept_is_copied(parts, small, monkeypatch):
    def refuse(*_paths, **_options):
        raise PermissionError(1, "Operation not permitted")

    before = parts.snapshot(small.root)
    monkeypatch.setattr("os.link", refuse)
    write_bundle(small.root, small, lambda _: None, small.artifacts)
    assert parts.snapshot(small.root) == before


def test_a_bundle_made_of_another_one_shares_no_file_with_it(parts, small, tmp_path):
    twin = write_bundle(tmp_path / "twin", small, lambda _: None, small.artifacts)
    assert not any((small.root / name).samefile(twin.root / name) for name in parts.files)


def test_numbers_of_the_table_come_back_to_the_bit(tmp_path):
    row = Row(("unet",), x0=(1 / 3, np.nextafter(1.0, 2.0).item()))
    table = SamplerTable((Stage((1, 2, 2), (row,)),), noise_count=1)
    base = Bundle(tmp_path, "small", "f", table, {}, {})
    assert write_bundle(tmp_path / "b", base, lambda _: None).table == table


SIDE_BY_SIDE = {
    "unet/config.json": 1,
    "unet/diffusion_pytorch_model.safetensors": 2,
    "unet/diffusion_pytorch_model.fp16.safetensors": 4,
    "unet/model.onnx": 8,
    "unet/model.onnx_data": 16,
    "unet/openvino_model.xml": 32,
    "unet/openvino_model.bin": 64,
    "text_encoder/config.json": 128,
    "text_encoder/model.safetensors": 256,
    "text_encoder/model.onnx": 512,
    "coreml/unet.mlpackage/Manifest.json": 1024,
}


PLACES = {
    "torch": ("unet", "text_encoder"),
    "onnx": ("unet/model.onnx", "text_encoder/model.onnx"),
    "openvino": ("unet/openvino_model.xml",),
    "coreml": ("coreml/unet.mlpackage",),
}


@pytest.mark.parametrize(
    ("form", "size"), [("torch", 387), ("onnx", 536), ("openvino", 96), ("coreml", 1024)]
)
def test_each_format_counts_and_keeps_its_own_where_they_lie_side_by_side(
    parts, tmp_path, form, size
):
    def lay_out(draft):
        for name, count in SIDE_BY_SIDE.items():
            (draft.root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.root / name).write_bytes(bytes(count))
        for key, places in PLACES.items():
            files = {place: NetworkFile(place, parts.signature) for place in places}
            draft.add(dataclasses.replace(parts.artifact(key, ""), networks=files))

    table = SamplerTable((Stage((1, 2, 2), (Row(("unet",), x0=(0.0, 1.0)),)),), noise_count=1)
    base = Bundle(tmp_path, "small", "f" * 64, table, {}, {})
    made = write_bundle(tmp_path / "made", base, lay_out)
    assert made.size(made.artifact(f"{form}-float32")) == size
    alone = write_bundle(tmp_path / "alone", made, lambda _: None, [f"{form}-float32"])
    kept = {name for name in parts.snapshot(alone.root) if name in SIDE_BY_SIDE}
    # The variant belongs to no artifact, so it stays.
    assert sum(SIDE_BY_SIDE[name] for name in kept) == size + 4
