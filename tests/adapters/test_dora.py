"""DoRA: PEFT's numbers, a norm that needs no W + ΔW, a fused step that is the composed one."""

import json
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.pytorch_utils import Conv1D

from flowra_adapters import DoRA, LoRA, attach, detach, merge, operator_of, sites, unmerge
from flowra_adapters.fused_gain import fused_update_with_gain
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import seeded

FAMILY = json.loads((Path(__file__).parents[1] / "golden" / "lora_family.json").read_text())
GOLDEN = next(case for case in FAMILY["cases"] if case["name"] == "dora")

Layer = Callable[[], nn.Module]
LINEAR: dict[str, Layer] = {
    "linear": lambda: nn.Linear(5, 4),
    "linear_without_bias": lambda: nn.Linear(5, 4, bias=False),
    "conv1d_of_transformers": lambda: Conv1D(4, 5),
}
LAYERS: dict[str, Layer] = {
    **LINEAR,
    "conv2d": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "conv2d_grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
    "embedding": lambda: nn.Embedding(7, 6),
}
KINDS = pytest.mark.parametrize("build", LINEAR.values(), ids=LINEAR)
EVERY_KIND = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapted(
    build: Layer = LINEAR["linear"],
    *,
    rank: int = 2,
    dtype: torch.dtype = torch.float64,
    scaling: float = 1.5,
    dropout: float = 0.0,
) -> tuple[nn.Sequential, DoRA]:
    with seeded(0):
        model = nn.Sequential(build()).to(dtype)
    one = attach(model, {"0": rank}, method="dora", scaling=scaling, dropout=dropout)["0"]
    assert isinstance(one, DoRA)
    randomise(one)
    return model, one


def inputs(layer: nn.Module, *, seed: int = 1) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(7, (3, 4), generator=generator(seed))
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        shape: tuple[int, ...] = (2, layer.in_channels, 6, 5)
    else:
        shape = (3, 2, 5)
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).requires_grad_()


def standard_weight(model: nn.Module) -> Tensor:
    site = sites(model)["0"]
    weight = site.owner._parameters["weight"]
    assert weight is not None
    return site.operator.to_standard(weight.detach()).double()


def lengths(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1)


def direction(model: nn.Module, one: DoRA) -> Tensor:
    """W + s B A, explicitly."""
    low_rank = one.operator.product(one.lora_B.detach().double(), one.lora_A.detach().double())
    return standard_weight(model) + one.scaling * low_rank


def magnitude(one: DoRA) -> nn.Parameter:
    assert one.lora_magnitude is not None
    return one.lora_magnitude


# PEFT


@pytest.fixture
def golden_model() -> nn.Sequential:
    layer = nn.Linear(4, 3)
    layer.weight.data, layer.bias.data = torch.tensor(FAMILY["W"]), torch.tensor(FAMILY["bias"])
    model = nn.Sequential(layer)
    one = attach(model, {"0": FAMILY["r"]}, method="dora", alpha=FAMILY["lora_alpha"])["0"]
    assert isinstance(one, DoRA)
    assert one.scaling == pytest.approx(GOLDEN["scaling"], rel=1e-9)
    torch.testing.assert_close(magnitude(one).detach(), torch.tensor(GOLDEN["magnitude_at_init"]), rtol=0, atol=1e-6)
    one.replace_factors(torch.tensor(FAMILY["A"]), torch.tensor(FAMILY["B"]))
    one.replace_magnitude(torch.tensor(GOLDEN["magnitude_used"]))
    assert one.num_parameters() == one.cost(FAMILY["r"]) == GOLDEN["trainable_params"]
    return model


def test_output_and_merged_weight_equal_the_golden_ones(golden_model: nn.Sequential) -> None:
    x, tolerance = torch.tensor(FAMILY["x"]), {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(golden_model(x).detach(), torch.tensor(GOLDEN["y_unmerged"]), **tolerance)
    merge(golden_model)
    torch.testing.assert_close(golden_model[0].weight.detach(), torch.tensor(GOLDEN["W_merged"]), **tolerance)
    torch.testing.assert_close(golden_model(x).detach(), torch.tensor(GOLDEN["y_merged"]), **tolerance)
    unmerge(golden_model)
    assert torch.equal(golden_model[0].weight, torch.tensor(FAMILY["W"]))


def peft_s(model: nn.Sequential, one: DoRA, *, dropout: float = 0.0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same layer with the same tensors in PEFT; its parameters under our names."""
    base = deepcopy(model)
    detach(base)
    config = peft.LoraConfig(
        r=one.rank,
        lora_alpha=one.scaling * one.rank,
        use_dora=True,
        lora_dropout=dropout,
        target_modules=["0"],
        fan_in_fan_out=isinstance(model[0], Conv1D),
    )
    theirs = peft.get_peft_model(base, config).double()
    marks = {"lora_magnitude": "lora_magnitude", "_A.": "lora_A", "_B.": "lora_B"}
    found = {}
    for name, parameter in theirs.named_parameters():
        ours = next((ours for mark, ours in marks.items() if mark in name), None)
        if ours is not None:
            found[ours] = parameter
            parameter.data = one.get_parameter(ours).detach().reshape(parameter.shape).clone()
    assert len(found) == 3
    return theirs, found


@pytest.mark.parametrize("kind", [*LINEAR, "conv2d", "embedding"])
def test_output_gradients_and_merged_output_equal_peft_s(kind: str) -> None:
    model, one = adapted(LAYERS[kind])
    theirs, parameters = peft_s(model, one)
    x = inputs(model[0])
    ours_out, theirs_out = model(x), theirs(x)
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-10, atol=1e-10)
    names = list(parameters)
    wanted = torch.autograd.grad(theirs_out.pow(3).sum(), [parameters[name] for name in names])
    found = torch.autograd.grad(ours_out.pow(3).sum(), [one.get_parameter(name) for name in names])
    for name, actual, expected in zip(names, found, wanted, strict=True):
        assert expected.count_nonzero() > 0
        torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=1e-9, atol=1e-9, msg=name)
    merge(model)
    theirs.merge_adapter()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dropout_acts_where_peft_s_does(kind: str) -> None:
    model, one = adapted(LAYERS[kind], dropout=0.5)
    theirs, _ = peft_s(model, one, dropout=0.5)
    x = inputs(model[0])
    model.train(), theirs.train()
    with seeded(7):
        ours_out = model(x)
    with seeded(7):
        theirs_out = theirs(x)
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-10, atol=1e-10)
    assert not torch.equal(ours_out, model.eval()(x))


# The norm


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, int]:
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kind = draw(st.sampled_from(("linear", "conv1d", "conv2d", "conv3d", "transposed1d", "transposed2d", "embedding")))
    with seeded(draw(st.integers(0, 99))):
        if kind == "linear":
            layer: nn.Module = nn.Linear(draw(st.integers(1, 40)), draw(st.integers(1, 5)))
        elif kind == "embedding":
            layer = nn.Embedding(draw(st.integers(1, 40)), draw(st.integers(1, 5)))
        else:
            dimensions = int(kind[-2])
            family = "ConvTranspose" if kind.startswith("transposed") else "Conv"
            kernel = draw(st.lists(st.integers(1, 3), min_size=dimensions, max_size=dimensions).map(tuple))
            layer = getattr(nn, f"{family}{dimensions}d")(*channels, kernel, groups=groups)
    operator = operator_of(layer)
    assert operator is not None
    return layer, draw(st.integers(1, operator.max_rank))


@given(case=layers(), scaling=st.sampled_from((0.01, -1.0, 2.0, 300.0)), size=st.sampled_from((1e-6, 1.0, 1e6)))
def test_row_norms_are_those_of_the_explicit_direction(
    case: tuple[nn.Module, int], scaling: float, size: float
) -> None:
    layer, rank = case
    model = nn.Sequential(layer).double()
    layer.get_parameter("weight").data.mul_(size)
    one = attach(model, {"0": rank}, method="dora", scaling=scaling)["0"]
    assert isinstance(one, DoRA)
    randomise(one)
    one.lora_B.data.mul_(size)
    magnitude(one).data.mul_(size)
    torch.testing.assert_close(one.row_norms(standard_weight(model)), lengths(direction(model, one)), rtol=1e-9, atol=0)
    merge(model)
    torch.testing.assert_close(lengths(standard_weight(model)), magnitude(one).abs().detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rank", [1, 16, 17, 64])
def test_a_float32_norm_is_right_to_float32(rank: int) -> None:
    model, one = adapted(lambda: nn.Linear(64, 64), rank=rank, dtype=torch.float32)
    exact = lengths(direction(model, one))
    torch.testing.assert_close(one.row_norms(model[0].weight), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        one.plain_gain(model[0].weight).double(), magnitude(one).double() / exact, rtol=2e-6, atol=0
    )


def test_rows_that_nearly_cancel_have_the_right_norm_where_a_spans_them() -> None:
    model, one = adapted(lambda: nn.Linear(16, 4), rank=4, dtype=torch.float32, scaling=1.0)
    one.replace_factors(model[0].weight.detach(), torch.eye(4) * -(1 - 2**-12))
    gain = one.plain_gain(model[0].weight).double()
    exact = lengths(model[0].weight.detach().double()) * 2**-12
    torch.testing.assert_close(gain, magnitude(one).double() / exact, rtol=1e-6, atol=0)


def test_a_bf16_norm_is_made_in_full_precision_also_under_autocast() -> None:
    model, one = adapted(lambda: nn.Linear(64, 64), dtype=torch.bfloat16)
    assert magnitude(one).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = one.row_norms(model[0].weight)
    torch.testing.assert_close(found, lengths(direction(model, one)), rtol=1e-6, atol=0)


@EVERY_KIND
def test_every_row_of_the_merged_weight_has_the_length_of_its_magnitude_also_after_a_shrink(build: Layer) -> None:
    model, one = adapted(build)
    whole = direction(model, one)
    dropped = one.scaling * one.operator.product(one.lora_B.detach()[:, :1], one.lora_A.detach()[:1])
    kept = magnitude(one)
    one.shrink([1])
    assert one.lora_magnitude is kept
    torch.testing.assert_close(direction(model, one), whole - dropped)
    merge(model)
    torch.testing.assert_close(lengths(standard_weight(model)), magnitude(one).abs().detach())


@EVERY_KIND
def test_at_birth_the_gain_is_exactly_one(build: Layer) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with seeded(0):
            model = nn.Sequential(build()).to(dtype)
        for adapter_dtype in (None, torch.bfloat16, torch.float16):
            one = attach(
                model, {"0": 2}, method="dora", adapter=f"in_{adapter_dtype}".replace(".", "_"), dtype=adapter_dtype
            )["0"]
            assert isinstance(one, DoRA)
            gain = one.plain_gain(sites(model)["0"].operator.to_standard(model[0].weight.detach()))
            assert torch.equal(gain, torch.ones_like(gain))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_a_zero_row_gives_no_nan_and_stays_zero(fused: bool) -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 4)).double()
    model[0].weight.data[1] = 0
    x = inputs(model[0])
    base = model(x).detach()
    one = attach(model, {"0": 2}, method="dora", dropout=0.0 if fused else 0.5)["0"]
    assert isinstance(one, DoRA)
    assert magnitude(one)[1] == 0
    assert torch.equal(model(x), base)
    optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        assert all(torch.isfinite(each.grad).all() for each in one.parameters() if each.grad is not None)
        optimizer.step()
    assert magnitude(one)[1] == 0
    merge(model)
    assert torch.equal(model[0].weight[1], torch.zeros(5, dtype=torch.float64))
    assert torch.isfinite(model[0].weight).all()


# The magnitude, and what is known about the base


def test_the_magnitude_that_is_trained_is_the_one_that_acts() -> None:
    model, one = adapted()
    x = inputs(model[0])
    before, optimizer = model(x).detach(), torch.optim.SGD([magnitude(one)], lr=0.1)
    model(x).pow(3).sum().backward()
    assert magnitude(one).grad is not None
    assert (magnitude(one).grad != 0).all()
    held = magnitude(one)
    optimizer.step()
    assert one.lora_magnitude is held
    assert not torch.equal(model(x), before)


@EVERY_KIND
def test_growing_from_nothing_makes_the_magnitude_of_the_base_as_it_is_then(build: Layer) -> None:
    model, one = adapted(build, rank=0)
    assert one.lora_magnitude is None
    assert list(one.state_dict()) == ["lora_A", "lora_B"]
    with torch.no_grad():
        model[0].weight.mul_(3)
    other = attach(model, {"0": 1}, adapter="other")["0"]
    randomise(other)
    expected = lengths(standard_weight(model))
    merge(model)
    one.grow(torch.randn(1, one.operator.in_size, generator=generator()))
    torch.testing.assert_close(magnitude(one).detach(), expected)
    one.shrink([])
    assert one.lora_magnitude is None
    assert one.num_parameters() == one.cost(0) == 0


@EVERY_KIND
def test_a_copy_of_the_model_grows_by_its_own_weight(build: Layer) -> None:
    model, _ = adapted(build, rank=0)
    copy = deepcopy(model)
    with torch.no_grad():
        copy[0].weight.mul_(3)
    one = copy[0].adapters["default"]
    one.grow(torch.randn(1, one.operator.in_size, generator=generator()))
    torch.testing.assert_close(magnitude(one).detach(), lengths(standard_weight(copy)))


def test_a_copy_of_the_adapter_alone_stays_with_its_layer() -> None:
    model, one = adapted(rank=0)
    copy = deepcopy(one)
    copy.grow(torch.randn(1, 5, generator=generator()))
    torch.testing.assert_close(magnitude(copy).detach(), lengths(standard_weight(model)))
    assert one.rank == 0


def _scale(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[0].weight.mul_(2)
    return model


def _load(model: nn.Sequential) -> nn.Sequential:
    state = {name: tensor * 2 if name.endswith("weight") else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def _assign(model: nn.Sequential) -> nn.Sequential:
    model[0].weight.data = model[0].weight.data * 2
    return model


def _replace(model: nn.Sequential) -> nn.Sequential:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2, requires_grad=False)
    return model


def _edit_data(model: nn.Sequential) -> nn.Sequential:
    model[0].weight.data.mul_(2)
    return model.eval()


def _round_trip(model: nn.Sequential) -> nn.Sequential:
    return model.bfloat16().double()


def _copy_and_scale(model: nn.Sequential) -> nn.Sequential:
    return _scale(deepcopy(model))


def _merge_another(model: nn.Sequential) -> nn.Sequential:
    randomise(attach(model, {"0": 1}, adapter="other")["0"])
    model[0].adapters["default"].enabled = False
    merge(model)
    model[0].adapters["default"].enabled = True
    return model


def _merge_another_without_copy(model: nn.Sequential) -> nn.Sequential:
    randomise(attach(model, {"0": 1}, adapter="other")["0"])
    model[0].adapters["default"].enabled = False
    merge(model, keep_weight=False)
    model[0].adapters["default"].enabled = True
    return model


def _merge_and_unmerge(model: nn.Sequential) -> nn.Sequential:
    merge(model, keep_weight=False)
    unmerge(model)
    return model


CHANGES: dict[str, Callable[[nn.Sequential], nn.Sequential]] = {
    "it_is_changed_in_place": _scale,
    "a_state_dict_is_loaded": _load,
    "its_data_are_assigned": _assign,
    "it_is_replaced": _replace,
    "its_data_are_changed_before_eval": _edit_data,
    "it_is_rounded_and_widened": _round_trip,
    "the_model_is_copied": _copy_and_scale,
    "another_adapter_is_merged": _merge_another,
    "another_adapter_is_merged_without_a_copy": _merge_another_without_copy,
    "it_is_merged_and_unmerged": _merge_and_unmerge,
}


@pytest.mark.parametrize("build", [LAYERS["linear"], LAYERS["conv_transpose2d"]], ids=["linear", "conv_transpose2d"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_remembered_of_the_weight_is_right_after(
    change: Callable[[nn.Sequential], nn.Sequential], build: Layer
) -> None:
    model, one = adapted(build)
    x = inputs(model[0]).detach()
    model(x)
    model = change(model)
    one = model[0].adapters["default"]
    unused = deepcopy(model)
    fresh = unused[0].adapters["default"]
    assert fresh is not one
    assert torch.equal(model(x), unused(x))
    site = sites(model)["0"]
    weight = one._base_weight()
    expected = lengths(weight + one.scaling * site.operator.product(one.lora_B.detach(), one.lora_A.detach()))
    torch.testing.assert_close(one.row_norms(weight), expected)


def test_the_weight_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("flowra_adapters.dora")
    seen: list[Tensor] = []
    original = module._row_energies

    def counting(weight: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(weight)
        found = original(weight, dtype)
        assert isinstance(found, Tensor)
        return found

    monkeypatch.setattr(module, "_row_energies", counting)
    model, one = adapted()
    x = inputs(model[0])
    for _ in range(3):
        model(x).sum().backward()
    assert len(seen) == 1
    assert one.rank == 2


# The fused step


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Count where the fused step is taken."""
    module = import_module("flowra_adapters.applying")
    calls: list[nn.Module] = []
    original = module.fused_update_with_gain

    def counting(layer: nn.Module, *arguments: Tensor) -> Tensor:
        calls.append(layer)
        found = original(layer, *arguments)
        assert isinstance(found, Tensor)
        return found

    monkeypatch.setattr(module, "fused_update_with_gain", counting)
    return calls


def derivatives(model: nn.Module, one: DoRA, x: Tensor) -> list[Tensor]:
    output = model(x)
    found = torch.autograd.grad(output.pow(3).sum(), [x, one.lora_A, one.lora_B, magnitude(one)])
    return [output.detach(), *found]


@KINDS
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (40,), (0,)], ids=str)
def test_values_and_gradients_equal_the_composed_ones(
    build: Layer, shape: tuple[int, ...], fused_calls: list[nn.Module]
) -> None:
    model, one = adapted(build)
    x = torch.randn(*shape, 5, generator=generator(), dtype=torch.float64).requires_grad_()
    fused = derivatives(model, one, x)
    assert len(fused_calls) == 1
    one.observer = lambda z: None
    composed = derivatives(model, one, x)
    assert len(fused_calls) == 1
    for actual, expected in zip(fused, composed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@KINDS
@pytest.mark.parametrize("rows", [2, 12], ids=["few_rows", "many_rows"])
def test_first_and_second_derivatives_are_right_for_a_given_norm(build: Layer, rows: int) -> None:
    model, one = adapted(build)
    layer = model[0]
    detach(model)

    def function(x: Tensor, a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
        return fused_update_with_gain(layer, x, layer(x), a, b, 1.5, gain)

    x = torch.randn(rows, 5, generator=generator(), dtype=torch.float64).requires_grad_()
    arguments = (x, one.lora_A, one.lora_B, magnitude(one))
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


def test_a_second_derivative_through_the_model_equals_the_composed_one(fused_calls: list[nn.Module]) -> None:
    model, one = adapted()
    x = inputs(model[0])

    def second() -> list[Tensor]:
        first = torch.autograd.grad(model(x).pow(3).sum(), [x, magnitude(one), one.lora_A], create_graph=True)
        total = sum(each.pow(2).sum() for each in first)
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, [x, one.lora_A, one.lora_B, magnitude(one)]))

    fused = second()
    assert fused_calls
    one.observer = lambda z: None
    for actual, expected in zip(fused, second(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_without_a_gradient_for_the_magnitude_the_output_is_made_in_place(fused_calls: list[nn.Module]) -> None:
    model, one = adapted()
    x = inputs(model[0])
    *expected, _ = derivatives(model, one, x)
    magnitude(one).requires_grad_(False)
    output = model(x)
    found = torch.autograd.grad(output.pow(3).sum(), [x, one.lora_A, one.lora_B])
    for actual, wanted in zip([output.detach(), *found], expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected[0], rtol=1e-12, atol=1e-12)
    assert len(fused_calls) == 3


def test_the_output_may_be_changed_in_place_afterwards() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True)).double()
    one = attach(model, {"0": 2}, method="dora")["0"]
    randomise(one)
    x = inputs(model[0])
    model(x).sum().backward()
    assert all(each.grad is not None for each in one.parameters())


def test_a_weight_first_seen_in_inference_mode_can_be_trained_on() -> None:
    for build in (LAYERS["linear"], LAYERS["conv_transpose2d"]):
        model, one = adapted(build)
        x = inputs(model[0])
        with torch.inference_mode():
            expected = model(x).clone()
        output = model(x)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert magnitude(one).grad is not None


def _merge_a_second(model: nn.Sequential, one: DoRA) -> None:
    _merge_another(model)


def _second_adapter(model: nn.Sequential, one: DoRA) -> None:
    randomise(attach(model, {"0": 1}, adapter="other", method="dora")["0"])


def _drop(model: nn.Sequential, one: DoRA) -> None:
    one.dropout = 0.5
    model.train()


@pytest.mark.parametrize("change", [_merge_a_second, _second_adapter, _drop])
def test_it_steps_aside_where(change: Callable[[nn.Sequential, DoRA], None], fused_calls: list[nn.Module]) -> None:
    model, one = adapted()
    change(model, one)
    model(inputs(model[0])).sum().backward()
    assert not fused_calls
    assert magnitude(one).grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on the first jvp
def test_function_transforms_work_through_an_adapted_layer() -> None:
    model, one = adapted()
    x = torch.randn(3, 5, generator=generator(), dtype=torch.float64)
    names = {f"0.adapters.default.{name}": each.detach() for name, each in one.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (row,))
        assert isinstance(output, Tensor)
        return output.pow(3).sum()

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(names, x)
    model(x).pow(3).sum().backward()
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(per_example[f"0.adapters.default.{name}"].sum(0), parameter.grad)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.autograd.functional.jvp(model, x, torch.ones_like(x))[1])


# Beside others


def test_a_dora_and_a_lora_add_their_updates_of_the_base() -> None:
    model, _ = adapted()
    x = inputs(model[0])
    plain = deepcopy(model)
    detach(plain)
    base, with_dora = plain(x), model(x)
    lora = attach(plain, {"0": 2})["0"]
    assert isinstance(lora, LoRA)
    randomise(lora, seed=5)
    with_lora = plain(x)
    randomise(attach(model, {"0": 2}, adapter="other")["0"], seed=5)
    torch.testing.assert_close(model(x), with_dora + with_lora - base)


def test_a_magnitude_must_fit() -> None:
    _, one = adapted()
    with pytest.raises(ValueError, match=r"lora_magnitude must have shape \(4,\) and rank ≥ 1, got \(5,\) at 2"):
        one.replace_magnitude(torch.ones(5))
    _, empty = adapted(rank=0)
    with pytest.raises(ValueError, match=r"lora_magnitude must have shape \(4,\) and rank ≥ 1, got \(4,\) at 0"):
        empty.replace_magnitude(torch.ones(4))


@pytest.mark.parametrize("trained", [True, False])
def test_a_new_magnitude_trains_as_b_does_for_a_may_be_frozen(trained: bool) -> None:
    _, one = adapted()
    one.lora_A.requires_grad_(not trained)
    one.lora_B.requires_grad_(trained)
    one.replace_magnitude(torch.ones(4))
    assert magnitude(one).requires_grad == trained
