"""``torch.compile`` takes adapted models whole: no graph break, equal outputs and gradients.

The page of capabilities tries every method on every layer type.
"""

import pytest
import torch
from torch import Tensor, nn

from flowra_adapters import attach
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import llama_causal_lm, seeded

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile's own


class Convolutions(nn.Module):
    """A strided, a grouped and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, stride=2)
        self.two = nn.Conv2d(8, 8, 3, groups=4, padding=1, padding_mode="circular")
        self.three = nn.ConvTranspose2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to images."""
        output: Tensor = self.three(torch.relu(self.two(torch.relu(self.one(x)))))
        return output


def adapted(model: nn.Module, pattern: str, method: str) -> nn.Module:
    for seed, one in enumerate(attach(model, {pattern: 2}, method=method).values()):
        randomise(one, seed=seed)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def assert_compiled_equals_eager(model: nn.Module, x: Tensor, backend: str) -> None:
    def answer(callee: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        output = callee(x)
        values: Tensor = getattr(output, "logits", output)
        values.square().mean().backward()
        return values.detach(), gradients(model)

    expected, wanted = answer(model)
    torch._dynamo.reset()
    output, found = answer(torch.compile(model, fullgraph=True, backend=backend))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert found.keys() == wanted.keys()
    assert wanted
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_language_model_has_no_graph_break(method: str) -> None:
    model = adapted(llama_causal_lm(), "all-linear", method)
    assert_compiled_equals_eager(model, torch.arange(12).reshape(2, 6), "aot_eager")


@pytest.mark.parametrize("method", ["svd_masked", "flora"])
def test_convolutions_have_no_graph_break(method: str) -> None:
    with seeded(0):
        model = adapted(Convolutions(), "all-conv", method)
    assert_compiled_equals_eager(model, torch.randn(2, 3, 9, 9), "aot_eager")


@pytest.mark.exhaustive
def test_the_default_back_end_compiles_an_adapted_model() -> None:
    model = adapted(llama_causal_lm(), "all-linear", "lora")
    assert_compiled_equals_eager(model, torch.arange(12).reshape(2, 6), "inductor")
