"""Heads of all sizes have the layers of the reference code and do not cancel what they see."""

import pytest
import torch
from torch import nn

from edgedistill.errors import ContractError
from edgedistill.models.discriminator import Head


@pytest.mark.parametrize("shape", [(768, 8, 8), (1280, 8, 8), (32, 32, 32), (32, 4, 4), (32, 2, 2)])
def test_heads_of_all_sizes_tell_features_apart_and_their_seeds(
    shape: tuple[int, int, int],
) -> None:
    with torch.device("meta"):
        strides = [m.stride[0] for m in Head(shape, 0).modules() if isinstance(m, nn.Conv2d)]
    assert len(strides) == 2 + {32: 3, 8: 1}.get(shape[1], 0)
    if shape[0] > 100:
        return
    features = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    logits = Head(shape, 0)(features).detach()
    assert float(logits.std()) > 1e-3
    assert torch.equal(logits, Head(shape, 0)(features))
    assert not torch.equal(logits, Head(shape, 1)(features))
    with pytest.raises(ContractError, match="must be halved 1 time"):
        Head((8, 9, 9), 0)
