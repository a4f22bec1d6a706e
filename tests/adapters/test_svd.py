"""The SVD form with both storage back ends, and its regulariser. The laws all methods share are in ``test_laws.py``."""

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDConv2d, SVDLinear
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import flowra_adapters
from flowra_adapters import (
    AdapterMethod,
    LinearOperator,
    LoRA,
    MaskedSVDForm,
    SVDForm,
    attach,
    checkpoint_of,
    merge,
    operator_of,
    orthogonality,
    unmerge,
)
from flowra_testing.adapter_table import ALL_DTYPES, LOW_RANK
from flowra_testing.asserts import assert_close, build_case
from flowra_testing.tiny_models import seeded

GOLDEN = Path(__file__).parents[1] / "golden"
FORWARD = json.loads((GOLDEN / "svd_linear_forward.json").read_text())
ORTHOGONALITY = json.loads((GOLDEN / "flexlora_orth_reg.json").read_text())
TOLERANCE = {"rtol": 0, "atol": 1e-6}
FORMS = pytest.mark.parametrize("form", [SVDForm, MaskedSVDForm], ids=["resized", "masked"])
BOTH = pytest.mark.parametrize("key", ["svd", "svd_masked"])
DTYPES = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


def made(
    form: type[SVDForm] = SVDForm,
    *,
    m: int = 6,
    n: int = 8,
    rank: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> SVDForm:
    """An adapter of a linear layer; no state beyond its birth."""
    generator = torch.Generator().manual_seed(seed)
    return form(LinearOperator((m, n)), rank=rank, scaling=1.5, dropout=0.0, dtype=dtype, generator=generator)


def trained(form: type[SVDForm] = SVDForm, **options: Any) -> SVDForm:  # noqa: ANN401
    """An adapter whose directions have left their birth state; the same ones in both forms."""
    one = made(form, **options)
    set_directions(one, seed=7)
    return one


def set_directions(one: SVDForm, *, seed: int) -> None:
    """Fill what is there with values that do not depend on where it is stored."""
    for factor, value in zip(live_views(one), drawn(one.rank, one, seed), strict=True):
        where, tensor = factor
        tensor.data[where] = value.to(tensor)


def drawn(rank: int, one: SVDForm, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, one.operator.in_size), (rank,), (one.operator.out_size, rank))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def live_views(one: SVDForm) -> list[tuple[Any, nn.Parameter]]:
    slots = one.slots() if isinstance(one, MaskedSVDForm) else list(range(one.rank))
    return [(slots, one.lora_A), (slots, one.lora_E), ((slice(None), slots), one.lora_B)]


def rows(count: int, size: int = 8, *, seed: int = 2) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- the released code and PEFT as judges


@pytest.fixture
def golden_model() -> nn.Sequential:
    layer = nn.Linear(4, 3)
    layer.weight.data, layer.bias.data = tensor(FORWARD["W"]), tensor(FORWARD["bias"])
    return nn.Sequential(layer)


@BOTH
def test_output_merge_and_unmerge_equal_those_of_the_released_code(key: str, golden_model: nn.Sequential) -> None:
    one = attach(golden_model, {"0": FORWARD["r"]}, method=key, alpha=FORWARD["lora_alpha"])["0"]
    assert isinstance(one, SVDForm)
    one.replace_factors(tensor(FORWARD["A"]), tensor(FORWARD["B"]), tensor(FORWARD["E"]))
    x = tensor(FORWARD["x"])
    torch.testing.assert_close(golden_model(x).detach(), tensor(FORWARD["y_unmerged"]), **TOLERANCE)
    merge(golden_model)
    torch.testing.assert_close(golden_model[0].weight.detach(), tensor(FORWARD["W_merged"]), **TOLERANCE)
    torch.testing.assert_close(golden_model(x).detach(), tensor(FORWARD["y_merged"]), **TOLERANCE)
    unmerge(golden_model)
    assert torch.equal(golden_model[0].weight, tensor(FORWARD["W"]))


@BOTH
@pytest.mark.parametrize(
    ("build", "judge", "shape"),
    [
        (lambda: nn.Linear(8, 6), SVDLinear, (5, 8)),
        (lambda: nn.Linear(6, 9, bias=False), SVDLinear, (2, 3, 6)),
        (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), SVDConv2d, (2, 3, 6, 5)),
    ],
    ids=["linear", "linear_without_bias", "conv2d"],
)
def test_output_and_gradients_equal_peft_s(key: str, build: Any, judge: Any, shape: tuple[int, ...]) -> None:  # noqa: ANN401
    with seeded(0):
        layer = build().double()
    config = AdaLoraConfig(init_r=3, target_r=2, lora_alpha=16, total_step=10)
    theirs = judge(deepcopy(layer), "default", config, r=3, lora_alpha=16).double()
    model = nn.Sequential(layer)
    ours = attach(model, {"0": 3}, method=key, alpha=16)["0"]
    assert isinstance(ours, SVDForm)
    set_directions(ours, seed=3)
    a, e, b = (each.detach() for each in ours.triplets())
    for name, value in {"lora_A": a, "lora_E": e.unsqueeze(1), "lora_B": b}.items():
        getattr(theirs, name)["default"].data.copy_(value)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = theirs(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    expected.square().sum().backward()
    model(x).square().sum().backward()
    for (where, parameter), name in zip(live_views(ours), ("lora_A", "lora_E", "lora_B"), strict=True):
        assert parameter.grad is not None
        judged = getattr(theirs, name)["default"].grad.view(parameter.grad[where].shape)
        torch.testing.assert_close(parameter.grad[where], judged, rtol=1e-10, atol=1e-12)


# --- birth, counting, directions


@FORMS
def test_factors_are_born_small_and_e_is_zero(form: type[SVDForm]) -> None:
    a, e, b = made(form, m=400, n=500, rank=8).triplets()
    assert e.count_nonzero() == 0
    for factor in (a, b):
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
        assert factor.mean().item() == pytest.approx(0, abs=0.002)


def test_both_forms_are_born_alike() -> None:
    for one, other in zip(made(SVDForm).triplets(), made(MaskedSVDForm).triplets(), strict=True):
        assert torch.equal(one, other)


@FORMS
def test_a_direction_costs_one_more_than_with_lora(form: type[SVDForm]) -> None:
    one = made(form)
    assert [one.cost(rank) for rank in (0, 1, 3)] == [0, 15, 45]
    assert one.num_parameters() == 45
    assert one.cost_per_rank == 15


@FORMS
def test_the_update_is_b_e_a_and_e_learns_through_both_foldings(form: type[SVDForm]) -> None:
    for m, n in ((6, 8), (8, 6)):
        one = trained(form, m=m, n=n)
        a, e, b = one.triplets()
        torch.testing.assert_close(one.delta_weight(), 1.5 * b @ torch.diag(e) @ a)
        x = rows(4, n)
        torch.testing.assert_close(one(x), 1.5 * x @ a.T @ torch.diag(e) @ b.T)
        actual = torch.autograd.grad(one(x).pow(3).sum(), list(one.parameters()))
        expected = torch.autograd.grad((1.5 * x @ a.T @ torch.diag(e) @ b.T).pow(3).sum(), list(one.parameters()))
        torch.testing.assert_close(actual, expected)


@FORMS
def test_dropping_a_direction_changes_the_update_by_exactly_its_triplet_norm(form: type[SVDForm]) -> None:
    norms = trained(form).triplet_norms()
    a, e, b = trained(form).triplets()
    torch.testing.assert_close(norms, torch.stack([(e[k] * torch.outer(b[:, k], a[k])).norm() for k in range(3)]))
    for dropped in range(3):
        one = trained(form)
        before = one.delta_weight()
        one.shrink([k for k in range(3) if k != dropped])
        torch.testing.assert_close((before - one.delta_weight()).norm(), 1.5 * norms[dropped])


def test_with_groups_a_triplet_norm_is_an_upper_bound() -> None:
    case = build_case(LOW_RANK["conv2d_grouped"], torch.float64)
    one = attach(case.model, {"layer": 3}, method="svd")["layer"]
    assert isinstance(one, SVDForm)
    set_directions(one, seed=4)
    before, bounds = one.delta_weight(), 2 * one.triplet_norms()
    one.shrink([0, 2])
    lost = (before - one.delta_weight()).norm()
    assert 0 < lost < bounds[1]


# --- growth


@FORMS
def test_new_directions_have_the_mean_length_of_the_others_and_the_given_direction(form: type[SVDForm]) -> None:
    one = trained(form)
    old_a, _, old_b = one.triplets()
    one.grow(1000 * rows(2))
    a, e, b = one.triplets()
    assert e[3:].count_nonzero() == 0
    torch.testing.assert_close(a[3:].norm(dim=1), old_a.norm(dim=1).mean().expand(2))
    torch.testing.assert_close(b[:, 3:].norm(dim=0), old_b.norm(dim=0).mean().expand(2))
    cosines = nn.functional.cosine_similarity(a[3:], rows(2))
    torch.testing.assert_close(cosines, torch.ones(2, dtype=torch.float64))


@FORMS
def test_the_first_directions_have_length_one(form: type[SVDForm]) -> None:
    one = made(form, rank=0)
    one.grow(rows(2))
    a, _, b = one.triplets()
    for lengths in (a.norm(dim=1), b.norm(dim=0)):
        torch.testing.assert_close(lengths, torch.ones(2, dtype=torch.float64))


@FORMS
def test_after_growth_only_the_new_e_has_a_gradient_and_it_is_s_b_g_a(form: type[SVDForm]) -> None:
    one = trained(form)
    one.grow(rows(2))
    x, g = rows(5, seed=5), rows(5, 6, seed=6)
    (one(x) * g).sum().backward()
    a, _, b = (each.detach() for each in one.triplets())
    grad_a, grad_e, grad_b = (parameter.grad[where] for where, parameter in live_views(one))
    torch.testing.assert_close(grad_e[3:], torch.einsum("mk,mn,kn->k", 1.5 * b[:, 3:], g.T @ x, a[3:]))
    assert (grad_e[3:] != 0).all()
    assert grad_a[3:].count_nonzero() == grad_b[:, 3:].count_nonzero() == 0


@FORMS
def test_columns_drawn_by_growth_depend_on_the_generator_and_differ_each_time(form: type[SVDForm]) -> None:
    columns = []
    for seed in (0, 0, 1):
        one = made(form, seed=seed, rank=1)
        one.grow(rows(1))
        one.grow(rows(1))
        columns.append(one.triplets()[2][:, 1:])
    assert torch.equal(columns[0], columns[1])
    assert not torch.allclose(columns[0], columns[2])
    assert not torch.allclose(*columns[0].unbind(1))


@FORMS
def test_a_reloaded_adapter_draws_the_columns_the_first_one_would_have(form: type[SVDForm]) -> None:
    one = trained(form)
    one.grow(rows(1))
    one.shrink([3, 0, 1])
    other = made(form, seed=9)
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.grow(rows(2, seed=3))
    assert one.rank == other.rank == 5
    assert all(torch.equal(a, b) for a, b in zip(one.triplets(), other.triplets(), strict=True))


@FORMS
def test_frozen_factors_stay_frozen_over_a_change_of_rank(form: type[SVDForm]) -> None:
    one = trained(form)
    one.lora_E.requires_grad_(False)
    one.grow(rows(1))
    one.shrink([0])
    assert [each.requires_grad for each in (one.lora_A, one.lora_E, one.lora_B)] == [True, False, True]


# --- the masked back end


def shapes_and_ranks(count: int) -> list[tuple[int, int, int, int, int]]:
    """Draw batch, n, m, rank and new directions."""
    generator = torch.Generator().manual_seed(11)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    found = []
    for _ in range(count):
        n, m = integer(2, 96), integer(2, 96)
        rank = integer(0, min(n, m, 12) - 1)
        slots = min(n, m, max(4 * rank, 8))
        found.append((integer(1, 33), n, m, rank, integer(1, max(1, slots - rank))))
    return found


@DTYPES
def test_masked_growth_changes_no_bit_at_any_of_many_shapes(dtype: torch.dtype) -> None:
    method = AdapterMethod(name="masked", adapter=MaskedSVDForm, scaling=None)
    for batch, n, m, rank, new in shapes_and_ranks(150):
        model = nn.Sequential(nn.Linear(n, m)).to(dtype)
        one = attach(model, {"0": rank}, method=method, dtype=dtype)["0"]
        assert isinstance(one, MaskedSVDForm)
        set_directions(one, seed=batch)
        x = rows(batch, n, seed=batch).to(dtype)
        before, update, delta = model(x), one(x), one.delta_weight()
        one.grow(rows(new, n))
        assert one.rank == rank + new
        assert torch.equal(model(x), before)
        assert torch.equal(one(x), update)
        assert torch.equal(one.delta_weight(), delta)


@DTYPES
@pytest.mark.parametrize("kind", LOW_RANK)
def test_masked_growth_changes_no_bit_on_any_layer_type(kind: str, dtype: torch.dtype) -> None:
    layer_type = LOW_RANK[kind]
    for adapter_dtype in {dtype, torch.promote_types(dtype, torch.float32)}:
        for start in range(layer_type.rank):
            case = build_case(layer_type, dtype)
            one = attach(case.model, {case.site: start}, method="svd_masked", dtype=adapter_dtype)[case.site]
            assert isinstance(one, MaskedSVDForm)
            set_directions(one, seed=start)
            before = case.output()
            one.grow(layer_type.rows(layer_type.rank - start))
            assert torch.equal(case.output(), before)
            assert start == 0 or not torch.equal(before, case.base_output)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_free_slots_have_gradients_of_exactly_zero_and_no_effect(kind: str) -> None:
    layer_type = LOW_RANK[kind]
    case = build_case(layer_type, torch.float64)
    one = attach(case.model, {case.site: layer_type.rank}, method="svd_masked")[case.site]
    assert isinstance(one, MaskedSVDForm)
    one.shrink(list(range(0, layer_type.rank, 2))[: max(1, layer_type.rank - 1)])
    set_directions(one, seed=1)
    before = case.output()
    free = ~one.mask
    with torch.no_grad():
        one.lora_A[free], one.lora_E[free], one.lora_B[:, free] = 1e6, -1e6, 1e6
    assert torch.equal(case.output(), before)
    (case.model(case.x).square().mean() + orthogonality([one])).backward()
    assert one.lora_A.grad is not None
    assert one.lora_E.grad is not None
    assert one.lora_B.grad is not None
    for gradient in (one.lora_A.grad[free], one.lora_E.grad[free], one.lora_B.grad[:, free]):
        assert gradient.count_nonzero() == 0
    assert one.lora_E.grad[one.mask].count_nonzero() > 0


OPTIMISERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.005, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
def test_what_an_optimiser_does_to_free_slots_is_never_seen(optimiser: Any) -> None:  # noqa: ANN401
    """After a shrink, momentum and decay go on in the dead slots; the live ones go as if these were not there."""
    one = trained(MaskedSVDForm)
    held = optimiser(one.parameters())
    x = rows(5)

    def step(each: SVDForm, by: torch.optim.Optimizer) -> None:
        by.zero_grad()
        ((each(x) - 1).square().mean() + 0.1 * orthogonality([each])).backward()
        by.step()

    for _ in range(3):
        step(one, held)
    one.shrink([2, 0])
    compacted = one.compact()
    other = optimiser(compacted.parameters())
    for new, (where, parameter) in zip(compacted.parameters(), live_views(one), strict=True):
        other.state[new] = {
            name: value[where].clone() if value.ndim else value.clone() for name, value in held.state[parameter].items()
        }
    dead = one.lora_A.detach()[1].clone()
    for _ in range(5):
        step(one, held)
        step(compacted, other)
    assert not torch.equal(one.lora_A[1], dead)  # it did move
    for ours, theirs in zip(one.triplets(), compacted.triplets(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    before = one(x)
    one.grow(rows(1))
    assert one.slots() == [2, 0, 1]
    assert torch.equal(one(x), before)
    assert one.lora_E[1] == 0
    cosine = nn.functional.cosine_similarity(one.lora_A[1:2], rows(1))
    torch.testing.assert_close(cosine, torch.ones(1, dtype=torch.float64))


def test_masked_parameters_and_their_shapes_are_the_same_for_life() -> None:
    one = trained(MaskedSVDForm)
    before = [(id(each), each.shape) for each in one.parameters()]
    one.grow(rows(2))
    one.shrink([4, 1])
    one.replace_factors(*(each.float() for each in (rows(4), rows(6, 4), rows(1, 4)[0])))
    one.shrink([])
    assert [(id(each), each.shape) for each in one.parameters()] == before


def test_an_empty_masked_adapter_still_gives_every_parameter_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    one = attach(model, {"0": 0}, method="svd_masked")["0"]
    model(rows(3).float()).sum().backward()
    assert all(each.grad is not None and each.grad.count_nonzero() == 0 for each in one.parameters())


def test_a_compiled_step_is_compiled_once_over_growth_and_shrinking() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    found = attach(model, {"0": 2, "2": 0}, method="svd_masked")
    counter = CompileCounterWithBackend("eager")
    x = rows(5).float()

    def loss() -> Tensor:
        return model(x).square().mean() + 0.1 * orthogonality(found.values())

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for event in (None, *range(3)):
        if event is not None:
            found["2"].grow(rows(1, 6, seed=event))
            found["0"].shrink([1])
            found["0"].grow(rows(1, seed=event))
        model.zero_grad()
        compiled().backward()
        gradients = [each.grad for one in found.values() for each in one.parameters()]
        model.zero_grad()
        loss().backward()
        expected = [each.grad for one in found.values() for each in one.parameters()]
        torch.testing.assert_close(gradients, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["linear", "linear_on_sequences", "conv2d_grouped", "embedding"])
def test_compacting_keeps_the_output_and_takes_only_what_is_needed(kind: str) -> None:
    case = build_case(LOW_RANK[kind], torch.float32)
    one = attach(case.model, {"layer": 3}, method="svd_masked")["layer"]
    assert isinstance(one, MaskedSVDForm)
    set_directions(one, seed=1)
    one.shrink([2, 0])
    one.enabled = False
    one.lora_B.requires_grad_(False)
    compacted = one.compact()
    assert type(compacted) is SVDForm
    assert sum(each.numel() for each in compacted.parameters()) == one.num_parameters() == one.cost(2)
    assert (compacted.rank, compacted.scaling, compacted.enabled) == (2, one.scaling, False)
    assert compacted.training is one.training is False
    assert [each.requires_grad for each in compacted.parameters()] == [True, True, False]
    assert_close(compacted(case.x), one(case.x), 1e-6)
    assert_close(compacted.delta_weight(), one.delta_weight(), 1e-6)
    assert torch.equal(compacted.triplet_norms(), one.triplet_norms())
    for each in (one, compacted):
        each.grow(LOW_RANK[kind].rows(1))
    assert torch.equal(compacted.lora_B, one.triplets()[2])  # the same columns are drawn


# --- both back ends tell the same story


@st.composite
def stories(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[str, Any]]]:
    """Sizes, a first rank and what happens: growth by k, keeping some in some order, or training."""
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    largest = min(m, n)
    start = rank = draw(st.integers(0, largest))
    events: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 8))):
        event = draw(st.sampled_from(["grow", "shrink", "train"]))
        if event == "grow":
            events.append((event, draw(st.integers(0, largest - rank))))
            rank += events[-1][1]
        elif event == "shrink":
            kept = draw(st.permutations(range(rank)))[: draw(st.integers(0, rank))]
            events.append((event, kept))
            rank = len(kept)
        else:
            events.append((event, None))
    return m, n, start, events


@given(stories())
def test_masked_and_resized_give_the_same_update_after_the_same_story(
    story: tuple[int, int, int, list[tuple[str, Any]]],
) -> None:
    m, n, rank, events = story
    masked_of_all_slots = partial(MaskedSVDForm, max_rank=min(m, n))
    pair = [made(form, m=m, n=n, rank=rank) for form in (SVDForm, masked_of_all_slots)]  # type: ignore[arg-type]
    for number, (event, value) in enumerate(events):
        for one in pair:
            if event == "grow":
                one.grow(rows(value, n, seed=number))
            elif event == "shrink":
                one.shrink(value)
            else:
                set_directions(one, seed=number)
        resized, masked = pair
        assert resized.rank == masked.rank
        assert resized.num_parameters() == masked.num_parameters() == resized.cost(resized.rank)
        assert all(torch.equal(a, b) for a, b in zip(resized.triplets(), masked.triplets(), strict=True))
        assert_close(masked.delta_weight(), resized.delta_weight(), 1e-12)
        assert torch.equal(orthogonality([resized]), orthogonality([deepcopy(masked).compact()]))  # type: ignore[operator]
        torch.testing.assert_close(orthogonality([resized]), orthogonality([masked]))


# --- the regulariser


def with_factors(a: Tensor, b: Tensor, form: type[SVDForm] = SVDForm) -> SVDForm:
    one = made(form, m=len(b), n=a.shape[1], rank=len(a), dtype=a.dtype)
    one.replace_factors(a, b, torch.ones(len(a)))
    return one


def orthonormal(size: int, rank: int, *, seed: int) -> Tensor:
    q: Tensor = torch.linalg.qr(rows(size, rank, seed=seed))[0]
    return q


@FORMS
def test_the_regulariser_equals_that_of_the_released_code(form: type[SVDForm]) -> None:
    one = with_factors(tensor(ORTHOGONALITY["A"]), tensor(ORTHOGONALITY["B"]), form)
    value = ORTHOGONALITY["weight"] * orthogonality([one])
    assert value.item() == pytest.approx(ORTHOGONALITY["official_value"], abs=1e-7)
    assert value.item() == pytest.approx(ORTHOGONALITY["hand_value"], abs=1e-7)


@FORMS
def test_growth_hardly_raises_the_regulariser_where_the_released_code_s_jumps(form: type[SVDForm]) -> None:
    golden = ORTHOGONALITY["jump_on_expansion"]
    a, b = orthonormal(768, 8, seed=1).T, orthonormal(768, 8, seed=2)
    one = with_factors(a, b, form)
    before = 0.1 * orthogonality([one])
    one.grow(rows(1, 768))
    after = 0.1 * orthogonality([one])
    assert before < 1e-6
    assert 0 < after - before < 0.1
    as_released = with_factors(torch.cat([a, rows(1, 768)]), torch.cat([b, rows(768, 1, seed=3)], 1))
    assert 0.1 * orthogonality([as_released]).item() == pytest.approx(golden["reg_after"], rel=0.2)


@DTYPES
def test_the_regulariser_is_the_mean_over_all_factors_whatever_their_shapes(dtype: torch.dtype) -> None:
    forms = (SVDForm, MaskedSVDForm, SVDForm, MaskedSVDForm, SVDForm, MaskedSVDForm)
    sizes = ((6, 8, 3), (6, 8, 3), (8, 6, 3), (9, 9, 2), (6, 8, 0), (6, 8, 0))
    found = [trained(form, m=m, n=n, rank=rank, dtype=dtype) for form, (m, n, rank) in zip(forms, sizes, strict=True)]
    found[1].shrink([2, 0])
    norms = []
    for one in found:
        a, _, b = (each.double() for each in one.triplets())
        if one.rank:
            eye = torch.eye(one.rank, dtype=torch.float64)
            norms += [(a @ a.T - eye).norm(), (b.T @ b - eye).norm()]
    assert len(norms) == 8
    value = orthogonality(found)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    exact = torch.stack(norms).mean()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)


@FORMS
def test_its_gradient_is_the_closed_form(form: type[SVDForm]) -> None:
    one = trained(form)
    orthogonality([one]).backward()
    a, e, b = (each.detach() for each in one.triplets())
    eye = torch.eye(3, dtype=torch.float64)
    residual_a, residual_b = a @ a.T - eye, b.T @ b - eye
    grad_a, grad_b = (live_views(one)[index][1].grad[live_views(one)[index][0]] for index in (0, 2))
    torch.testing.assert_close(grad_a, residual_a @ a / residual_a.norm())  # 2 (G - I) A / ‖G - I‖, halved by the mean
    torch.testing.assert_close(grad_b, b @ residual_b / residual_b.norm())
    assert one.lora_E.grad is None
    assert e.count_nonzero() == 3


def test_its_first_and_second_derivatives_are_right() -> None:
    one = trained(MaskedSVDForm, n=5, m=4, rank=2)
    one.shrink([1])
    one.grow(rows(2, 5))

    def function(a: Tensor, b: Tensor) -> Tensor:
        probe = deepcopy(one)
        del probe.lora_A, probe.lora_B
        probe.lora_A, probe.lora_B = a, b  # type: ignore[assignment]
        return orthogonality([probe])

    arguments = (one.lora_A, one.lora_B)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@FORMS
def test_the_gradient_of_exactly_orthonormal_factors_is_zero_and_not_nan(form: type[SVDForm]) -> None:
    one = with_factors(torch.eye(3, 8), torch.eye(6, 3), form)
    value = orthogonality([one])
    value.backward()
    assert value == 0
    assert one.lora_A.grad is not None
    assert one.lora_B.grad is not None
    assert one.lora_A.grad.count_nonzero() == one.lora_B.grad.count_nonzero() == 0


@FORMS
def test_the_regulariser_of_nothing_is_zero(form: type[SVDForm]) -> None:
    value = orthogonality([made(form, rank=0)])
    value.backward()
    assert value == 0


# --- what is refused


@FORMS
@pytest.mark.parametrize(
    ("given_rows", "message"),
    [
        (rows(1, 7), r"rows must have shape \(k, 8\), got \(1, 7\)"),
        (rows(4), r"rank must be in \[0, 6\], got 3 \+ 4"),
        (torch.zeros(1, 8), r"rows must be finite and not zero, got lengths \[0.0\]"),
        (torch.full((1, 8), torch.nan), r"rows must be finite and not zero"),
    ],
    ids=["width", "too_many", "zero", "nan"],
)
def test_rows_that_cannot_be_added_are_refused_and_nothing_changes(
    form: type[SVDForm], given_rows: Tensor, message: str
) -> None:
    one = trained(form)
    before = deepcopy(one.state_dict())
    with pytest.raises(ValueError, match=message):
        one.grow(given_rows)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


@FORMS
@pytest.mark.parametrize("keep", [[0, 0], [3], [-1]], ids=str)
def test_indices_that_are_not_there_are_refused(form: type[SVDForm], keep: list[int]) -> None:
    with pytest.raises(ValueError, match=r"keep must hold distinct indices in \[0, 3\)"):
        made(form).shrink(keep)


@FORMS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 7}, r"rank must be in \[0, 6\] for a weight \(6, 8\), got 7"),
        ({"scaling": 0.0}, r"scaling must be finite and not 0, got 0\.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
    ],
    ids=["rank", "scaling", "dropout"],
)
def test_arguments_out_of_range_are_refused(form: type[SVDForm], options: dict[str, Any], message: str) -> None:
    usual = {"rank": 1, "scaling": 1.0, "dropout": 0.0, "dtype": torch.float32, "generator": torch.Generator()}
    with pytest.raises(ValueError, match=message):
        form(LinearOperator((6, 8)), **{**usual, **options})


def test_dropout_on_an_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout must be 0 on an embedding"):
        attach(nn.Sequential(nn.Embedding(7, 6)), {"0": 2}, method="svd", dropout=0.1)


@pytest.mark.parametrize(("slots", "message"), [(2, r"\[3, 6\].*got 2"), (7, r"\[3, 6\].*got 7")])
def test_slots_must_hold_the_rank_and_fit_the_layer(slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"max_rank must be in {message}"):
        made(partial(MaskedSVDForm, max_rank=slots))  # type: ignore[arg-type]


@pytest.mark.parametrize(("m", "rank", "slots"), [(6, 0, 6), (40, 0, 8), (40, 1, 8), (40, 3, 12), (40, 20, 40)])
def test_the_default_number_of_slots(m: int, rank: int, slots: int) -> None:
    assert made(MaskedSVDForm, m=m, n=64, rank=rank).max_rank == slots


def test_the_number_of_slots_is_chosen_by_a_method_of_one_s_own() -> None:
    method = AdapterMethod(name="roomy", adapter=partial(MaskedSVDForm, max_rank=5), scaling=None)
    one = attach(nn.Sequential(nn.Linear(8, 6)), {"0": 1}, method=method)["0"]
    assert isinstance(one, MaskedSVDForm)
    assert (one.max_rank, one.rank) == (5, 1)
    assert repr(one) == "MaskedSVDForm(in_features=8, out_features=6, rank=1, max_rank=5, scaling=1, dropout=0)"


def test_the_regulariser_refuses_other_methods_and_nothing() -> None:
    lora = attach(nn.Sequential(nn.Linear(8, 6)), {"0": 1})["0"]
    assert isinstance(lora, LoRA)
    with pytest.raises(TypeError, match=r"adapters must be of the SVD form, got LoRA"):
        orthogonality([lora])
    with pytest.raises(ValueError, match=r"adapters must hold at least one adapter, got none"):
        orthogonality([])


@BOTH
def test_what_is_written_as_lora_is_the_whole_product(key: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    one = attach(model, {"0": 3}, method=key)["0"]
    assert isinstance(one, SVDForm)
    set_directions(one, seed=1)
    one.shrink([2, 0])
    written = checkpoint_of(model)
    a, b = written.factors["0"]
    assert len(a) == 2
    torch.testing.assert_close(written.scalings["0"] * b @ a, one.delta_weight().detach())


@BOTH
def test_dropout_acts_in_training_only(key: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    one = attach(model, {"0": 2}, method=key, dropout=0.5)["0"]
    assert isinstance(one, SVDForm)
    set_directions(one, seed=1)
    x = rows(4).float()
    assert one.plain_factors() is None
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert one.plain_factors() is not None
    assert torch.equal(model(x), model(x))


@BOTH
def test_the_fused_step_is_taken_and_gives_the_composed_gradients(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    one = attach(model, {"0": 2}, method=key)["0"]
    assert isinstance(one, SVDForm)
    set_directions(one, seed=1)
    parameters = list(one.parameters())
    x = rows(4)
    output = model(x)
    assert type(output.grad_fn).__name__.startswith("_FusedUpdate")
    fused = torch.autograd.grad(output.pow(3).sum(), parameters)
    monkeypatch.setattr(type(one), "plain_factors", lambda self: None)
    composed = torch.autograd.grad(model(x).pow(3).sum(), parameters)
    torch.testing.assert_close(fused, composed)


def test_it_is_exported() -> None:
    assert {"SVDForm", "MaskedSVDForm", "orthogonality"} <= set(flowra_adapters.__all__)
    assert operator_of(nn.Linear(8, 6)) == LinearOperator((6, 8))
