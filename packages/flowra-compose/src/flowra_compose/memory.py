"""What is kept of past tasks at each module, for training the next one: no data, only what their inputs span and weigh.

=============  ==============  =================================================================================
kept           shape           used by
=============  ==============  =================================================================================
``basis``      ``(n, k)``      :class:`~flowra_compose.NullSpace` and InfLoRA: U, the directions of past inputs
``inputs``     ``(n, n)``      :func:`~flowra_compose.kfac_penalty`: Σ Cᵢ
``outputs``    ``(m, m)``      the same: Σ Sᵢ
``rows``       ``(Σ rᵢ, n)``   :func:`~flowra_compose.o_lora_penalty` and
                               :func:`~flowra_compose.orthogonality_penalty`: the A of past adapters
=============  ==============  =================================================================================

After task t, with C_t = E[x xᵀ] of the module's inputs under the model as it is then, the leading eigenvectors of the
residual (I − UUᵀ) C_t (I − UUᵀ) join U until tr(Uᵀ C_t U) ≥ ε tr C_t. So U only grows, and holds the share ε of the
energy of every past task's inputs.

Source: gradient projection memory (Saha et al. 2021, arXiv:2103.09762, section 4); docs/methods.md, section 28.
Deviations: eigenvectors of a second moment in place of singular vectors of the inputs, which are the same; a cap on k.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowra_compose.low_rank import LowRankUpdate
from flowra_compose.statistics import ModuleStatistics

__all__ = ["ModuleMemory", "TaskMemory", "leading_directions"]

ENOUGH = 1e-12  # of tr C: what float64 leaves of an energy that is all there
ORTHONORMAL = 1e-4
INDEFINITE = 1e-3  # of tr C: a negative eigenvalue beyond this is no rounding


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModuleMemory:
    """Past tasks at one module. All tensors are float32, on one device.

    Raises:
        ValueError: if a tensor is not float32, finite and of its shape, ``basis`` is not orthonormal, or only one of
            ``inputs`` and ``outputs`` is there.
    """

    shape: tuple[int, int]
    """(m, n) of the weight."""
    basis: Tensor
    """U ``(n, k)``, orthonormal columns."""
    rows: Tensor
    """A of the past adapters, one below the other, ``(Σ rᵢ, n)``."""
    kept: tuple[float, ...] = ()
    """For each past task tr(Uᵀ C U) / tr C when it ended, in [0, 1]. Below ε where the cap on k was reached: the basis
    does not protect the rest, but :func:`~flowra_compose.kfac_penalty` does."""
    inputs: Tensor | None = None
    """Σ Cᵢ ``(n, n)``, if S is known of the tasks."""
    outputs: Tensor | None = None
    """Σ Sᵢ ``(m, m)``, likewise."""

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or self.rows.ndim != 2:
            raise ValueError(f"basis and rows must be matrices, got {self.basis.ndim} and {self.rows.ndim} axes")
        (m, n), k = self.shape, self.basis.shape[1]
        shapes = {"basis": (n, k), "rows": (len(self.rows), n), "inputs": (n, n), "outputs": (m, m)}
        for name, shape in shapes.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be float32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        if (self.inputs is None) != (self.outputs is None):
            raise ValueError("inputs and outputs must be there together, got one of them")
        if not all(0 <= each <= 1 for each in self.kept):
            raise ValueError(f"kept must be shares in [0, 1], got {self.kept}")
        gram = self.basis.double().T @ self.basis.double()
        if not torch.allclose(gram, torch.eye(k).to(gram), rtol=0, atol=ORTHONORMAL):
            raise ValueError("basis must have orthonormal columns, got others")

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "ModuleMemory":
        """Return the memory before the first task of a module whose weight is ``shape`` = (m, n)."""
        return cls(shape=shape, basis=torch.zeros(shape[1], 0), rows=torch.zeros(0, shape[1]))

    @property
    def rank(self) -> int:
        """k, how many directions are kept."""
        return self.basis.shape[1]

    def after(
        self, statistics: ModuleStatistics, update: LowRankUpdate | None = None, *, energy: float, cap: float
    ) -> "ModuleMemory":
        """Return the memory after one more task, see :meth:`TaskMemory.after`."""
        (m, n), device = self.shape, self.basis.device
        c, s = statistics.inputs, statistics.outputs
        if c is None or tuple(c.shape) != (n, n) or (s is not None and tuple(s.shape) != (m, m)):
            got = [None if each is None else tuple(each.shape) for each in (c, s)]
            raise ValueError(f"statistics must have inputs ({n}, {n}), and outputs ({m}, {m}) or none, got {got}")
        if self.kept and (s is None) != (self.outputs is None):
            raise ValueError("statistics must have outputs after each task or after none, got a mixture")
        if update is not None and update.shape != self.shape:
            raise ValueError(f"updates must have the shape {self.shape}, got {update.shape}")
        moment = c.to(device, torch.float64)
        basis, kept = _grown(self.basis, moment, energy=energy, largest=int(cap * n))
        rows = [] if update is None else [update.lora_A.detach().to(self.rows)]
        return ModuleMemory(
            shape=self.shape,
            basis=basis,
            rows=torch.cat([self.rows, *rows]),
            kept=(*self.kept, kept),
            inputs=None if s is None else _added(self.inputs, moment),
            outputs=None if s is None else _added(self.outputs, s.to(device)),
        )

    def to(self, device: torch.device | str) -> "ModuleMemory":
        """Return it with all tensors on a device."""
        moments = {name: each.to(device) for name in ("inputs", "outputs") if (each := getattr(self, name)) is not None}
        return replace(self, basis=self.basis.to(device), rows=self.rows.to(device), **moments)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskMemory:
    """What is kept of the tasks so far. A value: :meth:`after` returns the next one.

    Raises:
        ValueError: if the modules have not seen equally many tasks.
    """

    modules: Mapping[str, ModuleMemory]
    """By module name."""

    def __post_init__(self) -> None:
        if len({len(each.kept) for each in self.modules.values()}) != 1:
            raise ValueError("modules must have seen equally many tasks, and be at least one, got others")

    @classmethod
    def empty(cls, shapes: Mapping[str, tuple[int, int]]) -> "TaskMemory":
        """Return the memory before the first task.

        Args:
            shapes: (m, n) of the weight of every module that any task will train, by name.
        """
        return cls(modules={name: ModuleMemory.empty(shape) for name, shape in shapes.items()})

    @property
    def tasks(self) -> int:
        """How many tasks are remembered."""
        return len(next(iter(self.modules.values())).kept)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of each module."""
        return {name: each.shape for name, each in self.modules.items()}

    def after(
        self,
        statistics: Mapping[str, ModuleStatistics],
        updates: Mapping[str, LowRankUpdate] | None = None,
        *,
        energy: float = 0.95,
        cap: float = 0.7,
    ) -> "TaskMemory":
        """Return the memory after one more task; computed in float64 on the device of this one.

        Args:
            statistics: of every module, also those that the task did not train, on inputs of the task (256 are enough)
                under the model with the task's adapter: ``inputs`` C ``(n, n)``, and for the K-FAC penalty ``outputs``
                S ``(m, m)`` after each task.
            updates: the task's adapter, for O-LoRA and training-time orthogonality.
            energy: ε in (0, 1], the share of tr C that U shall hold. 1 keeps every direction of C, so give C in float64
                there: rounding of float32 is directions, too.
            cap: largest k / n, in [0, 1]. Where it is reached, less than ε is kept (:attr:`ModuleMemory.kept`).

        Raises:
            ValueError: if a module has no statistics, or they do not fit, a name is unknown, C is not positive
                semi-definite, or a number is out of range.
        """
        if not 0 < energy <= 1 or not 0 <= cap <= 1:
            raise ValueError(f"energy must be in (0, 1] and cap in [0, 1], got {energy} and {cap}")
        given = updates or {}
        odd = sorted(statistics.keys() ^ self.modules.keys()) or sorted(given.keys() - self.modules.keys())
        if odd:
            raise ValueError(f"statistics must be of every module of the memory, and updates of these, got {odd}")
        grown = {}
        for name, each in self.modules.items():
            try:
                grown[name] = each.after(statistics[name], given.get(name), energy=energy, cap=cap)
            except ValueError as error:
                raise ValueError(f"{error}; for {name!r}") from None
        return TaskMemory(modules=grown)

    def to(self, device: torch.device | str) -> "TaskMemory":
        """Return it with all tensors on a device: penalties are computed at every step."""
        return TaskMemory(modules={name: each.to(device) for name, each in self.modules.items()})


def leading_directions(moment: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose what a second moment has off a basis, R = (I − UUᵀ) C (I − UUᵀ).

    Args:
        moment: C ``(n, n)``, positive semi-definite to rounding.
        basis: U ``(n, k)``, orthonormal to rounding.

    Returns:
        Eigenvalues of R ``(n,)``, ≥ 0 and non-increasing, its eigenvectors ``(n, n)``, and an orthonormal basis of
        U's span ``(n, k)``; all in float64. Eigenvectors of a vanishing eigenvalue may lie in that span.

    Raises:
        ValueError: if C is not positive semi-definite.
    """
    u = torch.linalg.qr(basis.double()).Q
    c = (moment.double() + moment.double().T) / 2
    off = c - u @ (u.T @ c)
    off = off - (off @ u) @ u.T
    values, vectors = torch.linalg.eigh((off + off.T) / 2)
    if values[0] < -INDEFINITE * c.trace().abs() or c.trace() < 0:
        raise ValueError(f"inputs must be positive semi-definite, got an eigenvalue of {values[0].item():.3g}")
    return values.flip(0).clamp(min=0), vectors.flip(1), u


def _grown(basis: Tensor, moment: Tensor, *, energy: float, largest: int) -> tuple[Tensor, float]:
    """Append directions to U until it holds the share ε of tr C; U's own columns keep their bits."""
    values, vectors, u = leading_directions(moment, basis)
    total = moment.trace()
    if total == 0:
        return basis, 1.0
    held = ((moment @ u) * u).sum() + torch.cat([values.new_zeros(1), values.cumsum(0)])  # of the first 0, 1, … of them
    count = int((held < (energy - ENOUGH) * total).sum())
    count = max(0, min(count, int((values > 0).sum()), largest - basis.shape[1]))
    new = vectors[:, :count]
    new = torch.linalg.qr(new - u @ (u.T @ new)).Q
    return torch.cat([basis, new.to(basis)], dim=1), min(1.0, max(0.0, float(held[count] / total)))


def _added(total: Tensor | None, moment: Tensor) -> Tensor:
    return (moment.double() if total is None else total.double() + moment.double()).float()
