"""The bundle's calibration probes, cut into batches that an artifact takes."""

import numpy as np

from edgedistill.bundle import CALIBRATION, Bundle
from edgedistill.contract import Signature
from edgedistill.errors import BundleError
from edgedistill.network import in_dialect
from edgedistill.probes import load_probes

Batch = dict[str, np.ndarray]


def calibration_batches(
    bundle: Bundle, network: str, signature: Signature, subset_size: int
) -> list[Batch]:
    """Return what the table's own rows feed a network (arXiv:2211.15736 shows why nothing else will do).

    The probes lie in the order of the calls, so they are shuffled (always alike) before the subset is
    taken: a small one still meets every row.

    Args:
        bundle: Holds the probes.
        network: The network's name.
        signature: Of the artifact; a free batch gets batches of one.
        subset_size: Most samples to use; the last batch is filled up with samples of the first.

    Returns:
        One dictionary of inputs per batch, by their names in the graph, as the signature says.

    Raises:
        BundleError: If the bundle holds no probes for this network.
    """
    path = bundle.root / CALIBRATION
    probes = load_probes(path)
    names = {spec.name: f"{network}.{spec.name}" for spec in signature.inputs}
    if missing := sorted(set(names.values()) - set(probes)):
        msg = f"{path}: no calibration probes {', '.join(missing)}; export the bundle anew."
        raise BundleError(msg)
    count = len(probes[next(iter(names.values()))])
    generator = np.random.Generator(np.random.Philox(key=0))
    chosen = generator.permutation(count)[:subset_size]
    size = signature.batch or 1
    batches = np.resize(chosen, (-(-len(chosen) // size), size))
    return [
        in_dialect(signature, {name: probes[held][index] for name, held in names.items()})
        for index in batches
    ]
