"""What decides the weight of each adapter at each position: gates, fixed weights, or routing that was never trained.

=====================  ==============================================================  ==========
routing                weights at a module, for its input x                            learns
=====================  ==============================================================  ==========
:class:`~.Gates`       softmax(W_g h / τ) + b                                          yes
:class:`StaticWeights` the same everywhere: task-level fusion                          no (search)
:class:`Arrow`         softmax of the k' largest |⟨x, vᵢ⟩|, vᵢ the first right         no
                       singular vector of ΔWᵢ
:class:`SpectR`        softmax of ‖ΔWᵢ x‖                                              no
=====================  ==============================================================  ==========

Sources: Ostapenko et al. 2024, *Towards Modular LLMs by Building and Reusing a Library of LoRAs* (arXiv:2405.11157),
section 4 (Arrow); Fleshman and Van Durme 2025, *SpectR* (arXiv:2504.03454), section 3. Deviations: an adapter that does
not update a module takes no part in the softmax there and has weight 0; SpectR's norm is counted from B's Gram matrix
and the coordinates A x that the update needs anyway, which is ‖Σ Vᵀ x‖ without a new basis.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from flowra_compose.fusion.gates import Level
from flowra_compose.lazy_updates import outlines_of
from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.product_svd import product_svd

__all__ = ["Arrow", "Routing", "SpectR", "StaticWeights", "UntrainedRouting"]


class Routing(Protocol):
    """Gives the weights of k adapters at a place."""

    @property
    def level(self) -> Level:
        """Where it looks, see :class:`GateOptions`."""

    @property
    def adapters(self) -> int:
        """How many, k."""

    def weights(self, place: str, hidden: Tensor, coordinates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weigh the adapters.

        Args:
            place: name of the block or module, ``""`` at level ``step``.
            hidden: what is looked at there, ``(…, d)``.
            coordinates: at level ``module`` A x of all adapters that update it, ``(…, Σ rᵢ)``.

        Returns:
            The weights, and the shares of a softmax in them, each ``(…, k)``.
        """


class StaticWeights(nn.Module):
    """The same weights at every position of every module: fusion as a merge would do it.

    Args:
        weights: one for each adapter, finite.

    Raises:
        ValueError: if there is none, or one is not finite.
    """

    level: Level = "module"

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        if not weights or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite numbers, at least one, got {list(weights)}")
        self.values: Tensor
        self.register_buffer("values", torch.tensor(list(weights), dtype=torch.float64), persistent=False)

    @property
    def adapters(self) -> int:
        """How many, k."""
        return len(self.values)

    def weights(self, place: str, hidden: Tensor, coordinates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the weights to every position; as shares, their magnitudes over their sum."""
        values = self.values.to(torch.promote_types(hidden.dtype, torch.float32))
        shares = values.abs() / values.abs().sum().clamp_min(torch.finfo(values.dtype).tiny)
        return values.expand(*hidden.shape[:-1], -1), shares.expand(*hidden.shape[:-1], -1)


class UntrainedRouting(nn.Module):
    """Shares of a softmax over scores at each module, with nothing to learn.

    Args:
        adapters: the updates of each adapter.
        top_k: how many take part at a position; None for all.
        temperature: of the softmax, > 0.

    Raises:
        ValueError: if there is no adapter, or a setting is out of range.
    """

    level: Level = "module"

    def __init__(self, adapters: Sequence[Mapping[str, LowRankUpdate]], top_k: int | None, temperature: float) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("adapters must be at least one, got none")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be a whole number ≥ 1, or None, got {top_k}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
        self.adapters = len(adapters)
        self._top_k, self._temperature = top_k, temperature
        self.ranks: dict[str, tuple[int, ...]] = {}
        """For each module the rank of each adapter, 0 where it leaves the module alone."""
        outlines = [outlines_of(each) for each in adapters]
        for name in sorted({name for each in outlines for name in each}):
            self.ranks[name] = tuple(each[name].rank if name in each else 0 for each in outlines)
        self._present = {name: [i for i, rank in enumerate(ranks) if rank] for name, ranks in self.ranks.items()}

    def weights(self, place: str, hidden: Tensor, coordinates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weigh the adapters of a module."""
        scores = self._scores(place, hidden, coordinates) / self._temperature
        if self._top_k is not None and self._top_k < scores.shape[-1]:
            lowest = scores.topk(self._top_k, dim=-1).indices
            scores = torch.full_like(scores, -math.inf).scatter(-1, lowest, scores.gather(-1, lowest))
        present = self._present[place]
        shares = torch.softmax(scores, dim=-1)
        if len(present) < self.adapters:
            whole = shares.new_zeros(*shares.shape[:-1], self.adapters)
            whole[..., present] = shares
            shares = whole
        return shares, shares

    def _scores(self, place: str, hidden: Tensor, coordinates: Tensor | None) -> Tensor:
        """Return the score of each adapter that updates the module, ``(…, present)``."""
        raise NotImplementedError


class Arrow(UntrainedRouting):
    """Routing by the direction of inputs that each update stretches most.

    Args:
        adapters: the updates of each adapter.
        top_k: how many take part at a position; None for all. PEFT's default is 3.
        temperature: of the softmax, > 0.
    """

    def __init__(
        self, adapters: Sequence[Mapping[str, LowRankUpdate]], *, top_k: int | None = 3, temperature: float = 1.0
    ) -> None:
        super().__init__(adapters, top_k, temperature)
        self._prototypes: dict[str, Tensor] = {}
        for name, present in self._present.items():
            first = []
            for index in present:
                update = adapters[index][name]
                first.append(product_svd(update.lora_A, update.lora_B).vh[0])
            self._prototypes[name] = torch.stack(first)

    def _scores(self, place: str, hidden: Tensor, coordinates: Tensor | None) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        prototypes = self._prototypes[place].to(hidden.device, dtype)
        return (hidden.to(dtype) @ prototypes.T).abs()


class SpectR(UntrainedRouting):
    """Routing by the length of each update's output.

    Args:
        adapters: the updates of each adapter.
        top_k: how many take part at a position; None for all.
        temperature: of the softmax, > 0.
    """

    def __init__(
        self, adapters: Sequence[Mapping[str, LowRankUpdate]], *, top_k: int | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__(adapters, top_k, temperature)
        self._grams: dict[str, list[Tensor]] = {}
        for name, present in self._present.items():
            updates = [adapters[index][name] for index in present]
            scaled = [update.scaling * update.lora_B.double() for update in updates]
            self._grams[name] = [b.T @ b for b in scaled]

    def _scores(self, place: str, hidden: Tensor, coordinates: Tensor | None) -> Tensor:
        if coordinates is None:
            raise ValueError("coordinates must be given to SpectR, got none")
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        grams = [gram.to(hidden.device, dtype) for gram in self._grams[place]]
        parts = coordinates.to(dtype).split([len(gram) for gram in grams], dim=-1)
        squares = [((part @ gram) * part).sum(-1) for part, gram in zip(parts, grams, strict=True)]
        return torch.stack(squares, dim=-1).clamp_min(0).sqrt()
