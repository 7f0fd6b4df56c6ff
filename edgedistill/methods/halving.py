"""Grids of times that are halved, and the sampler tables on them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.rows import ddim_row, jump_and_noise_row
from edgedistill.table import Condition, Guidance, Row, SamplerTable

END = -1
IMAGE = "image"
NOISE_RANGE = (-3.0, 3.0)  # black and white where encoded noise is shown


@dataclass(frozen=True)
class Halving:
    """Builds the tables that a student is trained for.

    Fields:
        context: Schedule, prediction type, conditions.
        guidance: How w is chosen.
        networks: Names of what every row calls, in order, each with the role that holds it.
        encode_from: Label where encoding begins; None: the tables decode.
    """

    context: Context
    guidance: Guidance
    networks: Mapping[str, str]
    encode_from: int | None = None

    def grid(self, count: int) -> list[int]:
        """Return the labels of `count` equal jumps, where they lead to first.

        To decode these are -1 and diffusers' trailing grid ascending; to encode the trailing grid
        descending, and `encode_from`.

        Raises:
            ConfigError: If the schedule has fewer labels than jumps, or encoding begins beyond the first jump.
        """
        trailing = self.context.schedule.timesteps(count, "trailing")
        if self.encode_from is None:
            return [END, *reversed(trailing)]
        if not 0 <= self.encode_from < trailing[-1]:
            msg = f"`encode_from` must lie in [0, {trailing[-1] - 1}], before the first of {count} jumps, got {self.encode_from}."
            raise ConfigError(msg)
        return [*trailing, self.encode_from]

    def deterministic(self, count: int) -> SamplerTable:
        """Return a table of `count` DDIM rows.

        Raises:
            ConfigError: If the schedule has fewer labels than rows, or as `grid`.
        """
        schedule, kind, grid = self.context.schedule, self.context.kind, self.grid(count)
        rows = tuple(
            ddim_row(schedule, grid[k], grid[k - 1], kind, network=tuple(self.networks))
            for k in range(count, 0, -1)
        )
        table = self._table(rows, 1, sampler="deterministic")
        return table if self.encode_from is None else _encoding(table)

    def stochastic(self, count: int) -> SamplerTable:
        """Return `count` rows that jump by 2/N and noise back by 1/N; the last one returns x0.

        Raises:
            ConfigError: If the schedule has fewer labels than rows.

        References:
            Meng et al., arXiv:2210.03142, section 3.3.
        """
        schedule, kind, grid = self.context.schedule, self.context.kind, self.grid(count)
        call = tuple(self.networks)
        rows = [
            jump_and_noise_row(
                schedule, grid[k], grid[k - 2], grid[k - 1], kind, noise=index, network=call
            )
            for index, k in enumerate(range(count, 1, -1), start=1)
        ]
        rows.append(ddim_row(schedule, grid[1], END, kind, network=call))
        return self._table(tuple(rows), count, sampler="stochastic")

    def _table(self, rows: tuple[Row, ...], noise_count: int, **annotations: Any) -> SamplerTable:
        return self.context.table(
            rows, noise_count=noise_count, guidance=self.guidance, **annotations
        )


def _encoding(table: SamplerTable) -> SamplerTable:
    """Begin with the caller's image in place of noise; what comes out is noise."""
    (stage,) = table.stages
    low, high = table.space["value_range"]
    image = Condition(IMAGE, "image", shape=stage.shape, value_range=(float(low), float(high)))
    return dataclasses.replace(
        table,
        stages=(dataclasses.replace(stage, init_noise=(0.0, 0), init_image=(1.0, IMAGE)),),
        conditions=(*table.conditions, image),
        clamp=None,
        space={"kind": "noise", "value_range": list(NOISE_RANGE)},
        annotations={**table.annotations, "direction": "encode"},
    )
