"""Students of several networks: routed ones, a guide, a cascade, a text encoder; and of several samplers."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DModel
from PIL import Image

import edgedistill
from edgedistill.bundle import CALIBRATION, Bundle
from edgedistill.cli import main
from edgedistill.compiler import compile_scheduler
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError, ConfigError, ContractError
from edgedistill.models import store
from edgedistill.models.extend import extend
from edgedistill.models.inputs import Inputs
from edgedistill.models.residuals import residual_encoder
from edgedistill.models.vae import VaeDecoder
from edgedistill.pipeline import Pipeline
from edgedistill.probes import load_probes
from edgedistill.router import Router, route
from edgedistill.student import Student
from edgedistill.table import Condition, Guidance, SamplerTable, Stage
from edgedistill.text import Tokenizer
from export.assemble import export_student
from export.formats import ExportOptions
from quantize.assemble import quantize_bundle
from quantize.config import PtqConfig, WeightOnlyConfig
from runtimes.verify import verify

pytestmark = pytest.mark.filterwarnings(
    # nncf asks an older module of torch for a name that it moved.
    "ignore:.*:DeprecationWarning:nncf"
)
SHAPE = (1, 8, 8)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
CLASSES = (Condition("class_labels", "class", 10),)
W = Guidance("embedded", "w", 1.5, (1.0, 3.0))


def unet(seed: int, classes: int | None = 10) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=classes,
    ).eval()


def stir(network: torch.nn.Module) -> torch.nn.Module:
    """Make what is zero at first count."""
    torch.manual_seed(9)
    for value in network.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.1)
    return network.eval()


def ddim(steps: int, **fields) -> SamplerTable:
    return compile_scheduler(SCHEDULER, steps, shape=SHAPE, clamp=(-1.0, 1.0), **fields)


def write(folder: Path, networks, table: SamplerTable, **fields) -> Student:
    signatures = {}
    for name, network in networks.items():
        store.save(network, folder / name)
        signatures[name] = store.signature(network)
    Student(folder, folder.name, table, signatures, {"method": "none"}, **fields).write_manifest()
    return Student.open(folder)


def renamed(table: SamplerTable, *call: str) -> SamplerTable:
    (stage,) = table.stages
    rows = tuple(dataclasses.replace(row, call=call) for row in stage.rows)
    return dataclasses.replace(table, stages=(dataclasses.replace(stage, rows=rows),))


def routed(folder: Path, count: int, same: Sequence[int] = ()) -> Student:
    """Write `count` students; those in `same` have the weights of student 0."""
    router = Router("class_table", "class_labels", count, tuple(k % count for k in range(10)))
    networks = {f"unet.{k}": unet(0 if k in same else k) for k in range(count)}
    return write(folder, networks, dataclasses.replace(ddim(2, conditions=CLASSES), router=router))


def guided(folder: Path) -> Student:
    base = unet(0)
    pair = extend(base, Inputs(residuals=True))
    guide = stir(residual_encoder(base, pair, Inputs({"w": 1000.0})))
    table = renamed(ddim(2, conditions=CLASSES, guidance=W), "guide", "unet")
    return write(folder, {"guide": guide, "unet": pair.eval()}, table)


def cascade(folder: Path) -> Student:
    """Write one network that draws 4x4 and then, told of that, 8x8."""
    network = stir(extend(unet(0, None), Inputs({"r": 100.0}, image_channels=1)))
    stages = []
    for index, size in enumerate((4, 8)):
        (stage,) = renamed(ddim(2), f"unet_{size}").stages
        told = {"r": float(index)}
        rows = tuple(
            dataclasses.replace(row, feeds={**row.feeds, **told}, note={**row.note, "feeds": told})
            for row in stage.rows
        )
        carried = {"carry": "up_nearest", "carry_to": "image", "carry_noise": (0.1, 2)}
        stages.append(Stage((1, size, size), rows, (1.0, index), **(carried if index else {})))
    table = dataclasses.replace(ddim(2), stages=tuple(stages), noise_count=3)
    store.save(network, folder / "unet")
    signatures = {f"unet_{size}": sized(store.signature(network), size) for size in (4, 8)}
    folders = dict.fromkeys(signatures, "unet")
    Student(folder, "cascade", table, signatures, {}, folders=folders).write_manifest()
    return Student.open(folder)


def sized(signature: Signature, size: int) -> Signature:
    def fit(spec: TensorSpec) -> TensorSpec:
        shape = (*spec.shape[:2], size, size) if len(spec.shape) == 4 else spec.shape
        return dataclasses.replace(spec, shape=shape)

    return Signature(tuple(map(fit, signature.inputs)), tuple(map(fit, signature.outputs)))


def worded(folder: Path) -> Student:
    """Write the packaged text teacher with two steps, CFG, and a student per sign of an embedding."""
    source = Path(edgedistill.__file__).parent / "assets" / "captioned_digits_teacher"
    text = Condition(
        "encoder_hidden_states",
        "text",
        encoder="text_encoder",
        tokenizer="tokenizer.json",
        length=12,
        examples=tuple((source / "prompts.txt").read_text().split("\n")[:10]),
    )
    cfg = Guidance("cfg", None, 1.5, (1.0, 3.0), {text.name: ""})
    plane = np.random.default_rng(0).standard_normal(32)
    encoder = store.load(source / "text_encoder")
    Tokenizer.open(source / "tokenizer").save(folder / "tokenizer.json")
    ids = Tokenizer.open(folder / "tokenizer.json").encode(text.examples, 12)
    heights = encoder(torch.from_numpy(ids))[1].numpy() @ plane
    router = Router(
        "sign_planes",
        "pooled",
        2,
        planes=(tuple(plane.tolist()),),
        bias=(-float(np.median(heights)),),
    )
    network = store.load(source / "unet")
    networks = {"unet.0": network, "unet.1": stir(network), "text_encoder": encoder}
    table = dataclasses.replace(ddim(2, conditions=(text,), guidance=cfg), router=router)
    return write(folder, networks, table)


def latent(folder: Path) -> Student:
    """Write a network of 8x8 latents with a decoder to 16x16."""
    torch.manual_seed(4)
    wide = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    stock = AutoencoderTiny(1, 1, latent_channels=1, **wide, **blocks)
    decoder = VaeDecoder(stock, (8, 8)).eval()
    space = {"kind": "latent", "value_range": [-1.0, 1.0], "scale": 0.5, "shift": 0.25}
    table = dataclasses.replace(ddim(2, conditions=CLASSES), space=space, decoder="vae_decoder")
    return write(folder, {"unet": unet(0), "vae_decoder": decoder}, table)


KINDS: dict[str, Callable[[Path], Student]] = {
    "routed": lambda folder: routed(folder, 3),
    "guided": guided,
    "cascade": cascade,
    "worded": worded,
    "latent": latent,
}


@pytest.fixture(scope="module", params=list(KINDS))
def bundle(request, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    student = KINDS[request.param](folder / request.param)
    return export_student(student, folder / "bundle", ["onnx", "openvino"])


def test_every_artifact_reaches_its_floors(bundle):
    report = verify([bundle])
    assert report.failures == ()
    assert [item.name for item in report.artifacts] == list(bundle.artifacts)
    assert all(
        gain == pytest.approx(1, abs=0.02)
        for a in report.artifacts
        for gain in a.sensitivity.values()
    )


def test_latents_come_out_as_images(tmp_path):
    bundle = export_student(latent(tmp_path / "student"), tmp_path / "bundle", ["onnx"])
    pipeline = edgedistill.load(bundle, "onnxruntime")
    states = []
    made = pipeline(2, observe=lambda trace: states.append(trace.next)).array
    assert made.shape == (2, 1, 16, 16)
    by_hand = pipeline.networks["vae_decoder"]({"latent_sample": states[-1] / 0.5 + 0.25})
    assert np.allclose(made, by_hand["sample"].clip(-1, 1), atol=1e-6)
    with pytest.raises(ConfigError, match="autoencoder came without its encoder"):
        pipeline(image=np.zeros((1, 8, 8)), strength=0.5)


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("guided", ["noise_0", "class_labels", "w"]),
        ("cascade", ["noise_0", "noise_1", "noise_2"]),
        ("latent", ["noise_0", "class_labels"]),
    ],
)
def test_many_networks_become_one_graph(kind, taken, tmp_path):
    student = KINDS[kind](tmp_path / kind)
    options = ExportOptions(single_graph="default")
    bundle = export_student(student, tmp_path / "bundle", ["onnx"], options)
    (report,) = verify([bundle], artifacts=["onnx-float32-graph"]).artifacts
    assert (report.failures, report.rows) == ((), ())
    assert report.image.snr_db >= 100
    (graph,) = bundle.artifacts["onnx-float32-graph"].networks.values()
    assert [spec.name for spec in graph.signature.inputs] == taken


def test_every_network_is_made_smaller(bundle, tmp_path):
    smaller = quantize_bundle(bundle, tmp_path / "smaller", WeightOnlyConfig("int8"))
    assert verify([smaller], artifacts=["onnx-int8-weights"]).failures == ()
    assert [*smaller.artifacts["onnx-int8-weights"].networks] == [
        *bundle.artifacts["onnx-float32"].networks
    ]


@pytest.mark.parametrize("bundle", ["routed", "worded"], indirect=True)
def test_every_network_is_calibrated_on_what_it_is_fed(bundle, tmp_path):
    config = PtqConfig(subset_size=16)
    smaller = quantize_bundle(bundle, tmp_path / "smaller", config, only=["openvino"])
    assert verify([smaller], artifacts=["openvino-int8"]).failures == ()


@pytest.mark.slow
def test_core_ml_reaches_its_floors(bundle, tmp_path):
    student = Student.open(bundle.root.parent / bundle.name)
    made = export_student(student, tmp_path / "bundle", ["coreml"])
    report = verify([made], artifacts=["coreml-float32", "coreml-float16"])
    assert report.failures == ()
    assert len(report.artifacts) == 2


LABELS = [0, 7, 2, 5, 1, 9, 4, 3]


def peak_of_open_sessions(bundle: Bundle, requests: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the most networks that were open at once, and how many are open in the end."""
    pipeline = Pipeline(bundle, bundle.artifact("onnx-float32"))
    networks = pipeline.networks
    opener, peak = networks._opener, [0]

    def counted(file):
        peak[0] = max(peak[0], len(networks.opened) + 1)
        return opener(file)

    networks._opener = counted
    for labels in requests:
        pipeline(class_labels=labels)
    return peak[0], len(networks.opened)


def test_open_networks_do_not_grow_with_the_number_of_students(tmp_path):
    one = [[label] for label in LABELS]
    for count in (1, 4):
        student = routed(tmp_path / f"k{count}", count)
        bundle = export_student(student, tmp_path / f"b{count}", ["onnx"])
        assert peak_of_open_sessions(bundle, one) == (1, 1), count
    assert peak_of_open_sessions(bundle, [[0, 1, 2], [3]]) == (3, 1)
    assert peak_of_open_sessions(bundle, [[0], [0, 4], [0]]) == (1, 1)
    assert Pipeline(bundle, bundle.artifact("onnx-float32")).networks.opened == ()


def test_a_request_is_each_sample_through_its_own_student(tmp_path):
    student = routed(tmp_path / "student", 3)
    bundle = export_student(student, tmp_path / "bundle", ["onnx"])
    pipeline = edgedistill.load(bundle, "onnxruntime")
    together = pipeline(class_labels=LABELS, seed=3).array
    for i, label in enumerate(LABELS):
        alone = pipeline(class_labels=[label], seed=3 + i).array
        assert np.array_equal(together[i], alone[0])
        assert pipeline.networks.opened == (f"unet.{label % 3}",)


def test_equal_networks_are_stored_once(tmp_path):
    student = routed(tmp_path / "student", 4, same=(1, 3))
    bundle = export_student(student, tmp_path / "bundle", ["onnx"])
    for artifact in bundle.artifacts.values():
        paths = [file.path for file in artifact.networks.values()]
        assert paths[0] == paths[1] == paths[3] != paths[2]
    whole = sum(path.stat().st_size for path in (bundle.root / "onnx").rglob("*.onnx"))
    assert bundle.size(bundle.artifacts["onnx-float32"]) == whole
    smaller = quantize_bundle(bundle, tmp_path / "smaller", WeightOnlyConfig("int8"))
    made = smaller.artifacts["onnx-int8-weights"].made_with["networks"]
    assert [item.get("same_as") for item in made.values()] == [None, "unet.0", None, "unet.0"]
    assert verify([bundle, smaller]).failures == ()


def test_the_networks_of_a_cascade_share_their_weights(tmp_path):
    bundle = export_student(cascade(tmp_path / "student"), tmp_path / "bundle", ["onnx"])
    reference = bundle.artifacts["torch-float32"].networks
    assert reference["unet_4"].path == reference["unet_8"].path
    shapes = [
        file.signature.inputs[0].shape
        for file in bundle.artifacts["onnx-float32"].networks.values()
    ]
    assert shapes == [(1, 1, 4, 4), (1, 1, 8, 8)]
    assert bundle.table.effective_nfe == 2 / 4 + 2
    assert edgedistill.load(bundle, "onnxruntime")(3).array.shape == (3, 1, 8, 8)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("prompted")
    return export_student(worded(folder / "student"), folder / "bundle", ["onnx"])


def test_what_the_router_reads_is_not_rounded(prompted, tmp_path):
    smaller = quantize_bundle(prompted, tmp_path / "smaller", WeightOnlyConfig("int8"))
    before = prompted.artifacts["onnx-float32"].networks["text_encoder"].path
    after = smaller.artifacts["onnx-int8-weights"].networks["text_encoder"].path
    assert smaller.path(after).read_bytes() == prompted.path(before).read_bytes()
    golden = load_probes(prompted.path("probes/golden.safetensors"))["condition.input_ids"]
    chosen = [
        route(
            prompted.table.router,
            edgedistill.load(b, "onnxruntime").networks["text_encoder"]({"input_ids": golden}),
        )
        for b in (prompted, smaller)
    ]
    assert np.array_equal(*chosen)
    assert smaller.size(smaller.artifacts["onnx-int8-weights"]) < prompted.size(
        prompted.artifacts["onnx-float32"]
    )


def test_prompts_tokens_and_embeddings_say_the_same(prompted):
    pipeline = edgedistill.load(prompted, "onnxruntime")
    prompts = ["a handwritten three", "the digit seven", "a small grey nine"]
    by_prompt = pipeline(prompt=prompts).array
    ids = Tokenizer.open(prompted.path("tokenizer.json")).encode(prompts, 12)
    assert np.array_equal(pipeline(encoder_hidden_states=ids).array, by_prompt)
    made = pipeline.networks["text_encoder"]({"input_ids": ids})
    by_embedding = pipeline(**made).array
    assert np.array_equal(by_embedding, by_prompt)
    students = route(prompted.table.router, made)
    for i, prompt in enumerate(prompts):
        assert np.array_equal(pipeline(prompt=prompt, seed=i).array[0], by_prompt[i])
        assert set(pipeline.networks.opened) == {"text_encoder", f"unet.{students[i]}"}
    assert np.abs(pipeline(3, prompt=prompts[0]).array[1] - by_prompt[1]).max() > 0.1


def test_texts_that_do_not_fit_are_refused(prompted):
    pipeline = edgedistill.load(prompted, "onnxruntime")
    with pytest.raises(ContractError, match="Number of samples, seeds, noise and conditions must"):
        pipeline(3, prompt=["one", "two"])
    with pytest.raises(ContractError, match="must be a prompt or 2 of them, tokens or embeddings"):
        pipeline(2, prompt=[1, 2])
    hidden = np.zeros((1, 12, 32), np.float32)
    with pytest.raises(ContractError, match="chosen by `pooled`, which is not given"):
        pipeline(encoder_hidden_states=hidden)


def test_a_student_that_no_example_reaches_is_refused(tmp_path):
    student = worded(tmp_path / "student")
    router = dataclasses.replace(student.table.router, bias=(1e6,))
    dataclasses.replace(
        student, table=dataclasses.replace(student.table, router=router)
    ).write_manifest()
    with pytest.raises(ContractError, match=r"no example is routed to unet\.0; add texts"):
        export_student(Student.open(student.root), tmp_path / "bundle", [])


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Bundle:
    """A bundle of a network with three samplers: 4 steps, 2, and 1."""
    folder = tmp_path_factory.mktemp("several")
    tables = {f"{n}-step": ddim(n, conditions=CLASSES) for n in (2, 1)}
    student = write(
        folder / "student", {"unet": unet(0)}, ddim(4, conditions=CLASSES), further=tables
    )
    return export_student(student, folder / "bundle", ["onnx"])


def test_samplers_are_chosen_by_name(several):
    assert list(several.samplers) == ["default", "1-step", "2-step"]
    assert Bundle.open(several.root).samplers == several.samplers
    pipeline = edgedistill.load(several, "onnxruntime")
    rows = []
    pipeline(1, sampler="2-step", observe=lambda trace: rows.append(trace.index))
    assert rows == [0, 1]
    assert np.array_equal(pipeline(2).array, pipeline(2, sampler="default").array)
    with pytest.raises(ConfigError, match="No sampler '3-step'; there is: default, 1-step, 2-step"):
        pipeline(1, sampler="3-step")


def test_parity_has_a_line_per_artifact_and_sampler(several, capsys):
    assert main(["parity", str(several.root)]) == 0
    shown = capsys.readouterr().out
    for name in ("torch-float32", "onnx-float32"):
        assert all(f"\n{name}{rest} " in shown for rest in ("", ", 1-step", ", 2-step"))
    report = verify([several])
    assert [len(item.rows) for item in report.artifacts] == [4, 1, 2] * 2
    assert report.failures == ()


def test_calibration_meets_the_rows_of_every_sampler(several):
    probes = load_probes(several.path(CALIBRATION))
    times = {row.feeds["timestep"] for table in several.samplers.values() for row in table.rows}
    assert set(np.unique(probes["unet.timestep"])) == times
    assert len(probes["unet.timestep"]) == 7 * 32


def test_the_command_line_chooses_a_sampler_and_edits(several, tmp_path, capsys):
    pipeline = edgedistill.load(several, "onnxruntime")
    picture, mask = tmp_path / "three.png", tmp_path / "mask.png"
    pipeline(1, class_labels=3).images[0].save(picture)
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(mask)
    array = tmp_path / "x.npy"
    common = [
        "sample",
        str(several.root),
        "--runtime",
        "onnxruntime",
        "-n",
        "2",
        "-o",
        str(tmp_path / "x.png"),
        "--npy",
        str(array),
    ]
    assert main([*common, "--sampler", "1-step", "--json"]) == 0
    assert '"nfe": 1' in capsys.readouterr().out
    assert np.array_equal(np.load(array), pipeline(2, sampler="1-step").array)
    with Image.open(picture) as opened:
        wanted = pipeline(2, image=opened, strength=0.5, class_labels=[8, 8]).array
    edit = ["--image", str(picture), "--class", "8"]
    assert main([*common, *edit, "--strength", "0.5"]) == 0
    assert np.array_equal(np.load(array), wanted)
    assert main([*common, *edit, "--mask", str(mask)]) == 0
    kept = np.load(array)[..., :4]
    known = pipeline(1, class_labels=3).array[..., :4]
    assert np.abs(kept - known).max() <= 1 / 255 + 1e-6
    assert main([*common, *edit]) == 2
    assert "say with `strength` how far to go" in capsys.readouterr().err


def test_pictures_that_do_not_fit_are_refused(several):
    pipeline = edgedistill.load(several, "onnxruntime")
    with pytest.raises(
        ContractError, match="`image` must be 1x1x8x8, got 1x1x9x9; images are not re"
    ):
        pipeline(image=np.zeros((1, 9, 9)), strength=0.5)
    with pytest.raises(ContractError, match=r"`image` must lie in \[-1, 1\]"):
        pipeline(image=np.full((1, 8, 8), 255), strength=0.5)
    with pytest.raises(ContractError, match="`image` is missing"):
        pipeline(mask=np.ones((1, 8, 8)))
    with pytest.raises(ContractError, match="Unknown condition picture"):
        pipeline(picture=np.ones((1, 8, 8)))


def test_a_changed_sampler_is_damage(several, tmp_path):
    root = shutil.copytree(several.root, tmp_path / "bundle")
    path = root / "samplers" / "1-step.json"
    path.write_text(path.read_text().replace("1-step", "2-step") + " ")
    with pytest.raises(BundleError, match=r"1-step\.json: damaged"):
        Bundle.open(root)


def test_baked_guidance_is_the_embedded_one_and_a_stock_network(
    student, bundle_of_student, tmp_path, capsys
):
    target = tmp_path / "baked"
    command = ["export", "onnx", "-m", str(student.root), str(target), "--guidance-scale", "2.5"]
    assert main(command) == 0
    baked = Bundle.open(target)
    assert baked.table.guidance == Guidance("baked", default=2.5, range=(2.5, 2.5))
    network = UNet2DModel.from_pretrained(baked.path("torch/float32/unet"))
    assert type(network) is UNet2DModel
    assert [spec.name for spec in store.signature(network).inputs] == [
        "sample",
        "timestep",
        "class_labels",
    ]
    made = edgedistill.load(baked, "onnxruntime")(4, seed=1).array
    wanted = edgedistill.load(bundle_of_student, "onnxruntime")(4, seed=1, guidance_scale=2.5).array
    assert np.abs(made - wanted).max() < 1e-5
    assert main(command) == 0
    assert main([*command[:-1], "9"]) == 2
    assert "must lie in the trained range [1, 3], got 9" in capsys.readouterr().err
    assert main(["export", "onnx", "-m", str(student.root), str(target)]) == 2
    assert "holds a bundle of another student" in capsys.readouterr().err


@pytest.fixture
def bundle_of_student(student, tmp_path) -> Bundle:
    return export_student(student, tmp_path / "embedded", ["onnx"])
