"""A bundle opens only if it is whole, and changes only as a whole."""

import dataclasses
import json

import numpy as np
import pytest

from edgedistill import bundle as bundles
from edgedistill import manifest as manifests
from edgedistill.bundle import Artifact, Bundle, NetworkFile, write_bundle
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError
from edgedistill.files import sha256, write_json
from edgedistill.manifest import MANIFEST, seal
from edgedistill.table import Row, SamplerTable, Stage

SIGNATURE = Signature(
    (TensorSpec("sample", ("batch", 1, 2, 2), "float32", "x"),),
    (TensorSpec("out_sample", ("batch", 1, 2, 2), "float32", "raw"),),
)
FILES = [
    "onnx/float32/unet.onnx",
    "onnx/float32/unet.onnx_data",
    "probes/golden.safetensors",
    "sampler.json",
    "torch/float32/unet/config.json",
    "torch/float32/unet/diffusion_pytorch_model.safetensors",
]


def artifact(form: str, path: str) -> Artifact:
    return Artifact(
        f"{form}-float32",
        {"onnx": "onnxruntime"}.get(form, form),
        form,
        "float32",
        {"unet": NetworkFile(path, SIGNATURE)},
        {"options": {"batch": 1}},
    )


def fill(draft: bundles.Draft) -> None:
    for name in FILES:
        if name != "sampler.json":
            (draft.root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.root / name).write_text(name)
    draft.add(artifact("torch", "torch/float32/unet"))
    draft.add(artifact("onnx", "onnx/float32/unet.onnx"))


@pytest.fixture
def small(tmp_path) -> Bundle:
    table = SamplerTable((Stage((1, 2, 2), (Row(("unet",), x0=(0.0, 1.0)),)),), noise_count=1)
    base = Bundle(tmp_path, "small", "f" * 64, table, {}, {"method": "none"})
    return write_bundle(tmp_path / "small", base, fill)


def reseal(root, change) -> None:
    """Change the manifest as someone would who knows how it is sealed."""
    data = json.loads((root / MANIFEST).read_text())
    change(data)
    write_json(root / MANIFEST, {**data, "seal": seal(data)})


def snapshot(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_bundle_survives_the_round_trip(small, tmp_path):
    opened = Bundle.open(str(tmp_path / "small"))
    assert opened == dataclasses.replace(small, root=tmp_path / "small")
    assert sorted(snapshot(small.root)) == sorted([*FILES, MANIFEST])
    assert opened.artifacts["onnx-float32"].networks["unet"].signature == SIGNATURE
    assert opened.provenance == {"method": "none"}
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_artifact_is_found_by_name_and_by_runtime(small):
    assert small.artifact().name == "torch-float32"
    assert small.artifact(runtime="onnxruntime").name == "onnx-float32"
    assert small.artifact("onnx-float32").runtime == "onnxruntime"
    for wanted in (("onnx-float32", "torch"), ("onnx-int8", None), (None, "coreml")):
        with pytest.raises(BundleError, match=r"the bundle holds: torch-float32 \(torch\), onnx"):
            small.artifact(*wanted)


def test_the_weights_beside_a_graph_are_counted_and_kept(small, tmp_path):
    assert small.size(small.artifact("onnx-float32")) == len(FILES[0]) + len(FILES[1])
    assert small.size(small.artifact("torch-float32")) == len(FILES[4]) + len(FILES[5])
    twin = write_bundle(tmp_path / "twin", small, lambda _: None, ["onnx-float32"])
    assert sorted(snapshot(twin.root)) == sorted([*FILES[:4], MANIFEST])


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_one_flipped_bit_is_found_in_every_file(small, name):
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


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_read_is_not_hashed(small, name):
    flip(small.root / name)
    if name == "sampler.json":
        with pytest.raises(BundleError, match=f"{name}: damaged"):
            Bundle.open(small.root, whole=False)
        return
    opened = Bundle.open(small.root, whole=False)
    network = "onnx/float32/unet.onnx" if name.startswith("onnx") else "torch/float32/unet"
    damaged = "probes" if name.startswith("probes") else network
    for path in {"onnx/float32/unet.onnx", "torch/float32/unet", "probes"} - {damaged}:
        assert opened.path(path) == small.root / path
    for _ in range(2):
        with pytest.raises(BundleError, match=f"{name}: damaged: its SHA-256"):
            opened.path(damaged)


def test_a_hash_is_taken_once(small, monkeypatch):
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
    assert sorted(taken[3:]) == sorted(name.rsplit("/", 1)[-1] for name in FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("whole", [False, True])
def test_a_file_of_another_size_is_found_whether_read_or_not(small, name, whole):
    with (small.root / name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(BundleError, match=f"{name}: damaged: it has"):
        Bundle.open(small.root, whole=whole)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(small, name):
    (small.root / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing; the manifest lists it"):
        Bundle.open(small.root)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="nowhere: not a bundle: no such folder; make one with"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=f"not a bundle: it holds no {MANIFEST}"):
        Bundle.open(tmp_path)
    for text, message in (("[]", "not an edgedistill manifest"), ("{", "not a JSON file")):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(BundleError, match=message):
            Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.0", "newer than 1.0.*upgrade edgedistill"),
        ("one", "must look like '1.0'"),
        (None, "must"),
    ],
)
def test_another_schema_is_refused(small, version, message):
    reseal(small.root, lambda data: data.update(schema_version=version))
    with pytest.raises(BundleError, match=message):
        Bundle.open(small.root)


def test_a_newer_minor_schema_is_read(small):
    reseal(small.root, lambda data: data.update(schema_version="1.7"))
    assert Bundle.open(small.root).name == "small"


ABSENT = object()


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, ABSENT) for key in ("files", "artifacts", "name", "fingerprint", "provenance")]
    + [("files", None), ("files", {"x": 1}), ("artifacts", []), ("artifacts", {"onnx": {}})],
)
def test_a_malformed_manifest_is_one_error(small, key, value):
    (small.root / "x").touch()
    reseal(small.root, lambda data: data.pop(key) if value is ABSENT else data.update({key: value}))
    with pytest.raises(BundleError, match=f"{MANIFEST}: malformed"):
        Bundle.open(small.root)


def outside_artifact(path):
    return lambda data: data["artifacts"]["onnx-float32"]["networks"]["unet"].update(path=path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "onnx/../../secret"])
@pytest.mark.parametrize("where", ["artifact", "file"])
def test_a_manifest_that_points_outside_is_refused(small, tmp_path, path, where):
    (tmp_path / "secret").write_text("secret")
    if where == "artifact":
        reseal(small.root, outside_artifact(path))
    else:
        entry = {"sha256": "0" * 64, "bytes": 6}
        reseal(small.root, lambda data: data["files"].update({path: entry}))
    with pytest.raises(BundleError, match="lies outside of the folder"):
        Bundle.open(small.root)


def test_a_link_that_leads_outside_is_refused(small, tmp_path):
    path = small.root / FILES[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="lies outside of the folder"):
        Bundle.open(small.root)


@pytest.mark.parametrize("name", ["onnx/float32/unet.onnx", "sampler.json"])
def test_a_file_without_a_hash_is_not_used(small, name):
    reseal(small.root, lambda data: data["files"].pop(name))
    with pytest.raises(BundleError, match="holds no hash of it"):
        Bundle.open(small.root)


def test_what_is_no_bundle_is_not_replaced(small, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        write_bundle(tmp_path / "home", small, fill)
    assert snapshot(tmp_path / "home") == {"thesis.tex": b"years of work"}
    (tmp_path / "note").write_text("a file")
    with pytest.raises(BundleError, match="note: exists and is not a bundle"):
        write_bundle(tmp_path / "note", small, fill)
    assert (tmp_path / "note").read_text() == "a file"
    (tmp_path / "empty").mkdir()
    assert write_bundle(tmp_path / "empty", small, fill).name == "small"


def test_a_writer_that_fails_leaves_the_old_bundle(small, tmp_path):
    before = snapshot(small.root)

    def fail(draft):
        fill(draft)
        msg = "something broke"
        raise ArithmeticError(msg)

    with pytest.raises(ArithmeticError):
        write_bundle(small.root, small, fail)
    assert snapshot(small.root) == before
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


def test_what_may_be_made_of_a_replaced_artifact_goes_with_it(small):
    put_others(small)

    def anew(draft):
        for name in ("onnx/float32/unet.onnx", "README.md"):
            (draft.root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.root / name).write_text("new")
        draft.add(artifact("onnx", "onnx/float32/unet.onnx"))

    write_bundle(small.root, small, anew, ["torch-float32"])
    assert {name for name in OTHERS if (small.root / name).is_file()} == {
        "README.md",
        "coreml/report.json",
        "coreml/Resources/Unet.mlmodelc/model.mil",
    }
    assert (small.root / "README.md").read_text() == "new"


def test_another_bundle_in_its_place_gets_nothing_of_it(small):
    put_others(small)
    fresh = Bundle(small.root.parent, "new", "e" * 64, small.table, {}, {})
    write_bundle(small.root, fresh, fill)
    assert others_in(small.root) == set()


def test_what_is_kept_is_neither_copied_nor_hashed_again(small, monkeypatch):
    large = small.root / "onnx/float32/unet.onnx_data"
    before, taken = large.stat().st_ino, []

    def recorded(path):
        taken.append(path.name)
        return sha256(path)

    monkeypatch.setattr(bundles, "sha256", recorded)
    monkeypatch.setattr(manifests, "sha256", recorded)
    for _ in range(2):
        small = write_bundle(small.root, small, lambda _: None, small.artifacts)
    assert large.stat().st_ino == before
    # Of tables and probes, which are written or copied; the rest was hashed when it was written.
    assert set(taken) == {"sampler.json", "golden.safetensors"}
    assert Bundle.open(small.root) == small


def test_where_the_system_has_no_links_what_is_kept_is_copied(small, monkeypatch):
    def refuse(*_paths, **_options):
        raise PermissionError(1, "Operation not permitted")

    before = snapshot(small.root)
    monkeypatch.setattr("os.link", refuse)
    write_bundle(small.root, small, lambda _: None, small.artifacts)
    assert snapshot(small.root) == before


def test_a_bundle_made_of_another_one_shares_no_file_with_it(small, tmp_path):
    twin = write_bundle(tmp_path / "twin", small, lambda _: None, small.artifacts)
    assert not any((small.root / name).samefile(twin.root / name) for name in FILES)


def test_the_table_of_a_newer_version_is_refused(small):
    table = small.root / "sampler.json"
    table.write_text(table.read_text().replace('"spec_version": "1.2"', '"spec_version": "3.1"'))
    entry = {"sha256": sha256(table), "bytes": table.stat().st_size}
    reseal(small.root, lambda data: data["files"].update({"sampler.json": entry}))
    with pytest.raises(BundleError, match=r"sampler\.json: version 3\.1 is newer"):
        Bundle.open(small.root)


def test_newer_and_unsafe_are_called_that_by_whoever_only_edits_the_file(small):
    manifest, table = small.root / MANIFEST, small.root / "sampler.json"
    whole = table.read_text()
    table.write_text(whole.replace('"spec_version": "1.2"', '"spec_version": "3.1"'))
    with pytest.raises(BundleError, match=r"sampler\.json: version 3\.1 is newer"):
        Bundle.open(small.root)
    table.write_text(whole)
    data = json.loads(manifest.read_text())
    next(iter(data["artifacts"].values()))["networks"]["unet"]["path"] = "../elsewhere.onnx"
    manifest.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"names '\.\./elsewhere\.onnx', which lies outside"):
        Bundle.open(small.root)


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
def test_each_format_counts_and_keeps_its_own_where_they_lie_side_by_side(tmp_path, form, size):
    def lay_out(draft):
        for name, count in SIDE_BY_SIDE.items():
            (draft.root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.root / name).write_bytes(bytes(count))
        for key, places in PLACES.items():
            files = {place: NetworkFile(place, SIGNATURE) for place in places}
            draft.add(dataclasses.replace(artifact(key, ""), networks=files))

    table = SamplerTable((Stage((1, 2, 2), (Row(("unet",), x0=(0.0, 1.0)),)),), noise_count=1)
    base = Bundle(tmp_path, "small", "f" * 64, table, {}, {})
    made = write_bundle(tmp_path / "made", base, lay_out)
    assert made.size(made.artifact(f"{form}-float32")) == size
    alone = write_bundle(tmp_path / "alone", made, lambda _: None, [f"{form}-float32"])
    kept = {name for name in snapshot(alone.root) if name in SIDE_BY_SIDE}
    # The variant belongs to no artifact, so it stays.
    assert sum(SIDE_BY_SIDE[name] for name in kept) == size + 4
