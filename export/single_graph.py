"""A whole sampler as one network: the rows unrolled, every network called where they say and held once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgedistill.conditions import Tokenize
from edgedistill.contract import BATCH, Signature
from edgedistill.errors import ConfigError
from edgedistill.generator import GENERATOR, generator_signature, noise_names
from edgedistill.models import store
from edgedistill.sampler import NULL, TOKENS, Network, embedded, run_table
from edgedistill.student import Student
from edgedistill.table import SamplerTable
from edgedistill.tables import choose

from .formats import Job

MOST_EVALUATIONS = 8
"""Of networks in one graph; each takes the time and memory of one more network when the graph is compiled."""


class Generator(nn.Module):
    """Runs a sampler table as one forward pass.

    It calls `edgedistill.sampler.run_table`, so that what is traced is what every runtime does. The rows'
    coefficients, the timesteps and the null text of guidance become constants.

    Args:
        table: The sampler, without a router.
        networks: What it calls, by name.
        signatures: Of each network.
        text_inside: Whether the text encoder is; else the graph takes embeddings.
        tokenize: Turns the null text into tokens, where guidance has one.

    Raises:
        ConfigError: If the table chooses networks by the sample, or makes too many evaluations.
    """

    def __init__(
        self,
        table: SamplerTable,
        networks: Mapping[str, nn.Module],
        signatures: Mapping[str, Signature],
        *,
        text_inside: bool = True,
        tokenize: Tokenize | None = None,
    ) -> None:
        super().__init__()
        refuse(table)
        self.table = table
        self.signatures = dict(signatures)
        self.signature = generator_signature(table, signatures, text_inside=text_inside)
        text = table.condition("text")
        outside = text.encoders if text and not text_inside else ()
        self.networks = nn.ModuleDict(
            {name: networks[name] for name in table.networks if name not in outside}
        )
        self.null = _null_text(table, self._calls(networks), tokenize)
        self.filling = table.guidance.null.get(text.name) if text else None

    def forward(
        self, added_cond_kwargs: Mapping[str, Tensor] | None = None, **inputs: Tensor
    ) -> Tensor:
        """Return the finished samples (batch, channels, height, width).

        Args:
            added_cond_kwargs: Some of the inputs, in the bag that diffusers' networks take them in.
            **inputs: The noise bank and conditions, by the names of the signature.
        """
        given = {**inputs, **(added_cond_kwargs or {})}
        noise = [given.pop(name) for name in noise_names(self.table)]
        null = {
            name: value.expand(noise[0].shape[0], *value.shape[1:])
            for name, value in self.null.items()
        }
        # A number in place of a null text fills all that the encoders would make of it.
        if isinstance(self.filling, int | float):
            texts = [spec.name for spec in self.signature.inputs if spec.kind in ("text", "pooled")]
            null |= {NULL + name: given[name] * 0 + self.filling for name in texts}
        return run_table(self.table, self._calls(self.networks), noise, {**given, **null})

    def _calls(self, networks: Any) -> dict[str, Network]:
        return {name: _as_network(item, self.signatures[name]) for name, item in networks.items()}


def _null_text(
    table: SamplerTable, networks: Mapping[str, Network], tokenize: Tokenize | None
) -> dict[str, Tensor]:
    """Return what the text encoder makes of the null text, one sample each."""
    text = table.condition("text")
    null = table.guidance.null.get(text.name) if text else None
    if text is None or not isinstance(null, str):
        return {}
    if tokenize is None or text.encoder is None:
        msg = f"The null text of `{text.name}` becomes a constant of the graph, but there is no tokenizer or no text encoder to make it with."
        raise ConfigError(msg)
    tokens = torch.from_numpy(tokenize([null], text.length or 0))
    with torch.no_grad():
        return embedded(networks, text, {NULL + TOKENS: tokens})


def refuse(table: SamplerTable) -> None:
    """Refuse a table that cannot become one graph.

    Raises:
        ConfigError: If it chooses networks by the sample, or makes more than `MOST_EVALUATIONS`.
    """
    if table.router is not None:
        msg = f"A single graph calls the same networks for every sample, but this sampler's router chooses one of {table.router.students} students by `{table.router.on}`; export it without --single-graph."
        raise ConfigError(msg)
    if table.nfe > MOST_EVALUATIONS:
        msg = f"A single graph is for samplers of up to {MOST_EVALUATIONS} network evaluations, this one makes {table.nfe}; export it without --single-graph, or choose a --sampler of fewer."
        raise ConfigError(msg)


def _as_network(module: nn.Module, signature: Signature) -> Network:
    """Return a module as the interpreter calls it: by name, the numbers of a row as one constant per sample."""
    names = [spec.name for spec in signature.outputs]

    def call(given: Mapping[str, Any]) -> dict[str, Tensor]:
        batch = next(value.shape[0] for value in given.values() if isinstance(value, Tensor))
        inputs = {
            spec.name: given[spec.name]
            if isinstance(given[spec.name], Tensor)
            else torch.full((batch,), given[spec.name], dtype=getattr(torch, spec.dtype))
            for spec in signature.inputs
        }
        return dict(zip(names, store.call_outputs(module, inputs), strict=True))

    return call


def unrolled(
    student: Student,
    networks: Mapping[str, nn.Module],
    signatures: Mapping[str, Signature],
    job: Job,
) -> dict[str, tuple[nn.Module, Signature]]:
    """Return the graphs of a sampler as one: the generator, and a text encoder that stays outside.

    Args:
        student: Whose sampler it is.
        networks, signatures: Its networks by name; their batch is that of the graphs.
        job: Names the sampler and says whether the text encoder is inside.

    Raises:
        ConfigError: If the student has no such sampler, or it cannot become one graph.
    """
    table = choose(student.samplers, job.sampler)
    inside = job.settings["text_inside"]
    generator = Generator(
        table, networks, signatures, text_inside=inside, tokenize=student.tokenize
    )
    signature = generator.signature.with_batch(job.settings["batch"] or BATCH)
    graphs: dict[str, tuple[nn.Module, Signature]] = {GENERATOR: (generator, signature)}
    text = table.condition("text")
    if not inside and text is not None:
        graphs |= {name: (networks[name], signatures[name]) for name in text.encoders}
    return graphs
