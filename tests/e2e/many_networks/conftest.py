"""Students of several networks or samplers, with random weights: one builder for each kind."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DModel

import edgedistill
from edgedistill.compiler import compile_scheduler
from edgedistill.contract import Signature, TensorSpec
from edgedistill.models import store
from edgedistill.models.extend import extend
from edgedistill.models.inputs import Inputs
from edgedistill.models.residuals import residual_encoder
from edgedistill.models.vae import VaeDecoder
from edgedistill.router import Router
from edgedistill.student import Student
from edgedistill.table import Condition, Guidance, SamplerTable, Stage
from edgedistill.text import Tokenizer

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


def routed(folder: Path, count: int = 3, same: Sequence[int] = ()) -> Student:
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


def several(folder: Path) -> Student:
    """Write one network with three samplers: 4 steps, 2, and 1."""
    tables = {f"{n}-step": ddim(n, conditions=CLASSES) for n in (2, 1)}
    return write(folder, {"unet": unet(0)}, ddim(4, conditions=CLASSES), further=tables)


KINDS: dict[str, Callable[..., Student]] = {
    "routed": routed,
    "guided": guided,
    "cascade": cascade,
    "worded": worded,
    "latent": latent,
    "several": several,
}


@pytest.fixture(scope="session")
def build() -> Callable[..., Student]:
    """Write a student of a kind to a folder; what else is given, its builder takes."""
    return lambda kind, folder, **options: KINDS[kind](folder, **options)
