"""What K students cost a device that is asked for one of them at a time."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from edgedistill.bundle import Bundle, NetworkFile
from edgedistill.compiler import compile_scheduler
from edgedistill.drafts import write_manifest
from edgedistill.models import store
from edgedistill.router import Router
from edgedistill.student import Student
from edgedistill.table import Condition
from export.assemble import export_student

CLASSES = 10
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
# What getrusage says would begin with the memory of the process that started this one.
MEMORY = """
import json, re, sys
from pathlib import Path
import edgedistill
pipeline = edgedistill.load(sys.argv[1], sys.argv[2], threads=1)
for label in range(10):
    assert pipeline(1, class_labels=[label]).array.std() > 0
status = Path("/proc/self/status").read_text()
print(json.dumps([1024 * int(re.search(name + r":\\s+(\\d+) kB", status)[1]) for name in ("VmHWM", "VmRSS")]))
"""


def routed(count: int) -> Router:
    return Router("class_table", "class_labels", count, tuple(k % count for k in range(CLASSES)))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of one student of 40 MB."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(256,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        add_attention=False,
        num_class_embeds=CLASSES,
    )
    folder = tmp_path_factory.mktemp("students")
    store.save(network, folder / "student" / "unet.0")
    classes = (Condition("class_labels", "class", CLASSES),)
    table = compile_scheduler(SCHEDULER, 1, shape=(1, 8, 8), conditions=classes)
    table = dataclasses.replace(table, router=routed(1))
    signatures = {"unet.0": store.signature(network)}
    Student(folder / "student", "large", table, signatures, {"method": "none"}).write_manifest()
    student = Student.open(folder / "student")
    return export_student(student, folder / "bundle", ["onnx", "openvino"])


def of_students(one: Bundle, count: int, root: Path) -> Bundle:
    """Write a bundle of several students, each in files of its own."""
    shutil.copytree(one.root, root)
    artifacts = {}
    for name, artifact in one.artifacts.items():
        if artifact.runtime == "torch" or artifact.precision != "float32":
            continue
        files = {}
        source = artifact.networks["unet.0"]
        for k in range(count):
            path = source.path.replace("unet.0", f"unet.{k}")
            for part in (root / source.path).parent.glob("unet.0.*"):
                if k > 0:
                    shutil.copyfile(part, part.with_name(part.name.replace("unet.0", f"unet.{k}")))
            files[f"unet.{k}"] = NetworkFile(path, source.signature)
        artifacts[name] = dataclasses.replace(artifact, networks=files)
    table = dataclasses.replace(one.table, router=routed(count))
    write_manifest(dataclasses.replace(one, root=root, table=table, artifacts=artifacts))
    return Bundle.open(root)


def memory(bundle: Bundle, runtime: str) -> tuple[int, int]:
    """Return the bytes, at most and in the end, of a process that draws every class, one after another."""
    command = [sys.executable, "-c", MEMORY, str(bundle.root), runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    most, last = json.loads(done.stdout)
    return most, last


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_memory_does_not_grow_with_the_number_of_students(
    one: Bundle, runtime: str, tmp_path: Path
) -> None:
    bundles = {count: of_students(one, count, tmp_path / f"{count}") for count in (1, 8)}
    sizes = {k: bundle.size(bundle.artifact(None, runtime)) for k, bundle in bundles.items()}
    assert sizes[8] == pytest.approx(8 * sizes[1], rel=0.01)
    assert sizes[1] > 40e6
    used = {count: memory(bundle, runtime) for count, bundle in bundles.items()}
    # OpenVINO lets go of a network late now and then, so that one more is there.
    spare = 1.1 * sizes[1] if runtime == "openvino" else 0.0
    for before, after in zip(used[1], used[8], strict=True):
        assert after < 1.15 * before + spare, used
    if runtime == "onnxruntime":  # which takes a second network's memory to open one
        assert used[1][1] < used[1][0] - sizes[1] / 2, used
