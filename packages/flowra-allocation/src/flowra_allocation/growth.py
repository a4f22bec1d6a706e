"""Where a module would grow: the part of its gradient that its adapter cannot follow (docs/methods.md, section 7).

With P_A and P_B the projectors on the rows of A and the columns of B, the normal component N = (I − P_B) G (I − P_A) of
the weight gradient G is what no change of A and B can use to first order. Its leading right singular vector is the row
to add to A (GradMax, Evci et al. 2022, section 3; normal component as in Riemannian rank-adaptive methods).
G is never formed: two streamed sketches Y = N Ω and Z = Ψ N recover N ≈ Q (ΨQ)⁺ Z with Q = orth(Y) (Tropp et al. 2017,
SIAM J. Matrix Anal. Appl. 38, algorithm 7). Memory q (m + 2n).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["PROBES", "SIZE", "SUMS", "GradientSketch", "leading_directions"]

SIZE = 10
"""Probes, unless told."""
PROBES = ("basis_A", "basis_B", "omega", "psi")
"""What a sketch is made with; the same in every process."""
SUMS = ("y", "z")
"""What batches add to."""


class GradientSketch:
    """Streaming sketch of the normal component of one module's weight gradient.

    Args:
        lora_A: ``(r, n)``, r ≥ 0.
        lora_B: ``(m, r)``.
        size: q, number of probes; the approximation is exact for gradients of rank ≤ q.
        generator: source of randomness.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, *, generator: torch.Generator, size: int = SIZE) -> None:
        n, m = lora_A.shape[1], lora_B.shape[0]
        self._basis_A = _basis(lora_A.float().T)  # (n, r)
        self._basis_B = _basis(lora_B.float())  # (m, r')
        # N has no more directions than the bases leave; further probes would only amplify rounding.
        size = max(0, min(size, m - self._basis_B.shape[1], n - self._basis_A.shape[1]))
        device = lora_A.device
        omega = torch.randn(n, size, generator=generator).to(device)
        psi = torch.randn(min(2 * size + 1, m), m, generator=generator).to(device)
        self._omega = omega - self._basis_A @ (self._basis_A.T @ omega)
        self._psi = psi - (psi @ self._basis_B) @ self._basis_B.T
        self._y = torch.zeros(m, size, device=device)
        self._z = torch.zeros(len(psi), n, device=device)

    def update(self, x: Tensor, gradient: Tensor) -> None:
        """Add a batch: inputs ``(tokens, n)`` and output gradients ``(tokens, m)``; G = Σ gradient xᵀ.

        A batch that is not finite is left out, as a GradScaler leaves out its step.
        """
        x, gradient = x.float(), gradient.float()
        y, z = gradient.T @ (x @ self._omega), (self._psi @ gradient.T) @ x
        finite = y.isfinite().all() & z.isfinite().all()  # asked where it lies: no device is waited for
        self._y += torch.where(finite, y, 0.0)
        self._z += torch.where(finite, z, 0.0)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors named in :data:`PROBES` and :data:`SUMS`."""
        return {name: getattr(self, f"_{name}") for name in (*PROBES, *SUMS)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`, bit by bit."""
        for name in (*PROBES, *SUMS):
            setattr(self, f"_{name}", state[name].to(self._y.device, copy=True))

    def leading_direction(self) -> tuple[float, Tensor]:
        """Return σ₁(N)² and the leading right singular vector ``(n,)``, of norm 1, orthogonal to the rows of A."""
        return leading_directions([self])[0]

    def reduced(self) -> tuple[Tensor, Tensor]:
        """Return ΨQ ``(2q + 1, q)`` and Z ``(2q + 1, n)``, in float64: N ≈ Q (ΨQ)⁺ Z."""
        y = (self._y - self._basis_B @ (self._basis_B.T @ self._y)).double()
        z = (self._z - (self._z @ self._basis_A) @ self._basis_A.T).double()
        q, _ = torch.linalg.qr(y)
        return self._psi.double() @ q, z


def leading_directions(sketches: Sequence[GradientSketch]) -> list[tuple[float, Tensor]]:
    """Return the :meth:`GradientSketch.leading_direction` of each; what is small and of equal shape is solved at once.

    With u the leading eigenvector of X Xᵀ ``(q, q)``, X = (ΨQ)⁺ Z, the row Xᵀ u has the squared norm σ₁(N)².
    """
    reduced = [sketch.reduced() for sketch in sketches]
    alike: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, (narrow, _) in enumerate(reduced):
        alike.setdefault((narrow.shape, narrow.device), []).append(index)
    found: dict[int, tuple[float, Tensor]] = {}
    for (shape, _), indices in alike.items():
        zs = [reduced[index][1] for index in indices]
        if shape.numel():
            inverse = torch.linalg.pinv(torch.stack([reduced[index][0] for index in indices]))
            vectors = torch.linalg.eigh(inverse @ torch.stack([z @ z.T for z in zs]) @ inverse.mT).eigenvectors
            weights = (vectors[:, :, -1:].mT @ inverse).squeeze(1)
            rows = [weight @ z for weight, z in zip(weights, zs, strict=True)]
        else:  # the bases leave nothing to follow
            rows = [z.new_zeros(z.shape[1]) for z in zs]
        lengths = torch.stack([row.norm() for row in rows])
        divisors = lengths.clamp_min(torch.finfo(lengths.dtype).tiny)  # where nothing was seen, the row is 0
        units = [(row / divisor).float() for row, divisor in zip(rows, divisors, strict=True)]
        found |= zip(indices, zip(lengths.square().tolist(), units, strict=True), strict=True)
    return [found[index] for index in range(len(sketches))]


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis ``(size, rank)`` of the span of the columns; zero columns span nothing.

    It lies row by row in memory, as it will when it has been in a file: products then agree to the last bit.
    """
    u, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = u[:, sigma > 1e-6 * sigma.max()] if sigma.numel() and sigma.max() > 0 else columns[:, :0]
    return basis.contiguous()
