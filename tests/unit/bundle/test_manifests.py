"""A manifest that is malformed, unsafe or newer is refused by name."""

import json

import pytest

from edgedistill.bundle import Bundle
from edgedistill.errors import BundleError
from edgedistill.files import sha256
from edgedistill.manifest import MANIFEST


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
def test_another_schema_is_refused(parts, small, version, message):
    parts.reseal(small.root, lambda data: data.update(schema_version=version))
    with pytest.raises(BundleError, match=message):
        Bundle.open(small.root)


def test_a_newer_minor_schema_is_read(parts, small):
    parts.reseal(small.root, lambda data: data.update(schema_version="1.7"))
    assert Bundle.open(small.root).name == "small"


ABSENT = object()


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, ABSENT) for key in ("files", "artifacts", "name", "fingerprint", "provenance")]
    + [("files", None), ("files", {"x": 1}), ("artifacts", []), ("artifacts", {"onnx": {}})],
)
def test_a_malformed_manifest_is_one_error(parts, small, key, value):
    (small.root / "x").touch()
    parts.reseal(
        small.root, lambda data: data.pop(key) if value is ABSENT else data.update({key: value})
    )
    with pytest.raises(BundleError, match=f"{MANIFEST}: malformed"):
        Bundle.open(small.root)


def outside_artifact(path):
    return lambda data: data["artifacts"]["onnx-float32"]["networks"]["unet"].update(path=path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "onnx/../../secret"])
@pytest.mark.parametrize("where", ["artifact", "file"])
def test_a_manifest_that_points_outside_is_refused(parts, small, tmp_path, path, where):
    (tmp_path / "secret").write_text("secret")
    if where == "artifact":
        parts.reseal(small.root, outside_artifact(path))
    else:
        entry = {"sha256": "0" * 64, "bytes": 6}
        parts.reseal(small.root, lambda data: data["files"].update({path: entry}))
    with pytest.raises(BundleError, match="lies outside of the folder"):
        Bundle.open(small.root)


def test_a_link_that_leads_outside_is_refused(parts, small, tmp_path):
    path = small.root / parts.files[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="lies outside of the folder"):
        Bundle.open(small.root)


@pytest.mark.parametrize("name", ["onnx/float32/unet.onnx", "sampler.json"])
def test_a_file_without_a_hash_is_not_used(parts, small, name):
    parts.reseal(small.root, lambda data: data["files"].pop(name))
    with pytest.raises(BundleError, match="holds no hash of it"):
        Bundle.open(small.root)


def test_the_table_of_a_newer_version_is_refused(parts, small):
    table = small.root / "sampler.json"
    table.write_text(table.read_text().replace('"spec_version": "1.2"', '"spec_version": "3.1"'))
    entry = {"sha256": sha256(table), "bytes": table.stat().st_size}
    parts.reseal(small.root, lambda data: data["files"].update({"sampler.json": entry}))
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
