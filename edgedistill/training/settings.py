"""Settings of the loop: what holds for every method."""

from dataclasses import dataclass
from typing import Literal

from edgedistill.errors import ConfigError


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the loop.

    Fields:
        batch_size: Samples per optimizer step over all processes and accumulation steps.
        gradient_accumulation: Pieces that a batch is worked through in.
        clip_norm: Largest gradient norm, or None.
        mixed_precision: ``no``, ``bf16`` or ``fp16``, through accelerate.
        nan_policy: ``raise``: stop at the first loss or gradient that is not finite; ``skip``: leave
            that step out, and stop after `nan_limit` in a row.
        nan_limit: See `nan_policy`.
        checkpoint_every: Iterations between checkpoints; one more is written after each phase.
        preview_every: Iterations between sample grids; 0: none.
        log_every: Iterations between logged losses.
        tensorboard: Write TensorBoard event files.
        gradient_checkpointing: Keep the inputs of the networks' blocks alone and run the blocks again in the
            backward pass: less memory, about a third more arithmetic, the same gradients.
        tf32: Let CUDA's matrix products and convolutions use TF32.
        compile: Compile the trained networks with torch.compile.
    """

    batch_size: int = 64
    gradient_accumulation: int = 1
    clip_norm: float | None = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    nan_policy: Literal["raise", "skip"] = "raise"
    nan_limit: int = 10
    checkpoint_every: int = 500
    preview_every: int = 0
    log_every: int = 10
    tensorboard: bool = True
    gradient_checkpointing: bool = False
    tf32: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                msg = f"`{name}` must be at least 1, got {getattr(self, name)}."
                raise ConfigError(msg)
        if self.batch_size % self.gradient_accumulation:
            msg = f"`batch_size` {self.batch_size} must be a multiple of `gradient_accumulation` {self.gradient_accumulation}."
            raise ConfigError(msg)
