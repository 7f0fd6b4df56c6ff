"""What a network weighs and what one call of it takes, told from its configuration: no weight is read, nothing is computed."""

import functools
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from edgedistill.contract import Signature
from edgedistill.files import read_json
from edgedistill.models import store
from edgedistill.student import Student
from edgedistill.tables import networks_of

from .frozen import Frozen, examples
from .networks import signatures_of, weight_bytes

META = torch.device("meta")


@dataclass(frozen=True)
class Size:
    """What a network weighs, and what one call with one sample takes.

    Fields:
        weights: Bytes of float32 weights.
        layer: Bytes of the largest tensor that a layer makes.
        attention: Bytes of the largest matrix of attention weights, which PyTorch never holds as a whole.
        flops: Floating-point operations, a multiplication and its sum being two.
    """

    weights: int
    layer: int = 0
    attention: int = 0
    flops: int = 0


def sizes_of(student: Student, names: Collection[str]) -> dict[str, Size]:
    """Return what networks of a student take, by name.

    What its tables call and it does not hold, or holds otherwise than its manifest says, is left out: it is refused,
    with its reason, when the networks are opened.

    Args:
        student: Its signatures say the size of the images.
        names: Of networks.
    """
    if not set(networks_of(student.samplers)) <= set(student.signatures):
        return {}
    signatures = signatures_of(student, 1)
    found: dict[str, Size] = {}
    for name in names:
        config = student.folder(name) / "config.json"
        size = _size(json.dumps(read_json(config)), str(config), signatures[name])
        found |= {} if size is None else {name: size}
    return found


def together(sizes: Sequence[Size]) -> Size:
    """Return what networks take in one process, one called after another."""
    return Size(
        sum(size.weights for size in sizes),
        max(size.layer for size in sizes),
        max(size.attention for size in sizes),
        sum(size.flops for size in sizes),
    )


@functools.cache
def _size(config: str, source: str, signature: Signature) -> Size | None:
    """Return what a network takes that has a configuration, as JSON, and is asked for a signature; None: it cannot be."""
    with init_empty_weights():
        network = store.facing(store.build(json.loads(config), source), signature)
    stated, own = ([spec.name for spec in s.inputs] for s in (signature, store.signature(network)))
    return size_of(network.to(META), signature) if stated == own else None


def size_of(network: nn.Module, signature: Signature) -> Size:
    """Return what a network takes whose weights are on the device ``meta``.

    Args:
        network: In any mode.
        signature: Of a fixed batch, whose sizes are counted.
    """
    frozen = Frozen(network, signature)
    inputs = [value.to(META) for value in examples(signature)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Largest(network) as largest:
        frozen(*inputs)
    flops = int(counter.get_total_flops())
    return Size(weight_bytes(network), largest.layer, largest.attention, flops)


class _Largest(TorchFunctionMode):
    """Watches what is computed for the largest tensors, those of the network itself left out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layer = self.attention = 0
        held = (*network.parameters(), *network.buffers())
        self._own = {value.untyped_storage()._cdata for value in held}

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call one function, and look at what it makes."""
        given = dict(kwargs or {})
        made = func(*args, **given)
        if func is F.scaled_dot_product_attention:
            query, key = [*args, *(given[name] for name in ("query", "key") if name in given)][:2]
            cells = math.prod(query.shape[:-1]) * key.shape[-2]
            self.attention = max(self.attention, cells * query.element_size())
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._own:
                    self.layer = max(self.layer, storage.nbytes())
        return made
