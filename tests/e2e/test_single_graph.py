"""A sampler as one graph: the golden samples on every runtime, weights held once, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest

import edgedistill
from edgedistill.bundle import Bundle
from edgedistill.cli import main
from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError, ContractError
from edgedistill.mlpackage import read_package
from edgedistill.models import store
from edgedistill.router import Router
from edgedistill.student import Student
from edgedistill.table import Condition, Guidance, SamplerTable
from edgedistill.text import Tokenizer
from export.assemble import export_student
from export.bake import bake_student
from export.formats import ExportOptions
from quantize.assemble import quantize_bundle
from quantize.config import WeightOnlyConfig
from runtimes.verify import verify

pytestmark = pytest.mark.filterwarnings(
    # nncf asks an older module of torch for a name that it moved.
    "ignore:.*:DeprecationWarning:nncf"
)
ROWS = {"default": 4, "one": 1, "two": 2}
LOOP, GRAPH = "onnx-float32", "onnx-float32-graph"


def ddim(base: SamplerTable, steps: int) -> SamplerTable:
    return compile_scheduler(
        base.annotations["scheduler"],
        steps,
        shape=base.stages[0].shape,
        eta=0.5,
        guidance=base.guidance,
        conditions=base.conditions,
        clamp=base.clamp,
    )


@pytest.fixture(scope="module")
def rows(student, tmp_path_factory) -> Student:
    """A student with samplers of one, two and four rows."""
    folder = tmp_path_factory.mktemp("rows") / "student"
    shutil.copytree(student.root, folder)
    default, *further = (ddim(student.table, count) for count in ROWS.values())
    tables = dict(zip(list(ROWS)[1:], further, strict=True))
    dataclasses.replace(student, root=folder, table=default, further=tables).write_manifest()
    return Student.open(folder)


def export_graphs(student: Student, target: Path, formats, **options) -> Bundle:
    for name in student.samplers:
        chosen = ExportOptions(single_graph=name, **options)
        bundle = export_student(student, target, formats, chosen)
    return bundle


@pytest.fixture(scope="module")
def graphs(rows) -> Bundle:
    target = rows.root.parent / "bundle"
    export_student(rows, target, ["onnx"])
    return export_graphs(rows, target, ["onnx", "openvino"], dtype="float32")


def ending(sampler: str) -> str:
    return "graph" if sampler == "default" else f"graph-{sampler}"


def test_every_graph_makes_the_golden_samples(graphs):
    report = verify([graphs])
    assert report.failures == ()
    made = {item.name: item for item in report.artifacts if "graph" in item.name}
    assert {name: item.sampler for name, item in made.items()} == {
        f"{kind}-{ending(sampler)}": sampler
        for kind in ("onnx-float32", "openvino-float32")
        for sampler in ROWS
    }
    for item in made.values():
        assert item.image.snr_db >= 100
        assert set(item.sensitivity) == {"class_labels", "w"}
        assert (item.rows, item.call_ms > 0) == ((), True)


def test_on_core_ml_too(rows, tmp_path):
    bundle = export_student(rows, tmp_path / "b", ["coreml"], ExportOptions(single_graph="two"))
    report = verify([bundle], runtimes=["coreml"])
    assert report.failures == ()
    assert [item.name for item in report.artifacts] == [
        "coreml-float16-graph-two",
        "coreml-float32-graph-two",
    ]
    assert report.artifacts[1].image.snr_db >= 100
    package = read_package(bundle.path("coreml/float16-graph-two/generator.mlpackage"))
    description = package.get_spec().description
    assert description.metadata.shortDescription.startswith("A whole sampler of a distilled")
    assert [item.name for item in description.input] == ["noise_0", "noise_1", "class_labels", "w"]


@pytest.mark.slow
def test_core_ml_holds_weights_once(rows, tmp_path):
    bundle = export_graphs(rows, tmp_path / "b", ["coreml"], dtype="float32")
    assert verify([bundle], runtimes=["coreml"]).failures == ()
    sizes = {path.stat().st_size: path for path in bundle.root.rglob("weight.bin")}
    assert len(sizes) == len(ROWS)
    assert max(sizes) < 1.05 * min(sizes)


def test_weights_are_held_once(graphs):
    def held(kind: str, sampler: str) -> int:
        place = graphs.root / kind / f"float32-{ending(sampler)}" / "generator"
        if kind == "openvino":
            return place.with_suffix(".bin").stat().st_size
        return bytes_of(place.with_suffix(".onnx"))

    plain = bytes_of(graphs.root / "onnx/float32/unet.onnx")
    for kind in ("onnx", "openvino"):
        sizes = [held(kind, sampler) for sampler in ROWS]
        assert max(sizes) < 1.05 * min(sizes)
        assert min(sizes) > 0.95 * plain


def bytes_of(path: Path) -> int:
    model = onnx.load(path)
    return sum(onnx.numpy_helper.to_array(item).nbytes for item in model.graph.initializer)


@pytest.mark.parametrize("sampler", list(ROWS))
def test_a_graph_draws_what_the_loop_draws(graphs, sampler):
    loop = edgedistill.load(graphs, artifact=LOOP)
    graph = edgedistill.load(graphs, artifact=f"onnx-float32-{ending(sampler)}")
    asked = {"seed": 3, "guidance_scale": 2.0, "class_labels": [1, 7, 4]}
    made = graph(**asked).array
    assert np.allclose(made, loop(sampler=sampler, **asked).array, atol=2e-5)
    alone = graph(seed=5, guidance_scale=2.0, class_labels=4).array
    assert np.array_equal(made[2:], alone)


def test_timesteps_are_constants(student, tmp_path):
    baked = bake_student(student, 2.0, make(tmp_path / "baked"))
    options = ExportOptions(single_graph="default", dtype="float16")
    bundle = export_student(baked, tmp_path / "b", ["openvino"], options)
    (report,) = verify([bundle], runtimes=["openvino"]).artifacts
    assert report.image.snr_db > 50
    path = bundle.path("openvino/float16-graph/generator.xml")
    found = {node.get_type_name() for node in openvino.Core().read_model(path).get_ops()}
    assert "Convolution" in found
    assert not {"Sin", "Cos"} & found


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_from_the_command_line(rows, tmp_path, capsys):
    bundle = tmp_path / "b"
    words = ["export", "onnx", "-m", rows.root, bundle, "--single-graph", "--sampler", "two"]
    assert run(capsys, *words, "--dynamic", "--json")["artifacts"][1]["name"] == f"{GRAPH}-two"
    words = ["sample", bundle, "--artifact", f"{GRAPH}-two", "-n", 3, "-o", tmp_path / "x.png"]
    told = run(capsys, *words, "--json")
    assert (told["sampler"], told["nfe"], told["samples"]) == ("two", 2, 3)
    told = run(capsys, "parity", bundle, "--artifact", f"{GRAPH}-two", "--json")
    assert [(item["sampler"], item["verdict"]) for item in told["artifacts"]] == [("two", "ok")]
    assert main(["parity", str(bundle), "--report", str(tmp_path / "x.html")]) == 0
    assert f"{GRAPH}-two, two" in (tmp_path / "x.html").read_text()


def run(capsys, *words) -> dict:
    assert main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_a_graph_does_not_hold_is_refused(graphs):
    graph = edgedistill.load(graphs, artifact=GRAPH)
    image = np.zeros(graphs.table.stages[0].shape)
    for asked in (
        {"sampler": "one"},
        {"observe": lambda _: None},
        {"image": image, "strength": 0.5},
    ):
        with pytest.raises(ContractError, match="'onnx-float32-graph' is the sampler 'default' as"):
            graph(2, **asked)


def test_what_cannot_become_a_graph_is_refused_before_any_work(student, tmp_path, capsys):
    options = ExportOptions(single_graph="default")
    router = Router("class_table", "class_labels", 2, (0, 1) * 5)
    routed = dataclasses.replace(student.table, router=router)
    for table, match in (
        (routed, "router chooses one of 2 students by `class_labels`"),
        (ddim(student.table, 9), "up to 8 network evaluations, this one makes 9"),
    ):
        with pytest.raises(ConfigError, match=match):
            export_student(
                dataclasses.replace(student, table=table), tmp_path / "b", ["onnx"], options
            )
    words = ["export", "onnx", "-m", str(student.root), str(tmp_path / "b")]
    for more, match in (
        (["--sampler", "two"], "--sampler and --text-embeddings are for --single-graph"),
        (["--single-graph", "--sampler", "two"], "No sampler 'two'; there is: default"),
    ):
        assert main([*words, *more]) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_compression_leaves_graphs_alone(graphs, tmp_path):
    smaller = quantize_bundle(graphs, tmp_path / "smaller", WeightOnlyConfig("int8"), only=["onnx"])
    assert list(smaller.artifacts["onnx-int8-weights"].networks) == ["unet"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Student:
    """The packaged text teacher with two steps of classifier-free guidance."""
    source = Path(edgedistill.__file__).parent / "assets" / "captioned_digits_teacher"
    folder = tmp_path_factory.mktemp("captioned") / "student"
    examples = tuple((source / "prompts.txt").read_text().split("\n")[:10])
    named = {"encoder": "text_encoder", "tokenizer": "tokenizer.json", "length": 12}
    text = Condition("encoder_hidden_states", "text", examples=examples, **named)
    networks = {name: store.load(source / name) for name in ("unet", "text_encoder")}
    for name, network in networks.items():
        store.save(network, folder / name)
    Tokenizer.open(source / "tokenizer").save(folder / "tokenizer.json")
    signatures = {name: store.signature(network) for name, network in networks.items()}
    shape = signatures["unet"].inputs[0].shape[1:]
    table = compile_scheduler(
        {"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing"},
        2,
        shape=shape,
        guidance=Guidance("cfg", None, 1.5, (1.0, 3.0), {text.name: ""}),
        conditions=(text,),
        clamp=(-1.0, 1.0),
    )
    Student(folder, "captioned", table, signatures, {"method": "none"}).write_manifest()
    return Student.open(folder)


@pytest.mark.parametrize("inside", [True, False])
def test_prompts_as_tokens_or_embeddings(captioned, tmp_path, inside):
    options = ExportOptions(single_graph="default", text_inside=inside)
    bundle = export_student(captioned, tmp_path / "b", ["onnx"], options)
    assert verify([bundle]).failures == ()
    networks = bundle.artifacts[GRAPH].networks
    taken = "input_ids" if inside else "encoder_hidden_states"
    assert [spec.name for spec in networks["generator"].signature.inputs] == ["noise_0", taken]
    assert list(networks) == ["generator"] if inside else ["generator", "text_encoder"]
    graph = edgedistill.load(bundle, artifact=GRAPH)
    loop = edgedistill.load(bundle, artifact="torch-float32")
    prompts = ["a handwritten three", "the digit seven"]
    assert np.allclose(graph(prompt=prompts).array, loop(prompt=prompts).array, atol=1e-4)
    with pytest.raises(ContractError, match="holds its CFG scale"):
        graph(prompt=prompts, guidance_scale=2.5)
