"""Two text encoders that read one prompt, as those of Stable Diffusion XL, as one network."""

import torch
from torch import Tensor, nn

from edgedistill.contract import Signature
from edgedistill.models.text import TextEncoder, prompt_signature
from edgedistill.text import Tokenizer

_SECOND = "text_encoder_2"


class TextEncoderPair(nn.Module):
    """Both encoders' embeddings of each token side by side, and the second one's of the whole prompt.

    The embeddings of tokens are those that leave the last layer but one (Podell et al., arXiv:2307.01952,
    section 2.1). Both encoders have one vocabulary, and read the same tokens up to the end.

    Args:
        first: Its padding is what the tokens come with.
        second: Has a projection.
        padding: The token that fills prompts of the second one.
        zero_empty: Whether the empty prompt is embedded as zeros, which is how Stable Diffusion XL was
            trained without prompts.
    """

    def __init__(
        self, first: TextEncoder, second: TextEncoder, padding: int, *, zero_empty: bool
    ) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.padding = padding
        self.zero_empty = zero_empty
        first.in_pair = second.in_pair = True

    @property
    def length(self) -> int:
        """Tokens of every prompt, start, end and padding included."""
        return self.first.length

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the encoders that read the same prompts."""
        return (_SECOND,)

    @property
    def nothing(self) -> str | float:
        """What stands for no prompt: a prompt, or what its embeddings are filled with."""
        return 0.0 if self.zero_empty else ""

    def readers(self, tokenizer: Tokenizer) -> dict[str, tuple[TextEncoder, Tokenizer]]:
        """Return each encoder by the name of its part in a pipeline, with its tokenizer."""
        second = tokenizer.padded_with(self.padding)
        return {"text_encoder": (self.first, tokenizer), _SECOND: (self.second, second)}

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that have an embedding in both."""
        return min(self.first.vocabulary_size, self.second.vocabulary_size)

    @property
    def signature(self) -> Signature:
        """``input_ids`` in, ``encoder_hidden_states`` and ``text_embeds`` out."""
        first, second = self.first.config, self.second.config
        dim = first["hidden_size"] + second["hidden_size"]
        return prompt_signature(self.length, dim, "text_embeds", second["projection_dim"])

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode prompts.

        Args:
            input_ids: (batch, length) integers, start and end token included, padded for the first encoder.

        Returns:
            The embedding of each token, (batch, length, dim), and that of the prompt, (batch, dim).
        """
        ends = self.first.ends(input_ids)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        behind = places[None] > ends[:, None]
        filled = torch.where(behind, input_ids.new_tensor(self.padding), input_ids)
        layers = self.second.layers(filled)
        hidden = torch.cat([self.first.layers(input_ids)[-2], layers[-2]], dim=2)
        pooled = self.second.pooled(layers[-1], ends)
        if self.zero_empty:
            # The end of an empty prompt follows its start.
            words = (ends > 1).to(hidden.dtype)
            hidden, pooled = hidden * words[:, None, None], pooled * words[:, None]
        return hidden, pooled
