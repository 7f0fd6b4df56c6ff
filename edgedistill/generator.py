"""A sampler that is one graph, noise and conditions in and finished samples out: its border, and how it is run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from edgedistill.contract import BATCH, Signature, TensorSpec
from edgedistill.errors import ContractError
from edgedistill.noise import bank_shapes
from edgedistill.sampler import NULL, Array, Network, embedded
from edgedistill.table import SamplerTable

GENERATOR = "generator"
"""Name of the network that is a whole sampler."""
OUTPUT = "image"


def noise_names(table: SamplerTable) -> tuple[str, ...]:
    """Return the input of each entry of the noise bank.

    One input per entry: entries of a cascade differ in shape, and with the batch as the leading axis of
    every input a batch can be cut up and padded as that of any network.
    """
    return tuple(f"noise_{index}" for index in range(table.noise_count))


def generator_signature(
    table: SamplerTable, signatures: Mapping[str, Signature], *, text_inside: bool = True
) -> Signature:
    """Return what a table with its networks takes and gives as one graph, with a free batch.

    Args:
        table: The sampler.
        signatures: Of each network that it calls, by name.
        text_inside: Whether the text encoders belong to the graph, which then takes tokens; else it takes
            what they make of them.

    Returns:
        Inputs: the noise bank, then what the networks are given and neither the table nor another network
        makes, then pictures that only rows use. Output: `OUTPUT`.
    """
    shapes = bank_shapes(table)
    inputs = {
        name: TensorSpec(name, (BATCH, *shape), "float32", "noise")
        for name, shape in zip(noise_names(table), shapes, strict=True)
    }
    inputs |= {spec.name: spec for spec in _asked_for(table, signatures, text_inside=text_inside)}
    for item in table.conditions:
        if item.kind in ("image", "mask") and item.shape is not None:
            spec = TensorSpec(item.name, (BATCH, *item.shape), "float32", item.kind)
            inputs.setdefault(item.name, spec)
    shape: tuple[int | str, ...] = (BATCH, *table.stages[-1].shape)
    if table.decoder is not None:
        shape = signatures[table.decoder].outputs[0].shape
    # A graph gives nothing under the name of what it takes.
    graph = f"{OUTPUT}_out" if OUTPUT in inputs else None
    output = TensorSpec(OUTPUT, shape, "float32", "image", graph)
    return Signature(tuple(inputs.values()), (output,)).with_batch(BATCH)


def _asked_for(
    table: SamplerTable, signatures: Mapping[str, Signature], *, text_inside: bool
) -> Iterator[TensorSpec]:
    """Yield the inputs of networks that the caller gives."""
    text = table.condition("text")
    made = {table.state_input, *(stage.carry_to for stage in table.stages)}
    if text_inside and text is not None and text.encoders:
        readers = [signatures[name] for name in text.encoders]
        (tokens,) = readers[0].inputs
        several = (len(readers),) if len(readers) > 1 else ()
        yield dataclasses.replace(tokens, shape=(BATCH, *several, *tokens.shape[1:]))
        made |= {spec.name for reader in readers for spec in reader.outputs}
    for row in table.rows:
        fed = made | set(row.feeds)
        for name in row.call:
            yield from (spec for spec in signatures[name].inputs if spec.name not in fed)
            fed |= {spec.name for spec in signatures[name].outputs}


def run_generator(
    table: SamplerTable,
    networks: Mapping[str, Network],
    noise: Sequence[Array],
    conditions: Mapping[str, Array],
) -> Array:
    """Return what `edgedistill.sampler.run_table` returns, of the one graph that the table became.

    Args:
        table: The sampler that was unrolled.
        networks: `GENERATOR`, and the text encoders where they are not inside.
        noise, conditions: As `run_table` takes them.

    Raises:
        ContractError: If the bank or a condition does not fit the graph.
    """
    if len(noise) != table.noise_count:
        msg = f"The table needs a noise bank of {table.noise_count} arrays, got {len(noise)}."
        raise ContractError(msg)
    # The null text is a constant of the graph.
    given = {name: value for name, value in conditions.items() if not name.startswith(NULL)}
    text = table.condition("text")
    if text is not None and set(text.encoders) <= set(networks):
        given |= embedded(networks, text, given)
    bank = dict(zip(noise_names(table), noise, strict=True))
    return networks[GENERATOR]({**given, **bank})[OUTPUT]
