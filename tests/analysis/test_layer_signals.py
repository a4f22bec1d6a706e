import math

import pytest
import torch
from torch import Tensor, nn

from flowra_analysis import Signals, layer_signals

Found = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _float64_seeded() -> None:
    torch.manual_seed(0)


def network(frozen: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().requires_grad_(not frozen)


def collect(model: nn.Module, names: list[str], *inputs: Tensor, mask: Tensor | None = None) -> Found:
    found: Found = {}
    with layer_signals(model, names, lambda name, seen: found.update({name: (seen.x, seen.g)}), mask=mask):
        sum(model(x).square().sum() for x in inputs).backward()
    return found


@pytest.mark.parametrize("shape", [(6, 4), (6, 7, 4), (6, 2, 3, 4)], ids=["pooled", "tokens", "image"])
def test_weight_gradient_is_the_sum_of_g_times_x(shape: tuple[int, ...]) -> None:
    model = network()
    for name, (x, g) in collect(model, ["0", "2"], torch.randn(shape).double()).items():
        assert x.shape[:2] == g.shape[:2] == (6, math.prod(shape[1:-1]))
        assert not x.requires_grad
        torch.testing.assert_close(torch.einsum("ntm,ntk->mk", g, x), model.get_submodule(name).weight.grad)


def test_frozen_model_gives_the_signals_of_the_trainable_one() -> None:
    x, model = torch.randn(6, 7, 4).double(), network()
    trainable = collect(model, ["0", "2"], x)
    frozen = collect(model.requires_grad_(False), ["0", "2"], x)
    assert all(torch.equal(a, b) for name in trainable for a, b in zip(trainable[name], frozen[name], strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_in_place_activation_after_the_module_does_not_change_g(frozen: bool) -> None:
    x = torch.randn(6, 4).double()
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU()).double().requires_grad_(not frozen)
    in_place = nn.Sequential(plain[0], nn.ReLU(inplace=True))
    expected, found = collect(plain, ["0"], x)["0"], collect(in_place, ["0"], x)["0"]
    assert torch.equal(expected[1], found[1])


class AddedInPlace(nn.Module):
    """What PEFT's AdaLoRA does with the output of its base layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.update = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        y += self.update(x)
        return y


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)], ids=["pooled", "tokens"])
def test_an_output_changed_in_place_afterwards_keeps_its_signals(shape: tuple[int, ...], frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = AddedInPlace().requires_grad_(not frozen), torch.randn(shape).double().requires_grad_()
    found, g = collect(model, ["fc"], x)["fc"]
    y = model(x).detach()
    torch.testing.assert_close(g.flatten(0, 1), 2 * y.flatten(0, -2))
    torch.testing.assert_close(found.flatten(0, 1), x.detach().flatten(0, -2))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x += self.fc(x)
        return x


def test_input_changed_in_place_is_an_error_and_not_a_wrong_number() -> None:
    with pytest.raises(ValueError, match=r"input must not be changed in place after the call, got a change at 'fc'"):
        collect(Residual(), ["fc"], torch.randn(2, 4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(input=x)
        self.fc(x)  # reaches no loss
        return self.fc(hidden.tanh()[:, :2])


def test_calls_of_one_module_are_joined_along_tokens_in_order_and_unreached_calls_left_out() -> None:
    model, x = Twice(), torch.randn(3, 5, 4).double()
    found, g = collect(model, ["fc"], x)["fc"]
    assert found.shape == (3, 7, 4)
    assert torch.equal(found[:, :5], x)
    torch.testing.assert_close(torch.einsum("ntm,ntk->mk", g, found), model.fc.weight.grad)


def test_calls_that_disagree_about_examples_are_refused() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"calls of a module must agree about N, got \[3, 2\]"):
        collect(model, [""], torch.randn(3, 4), torch.randn(2, 4))


def test_each_backward_pass_is_handed_over_by_itself() -> None:
    model, x = network(), torch.randn(2, 3, 4).double()
    calls: list[tuple[str, Tensor]] = []
    with layer_signals(model, ["2", "0"], lambda name, seen: calls.append((name, seen.g))):
        first, second = model(x[:1]).sum(), model(x[1:]).square().sum()
        assert not calls
        second.backward()
        assert [name for name, _ in calls] == ["2", "0"]
        first.backward(retain_graph=True)
        first.backward()
    assert [name for name, _ in calls] == ["2", "0"] * 3
    assert torch.equal(calls[2][1], calls[4][1])
    assert not torch.equal(calls[0][1], calls[2][1])


def test_mask_zeroes_padding_only_where_the_axis_is_the_token_axis() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 4).double()
    _, g = collect(network(), ["0"], x, mask=mask)["0"]
    assert torch.equal(g.abs().sum(-1) > 0, mask.bool())
    model = network()
    unmasked, pooled = collect(model, ["0"], x[:, 0]), collect(model, ["0"], x[:, 0], mask=mask)
    assert torch.equal(unmasked["0"][1], pooled["0"][1])


def test_nan_gradient_at_padding_is_left_out() -> None:
    x = torch.ones(1, 2, 4)
    x[0, 1] = torch.nan
    _, g = collect(nn.Linear(4, 2), [""], x, mask=torch.tensor([[True, False]]))[""]
    assert torch.isfinite(g).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3), r"mask must have shape \(N, T\), got \(3,\)"),
        (torch.ones(3, 5), r"mask must have one row per example, got 3 for 2 at '0'"),
    ],
)
def test_mask_that_does_not_fit_is_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(network(), ["0"], torch.randn(2, 5, 4).double(), mask=mask)


def test_hooks_are_gone_after_an_error_and_later_passes_hand_over_nothing() -> None:
    model, seen = network(), []
    losses: list[Tensor] = []

    def fail_inside() -> None:
        with layer_signals(model, ["0", "2"], lambda name, _: seen.append(name)):
            losses.append(model(torch.randn(2, 4).double()).sum())
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        fail_inside()
    assert not any(module._forward_hooks for module in model.modules())
    losses[0].backward()
    assert not seen


def test_error_in_the_callback_is_raised_by_backward() -> None:
    model, fail = network(), True
    seen: list[str] = []

    def callback(name: str, signals: Signals) -> None:
        if fail:
            raise KeyError(f"boom at {name}")
        seen.append(name)

    with layer_signals(model, ["0", "2"], callback):
        with pytest.raises(KeyError, match="boom at 0"):
            model(torch.randn(2, 4).double()).sum().backward()
        fail = False
        model(torch.randn(2, 4).double()).sum().backward()
    assert seen == ["0", "2"]


def test_forward_without_grad_mode_is_left_alone() -> None:
    model = network()
    with layer_signals(model, ["0"], lambda name, seen: None), torch.no_grad():
        assert not model(torch.randn(2, 4).double()).requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    model, x = network(), torch.randn(3, 4).double().requires_grad_()
    expected = collect(model, ["0", "2"], x)
    found: Found = {}
    with layer_signals(model, ["0", "2"], lambda name, seen: found.update({name: (seen.x, seen.g)})):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(a, b) for name in expected for a, b in zip(expected[name], found[name], strict=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"module_names must hold at least one name, got none"),
        (["0", "1", "3"], r"got: '1' is a Tanh; no module '3', nearest names: 0, 2"),
        ("fc", r"no module 'fc'"),
    ],
)
def test_names_that_are_not_linear_modules_are_all_reported(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(network(), names, torch.randn(2, 4).double())


def test_input_without_example_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input must have shape \(N, …, n\), got \(4,\) at '0'"):
        collect(network(), ["0"], torch.randn(4).double())
