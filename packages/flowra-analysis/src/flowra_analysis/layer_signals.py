"""What passes through a layer: its input x and the gradient g at its output, for each backward pass.

Everything Flowra measures on a layer y = x Wᵀ + b is a function of x and g = ∂ℓ/∂y, summed over tokens: the
gradient of one example is G = Σ_t g_t x_tᵀ. So no ``weight.grad`` is needed, and a frozen base can be measured.

Conventions: N examples, T tokens, x is ``(N, T, n)`` and g is ``(N, T, m)`` for a weight ``(m, n)``; for the other
kinds of layers, see ``layers.py``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from flowra_analysis.layers import Tokens, measurable_modules, tokens

__all__ = ["Signals", "dense", "join", "layer_signals"]


class Signals(NamedTuple):
    """What passed through one module in one backward pass."""

    x: Tensor
    """``(N, T, G·n)``, its input; for an embedding ``(N, T, U)``, see ``columns``."""
    g: Tensor
    """``(N, T, m)``, the gradient at its output; zero at padding."""
    real: Tensor | None = None
    """``(N, T)``, true at real tokens; None if all of them are."""
    columns: Tensor | None = None
    """``(U,)``, only for an embedding: x is one-hot over these ids, ascending, and zero at all others."""
    num_columns: int | None = None
    """n, where x leaves columns out."""
    groups: int = 1
    """G, of a convolution: as many matrices ``(m / G, n)`` as that lie in the weight, one below the other."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(m, n)`` of the layer's :func:`weight_matrix`."""
        return self.g.shape[2], self.num_columns or self.x.shape[2] // self.groups

    def by_group(self) -> tuple[Tensor, Tensor]:
        """Return x ``(G, N, T, n)`` and g ``(G, N, T, m / G)``, views."""
        x, g = (each.unflatten(2, (self.groups, -1)).movedim(2, 0) for each in (self.x, self.g))
        return x, g


@contextmanager
def layer_signals(
    model: nn.Module,
    module_names: Iterable[str],
    callback: Callable[[str, Signals], None],
    *,
    mask: Tensor | None = None,
) -> Iterator[None]:
    """Hand the input and output gradient of each named module to a callback at the end of each backward pass.

    Forward and backward must both run inside the block; a backward pass that comes later hands over nothing. On exit,
    also after an error, the hooks are gone and the model is as it was.

    A frozen model works: where grad mode is on and neither the module nor anything before it requires grad, the
    module's output is made to require it, so the graph begins there. No parameter changes.

    Layout: an input ``(N, n)``, such as that of a head on a pooled vector, has T = 1; further axes between the first
    and the last are flattened into T. A convolution's tokens are its patches, an embedding's are one-hot vectors. Calls
    of one module within one pass are joined along the token axis, in the order of the calls; calls that no gradient
    reached add nothing to G and are left out. x and g are detached, in their own dtypes and on the device of the layer,
    and are kept until the backward pass ends.

    Args:
        model: any model.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`; at least one.
        callback: called as ``callback(name, signals)``, in the order of ``module_names``, without grad mode. Modules
            that no gradient reached are not reported.
        mask: ``(N, T)``, nonzero at real tokens; for all passes in the block, so open one block per batch. Sets g to
            zero at padding, which matters where the loss depends on padded positions (a mean over all positions, or
            attention without a mask): G is then the gradient with the padded part of the sum left out. It does not
            undo what padding does to real tokens. Modules whose input is not ``(N, T, n)`` with the T of the mask,
            or ids ``(N, T)``, such as pooled heads and convolutions, are left as they are.

    Yields:
        Nothing.

    Raises:
        ValueError: if a name is not that of a layer, an input has no example axis or is changed in place
            after the call, the calls of a module disagree about N, or the mask does.

    Source: docs/methods.md, section 2; per-example gradients from x and g after Goodfellow (2015), arXiv:1510.01799.
    """
    modules = measurable_modules(model, module_names)
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"mask must have shape (N, T), got {tuple(mask.shape)}")
    recorder = Recorder(modules, callback, mask)
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(recorder.watch, name), with_kwargs=True))
        yield
    finally:
        recorder.closed = True
        for handle in handles:
            handle.remove()


class Recorder:
    """Pairs each call's input with the gradient of its output, one backward pass (autograd graph task) at a time."""

    def __init__(
        self, modules: dict[str, nn.Module], callback: Callable[[str, Signals], None], mask: Tensor | None
    ) -> None:
        self.modules = modules
        self.callback = callback
        self.mask = mask
        self.closed = False
        self.order = count()
        self.arrived: dict[int, dict[str, dict[int, tuple[Tensor, Tensor]]]] = {}

    def watch(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook: remember the input and wait for the gradient of the output."""
        if not torch.is_grad_enabled():
            return None
        x: Tensor = (*args, *kwargs.values())[0]  # the first argument is called input, in Conv1D x
        if x.ndim < (1 if isinstance(module, nn.Embedding) else 2):
            raise ValueError(f"input must have shape (N, …, n), got {tuple(x.shape)} at {name!r}. Add a batch axis.")
        if not output.requires_grad or output._is_view():
            # A copy: a leaf could not be changed in place by what follows, and a view would lose our hook if it is.
            output = (output if output.requires_grad else output.requires_grad_()).clone()
        receive = partial(self.receive, name, next(self.order), x.detach(), x._version)
        output.register_hook(receive)
        return output

    def receive(self, name: str, call: int, x: Tensor, version: int, g: Tensor) -> None:
        """Tensor hook: pair the gradient with the input; the first of a pass asks for delivery at the end of it."""
        if self.closed:
            return
        if x._version != version:
            raise ValueError(
                f"input must not be changed in place after the call, got a change at {name!r}."
                " Replace the in-place operation or exclude the module."
            )
        task = torch._C._current_graph_task_id()
        if task not in self.arrived:
            self.arrived[task] = {}
            Variable._execution_engine.queue_callback(partial(self.deliver, task))
        self.arrived[task].setdefault(name, {})[call] = (x, g.detach())

    @torch.no_grad()
    def deliver(self, task: int) -> None:
        """End of a pass: join the calls of each module and hand them over."""
        by_name = self.arrived.pop(task)
        for name in self.modules:
            if name in by_name:
                calls = [self.tokens(name, *by_name[name][call]) for call in sorted(by_name[name])]
                if len({len(each.x) for each in calls}) > 1:
                    raise ValueError(
                        f"calls of a module must agree about N, got {[len(each.x) for each in calls]} at {name!r}."
                        " Exclude the module."
                    )
                self.callback(name, join(calls))

    def tokens(self, name: str, x: Tensor, g: Tensor) -> Signals:
        """Bring one call to ``(N, T, n)`` and ``(N, T, m)``, g zero at padding."""
        call = tokens(self.modules[name], x, g)
        if self.mask is None:
            return _signals(call, None)
        if len(self.mask) != len(call.x):
            raise ValueError(f"mask must have one row per example, got {len(self.mask)} for {len(call.x)} at {name!r}")
        if not call.is_sequence or self.mask.shape != call.x.shape[:2]:
            return _signals(call, None)
        real = (self.mask != 0).to(g.device)
        return _signals(call._replace(g=call.g.masked_fill(~real.unsqueeze(-1), 0)), real)


def join(calls: list[Signals]) -> Signals:
    """Join calls along the token axis: those of one module, or of modules that share a weight."""
    if len(calls) == 1:
        return calls[0]
    real = [torch.ones_like(x[..., 0], dtype=torch.bool) if real is None else real for x, _, real, *_ in calls]
    is_masked = any(each.real is not None for each in calls)
    columns = None
    if calls[0].columns is not None:
        columns = torch.cat([each.columns for each in calls if each.columns is not None]).unique()
    return Signals(
        torch.cat([each.x if columns is None else _spread(each, columns) for each in calls], 1),
        torch.cat([each.g for each in calls], 1),
        torch.cat(real, 1) if is_masked else None,
        columns,
        calls[0].num_columns,
        calls[0].groups,
    )


def dense(call: Signals) -> Signals:
    """Give x of an embedding a column for every id; any other call is returned as it is."""
    if call.columns is None:
        return call
    every_id = torch.arange(call.weight_shape[1], device=call.columns.device)
    return call._replace(x=_spread(call, every_id), columns=None, num_columns=None)


def _spread(call: Signals, columns: Tensor) -> Tensor:
    """Give x a column for each of more ids."""
    assert call.columns is not None
    x = call.x.new_zeros(*call.x.shape[:2], len(columns))
    x[..., torch.searchsorted(columns, call.columns)] = call.x
    return x


def _signals(call: Tokens, real: Tensor | None) -> Signals:
    num_columns = None if call.columns is None else call.num_columns
    return Signals(call.x, call.g, real, call.columns, num_columns, call.groups)
