"""DoRA: W' = diag(μ / ‖W + s B A‖) (W + s B A) (Liu et al. 2024, arXiv:2402.09353, eq. 5), on every layer LoRA knows.

The direction V = W + s B A learns as in LoRA, the length of each row of W' is a parameter μ of its own. As in section
4.3 of the paper, the norm is a constant to autograd. With c = μ / ‖V‖ the update of the output is
(c − 1) ⊙ (W * x) + c ⊙ s B (A * x), where the layer has made W * x already.

The norm needs no V: ‖V_i‖² = ‖W_i‖² + ⟨s B_i, 2 W_i Aᵀ + s B_i A Aᵀ⟩, with W Aᵀ ``(m, r)`` and A Aᵀ ``(r, r)``.
Deviations from the paper: a row is an output channel of the layer, over all of its inputs and its kernel, as in all
code of DoRA, while the paper's text normalises the column of each input (of a parameter whose use is not known, a row
is what lies behind one index of its first axis); s and growth are those of :class:`~flowra_adapters.LoRA`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from flowra_adapters.adapter import Base
from flowra_adapters.lora import LoRA
from flowra_adapters.operators import Operator

__all__ = ["DoRA"]

SMALLEST_NORM = 1e-30  # so that a row without length is μ / this long: finite, and 0 for μ = 0


class DoRA(LoRA):
    """Low-rank update of a layer's directions, and a magnitude for each of its output channels.

    At birth μ is the length of each row of W, so c = 1 and the output of the layer is unchanged, bit by bit. An adapter
    of rank 0 has no magnitude; growing from there makes one. Resizing from other ranks leaves μ as it is, so growth
    does not change the output, and after a shrink each row of W' still has the length μ. A row of W that is zero has
    μ = 0 and stays zero.

    Args:
        operator: of the layer.
        rank: 0 ≤ rank ≤ min(m, n·∏k) / g.
        scaling: s, a finite number other than 0; constant for the life of the adapter.
        dropout: probability in [0, 1) of dropping an input element, in training mode. Where it acts, W * x in the
            update is made of the dropped input, too.
        dtype: of factors and magnitude. Device: of the generator.
        generator: source of randomness.

    Attributes:
        lora_A: ``(r, n·∏k)``. Replaced by a new Parameter whenever the rank changes.
        lora_B: ``(m, r)``. Likewise.
        lora_magnitude: μ ``(m,)``, or None at rank 0 and before the adapter is put on a site.

    Raises:
        ValueError: if rank, scaling or dropout is out of range.
    """

    reads_base: ClassVar[bool] = True
    lora_magnitude: nn.Parameter | None

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
        self._base_weight: Callable[[], Tensor] | None = None
        self._row_energies = _RowEnergies()
        super().__init__(operator, rank=rank, scaling=scaling, dropout=dropout, dtype=dtype, generator=generator)

    def placed(self, base_weight: Callable[[], Tensor]) -> None:
        """Take the magnitude from the base weight."""
        self._base_weight = base_weight
        self._fit_magnitude()

    def cost(self, rank: int) -> int:
        """Count m + n·∏k parameters for each unit of rank, and m for the magnitude."""
        return super().cost(rank) + (self.operator.out_size if rank > 0 else 0)

    def forward(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Map the layer's input to the update of its output; computed in the dtype of the factors."""
        assert base is not None
        gain = self.plain_gain(base.weight).view(-1, *(1,) * (-1 - self.operator.channel_dim))
        output = base.output
        if self._drops:
            x = self._drop(x)
            output = self.operator.apply(x, base.weight)
        return (gain - 1) * output + gain * self._apply_factors(x)

    def plain_gain(self, weight: Tensor) -> Tensor:
        """Return c = μ / ‖V‖ of each row ``(m,)``, in at least float32; differentiable in μ only.

        W Aᵀ may be computed in float32 here. Its rounding errors grow by the square of (‖W_i‖ + ‖s (B A)_i‖) / ‖V_i‖,
        which is large only where A holds nearly all of W_i, as few directions among many do not. So this is done where
        A has less than a quarter as many rows as columns.
        """
        narrow = 4 * self.rank < self.operator.in_size // self.operator.groups
        return self._gain(self._row_norms(weight, torch.float32 if narrow else torch.float64))

    def _gain(self, norms: Tensor) -> Tensor:
        assert self.lora_magnitude is not None, "DoRA takes its magnitude from the site that attach puts it on"
        wide = torch.promote_types(self.lora_magnitude.dtype, torch.float32)
        # The norm is rounded as μ once was: c = 1 at birth in every dtype.
        norms = norms.to(self.lora_magnitude.dtype).to(wide)
        return self.lora_magnitude.to(wide) / norms.clamp_min(SMALLEST_NORM)

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return diag(c) (W + s B A) − W in the standard layout, computed in at least float32."""
        delta = super().delta_weight()
        if self.rank == 0:
            return delta
        assert weight is not None
        gain = self._gain(self.row_norms(weight)).view(-1, *(1,) * (weight.ndim - 1))
        return (gain - 1) * weight.to(delta.dtype) + gain * delta

    def row_norms(self, weight: Tensor) -> Tensor:
        """Return ‖W_i + s (B A)_i‖ of each output channel ``(m,)``, detached, in float64 where the device has it.

        Args:
            weight: W in the standard layout. Its own ‖W_i‖² are kept until it changes; a change in place through
                ``.data``, which PyTorch does not record, is seen after the next ``train()`` or ``eval()``.
        """
        return self._row_norms(weight, torch.float64)

    @torch.no_grad()
    def _row_norms(self, weight: Tensor, products_in: torch.dtype) -> Tensor:
        """Compute W Aᵀ in at least this dtype, and the rest in float64."""
        lora_A, lora_B = (each.detach() for each in self._factors())
        groups, rank = self.operator.groups, len(lora_A)
        m, n = self.operator.out_size // groups, self.operator.in_size // groups
        exact = torch.float32 if weight.device.type == "mps" else torch.float64
        wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), min(products_in, exact, key=_width))
        blocks_A = lora_A.view(rank, groups, n).transpose(0, 1)
        blocks_B = lora_B.to(exact).view(groups, m, rank)
        with _full_precision(weight.device.type):
            products = weight.reshape(groups, m, n).to(wide) @ blocks_A.to(wide).mT
            blocks_A = blocks_A.to(exact)
            gram = blocks_A @ blocks_A.mT
            inner = torch.baddbmm(products.to(exact), blocks_B, gram, beta=2, alpha=self.scaling)
        gained = (blocks_B * inner).sum(-1).flatten()
        return (self._row_energies.of(weight, exact) + self.scaling * gained).clamp_min(0).sqrt()

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Install new factors of any common rank as new Parameters; the magnitude stays, and is there if rank > 0.

        An optimiser that holds the old Parameters must be told: that is the caller's part.
        """
        super().replace_factors(lora_A, lora_B)
        self._fit_magnitude()

    def replace_magnitude(self, lora_magnitude: Tensor) -> None:
        """Install another μ ``(m,)`` as a new Parameter, in the dtype given; ``requires_grad`` is that of B.

        Raises:
            ValueError: if it does not fit the layer, or the rank is 0.
        """
        m = self.operator.out_size
        if lora_magnitude.shape != (m,) or self.rank == 0:
            raise ValueError(
                f"lora_magnitude must have shape ({m},) and rank ≥ 1, got {tuple(lora_magnitude.shape)} at {self.rank}"
            )
        self.lora_magnitude = nn.Parameter(lora_magnitude.detach().clone(), requires_grad=self.lora_B.requires_grad)

    def _fit_magnitude(self) -> None:
        """Drop the magnitude at rank 0; elsewhere, if there is none, let the output be what it would be with c = 1."""
        if self.rank == 0 or "lora_magnitude" not in self._parameters:
            self.register_parameter("lora_magnitude", None)
        if self.rank > 0 and self.lora_magnitude is None and self._base_weight is not None:
            self.replace_magnitude(self.row_norms(self._base_weight()).to(self.lora_A.dtype))

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and look at the base weight anew."""
        self._row_energies = _RowEnergies()
        return super().train(mode)


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Keep autocast away from the products."""
    acts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if acts else nullcontext()


class _RowEnergies:
    """‖W_i‖² of the weight last seen; computed again when it is another one, or has changed.

    A weight is known by its memory, which is not kept alive but cannot be mistaken for a later one at its address, and
    by its version, which every change in place counts up.
    """

    def __init__(self) -> None:
        self._seen: tuple[object, ...] | None = None
        self._energies = torch.empty(0)

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return them ``(m,)`` in this dtype, which all of the sum is made in."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or weight.is_inference():
            return _row_energies(weight, dtype)
        memory = StorageWeakRef(weight.untyped_storage())
        seen = (memory, weight._version, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, dtype)
        if seen != self._seen:
            self._energies = _row_energies(weight, dtype)
            self._seen = seen
        return self._energies

    def __deepcopy__(self, memo: dict[int, Any]) -> "_RowEnergies":
        """Know nothing: the copy of the weight is another one."""
        return _RowEnergies()

    def __reduce__(self) -> tuple[type["_RowEnergies"], tuple[()]]:
        """Know nothing in another process."""
        return _RowEnergies, ()


def _row_energies(weight: Tensor, dtype: torch.dtype) -> Tensor:
    few = max(1, 2**22 // (weight.numel() // len(weight)))  # rows at a time: a wide copy of all of W may be large
    return torch.cat([rows.to(dtype).flatten(1).square().sum(1) for rows in weight.split(few)])
