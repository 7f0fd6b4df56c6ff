"""Checking as a whole: which loaders are asked, what is malformed, the command, and that torch is not needed."""

import json
import shutil
import subprocess
import sys

import pytest

from edgedistill.cli import main
from edgedistill.errors import BundleError, ConfigError
from edgedistill.layout.checking import check_layout, loaders_of
from edgedistill.layout.folder import INDEX, SCHEDULER
from edgedistill.stock import LOADERS


@pytest.mark.parametrize("kind", ["sd", "lcm", "sdxl"])
def test_nothing_is_found_in_a_folder_that_every_loader_opens(valid, kind):
    assert loaders_of(valid / kind) == LOADERS
    assert check_layout(valid / kind, LOADERS) == []


@pytest.mark.parametrize(
    "changes",
    [
        {INDEX: {"scheduler": ["diffusers", ["DDIMScheduler"]]}},
        {INDEX: {"unet": {"a": 1}}},
        {INDEX: {"_class_name": 3}},
        {SCHEDULER: {"num_train_timesteps": "many"}},
        {SCHEDULER: {"beta_schedule": ["linear"]}},
        {SCHEDULER: {"_class_name": {"a": 1}}, INDEX: {"scheduler": ["diffusers", {"a": 1}]}},
        {"unet/config.json": {"cross_attention_dim": "wide"}},
        {"vae_decoder/config.json": {"latent_channels": "four"}},
        {"text_encoder/config.json": {"num_hidden_layers": "two"}},
        {"tokenizer/vocab.json": "[]"},
        {"sampler.json": '{"stages": 3}'},
        {"unet/openvino_model.xml": '<net><layers><layer type="Const"><data size="x"/></layer></layers></net>'},
        {"coreml/packages/Stable_Diffusion_version_tiny_unet.mlpackage/Manifest.json": "{"},
    ],
)  # fmt: skip
def test_what_is_malformed_is_a_finding_and_never_a_crash(folder, changes):
    assert check_layout(folder(changes), LOADERS) != []


@pytest.mark.parametrize(
    "changes",
    [
        {"unet/config.json": {"block_out_channels": 3}},
        {"unet/diffusion_pytorch_model.safetensors.index.json": {"weight_map": 3}},
    ],
)
def test_what_is_malformed_and_not_needed_is_passed_over(folder, changes):
    assert check_layout(folder(changes), LOADERS) == []


def test_only_loaders_that_the_folder_is_meant_for_are_asked(folder, tmp_path):
    root = folder()
    for path in root.rglob("openvino_*"):
        path.unlink()
    shutil.rmtree(root / "coreml")
    assert loaders_of(root) == ("diffusers", "ort")
    assert check_layout(root) == []
    assert {item.loader for item in check_layout(root, LOADERS)} == {"openvino", "genai", "swift"}
    assert loaders_of(tmp_path) == ("diffusers",)


def test_what_cannot_be_checked_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"nowhere: no such folder"):
        check_layout(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"Unknown loader 'tensorrt': choose of diffusers, ort"):
        check_layout(tmp_path, ["tensorrt"])


def test_nothing_of_torch_is_needed(valid):
    blocked = "sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers']))"
    code = f"import sys; {blocked}; from edgedistill.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check-layout", str(valid / "sdxl"), "--loader", "all"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout.count("fine")) == (0, 5), made.stdout + made.stderr


def test_the_command_prints_findings_and_fails_on_errors(valid, folder, capsys):
    assert main(["check-layout", str(valid / "sd")]) == 0
    assert capsys.readouterr().out.split() == [w for name in LOADERS for w in (f"{name}:", "fine")]
    graph = "unet/model.onnx"
    weights = {"unet/a": "8 bytes.", "unet/b": "8 bytes."}
    root = folder({graph: (" -> ", " -> a -> b -> "), **weights})
    assert main(["check-layout", str(root), "--loader", "ort"]) == 0
    assert "ort: 1 warning\n  warning: unet/model.onnx\n" in capsys.readouterr().out
    assert main(["check-layout", str(root), "--runtime", "ort"]) == 2
    assert "--runtime" in capsys.readouterr().err
    (root / graph).unlink()
    assert main(["check-layout", str(root), "--loader", "all", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["loaders"] == list(LOADERS)
    assert told["findings"] == [
        {
            "file": graph,
            "expected": "the graph of unet",
            "found": "no such file",
            "way_out": "export it",
            "level": "error",
            "loader": "ort",
        }
    ]
