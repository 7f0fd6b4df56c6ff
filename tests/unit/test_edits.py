"""Edits are tables: SDEdit begins later, inpainting blends, and what cannot be edited says why."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgedistill.compiler import compile_scheduler
from edgedistill.edits import edited, image_to_image, inpaint
from edgedistill.errors import ConfigError
from edgedistill.noise import noise_bank
from edgedistill.sampler import RowTrace, run_table
from edgedistill.schedule import Schedule
from edgedistill.table import Condition, Guidance, SamplerTable, Stage
from edgedistill.validate import validate

SHAPE = (1, 4, 4)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
SCHEDULE = Schedule.from_config(SCHEDULER)


def table(num_steps: int = 4, **options: Any) -> SamplerTable:
    return compile_scheduler(SCHEDULER, num_steps, shape=SHAPE, clamp=(-1.0, 1.0), **options)


TABLE = table(eta=0.5)
TIMES = [row.note["t"] for row in TABLE.rows]
IMAGE = np.tanh(np.random.default_rng(5).standard_normal((2, *SHAPE))).astype(np.float32)


def net(feeds: Mapping[str, Any]) -> dict[str, Any]:
    z = feeds["sample"]
    return {"out_sample": np.tanh(z) * np.float32(0.5) - z * (feeds["timestep"] / 1024)}


def run(edit: SamplerTable, bank: list[np.ndarray], **given: Any) -> np.ndarray:
    return run_table(edit, {"unet": net}, bank, given)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.6, 0.75, 1.0])
def test_sdedit_is_the_tail_of_the_table_from_the_noised_image(strength: float) -> None:
    edit = image_to_image(TABLE, strength)
    start = int(np.argmin([abs(t - strength * TIMES[0]) for t in TIMES]))
    assert [row.note["t"] for row in edit.rows] == TIMES[start:]
    bank = noise_bank(edit, [0, 1])
    alpha, sigma = SCHEDULE.alpha_sigma(TIMES[start])
    assert alpha**2 + sigma**2 == pytest.approx(1)
    traces: list[RowTrace] = []
    got = run_table(edit, {"unet": net}, bank, {"image": IMAGE}, traces.append)
    assert np.array_equal(traces[0].state, bank[0] * sigma + IMAGE * alpha)
    plain = [
        dataclasses.replace(row, noise=i if row.noise else None)
        for i, row in enumerate(TABLE.rows[start:], 1)
    ]
    tail = dataclasses.replace(
        TABLE, stages=(Stage(SHAPE, tuple(plain), (1.0, 0)),), noise_count=edit.noise_count
    )
    assert np.array_equal(run(tail, [traces[0].state, *bank[1:]]), got)


def test_full_strength_is_the_whole_table_but_for_its_first_state() -> None:
    edit = image_to_image(TABLE, 1.0)
    alpha, sigma = SCHEDULE.alpha_sigma(TIMES[0])
    bank = noise_bank(TABLE, [3, 4])
    assert edit.rows == TABLE.rows
    assert edit.noise_count == TABLE.noise_count
    first = [bank[0] * sigma + IMAGE * alpha, *bank[1:]]
    assert np.array_equal(run(edit, bank, image=IMAGE), run(TABLE, first))


def test_a_little_strength_stays_near_the_image() -> None:
    def distance(strength: float) -> float:
        edit = image_to_image(table(50), strength)
        made = run(edit, noise_bank(edit, [0, 1]), image=IMAGE)
        return float(np.abs(made - IMAGE).mean())

    assert distance(0.04) < distance(0.4) < distance(0.98)


def test_a_mask_of_ones_is_no_blend_and_one_of_zeros_gives_the_image() -> None:
    edit = inpaint(TABLE)
    bank = noise_bank(edit, [0, 1])
    ones = np.ones((2, *SHAPE), np.float32)
    own = [0, *(row.noise for row in edit.rows if row.noise is not None)]
    plain = run(TABLE, [bank[i] for i in own])
    assert np.array_equal(run(edit, bank, image=IMAGE, mask=ones), plain)
    assert np.array_equal(run(edit, bank, image=IMAGE, mask=ones * 0), IMAGE)
    half = ones.copy()
    half[..., :2] = 0
    made = run(edit, bank, image=IMAGE, mask=half)
    assert np.array_equal(made[..., :2], IMAGE[..., :2])
    assert np.array_equal(made[..., 2:], plain[..., 2:])  # the network here looks at single pixels


def test_the_known_part_has_the_noise_of_the_next_row() -> None:
    edit = inpaint(TABLE)
    bank = noise_bank(edit, [0, 1])
    traces: list[RowTrace] = []
    mask = np.zeros((2, *SHAPE), np.float32)
    run_table(edit, {"unet": net}, bank, {"image": IMAGE, "mask": mask}, traces.append)
    for trace, t in zip(traces[:-1], TIMES[1:], strict=True):
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        assert trace.row.blend is not None
        assert trace.row.blend.index == (trace.row.noise or -9) + 1
        expected = IMAGE * alpha + bank[trace.row.blend.index] * sigma
        assert np.array_equal(trace.next, expected)


def test_edits_go_together_and_are_noted() -> None:
    edit = edited(TABLE, ["image", "mask"], 0.5)
    assert edit == inpaint(image_to_image(TABLE, 0.5))
    assert edit.annotations["edits"] == {"image_to_image": 0.5, "inpaint": True}
    assert [item.name for item in edit.conditions] == ["image", "mask"]
    assert edit.conditions[0].value_range == (-1.0, 1.0)
    assert edited(TABLE, ["class_labels"], None) is TABLE
    assert SamplerTable.from_json(edit.to_json()) == edit
    assert all(row.note.get("kind") for row in edit.rows)
    assert validate(TABLE) == []


CASCADE = SamplerTable(
    (
        Stage(SHAPE, TABLE.rows[-1:]),
        Stage(SHAPE, TABLE.rows[-1:], (1.0, 1), carry="identity"),
    ),
    2,
    annotations=TABLE.annotations,
)
MULTISTEP = compile_scheduler({"_class_name": "DPMSolverMultistepScheduler"}, 5, shape=SHAPE)


@pytest.mark.parametrize(
    ("plain", "strength", "message"),
    [
        (TABLE, 0.0, r"`strength` must lie above 0 and up to 1, got 0"),
        (TABLE, 1.1, "`strength` must lie above 0 and up to 1"),
        (CASCADE, 0.5, "samplers of one stage; this cascade has 2"),
        (table(1), 0.5, "needs a sampler of several rows"),
        (MULTISTEP, 0.5, "row 2 looks back on rows before it"),
        (dataclasses.replace(TABLE, annotations={}), 0.5, "annotations name no `scheduler`"),
        (
            dataclasses.replace(
                TABLE,
                stages=(
                    dataclasses.replace(
                        TABLE.stages[0],
                        rows=tuple(dataclasses.replace(r, note={}) for r in TABLE.rows),
                    ),
                ),
            ),
            0.5,
            "the note of row 0 tells no whole time",
        ),
        (
            dataclasses.replace(
                TABLE,
                conditions=(Condition("image", "image", shape=SHAPE, value_range=(-1.0, 1.0)),),
            ),
            0.5,
            "network itself takes `image`",
        ),
    ],
)
def test_what_cannot_be_edited_says_why(plain: SamplerTable, strength: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        image_to_image(plain, strength)


def test_an_image_without_a_wish_is_refused() -> None:
    with pytest.raises(ConfigError, match="say with `strength` how far to go from it, or with `m"):
        edited(TABLE, ["image"], None)
    with pytest.raises(ConfigError, match="inpainting is for samplers of one stage"):
        inpaint(CASCADE)


def test_guided_tables_stay_guided() -> None:
    guided = table(
        guidance=Guidance("cfg", None, 2.0, (1.0, 4.0), {"class_labels": 10}),
        conditions=(Condition("class_labels", "class", 10),),
    )
    edit = inpaint(image_to_image(guided, 0.5))
    assert edit.guidance == guided.guidance
    assert edit.nfe == 2 * len(edit.rows)
    assert [item.name for item in edit.conditions] == ["class_labels", "image", "mask"]


LATENT = {"kind": "latent", "value_range": [-1.0, 1.0], "scale": 0.5, "shift": 0.25}


def halved(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Make latents of images twice as large: the mean of every four pixels."""
    images = feeds["sample"]
    means = images.reshape(*images.shape[:2], 4, 2, 4, 2).mean((3, 5))
    return {"latent_sample": means}


def doubled(feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"sample": feeds["latent_sample"].repeat(2, 2).repeat(2, 3)}


def test_images_of_latents_are_encoded_and_masks_cover_every_pixel_to_draw() -> None:
    latents = dataclasses.replace(
        table(eta=0.5), space=LATENT, clamp=None, decoder="decoder", encoder="encoder"
    )
    edit = edited(latents, ["image", "mask"], None, (1, 8, 8))
    assert edit.networks == ("unet", "encoder", "decoder")
    networks = {"unet": net, "encoder": halved, "decoder": doubled}
    image = np.tanh(np.random.default_rng(6).standard_normal((2, 1, 8, 8))).astype(np.float32)
    mask = np.zeros((2, 1, 8, 8), np.float32)
    mask[:, :, 3, 3] = 1
    given = {"image": image, "mask": mask}
    got = run_table(edit, networks, noise_bank(edit, [0, 1]), given)
    drawn = np.zeros((8, 8), bool)
    drawn[2:4, 2:4] = True  # the one latent that this pixel lies in
    back = doubled({"latent_sample": halved({"sample": image})["latent_sample"]})["sample"]
    assert np.abs(got - back)[..., ~drawn].max() < 1e-6
    assert np.abs(got - back)[..., drawn].min() > 1e-3


def test_latents_without_an_encoder_cannot_be_edited() -> None:
    bare = dataclasses.replace(TABLE, space=LATENT, clamp=None, decoder="decoder")
    with pytest.raises(ConfigError, match="came without its encoder"):
        edited(bare, ["image"], 0.5, (1, 8, 8))
