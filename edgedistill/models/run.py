"""Torch networks run by sampler tables: the PyTorch side of `edgedistill.sampler`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgedistill.conditions import Tokenize, network_conditions
from edgedistill.contract import Signature
from edgedistill.models import store
from edgedistill.models.denoiser import Denoiser
from edgedistill.noise import Bank, noise_bank
from edgedistill.sampler import Network, run_table
from edgedistill.table import SamplerTable


def torch_networks(modules: Mapping[str, nn.Module]) -> dict[str, Network]:
    """Return callables from named inputs to named outputs, as `run_table` wants them.

    Each picks the inputs of its module's signature, repeats numbers over the batch, casts to the
    signature's dtypes on the module's device, and calls without gradients.
    """
    return {
        name: torch.no_grad()(_network(module, store.signature(module)))
        for name, module in modules.items()
    }


def network_of(denoiser: Denoiser) -> Network:
    """Return a denoiser's network as `run_table` wants it; with gradients, where they are on."""
    return _network(denoiser.network, denoiser.signature)


def _network(module: nn.Module, signature: Signature) -> Network:
    outputs = [spec.name for spec in signature.outputs]
    device = next(module.parameters()).device

    def run(given: Mapping[str, Any]) -> dict[str, Tensor]:
        batch = len(given[signature.inputs[0].name])
        inputs = {}
        for spec in signature.inputs:
            value = torch.as_tensor(given[spec.name], dtype=getattr(torch, spec.dtype)).to(device)
            inputs[spec.name] = value.expand(batch) if value.ndim == 0 else value
        return dict(zip(outputs, store.call_outputs(module, inputs), strict=True))

    return run


def sample_torch(
    modules: Mapping[str, nn.Module],
    table: SamplerTable,
    count: int,
    *,
    seed: int = 0,
    guidance_scale: float | None = None,
    noise: Bank | None = None,
    batch: int = 250,
    tokenize: Tokenize | None = None,
    **conditions: Any,
) -> np.ndarray:
    """Sample as `Pipeline` does, with torch networks that need not be exported.

    Args:
        modules: By the names that the table calls; those that no sample needs may be missing.
        table: The sampler.
        count: Number of samples.
        seed: Sample i is made from ``seed + i``, whatever the batch.
        guidance_scale: g; None: the table's default.
        noise: A noise bank to use instead of the seed.
        batch: Samples at a time.
        tokenize: Turns prompts into tokens, such as `Tokenizer.encode`.
        **conditions: As `network_conditions`; classes that are left out are taken in turn.

    Returns:
        float32 (count, channels, height, width).

    Raises:
        ContractError: If the conditions, the noise or the networks do not fit the table.
    """
    given = network_conditions(table, count, guidance_scale, conditions, tokenize)
    networks = torch_networks(modules)
    device = next(next(iter(modules.values())).parameters()).device
    pieces = []
    for start in range(0, count, batch):
        part = slice(start, min(count, start + batch))
        bank = (
            noise_bank(table, [seed + i for i in range(part.start, part.stop)])
            if noise is None
            else [array[part] for array in noise]
        )
        made = run_table(
            table,
            networks,
            [torch.from_numpy(array).to(device) for array in bank],
            {name: torch.tensor(value[part], device=device) for name, value in given.items()},
        )
        pieces.append(made.cpu().numpy())
    return np.concatenate(pieces)


def run_batches(module: nn.Module, array: np.ndarray, batch: int = 64) -> dict[str, np.ndarray]:
    """Run a network of one input over an array, a part at a time.

    Returns:
        float32 outputs by the names of the network's signature.
    """
    signature = store.signature(module)
    name = signature.inputs[0].name
    run = torch_networks({name: module})[name]
    pieces = [run({name: array[start : start + batch]}) for start in range(0, len(array), batch)]
    return {
        spec.name: np.concatenate([piece[spec.name].float().cpu().numpy() for piece in pieces])
        for spec in signature.outputs
    }
