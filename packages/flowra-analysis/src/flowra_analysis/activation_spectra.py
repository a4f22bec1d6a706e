"""The spectrum of what goes into a layer: how many directions its inputs use.

With X the inputs of all real tokens as rows, the singular values of X/√tokens are the roots of the eigenvalues of the
second moment C = E_t[x xᵀ] (not centred: a mean is a direction as well). The inputs of a convolution are its patches.
Those of an embedding are one-hot, so C holds the shares of the ids on its diagonal, and those are its eigenvalues.

Modules that see the same input, such as Q, K and V, hold one moment in common. It is noticed, not declared: a moment is
known by the inputs that went into it, each told by a random projection of its values, and where the next input of two
modules with one moment is the same, it is added once. Of an embedding and the head tied to it name one: joined, their
"inputs" include gradients.

Source: docs/methods.md, sections 3 and 11.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from flowra_analysis.layer_signals import Signals
from flowra_analysis.rank_measures import spectrum_statistics
from flowra_analysis.second_moments import SecondMoment

__all__ = ["ActivationSpectra", "ActivationSpectrum"]

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ActivationSpectrum:
    """What is known of the inputs of one layer."""

    singular_values: Tensor
    """Of X/√tokens: all of them, min(d, tokens), or where C was sketched with k columns the leading k/4, each at most
    the true one; float64, non-increasing, on the CPU. Where inputs are float32, values below about 3e-4 σ₁ are
    rounding."""
    squared_norm: float
    """E‖x‖² = Σσ² over all values; exact also where C was sketched."""
    shape: tuple[int, int]
    """(d, tokens): size of an input, and how many of them were seen."""

    def statistics(self) -> dict[str, float]:
        """Return what a :class:`FlowProfile` holds of the inputs; the greatest rank is min(d, tokens).

        Returns:
            :func:`spectrum_statistics` for the kind ``activation``: bounds, where C was sketched. Those below are then
            as good as the values, which are the more accurate the faster the spectrum falls: with σᵢ like i^-0.3
            (d = 1000, k = 128) they were up to 25 % too small, and the lower bound of the participation ratio 13 %
            above it; with i^-0.7, 12 % and nothing.
        """
        return spectrum_statistics("activation", self.singular_values, self.shape, squared_norm=self.squared_norm)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ActivationSpectra:
    """What is known so far of the inputs of each module. A value: each step returns a new one.

    Holds d² numbers for each different input of size d, or d(k + 1) above a limit and d·k probes for each such size; d
    for an embedding of d ids. If batches are split over processes, all must begin with the same arguments.

    >>> from torch import nn
    >>> from flowra_analysis import measure
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> begun = {"activations": ActivationSpectra.init()}
    >>> seen = measure(model, [torch.eye(3)], lambda model, batch: model(batch).sum(1), ["0"], begun)
    >>> round(seen["activations"].finalise()["0"].statistics()["activation_effective_rank"], 6)
    3.0
    """

    dense_limit: int
    size: int
    seed: int
    keys: Mapping[str, str] = field(default_factory=dict)
    """Module name to key of its moment."""
    moments: Mapping[str, SecondMoment] = field(default_factory=dict)
    """Key to moment; modules with one key saw the same."""

    @classmethod
    def init(cls, *, dense_limit: int = 2048, size: int = 256, seed: int = 0) -> "ActivationSpectra":
        """Return the state before the first batch.

        Args:
            dense_limit: largest d for which C is exact, as d² numbers.
            size: k ≥ 1, columns of the sketch above that; see :class:`SecondMoment`.
            seed: of the sketches.

        Returns:
            The state that has seen nothing.

        Raises:
            ValueError: if the size is not positive.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        return cls(dense_limit=dense_limit, size=size, seed=seed)

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> "ActivationSpectra":
        """Add the examples of one batch of one module. Cost d² for each token, or d if the input is known.

        Args:
            name: the module's.
            signals: what passed through it; g plays no part. Accumulated in the dtype of x, at least float32.
            batch: index of the batch, for error messages.

        Returns:
            The state with these examples.

        Raises:
            ValueError: if the inputs are not finite, or of another size than before.
        """
        before = self.keys.get(name)
        key = _digest(before, *_fingerprint(signals))
        moments = dict(self.moments)
        if key not in moments:
            moment = self._begin(signals) if before is None else moments[before]
            try:
                moments[key] = moment.update(signals.x, signals.real, columns=signals.columns)
            except ValueError as error:
                where = "" if batch is None else f", batch {batch}"
                raise ValueError(f"{error} For module {name!r}{where}.") from None
        return self._with({**self.keys, name: key}, moments)

    def merge(self, other: "ActivationSpectra") -> "ActivationSpectra":
        """Return the state that has seen the examples of both, on the devices of this one.

        Raises:
            ValueError: if the two did not begin with the same arguments, or inputs differ in size.
        """
        ours, theirs = ((each.dense_limit, each.size, each.seed) for each in (self, other))
        if ours != theirs:
            raise ValueError(f"other must begin with the same (dense_limit, size, seed) {ours}, got {theirs}")
        keys, moments = _joined(self.keys, other.keys), _joined(self.moments, other.moments)
        for name in self.keys.keys() & other.keys.keys():
            mine, others = self.keys[name], other.keys[name]
            keys[name] = _digest("merged", mine, others)
            if keys[name] not in moments:
                try:
                    moments[keys[name]] = self.moments[mine].merge(other.moments[others])
                except ValueError as error:
                    raise ValueError(f"{error}; for module {name!r}") from None
        return self._with(keys, moments)

    def finalise(self) -> dict[str, ActivationSpectrum]:
        """Return the spectra by module name, in the order in which modules were first seen.

        Raises:
            ValueError: if nothing was seen, or nothing but padding.
        """
        if not self.keys or any(not each.count for each in self.moments.values()):
            raise ValueError("every module must have seen at least one real token, got none. Give more batches.")
        by_key = {key: _spectrum(moment) for key, moment in self.moments.items()}
        return {name: by_key[key] for name, key in self.keys.items()}

    def _begin(self, signals: Signals) -> SecondMoment:
        """Return an empty moment; those of one size share their probes."""
        x, dim = signals.x, signals.num_columns or signals.x.shape[-1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        if signals.columns is not None:
            return SecondMoment.init(dim, per="token", form="diagonal", dtype=dtype, device=x.device)
        for moment in self.moments.values():
            sums = moment.squares
            if moment.probes is not None and (len(sums), sums.dtype, sums.device) == (dim, dtype, x.device):
                return moment.emptied()
        return SecondMoment.init(
            dim,
            per="token",
            dense_limit=self.dense_limit,
            size=self.size,
            seed=self.seed,
            dtype=dtype,
            device=x.device,
        )

    def _with(self, keys: dict[str, str], moments: dict[str, SecondMoment]) -> "ActivationSpectra":
        """Return the state with these moments, without those that no module has any more."""
        held = set(keys.values())
        return replace(self, keys=keys, moments={key: each for key, each in moments.items() if key in held})


def _joined(ours: Mapping[str, Value], theirs: Mapping[str, Value]) -> dict[str, Value]:
    return {**ours, **{key: value for key, value in theirs.items() if key not in ours}}


def _fingerprint(signals: Signals) -> tuple[object, ...]:
    """Tell an input from all others by what it holds: its address may be another's when it is gone."""
    x = signals.x
    return x.device, x.dtype, tuple(x.shape), *map(_projection, (x, signals.real, signals.columns))


def _projection(values: Tensor | None) -> float | None:
    """Return uᵀ V w with fixed normal u and w, V the values with all axes but the last as rows."""
    if values is None:
        return None
    rows = values.reshape(-1, values.shape[-1]).to(torch.promote_types(values.dtype, torch.float32))
    normal = torch.randn(sum(rows.shape), generator=torch.Generator().manual_seed(0)).to(rows)
    return float(normal[: len(rows)] @ (rows @ normal[len(rows) :]))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _spectrum(moment: SecondMoment) -> ActivationSpectrum:
    matrix = moment.finalise()
    dim = len(matrix.diagonal)
    eigenvalues = matrix.eigenvalues()[: min(dim, moment.count)]
    if matrix.low_rank is not None and len(eigenvalues) < min(dim, moment.count):
        eigenvalues = eigenvalues[: math.ceil(len(eigenvalues) / 4)]
    values = eigenvalues.sqrt().cpu()
    return ActivationSpectrum(singular_values=values, squared_norm=matrix.trace(), shape=(dim, moment.count))
