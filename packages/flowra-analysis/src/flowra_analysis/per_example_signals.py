"""What passes through the layers of a model for each example's own loss, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from flowra_analysis.layer_signals import Signals, dense, join, layer_signals
from flowra_analysis.layers import measurable_modules, stores_transpose

__all__ = ["Batch", "evaluation_mode", "per_example_signals"]

Batch = TypeVar("Batch")


def per_example_signals(
    model: nn.Module,
    batches: Iterable[Batch],
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    module_names: Iterable[str],
    *,
    mask: Callable[[Batch], Tensor] | None = None,
    first_batch: int = 0,
) -> Iterator[dict[str, Signals]]:
    """Run the batches and yield, for each, the signals of every named module: one pass can feed several statistics.

    Modules that share a weight, such as an embedding and the head tied to it, are one layer called several times: their
    calls are joined under the name of the first of them. To tell them apart, name only one.

    The *sum* of the losses is backpropagated, so each example's gradient is that of its own loss. While a batch runs
    the model is in eval mode; when its signals are yielded it is in the modes it was in, without hooks. The backward
    pass ends at the modules' outputs: no ``.grad`` is written and no hook of a parameter fires.

    Args:
        model: must treat the examples of a batch independently, first axis N.
        batches: whatever ``per_example_loss`` understands.
        per_example_loss: ``(model, batch)`` to ``(N,)``, each example's own loss: a sum or mean over its own tokens,
            never over the batch.
        module_names: exact qualified names of layers, see :func:`is_measurable_layer`.
        mask: ``batch`` to ``(N, T)``, nonzero at real tokens; see :func:`layer_signals`.
        first_batch: index of the first of these batches, for error messages.

    Yields:
        Module name to signals, in the order of ``module_names``; x and g are laid out as :func:`layer_signals` says.

    Raises:
        ValueError: if a name is unknown, the losses are not ``(N,)`` and differentiable, or a module is not reached by
            the loss of a batch or does not see one row per example.

    Source: docs/methods.md, section 2.

    >>> model = nn.Linear(3, 2)
    >>> batches = [torch.ones(4, 3), torch.ones(1, 3)]
    >>> for batch in per_example_signals(model, batches, lambda model, batch: model(batch).sum(1), [""]):
    ...     print(batch[""].x.shape, batch[""].g.shape, model.weight.grad)
    torch.Size([4, 1, 3]) torch.Size([4, 1, 2]) None
    torch.Size([1, 1, 3]) torch.Size([1, 1, 2]) None
    """
    modules = measurable_modules(model, module_names)
    for index, batch in enumerate(batches, start=first_batch):
        with evaluation_mode(model), torch.enable_grad():
            real = None if mask is None else mask(batch)
            if real is not None and real.ndim == 2 and bool(real.all()):
                real = None  # no padding: nothing to leave out
            signals = _signals(model, batch, per_example_loss, modules, real, index)
        yield signals


def _signals(
    model: nn.Module,
    batch: Batch,
    per_example_loss: Callable[[nn.Module, Batch], Tensor],
    modules: Mapping[str, nn.Module],
    mask: Tensor | None,
    index: int,
) -> dict[str, Signals]:
    """Run one batch; a module without signals, or with signals that are not per example, is an error."""
    signals: dict[str, Signals] = {}
    with (
        layer_signals(model, modules, signals.__setitem__, mask=mask),
        _output_edges(modules.values()) as edges,
    ):
        losses = per_example_loss(model, batch)
        if losses.ndim != 1 or not losses.requires_grad or not edges:
            raise ValueError(
                f"per_example_loss must give losses (N,) that depend on the modules, got {tuple(losses.shape)},"
                f" requires_grad={losses.requires_grad}, {len(edges)} calls of the modules; in batch {index}."
                " Give one loss per example, with its graph."
            )
        torch.autograd.grad(losses.sum(), edges, allow_unused=True)  # for its hooks; writes no .grad
    silent = [name for name in modules if name not in signals]
    if silent:
        raise ValueError(
            f"modules must be reached by the loss, got no gradient for {silent}; in batch {index}. Exclude them."
        )
    rows = {name: len(seen.x) for name, seen in signals.items() if len(seen.x) != len(losses)}
    if rows:
        raise ValueError(
            f"modules must see one row per example, got {rows} for {len(losses)} examples; in batch {index}. Batch and"
            " tokens share an axis there: exclude these modules."
        )
    return _joined(modules, signals)


def _joined(modules: Mapping[str, nn.Module], signals: Mapping[str, Signals]) -> dict[str, Signals]:
    """Join the calls of modules that share a weight under the first one's name, in the modules' order."""
    owners: dict[int, str] = {}
    calls: dict[str, list[Signals]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")  # not what a parametrization makes anew each time it is asked for
        owner = owners.setdefault(id(module if weight is None else weight), name)
        call = signals[name]
        if stores_transpose(module) != stores_transpose(modules[owner]):  # an embedding and the head tied to it
            calls[owner] = [dense(each) for each in calls[owner]]
            call = dense(call)
            call = call._replace(x=call.g, g=call.x)
        calls.setdefault(owner, []).append(call)
    return {name: join(each) for name, each in calls.items()}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and each module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _output_edges(modules: Iterable[nn.Module]) -> Iterator[list[GradientEdge]]:
    """Gather where in the graph the outputs of these modules are: a backward pass to there needs no parameter."""
    edges: list[GradientEdge] = []

    def gather(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if output.requires_grad:
            edges.append(get_gradient_edge(output))

    handles = [module.register_forward_hook(gather) for module in modules]
    try:
        yield edges
    finally:
        for handle in handles:
            handle.remove()
