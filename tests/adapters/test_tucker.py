"""FLoRA against golden values, the definition, LoRA and LyCORIS; what its ranks mean, and what a shrink loses."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flowra_adapters import (
    METHODS,
    AdapterMethod,
    ConvOperator,
    EmbeddingOperator,
    LinearOperator,
    LoRA,
    Operator,
    ParameterOperator,
    Tucker,
    TuckerRanks,
    attach,
    operator_of,
)
from flowra_adapters.tucker_conv import TuckerConv, flora
from flowra_testing.adapter_table import EMBEDDINGS, EVERYWHERE, LayerType

GOLDEN = Path(__file__).parents[1] / "golden"
LINEAR = json.loads((GOLDEN / "flora_linear.json").read_text())
CONV = {case["name"]: case for case in json.loads((GOLDEN / "flora_conv.json").read_text())["cases"]}
LETTERS = "abcdefgh"
MATRICES = {"linear", "linear_without_bias", "conv1d_of_transformers", "conv2d_pointwise", "embedding"}
CONVOLUTIONS = {kind: each for kind, each in EVERYWHERE.items() if kind.startswith("conv") and "1d_of" not in kind}
exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(numbers: Any) -> Tensor:  # noqa: ANN401 - parsed JSON
    return torch.tensor(numbers, dtype=torch.float64)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def made(operator: Operator, rank: int, *, seed: int = 1, dropout: float = 0.0, **options: Any) -> Tucker:  # noqa: ANN401
    """Make an adapter whose tensors are all Gaussian."""
    arguments = {"scaling": 1.5, "dropout": dropout, "dtype": torch.float64, "generator": generator(), **options}
    adapter = flora(operator, rank=rank, **arguments)
    for index, parameter in enumerate(adapter.parameters()):
        parameter.data.copy_(gaussian(*parameter.shape, seed=100 * seed + index))
    return adapter


def definition(adapter: Tucker) -> Tensor:
    """Sum over all ranks at once; an axis without a factor has the factor 1."""
    factors = [adapter.factors.get(axis, torch.ones(1, 1).double()) for axis in range(adapter.core.ndim)]
    ranks, axes = LETTERS[: len(factors)], LETTERS[: len(factors)].upper()
    inputs = ",".join([ranks, *(f"{axis}{rank}" for axis, rank in zip(axes, ranks, strict=True))])
    return adapter.scaling * torch.einsum(f"{inputs}->{axes}", adapter.core, *factors)


def operator_for(layer_type: LayerType) -> Operator:
    operator = operator_of(layer_type.layer(torch.float64))
    assert operator is not None
    return operator


OPERATORS: dict[str, Operator] = {
    **{kind: operator_for(each) for kind, each in EVERYWHERE.items()},
    "matrix_parameter": ParameterOperator((5, 4)),
    "stack_of_matrices": ParameterOperator((4, 5, 3)),
    "raw_filters": ParameterOperator((4, 3, 2, 3)),
    "raw_with_axes_of_one": ParameterOperator((4, 3, 1, 3)),
}
EVERY_OPERATOR = pytest.mark.parametrize("kind", OPERATORS)


def adapted(kind: str, **options: Any) -> Tucker:  # noqa: ANN401
    operator = OPERATORS[kind]
    return made(operator, min(3, TuckerRanks().largest(operator)), **options)


# Golden values: the two released linear layers; the convolutions of this package's specification.


def golden_linear(scaling: float) -> tuple[nn.Sequential, Tucker]:
    layer = nn.Linear(4, 3).double()
    layer.weight.data, layer.bias.data = double(LINEAR["W"]), double(LINEAR["bias"])
    model = nn.Sequential(layer)
    adapter = attach(model, {"0": LINEAR["r"]}, method="flora", scaling=scaling)["0"]
    assert isinstance(adapter, Tucker)
    core, out, down = (double(LINEAR[f"lora_{name}"]) for name in "EBA")
    adapter.replace_factors(core, {0: out, 1: down.T})
    return model, adapter


@pytest.mark.parametrize("key", ["y_loralib", "y_cr_mr"])
def test_linear_output_equals_that_of_both_released_layers_with_their_own_scale(key: str) -> None:
    shift = 1e-5 if key == "y_loralib" else 0.0
    model, _ = golden_linear(LINEAR["lora_alpha"] / (LINEAR["r"] + shift))
    y = model(double(LINEAR["x"]))
    torch.testing.assert_close(y, double(LINEAR[key]), rtol=0, atol=2e-7)


def test_linear_update_and_number_of_parameters_equal_the_released_ones() -> None:
    _, adapter = golden_linear(LINEAR["lora_alpha"] / LINEAR["r"])
    expected = double(LINEAR["delta_W_alpha_over_r"])
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=0, atol=2e-7)
    assert adapter.num_parameters() == LINEAR["param_count"]["value"]


@pytest.mark.parametrize(("init", "key"), [("normal", "loralib"), ("kaiming", "cr_mr")])
def test_spread_of_the_factors_at_birth_is_that_of_the_released_layer(init: str, key: str) -> None:
    measured = LINEAR["init"]["measured_std_768"]
    adapter = flora(
        LinearOperator((768, 768)),
        rank=8,
        scaling=1.0,
        dropout=0.0,
        dtype=torch.float32,
        generator=generator(),
        init=init,  # type: ignore[arg-type]
    )
    assert adapter.factor_1.std().item() == pytest.approx(measured[f"{key}_A"], rel=0.05)
    assert adapter.factor_0.std().item() == pytest.approx(measured[f"{key}_B"], rel=0.05)
    assert adapter.core.count_nonzero() == 0


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("materialised", [False, True], ids=["chain", "materialised"])
def test_convolution_equals_the_golden_output(name: str, materialised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CONV[name]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[case["ndim"] - 1]
    sizes = {key: case[key] for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
    layer = kind(case["in_channels"], case["out_channels"], **sizes).double()
    layer.weight.data, layer.bias.data = (double(case[key]) for key in ("base_W", "bias"))
    ranks = TuckerRanks(kernel=case["r_kernel"], largest_in=case["r_in"])
    row = replace(METHODS["flora"], adapter=partial(flora, ranks=ranks))
    model = nn.Sequential(layer)
    adapter = attach(model, {"0": case["r_out"]}, method=row, scaling=case["s"])["0"]
    assert isinstance(adapter, TuckerConv)
    spatial = [double(each) for each in case["A_spatial"]]
    core, frozen = double(case["core_G"]), 0
    if case["kernel_size"] == 1:  # the file has factors (1, 1) there; here there are none
        core, frozen = core * math.prod(each.item() for each in spatial), len(spatial)
    given = [double(case["A_out"]), double(case["A_in"]), *spatial]
    adapter.replace_factors(core, {axis: given[axis] for axis in adapter.axes})
    monkeypatch.setattr(TuckerConv, "materialises", lambda self, x: materialised)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
    close(adapter.delta_weight() / case["s"], double(case["delta_W"]))
    close(model(double(case["x"])), double(case["y_materialised"]))
    assert adapter.num_parameters() == case["param_count"] - frozen


# The update.


@EVERY_OPERATOR
def test_update_equals_the_definition(kind: str) -> None:
    adapter = adapted(kind)
    exactly(adapter.delta_weight(), definition(adapter))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "separate"])
def test_chain_equals_the_layer_with_the_update_as_its_weight(
    kind: str, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, x = adapted(kind), CONVOLUTIONS[kind].inputs(torch.float64)
    monkeypatch.setattr(TuckerConv, "_folds", lambda self, taken, given: folded)
    exactly(adapter(x), adapter.operator.apply(x, definition(adapter)))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[ConvOperator, int, TuckerRanks, Tensor]:
    """Draw a convolution of one, two or three dimensions, a rank, limits and an input."""
    dimensions, groups = draw(st.sampled_from([1, 1, 2, 2, 3])), draw(st.integers(1, 3))
    n, m = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, stride, dilation = each(1, 3), each(1, 2), each(1, 2)
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = not transposed and mode == "zeros" and max(stride) == 1 and draw(st.booleans())
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    options["padding"] = "same" if same else each(0, 1)
    options |= {"output_padding": tuple(size - 1 for size in stride)} if transposed else {"padding_mode": mode}
    plain, turned = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if transposed:
        options["dilation"] = tuple(max(sizes) for sizes in zip(stride, dilation, strict=True))
    layer = (turned if transposed else plain)[dimensions - 1](n, m, kernel, bias=False, **options)
    operator = operator_of(layer)
    assert isinstance(operator, ConvOperator)
    ranks = TuckerRanks(kernel=draw(st.integers(1, 3)), largest_out=draw(st.sampled_from([None, 1, 2])))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    x = gaussian(*batch, n, *each(5, 6), seed=draw(st.integers(0, 99)))
    return operator, draw(st.integers(1, ranks.largest(operator))), ranks, x


@given(geometries())
@settings(max_examples=150, deadline=None)
def test_chain_equals_the_convolution_by_the_update_in_every_geometry(
    case: tuple[ConvOperator, int, TuckerRanks, Tensor],
) -> None:
    operator, rank, ranks, x = case
    adapter = made(operator, rank, ranks=ranks)
    expected = operator.apply(x, definition(adapter))
    tolerance = 1e-12 * max(1.0, expected.abs().max().item())
    for folded in (True, False):
        adapter._folds = lambda taken, given, folded=folded: folded  # type: ignore[attr-defined]
        torch.testing.assert_close(adapter(x), expected, rtol=0, atol=tolerance)
    adapter.__dict__.pop("_folds")
    torch.testing.assert_close(adapter(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "kind", ["conv2d_grouped", "conv_transpose2d_grouped", "conv2d_circular", "conv3d", "embedding"]
)
def test_gradients_equal_those_through_the_definition(kind: str) -> None:
    adapter, x = adapted(kind), EVERYWHERE[kind].inputs(torch.float64)
    parameters = list(adapter.parameters())
    chain = torch.autograd.grad(adapter(x).square().sum(), parameters)
    dense = torch.autograd.grad(adapter.operator.apply(x, definition(adapter)).square().sum(), parameters)
    for one, other in zip(chain, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@EVERY_OPERATOR
def test_no_unfolding_of_the_update_has_a_larger_rank_than_its_axis(kind: str) -> None:
    adapter = adapted(kind)
    delta = adapter.delta_weight().detach()
    for axis, rank in enumerate(adapter.core.shape):
        assert torch.linalg.matrix_rank(delta.movedim(axis, 0).flatten(1)) <= rank


@pytest.mark.parametrize(
    "operator",
    [
        LinearOperator((4, 4)),
        ConvOperator((3, 4, 2, 3)),
        ConvOperator((4, 2, 3), groups=2),
        ParameterOperator((3, 4, 2)),
        ParameterOperator((2, 3, 2, 3)),
    ],
    ids=str,
)
def test_full_ranks_and_identities_make_any_update(operator: Operator) -> None:
    adapter = made(operator, max(operator.shape[:2]), ranks=TuckerRanks(kernel=max(operator.shape)))
    target = gaussian(*operator.shape)
    adapter.replace_factors(target / adapter.scaling, {axis: torch.eye(operator.shape[axis]) for axis in adapter.axes})
    exactly(adapter.delta_weight(), target)


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_only_the_core_has_a_gradient_at_birth(kind: str) -> None:
    layer, x = EVERYWHERE[kind].layer(torch.float64), EVERYWHERE[kind].inputs(torch.float64)
    model = nn.Sequential(layer)
    (adapter,) = attach(model, {"0": EVERYWHERE[kind].rank}, method="flora").values()
    model(x).square().sum().backward()
    gradients = {name: parameter.grad.abs().max().item() for name, parameter in adapter.named_parameters()}  # type: ignore[union-attr]
    assert [name for name, largest in gradients.items() if largest > 0] == ["core"]


# Ranks and parameters.


@EVERY_OPERATOR
def test_cost_is_the_formula_and_the_number_of_parameters_at_every_rank(kind: str) -> None:
    operator = OPERATORS[kind]
    for rank in range(TuckerRanks().largest(operator) + 1):
        adapter = made(operator, rank)
        ranks = adapter.core.shape
        factors = sum(
            size * r for axis, (size, r) in enumerate(zip(operator.shape, ranks, strict=True)) if axis < 2 or size > 1
        )
        assert adapter.rank == rank
        assert adapter.num_parameters() == adapter.cost(rank) == math.prod(ranks) + (factors if rank else 0)
        assert adapter.cost_per_rank == adapter.cost(rank + 1) - adapter.cost(rank)


def test_cost_of_the_paper_with_one_rank_and_a_square_kernel() -> None:
    m, n, k, r, r_3 = 32, 48, 3, 6, 2
    adapter = made(ConvOperator((m, n, k, k)), r)
    assert adapter.num_parameters() == r * (m + n) + 2 * k * r_3 + r**2 * r_3**2


@pytest.mark.parametrize(
    ("operator", "rank", "expected"),
    [
        (LinearOperator((6, 9)), 4, (4, 4)),
        (EmbeddingOperator((6, 100)), 6, (6, 6)),
        (ConvOperator((64, 3, 7, 7)), 16, (12, 3, 2, 2)),
        (ConvOperator((64, 3, 7, 7)), 8, (8, 3, 2, 2)),
        (ConvOperator((96, 1, 7, 7), groups=96), 16, (4, 1, 2, 2)),
        (ConvOperator((8, 4, 1, 1)), 3, (3, 3, 1, 1)),
        (ConvOperator((8, 4, 3, 1)), 3, (3, 3, 2, 1)),
        (ParameterOperator((8, 4, 3)), 4, (4, 4, 3)),
        (ParameterOperator((2, 2, 9)), 9, (2, 2, 4)),
    ],
)
def test_every_axis_is_clamped_by_its_size_and_by_what_the_others_can_use(
    operator: Operator, rank: int, expected: tuple[int, ...]
) -> None:
    adapter = made(operator, min(rank, 4) if isinstance(operator, ParameterOperator) and rank == 9 else rank)
    assert tuple(adapter.core.shape) == expected
    assert adapter.rank <= adapter.max_rank


@pytest.mark.parametrize("kind", OPERATORS)
def test_every_rank_that_lora_may_have_is_allowed(kind: str) -> None:
    operator = OPERATORS[kind]
    assert made(operator, operator.max_rank).rank <= operator.max_rank


def test_ranks_of_single_axes_are_given_by_a_row_of_one_s_own() -> None:
    row = replace(METHODS["flora"], adapter=partial(flora, ranks=TuckerRanks(kernel=1, largest_out=2, largest_in=5)))
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    assert tuple(attach(model, {"0": 5}, method=row)["0"].core.shape) == (2, 2, 1, 1)
    row = replace(row, adapter=partial(flora, ranks=TuckerRanks(kernel=3, largest_out=2)))
    assert tuple(attach(model, {"0": 5}, method=row, adapter="other")["0"].core.shape) == (2, 5, 3, 3)


@pytest.mark.parametrize("name", ["kernel", "largest_out", "largest_in"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TuckerRanks(**{name: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, r"rank must be in \[0, 3\] for a weight \(3, 5\), got 4"),
        ({"rank": -1}, r"rank must be in \[0, 3\]"),
        ({"scaling": 0.0}, "scaling must be finite and not 0"),
        ({"scaling": math.nan}, "scaling must be finite and not 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"init": "uniform"}, "init must be 'normal' or 'kaiming', got 'uniform'"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(LinearOperator((3, 5)), **{"rank": 2, **options})


@pytest.mark.parametrize("operator", [EmbeddingOperator((3, 5)), ParameterOperator((3, 5))])
def test_dropout_without_a_floating_input_is_refused(operator: Operator) -> None:
    with pytest.raises(ValueError, match=f"dropout must be 0 on {type(operator).__name__}"):
        made(operator, 2, dropout=0.1)


def test_vectors_are_refused_and_attach_does_not_offer_them() -> None:
    with pytest.raises(ValueError, match=r"weight must have at least 2 axes, got shape \(3,\)"):
        made(ParameterOperator((3,)), 1)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((3, 3)))
    for name in ("0.bias", "1"):
        with pytest.raises(ValueError, match="must match"):
            attach(model, {name: 1}, method="flora")


@pytest.mark.parametrize(
    ("core", "factor", "message"),
    [
        ((2, 3), (4, 2), r"core must have a shape that TuckerRanks.* gives \(4, 5\), got \(2, 3\)"),
        ((2, 2, 2), (4, 2), r"core must have a shape"),
        ((2, 2), (4, 3), r"factor 0 must have shape \(4, 2\), got \(4, 3\)"),
    ],
)
def test_factors_of_other_shapes_are_refused(core: tuple[int, ...], factor: tuple[int, ...], message: str) -> None:
    adapter = made(LinearOperator((4, 5)), 3)
    before = adapter.delta_weight()
    with pytest.raises(ValueError, match=message):
        adapter.replace_factors(torch.zeros(core), {0: torch.zeros(factor), 1: torch.zeros(5, 2)})
    assert torch.equal(adapter.delta_weight(), before)


# Rank changes.


@EVERY_OPERATOR
def test_growth_keeps_the_update_and_reaches_full_column_rank(kind: str) -> None:
    adapter = made(OPERATORS[kind], 1)
    before = adapter.delta_weight().detach()
    for _ in range(adapter.max_rank - 1):
        adapter.grow(gaussian(1, adapter.operator.in_size, seed=adapter.rank))
    exactly(adapter.delta_weight().detach(), before)
    assert adapter.rank == adapter.max_rank
    assert adapter.num_parameters() == adapter.cost(adapter.max_rank)
    for factor in adapter.factors.values():
        assert torch.linalg.matrix_rank(factor) == factor.shape[1]


def test_a_matrix_gets_the_rows_themselves_as_long_as_what_is_there() -> None:
    adapter, rows = made(LinearOperator((6, 8)), 2), gaussian(3, 8, seed=9)
    adapter.grow(rows)
    new = adapter.factor_1[:, 2:].T
    exactly(new / new.norm(dim=1, keepdim=True), rows / rows.norm(dim=1, keepdim=True))
    for factor in adapter.factors.values():
        old = factor[:, :2].norm(dim=0).mean()
        exactly(factor[:, 2:].norm(dim=0), old.expand(3))


def test_a_convolution_gets_the_channels_that_the_rows_use_most_beyond_those_it_has() -> None:
    operator = ConvOperator((6, 4, 3, 3), groups=1)
    adapter = made(operator, 1)
    adapter.replace_factors(adapter.core, {**adapter.factors, 1: torch.eye(4)[:, :1]})
    rows = torch.zeros(2, 4, 3, 3).double()
    rows[0, 0], rows[0, 1, 1, 1], rows[1, 2, 0, 2] = 5.0, 0.1, 1.0  # the first uses channel 0 most, which is there
    adapter.grow(rows.flatten(1))
    exactly(adapter.factor_1.abs(), torch.eye(4).double()[:, [0, 2, 1]])


def test_groups_share_the_directions_of_their_rows() -> None:
    adapter = made(ConvOperator((4, 3, 2), groups=2), 1)
    adapter.replace_factors(adapter.core, {**adapter.factors, 1: torch.eye(3)[:, :1]})
    rows = torch.zeros(1, 2, 3, 2).double()
    rows[0, 1, 2] = 1.0  # the second group's third channel
    adapter.grow(rows.flatten(1))
    exactly(adapter.factor_1.abs(), torch.eye(3).double()[:, [0, 2]])


def test_growth_after_a_reload_draws_the_same_columns() -> None:
    adapter, other = made(ConvOperator((6, 4, 3)), 2), made(ConvOperator((6, 4, 3)), 2, generator=generator(7))
    other.load_state_dict(adapter.state_dict())
    for each in (adapter, other):
        each.grow(gaussian(1, 12))
        each.grow(gaussian(1, 12, seed=1))
    assert torch.equal(adapter.factor_0, other.factor_0)
    assert not torch.equal(adapter.factor_0[:, 2], adapter.factor_0[:, 3])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(1, 7), r"rows must have shape \(k, 8\), got \(1, 7\)"),
        (torch.ones(8), r"rows must have shape \(k, 8\)"),
        (torch.ones(5, 8), r"rank must be in \[0, 6\], got 2 \+ 5"),
        (torch.zeros(1, 8), "rows must be finite and not zero"),
        (torch.full((1, 8), torch.inf), "rows must be finite and not zero"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: Tensor, message: str) -> None:
    adapter = made(LinearOperator((6, 8)), 2)
    with pytest.raises(ValueError, match=message):
        adapter.grow(rows)
    assert adapter.rank == 2


@EVERY_OPERATOR
@pytest.mark.parametrize("keep", [[0], [0, 1], [2, 0], [1], []], ids=str)
def test_a_shrink_loses_what_is_announced(kind: str, keep: list[int]) -> None:
    adapter = adapted(kind)
    if max(keep, default=0) >= adapter.rank:
        keep = list(range(adapter.rank))[: len(keep)]
    before, announced = adapter.delta_weight().detach(), adapter.shrink_loss(keep)
    adapter.shrink(keep)
    lost = (before - adapter.delta_weight().detach()).norm().item()
    assert lost == pytest.approx(announced, rel=1e-9, abs=1e-12)
    assert adapter.rank == len(keep)
    assert adapter.num_parameters() == adapter.cost(len(keep))


@pytest.mark.parametrize("kind", sorted(MATRICES))
def test_on_a_matrix_slices_are_singular_triplets_and_what_is_kept_and_dropped_adds_up(kind: str) -> None:
    kept, dropped = adapted(kind), adapted(kind)
    whole = kept.delta_weight().detach()
    u, sigma, vh = torch.linalg.svd(whole.flatten(1), full_matrices=False)
    kept.shrink([2, 0])
    dropped.shrink([1])
    exactly(dropped.delta_weight().detach().flatten(1), sigma[1] * u[:, 1:2] @ vh[1:2])
    exactly(kept.delta_weight().detach() + dropped.delta_weight().detach(), whole)
    first = kept.scaling * kept.core[0, 0] * kept.factor_0[:, 0].norm() * kept.factor_1[:, 0].norm()
    assert abs(first.item()) == pytest.approx(sigma[2].item(), rel=1e-9)  # in the order that was asked for


def test_triplets_of_equal_singular_values_come_apart_too() -> None:
    kept, dropped = made(LinearOperator((5, 4)), 4), made(LinearOperator((5, 4)), 4)
    for each in (kept, dropped):
        turn = torch.linalg.qr(gaussian(4, 4, seed=3)).Q
        each.replace_factors(turn, {0: torch.eye(5)[:, :4], 1: torch.eye(4)})
    whole = kept.delta_weight().detach()
    kept.shrink([0, 2])
    dropped.shrink([1, 3])
    exactly(kept.delta_weight().detach() + dropped.delta_weight().detach(), whole)


def test_leading_slices_lose_no_more_than_the_dropped_singular_values_of_both_unfoldings() -> None:
    adapter = made(ConvOperator((8, 7, 3, 3)), 6)
    delta = adapter.delta_weight().detach()
    tails = [torch.linalg.svdvals(delta.movedim(axis, 0).flatten(1))[2:].square().sum() for axis in (0, 1)]
    bound = math.sqrt(sum(tail.item() for tail in tails))
    best = math.sqrt(max(tail.item() for tail in tails))  # of any update of these ranks
    assert best - 1e-9 <= adapter.shrink_loss([0, 1]) <= bound + 1e-9
    assert adapter.shrink_loss([4, 5]) > bound


def test_a_shrink_keeps_the_mean_length_of_every_factor() -> None:
    adapter = made(ConvOperator((8, 7, 3, 3)), 6)
    before = {axis: factor.norm(dim=0).mean() for axis, factor in adapter.factors.items()}
    adapter.shrink([0, 1, 2])
    for axis, factor in adapter.factors.items():
        exactly(factor.norm(dim=0), before[axis].expand(factor.shape[1]))


def test_keeping_everything_changes_no_bit_and_loses_nothing() -> None:
    adapter = made(ConvOperator((8, 7, 3, 3)), 3)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    assert adapter.shrink_loss([0, 1, 2]) == 0.0
    adapter.shrink([0, 1, 2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


def test_a_frozen_adapter_stays_frozen_when_its_rank_changes() -> None:
    adapter = made(LinearOperator((6, 8)), 3).requires_grad_(False)
    adapter.shrink([0])
    adapter.grow(gaussian(1, 8))
    assert not any(parameter.requires_grad for parameter in adapter.parameters())


@pytest.mark.parametrize("keep", [[3], [-1], [0, 0]], ids=str)
def test_indices_out_of_range_or_twice_are_refused(keep: list[int]) -> None:
    adapter = made(LinearOperator((6, 8)), 3)
    for call in (adapter.shrink, adapter.shrink_loss):
        with pytest.raises(ValueError, match=r"keep must hold distinct indices in \[0, 3\)"):
            call(keep)


# Conversion.


@EVERY_OPERATOR
def test_lora_factors_make_the_same_update(kind: str) -> None:
    adapter = adapted(kind)
    lora_A, lora_B = adapter.to_lora()
    operator = adapter.operator
    assert lora_A.shape == (lora_B.shape[1], operator.in_size)
    exactly(adapter.scaling * operator.product(lora_B, lora_A), definition(adapter).detach())
    if len(lora_A) > operator.max_rank:
        assert isinstance(operator, ParameterOperator)
        return
    options = {"dropout": 0.0, "dtype": torch.float64, "generator": generator()}
    lora = LoRA(operator, rank=len(lora_A), scaling=adapter.scaling, **options)
    lora.replace_factors(lora_A, lora_B)
    exactly(lora.delta_weight().detach(), definition(adapter).detach())


def test_lora_of_a_depthwise_convolution_has_rank_one() -> None:
    adapter = made(ConvOperator((6, 1, 3, 3), groups=6), 4)
    assert tuple(adapter.core.shape) == (4, 1, 2, 2)
    lora_A, lora_B = adapter.to_lora()
    assert lora_A.shape == (1, 6 * 9)
    exactly(adapter.scaling * adapter.operator.product(lora_B, lora_A), definition(adapter).detach())


CHAINS = [kind for kind in CONVOLUTIONS if "transpose" not in kind and kind != "conv2d_pointwise"]


@pytest.mark.parametrize("kind", CHAINS)
def test_three_convolutions_make_the_same_update_also_where_the_ranks_differ(kind: str) -> None:
    adapter = adapted(kind, ranks=TuckerRanks(largest_in=2))
    assert isinstance(adapter, TuckerConv)
    chain = adapter.conv_chain()
    assert chain is not None
    down, mid, up = chain
    rank = max(adapter.core.shape[:2])
    assert (len(down), *mid.shape[:2], up.shape[1]) == (rank,) * 4
    delta = torch.einsum("pq...,op,qi->oi...", mid, up.flatten(1), down.flatten(1))
    exactly(adapter.scaling * delta, definition(adapter).detach())


@pytest.mark.parametrize("kind", ["conv1d", "conv2d_strided_dilated", "conv2d_reflect", "conv3d"])
def test_three_convolutions_run_one_after_the_other_are_the_update(kind: str) -> None:
    adapter, x = adapted(kind), CONVOLUTIONS[kind].inputs(torch.float64)
    assert isinstance(adapter, TuckerConv)
    chain = adapter.conv_chain()
    assert chain is not None
    down, mid, up = chain
    operator = adapter.operator
    z = operator.convolve(operator.pointwise(x, down.flatten(1)), mid, groups=1)
    exactly(adapter.scaling * operator.pointwise(z, up.flatten(1)), adapter(x).detach())


@pytest.mark.slow  # the import alone takes ten seconds
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "conv2d_grouped", "conv2d_depthwise"])
@pytest.mark.parametrize("ranks", [TuckerRanks(), TuckerRanks(largest_in=2)], ids=["equal", "unequal"])
def test_lycoris_reads_the_three_convolutions(kind: str, ranks: TuckerRanks) -> None:
    locon = pytest.importorskip("lycoris.modules.locon")
    adapter, layer = adapted(kind, ranks=ranks), CONVOLUTIONS[kind].layer(torch.float64)
    assert isinstance(adapter, TuckerConv)
    chain = adapter.conv_chain()
    assert chain is not None
    down, mid, up = chain
    read = locon.LoConModule.make_module_from_state_dict(
        "name", layer, up, down, mid, torch.tensor(adapter.scaling * len(down)), None
    )
    torch.testing.assert_close(read.get_diff_weight()[0].double(), adapter.delta_weight(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv2d_pointwise", "conv_transpose1d", "conv_transpose2d_grouped"])
def test_there_is_no_chain_where_the_files_have_no_place_for_it(kind: str) -> None:
    adapter = adapted(kind)
    assert isinstance(adapter, TuckerConv)
    assert adapter.conv_chain() is None


# Which form is used.


def test_a_linear_layer_goes_through_the_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for m, n in ((6, 8), (8, 6)):
        model = nn.Sequential(nn.Linear(n, m)).double()
        adapter = attach(model, {"0": 3}, method="flora")["0"]
        for index, parameter in enumerate(adapter.parameters()):
            parameter.data.copy_(gaussian(*parameter.shape, seed=index))
        x = gaussian(5, n)
        expected = model[0](x).detach()
        composed = torch.nn.functional.linear(x, model[0].weight + adapter.delta_weight(), model[0].bias)
        exactly(expected, composed.detach())
        with monkeypatch.context() as patch:
            patch.setattr(Tucker, "forward", None)
            exactly(model(x).detach(), expected)


def conv_adapter(groups: int = 1, **options: Any) -> TuckerConv:  # noqa: ANN401
    adapter = made(ConvOperator((32, 32 // groups, 3, 3), groups, stride=(1, 1)), 4, **options)
    assert isinstance(adapter, TuckerConv)
    return adapter


@pytest.mark.parametrize(
    ("groups", "positions", "learns", "expected"),
    [
        (1, 2, True, False),
        (1, 64, True, False),  # the gradient of a whole weight costs more than any chain
        (1, 2, False, False),
        (1, 64, False, True),  # ΔW costs the same for all positions
        (32, 64, True, True),
        (32, 64, False, True),
    ],
)
def test_the_update_is_materialised_where_it_costs_less(
    groups: int, positions: int, learns: bool, expected: bool
) -> None:
    adapter, x = conv_adapter(groups), torch.zeros(1, 32, positions, positions).double()
    with torch.set_grad_enabled(learns):
        assert adapter.materialises(x) == expected
    assert adapter.requires_grad_(False).materialises(x) == (expected if not learns else positions == 64)


def test_the_count_is_the_number_of_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = conv_adapter()
    taken, given = adapter._positions(torch.zeros(2, 32, 5, 5))
    assert (taken, given) == (50, 50)
    assert adapter._down_products(taken, given) == (50 * 4 * 32 * 9, 50 * 32 * 4 + 50 * 4 * 4 * 9)
    assert adapter._chain(taken, given) == 50 * 32 * 4 + 50 * 4 * 4 * 9 + 50 * 32 * 4


@pytest.mark.parametrize("transposed", [False, True])
def test_positions_are_counted_on_both_sides_of_a_stride(transposed: bool) -> None:
    operator = ConvOperator((4, 4, 3, 3), stride=(2, 2), transposed=transposed)
    adapter = made(operator, 2)
    assert isinstance(adapter, TuckerConv)
    assert adapter._positions(torch.zeros(2, 4, 6, 6)) == (72, 288 if transposed else 18)


def test_nothing_is_materialised_under_dropout_or_for_an_input_of_a_narrower_dtype() -> None:
    x = torch.zeros(1, 32, 64, 64)
    with torch.no_grad():
        assert not conv_adapter().materialises(x)
        assert conv_adapter().materialises(x.double())
        assert not conv_adapter(dropout=0.1).materialises(x.double())
        assert conv_adapter(dropout=0.1).eval().materialises(x.double())


def test_dropout_acts_on_the_adapter_s_input_in_training_only() -> None:
    pointwise = ConvOperator((6, 8, 1), stride=(1,), padding=(0,), dilation=(1,))
    for operator, x in ((LinearOperator((6, 8)), torch.ones(400, 8)), (pointwise, torch.ones(400, 8, 1))):
        adapter = made(operator, 3, dropout=0.5)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dropped = adapter(x.double()).detach()
        expected = adapter.eval()(x.double()).detach()
        assert adapter.plain_factors() is None or isinstance(operator, LinearOperator)
        assert not torch.equal(dropped, expected)
        error = (dropped.mean(0) - expected.mean(0)).norm() / (dropped - expected).norm(dim=1).mean()
        assert error < 0.15  # unbiased: the mean of 400 draws is near what is expected


def test_an_embedding_gathers_rows_before_it_multiplies() -> None:
    operator = EmbeddingOperator((6, 7))
    adapter = made(operator, 3)
    ids = EMBEDDINGS["embedding"].inputs(torch.float64)
    exactly(adapter(ids), definition(adapter).T[ids])
    down, up = adapter._matrices()
    assert torch.equal(down.T, adapter.factor_1)  # no product of the size of the vocabulary
    assert up.shape == (6, 3)
    assert adapter.plain_factors() is None


def test_the_row_of_the_table_divides_alpha_by_the_rank() -> None:
    row = METHODS["flora"]
    assert isinstance(row, AdapterMethod)
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    assert attach(model, {"0": 2}, method="flora", alpha=8.0)["0"].scaling == 4.0
