"""A text encoder with one way to be called: CLIP's text model from token numbers to embeddings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from edgedistill.contract import BATCH, Signature, TensorSpec

# Far below every score, and finite in half precision, where minus infinity breaks palettes and products.
_MASKED = -1e4
_OF_THE_WRITER = ("transformers_version", "dtype", "torch_dtype")


class TextEncoder(nn.Module):
    """transformers' `CLIPTextModel` (arXiv:2103.00020, section 2.4) as a network of named tensors.

    The state dictionary is the stock model's, so that a folder written here opens there and the other way
    round. A token attends to those before it; the padding lies behind the end token.

    Args:
        stock: The stock model; its modules become this one's, under the same names.
    """

    weights_file = "model.safetensors"

    def __init__(self, stock: CLIPTextModel) -> None:
        super().__init__()
        config = stock.config
        public = {k: v for k, v in config.to_diff_dict().items() if k not in _OF_THE_WRITER}
        name = CLIPTextModel.__name__
        self.config: dict[str, Any] = {**public, "architectures": [name], "_class_name": name}
        self.text_model: Any = stock.text_model
        # Configurations from before transformers 4.31 say 2, whatever the vocabulary's end token is.
        self._end: int | None = None if config.eos_token_id == 2 else config.eos_token_id

    @property
    def length(self) -> int:
        """Tokens of every prompt, start, end and padding included."""
        return int(self.config["max_position_embeddings"])

    @property
    def signature(self) -> Signature:
        """``input_ids`` in, ``encoder_hidden_states`` and ``pooled`` out."""
        dim = self.config["hidden_size"]
        tokens = TensorSpec("input_ids", (BATCH, self.length), "int32", "tokens")
        text = TensorSpec("encoder_hidden_states", (BATCH, self.length, dim), "float32", "text")
        return Signature((tokens,), (text, TensorSpec("pooled", (BATCH, dim), "float32", "pooled")))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode prompts.

        Args:
            input_ids: (batch, length) integers, start and end token included.

        Returns:
            The embedding of each token, (batch, length, dim), and that of the end token, (batch, dim).
        """
        parts, length = self.text_model, input_ids.shape[1]
        hidden = parts.embeddings(input_ids=input_ids)
        mask = torch.full((length, length), _MASKED, dtype=hidden.dtype, device=hidden.device)
        causal = mask.triu(1)[None, None].expand(len(input_ids), 1, length, length)
        encoded = parts.encoder(inputs_embeds=hidden, causal_attention_mask=causal)
        hidden = parts.final_layer_norm(encoded.last_hidden_state)
        # In a vocabulary of those configurations the end token is the highest number.
        marks = input_ids if self._end is None else input_ids == input_ids.new_tensor(self._end)
        places = marks.int().argmax(dim=1)[:, None, None]
        return hidden, hidden.gather(1, places.expand(-1, 1, hidden.shape[2]))[:, 0]


def build_text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    """Build an untrained text encoder from the configuration of a `CLIPTextModel`."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return TextEncoder(CLIPTextModel(CLIPTextConfig(**public)))
