"""Stages: what the interpreter carries from one to the next, and a cascade of them by hand."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edgedistill.sampler import enter_stage, run_table
from edgedistill.table import Next, Row, SamplerTable, Stage

SHAPE = (1, 4, 4)
ROW = Row(("unet",), {"timestep": 500.0}, x0=(1.0, -0.5), next=Next(z=0.25, x0=0.75))


def carried(
    how: str, before: tuple[int, int, int], after: tuple[int, int, int], x: Any
) -> np.ndarray:
    """Carry `x` to a second stage and return that stage's first state."""
    rows = (Row((), next=Next(z=1.0)),)
    second = Stage(after, rows, init_noise=(0.0, 1), carry=how)
    table = SamplerTable((Stage(before, rows), second), 2)
    return enter_stage(table, second, [x, x[:, :1, :1, :1] * 0], {}, x)[0]


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_down_after_up_is_exactly_the_identity(factor: int, library: str) -> None:
    convert = pytest.importorskip(library).asarray
    small, large = (3, 2, 4), (3, 2 * factor, 4 * factor)
    x = np.random.default_rng(1).standard_normal((2, *small), dtype=np.float32)
    up = carried("up_nearest", small, large, convert(x))
    assert tuple(up.shape) == (2, *large)
    assert np.array_equal(np.asarray(carried("area_down", large, small, up)), x)
    assert np.array_equal(np.asarray(up)[:, :, ::factor, ::factor], x)


def test_area_down_is_the_mean_of_each_area() -> None:
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    down = carried("area_down", (1, 4, 4), (1, 2, 2), x)
    assert np.array_equal(down, [[[[2.5, 4.5], [10.5, 12.5]]]])


def test_a_later_stage_starts_from_scaled_noise_plus_what_it_carries() -> None:
    rows = (Row((), next=Next(z=1.0)),)
    second = Stage(SHAPE, rows, init_noise=(0.5, 1), carry="identity", carry_scale=0.25)
    table = SamplerTable((Stage(SHAPE, rows, init_noise=(2.0, 0)), second), 2)
    first, fresh = np.random.default_rng(0).standard_normal((2, 2, *SHAPE), dtype=np.float32)
    got = run_table(table, {}, [first, fresh], {})
    assert np.array_equal(got, fresh * 0.5 + first * 2.0 * 0.25)


CASCADE = SamplerTable(
    (
        Stage((1, 2, 2), (ROW, dataclasses.replace(ROW, next=Next(x0=1.0)))),
        Stage(
            SHAPE,
            (
                dataclasses.replace(ROW, next=Next(x0=0.5, noise=0.5), noise=3),
                dataclasses.replace(ROW, next=Next(x0=1.0)),
            ),
            init_noise=(2.0, 1),
            carry="up_nearest",
            carry_scale=0.5,
            carry_to="image",
            carry_noise=(0.25, 2),
        ),
    ),
    4,
)


def guided_by_image(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Stand for a network, with plain arithmetic that numpy and torch round alike."""
    z, t, image = (feeds[name] for name in ("sample", "timestep", "image"))
    return {"out_sample": z * (t / 1024.0) - z * z * 0.03125 + image * 0.125}


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_cascade_is_a_loop_by_hand(library: str) -> None:
    convert = pytest.importorskip(library).asarray
    generator = np.random.default_rng(3)
    shapes = [(1, 2, 2), SHAPE, SHAPE, SHAPE]
    bank = [generator.standard_normal((2, *s), dtype=np.float32) for s in shapes]
    got = run_table(CASCADE, {"unet": guided_by_image}, [convert(n) for n in bank], {})

    def x0(z: np.ndarray, image: np.ndarray) -> np.ndarray:
        raw = guided_by_image({"sample": z, "timestep": 500.0, "image": image})["out_sample"]
        return z - 0.5 * raw

    blank = np.zeros_like(bank[0])
    z = 0.25 * bank[0] + 0.75 * x0(bank[0], blank)
    small = x0(z, blank)
    image = 0.5 * small.repeat(2, axis=2).repeat(2, axis=3) + 0.25 * bank[2]
    z = 0.5 * x0(2.0 * bank[1], image) + 0.5 * bank[3]
    assert np.allclose(np.asarray(got), x0(z, image), rtol=1e-6, atol=1e-6)
    assert CASCADE.effective_nfe == 2 / 4 + 2
    assert CASCADE.nfe == 4
