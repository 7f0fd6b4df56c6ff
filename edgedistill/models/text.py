"""Text encoders with one way to be called: CLIP's text models from token numbers to embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.text import Tokenizer
from edgedistill.weight_files import TRANSFORMERS

# Far below every score, and finite in half precision, where minus infinity breaks palettes and products.
_MASKED = -1e4
_OF_THE_WRITER = ("transformers_version", "dtype", "torch_dtype")


class TextEncoder(nn.Module):
    """transformers' `CLIPTextModel` (arXiv:2103.00020, section 2.4) as a network of named tensors.

    The state dictionary is the stock model's, so that a folder written here opens there and the other way
    round. A token attends to those before it; the padding lies behind the end token.

    Args:
        stock: The stock model, or the one with a projection; its modules become this one's, under the same
            names.
        in_pair: Whether it answers as one of the two encoders of Stable Diffusion XL: with what leaves the
            last layer but one, and with ``text_embeds`` where it has a projection.
    """

    weights_file = f"{TRANSFORMERS}.safetensors"

    def __init__(
        self, stock: CLIPTextModel | CLIPTextModelWithProjection, *, in_pair: bool = False
    ) -> None:
        super().__init__()
        self.in_pair = in_pair
        config = stock.config
        public = {k: v for k, v in config.to_diff_dict().items() if k not in _OF_THE_WRITER}
        name = type(stock).__name__
        self.config: dict[str, Any] = {**public, "architectures": [name], "_class_name": name}
        self.text_model: Any = stock.text_model
        self.text_projection: nn.Module | None = getattr(stock, "text_projection", None)
        # Configurations from before transformers 4.31 say 2, whatever the vocabulary's end token is.
        self._end: int | None = None if config.eos_token_id == 2 else config.eos_token_id

    @property
    def length(self) -> int:
        """Tokens of every prompt, start, end and padding included."""
        return int(self.config["max_position_embeddings"])

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the encoders that read the same prompts."""
        return ()

    @property
    def nothing(self) -> str | float:
        """What stands for no prompt: a prompt, or what its embeddings are filled with."""
        return ""

    def readers(self, tokenizer: Tokenizer) -> dict[str, tuple["TextEncoder", Tokenizer]]:
        """Return each encoder by the name of its part in a pipeline, with its tokenizer."""
        return {"text_encoder": (self, tokenizer)}

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that have an embedding."""
        return int(self.config["vocab_size"])

    @property
    def signature(self) -> Signature:
        """``input_ids`` in, ``encoder_hidden_states`` and ``pooled`` out, or what one of a pair answers."""
        projected = self.text_projection is not None
        pooled = self.config["projection_dim" if projected else "hidden_size"]
        name = "text_embeds" if self.in_pair else "pooled"
        whole = prompt_signature(self.length, self.config["hidden_size"], name, pooled)
        if self.in_pair and not projected:
            return Signature(whole.inputs, whole.outputs[:1])
        return whole

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Encode prompts.

        Args:
            input_ids: (batch, length) integers, start and end token included.

        Returns:
            The embedding of each token, (batch, length, dim), and that of the end token, (batch, dim),
            through the projection where there is one.
        """
        *_, before, last = self.layers(input_ids)
        if self.in_pair:
            if self.text_projection is None:
                return (before,)
            return before, self.pooled(last, self.ends(input_ids))
        return self.text_model.final_layer_norm(last), self.pooled(last, self.ends(input_ids))

    def layers(self, input_ids: Tensor) -> Sequence[Tensor]:
        """Return what enters the first layer, and what leaves each, (batch, length, dim), not normalised."""
        parts, length = self.text_model, input_ids.shape[1]
        hidden = parts.embeddings(input_ids=input_ids)
        mask = torch.full((length, length), _MASKED, dtype=hidden.dtype, device=hidden.device)
        # A trace keeps `shape` free, where it makes `len` a number.
        causal = mask.triu(1)[None, None].expand(input_ids.shape[0], 1, length, length)
        made = parts.encoder(
            inputs_embeds=hidden, causal_attention_mask=causal, output_hidden_states=True
        )
        states: Sequence[Tensor] = made.hidden_states
        return states

    def ends(self, input_ids: Tensor) -> Tensor:
        """Return the place (batch,) of the first end token of each prompt."""
        # In a vocabulary of those configurations the end token is the highest number.
        marks = input_ids if self._end is None else input_ids == input_ids.new_tensor(self._end)
        return marks.int().argmax(dim=1)

    def pooled(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """Return the embedding (batch, dim) of a prompt from what leaves the last layer, and the place of its end."""
        hidden = self.text_model.final_layer_norm(hidden)
        places = ends[:, None, None].expand(-1, 1, hidden.shape[2])
        chosen = hidden.gather(1, places)[:, 0]
        return chosen if self.text_projection is None else self.text_projection(chosen)


def asked(encoder: TextEncoder, signature: Signature) -> TextEncoder:
    """Let an encoder answer as a signature asks it to: by itself, or as one of a pair."""
    encoder.in_pair = all(spec.name != "pooled" for spec in signature.outputs)
    return encoder


def prompt_signature(length: int, dim: int, pooled: str, pooled_dim: int) -> Signature:
    """Return the signature of what makes embeddings of tokens; `pooled` names that of the whole prompt."""
    return Signature(
        (TensorSpec("input_ids", (BATCH, length), "int32", "tokens"),),
        (
            TensorSpec("encoder_hidden_states", (BATCH, length, dim), "float32", "text"),
            TensorSpec(pooled, (BATCH, pooled_dim), "float32", "pooled"),
        ),
    )


def build_text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    """Build an untrained text encoder from the configuration of a stock model, with a projection or without."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    projects = config.get("_class_name") == CLIPTextModelWithProjection.__name__
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    return TextEncoder(kind(CLIPTextConfig(**public)))
