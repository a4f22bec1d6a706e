"""K-FAC: the second moments of a layer's inputs and of its output gradients, F ≈ C ⊗ S, from a stream of signals.

With T tokens in an example, its gradient is Σ_t g_t x_tᵀ. Two ways to a Kronecker product (Eschenhagen et al. 2023):

- ``expand``, every token a sample: C = E_t[x xᵀ], a mean over real tokens, and S = E_i[Σ_t g gᵀ], a sum over the
  tokens of an example, averaged over examples. So tr C · tr S = tr F where inputs and gradients are independent of each
  other and over tokens, and the gradients have mean zero (with one token, they need not).
- ``reduce``, every example a sample: with x̄ the mean of its inputs and ḡ the sum of its gradients, C = E_i[x̄ x̄ᵀ] and
  S = E_i[ḡ ḡᵀ].

They agree for T = 1. A convolution's tokens are its patches; the calls of one module, or of modules that share a
weight, are tokens of one example. A convolution of G groups has G pairs. An embedding's inputs are one-hot, so in
``expand`` its C is diagonal, and kept so. Conventions: x is ``(N, T, n)``, g is ``(N, T, m)``, of each example's *own*
loss.

Source: Martens & Grosse (2015), arXiv:1503.05671; Grosse & Martens (2016), arXiv:1602.01407, for convolutions;
Eschenhagen et al. (2023), arXiv:2311.00636, for several tokens; docs/methods.md, section 11.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from flowra_analysis.kronecker_factors import KroneckerFactors
from flowra_analysis.layer_signals import Signals
from flowra_analysis.measure import measure
from flowra_analysis.per_example_signals import Batch
from flowra_analysis.second_moments import SecondMoment

__all__ = ["KFAC", "kronecker_factors"]


class Moments(NamedTuple):
    """What is known so far of one layer's C and S."""

    inputs: SecondMoment
    gradients: SecondMoment


class Addition(NamedTuple):
    """An input that was added to a moment, while both live."""

    x: "ref[Tensor]"
    version: int
    real: "ref[Tensor] | None"
    groups: int
    before: "ref[Tensor] | None"
    """The ``squares`` of the moment before, by which it is known; None if there was none."""
    after: "ref[SecondMoment]"


@dataclass(frozen=True, eq=False)
class Recent:
    """Inputs added of late: a module that sees what another has seen (Q, K and V) takes over its moment.

    Spares work and memory, and holds neither. It is no part of what is known, so it has no field: its references are
    weak, and a state that was saved, sent or copied begins without them.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "additions", [])

    def __reduce__(self) -> tuple[type["Recent"], tuple[()]]:
        return Recent, ()

    def find(self, signals: Signals, before: SecondMoment | None) -> SecondMoment | None:
        """Return what became of this moment when this very input was added to it, if that was seen."""
        for each in self._additions():
            old, after = None if each.before is None else each.before(), each.after()
            began_alike = each.before is None if before is None else old is before.squares
            if began_alike and after is not None and _is_same_input(each, signals):
                return after
        return None

    def add(self, signals: Signals, before: SecondMoment | None, after: SecondMoment) -> None:
        """Remember one more, and forget those whose input is gone."""
        additions = self._additions()
        additions[:] = [each for each in additions if each.x() is not None]
        real = None if signals.real is None else ref(signals.real)
        old = None if before is None else ref(before.squares)
        additions.append(Addition(ref(signals.x), signals.x._version, real, signals.groups, old, ref(after)))

    def _additions(self) -> list[Addition]:
        additions: list[Addition] = vars(self)["additions"]
        return additions


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KFAC:
    """What is known so far of the K-FAC factors of each module.

    A value: each step returns a new one. Batches may be split over states, and over processes, in any way and order;
    merged, they are the same to within rounding, if all began with the same arguments. A factor takes little more than
    half of its d² numbers while it is kept, d(k + 1) where it is sketched, d for an embedding's C; modules that see the
    same input tensor share one C.

    >>> from flowra_analysis import measure
    >>> model, batches = nn.Linear(6, 4), [torch.ones(8, 6), torch.ones(2, 6)]
    >>> states = {"kfac": KFAC.init()}
    >>> C, S = measure(model, batches, lambda model, x: model(x).sum(1), [""], states)["kfac"].finalise()[""]
    >>> C.trace(), S.trace()
    (6.0, 4.0)
    """

    weight_sharing: Literal["expand", "reduce"]
    dense_limit: int
    size: int
    seed: int
    moments: Mapping[str, Moments]
    """Module name to moments."""
    recent: Recent = field(default_factory=Recent, repr=False)

    @classmethod
    def init(
        cls,
        *,
        weight_sharing: Literal["expand", "reduce"] = "expand",
        dense_limit: int = 2048,
        size: int = 256,
        seed: int = 0,
    ) -> "KFAC":
        """Return the state before the first batch.

        Args:
            weight_sharing: ``"expand"``, every token a sample, or ``"reduce"``, every example one.
            dense_limit: largest n or m for which a factor is exact.
            size: columns of the sketch above that; see :class:`SecondMoment`.
            seed: of the sketches.

        Raises:
            ValueError: if an argument is out of range.
        """
        if weight_sharing not in {"expand", "reduce"}:
            raise ValueError(f"weight_sharing must be 'expand' or 'reduce', got {weight_sharing!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        return cls(weight_sharing=weight_sharing, dense_limit=dense_limit, size=size, seed=seed, moments={})

    def update(self, name: str, signals: Signals, *, batch: int | None = None) -> "KFAC":
        """Add the examples of one batch for one module.

        Args:
            name: the module's.
            signals: what passed through it, g the gradient of each example's own loss.
            batch: index of the batch, for error messages.

        Returns:
            The state with these N examples; C is accumulated in the dtype of x and S in that of g, at least float32.

        Raises:
            ValueError: if the shapes do not fit, or a moment is then not finite.
        """
        known = self.moments.get(name)
        before = known and known.inputs
        try:
            inputs = None if signals.columns is not None else self.recent.find(signals, before)
            if inputs is None:
                inputs = self._with_inputs(before, signals)
                self.recent.add(signals, before, inputs)
            gradients = self._with_gradients(known and known.gradients, signals)
        except ValueError as error:
            where = "" if batch is None else f", batch {batch}"
            raise ValueError(f"{error} For module {name!r}{where}.") from None
        return replace(self, moments={**self.moments, name: Moments(inputs, gradients)})

    def merge(self, other: "KFAC") -> "KFAC":
        """Return the state that has seen the examples of both.

        Raises:
            ValueError: if the two did not begin with the same arguments, or a module's moments do not fit.
        """
        ours, theirs = self._origin(), other._origin()
        if ours != theirs:
            raise ValueError(
                f"other must begin with the same (weight_sharing, dense_limit, size, seed) {ours}, got {theirs}"
            )
        moments = {**other.moments, **self.moments}
        merged: dict[tuple[int, int], SecondMoment] = {}  # what was shared in both stays shared
        for name in self.moments.keys() & other.moments.keys():
            pairs = list(zip(self.moments[name], other.moments[name], strict=True))
            for a, b in pairs:
                if (id(a.squares), id(b.squares)) not in merged:
                    merged[id(a.squares), id(b.squares)] = a.merge(b)
            moments[name] = Moments(*(merged[id(a.squares), id(b.squares)] for a, b in pairs))
        order = dict.fromkeys([*self.moments, *other.moments])
        return replace(self, moments={name: moments[name] for name in order}, recent=Recent())

    def finalise(self) -> dict[str, KroneckerFactors]:
        """Return the factors of each module; those that share one C hold the same :class:`MomentMatrix`.

        Raises:
            ValueError: if no example was seen.
        """
        if not self.moments:
            raise ValueError("batches must hold at least one example, got none")
        states = {id(state.squares): state for moments in self.moments.values() for state in moments}
        made = {key: state.finalise() for key, state in states.items()}
        return {
            name: KroneckerFactors(made[id(moments.inputs.squares)], made[id(moments.gradients.squares)])
            for name, moments in self.moments.items()
        }

    def _with_inputs(self, state: SecondMoment | None, signals: Signals) -> SecondMoment:
        """Add x to C."""
        x, real = signals.by_group()[0] if signals.groups > 1 else signals.x, signals.real
        if self.weight_sharing == "reduce":
            x, real = _mean_over_tokens(x, real), None
        if state is None:
            dim = signals.weight_shape[1]
            form: Literal["full", "diagonal"] = "full"
            if signals.columns is not None and self.weight_sharing == "expand":
                form = "diagonal"
            state = self._begin(dim, "token", form, signals.groups, x)
        return state.update(x, real, columns=signals.columns)

    def _with_gradients(self, state: SecondMoment | None, signals: Signals) -> SecondMoment:
        """Add g to S."""
        g, real = signals.by_group()[1] if signals.groups > 1 else signals.g, signals.real
        if self.weight_sharing == "reduce":
            g, real = g.to(_wide(g)).sum(-2, keepdim=True), None
        if state is None:
            state = self._begin(g.shape[-1], "example", "full", signals.groups, g)
        return state.update(g, real)

    def _begin(
        self,
        dim: int,
        per: Literal["token", "example"],
        form: Literal["full", "diagonal"],
        groups: int,
        vectors: Tensor,
    ) -> SecondMoment:
        """Return an empty moment, with the probes of another of its kind where there is one."""
        dtype, device = _wide(vectors), vectors.device
        shape = (dim,) if groups == 1 else (groups, dim)
        for state in (state for moments in self.moments.values() for state in moments):
            squares = state.squares
            kind = (state.per, squares.shape, squares.dtype, squares.device)
            if state.probes is not None and form == "full" and kind == (per, shape, dtype, device):
                return state.emptied()
        return SecondMoment.init(
            dim,
            per=per,
            form=form,
            groups=None if groups == 1 else groups,
            dense_limit=self.dense_limit,
            size=self.size,
            seed=self.seed,
            dtype=dtype,
            device=device,
        )

    def _origin(self) -> tuple[str, int, int, int]:
        return self.weight_sharing, self.dense_limit, self.size, self.seed


def kronecker_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    module_names: Iterable[str],
    *,
    weight_sharing: Literal["expand", "reduce"] = "expand",
    dense_limit: int = 2048,
    size: int = 256,
    seed: int = 0,
    mask: Callable[[Batch], Tensor] | None = None,
) -> dict[str, KroneckerFactors]:
    """Estimate the K-FAC factors C and S of each named module's weight.

    With the losses of given labels F is the empirical Fisher, as in :func:`fisher_trace`; with labels drawn from the
    model it is the Fisher. To split the data over processes, feed :class:`KFAC` states by :func:`measure` and merge
    them.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands; at least one example in all.
        per_example_loss: ``(model, batch)`` to ``(N,)``; see :func:`per_example_signals`.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        weight_sharing: ``"expand"``, every token a sample, or ``"reduce"``, every example one; see :class:`KFAC`.
        dense_limit: largest n or m for which a factor is exact.
        size: columns of the sketch above that; see :class:`SecondMoment`.
        seed: of the sketches.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens; see :func:`layer_signals`. Needed wherever there is
            padding, which would count as tokens in C.

    Returns:
        Module name to factors, in the order of ``module_names``.

    Raises:
        ValueError: as :func:`per_example_signals`; if there is no example, or a moment is not finite (naming the module
            and the batch).

    Source: Martens & Grosse (2015), arXiv:1503.05671; Eschenhagen et al. (2023), arXiv:2311.00636, for several tokens;
    docs/methods.md, sections 4 and 11.

    >>> from flowra_analysis import fisher_trace
    >>> _ = torch.manual_seed(0)
    >>> model, batches = nn.Linear(6, 4), [torch.randn(8, 6), torch.randn(8, 6)]
    >>> def loss(model, batch): return model(batch).sum(1)  # its gradient is the same whatever x is
    >>> factors = kronecker_factors(model, batches, loss, [""])[""]
    >>> abs(factors.trace() / fisher_trace(model, batches, loss, [""])[""].mean - 1) < 1e-5
    True
    """
    begun = {"kfac": KFAC.init(weight_sharing=weight_sharing, dense_limit=dense_limit, size=size, seed=seed)}
    return measure(model, batches, per_example_loss, module_names, begun, mask=mask)["kfac"].finalise()


def _mean_over_tokens(x: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean of x ``(…, N, T, n)`` over the real tokens of each example, ``(…, N, 1, n)``; 0 of none."""
    x = x.to(_wide(x))
    if real is None:
        return x.mean(-2, keepdim=True)
    total = x.masked_fill(~real.unsqueeze(-1), 0).sum(-2, keepdim=True)
    return total / real.sum(-1).clamp(min=1).view(-1, 1, 1)


def _is_same_input(addition: Addition, signals: Signals) -> bool:
    """Tell whether an input is the tensor that was added then: it lives, so no other can be where it is."""
    x, other = addition.x(), signals.x
    if x is None or (x.data_ptr(), addition.version, addition.groups) != (
        other.data_ptr(),
        other._version,
        signals.groups,
    ):
        return False
    if (x.shape, x.stride(), x.dtype, x.device) != (other.shape, other.stride(), other.dtype, other.device):
        return False
    if addition.real is None or signals.real is None:
        return addition.real is None and signals.real is None
    real = addition.real()
    return real is not None and torch.equal(real, signals.real)


def _wide(vectors: Tensor) -> torch.dtype:
    return torch.promote_types(vectors.dtype, torch.float32)
