"""Teacher score matching: a smaller network learns what the teacher predicts, before it is distilled.

Song et al. (arXiv:2410.23274) put this stage before the distillation of students of another architecture,
which do not converge without it. Left open there and decided here: the weight over time is that of the
teacher's own training loss, and where the blocks' widths are the teacher's, what leaves each block is
matched too, as for block removal (BK-SDM, Kim et al., arXiv:2305.15798).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgedistill.errors import ConfigError
from edgedistill.methods.context import Context
from edgedistill.methods.losses import prediction_mse
from edgedistill.methods.plan import Losses, LossFunction, OptimizerSettings, Step, Stretch
from edgedistill.methods.states import noised_data
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser, plain_network


@dataclass(frozen=True)
class ScoreSettings(Stretch):
    """The stage of teacher score matching; the optimizer is BK-SDM's.

    Fields:
        features: Weight of the blocks' outputs; 0 where widths differ from the teacher's.
    """

    iterations: int = 50000
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(
            "adamw", 5e-5, weight_decay=0.01, warmup=500, decay="constant"
        )
    )
    features: float = 1.0


def is_other_architecture(context: Context) -> bool:
    """Say whether students are of another architecture than the teacher."""
    teacher = store.config_of(context.teacher.network)
    return bool(store.config_of(context.base) != teacher)


def score_loss(settings: ScoreSettings, context: Context, student: str) -> LossFunction:
    """Return the loss of the stage, for one student.

    Raises:
        ConfigError: If features of other widths are to be matched.
    """
    widths = [
        store.config_of(network)["block_out_channels"]
        for network in (context.teacher.network, context.base)
    ]
    if settings.features and list(widths[0]) != list(widths[1]):
        msg = (
            f"Blocks of {list(widths[1])} channels have no features to match with the teacher's {list(widths[0])}; "
            "set `features` of the score stage to 0."
        )
        raise ConfigError(msg)

    def loss(step: Step) -> Losses:
        return match_scores(step.roles["teacher"], step.roles[student], step, settings.features)

    return loss


def match_scores(teacher: Denoiser, student: Denoiser, step: Step, features: float) -> Losses:
    """Compare two networks' predictions, and their blocks, on noised data at any time.

    Args:
        teacher: What is matched; called without gradients.
        student: What is trained; it takes the same conditions.
        step: Gives x (batch, channels, height, width), its conditions, and randomness.
        features: Weight of the mean over the blocks of the mean squared differences of what leaves them; 0
            leaves it out.

    Returns:
        ``scores``, the plain error of the prediction, and ``features`` where they are weighted.
    """
    conditions = step.batch.conditions
    t = step.draw.integers(0, teacher.schedule.num_train_timesteps)
    z = noised_data(teacher, step.batch, t, step.draw)
    with torch.no_grad(), watched_blocks(teacher.network) as wanted:
        target = teacher.x0(z, t, conditions)
    with watched_blocks(student.network) as found:
        x0 = student.x0(z, t, conditions)
    terms = {"scores": prediction_mse(student, x0, target, t)}
    if features:
        errors = [(found[name] - wanted[name]).square().mean() for name in found if name in wanted]
        terms["features"] = features * torch.stack(errors).mean()
    return Losses(terms)


@contextlib.contextmanager
def watched_blocks(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what leaves the blocks of a UNet while it is called, by their names."""
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            made[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [
        block.register_forward_hook(keep(name))
        for name, block in plain_network(network).named_modules()
        if name == "mid_block" or name.rpartition(".")[0] in ("down_blocks", "up_blocks")
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()
