"""The interpreter: each field does what it says, on numpy and torch alike, to the bit."""

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.errors import ConfigError, ContractError
from edgedistill.noise import noise_bank
from edgedistill.router import Router
from edgedistill.sampler import RowTrace, run_row, run_table
from edgedistill.table import Blend, Condition, Guidance, Next, Row, SamplerTable, Stage

SHAPE = (1, 4, 4)
LABELS = (Condition("class_labels", "class", 10),)
ROW = Row(("unet",), {"timestep": 500.0}, x0=(1.0, -0.5), next=Next(z=0.25, x0=0.75))
GUIDED = compile_scheduler(
    {"_class_name": "LCMScheduler"},
    4,
    shape=SHAPE,
    clamp=(-1.0, 1.0),
    guidance=Guidance("cfg", None, 3.0, (1.0, 5.0), {"class_labels": 10}),
    conditions=LABELS,
)


def net(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Stand for a network, with plain arithmetic that numpy and torch round alike."""
    z, t = feeds["sample"], feeds["timestep"]
    label = feeds.get("class_labels")
    shift = 0.0 if label is None else label.reshape(-1, 1, 1, 1) / 16.0
    return {"out_sample": z * (t / 1024.0) - z * z * 0.03125 + shift}


def one(row: Row, **fields: Any) -> SamplerTable:
    return SamplerTable((Stage(SHAPE, (row,)),), 1 + (row.noise is not None), **fields)


def noise(count: int, batch: int = 2) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((batch, *SHAPE), dtype=np.float32) for _ in range(count)]


def test_a_row_is_the_formula() -> None:
    row = dataclasses.replace(
        ROW, next=Next(z=0.1, x0=0.2, raw=0.3, noise=0.4), noise=1, in_scale=0.5
    )
    z, fresh = noise(2)
    raw = net({"sample": z * 0.5, "timestep": 500.0})["out_sample"]
    expected = 0.1 * z + 0.2 * (z - 0.5 * raw) + 0.3 * raw + 0.4 * fresh
    got = run_table(one(row), {"unet": net}, [z, fresh], {})
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert got.dtype == np.float32


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_state_stays_float32_whatever_a_network_returns(library: str, dtype: str) -> None:
    module = pytest.importorskip(library)
    z = module.asarray(noise(1)[0])
    raw = module.asarray(noise(1)[0] / 3, dtype=getattr(module, dtype))
    got = run_table(one(ROW), {"unet": lambda _: {"out_sample": raw}}, [z], {})
    seen = np.asarray(raw).astype(np.float32)
    expected = run_table(one(ROW), {"unet": lambda _: {"out_sample": seen}}, [np.asarray(z)], {})
    assert got.dtype == module.float32
    assert np.array_equal(np.asarray(got), expected)


def test_previous_estimates_are_taken_newest_first() -> None:
    rows = (
        ROW,
        ROW,
        dataclasses.replace(ROW, next=Next(x0=1.0, previous=(10.0, 100.0))),
    )
    traces: list[RowTrace] = []
    (z,) = noise(1)
    table = SamplerTable((Stage(SHAPE, rows),), 1)
    got = run_table(table, {"unet": net}, [z], {}, traces.append)
    first, second, third = (trace.x0 for trace in traces)
    assert np.allclose(got, third + 10 * second + 100 * first, rtol=1e-5)
    assert [trace.index for trace in traces] == [0, 1, 2]
    assert np.array_equal(traces[1].state, traces[0].next)


def test_a_row_without_a_call_is_affine() -> None:
    traces: list[RowTrace] = []
    (z,) = noise(1)
    got = run_table(one(Row((), next=Next(z=0.5))), {}, [z], {}, traces.append)
    assert np.array_equal(got, z * 0.5)
    assert traces[0].raw is None
    assert traces[0].x0 is None


def test_x0_is_clipped_and_the_output_clamped() -> None:
    row = dataclasses.replace(ROW, clip=(-0.25, 0.5), next=Next(x0=1.0))
    traces: list[RowTrace] = []
    (z,) = noise(1)
    got = run_table(one(row, clamp=(-0.125, 0.25)), {"unet": net}, [z * 4], {}, traces.append)
    x0 = traces[0].x0
    assert (x0.min(), x0.max()) == (-0.25, 0.5)
    assert np.array_equal(traces[0].next, x0)
    assert (got.min(), got.max()) == (-0.125, 0.25)


@pytest.mark.parametrize(("scale", "label"), [(0.0, 10), (1.0, 3)])
def test_guidance_of_0_is_unconditional_and_of_1_conditional(scale: float, label: int) -> None:
    guidance = Guidance("cfg", None, scale, (0.0, 4.0), {"class_labels": 10})
    row = dataclasses.replace(ROW, guidance_scale=scale)
    table = one(row, guidance=guidance, conditions=LABELS)
    (z,) = noise(1)
    given, wanted = ({"class_labels": np.array([value, value])} for value in (3, label))
    got = run_table(table, {"unet": net}, [z], given)
    assert np.allclose(got, run_table(one(ROW), {"unet": net}, [z], wanted), rtol=1e-6, atol=1e-7)


def test_guidance_goes_on_beyond_the_conditional_answer() -> None:
    guidance = Guidance("cfg", None, 3.0, (1.0, 4.0), {"class_labels": 10})
    row = dataclasses.replace(ROW, guidance_scale=3.0)
    traces: list[RowTrace] = []
    (z,) = noise(1)
    labels = {"class_labels": np.array([2, 4])}
    table = one(row, guidance=guidance, conditions=LABELS)
    run_table(table, {"unet": net}, [z], labels, traces.append)
    plain = net({"sample": z, "timestep": 500.0})["out_sample"]
    null, labelled = 10 / 16, np.array([2, 4]).reshape(-1, 1, 1, 1) / 16
    assert np.allclose(traces[0].raw, plain + null + 3 * (labelled - null), atol=1e-6)
    for call, shift in zip(traces[0].calls, (labelled, null), strict=True):
        assert np.allclose(call, plain + shift, atol=1e-6)
    traces.clear()
    run_table(one(ROW, conditions=LABELS), {"unet": net}, [z], labels, traces.append)
    assert traces[0].calls == ()


def test_networks_of_a_row_feed_one_another() -> None:
    def guide(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"residual": feeds["sample"] * 2}

    def base(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"out_sample": feeds["residual"] + feeds["timestep"]}

    row = dataclasses.replace(ROW, call=("guide", "base"), x0=(0.0, 1.0), next=Next(x0=1.0))
    (z,) = noise(1)
    got = run_table(one(row), {"guide": guide, "base": base}, [z], {})
    assert np.array_equal(got, z * 2 + np.float32(500))


def test_numpy_and_torch_give_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    bank = noise_bank(GUIDED, [0, 1])
    labels = np.array([3, 7], np.float32)
    expected = run_table(GUIDED, {"unet": net}, bank, {"class_labels": labels})
    tensors = [torch.from_numpy(item) for item in bank]
    given = {"class_labels": torch.from_numpy(labels)}
    got = run_table(GUIDED, {"unet": net}, tensors, given)
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), expected)


def test_the_batch_does_not_change_a_seeded_sample() -> None:
    seeds = [5, 0, 9]
    labels = np.array([1, 2, 3])
    together = run_table(GUIDED, {"unet": net}, noise_bank(GUIDED, seeds), {"class_labels": labels})
    for i, seed in enumerate(seeds):
        given = {"class_labels": labels[i : i + 1]}
        alone = run_table(GUIDED, {"unet": net}, noise_bank(GUIDED, [seed]), given)
        assert np.array_equal(together[i], alone[0])


REPLAY = """
import hashlib, sys
from edgedistill.noise import noise_bank
from edgedistill.router import Router
from edgedistill.sampler import run_table
from edgedistill.table import SamplerTable
from pathlib import Path
table = SamplerTable.load(Path(sys.argv[1]))
net = lambda f: {"out_sample": f["sample"] * (f["timestep"] / 1024.0) - f["sample"] * f["sample"] * 0.03125}
z = run_table(table, {"unet": net}, noise_bank(table, [7, 8]), {})
print(hashlib.sha256(z.tobytes()).hexdigest(), "torch" in sys.modules)
"""


def test_a_run_replays_bit_for_bit_in_other_processes_without_torch(tmp_path: Path) -> None:
    table = compile_scheduler({"_class_name": "TCDScheduler"}, 4, shape=SHAPE, eta=0.3)
    path = tmp_path / "sampler.json"
    table.save(path)
    here = run_table(table, {"unet": net}, noise_bank(table, [7, 8]), {})
    expected = f"{hashlib.sha256(here.tobytes()).hexdigest()} False\n"
    for _ in range(2):
        command = [sys.executable, "-c", REPLAY, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == expected


def test_forced_rows_start_from_the_other_run() -> None:
    rows = (ROW, dataclasses.replace(ROW, next=Next(x0=0.5, z=0.5, previous=(0.25,))))
    table = SamplerTable((Stage(SHAPE, rows),), 1)
    (z,) = noise(1)
    kept: list[RowTrace] = []
    run_table(table, {"unet": net}, [z], {}, kept.append)
    other = [{**vars(trace), "state": trace.state + 1, "x0": trace.x0 + 1} for trace in kept]
    forced: list[RowTrace] = []
    run_table(table, {"unet": net}, [z], {}, forced.append, other)
    assert np.array_equal(forced[1].state, kept[1].state + 1)
    raw = net({"sample": kept[1].state + 1, "timestep": 500.0})["out_sample"]
    x0 = kept[1].state + 1 - 0.5 * raw
    looked_back = 0.5 * x0 + 0.5 * (kept[1].state + 1) + 0.25 * (kept[0].x0 + 1)
    assert np.allclose(forced[1].next, looked_back, rtol=1e-6, atol=1e-6)
    again: list[RowTrace] = []
    run_table(table, {"unet": net}, [z], {}, again.append, [vars(trace) for trace in kept])
    assert all(np.array_equal(a.next, b.next) for a, b in zip(again, kept, strict=True))


PICTURES = (
    Condition("image", "image", shape=SHAPE, value_range=(-1.0, 1.0)),
    Condition("mask", "mask", shape=SHAPE),
)


def test_a_blend_draws_where_the_mask_is_one_and_keeps_where_it_is_zero() -> None:
    z, fresh = noise(2)
    image = np.tanh(noise(3)[2])
    row = dataclasses.replace(ROW, blend=Blend(0.75, 0.5, 1))
    table = SamplerTable((Stage(SHAPE, (row,)),), 2, conditions=PICTURES)

    def run(mask: np.ndarray) -> np.ndarray:
        return run_table(table, {"unet": net}, [z, fresh], {"image": image, "mask": mask})

    ones = np.ones_like(z)
    plain = run_table(one(ROW), {"unet": net}, [z], {})
    assert np.array_equal(run(ones), plain)
    assert np.array_equal(run(ones * 0), 0.75 * image + 0.5 * fresh)
    assert np.allclose(run(ones / 4), plain / 4 + (0.75 * image + 0.5 * fresh) * 0.75, atol=1e-6)


def test_a_first_state_may_hold_an_image() -> None:
    (z,) = noise(1)
    image = np.tanh(z)
    stage = Stage(SHAPE, (Row((), next=Next(z=1.0)),), (0.5, 0), init_image=(0.8, "image"))
    table = SamplerTable((stage,), 1, conditions=PICTURES[:1])
    assert np.array_equal(run_table(table, {}, [z], {"image": image}), z * 0.5 + image * 0.8)


TEXT = Condition(
    "encoder_hidden_states",
    "text",
    encoder="text_encoder",
    tokenizer="tokenizer.json",
    length=3,
    examples=("a four", "a seven"),
)


def encode(feeds: Mapping[str, Any]) -> dict[str, Any]:
    hidden = feeds["input_ids"][:, :, None] / 8.0
    return {"encoder_hidden_states": hidden, "pooled": hidden[:, 0]}


def told(feeds: Mapping[str, Any]) -> dict[str, Any]:
    shift = feeds["encoder_hidden_states"].mean((1, 2)).reshape(-1, 1, 1, 1)
    return {"out_sample": net(feeds)["out_sample"] + shift}


def test_tokens_are_encoded_once_and_the_null_text_stands_in_for_no_condition() -> None:
    row = dataclasses.replace(ROW, guidance_scale=3.0)
    cfg = Guidance("cfg", None, 3.0, (1.0, 4.0), {TEXT.name: ""})
    table = SamplerTable((Stage(SHAPE, (row, row)),), 1, guidance=cfg, conditions=(TEXT,))
    assert table.networks == ("unet", "text_encoder")
    (z,) = noise(1)
    ids = np.array([[1, 5, 2], [1, 7, 2]], np.int32)
    null = np.array([[1, 2, 2]] * 2, np.int32)
    calls = []

    def counted(feeds: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(feeds)
        return encode(feeds)

    networks = {"unet": told, "text_encoder": counted}
    got = run_table(table, networks, [z], {"input_ids": ids, "null.input_ids": null})
    assert len(calls) == 2
    hidden, empty = (encode({"input_ids": x})["encoder_hidden_states"] for x in (ids, null))
    given = {TEXT.name: hidden, f"null.{TEXT.name}": empty}
    assert np.array_equal(run_table(table, {"unet": told}, [z], given), got)

    def raw(z: np.ndarray, text: np.ndarray) -> np.ndarray:
        return told({"sample": z, "timestep": 500.0, TEXT.name: text})["out_sample"]

    state = z
    for _ in range(2):
        guided = raw(state, empty) + 3 * (raw(state, hidden) - raw(state, empty))
        state = 0.25 * state + 0.75 * (state - 0.5 * guided)
    assert np.allclose(got, state, rtol=1e-5, atol=1e-5)
    with pytest.raises(ContractError, match=r"needs the null text .* as `null\.input_ids`"):
        run_table(table, networks, [z], {"input_ids": ids})


def test_students_may_be_chosen_by_what_the_text_encoder_makes() -> None:
    router = Router("sign_planes", "pooled", 2, planes=((1.0,),), bias=(-0.5,))
    table = SamplerTable((Stage(SHAPE, (ROW,)),), 1, conditions=(TEXT,), router=router)
    (z,) = noise(1)
    ids = np.array([[4, 5, 2], [3, 7, 2]], np.int32)
    networks = {
        "unet.0": lambda feeds: {"out_sample": feeds["sample"] * 0 - 1},
        "unet.1": lambda feeds: {"out_sample": feeds["sample"] * 0 + 1},
        "text_encoder": encode,
    }
    got = run_table(table, networks, [z], {"input_ids": ids})
    assert np.array_equal(got[0], z[0] * 0.25 + (z[0] - 0.5) * 0.75)
    assert np.array_equal(got[1], z[1] * 0.25 + (z[1] + 0.5) * 0.75)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_decoder_sees_the_latent_and_its_image_is_clamped(library: str) -> None:
    module = pytest.importorskip(library)
    (z,) = noise(1)
    space = {"kind": "latent", "value_range": [-1.0, 1.0], "scale": 0.25, "shift": 0.5}
    table = one(Row((), next=Next(z=1.0)), decoder="vae", space=space, clamp=(-1.0, 1.0))

    def decode(feeds: Mapping[str, Any]) -> dict[str, Any]:
        wide = [index // 2 for index in range(8)]
        return {"sample": feeds["latent_sample"][..., wide] / 8}

    got = run_table(table, {"vae": decode}, [module.asarray(z)], {})
    expected = ((z * 4 + 0.5) / 8).repeat(2, axis=3).clip(-1, 1)
    assert np.array_equal(np.asarray(got), expected)
    assert table.networks == ("vae",)
    assert table.nfe == 0
    with pytest.raises(ConfigError, match="need a `scale` and a `shift`, got 0"):
        dataclasses.replace(table, space={**space, "scale": 0})


def test_a_single_row_can_be_run_from_any_state() -> None:
    traces: list[RowTrace] = []
    bank = noise_bank(GUIDED, [0])
    given = {"class_labels": np.array([4])}
    run_table(GUIDED, {"unet": net}, bank, given, traces.append)
    for trace in traces:
        again = run_row(GUIDED, trace.row, {"unet": net}, trace.state, bank, given)
        assert np.array_equal(again.next, trace.next)


def test_refusals() -> None:
    table = one(ROW)
    (z,) = noise(1)
    with pytest.raises(ContractError, match="calls a network that is not there: unet"):
        run_table(table, {}, [z], {})
    with pytest.raises(ContractError, match="needs a noise bank of 1 arrays, got 2"):
        run_table(table, {"unet": net}, [z, z], {})
    with pytest.raises(ContractError, match="takes `out_sample` of unet, which returned: raw"):
        run_table(table, {"unet": lambda feeds: {"raw": feeds["sample"]}}, [z], {})
