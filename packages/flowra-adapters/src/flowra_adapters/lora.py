"""LoRA: ΔW = s · B A (Hu et al. 2022, arXiv:2106.09685, section 4.1), on every layer with a known operator.

Conventions: A is ``(r, n·∏k)``, B is ``(m, r)`` for a weight ``(m, n/g, *kernel)``; y += s · B (A * x). A convolution
in g groups gets an update of rank r in each of them: block j of B's rows times block j of A's columns, so that
parameters, growth and cost are those of one group, and every rank is allowed.
Deviations from the paper: ``s`` is a constant of the module, fixed at birth, and not α/r of the current rank; an update
may start from factors other than B = 0 without touching the base (:class:`LoRA`, ``offset``).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_adapters.adapter import Adapter, Base, refuse_sharded
from flowra_adapters.operators import EmbeddingOperator, Operator, ParameterOperator

__all__ = ["LoRA"]


class LoRA(Adapter):
    """Low-rank update of a layer.

    At birth one factor is zero, so the output of the layer is unchanged, bit by bit: B, while A is uniform on
    ±1/√(n·∏k); on an embedding A, while B is standard normal.

    Args:
        operator: of the layer.
        rank: 0 ≤ rank ≤ min(m, n·∏k) / g.
        scaling: s, a finite number other than 0; constant for the life of the adapter.
        dropout: probability in [0, 1) of dropping an input element, in training mode, on the adapter's path only.
        dtype: of both factors. Device: of the generator.
        generator: source of randomness.

    Attributes:
        lora_A: ``(r, n·∏k)``. Replaced by a new Parameter whenever the rank changes.
        lora_B: ``(m, r)``. Likewise.
        offset_A, offset_B: None, or constant factors of which s · offset_B · offset_A is taken off the update: the
            start of a trained pair that did not start at zero (:meth:`start_from`).
        observer: called with z = A x, or None.

    Raises:
        ValueError: if rank, scaling or dropout is out of range.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    offset_A: Tensor | None
    offset_B: Tensor | None

    def __init__(
        self,
        operator: Operator,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__(operator, scaling=scaling)
        _check(operator, rank, scaling, dropout)
        self.dropout = dropout
        self.register_buffer("offset_A", None)
        self.register_buffer("offset_B", None)
        m, n = operator.out_size, operator.in_size
        lora_A, lora_B = (torch.zeros(shape, dtype=dtype, device=generator.device) for shape in ((rank, n), (m, rank)))
        if isinstance(operator, EmbeddingOperator):
            lora_B.normal_(generator=generator)
        else:
            bound = 1 / math.sqrt(n)
            lora_A.uniform_(-bound, bound, generator=generator)
        self.replace_factors(lora_A, lora_B)

    @property
    def rank(self) -> int:
        """Current rank r."""
        return self.lora_A.shape[0]

    def cost(self, rank: int) -> int:
        """Count m + n·∏k parameters for each unit of rank."""
        return rank * (self.operator.out_size + self.operator.in_size)

    def forward(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Map the layer's input to the update of its output; computed in the dtype of the factors."""
        return self._apply_factors(self._drop(x))

    @property
    def _drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.dropout > 0

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x.to(self.lora_A.dtype), self.dropout) if self._drops else x

    def _apply_factors(self, x: Tensor) -> Tensor:
        """Map the input, after dropout, to s · B (A * x)."""
        if self.observer is not None:
            return self._observed(x, self.observer)
        lora_A, lora_B = self._factors()
        return self.operator.pointwise(self.operator.down(x, lora_A), lora_B) * self.scaling

    def _observed(self, x: Tensor, observer: Callable[[Tensor], None]) -> Tensor:
        """Apply the update with z, channels last, as a tensor of the graph that gradients pass."""
        z = self.operator.down(x, self.lora_A).movedim(self.operator.channel_dim, -1)
        observer(z)
        update = self.operator.pointwise(z.movedim(-1, self.operator.channel_dim), self.lora_B)
        if self.offset_A is not None and self.offset_B is not None:
            update = update - self.operator.pointwise(self.operator.down(x, self.offset_A), self.offset_B)
        return update * self.scaling

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return the factors, unless dropout acts or they hold more than A while an observer wants to see z = A x."""
        if self._drops or (self.observer is not None and self.offset_A is not None):
            return None
        return self._factors()

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return s · B A in the standard layout, computed in at least float32."""
        lora_A, lora_B = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in self._factors())
        return self.scaling * self.operator.product(lora_B, lora_A)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, and behind them those of the offset."""
        if self.offset_A is None or self.offset_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.offset_A]), torch.cat([self.lora_B, -self.offset_B], 1)

    def start_from(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install factors with B A ≠ 0 and subtract their product as a constant: the output stays what it was.

        The update is then s · (B A - offset_B offset_A). This is how initialisations that take their start out of the
        base weight (PiSSA, OLoRA, …) work here without changing the base.
        """
        self.replace_factors(lora_A.to(self.lora_A), lora_B.to(self.lora_B))
        self.offset_A, self.offset_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def grow(self, rows: Tensor) -> None:
        """Append ``rows`` ``(k, n)`` to A and k zero columns to B: ΔW is unchanged, ∂L/∂B of the new columns is not 0.

        Raises:
            ValueError: if the rows do not fit the layer, the new rank would exceed its largest, or the factors are
                sharded over processes.
        """
        refuse_sharded(self.lora_A)
        n, largest = self.operator.in_size, self.operator.max_rank
        if rows.ndim != 2 or rows.shape[1] != n:
            raise ValueError(f"rows must have shape (k, {n}), got {tuple(rows.shape)}")
        if self.rank + len(rows) > largest:
            raise ValueError(f"rank must be in [0, {largest}], got {self.rank} + {len(rows)}")
        new_columns = self.lora_B.new_zeros(len(self.lora_B), len(rows))
        self.replace_factors(
            torch.cat([self.lora_A.detach(), rows.to(self.lora_A)]), torch.cat([self.lora_B.detach(), new_columns], 1)
        )

    def shrink(self, keep: Sequence[int]) -> None:
        """Keep the rank slices ``keep``; ΔW loses exactly the products of the others.

        Raises:
            ValueError: if an index is out of range or given twice, or the factors are sharded over processes.
        """
        refuse_sharded(self.lora_A)
        if len(set(keep)) != len(keep) or not all(0 <= index < self.rank for index in keep):
            raise ValueError(f"keep must hold distinct indices in [0, {self.rank}), got {list(keep)}")
        index = torch.tensor(list(keep), dtype=torch.long, device=self.lora_A.device)
        self.replace_factors(self.lora_A.detach()[index], self.lora_B.detach()[:, index])

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of any common rank as new Parameters; ``requires_grad`` is carried over.

        An optimiser that holds the old Parameters must be told: that is the caller's part.

        Raises:
            ValueError: if the old Parameters are sharded over processes.
        """
        trained_A = trained_B = True  # at birth
        if "lora_A" in self._parameters:
            refuse_sharded(self.lora_A)
            trained_A, trained_B = self.lora_A.requires_grad, self.lora_B.requires_grad
        self.lora_A = nn.Parameter(lora_A.detach().contiguous(), requires_grad=trained_A)
        self.lora_B = nn.Parameter(lora_B.detach().contiguous(), requires_grad=trained_B)

    def extra_repr(self) -> str:
        """Show what defines the adapter in ``print(model)``."""
        m, n = self.operator.out_size, self.operator.in_size
        return (
            f"in_features={n}, out_features={m}, rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        )


def _check(operator: Operator, rank: int, scaling: float, dropout: float) -> None:
    if not 0 <= rank <= operator.max_rank:
        raise ValueError(f"rank must be in [0, {operator.max_rank}] for a weight {operator.shape}, got {rank}")
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling must be finite and not 0, got {scaling}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout > 0 and isinstance(operator, EmbeddingOperator):
        raise ValueError(f"dropout must be 0 on an embedding, whose input are ids, got {dropout}")
    if dropout > 0 and isinstance(operator, ParameterOperator):
        raise ValueError(f"dropout must be 0 on a parameter whose input is not known, got {dropout}")
