"""Several images are decoded as precisely as one: PyTorch's norms are imprecise where channels lie innermost."""

import torch
from diffusers import AutoencoderKL
from torch import nn

from edgedistill.models.vae import VaeDecoder


def test_behind_the_attention_channels_lie_outermost():
    stock = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    decoder = VaeDecoder(stock, (8, 8)).eval()
    outermost = []
    for name, part in decoder.named_modules():
        if isinstance(part, nn.GroupNorm) and "mid_block" not in name:
            part.register_forward_hook(
                lambda _part, given, _made: outermost.append(given[0].is_contiguous())
            )
    with torch.inference_mode():
        decoder(torch.randn(2, 4, 8, 8))
    assert len(outermost) == 9
    assert all(outermost)
