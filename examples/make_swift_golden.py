"""Write the golden vectors of SamplerTable.swift: short tables that use everything a table can say.

python examples/make_swift_golden.py edgedistill/assets/swift/golden.json
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill.compiler import compile_scheduler
from edgedistill.files import write_json
from edgedistill.plans import portable
from edgedistill.rows import (
    analytic_row,
    boundary_row,
    ddim_row,
    jump_and_noise_row,
    renoise_row,
    return_x0_row,
)
from edgedistill.schedule import Schedule
from edgedistill.swift import golden
from edgedistill.table import Blend, Condition, Guidance, Router, Row, SamplerTable, Stage

SHAPE = (2, 4, 4)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIG = {"_class_name": "DDIMScheduler", "clip_sample": False, **LATENT}
VP = Schedule.from_config(CONFIG)
EDM = Schedule.from_config({"_class_name": "EDMEulerScheduler"})
CLASS = Condition("class_labels", "class", 4)
IMAGE = Condition("image", "image", shape=SHAPE, value_range=(-1.0, 1.0))
MASK = Condition("mask", "mask", shape=(1, 4, 4))
PIXELS = replace(IMAGE, shape=(3, 8, 8), encoder="vae_encoder")
PIXEL_MASK = replace(MASK, shape=(1, 8, 8))
TEXT = Condition(
    "encoder_hidden_states",
    "text",
    encoder="text_encoder",
    tokenizer="tokenizer.json",
    length=5,
    examples=("a ship at sea",),
)
SPACE = {"kind": "latent", "value_range": [-1.0, 1.0], "scale": 0.18215, "shift": 0.25}


def tables() -> dict[str, SamplerTable]:
    """Return the tables by name."""
    return {**compiled(), **of_methods(), **routed()}


def compiled() -> dict[str, SamplerTable]:
    """Return tables of schedulers, with every mode of guidance."""
    cfg = Guidance("cfg", None, 2.5, (1.0, 4.0), {"class_labels": 4})
    embedded = Guidance("embedded", "timestep_cond", 7.5, (1.0, 14.0))
    twin = {"_class_name": "SwiftDPMSolverMultistepScheduler"}
    return {
        "portable, guided": portable(
            CONFIG, 2, shape=SHAPE, guidance=cfg, conditions=(CLASS,), clamp=(-4.0, 4.0)
        ).table,
        "swift": compile_scheduler(twin, 4, shape=SHAPE),
        "lcm, embedded guidance": compile_scheduler(
            {"_class_name": "LCMScheduler"}, 3, shape=SHAPE, guidance=embedded
        ),
        "third order": compile_scheduler(
            {"_class_name": "EDMDPMSolverMultistepScheduler", "solver_order": 3}, 5, shape=SHAPE
        ),
    }


def of_methods() -> dict[str, SamplerTable]:
    """Return tables as methods make them."""
    small = (2, 2, 2)
    jump = jump_and_noise_row(VP, 999, 300, 499, "sample", 1, target_feed="target")
    guide = ddim_row(VP, 999, 499, "v_prediction", network=("guide", "unet"), clip=(-0.5, 0.5))
    drawn = replace(ddim_row(VP, 999, 499, "epsilon", clip=(-1.0, 1.0)), blend=Blend(0.5, 0.8, 1))
    kept = replace(return_x0_row(VP, 499, "epsilon", clip=(-1.0, 1.0)), blend=Blend(1.0))
    coarse = Stage(small, (ddim_row(EDM, 999, 500, "edm"),), init_noise=(80.0, 0))
    fine = Stage(
        SHAPE,
        (ddim_row(EDM, 500, -1, "edm"),),
        init_noise=(2.0, 1),
        carry="up_nearest",
        carry_scale=0.5,
        carry_to="low_resolution",
        carry_noise=(0.1, 2),
    )
    again = Stage(
        small, (analytic_row(VP, 500, 200),), (0.5, 3), carry="area_down", carry_scale=0.7
    )
    return {
        "jump, noise and a target": table(
            jump, ddim_row(VP, 499, -1, "sample", target_feed="target")
        ),
        "guide": table(guide, return_x0_row(VP, 499, "v_prediction", network=("guide", "unet"))),
        "analytic first": table(analytic_row(VP, 999, 600), renoise_row(VP, 600, 300, "sample", 1)),
        "image to image": SamplerTable(
            (Stage(SHAPE, (boundary_row(VP, 600, -1, "v_prediction"),), (0.6, 0), (0.8, "image")),),
            noise_count=1,
            conditions=(IMAGE,),
        ),
        "inpainting": table(drawn, kept, noise_count=2, conditions=(IMAGE, MASK)),
        "inpainting of latents": table(
            drawn,
            kept,
            noise_count=2,
            conditions=(PIXELS, PIXEL_MASK),
            space=SPACE,
            decoder="vae_decoder",
        ),
        "resolutions": SamplerTable((coarse, fine, again), noise_count=4),
    }


def routed() -> dict[str, SamplerTable]:
    """Return tables of several students or text encoders, one of them with a decoder."""
    rows = (ddim_row(VP, 999, 499, "epsilon"), ddim_row(VP, 499, -1, "epsilon"))
    guided = [
        ddim_row(VP, 999, 499, "v_prediction", guidance_scale=3.0),
        ddim_row(VP, 499, -1, "v_prediction", guidance_scale=3.0),
    ]
    return {
        "routed by class": table(
            *rows,
            conditions=(CLASS,),
            router=Router("class_table", "class_labels", 2, table=(0, 0, 1, 1)),
        ),
        "two encoders, null of zeros": table(
            *guided,
            conditions=(replace(TEXT, further={"text_encoder_2": "tokenizer_2.json"}),),
            guidance=Guidance("cfg", None, 3.0, (1.0, 5.0), {TEXT.name: 0.0}),
        ),
        "routed by text, latent": table(
            *guided,
            conditions=(TEXT,),
            guidance=Guidance("cfg", None, 3.0, (1.0, 5.0), {TEXT.name: ""}),
            router=Router(
                "sign_planes",
                "pooled",
                4,
                planes=((1.0, -0.5, 2.0), (0.25, 1.0, -1.0)),
                bias=(0.5, 0.25),
            ),
            space=SPACE,
            decoder="vae_decoder",
            clamp=(-4.0, 4.0),
        ),
    }


def table(*rows: Row, **fields: Any) -> SamplerTable:
    """Return a table of one stage."""
    count = 1 + sum(row.noise is not None for row in rows)
    return SamplerTable((Stage(SHAPE, rows),), **{"noise_count": count, **fields})


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), golden(tables()))
