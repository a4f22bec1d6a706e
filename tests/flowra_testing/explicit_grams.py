"""Bottleneck Grams written out by autograd, example by example, for any adapter with ``lora_A``, ``lora_B``, s."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flowra_allocation import BottleneckGram, RefinableLayer


def losses(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """Return one loss per example."""
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, data["labels"], reduction="none")


def explicit(
    model: nn.Module, layers: Mapping[str, RefinableLayer], data: dict[str, Tensor]
) -> dict[str, BottleneckGram]:
    """Grams of each example's own loss, one example at a time and without its padding, from the layer's ends."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: seen.update({name: [args[0], output]})

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    totals: dict[str, BottleneckGram] = {}
    for index, length in enumerate(data["attention_mask"].sum(1).tolist()):
        one = {"labels": data["labels"][index : index + 1]} | {
            key: data[key][index : index + 1, :length] for key in ("input_ids", "attention_mask")
        }
        loss = losses(model, one).sum()
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in layers])
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            z = (seen[name][0].flatten(0, -2) @ layer.lora_A.T).detach()
            delta = layer.scaling * gradient.flatten(0, -2) @ layer.lora_B.detach()
            gram = BottleneckGram(z.T @ z, delta.T @ delta, float(len(z)), 1.0)
            totals[name] = totals[name] + gram if name in totals else gram
    for handle in handles:
        handle.remove()
    return totals


def assert_same(actual: dict[str, BottleneckGram], expected: dict[str, BottleneckGram]) -> None:
    """Compare to rounding of float64; counts exactly."""
    assert actual.keys() == expected.keys()
    for name, gram in actual.items():
        other = expected[name]
        assert (gram.tokens, gram.examples) == (other.tokens, other.examples)
        torch.testing.assert_close(gram.activations, other.activations.detach(), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(gram.gradients, other.gradients.detach(), rtol=1e-8, atol=1e-12)
