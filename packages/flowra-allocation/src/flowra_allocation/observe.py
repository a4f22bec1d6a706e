"""Gather bottleneck Grams, and where wanted gradient sketches, while a model runs forward and backward.

Nothing is recomputed: z and ∂ℓ/∂z pass by in training anyway. Passes without gradient (evaluation, the first pass under
gradient checkpointing) are not counted.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowra_allocation.bottleneck_gram import BottleneckGram
from flowra_allocation.eager import run_eagerly
from flowra_allocation.forms import AnyLayer, has_slots, live_factors, live_slots
from flowra_allocation.growth import GradientSketch

__all__ = ["BottleneckObserver", "check_growable"]


class Padded:
    """A batch whose mask ``(N, T)`` marks tokens that are none; a device is asked once for those that are."""

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self._real = mask.flatten().nonzero().squeeze(1)

    def real(self, values: Tensor) -> Tensor:
        """Return ``(tokens, r)`` of values ``(N, T, r)``."""
        return values.flatten(0, 1).index_select(0, self._real.to(values.device))


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
        grams: module name to a list with one entry per batch; on the device of the layer, which is not waited for.
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
        self._padded: Padded | None = None
        self._examples = 1
        self._batch = 0
        self._last_batch: dict[str, int] = {}
        self._shown: set[str] = set()
        self._trained: set[str] = set()
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
            Module name to Gram, on the CPU, for the layers of rank ≥ 1.

        Raises:
            ValueError: if there are such layers and none was reached, or one was trained but never showed z.
        """
        hidden = sorted(self._trained - self._shown)
        if hidden:
            raise ValueError(
                f"layers must show their bottleneck where directions are ranked by flow, got none from {hidden[0]!r}:"
                " its update stands in the weight's place. Rank by magnitude, or leave it out."
            )
        live = [name for name, layer in self._layers.items() if layer.rank > 0]
        if live and len(self.unreached()) == len(live):
            raise ValueError("observer must see at least one forward and backward pass, got none")
        return {name: self._total(name) for name in live}

    def _total(self, name: str) -> BottleneckGram:
        layer, total = self._layers[name], self._sum(name)
        return total.at(live_slots(layer)) if has_slots(layer) else total

    def _sum(self, name: str) -> BottleneckGram:
        """Add up the batches, in their order, but those that are not finite: a GradScaler leaves out their steps too.

        Returns:
            The sums, on the CPU.
        """
        grams = self.grams[name]
        if grams and not (total := sum(grams[1:], grams[0]).to("cpu")).finite:
            grams = [gram for gram in grams if gram.finite]
            total = sum(grams[1:], grams[0]).to("cpu") if grams else total
        return total if grams else BottleneckGram.empty(len(self._layers[name].lora_A))

    def unreached(self) -> list[str]:
        """Name the layers of rank ≥ 1 that no backward pass reached."""
        return [name for name, layer in self._layers.items() if layer.rank > 0 and not self.grams[name]]

    def gathered(self) -> dict[str, dict[str, Tensor]]:
        """Return, between two batches, what was gathered so far: enough for another observer to go on from.

        Returns:
            Module name to tensors: ``activations`` and ``gradients``, ``(r, r)``, and ``counts`` (tokens, examples),
            float64, on the CPU, for layers of rank ≥ 1; with sketches, those of :meth:`GradientSketch.state` for all
            layers.
        """
        made: dict[str, dict[str, Tensor]] = {name: {} for name in self._layers}
        for name, layer in self._layers.items():
            if layer.rank > 0:
                gram = self._sum(name)
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
                # 0 where no batch reached the layer
                self.grams[name] = [sums.to(_held_on(self._layers[name].lora_A))] if sums.examples else []
            if name in self.sketches:
                self.sketches[name].restore(tensors)

    def __enter__(self) -> "BottleneckObserver":
        self._stack.callback(run_eagerly(self._model))
        handle = self._model.register_forward_pre_hook(self._begin_batch, with_kwargs=True)
        self._stack.callback(handle.remove)
        for name, layer in self._layers.items():
            if layer.rank > 0:
                layer.observer = partial(self._see_bottleneck, name)
                self._stack.callback(setattr, layer, "observer", None)
                if layer.lora_B.requires_grad:
                    learns = layer.lora_B.register_post_accumulate_grad_hook(partial(_note, name, self._trained))
                    self._stack.callback(learns.remove)
        for name in self.sketches:
            # A layer that knows its host is named as in the base model, not as in the wrapper that is called.
            module = _host(self._model, name, self._layers[name])
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
        self._padded = Padded(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._batch += 1

    def _see_bottleneck(self, name: str, z: Tensor) -> None:
        if z.requires_grad and torch.is_grad_enabled():
            self._shown.add(name)
            seen = z.detach()
            z.register_hook(partial(self._add_gram, name, seen, self._padded, self._examples, self._batch))

    def _add_gram(self, name: str, z: Tensor, padded: Padded | None, examples: int, batch: int, delta: Tensor) -> None:
        scale = examples if self._loss == "mean" else 1
        again = self._last_batch.get(name) == batch  # a module called twice sees the same examples again
        z, delta = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (z, delta))
        rank = len(self._layers[name].lora_A)
        if z.shape[-1] != rank:  # a convolution of several groups, which share A: as many tokens more
            z, delta = (each.unflatten(-1, (-1, rank)) for each in (z, delta))
        gram = BottleneckGram.of(
            _tokens(z, padded), _tokens(delta, padded) * scale, examples=0 if again else examples, device=_held_on(z)
        )
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


def check_growable(model: nn.Module, layers: Mapping[str, AnyLayer]) -> None:
    """Refuse layers whose gradient cannot be sketched: all but linear ones.

    Raises:
        ValueError: if there is one.
    """
    for name, layer in layers.items():
        known = hasattr(layer, "host")
        try:
            host = _host(model, name, layer)
        except AttributeError:  # a part of a weight, or a parameter, is no module
            host = None
        if not known and not isinstance(host, nn.Linear) and type(host).__name__ != "Conv1D":
            raise ValueError(
                "layers must be linear where new directions follow the gradient, got"
                f" {'a part of a weight' if host is None else type(host).__name__} at {name!r}. Shrink instead."
            )


def _host(model: nn.Module, name: str, layer: AnyLayer) -> nn.Module:
    return getattr(layer, "host", None) or model.get_submodule(name)


def _note(name: str, names: set[str], parameter: Tensor) -> None:
    """Hook of a Parameter: it must not lead to the model, which would then never be let go."""
    names.add(name)


def _tokens(values: Tensor, padded: Padded | None) -> Tensor:
    """Flatten ``(…, r)`` to ``(tokens, r)``, padding left out where the mask fits."""
    if padded is not None and values.ndim == 3 and values.shape[:2] == padded.shape:
        return padded.real(values)
    return values.flatten(0, -2)


def _held_on(tensor: Tensor) -> torch.device:
    """Return the device of a tensor, or the CPU where it has no float64."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device
