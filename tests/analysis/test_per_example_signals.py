import pytest
import torch
from torch import Tensor, nn

from flowra_analysis import EmpiricalFisher, fisher_trace, per_example_signals

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


class Network(nn.Module):
    """``tokens`` sees (N, T), ``twice`` first (N, T), then (N, T - 1), ``pooled`` one vector for each example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.twice, self.pooled = (nn.Linear(4, 4) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.twice(torch.tanh(self.tokens(x))))
        h = self.twice(torch.tanh(h[:, 1:]))
        out: Tensor = self.pooled(h.mean(1))
        return out


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def inputs(num: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(num)]


def test_real_tokens_are_those_of_the_mask_where_the_mask_fits_the_call() -> None:
    names = ["pooled", "twice", "tokens"]
    (signals,) = per_example_signals(Network(), inputs(1), loss, names, mask=lambda _: MASK)
    assert list(signals) == names
    assert torch.equal(signals["tokens"].real, MASK.bool())
    assert torch.equal(signals["twice"].real, torch.cat([MASK.bool(), torch.ones(2, 2, dtype=torch.bool)], 1))
    assert signals["pooled"].real is None
    for name, (x, g, real, *_) in signals.items():
        assert x.shape == g.shape
        assert real is None or not g[~real].any(), name


def test_without_a_mask_all_tokens_are_real() -> None:
    (signals,) = per_example_signals(Network(), inputs(1), loss, ["tokens", "twice"])
    assert [each.real for each in signals.values()] == [None, None]


def test_between_batches_the_model_is_in_its_own_modes_without_hooks_also_if_the_loop_ends_early() -> None:
    model = Network().train()
    model.tokens.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    for _ in per_example_signals(model, inputs(3), loss, ["tokens", "pooled"]):
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert not any(module._forward_hooks for module in model.modules())
        break
    with torch.no_grad():
        for _ in per_example_signals(model, inputs(2), loss, ["tokens"]):
            assert not torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loop_of_one_s_own_gives_what_the_ready_made_function_gives() -> None:
    state, names = EmpiricalFisher.init(), ["tokens", "twice", "pooled"]
    for batch in per_example_signals(Network(), inputs(), loss, names, mask=lambda _: MASK):
        for name, signals in batch.items():
            state = state.update(name, signals)
    expected = fisher_trace(Network(), inputs(), loss, names, mask=lambda _: MASK)
    assert {name: pytest.approx(each) for name, each in state.finalise().items()} == expected


def test_an_unknown_name_is_an_error_at_the_first_batch() -> None:
    with pytest.raises(ValueError, match=r"got: no module 'token', nearest names: tokens"):
        next(per_example_signals(Network(), inputs(), loss, ["token"]))
