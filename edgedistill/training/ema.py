"""The moving average of a network's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """Keeps ``average <- rate * average + (1 - rate) * weights``, with a warm-up of the rate.

    The rate in force after n updates is ``min(rate, (1 + n) / (10 + n))``, so that early averages
    forget the start.

    Args:
        network: Whose parameters and buffers are followed.
        rate: In [0, 1).
    """

    def __init__(self, network: nn.Module, rate: float) -> None:
        self.rate = rate
        self.updates = 0
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take the network's present weights into the average."""
        rate = min(self.rate, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - rate)
            else:
                self.state[name].copy_(value)

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over a saved average."""
        self.updates = updates
        for name, value in state.items():
            self.state[name].copy_(value)
