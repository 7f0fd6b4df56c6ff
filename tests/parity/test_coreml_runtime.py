"""Core ML packages against PyTorch: written, run by the reference evaluator, compressed, refused."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgedistill.agreement import snr_db
from edgedistill.contract import Signature, TensorSpec
from edgedistill.errors import BundleError, CheckFailedError, ConfigError, ContractError

pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")
from diffusers import UNet2DConditionModel, UNet2DModel  # noqa: E402

from edgedistill.mlpackage import read_package  # noqa: E402
from edgedistill.models import store  # noqa: E402
from edgedistill.models.inputs import Inputs  # noqa: E402
from edgedistill.models.unet import ExtendedUNet2DModel  # noqa: E402
from export import coreml_float16, to_coreml  # noqa: E402
from export.frozen import Frozen, examples  # noqa: E402
from export.to_coreml import write_coreml  # noqa: E402
from quantize.with_coremltools import compress_coreml  # noqa: E402
from runtimes import coreml  # noqa: E402
from runtimes.mil import MilProgram  # noqa: E402

BATCH = 2
TIMESTEPS = (1, 250, 500, 750, 999)
DIGITS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "add_attention": False,
    "num_class_embeds": 11,
}
ATTENTION = {
    "add_attention": True,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_type": "resnet",
}


class Conditional(torch.nn.Module):
    """A text-to-image UNet with the guidance embedding of latent-consistency models."""

    def __init__(self):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
            time_cond_proj_dim=32,
        )

    def forward(self, **inputs):
        return self.unet(**inputs, return_dict=False)[0]


def with_lively_weights(network):
    """Give every weight, bias and scale a share in the output."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval().requires_grad_(requires_grad=False)


def make(kind):
    """Return a network and its signature."""
    if kind == "conditional":
        state = TensorSpec("sample", (BATCH, 4, 8, 8), "float32", "x")
        inputs = (
            state,
            TensorSpec("timestep", (BATCH,), "float32", "t"),
            TensorSpec("encoder_hidden_states", (BATCH, 7, 16), "float32", "text"),
            TensorSpec("timestep_cond", (BATCH, 32), "float32", "guidance"),
        )
        outputs = (dataclasses.replace(state, name="out_sample", kind="raw"),)
        return with_lively_weights(Conditional()), Signature(inputs, outputs)
    stock = UNet2DModel(**DIGITS) if kind != "attention" else UNet2DModel(**{**DIGITS, **ATTENTION})
    network = with_lively_weights(
        ExtendedUNet2DModel(stock, Inputs({"w": 1000.0})) if kind == "guided" else stock
    )
    return network, store.signature(network).with_batch(BATCH)


def feeds_of(signature, timestep):
    """Return inputs by name at one timestep."""
    pairs = zip(signature.inputs, examples(signature), strict=True)
    feeds = {spec.name: value.numpy() for spec, value in pairs}
    return {**feeds, "timestep": np.full(BATCH, timestep, np.float32)}


def worst_snr(network, signature, path, timesteps=TIMESTEPS):
    """Return the lowest dB SNR of a package against PyTorch."""
    program, frozen = MilProgram.load(path), Frozen(network, signature)
    found = []
    for timestep in timesteps:
        feeds = feeds_of(signature, timestep)
        with torch.inference_mode():
            reference = frozen(*map(torch.tensor, feeds.values())).numpy()
        found.append(snr_db(reference, program.run(feeds)["out_sample"]))
    return min(found)


@pytest.fixture(scope="module")
def guided():
    return make("guided")


@pytest.fixture(scope="module")
def packages(guided, tmp_path_factory):
    """The guided digits network in both precisions, and what the writer said of them."""
    folder = tmp_path_factory.mktemp("packages")
    return {
        precision: (
            folder / f"{precision}.mlpackage",
            write_coreml(*guided, folder / f"{precision}.mlpackage", precision=precision),
        )
        for precision in ("float32", "float16")
    }


@pytest.fixture
def package(packages):
    return packages["float32"][0]


@pytest.mark.parametrize(("precision", "floor"), [("float32", 100), ("float16", 50)])
def test_a_package_answers_as_pytorch_at_every_timestep(guided, packages, precision, floor):
    path, made_with = packages[precision]
    assert worst_snr(*guided, path) >= floor
    assert made_with["snr_db"] >= floor


def test_no_norm_becomes_a_batch_norm_in_float32(guided, package):
    """coremltools would make scale and shift one, whose 1e-5 beside the variance costs 20 dB."""
    kinds = set()
    feeds = feeds_of(guided[1], 500)
    MilProgram.load(package).run(feeds, lambda kind, _name, _value: kinds.add(kind))
    assert "rsqrt" in kinds or "reduce_mean" in kinds
    assert "batch_norm" not in kinds


def test_float16_without_the_float32_embeddings_fails_where_few_step_students_run(
    guided, packages, tmp_path, monkeypatch
):
    monkeypatch.setattr(coreml_float16, "EMBEDDING_OPS", ())
    monkeypatch.setitem(to_coreml.LEAST_DB, "float16", 0.0)
    write_coreml(*guided, tmp_path / "plain.mlpackage")
    plain = worst_snr(*guided, tmp_path / "plain.mlpackage", (999,))
    assert plain < 45
    assert worst_snr(*guided, packages["float16"][0], (999,)) > plain + 10


@pytest.mark.parametrize(
    ("kind", "precision", "target", "floor"),
    [
        ("stock", "float32", "iOS15", 100),
        ("attention", "float32", "iOS18", 100),
        ("attention", "float16", "iOS17", 50),
        ("conditional", "float32", "iOS17", 100),
        ("conditional", "float16", "iOS18", 50),
    ],
)
def test_other_networks_and_deployment_targets(kind, precision, target, floor, tmp_path):
    network, signature = make(kind)
    path = tmp_path / "unet.mlpackage"
    write_coreml(network, signature, path, precision=precision, deployment_target=target)
    assert worst_snr(network, signature, path, (1, 999)) >= floor


def test_a_fault_in_one_weight_of_the_file_falls_below_the_float32_floor(guided, package, tmp_path):
    faulty = Path(shutil.copytree(package, tmp_path / "faulty.mlpackage"))
    blob = next(faulty.rglob("weight.bin"))
    weight = guided[0].up_blocks[0].resnets[0].conv1.weight.numpy()
    assert blob.read_bytes().count(weight.tobytes()) == 1
    scaled = (weight * np.float32(1.001)).tobytes()
    blob.write_bytes(blob.read_bytes().replace(weight.tobytes(), scaled))
    assert worst_snr(*guided, faulty, (500,)) < 90


@pytest.mark.parametrize(
    ("weight_format", "floor", "share"),
    [("int8", 30, 0.45), ("palette6", 20, 0.4), ("palette4", 8, 0.35)],
)
def test_compressed_packages_are_smaller_and_still_run(
    guided, package, tmp_path, weight_format, floor, share
):
    small, again = tmp_path / "small.mlpackage", tmp_path / "again.mlpackage"
    made_with = compress_coreml(package, small, weight_format)
    large_weights = [p for p in guided[0].parameters() if p.dim() > 1 and p.numel() > 512]
    assert made_with["compressed_weights"] == len(large_weights)
    assert worst_snr(*guided, small, (1, 999)) >= floor
    sizes = [sum(f.stat().st_size for f in p.rglob("*.bin")) for p in (small, package)]
    assert sizes[0] < share * sizes[1]
    compress_coreml(package, again, weight_format)
    assert next(again.rglob("*.bin")).read_bytes() == next(small.rglob("*.bin")).read_bytes()


def test_the_package_declares_the_signature_and_tells_nothing_else(guided, packages):
    for path, _ in packages.values():
        spec = read_package(path).get_spec()
        for features, specs in (
            (spec.description.input, guided[1].inputs),
            (spec.description.output, guided[1].outputs),
        ):
            for feature, declared in zip(features, specs, strict=True):
                array = feature.type.multiArrayType
                assert (feature.name, tuple(array.shape)) == (declared.name, declared.shape)
                name = array.ArrayDataType.Name(array.dataType).lower()
                assert name == declared.dtype
        content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
        for private in (
            str(Path.cwd()),
            str(Path.home()) + "/",
            str(path.parent),
            "conversion_date",
        ):
            assert private.encode() not in content
        assert {file.stat().st_mode & 0o777 for file in path.rglob("*.*") if file.is_file()} == {
            0o644
        }


def test_a_package_below_its_floor_is_not_written_and_the_old_one_stays(
    guided, packages, tmp_path, monkeypatch
):
    path = Path(shutil.copytree(packages["float16"][0], tmp_path / "unet.mlpackage"))
    monkeypatch.setitem(to_coreml.LEAST_DB, "float16", 500.0)
    with pytest.raises(CheckFailedError, match="at least 500 dB is required"):
        write_coreml(*guided, path)
    assert worst_snr(*guided, path, (1,)) > 50
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"batch": "batch"}, {}, ContractError, "needs a fixed batch"),
        ({"dtype": "int64"}, {}, ContractError, "`class_labels`: .* got int64"),
        (
            {},
            {"precision": "int8"},
            ConfigError,
            "precision 'int8': choose one of float32, float16",
        ),
        ({}, {"deployment_target": "iOS3"}, ConfigError, "choose one of iOS15"),
    ],
)
def test_what_core_ml_cannot_take_is_refused(guided, tmp_path, change, options, error, message):
    network, signature = guided
    if "batch" in change:
        signature = signature.with_batch(change["batch"])
    if "dtype" in change:
        changed = [
            dataclasses.replace(spec, dtype=change["dtype"]) if spec.kind == "class" else spec
            for spec in signature.inputs
        ]
        signature = Signature(tuple(changed), signature.outputs)
    with pytest.raises(error, match=message):
        write_coreml(network, signature, tmp_path / "unet.mlpackage", **options)
    assert not list(tmp_path.iterdir())


def test_the_runtime_opens_a_package_and_leaves_torch_its_threads(guided, package):
    threads = torch.get_num_threads()
    session = coreml.open(package, guided[1], {"device": "reference", "threads": threads + 1})
    feeds = feeds_of(guided[1], 250)
    made = session(feeds)
    assert torch.get_num_threads() == threads
    assert list(made) == ["out_sample"]
    assert snr_db(MilProgram.load(package).run(feeds)["out_sample"], made["out_sample"]) > 110


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML itself is there")
def test_off_macos_the_runtime_says_that_it_is_not_the_neural_engine(guided, package):
    assert coreml.describe({}) == "Core ML reference evaluator (not the Neural Engine)"
    with pytest.raises(
        ConfigError, match="no device 'ane' here; choose one of reference, for Core ML"
    ):
        coreml.open(package, guided[1], {"device": "ane"})


def test_what_was_compiled_is_run_when_asked(guided, package, tmp_path, monkeypatch):
    import coremltools

    there = Path(shutil.copytree(package, tmp_path / "unet.mlpackage"))
    opened = []

    class Compiled:
        def __init__(self, path, compute_units):
            opened.append((path, compute_units.name))

        def predict(self, feeds):
            return {"out_sample": feeds["sample"] + 1}

    monkeypatch.setattr(coremltools.models, "CompiledMLModel", Compiled)
    monkeypatch.setattr(coreml, "_on_macos", lambda: True)
    asked = {"device": "ane", "compiled": True}
    with pytest.raises(BundleError, match=r"unet\.mlmodelc: no such compiled model; make it with"):
        coreml.open(there, guided[1], asked)
    (tmp_path / "Unet.mlmodelc").mkdir()
    (tmp_path / "unet.mlmodelc").symlink_to("Unet.mlmodelc")
    feeds = feeds_of(guided[1], 250)
    made = coreml.open(there, guided[1], asked)(feeds)
    np.testing.assert_array_equal(made["out_sample"], feeds["sample"] + 1)
    assert opened == [(str(tmp_path / "unet.mlmodelc"), "CPU_AND_NE")]
    with pytest.raises(ConfigError, match="run by Core ML itself, on macOS only; leave --compiled"):
        coreml.open(there, guided[1], {"device": "reference", "compiled": True})


@pytest.mark.mac
@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only; not run here")
@pytest.mark.parametrize(("precision", "floor"), [("float32", 60), ("float16", 40)])
def test_core_ml_itself_answers_as_pytorch(guided, packages, precision, floor):
    session = coreml.open(packages[precision][0], guided[1], {"device": "cpu"})
    feeds = feeds_of(guided[1], 500)
    with torch.inference_mode():
        reference = Frozen(*guided)(*map(torch.tensor, feeds.values())).numpy()
    assert snr_db(reference, session(feeds)["out_sample"]) >= floor


def test_other_names_than_the_manifests_are_refused(guided, package):
    inputs = tuple(dataclasses.replace(s, name=s.name + "_") for s in guided[1].inputs)
    with pytest.raises(BundleError, match=r"its inputs are class_labels, .* but the manifest says"):
        coreml.open(package, Signature(inputs, guided[1].outputs), {"device": "reference"})


def test_missing_and_damaged_packages_are_refused(package, tmp_path):
    with pytest.raises(BundleError, match=r"holds no Manifest\.json"):
        MilProgram.load(tmp_path / "none.mlpackage")
    damaged = Path(shutil.copytree(package, tmp_path / "damaged.mlpackage"))
    next(damaged.rglob("*.mlmodel")).write_bytes(b"\xff" * 100)
    with pytest.raises(BundleError, match="not a whole Core ML package"):
        compress_coreml(damaged, tmp_path / "small.mlpackage", "int8")
    with pytest.raises(ConfigError, match="format 'int3': choose one of int8, palette6"):
        compress_coreml(package, tmp_path / "small.mlpackage", "int3")
    assert not (tmp_path / "small.mlpackage").exists()


def test_an_observer_sees_every_op_in_order(guided, package):
    seen = []
    made = MilProgram.load(package).run(
        feeds_of(guided[1], 500), lambda op, name, value: seen.append((op, name, value.shape))
    )
    assert seen[-1] == ("conv", "out_sample", made["out_sample"].shape)
    assert [op for op, _, _ in seen].count("conv") == sum(
        isinstance(module, torch.nn.Conv2d) for module in guided[0].modules()
    )


def test_coremltools_is_not_heard(guided, package, tmp_path, capfd):
    write_coreml(*guided, tmp_path / "unet.mlpackage")
    compress_coreml(package, tmp_path / "small.mlpackage", "palette6")
    assert capfd.readouterr() == ("", "")


def test_the_runtime_module_is_cheap_to_import():
    code = "import sys, runtimes.coreml; print({'torch', 'coremltools'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_on_macos_it_says_whether_core_ml_or_the_evaluator_runs(monkeypatch):
    monkeypatch.setattr(coreml, "_on_macos", lambda: True)
    monkeypatch.setattr(coreml.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    assert coreml.describe({}) == "Core ML (macOS 15.1, ALL)"
    assert coreml.describe({"device": "ane"}) == "Core ML (macOS 15.1, CPU_AND_NE)"
    evaluator = "Core ML reference evaluator (not the Neural Engine)"
    assert coreml.describe({"device": "reference"}) == evaluator
