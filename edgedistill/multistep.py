"""One step of DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): from noise levels to coefficients."""

import math
from collections.abc import Sequence

from edgedistill.table import Next

Point = tuple[float, float]  # alpha, sigma


def multistep_next(points: Sequence[Point]) -> Next:
    """Step from the second-last point to the last, with the x0 of every point but the last.

    Two points make DDIM's step; three the midpoint rule of 2M; four the third order, where the curvature of
    x0 has half of the weight that an exact integral would give it: that is what diffusers samples with.

    Args:
        points: (alpha, sigma) of two to four times, sigma/alpha falling; the last may have sigma 0 where
            there are two.
    """
    *_, (alpha, sigma), (alpha_after, sigma_after) = points
    z = sigma_after / sigma
    gain = alpha_after - z * alpha
    if len(points) == 2 or points[-1] == points[-2]:
        return Next(z=z, x0=gain)
    # lambda = log(alpha/sigma) is the solver's time; h its last step, h0 and h1 those before.
    h, h0, *older = (
        _lambda(after) - _lambda(before)
        for before, after in zip(points[-2::-1], points[:0:-1], strict=True)
    )
    if not older:
        slope = 0.5 * gain * h / h0
        return Next(z=z, x0=gain + slope, previous=(-slope,))
    (h1,) = older
    first = alpha_after * (1 + math.expm1(-h) / h)
    second = -alpha_after * ((math.expm1(-h) + h) / h**2 - 0.5)
    share = h0 / (h0 + h1)
    bend = first * share + second * h / (h0 + h1)
    now, before = (first + bend) * h / h0, bend * h / h1
    return Next(z=z, x0=gain + now, previous=(-now - before, before))


def _lambda(point: Point) -> float:
    alpha, sigma = point
    return -math.inf if alpha == 0 else math.log(alpha / sigma)
