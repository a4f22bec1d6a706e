"""Gather bottleneck Grams, and where wanted gradient sketches, while a model runs forward and backward.

Nothing is recomputed: z and ∂ℓ/∂z pass by in training anyway. Passes without gradient (evaluation, the first pass under
gradient checkpointing) are not counted.
"""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowra_allocation.bottleneck_gram import BottleneckGram
from flowra_allocation.forms import AnyLayer, live_factors, live_slots
from flowra_allocation.growth import GradientSketch

__all__ = ["BottleneckObserver"]


class BottleneckObserver:
    """Collect statistics of named layers inside a ``with`` block.

    Args:
        model: whose forward calls delimit batches; ``attention_mask`` ``(N, T)`` among its keyword arguments marks
            padding, which is left out.
        layers: module name in the model to the adapter on it.
        loss: ``"mean"`` if the loss is a mean over the examples of a batch (gradients are then multiplied by the batch
            size, to be those of each example's own loss), ``"sum"`` if it is a sum.
        sketch: also sketch the gradient that the adapters cannot follow, for growth.
        generator: source of randomness of the sketches; required with ``sketch``.

    Attributes:
        grams: module name to a list with one entry per batch.
        sketches: module name to sketch, empty unless asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AnyLayer],
        *,
        loss: Literal["mean", "sum"],
        sketch: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.grams: dict[str, list[BottleneckGram]] = {name: [] for name in layers}
        self.sketches: dict[str, GradientSketch] = {}
        self._model = model
        self._layers = layers
        self._loss = loss
        self._mask: Tensor | None = None
        self._examples = 1
        self._batch = 0
        self._last_batch: dict[str, int] = {}
        self._stack = ExitStack()
        if sketch:
            assert generator is not None
            self.sketches = {
                name: GradientSketch(live["lora_A"], live["lora_B"], generator=generator)
                for name, live in ((name, live_factors(layer)) for name, layer in layers.items())
            }

    def total(self) -> dict[str, BottleneckGram]:
        """Sum the batches. A layer that the loss did not reach has no gains: see :meth:`unreached`.

        Returns:
            Module name to Gram, for the layers of rank ≥ 1.

        Raises:
            ValueError: if there are such layers and none was reached.
        """
        live = [name for name, layer in self._layers.items() if layer.rank > 0]
        if live and len(self.unreached()) == len(live):
            raise ValueError("observer must see at least one forward and backward pass, got none")
        return {name: self._total(name) for name in live}

    def _total(self, name: str) -> BottleneckGram:
        layer, grams = self._layers[name], self.grams[name]
        if not grams:
            return BottleneckGram.empty(layer.rank)
        return sum(grams[1:], grams[0]).at(live_slots(layer))

    def unreached(self) -> list[str]:
        """Name the layers of rank ≥ 1 that no backward pass reached."""
        return [name for name, layer in self._layers.items() if layer.rank > 0 and not self.grams[name]]

    def gathered(self) -> dict[str, dict[str, Tensor]]:
        """Return, between two batches, what was gathered so far: enough for another observer to go on from.

        Returns:
            Module name to tensors: ``activations`` and ``gradients``, ``(r, r)``, and ``counts`` (tokens, examples),
            float64, for layers of rank ≥ 1; with sketches, those of :meth:`GradientSketch.state` for all layers.
        """
        made: dict[str, dict[str, Tensor]] = {name: {} for name in self._layers}
        for name, layer in self._layers.items():
            if layer.rank > 0:
                grams = self.grams[name]
                gram = sum(grams[1:], grams[0]) if grams else BottleneckGram.empty(len(layer.lora_A))
                counts = torch.tensor([gram.tokens, gram.examples], dtype=torch.float64)
                made[name] = {"activations": gram.activations, "gradients": gram.gradients, "counts": counts}
        for name, sketch in self.sketches.items():
            made[name] |= sketch.state()
        return made

    def go_on(self, gathered: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what another observer of these layers has :meth:`gathered`; call before the first batch.

        Sums are the same bit by bit as if one observer had seen all batches, for it would have added the next batch to
        this sum too. The batches themselves are not told apart any more.
        """
        for name, tensors in gathered.items():
            if "counts" in tensors:
                sums = BottleneckGram(tensors["activations"], tensors["gradients"], *tensors["counts"].tolist())
                self.grams[name] = [sums] if sums.examples else []  # 0 where no batch reached the layer
            if name in self.sketches:
                self.sketches[name].restore(tensors)

    def __enter__(self) -> "BottleneckObserver":
        if "torch._dynamo" in sys.modules:  # compiled code would not call the hooks, and need not be made anew
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        handle = self._model.register_forward_pre_hook(self._begin_batch, with_kwargs=True)
        self._stack.callback(handle.remove)
        for name, layer in self._layers.items():
            if layer.rank > 0:
                layer.observer = partial(self._see_bottleneck, name)
                self._stack.callback(setattr, layer, "observer", None)
        for name in self.sketches:
            # A layer that knows its host is named as in the base model, not as in the wrapper that is called.
            module = getattr(self._layers[name], "host", None) or self._model.get_submodule(name)
            handle = module.register_forward_hook(partial(self._see_layer, name), with_kwargs=True)
            self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _begin_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(kwargs)
        for value in args:  # a batch may be one positional mapping
            inputs |= value if isinstance(value, Mapping) else {str(len(inputs)): value}
        tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim > 0]
        self._examples = len(tensors[0]) if tensors else 1
        mask = inputs.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._batch += 1

    def _see_bottleneck(self, name: str, z: Tensor) -> None:
        if z.requires_grad and torch.is_grad_enabled():
            seen = z.detach()
            z.register_hook(partial(self._add_gram, name, seen, self._mask, self._examples, self._batch))

    def _add_gram(self, name: str, z: Tensor, mask: Tensor | None, examples: int, batch: int, delta: Tensor) -> None:
        scale = examples if self._loss == "mean" else 1
        again = self._last_batch.get(name) == batch  # a module called twice sees the same examples again
        gram = BottleneckGram.of(_tokens(z, mask), _tokens(delta, mask) * scale, examples=0 if again else examples)
        if again:
            self.grams[name][-1] += gram
        else:
            self.grams[name].append(gram)
        self._last_batch[name] = batch

    def _see_layer(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        # In front of all trainable layers there is no graph yet. The copy lets what follows work in place.
        traced = output if output.requires_grad else output.requires_grad_().clone()
        x: Tensor = args[0] if args else kwargs["input"]
        traced.register_hook(partial(self._add_sketch, name, x.detach()))
        return traced

    def _add_sketch(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self.sketches[name].update(x.flatten(0, -2), gradient.flatten(0, -2))


def _tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Flatten ``(…, r)`` to ``(tokens, r)``, padding left out where the mask fits."""
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return values[mask]
    return values.flatten(0, -2)
