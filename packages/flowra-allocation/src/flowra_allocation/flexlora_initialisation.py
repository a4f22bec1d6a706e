"""What the new directions of FlexLoRA are (docs/methods.md, section 7).

=============  =============================================  ===========================  ==================
name           row a and column b                             E                            ∂L/∂E at the start
=============  =============================================  ===========================  ==================
zero_impact    Gaussian, as long as those that are there      0: the update stays          s bᵀ G a ≠ 0
orthogonal     likewise, less their part in the span of       0                            s bᵀ G a ≠ 0
               those
small          as with zero_impact                            0.01 of the mean size of E   s bᵀ G a ≠ 0
zero           0                                              0                            0, as of a and b
=============  =============================================  ===========================  ==================

``zero_impact`` is the paper's (Liu, Si & Jia 2026, arXiv:2601.22905), with lengths that its text leaves open and its
released code has wrong: see :mod:`flowra_allocation.flexlora_compat`. The others are from its ablation, for which
neither formulas nor code were published: they are reconstructed. A direction of ``zero`` never learns anything.
"""

from typing import Literal

import torch
from torch import Tensor

from flowra_allocation.policy import LayerView, NewTriplets

__all__ = ["Initialisation", "new_direction"]

Initialisation = Literal["zero_impact", "small", "zero", "orthogonal"]
"""What a new direction is."""

SMALL = 0.01


def new_direction(view: LayerView, initialisation: Initialisation, generator: torch.Generator) -> Tensor | NewTriplets:
    """Make one direction for an update of triplets.

    Args:
        view: of the update as it is, rank < min(m, n).
        initialisation: what to make.
        generator: on the CPU; what is drawn depends on it and on shapes alone.

    Returns:
        A row ``(1, n)`` for ``zero_impact``, whose length and column the layer makes; else all values. Of the dtype and
        on the device of the factors.
    """
    assert view.lora_E is not None
    rows, columns = view.lora_A.double(), view.lora_B.T.double()
    row, column = (
        torch.randn(1, each.shape[1], generator=generator, dtype=torch.float64).to(each.device)
        for each in (rows, columns)
    )
    value = 0.0
    if initialisation == "zero_impact":
        return row.to(view.lora_A)
    if initialisation == "orthogonal":
        row, column = _outside(row, rows), _outside(column, columns)
    if initialisation == "small":
        value = SMALL * _mean(view.lora_E.double().abs())
    length, width = (0.0, 0.0) if initialisation == "zero" else (_mean(each.norm(dim=1)) for each in (rows, columns))
    return NewTriplets(
        lora_A=(row / row.norm() * length).to(view.lora_A),
        lora_E=view.lora_E.new_full((1,), value),
        lora_B=(column / column.norm() * width).T.to(view.lora_B),
    )


def _mean(lengths: Tensor) -> float:
    """Return the mean; 1 if there are none, or all are zero."""
    mean = float(lengths.mean()) if len(lengths) else 0.0
    return mean if mean > 0 else 1.0


def _outside(vector: Tensor, span: Tensor) -> Tensor:
    """Return what is left of ``(1, n)`` off the span of the rows of ``(r, n)``, r < n."""
    basis = torch.linalg.qr(span.T).Q
    for _ in range(2):  # once more for what rounding left
        vector = vector - vector @ basis @ basis.T
    return vector
