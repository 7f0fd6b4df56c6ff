"""The card says what the manifest says; a bundle goes to a hub and comes back, by a stand-in on this machine."""

import base64
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
    """As much of the hub's interface as one upload and one download use; large files come the plain way too."""

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
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reset_sessions()
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.held = {}
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
