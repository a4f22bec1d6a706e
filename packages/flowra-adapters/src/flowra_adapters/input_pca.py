"""EVA: begin with A the principal directions of a layer's inputs, and give ranks where they explain most.

Source: Paischer et al. (2024), arXiv:2410.07170. The decomposition follows the stream of inputs (Ross, Lim,
Lin & Yang 2008, Int. J. Comput. Vis. 77): with the k singular values and directions so far, S V, and a new batch X of b
tokens with mean μ_b, those of all centred inputs are near those of

    [ S V ;  X - μ_b ;  √(N b / (N + b)) (μ - μ_b) ],    N tokens and mean μ so far,

and exactly those as long as no more than k are needed. What the truncation leaves out is lost, so singular values are
never too large. Inputs are centred, as in the authors' code and PEFT: a constant added to all of them changes nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowra_adapters.initialisation import Initialisation, leading_svd

__all__ = ["InputPCA", "eva", "eva_ranks"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputPCA:
    """What is known so far of the principal components of one layer's inputs; a value: each step returns a new one.

    Layers that share their input can share one. Memory: n · (k + 1) numbers.

    >>> cross = torch.tensor([[2.0, 0.0, 7.0], [-2.0, 0.0, 7.0], [0.0, 1.0, 7.0], [0.0, -1.0, 7.0]])
    >>> pca = InputPCA.init(3, 2).update(cross).update(cross)
    >>> [round(share, 2) for share in pca.explained().tolist()]  # of the variance; the constant has none
    [0.8, 0.2]
    """

    limit: int
    """k, the largest number of components kept."""
    seed: int
    """Of the randomised decomposition."""
    count: int
    """N, tokens seen."""
    mean: Tensor
    """μ, ``(n,)``."""
    variation: Tensor
    """Σ ‖x - μ‖² over the tokens, a scalar; exact to rounding whatever was truncated."""
    singular_values: Tensor
    """Of the centred inputs, ``(j,)``, > 0 and non-increasing; j ≤ k, and at most the rank of the centred inputs."""
    components: Tensor
    """``(j, n)``, orthonormal rows, in the signs of :mod:`flowra_adapters.initialisation`."""
    similarity: Tensor
    """|cos| of each component with the one at its place before the last update, ``(j,)``; 0 where there was none."""

    @classmethod
    def init(
        cls,
        in_features: int,
        components: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "InputPCA":
        """Return the state before the first batch.

        Args:
            in_features: n, size of the layer's input.
            components: k, 1 ≤ k ≤ n: for EVA, the largest rank that the layer may get, ρ r.
            seed: of the randomised decomposition, with 2k probes and 4 power iterations. It is exact where the tokens
                of a batch or n are no more than that.
            dtype: to compute in, float32 or float64.
            device: of the inputs.

        Returns:
            The state that has seen nothing.

        Raises:
            ValueError: if ``components`` is out of range or the dtype is narrower than float32.
        """
        if not 1 <= components <= in_features:
            raise ValueError(f"components must be in [1, {in_features}], got {components}")
        if dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        empty = torch.zeros(0, in_features, dtype=dtype, device=device)
        return cls(
            limit=components,
            seed=seed,
            count=0,
            mean=empty.new_zeros(in_features),
            variation=empty.new_zeros(()),
            singular_values=empty[:, 0],
            components=empty,
            similarity=empty[:, 0],
        )

    @torch.no_grad()
    def update(self, inputs: Tensor) -> "InputPCA":
        """Add one batch of any size.

        Args:
            inputs: ``(…, n)``, floating point. Leave padding out: ``inputs[mask]``.

        Returns:
            The state with these tokens; the same state if there are none.

        Raises:
            ValueError: if the last dimension is not n, or a number is not finite.
        """
        n = len(self.mean)
        if inputs.ndim < 1 or inputs.shape[-1] != n:
            raise ValueError(f"inputs must have shape (…, {n}), got {tuple(inputs.shape)}")
        x = inputs.reshape(-1, n).to(self.mean.dtype)
        if not torch.isfinite(x).all():
            raise ValueError(
                "inputs must be finite, got NaN or infinity. Check this batch, or compute in a wider dtype."
            )
        if not len(x):
            return self
        batch_mean = x.mean(0)
        centred, shift = x - batch_mean, batch_mean - self.mean
        count = self.count + len(x)
        weight = self.count * len(x) / count
        mean = self.mean + shift * (len(x) / count)
        rows = [self.singular_values[:, None] * self.components, centred, math.sqrt(weight) * shift[None]]
        sigma, components = self._decompose(torch.cat(rows), rounding=math.sqrt(count) * float(mean.norm()))
        common = min(len(self.components), len(components))
        similarity = torch.zeros_like(sigma)
        similarity[:common] = (components[:common] * self.components[:common]).sum(1).abs()
        return replace(
            self,
            count=count,
            mean=mean,
            variation=self.variation + centred.square().sum() + weight * shift.square().sum(),
            singular_values=sigma,
            components=components,
            similarity=similarity,
        )

    def explained(self) -> Tensor:
        """Return the share of the inputs' variance along each component, ``(j,)``, non-increasing, with a sum ≤ 1."""
        return self.singular_values.square() / self.variation

    def converged(self, *, rank: int | None = None, tau: float = 0.99) -> bool:
        """Tell whether the last update left the components where they were.

        Args:
            rank: how many of the leading components must have stayed, ≥ 0; None for all there are, and at least one.
            tau: smallest |cos| that counts, in [0, 1].

        Returns:
            Whether each of them exists and has a ``similarity`` ≥ τ.

        Raises:
            ValueError: if ``rank`` or ``tau`` is out of range.
        """
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {tau}")
        wanted = max(len(self.similarity), 1) if rank is None else rank
        if not 0 <= wanted <= self.limit:
            raise ValueError(f"rank must be in [0, {self.limit}], got {rank}")
        return len(self.similarity) >= wanted and bool((self.similarity[:wanted] >= tau).all())

    def _decompose(self, stacked: Tensor, *, rounding: float) -> tuple[Tensor, Tensor]:
        """Return the leading singular values and directions that stand out of the rounding."""
        generator = torch.Generator().manual_seed(self.seed)
        _, sigma, vh = leading_svd(stacked, 2 * self.limit, generator=generator)
        noise = torch.finfo(stacked.dtype).eps * max(math.sqrt(max(stacked.shape)) * float(sigma[0]), rounding)
        real = min(self.limit, int((sigma > noise).sum()))
        return sigma[:real].clone(), vh[:real].clone()


def eva(pca: InputPCA, rank: int, *, out_features: int) -> Initialisation:
    """Begin with A the leading principal components of the inputs, and B = 0.

    Args:
        pca: of the layer's inputs.
        rank: 1 ≤ rank ≤ min(components found, m); a layer that :func:`eva_ranks` gives rank 0 carries no adapter.
        out_features: m, size of the layer's output.

    Returns:
        The factors, A with orthonormal rows, without an offset; in the dtype of ``pca``.

    Raises:
        ValueError: if the rank is out of range.

    Source: Paischer et al. (2024), arXiv:2410.07170. Deviations: none; the whitening of PEFT is left out.
    """
    found = len(pca.components)
    if not 1 <= rank <= min(found, out_features):
        raise ValueError(
            f"rank must be in [1, min({found} components found, {out_features})], got {rank}."
            " Give more inputs, or lower the rank."
        )
    return Initialisation(pca.components[:rank].clone(), pca.components.new_zeros(out_features, rank), offset=False)


def eva_ranks(explained: Mapping[str, Tensor], *, rank: int, rho: float = 2.0) -> dict[str, int]:
    """Share out the rank of all layers by the variance that each component explains.

    The ``rank`` · layers largest shares of all layers are taken, at most ρ · ``rank`` in one layer. As the scaling s of
    an adapter here does not depend on its rank, nothing is to be rescaled (PEFT multiplies alpha by the ratio of ranks
    to that end).

    Args:
        explained: layer name to :meth:`InputPCA.explained`, cut to no more than the layer's min(m, n).
        rank: mean rank, ≥ 1.
        rho: ρ ≥ 1; 1 leaves all ranks equal.

    Returns:
        Layer name to rank ≥ 0, in the order of ``explained``, with the sum ``rank`` · layers. Of equal shares, those
        that come first in their layer are taken first, and then by name: the order of the input does not matter.

    Raises:
        ValueError: if ``rank`` or ``rho`` is out of range, a layer's shares are negative, increasing or not finite, or
            there are too few in all.

    Source: Paischer et al. (2024), arXiv:2410.07170. Deviations: ⌊ρ r⌋ where PEFT rounds; the order of equal shares.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not (math.isfinite(rho) and rho >= 1):
        raise ValueError(f"rho must be finite and at least 1, got {rho}")
    most = math.floor(rho * rank + 1e-9)
    shares = {name: each.tolist() for name, each in explained.items()}
    for name, each in shares.items():
        if not all(math.isfinite(share) and share >= 0 for share in each) or each != sorted(each, reverse=True):
            raise ValueError(f"explained must be finite, ≥ 0 and non-increasing, got {each}; in {name!r}")
    queue = sorted((-share, place, name) for name, each in shares.items() for place, share in enumerate(each[:most]))
    total = rank * len(shares)
    if len(queue) < total:
        raise ValueError(
            f"explained must hold at least {total} shares, {most} of a layer at most, got {len(queue)}."
            " Give more inputs, raise rho, or lower the rank."
        )
    ranks = dict.fromkeys(shares, 0)
    for _, _, name in queue[:total]:
        ranks[name] += 1
    return ranks
