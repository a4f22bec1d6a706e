import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate, merge_updates

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "peft_add_weighted_adapter.json").read_text())
Updates = Mapping[str, LowRankUpdate]
cat = partial(merge_updates, rule="cat")


def random_update(m: int, n: int, rank: int, scaling: float, seed: int) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


@st.composite
def inputs(draw: st.DrawFn, *, max_size: int = 4) -> tuple[list[Updates], list[float]]:
    """Adapters over up to three modules, with unequal ranks, overlapping targets, and weights of any sign."""
    sides = st.integers(1, 7)
    shapes = draw(st.dictionaries(st.sampled_from("abc"), st.tuples(sides, sides), min_size=1))
    scalings = st.sampled_from([-1.5, 0.01, 0.5, 1.0, 16.0])
    adapters = []
    for _ in range(draw(st.integers(1, max_size))):
        names = draw(st.sets(st.sampled_from(sorted(shapes))))
        adapters.append({
            name: random_update(*shapes[name], draw(st.integers(1, 9)), draw(scalings), draw(st.integers(0, 10**6)))
            for name in sorted(names)
        })
    weight = st.one_of(st.just(0.0), st.floats(-3, 3))
    return adapters, draw(st.lists(weight, min_size=len(adapters), max_size=len(adapters)))


def check_is_weighted_sum(merged: Updates, adapters: Sequence[Updates], weights: Sequence[float]) -> None:
    used = [(w, one) for w, one in zip(weights, adapters, strict=True) if w != 0]
    assert set(merged) == {name for _, one in used for name in one}
    for name, update in merged.items():
        deltas = [w * one[name].delta_weight() for w, one in used if name in one]
        size = sum(float(delta.abs().max()) for delta in deltas)
        error = update.delta_weight() - torch.stack(deltas).sum(0)
        assert float(error.abs().max()) <= 1e-10 * size + torch.finfo(torch.float64).tiny
        assert update.scaling == 1.0
        assert update.rank <= min(update.shape)


@pytest.mark.parametrize("key", ["true_weighted_sum", "cat"])
def test_golden_merge_of_peft(key: str) -> None:
    first, second = (
        {"fc": LowRankUpdate(torch.tensor(GOLDEN[f"A{i}"]), torch.tensor(GOLDEN[f"B{i}"]), 2.0)} for i in (1, 2)
    )
    expected = GOLDEN[key] if key in GOLDEN else GOLDEN["results"][key]["merged_delta"]
    torch.testing.assert_close(
        cat([first, second], [0.5, 0.5])["fc"].delta_weight(), torch.tensor(expected), rtol=0, atol=1e-6
    )


@settings(deadline=None, max_examples=60)
@given(inputs())
def test_product_is_the_weighted_sum_of_products(case: tuple[list[Updates], list[float]]) -> None:
    adapters, weights = case
    check_is_weighted_sum(cat(adapters, weights), adapters, weights)


@settings(deadline=None, max_examples=30)
@given(inputs())
def test_order_of_inputs_does_not_matter(case: tuple[list[Updates], list[float]]) -> None:
    adapters, weights = case
    check_is_weighted_sum(cat(adapters[::-1], weights[::-1]), adapters, weights)


@settings(deadline=None, max_examples=30)
@given(inputs(max_size=1))
def test_one_adapter_of_weight_1_is_itself(case: tuple[list[Updates], list[float]]) -> None:
    check_is_weighted_sum(cat(case[0], [1.0]), case[0], [1.0])


@settings(deadline=None, max_examples=30)
@given(inputs(max_size=1))
def test_an_adapter_minus_itself_is_zero(case: tuple[list[Updates], list[float]]) -> None:
    adapter = case[0][0]
    merged = cat([adapter, adapter], [1.0, -1.0])
    assert set(merged) == set(adapter)
    check_is_weighted_sum(merged, [adapter, adapter], [1.0, -1.0])


@settings(deadline=None, max_examples=30)
@given(inputs(), st.sampled_from([0.125, 3.0, -7.0]))
def test_rescaling_alpha_against_b_changes_nothing(case: tuple[list[Updates], list[float]], factor: float) -> None:
    adapters, weights = case
    rescaled = [
        {name: LowRankUpdate(u.lora_A, u.lora_B / factor, u.scaling * factor) for name, u in one.items()}
        for one in adapters
    ]
    check_is_weighted_sum(cat(rescaled, weights), adapters, weights)


@pytest.mark.parametrize(("m", "n"), [(5, 30), (30, 5), (6, 6), (1, 4)])
def test_rank_is_capped_by_the_smaller_side_and_stays_exact(m: int, n: int) -> None:
    adapters = [{"fc": random_update(m, n, rank, 2.0, seed=rank)} for rank in (3, 4, 2)]
    merged = cat(adapters, [0.3, -1.2, 0.5])
    assert merged["fc"].rank == min(m, n)
    check_is_weighted_sum(merged, adapters, [0.3, -1.2, 0.5])


def test_cancellation_beyond_the_cap_is_zero() -> None:
    adapter = {"fc": random_update(5, 6, 4, 2.0, seed=0)}
    assert float(cat([adapter, adapter], [1, -1])["fc"].delta_weight().abs().max()) < 1e-12


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_tiny_and_huge_updates_stay_exact(scale: float) -> None:
    adapters = [{"fc": random_update(5, 6, 4, scale, seed=seed)} for seed in range(3)]
    check_is_weighted_sum(cat(adapters, [1, 2, 3]), adapters, [1, 2, 3])


def test_rank_below_the_cap_stacks_the_factors_as_they_are() -> None:
    first, second = random_update(8, 9, 2, 2.0, seed=0), random_update(8, 9, 3, 0.5, seed=1)
    merged = cat([{"fc": first}, {"fc": second}], [1, 4])["fc"]
    assert torch.equal(merged.lora_A, torch.cat([first.lora_A, second.lora_A]))
    assert torch.equal(merged.lora_B, 2 * torch.cat([first.lora_B, second.lora_B], 1))


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [1, 4], ids=["stacked", "refactored"])
def test_dtype_is_promoted_over_the_inputs(
    first: torch.dtype, second: torch.dtype, merged: torch.dtype, rank: int
) -> None:
    one, other = (random_update(4, 5, rank, 1.0, seed) for seed in range(2))
    cast = [
        {"fc": LowRankUpdate(update.lora_A.to(dtype), update.lora_B.to(dtype))}
        for update, dtype in ((one, first), (other, second))
    ]
    result = cat(cast, [1, 1])["fc"]
    expected = cast[0]["fc"].delta_weight() + cast[1]["fc"].delta_weight()
    assert result.lora_A.dtype == result.lora_B.dtype == merged
    torch.testing.assert_close(
        result.delta_weight(), expected.to(result.delta_weight().dtype), rtol=0, atol=5 * torch.finfo(merged).eps + 1e-6
    )


def test_inputs_are_left_alone_and_not_shared() -> None:
    update = random_update(4, 5, 2, 1.0, seed=0)
    before = update.lora_A.clone()
    cat([{"fc": update}], [1])["fc"].lora_A.zero_()
    assert torch.equal(update.lora_A, before)


def test_a_weighted_factor_that_overflows_its_dtype_is_an_error() -> None:
    half: Tensor = torch.ones(1, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must fit torch\.float16, got infinity for 'fc'\. Lower the weights"):
        cat([{"fc": LowRankUpdate(half, half.T)}], [1e6])
