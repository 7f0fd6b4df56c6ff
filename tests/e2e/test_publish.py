"""The card says what the manifest says; a bundle goes to a hub and comes back, by a stand-in on this machine."""

import base64
import dataclasses
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub.utils import reset_sessions

from edgedistill.bundle import Bundle
from edgedistill.errors import BundleError, ConfigError
from edgedistill.publish.card import render
from edgedistill.publish.hub import pull, push

REPOSITORY = "someone/digits"


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub's interface as one upload and one download use.

    Of the server: `held` is what lies there, `large` the endings of what goes by Git LFS, `loose` such files before
    the commit that takes them, `refuses` whether they are refused, `branch` the last commit's.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(
        self, data: object = None, status: int = 200, body: bytes = b"", **headers: str
    ) -> None:
        body = json.dumps(data).encode() if data is not None else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        held, body = self.server.held, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/{REPOSITORY}"})
        elif self.path == "/api/validate-yaml":
            assert "\nlibrary_name: edgedistill\n" in json.loads(body)["content"]
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [item["path"] for item in json.loads(body)["files"]]
            ways = {True: "lfs", False: "regular"}
            modes = [
                {
                    "path": n,
                    "uploadMode": ways[n.endswith(self.server.large)],
                    "shouldIgnore": False,
                }
                for n in names
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.url}/loose/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/branch/" in self.path:
            self.answer({}, 201)
        elif "/commit/" in self.path:
            self.server.branch = self.path.rpartition("/")[2]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    held[value["path"]] = self.server.loose[value["oid"]]
            place = f"https://huggingface.co/{REPOSITORY}/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": place})
        else:
            self.answer({"error": "no such place"}, 404)

    def do_GET(self) -> None:
        held = self.server.held
        if self.path.startswith("/api/models/"):
            if not held:
                self.answer({"error": "Repository Not Found"}, 404, X_Error_Code="RepoNotFound")
                return
            files = [{"rfilename": name} for name in held]
            self.answer(
                {"id": REPOSITORY, "modelId": REPOSITORY, "sha": "0" * 40, "siblings": files}
            )
        else:
            name = re.sub(f"^/{REPOSITORY}/resolve/[^/]+/", "", self.path)
            etag = hashlib.sha1(held[name]).hexdigest()
            self.answer(body=held[name], X_Repo_Commit="0" * 40, ETag=f'"{etag}"')

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            self.answer({"error": "no room"}, 403)
            return
        self.server.loose[self.path.rpartition("/")[2]] = body
        self.answer({})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reset_sessions()
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.held, server.loose, server.large = {}, {}, ()
    server.refuses, server.branch = False, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    reset_sessions()


def test_a_bundle_goes_there_and_comes_back(bundle: Bundle, hub, tmp_path: Path) -> None:
    where = push(bundle.root, REPOSITORY, token="t", endpoint=hub.url)
    assert where.endswith("0" * 40)
    assert set(hub.held) - {"README.md"} == {
        path.relative_to(bundle.root).as_posix()
        for path in bundle.root.rglob("*")
        if path.is_file()
    }
    assert hub.held["README.md"].decode() == render(bundle)
    back = pull(REPOSITORY, tmp_path / "back", token="t", endpoint=hub.url)
    assert back.fingerprint == bundle.fingerprint
    assert not (back.root / ".cache").exists()


def test_a_bundle_that_is_there_is_replaced_when_asked_alone(
    bundle: Bundle, hub, handmade: Path
) -> None:
    push(bundle.root, REPOSITORY, token="t", endpoint=hub.url)
    with pytest.raises(BundleError, match="holds a bundle; choose another folder, or give --over"):
        pull(REPOSITORY, handmade, token="t", endpoint=hub.url)
    assert Bundle.open(handmade).name == "handmade"
    back = pull(REPOSITORY, handmade, overwrite=True, token="t", endpoint=hub.url)
    assert Bundle.open(handmade).fingerprint == back.fingerprint == bundle.fingerprint


def test_large_files_go_by_their_own_way_and_come_back(bundle: Bundle, hub, tmp_path: Path) -> None:
    hub.large = (".onnx", ".bin", ".safetensors")
    push(bundle.root, REPOSITORY, token="t", endpoint=hub.url)
    large = [name for name in hub.held if name.endswith(hub.large)]
    assert len(large) >= 4
    for name in large:
        digest = hashlib.sha256((bundle.root / name).read_bytes()).hexdigest()
        assert hub.loose[digest] == hub.held[name]
    back = pull(REPOSITORY, tmp_path / "back", token="t", endpoint=hub.url)
    assert back.artifacts == bundle.artifacts


@pytest.mark.parametrize("large", [(".onnx",), (".onnx", ".bin")], ids=["one", "several"])
def test_a_large_file_that_is_refused_is_named_with_the_reason(
    large: tuple[str, ...], bundle: Bundle, hub
) -> None:
    hub.large, hub.refuses = large, True
    message = r"someone/digits: the hub refuses .*uploading '.*\.(onnx|bin)' .*403"
    with pytest.raises(BundleError, match=message):
        push(bundle.root, REPOSITORY, token="t", endpoint=hub.url)
    assert not hub.held


def test_the_commands_say_where_it_lies(
    run, bundle: Bundle, hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, function in (("push", push), ("pull", pull)):
        here = functools.partial(function, token="t", endpoint=hub.url)
        monkeypatch.setattr(f"edgedistill.publish.hub.{name}", here)
    status, told, _ = run("push", bundle.root, REPOSITORY, "--private", "--revision", "next")
    where = f"https://huggingface.co/{REPOSITORY}/commit/{'0' * 40}"
    assert (status, told, hub.branch) == (0, f"Uploaded: {where}\n", "next")
    assert json.loads(run("push", bundle.root, REPOSITORY, "--json")[1]) == {"url": where}
    assert hub.branch == "main"
    back = tmp_path / "back"
    status, told, _ = run("pull", REPOSITORY, back)
    assert (status, told) == (0, f"Written: {back} ({bundle.name})\n")
    told = json.loads(run("pull", REPOSITORY, back, "--overwrite", "--json")[1])
    assert told == {
        "bundle": str(back),
        "name": bundle.name,
        "fingerprint": bundle.fingerprint,
    }
    for words, message in (
        (("push", tmp_path, REPOSITORY), "not a bundle"),
        (("push", bundle.root, "digits"), "A repository is named USER/NAME, got 'digits'"),
        (("pull", REPOSITORY, tmp_path), "exists and is not a bundle"),
    ):
        status, _, told = run(*words)
        assert (status, message in told) == (2, True), told


def test_what_was_changed_on_the_way_does_not_appear(bundle: Bundle, hub, tmp_path: Path) -> None:
    push(bundle.root, REPOSITORY, token="t", endpoint=hub.url)
    name = next(name for name in hub.held if name.endswith(".onnx"))
    hub.held[name] = hub.held[name][:-1] + b"?"
    with pytest.raises(BundleError, match="SHA-256"):
        pull(REPOSITORY, tmp_path / "back", token="t", endpoint=hub.url)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said(hub, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="someone/digits: the hub refuses"):
        pull(REPOSITORY, tmp_path / "back", token="t", endpoint=hub.url)
    with pytest.raises(ConfigError, match="named USER/NAME"):
        pull("digits", tmp_path / "back")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not a bundle"):
        pull(REPOSITORY, tmp_path)


def test_offline_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reset_sessions()
    with pytest.raises(BundleError, match="HF_HUB_OFFLINE=0"):
        pull(REPOSITORY, tmp_path / "back", token="t", endpoint="http://127.0.0.1:9")


def test_only_whole_bundles_are_pushed(hub, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        push(tmp_path, REPOSITORY, endpoint=hub.url)
    assert not hub.held


def test_the_card_has_the_manifest_s_numbers(bundle: Bundle) -> None:
    card = render(bundle)
    assert card.startswith("---\nlibrary_name: edgedistill\n")
    assert f"fingerprint: `{bundle.fingerprint}`" in card
    for artifact in bundle.artifacts.values():
        line = next(row for row in card.splitlines() if row.startswith(f"| {artifact.name} |"))
        assert f"| {bundle.size(artifact) / 1e6:.2f} |" in line
        if "snr_db" in artifact.made_with:
            assert line.endswith(f"| {artifact.made_with['snr_db']:.1f} |")
    assert f"| (default) | {len(bundle.table.rows)} | {bundle.table.nfe:g} |" in card


def test_the_card_says_what_a_pipeline_was_made_of(bundle: Bundle) -> None:
    made_of = {
        "source": "StableDiffusionPipeline",
        "variant": "fp16",
        "lora": [{"file": "style.safetensors", "sha256": "ab" * 32, "scale": 0.7}],
        "vae": "small",
        "controlnet": "edges",
        "conditioning_scale": 0.5,
    }
    artifacts = {
        name: dataclasses.replace(
            item, networks={**item.networks, "vae_decoder": item.networks["unet"]}
        )
        for name, item in bundle.artifacts.items()
    }
    artifacts["onnx-float32"] = dataclasses.replace(artifacts["onnx-float32"], guidance_scale=4.5)
    told = render(dataclasses.replace(bundle, provenance=made_of, artifacts=artifacts))
    lines = told.splitlines()
    for line in (
        "- source: StableDiffusionPipeline",
        "- variant: fp16",
        f"- LoRA: style.safetensors at scale 0.7 (SHA-256 `{'ab' * 32}`)",
        "- vae: small",
        "- controlnet: edges",
        "- conditioning scale: 0.5",
    ):
        assert line in lines
    assert "The graphs of onnx-float32 hold scale 4.5 and take no other." in told
    sizes = " | ".join(f"{bundle.size(item) / 1e6:.2f}" for item in bundle.artifacts.values())
    assert f"| unet | {sizes} |" in lines
    assert f"| vae_decoder | {sizes} |" in lines
    assert "Sizes in MB" not in render(bundle)


def test_the_card_takes_a_parity_report(run, bundle: Bundle, tmp_path: Path) -> None:
    _, out, _ = run("parity", bundle.root, "--runtime", "onnxruntime", "--json")
    (tmp_path / "parity.json").write_text(out)
    status, card, _ = run("card", bundle.root, "--parity", tmp_path / "parity.json", "-o", "-")
    (measured,) = json.loads(out)["artifacts"]
    assert status == 0
    line = next(row for row in card.splitlines() if row.startswith("| onnx-float32 |"))
    assert line.endswith(
        f"| ok | {min(r['teacher_forced']['raw']['snr_db'] for r in measured['rows']):.1f} "
        f"| {measured['image']['snr_db']:.1f} | {measured['image']['psnr_db']:.1f} |"
    )


def test_the_card_leaves_out_artifacts_of_other_bundles(run, make, tmp_path: Path) -> None:
    first = make({"mine": ("fake", "float32")}, "first")
    second = make({"theirs": ("fake", "int8")}, "second")
    (tmp_path / "both.json").write_text(run("parity", first, second, "--json")[1])
    status, out, _ = run("card", first, "--parity", tmp_path / "both.json", "--json")
    assert (status, json.loads(out)) == (0, {"card": str(first / "README.md")})
    card = (first / "README.md").read_text()
    assert "\n| mine | fake | float32 |" in card
    assert "theirs" not in card
    (tmp_path / "other.json").write_text(run("parity", second, "--json")[1])
    status, _, err = run("card", first, "--parity", tmp_path / "other.json")
    assert status == 2
    assert "names none of the artifacts of" in err
    assert run("card", first, "-o", "-", "--json")[0] == 2


def test_a_report_of_another_student_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="of another student"):
        render(bundle, {"fingerprint": "x", "artifacts": [], "name": "other"})
    with pytest.raises(ConfigError, match="holds no `fingerprint`"):
        render(bundle, {})
