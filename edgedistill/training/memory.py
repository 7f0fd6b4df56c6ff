"""Gradient checkpointing: blocks that keep their inputs alone, and run again in the backward pass."""

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(network: nn.Module) -> None:
    """Let every block of diffusers' in a network work so, in place (Chen et al., arXiv:1604.06174).

    The blocks have a switch of their own, which the networks that are made of them keep.
    """
    again = functools.partial(checkpoint, use_reentrant=False)
    blocks: list[Any] = [m for m in network.modules() if hasattr(m, "gradient_checkpointing")]
    for block in blocks:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = again
