"""From pairs to triplets: the same updates, with directions that can be weighed and taken away one by one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowra_adapters import SVDForm, attach, detach
from flowra_pipelines.stages.setting import lora_layers

__all__ = ["as_triplets", "triplets_of"]


def as_triplets(model: nn.Module, method: str, *, heads: Sequence[str], seed: int) -> None:
    """Put triplets with the same updates in the place of a model's pairs; those of rank 0 are taken off.

    Args:
        model: changed in place.
        method: ``svd`` or ``svd_masked``.
        heads: modules trained in full.
        seed: of what the triplets will draw.
    """
    pairs = {name: layer for name, layer in lora_layers(model).items() if layer.rank}
    scaling = {layer.scaling for layer in pairs.values()}.pop()
    values = {name: triplets_of(layer.lora_A, layer.lora_B) for name, layer in pairs.items()}
    device = next(iter(pairs.values())).lora_A.device
    detach(model)
    made = attach(
        model,
        {name: len(lora_E) for name, (_, lora_E, _) in values.items()},
        method=method,
        scaling=scaling,
        modules_to_save=heads,
        generator=torch.Generator(device).manual_seed(seed),
    )
    for name, layer in made.items():
        assert isinstance(layer, SVDForm)
        lora_A, lora_E, lora_B = values[name]
        layer.replace_factors(lora_A, lora_B, lora_E)


def triplets_of(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose B A = B' diag(E) A' with orthonormal rows of A' and columns of B', and E ≥ 0 falling.

    Args:
        lora_A: ``(r, n)``, r ≤ n.
        lora_B: ``(m, r)``, r ≤ m.

    Returns:
        A' ``(r, n)``, E ``(r,)``, B' ``(m, r)``, of the dtype of A, on the CPU; computed in float64. A direction that
        the product lacks is there, too, with E = 0.
    """
    a, b = (each.detach().to("cpu", torch.float64) for each in (lora_A, lora_B))
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, values, vt = torch.linalg.svd(r_b @ r_a.T)
    return (vt @ q_a.T).to(lora_A.dtype), values.to(lora_A.dtype), (q_b @ u).to(lora_A.dtype)
