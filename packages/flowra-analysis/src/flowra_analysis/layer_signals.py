"""What passes through a layer: its input x and the gradient g at its output, for each backward pass.

Everything Flowra measures on a linear layer y = x Wᵀ + b is a function of x and g = ∂ℓ/∂y, summed over tokens: the
gradient of one example is G = Σ_t g_t x_tᵀ. So no ``weight.grad`` is needed, and a frozen base can be measured.

Conventions: N examples, T tokens, x is ``(N, T, n)`` and g is ``(N, T, m)`` for a weight ``(m, n)``.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

__all__ = ["layer_signals"]


@contextmanager
def layer_signals(
    model: nn.Module,
    module_names: Iterable[str],
    callback: Callable[[str, Tensor, Tensor], None],
    *,
    mask: Tensor | None = None,
) -> Iterator[None]:
    """Hand the input and output gradient of each named module to a callback at the end of each backward pass.

    Forward and backward must both run inside the block; a backward pass that comes later hands over nothing. On exit,
    also after an error, the hooks are gone and the model is as it was.

    A frozen model works: where grad mode is on and neither the module nor anything before it requires grad, the
    module's output is made to require it, so the graph begins there. No parameter changes.

    Layout: an input ``(N, n)``, such as that of a head on a pooled vector, has T = 1; further axes between the first
    and the last are flattened into T. Calls of one module within one pass are joined along the token axis, in the order
    of the calls; calls that no gradient reached add nothing to G and are left out. x and g are detached, in their own
    dtypes and on the device of the layer, and are kept until the backward pass ends.

    Args:
        model: any model.
        module_names: exact qualified names of ``nn.Linear`` modules, at least one.
        callback: called as ``callback(name, x, g)``, in the order of ``module_names``, without grad mode. Modules that
            no gradient reached are not reported.
        mask: ``(N, T)``, nonzero at real tokens; for all passes in the block, so open one block per batch. Sets g to
            zero at padding, which matters where the loss depends on padded positions (a mean over all positions, or
            attention without a mask): G is then the gradient with the padded part of the sum left out. It does not
            undo what padding does to real tokens. Modules whose input is not ``(N, T, n)`` with the T of the mask,
            such as pooled heads, are left as they are.

    Yields:
        Nothing.

    Raises:
        ValueError: if a name is not that of an ``nn.Linear``, an input has no example axis or is changed in place
            after the call, the calls of a module disagree about N, or the mask does.

    Source: docs/methods.md, section 2; per-example gradients from x and g after Goodfellow (2015), arXiv:1510.01799.
    """
    modules = linear_modules(model, module_names)
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"mask must have shape (N, T), got {tuple(mask.shape)}")
    recorder = Recorder(list(modules), callback, mask)
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(recorder.watch, name), with_kwargs=True))
        yield
    finally:
        recorder.closed = True
        for handle in handles:
            handle.remove()


def linear_modules(model: nn.Module, module_names: Iterable[str]) -> dict[str, nn.Linear]:
    """Look up linear modules by qualified name.

    Returns:
        Name to module, in the order given.

    Raises:
        ValueError: if there is no name, or one is not that of an ``nn.Linear``; all such names are reported.
    """
    by_name = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Linear] = {}
    problems = []
    for name in [module_names] if isinstance(module_names, str) else module_names:
        module = by_name.get(name)
        if isinstance(module, nn.Linear):
            found[name] = module
        elif module is not None:
            problems.append(f"{name!r} is a {type(module).__name__}")
        else:
            linear = [each for each, candidate in by_name.items() if isinstance(candidate, nn.Linear)]
            near = difflib.get_close_matches(name, linear, n=3) or linear[:3]
            problems.append(f"no module {name!r}, nearest names: {', '.join(near) or 'none'}")
    if problems:
        raise ValueError(f"module_names must be names of nn.Linear modules, got: {'; '.join(problems)}")
    if not found:
        raise ValueError("module_names must hold at least one name, got none")
    return found


class Recorder:
    """Pairs each call's input with the gradient of its output, one backward pass (autograd graph task) at a time."""

    def __init__(self, names: list[str], callback: Callable[[str, Tensor, Tensor], None], mask: Tensor | None) -> None:
        self.names = names
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
        x: Tensor = args[0] if args else kwargs["input"]
        if x.ndim < 2:
            raise ValueError(f"input must have shape (N, …, n), got {tuple(x.shape)} at {name!r}. Add a batch axis.")
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a copy: a leaf could not be changed in place by what follows
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
        for name in self.names:
            if name in by_name:
                calls = [by_name[name][call] for call in sorted(by_name[name])]
                x, g = zip(*(self.tokens(name, *call) for call in calls), strict=True)
                if len({len(each) for each in x}) > 1:
                    raise ValueError(
                        f"calls of a module must agree about N, got {[len(each) for each in x]} at {name!r}."
                        " Exclude the module."
                    )
                self.callback(name, torch.cat(x, 1) if len(x) > 1 else x[0], torch.cat(g, 1) if len(g) > 1 else g[0])

    def tokens(self, name: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Bring one call to ``(N, T, n)`` and ``(N, T, m)``, g zero at padding."""
        is_sequence = x.ndim == 3
        x, g = x.unsqueeze(1).flatten(1, -2), g.unsqueeze(1).flatten(1, -2)
        if self.mask is not None and len(self.mask) != len(x):
            raise ValueError(f"mask must have one row per example, got {len(self.mask)} for {len(x)} at {name!r}")
        if self.mask is not None and is_sequence and self.mask.shape == x.shape[:2]:
            g = g.masked_fill((self.mask == 0).to(g.device).unsqueeze(-1), 0)
        return x, g
