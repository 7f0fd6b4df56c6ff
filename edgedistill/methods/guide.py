"""A plug-and-play guide: a side network in place of the second, unguided pass (Hsiao et al., arXiv:2406.01954).

The guide sees the noised state, the time, the condition and w = g - 1, and answers with residuals for the
skips and the middle of a frozen base, after whose encoder they are added; together they are trained to
reproduce the guided base,

    || base(z, t, c; residuals) - [e(z, t, c) + w (e(z, t, c) - e(z, t, null))] ||^2

(as written with ``fold.weighting: prediction``; the others weigh it by time), and then, by progressive distillation with the guide's parameters alone, to take fewer steps. Both stages are
those of `edgedistill.methods.guided`, whose student is here the guided pair. The base's package stays as it
is; the same guide serves other fine-tunes of the base, see `edgedistill.models.replace`.

Left open by the paper, as far as it could be read, and chosen here: a tiny guide sees the noised state; it is
told of text by the mean of its embeddings; a full guide is a copy of the base's encoder; an average of the
guide is what is kept; step halving is stage 2 of guided distillation.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from edgedistill.methods.context import Context
from edgedistill.methods.guided import GuidedSettings, stages
from edgedistill.methods.plan import Plan, Role
from edgedistill.models.guide import GuidedDenoiser, tiny_guide
from edgedistill.models.inputs import SCALES, Inputs
from edgedistill.models.residuals import residual_encoder


@dataclass(frozen=True)
class GuideSettings(GuidedSettings):
    """Settings of a guide; the others as `GuidedSettings`, whose student is the guided pair.

    Fields:
        size: ``tiny``, a tower of its own, or ``full``, a copy of the base's encoder.
        widths: Channels of a tiny guide at each resolution of the base; the defaults make 0.7 % of Stable
            Diffusion 1.
        embedding_dim: Width of what a tiny guide is told beside the state.
        ema: Rate of the average of the guide that is kept, or None.
    """

    size: Literal["tiny", "full"] = "tiny"
    widths: tuple[int, ...] = (96, 128, 192, 256)
    embedding_dim: int = 256
    ema: float | None = 0.999


def plan(settings: GuideSettings, context: Context) -> Plan:
    """Lay out both stages.

    Raises:
        ConfigError: If the teacher has no null condition, the base is not to be the teacher as it is, the
            guide does not fit it, or as `edgedistill.methods.guided.stages`.
    """
    context.require_null()
    context.require_frozen_base("A guide")
    base = context.student(residuals=True)
    pair = GuidedDenoiser(_guide(settings, context, base.network), base)
    networks = {"guide": "student", "unet": "base"}
    return stages(settings, context, pair, networks, (Role("base", base),))


def _guide(settings: GuideSettings, context: Context, base: nn.Module) -> nn.Module:
    if settings.size == "full":
        return residual_encoder(context.base, base, Inputs({"w": SCALES["w"]}))
    return tiny_guide(context.base, settings.widths, settings.embedding_dim, context.seed)
