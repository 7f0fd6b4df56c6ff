"""What images are compared by: raw pixels, or whatever network the user has.

An extractor is any callable from images, float32 (count, channels, height, width) in [-1, 1], to features
(count, features). `pixels` needs no weights and orders samplers rightly at 8x8. For larger images take a
network's features, say DINOv2's::

    dino = torch.hub.load("facebookresearch/dinov2", "dinov2_vits14")
    evaluator = Evaluator.open("photos", extractor=torch_features(dino, size=224))

Inception, CLIP and any other module go the same way; a function of numpy arrays needs no wrapper.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgedistill.errors import ContractError

if TYPE_CHECKING:
    from torch import nn

Extractor = Callable[[np.ndarray], np.ndarray]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pixels(images: np.ndarray) -> np.ndarray:
    """Return every pixel as a feature."""
    return images.reshape(len(images), -1)


def torch_features(
    module: "nn.Module",
    *,
    size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    batch: int = 100,
) -> Extractor:
    """Make an extractor of a torch module that maps RGB images to (batch, features).

    Grey images are repeated to three channels, resized (bicubic, antialiased), mapped to [0, 1] and
    normalised; the module is put into evaluation mode and runs on the device that it is on.

    Args:
        module: The network; if it returns a higher rank, all but the batch is flattened.
        size: Height and width that it wants; None: as they come.
        mean, std: Per channel, what the network was trained with.
        batch: Images at a time.
    """
    import torch
    from torch.nn import functional

    module.eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    centre, scale = (torch.tensor(v, device=device).reshape(1, -1, 1, 1) for v in (mean, std))

    def extract(images: np.ndarray) -> np.ndarray:
        pieces = []
        for start in range(0, len(images), batch):
            piece = torch.from_numpy(images[start : start + batch]).to(device)
            piece = piece.expand(-1, 3, -1, -1) if piece.shape[1] == 1 else piece
            if size is not None:
                piece = functional.interpolate(piece, (size, size), mode="bicubic", antialias=True)
            with torch.no_grad():
                made = module(((piece.clip(-1, 1) + 1) / 2 - centre) / scale)
            pieces.append(made.flatten(1).float().cpu().numpy())
        return np.concatenate(pieces)

    extract.__name__ = type(module).__name__
    return extract


def extract(extractor: Extractor, images: np.ndarray) -> np.ndarray:
    """Run an extractor and check what it made.

    Raises:
        ContractError: If it does not return one row of numbers per image.
    """
    features = np.asarray(extractor(images))
    if features.ndim != 2 or len(features) != len(images):
        msg = f"The extractor must return ({len(images)}, features), got {features.shape}."
        raise ContractError(msg)
    return features


def name_of(extractor: Extractor) -> str:
    """Return how reports call an extractor."""
    return getattr(extractor, "__name__", type(extractor).__name__)
