"""Weights that FSDP cuts up among processes: whole ones out of them, and whole ones into them."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(accelerator: Accelerator, network: nn.Module) -> None:
    """Cut a network's weights up among the processes in place, as accelerate is configured (FSDP2).

    Its modules stay the objects that they were; parameters become `DTensor`, so optimizers come afterwards. One
    that is cut up already, or has no weights, is left as it is.
    """
    if any(True for _ in network.parameters()):
        fsdp2_prepare_model(accelerator, network)


def whole(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors with all pieces of each; every process must call this, with the same names.

    Values that are no tensors cut up are returned as they are.
    """
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in tensors.items()
    }


def pieces_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor cut up as another one of its shape is; every process must hold the same."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def load_whole(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network the weights of a state dict of whole tensors."""
    held = network.state_dict()
    network.load_state_dict(
        {k: pieces_like(v, held[k]) if k in held else v for k, v in state.items()}
    )
