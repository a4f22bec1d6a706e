"""K-FAC factors: the second moments of a layer's inputs and of its output gradients, F ≈ C ⊗ S.

C = E_t[x xᵀ] is a mean over real tokens; S = T̄ E_t[g gᵀ], with T̄ the mean number of tokens per example, is a sum over
the tokens of an example, averaged over examples. So tr C · tr S = tr F where activations and gradients are independent
of each other and over tokens, and the gradients have mean zero (with one token, they need not).
Conventions: x is ``(N, T, n)``, g is ``(N, T, m)``, the gradient of each example's *own* loss.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from flowra_analysis.per_example_signals import Batch, per_example_signals
from flowra_analysis.second_moments import MomentMatrix, SecondMoment

__all__ = ["KroneckerFactors", "kronecker_factors"]


class KroneckerFactors(NamedTuple):
    """The two factors of one layer."""

    inputs: MomentMatrix
    """C = E_t[x xᵀ], ``(n, n)``."""
    gradients: MomentMatrix
    """S = E_i[Σ_t g gᵀ], ``(m, m)``."""


def kronecker_factors(
    model: nn.Module,
    batches: Iterable[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    module_names: Iterable[str],
    *,
    dense_limit: int = 2048,
    size: int = 256,
    seed: int = 0,
    mask: Callable[[Batch], Tensor] | None = None,
) -> dict[str, KroneckerFactors]:
    """Estimate the K-FAC factors C and S of each named module's weight, every token a sample ("expand").

    With the losses of given labels F is the empirical Fisher, as in :func:`fisher_trace`; with labels drawn from the
    model it is the Fisher. Accumulated in the dtype of x and g, at least float32. To split the data over processes,
    update :class:`SecondMoment` states from :func:`per_example_signals` and merge them.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands; at least one example in all.
        per_example_loss: ``(model, batch)`` to ``(N,)``; see :func:`per_example_signals`.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
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
    >>> C, S = kronecker_factors(model, batches, loss, [""])[""]
    >>> abs(C.trace() * S.trace() / fisher_trace(model, batches, loss, [""])[""].mean - 1) < 1e-5
    True
    """
    empty: dict[tuple[object, ...], SecondMoment] = {}  # moments of one kind share their probes

    def begin(vectors: Tensor, per: Literal["token", "example"], dtype: torch.dtype) -> SecondMoment:
        dim, device = vectors.shape[-1], vectors.device
        kind = (dim, per, dtype, device)
        if kind not in empty:
            empty[kind] = SecondMoment.init(
                dim, per=per, dense_limit=dense_limit, size=size, seed=seed, dtype=dtype, device=device
            )
        return empty[kind]

    states: dict[str, tuple[SecondMoment, SecondMoment]] = {}
    for index, batch in enumerate(per_example_signals(model, batches, per_example_loss, module_names, mask=mask)):
        for name, (x, g, real, *_) in batch.items():
            if name not in states:
                dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
                states[name] = (begin(x, "token", dtype), begin(g, "example", dtype))
            inputs, gradients = states[name]
            try:
                states[name] = (inputs.update(x, real), gradients.update(g, real))
            except ValueError as error:
                raise ValueError(f"{error} For module {name!r}, batch {index}.") from None
    if not states:
        raise ValueError("batches must hold at least one example, got none")
    return {
        name: KroneckerFactors(inputs.finalise(), gradients.finalise()) for name, (inputs, gradients) in states.items()
    }
