"""Paths that stay inside, and writes that happen whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill import files
from edgedistill.errors import BundleError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "relative", ["/etc/passwd", "../x", "a/../../x", "", "a\\b", "a\0b", "link/x"]
)
def test_a_path_that_leaves_its_folder_is_refused(tmp_path, relative):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="outside of the folder"):
        files.inside(root, relative)


def test_a_path_inside_is_joined(tmp_path):
    (tmp_path / "twin").symlink_to(tmp_path / "a")
    assert files.inside(tmp_path, "a/b.bin") == tmp_path / "a/b.bin"
    assert files.inside(tmp_path, "twin/b.bin") == tmp_path / "twin/b.bin"


def test_json_survives_and_its_absence_is_one_clear_error(tmp_path):
    data = {"b": [0.1, 1e-300, 3], "a": None}
    files.write_json(tmp_path / "deep" / "x.json", data)
    assert files.read_json(tmp_path / "deep" / "x.json") == data
    with pytest.raises(BundleError, match="no such file"):
        files.read_json(tmp_path / "y.json")
    (tmp_path / "z.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(BundleError, match="not a JSON file"):
        files.read_json(tmp_path / "z.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "nan.json", {"x": float("nan")})
    assert names(tmp_path) == ["deep", "z.json"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    files.write_bytes(path, b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match=r"x\.bin: cannot be written \(No space left.*free some"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.bin"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    target = tmp_path / "out"
    for content in ("old", "new"):
        with files.written_aside(target) as aside:
            (aside / content).write_text(content)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with files.written_aside(tmp_path / "link") as aside:
        (aside / "x").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG])
def test_a_full_or_read_only_disk_leaves_the_old_folder(tmp_path, number):
    target = tmp_path / "out"
    with files.written_aside(target) as aside:
        (aside / "old").touch()

    def fail():
        with files.written_aside(target) as aside:
            (aside / "new").touch()
            raise OSError(number, os.strerror(number), "the file that was copied")

    with pytest.raises(BundleError, match=r"out: cannot be written \(.*\); .* is untouched"):
        fail()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_disk_that_is_full_for_a_copied_folder_is_one_sentence(tmp_path):
    """`shutil.copytree` gathers what went wrong as words, without numbers."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x").touch()

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    with (
        pytest.raises(
            BundleError, match=r"out: cannot be written \(No space left on device\); free"
        ),
        files.written_aside(tmp_path / "out") as aside,
    ):
        shutil.copytree(tmp_path / "source", aside / "copy", copy_function=full)
    assert names(tmp_path) == ["source"]


def test_a_full_disk_names_what_the_user_asked_for_and_no_folder_aside(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    with (
        pytest.raises(BundleError, match=rf"^{tmp_path}/out: cannot be written"),
        files.written_aside(tmp_path / "out") as aside,
        files.written_aside(aside / "unet.mlpackage"),
    ):
        raise full
    assert names(tmp_path) == []


def test_a_native_writer_that_fails_is_named():
    failure = RuntimeError("iostream error")
    message = r"unet\.xml: OpenVINO could not write it \(iostream error\); make room there"
    with (
        pytest.raises(BundleError, match=message),
        files.native_writer("OpenVINO", Path("unet.xml")),
    ):
        raise failure


def test_links_in_a_circle_are_no_way_out_and_no_crash(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert not files.inside(tmp_path, "loop").is_file()


def test_what_a_killed_writer_of_a_file_left_is_swept(tmp_path):
    (tmp_path / f".x.json.aside-{2**22 + 1}-abc").write_text("half")
    files.write_json(tmp_path / "x.json", {})
    assert names(tmp_path) == ["x.json"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(prefix, dir):  # noqa: A002
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{prefix}abc")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with (
        pytest.raises(BundleError, match=r"out: cannot be written \(Permission denied\)"),
        files.written_aside(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(BundleError, match="a part of the path is a file"),
        files.written_aside(tmp_path / "file" / "out"),
    ):
        pass


def test_what_cannot_be_read_is_not_blamed_on_the_target(tmp_path):
    refusal = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "weights"))
    with pytest.raises(PermissionError), files.written_aside(tmp_path / "out"):
        raise refusal
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from edgedistill import files
target, when = Path(sys.argv[1]), sys.argv[2]
if when == "between":
    rename = Path.rename
    def once(self, other):
        rename(self, other)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = once
with files.written_aside(target) as aside:
    (aside / "new").touch()
    if when == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["inside", "between"])
def test_a_killed_writer_loses_nothing(tmp_path, when):
    target = tmp_path / "out"
    with files.written_aside(target) as aside:
        (aside / "old").touch()
    killed = subprocess.run([sys.executable, "-c", KILLED, target, when], check=False)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 2
    files._sweep(target)  # what the next writer does first
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


def test_a_living_writers_folder_is_left_alone(tmp_path):
    with files.written_aside(tmp_path / "out") as first:
        (first / "x").touch()
        files._sweep(tmp_path / "out")
        assert names(first) == ["x"]


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    assert json.dumps(files.sha256(tmp_path / "abc"))[1:-1].islower()
