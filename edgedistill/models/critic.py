"""A small critic that tells real images from made ones by their pixels."""

import itertools

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """Convolutions down to two pixels, then a score, to which with classes a projection of the label is added.

    The projection is that of Miyato and Koyama, arXiv:1802.05637.

    Args:
        channels, size: Of the images; their smaller side.
        classes: Number of labels, or None.
        width: Channels of the first convolution; doubled with each halving of the size, up to 16 times.
        seed: Key of the first weights.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        classes: int | None = None,
        *,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        halvings = max(size.bit_length() - 2, 0)
        widths = [width * min(2**i, 16) for i in range(halvings + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
            for before, after in itertools.pairwise(widths):
                layers += [nn.LeakyReLU(0.2), nn.Conv2d(before, after, 3, stride=2, padding=1)]
            self.body = nn.Sequential(*layers, nn.LeakyReLU(0.2))
            self.score = nn.Linear(widths[-1], 1)
            self.label = None if classes is None else nn.Embedding(classes, widths[-1])

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return a score (batch,), high for real images.

        Args:
            images: (batch, channels, height, width) float32.
            labels: (batch,) integers, where there are classes.
        """
        features = self.body(images).mean((2, 3))
        score = self.score(features)[:, 0]
        if self.label is None:
            return score
        return score + (self.label(labels) * features).sum(1) / features.shape[1] ** 0.5
