"""The fused step is the composed one: same values, same derivatives, and it steps aside where it must."""

import copy
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from flowra_adapters import LoRA, attach
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import seeded

Layer = Callable[[], nn.Module]
LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "linear_without_bias": lambda: nn.Linear(5, 4, bias=False),
    "conv1d": lambda: Conv1D(4, 5),
}
KINDS = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def adapted(
    build: Layer = LAYERS["linear"], *, rank: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[nn.Sequential, LoRA]:
    with seeded(0):
        model = nn.Sequential(build()).to(dtype)
    one = attach(model, {"0": rank}, scaling=1.5)["0"]
    assert isinstance(one, LoRA)
    randomise(one)
    return model, one


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def derivatives(model: nn.Module, one: LoRA, x: Tensor) -> list[Tensor]:
    output = model(x)
    found = torch.autograd.grad(output.pow(3).sum(), [x, one.lora_A, one.lora_B])
    return [output.detach(), *found]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Count where the fused step is taken: added to the output, or folded into the weight for the pass."""
    calls: list[nn.Module] = []
    count(monkeypatch, "fused_update", calls)
    count(monkeypatch, "folded_update", calls)
    return calls


def count(monkeypatch: pytest.MonkeyPatch, name: str, calls: list[nn.Module]) -> None:
    module = import_module("flowra_adapters.applying")
    original = getattr(module, name)

    def counting(layer: nn.Module, *arguments: object) -> Tensor:
        calls.append(layer)
        return original(layer, *arguments)

    monkeypatch.setattr(module, name, counting)


@KINDS
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (4, 5)], ids=str)
def test_values_and_gradients_equal_the_composed_ones(
    build: Layer, shape: tuple[int, ...], fused_calls: list[nn.Module]
) -> None:
    model, one = adapted(build)
    x = inputs(*shape)
    fused = derivatives(model, one, x)
    assert len(fused_calls) == 1
    _hook_in_front(model, one)
    composed = derivatives(model, one, x)
    assert len(fused_calls) == 1
    for actual, expected in zip(fused, composed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 11, 12, 16])
@pytest.mark.parametrize("rows", [9, 45], ids=["added", "folded"])
def test_factors_on_both_sides_of_narrow_give_the_composed_ones(
    rank: int, rows: int, fused_calls: list[nn.Module]
) -> None:
    model, one = adapted(lambda: nn.Linear(20, 16), rank=rank)
    x = torch.randn(rows, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    fused = derivatives(model, one, x)
    _hook_in_front(model, one)
    for actual, expected in zip(fused, derivatives(model, one, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert len(fused_calls) == 1


@KINDS
@pytest.mark.parametrize("rows", [3, 12], ids=["added", "folded"])
def test_first_and_second_derivatives_are_right(build: Layer, rows: int, fused_calls: list[nn.Module]) -> None:
    model, one = adapted(build)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        output = torch.func.functional_call(
            model, {"0.adapters.default.lora_A": a, "0.adapters.default.lora_B": b}, (x,)
        )
        assert isinstance(output, Tensor)
        return output

    arguments = (inputs(rows), one.lora_A, one.lora_B)
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)
    assert fused_calls


def test_an_input_without_gradient_gets_none_and_a_frozen_factor_neither(fused_calls: list[nn.Module]) -> None:
    model, one = adapted()
    one.lora_A.requires_grad_(False)
    model(inputs(3).detach()).sum().backward()
    assert one.lora_A.grad is None
    assert one.lora_B.grad is not None
    assert fused_calls


def test_the_graph_of_the_base_layer_is_not_kept(fused_calls: list[nn.Module]) -> None:
    model, _ = adapted()
    output = model(inputs(3))
    assert type(output.grad_fn).__name__.startswith("_FusedUpdate")
    assert type(model(inputs(12)).grad_fn).__name__.startswith("_FoldedUpdate")
    assert len(fused_calls) == 2


def test_the_weight_is_folded_where_rows_outnumber_its_own_and_is_itself_again_after_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded: list[nn.Module] = []
    count(monkeypatch, "folded_update", folded)
    model, _ = adapted()
    weight = model[0].weight
    for rows, expected in ((11, 0), (12, 1)):  # 5 m n = 100, m + n = 9
        model(inputs(rows)).sum().backward()
        assert len(folded) == expected
        assert model[0].weight is weight
        assert weight.grad is None
    bias, model[0].bias = model[0].bias, nn.Parameter(torch.zeros(3), requires_grad=False)
    with pytest.raises(RuntimeError):  # the pass breaks off in the layer
        model(inputs(12))
    model[0].bias = bias
    model(inputs(1))
    assert model[0].weight is weight


def test_in_half_precision_the_weight_is_not_folded_which_would_round_the_update_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded: list[nn.Module] = []
    count(monkeypatch, "folded_update", folded)
    model, _ = adapted(dtype=torch.bfloat16)
    model.to(torch.bfloat16)(inputs(40).bfloat16()).sum().backward()
    assert not folded


def test_recomputing_a_checkpointed_block_gives_the_same_gradients() -> None:
    model, one = adapted()
    x = inputs(3)
    model(x).pow(3).sum().backward()
    expected = [x.grad, one.lora_A.grad, one.lora_B.grad]
    for use_reentrant in (False, True):
        x.grad = one.lora_A.grad = one.lora_B.grad = None
        checkpoint(model, x, use_reentrant=use_reentrant).pow(3).sum().backward()
        assert all(
            torch.equal(actual, wanted)
            for actual, wanted in zip([x.grad, one.lora_A.grad, one.lora_B.grad], expected, strict=True)
        )


def _drop(model: nn.Sequential, one: LoRA) -> None:
    one.dropout = 0.5
    model.train()


def _train_the_base(model: nn.Sequential, one: LoRA) -> None:
    model[0].bias.requires_grad_(True)


def _hook_in_front(model: nn.Sequential, one: LoRA) -> None:
    model[0].register_forward_hook(lambda module, args, output: None, prepend=True)


def _replace_forward(model: nn.Sequential, one: LoRA) -> None:
    original = model[0].forward
    model[0].forward = lambda x: original(x)


def _second_adapter(model: nn.Sequential, one: LoRA) -> None:
    randomise(attach(model, {"0": 1}, adapter="second")["0"])


def _narrow_base(model: nn.Sequential, one: LoRA) -> None:
    model[0].weight.data, model[0].bias.data = model[0].weight.data.float(), model[0].bias.data.float()


STEPS_ASIDE = {
    "dropout_acts": _drop,
    "the_layer_itself_learns": _train_the_base,
    "another_hook_sees_the_output": _hook_in_front,
    "forward_was_replaced": _replace_forward,
    "there_are_two_adapters": _second_adapter,
    "dtypes_are_mixed": _narrow_base,
}


@pytest.mark.parametrize("change", STEPS_ASIDE.values(), ids=STEPS_ASIDE)
def test_it_steps_aside_where(change: Callable[[nn.Sequential, LoRA], None], fused_calls: list[nn.Module]) -> None:
    model, one = adapted()
    change(model, one)
    dtype = model[0].weight.dtype
    model(inputs(3).to(dtype)).sum().backward()
    assert not fused_calls
    assert one.lora_B.grad is not None


@KINDS
@pytest.mark.parametrize("shape", [(), (3,), (12,), (0,), (2, 3)], ids=str)
def test_an_observer_sees_z_and_its_gradient_in_the_fused_step(
    build: Layer, shape: tuple[int, ...], fused_calls: list[nn.Module]
) -> None:
    model, one = adapted(build)
    x, shown, gradients = inputs(*shape), [], []

    def observer(z: Tensor) -> None:
        shown.append(z.detach())
        z.register_hook(gradients.append)

    one.observer = observer
    fused = derivatives(model, one, x)
    assert len(fused_calls) == 1
    _hook_in_front(model, one)
    composed = derivatives(model, one, x)
    assert len(fused_calls) == 1
    for actual, expected in (*zip(fused, composed, strict=True), shown, gradients):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_derivatives_while_observed_are_right(fused_calls: list[nn.Module]) -> None:
    model, one = adapted()
    one.observer = lambda z: None

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        output = torch.func.functional_call(
            model, {"0.adapters.default.lora_A": a, "0.adapters.default.lora_B": b}, (x,)
        )
        assert isinstance(output, Tensor)
        return output

    arguments = (inputs(3), one.lora_A, one.lora_B)
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)
    assert fused_calls


def test_what_an_observer_makes_of_z_has_a_gradient() -> None:
    model, one = adapted()
    shown: list[Tensor] = []
    one.observer = shown.append
    x = inputs(3)
    model(x)
    (found,) = torch.autograd.grad(shown[0].square().sum(), one.lora_A)
    torch.testing.assert_close(found, 2 * (x @ one.lora_A.T).T @ x)


def test_a_hook_that_comes_after_sees_the_adapted_output_of_the_fused_step(fused_calls: list[nn.Module]) -> None:
    model, one = adapted()
    x, seen, gradients = inputs(3), [], []

    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        seen.append(output)
        output.register_hook(gradients.append)

    handle = model[0].register_forward_hook(hook)
    output = model(x)
    output.pow(3).sum().backward()
    assert len(fused_calls) == 1
    handle.remove()
    _hook_in_front(model, one)
    torch.testing.assert_close(seen[0], model(x))
    torch.testing.assert_close(gradients[0], 3 * output.square())


def test_a_copy_of_a_model_takes_the_fused_step_too(fused_calls: list[nn.Module]) -> None:
    model, _ = adapted()
    copy.deepcopy(model)(inputs(3))
    assert len(fused_calls) == 1


def test_a_hook_that_came_before_still_sees_its_gradient() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 4))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: output.register_hook(seen.append) and None)
    randomise(attach(model, {"0": 2})["0"])
    model(inputs(3).float()).sum().backward()
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on the first jvp
def test_function_transforms_work_through_an_adapted_layer() -> None:
    model, one = adapted()
    x = inputs(3).detach()
    names = {"0.adapters.default.lora_A": one.lora_A.detach(), "0.adapters.default.lora_B": one.lora_B.detach()}

    def loss(factors: dict[str, Tensor], row: Tensor) -> Tensor:
        output = torch.func.functional_call(model, factors, (row,))
        assert isinstance(output, Tensor)
        return output.pow(3).sum()

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(names, x)
    model(x).pow(3).sum().backward()
    torch.testing.assert_close(per_example["0.adapters.default.lora_A"].sum(0), one.lora_A.grad)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    expected = torch.autograd.functional.jvp(model, x, torch.ones_like(x))[1]
    torch.testing.assert_close(tangent, expected)


def test_autocast_takes_the_composed_path(fused_calls: list[nn.Module]) -> None:
    model, _ = adapted(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(inputs(3).float()).dtype == torch.bfloat16
    assert not fused_calls


def test_inference_mode_works(fused_calls: list[nn.Module]) -> None:
    model, _ = adapted()
    with torch.inference_mode():
        model(inputs(3).detach())
    assert fused_calls
