"""What a past task leaves behind, measured exactly: the second moments of the inputs of modules."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from flowra_compose import ModuleStatistics
from flowra_testing.tiny_models import bert_classifier


@torch.no_grad()
def input_statistics(
    model: nn.Module, names: Collection[str], forward: Callable[[], object]
) -> dict[str, ModuleStatistics]:
    """Run ``forward`` in evaluation mode and return C = E[x xᵀ] of the named modules, in float64."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].flatten(0, -2).double()

        return keep

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    training = model.training
    model.eval()
    forward()
    model.train(training)
    for handle in handles:
        handle.remove()
    assert seen.keys() == set(names), "forward must run every module"
    return {name: ModuleStatistics(inputs=x.T @ x / len(x)) for name, x in seen.items()}


def moment(size: int, rank: int, *, seed: int, decay: float = 1.0) -> Tensor:
    """Return a random second moment ``(size, size)`` of a rank, float64, with falling eigenvalues if decay < 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    x = x * decay ** torch.arange(rank, dtype=torch.float64)
    return x @ x.T


def lively_bert(*, training: bool = False) -> BertForSequenceClassification:
    """Return a tiny classifier whose matrices pass on what they get: at birth they are so small that little arrives."""
    model = bert_classifier(training=training)
    for each in model.parameters():
        if each.ndim == 2:
            each.data.mul_(12.0)  # from a deviation of 0.02 to about 1/√16
    return model
