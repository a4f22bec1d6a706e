"""Truncation of a sum of updates against the singular values of the dense matrix."""

import doctest
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowra_compose import (
    AdapterState,
    LowRankUpdate,
    TruncatedUpdate,
    Truncation,
    merge_folders,
    merge_updates,
    write_adapter,
)

Updates = Mapping[str, LowRankUpdate]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "peft_add_weighted_adapter.json").read_text())
SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9)]


def truncated_svd(
    updates: Sequence[Updates],
    weights: Sequence[float],
    **settings: Any,  # noqa: ANN401
) -> dict[str, TruncatedUpdate]:
    made = merge_updates(updates, weights, rule="truncated_svd", truncation=Truncation(**settings))
    return cast(dict[str, TruncatedUpdate], made)


def random_update(m: int, n: int, rank: int, *, scaling: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


def dense(adapters: Sequence[Updates], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * one["fc"].delta_weight() for w, one in zip(weights, adapters, strict=True)]).sum(0)


def size_of(adapters: Sequence[Updates], weights: Sequence[float]) -> float:
    """Σ |wᵢ| ‖ΔWᵢ‖, what rounding is measured against."""
    return sum(abs(w) * float(one["fc"].delta_weight().norm()) for w, one in zip(weights, adapters, strict=True))


def check(found: TruncatedUpdate, adapters: Sequence[Updates], weights: Sequence[float], rank: int) -> None:
    """Compare with the truncated SVD of the dense sum."""
    delta, size = dense(adapters, weights), size_of(adapters, weights)
    u, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
    stacked = sum(one["fc"].rank for one in adapters)
    assert found.singular_values.shape == (min(*delta.shape, stacked),)
    assert found.singular_values.dtype == torch.float64
    assert float((found.singular_values - sigma[: len(found.singular_values)]).abs().max()) <= 1e-13 * size
    assert found.rank <= min(rank, *delta.shape, stacked)
    kept = found.rank
    best = (u[:, :kept] * sigma[:kept]) @ vh[:kept]
    # What the dense truncation leaves is the same; so is the truncation, where there is a gap in the spectrum.
    left = float((delta - found.delta_weight()).norm())
    assert left == pytest.approx(float((delta - best).norm()), rel=1e-9, abs=1e-12 * size)
    assert found.loss == pytest.approx(left**2, rel=1e-9, abs=1e-24 * size**2)
    assert found.relative_loss * float(delta.square().sum()) == pytest.approx(found.loss, rel=1e-9, abs=1e-24 * size**2)
    grams = found.lora_A @ found.lora_A.T, found.lora_B.T @ found.lora_B
    for gram in grams:  # balanced: both factors carry the square roots of the singular values
        assert float((gram - torch.diag(found.singular_values[:kept])).abs().max()) <= 1e-13 * size
    assert found.scaling == 1.0


@st.composite
def inputs(draw: st.DrawFn) -> tuple[list[Updates], list[float]]:
    m, n = draw(st.sampled_from(SHAPES))
    scalings = st.sampled_from([-1.5, 0.01, 1.0, 16.0])
    adapters: list[Updates] = [
        {"fc": random_update(m, n, draw(st.integers(1, 9)), scaling=draw(scalings), seed=draw(st.integers(0, 10**6)))}
        for _ in range(draw(st.integers(1, 4)))
    ]
    weight = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)
    return adapters, draw(st.lists(weight, min_size=len(adapters), max_size=len(adapters)))


# exact


@settings(max_examples=80)
@given(inputs(), st.integers(1, 12))
def test_it_is_the_truncated_svd_of_the_dense_sum(case: tuple[list[Updates], list[float]], rank: int) -> None:
    found = truncated_svd(*case, rank=rank)["fc"]
    check(found, *case, rank)
    assert found.rank == min(rank, *found.shape, sum(one["fc"].rank for one in case[0]))


@settings(max_examples=60)
@given(inputs(), st.floats(0.01, 1))
def test_energy_is_kept_by_the_smallest_rank_that_does(case: tuple[list[Updates], list[float]], energy: float) -> None:
    found = truncated_svd(*case, energy=energy)["fc"]
    check(found, *case, 10**6)
    assert found.relative_loss <= (1 - energy) * (1 + 1e-12)
    if found.rank > 1:
        smaller = truncated_svd(*case, rank=found.rank - 1)["fc"]
        assert smaller.relative_loss > (1 - energy) * (1 - 1e-12)


@settings(max_examples=40)
@given(inputs(), st.floats(0.01, 1), st.integers(1, 9))
def test_rank_and_energy_together_give_the_smaller_rank(
    case: tuple[list[Updates], list[float]], energy: float, rank: int
) -> None:
    both = truncated_svd(*case, rank=rank, energy=energy)["fc"]
    assert both.rank == min(truncated_svd(*case, rank=rank)["fc"].rank, truncated_svd(*case, energy=energy)["fc"].rank)


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e5, 1e10])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiny_and_huge_updates_are_truncated_as_well(scale: float, shape: tuple[int, int]) -> None:
    adapters = [{"fc": random_update(*shape, 3, scaling=scale, seed=seed)} for seed in range(3)]
    check(truncated_svd(adapters, [1, -2, 0.5], rank=2)["fc"], adapters, [1, -2, 0.5], 2)


@pytest.mark.parametrize("imbalance", [1e-12, 1e12])
def test_factors_of_unequal_size_lose_nothing(imbalance: float) -> None:
    plain = [{"fc": random_update(20, 15, 3, seed=seed)} for seed in range(2)]
    first, second = plain[0]["fc"], plain[1]["fc"]
    skewed = [
        {"fc": LowRankUpdate(first.lora_A * imbalance, first.lora_B / imbalance)},
        {"fc": LowRankUpdate(second.lora_A / imbalance, second.lora_B * imbalance)},
    ]
    found = truncated_svd(skewed, [1, 1], rank=4)["fc"]
    check(found, plain, [1, 1], 4)


def test_a_sum_of_lower_rank_than_its_factors_gets_its_own_rank() -> None:
    one = random_update(20, 15, 3)
    doubled = {"fc": LowRankUpdate(torch.cat([one.lora_A, one.lora_A]), torch.cat([one.lora_B, one.lora_B], dim=1))}
    found = truncated_svd([doubled, {"fc": one}], [1, 0.5], rank=12)["fc"]
    assert found.rank == 3
    assert found.singular_values[3:].tolist() == [0.0] * 6
    assert (found.loss, found.relative_loss) == (0.0, 0.0)
    check(found, [doubled, {"fc": one}], [1, 0.5], 12)


def test_all_of_the_energy_keeps_directions_too_small_to_change_its_sum() -> None:
    sigma = torch.tensor([1.0, 1e-9, 1e-12], dtype=torch.float64)
    update = {"fc": LowRankUpdate(torch.eye(3, dtype=torch.float64), torch.diag(sigma))}
    assert truncated_svd([update], [1], energy=1)["fc"].rank == 3
    assert truncated_svd([update], [1], energy=1 - 1e-15)["fc"].rank == 1


def test_golden_sum_of_peft_at_full_rank() -> None:
    pair = [{"fc": LowRankUpdate(torch.tensor(GOLDEN[f"A{i}"]), torch.tensor(GOLDEN[f"B{i}"]), 2.0)} for i in (1, 2)]
    found = truncated_svd(pair, [0.5, 0.5], rank=3)["fc"]
    expected = torch.tensor(GOLDEN["true_weighted_sum"])
    torch.testing.assert_close(found.delta_weight(), expected, rtol=0, atol=1e-6)


# laws


@settings(max_examples=40)
@given(inputs(), st.integers(0, 3))
def test_one_adapter_at_its_own_rank_or_more_is_itself(case: tuple[list[Updates], list[float]], more: int) -> None:
    adapter = case[0][0]
    found = truncated_svd([adapter], [1.0], rank=adapter["fc"].rank + more)["fc"]
    assert float((found.delta_weight() - adapter["fc"].delta_weight()).norm()) <= 1e-13 * size_of([adapter], [1])
    assert found.loss == 0.0


@pytest.mark.parametrize("shape", [*SHAPES, (500, 300)], ids=str)
def test_an_adapter_minus_itself_is_exactly_zero_and_still_an_update(shape: tuple[int, int]) -> None:
    adapter = {"fc": random_update(*shape, 4, scaling=3.0)}
    for options in ({"rank": 4}, {"energy": 0.5}, {"energy": 1.0}):
        found = truncated_svd([adapter, adapter], [1, -1], **options)["fc"]
        assert found.rank == 1
        assert not found.delta_weight().any()
        assert (found.loss, found.relative_loss) == (0.0, 0.0)


def test_updates_of_zero_stay_zero() -> None:
    zero = {"fc": LowRankUpdate(torch.randn(2, 4), torch.zeros(3, 2)), "out": random_update(3, 4, 1)}
    found = truncated_svd([zero], [1.0], rank={"fc": 2, "out": 1})
    assert not found["fc"].delta_weight().any()
    assert found["fc"].rank == found["out"].rank == 1


@settings(max_examples=40)
@given(inputs(), st.integers(1, 5))
def test_the_order_of_inputs_does_not_matter_up_to_rounding(case: tuple[list[Updates], list[float]], rank: int) -> None:
    adapters, weights = case
    found = truncated_svd(adapters, weights, rank=rank)["fc"]
    sigma = found.singular_values
    gap = float(sigma[found.rank - 1] - sigma[found.rank]) if found.rank < len(sigma) else float(sigma[0])
    assume(gap > 1e-3 * size_of(adapters, weights))  # where two values are equal, which is kept is arbitrary
    other = truncated_svd(adapters[::-1], weights[::-1], rank=rank)["fc"]
    assert float((found.delta_weight() - other.delta_weight()).norm()) <= 1e-9 * size_of(adapters, weights)


@settings(max_examples=40)
@given(inputs(), st.integers(1, 5), st.sampled_from([0.125, 3.0, -7.0]))
def test_rescaling_alpha_against_b_changes_nothing(
    case: tuple[list[Updates], list[float]], rank: int, factor: float
) -> None:
    adapters, weights = case
    rescaled = [
        {name: LowRankUpdate(u.lora_A, u.lora_B / factor, u.scaling * factor) for name, u in one.items()}
        for one in adapters
    ]
    check(truncated_svd(rescaled, weights, rank=rank)["fc"], adapters, weights, rank)


def test_modules_need_not_be_shared_and_an_input_of_weight_0_takes_no_part() -> None:
    first, second = {"a": random_update(5, 4, 3)}, {"b": random_update(3, 6, 2, seed=1)}
    found = truncated_svd([first, second, {"c": random_update(2, 2, 1)}], [1, 2, 0], rank={"a": 1, "b": 2})
    assert {name: update.rank for name, update in found.items()} == {"a": 1, "b": 2}
    torch.testing.assert_close(found["b"].delta_weight(), 2 * second["b"].delta_weight())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_factors_come_out_in_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    update = random_update(20, 15, 6)
    cast = LowRankUpdate(update.lora_A.to(dtype), update.lora_B.to(dtype), 0.5)
    found = truncated_svd([{"fc": cast}], [2.0], rank=4)["fc"]
    assert found.lora_A.dtype == found.lora_B.dtype == dtype
    u, sigma, vh = torch.linalg.svd(0.5 * 2.0 * cast.lora_B.double() @ cast.lora_A.double())
    error = found.lora_B.double() @ found.lora_A.double() - (u[:, :4] * sigma[:4]) @ vh[:4]
    assert float(error.norm()) <= 4 * torch.finfo(dtype).eps * float(sigma.norm())


def test_inputs_are_left_alone() -> None:
    update = random_update(4, 5, 2)
    before = update.lora_A.clone(), update.lora_B.clone()
    truncated_svd([{"fc": update}], [2.0], rank=1)["fc"].lora_A.zero_()
    assert torch.equal(update.lora_A, before[0])
    assert torch.equal(update.lora_B, before[1])


# memory


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("options", [{"rank": 5}, {"energy": 0.7}], ids=str)
def test_nothing_larger_than_the_stacked_factors_is_made(options: dict[str, float]) -> None:
    m, n, stacked = 300, 200, 12
    adapters = [{"fc": random_update(m, n, 4, seed=seed)} for seed in range(3)]
    with LargestTensor() as watch:
        truncated_svd(adapters, [1, 1, 1], **options)  # type: ignore[arg-type]
        assert watch.largest == m * stacked
        adapters[0]["fc"].delta_weight()
        assert watch.largest == m * n  # the watch would have seen it


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rank or energy must be given, got neither"),
        (
            {"rank": 0},
            r"rank must be a whole number ≥ 1, got {'all modules': 0}\. To drop a module, leave it out of the inputs",
        ),
        ({"rank": -1}, "rank must be a whole number ≥ 1, got {'all modules': -1}"),
        ({"rank": 1.0}, "rank must be a whole number ≥ 1, got {'all modules': 1.0}"),
        ({"rank": True}, "rank must be a whole number ≥ 1, got {'all modules': True}"),
        ({"rank": {"fc": 0}}, "rank must be a whole number ≥ 1, got {'fc': 0}"),
        ({"rank": {"fc": None}}, "rank must be a whole number ≥ 1, got {'fc': None}"),
        ({"rank": {}}, r"rank must name the merged modules, got none for \['fc'\] and one for unknown \[\]"),
        (
            {"rank": {"fc": 1, "f": 1}},
            r"rank must name the merged modules, got none for \[\] and one for unknown \['f'\]",
        ),
        ({"energy": 0}, r"energy must be in \(0, 1\], got 0"),
        ({"energy": 1.1}, r"energy must be in \(0, 1\], got 1.1"),
        ({"energy": float("nan")}, r"energy must be in \(0, 1\], got nan"),
        ({"rank": 1, "energy": -0.5}, r"energy must be in \(0, 1\], got -0.5"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncated_svd([{"fc": random_update(3, 4, 2)}], [1.0], **options)  # type: ignore[arg-type]


def test_a_factor_that_overflows_its_dtype_is_an_error() -> None:
    half = torch.ones(1, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must fit torch\.float16, got infinity for 'fc'\. Lower the weights"):
        truncated_svd([{"fc": LowRankUpdate(half, half.T)}], [1e12], rank=1)


# peft as the judge


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


@torch.no_grad()
def test_peft_gives_the_logits_of_the_truncated_update(tmp_path: Path) -> None:
    for seed, (name, rank) in enumerate({"a": 4, "b": 3}.items()):
        model = get_peft_model(network(), LoraConfig(r=rank, lora_alpha=6, target_modules=["0", "2"]))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        model.save_pretrained(tmp_path / name)
    folders = [tmp_path / "a", tmp_path / "b"]
    exact = merge_folders(folders, [0.7, -1.3], tmp_path / "exact")
    merge_folders(
        folders, [0.7, -1.3], tmp_path / "out", rule="truncated_svd", truncation=Truncation(rank={"0": 2, "2": 3})
    )
    expected, untruncated = network(), network()
    for name, rank in {"0": 2, "2": 3}.items():
        delta = exact.updates[name].delta_weight().double()
        u, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
        expected.get_submodule(name).weight.data += ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).float()
        untruncated.get_submodule(name).weight.data += delta.float()
    loaded = PeftModel.from_pretrained(network(), str(tmp_path / "out")).eval()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(x), expected(x), rtol=1e-5, atol=1e-4)
    assert float((untruncated(x) - expected(x)).abs().max()) > 0.1


def test_a_sum_of_zero_is_written_and_loaded_by_peft(tmp_path: Path) -> None:
    state = AdapterState(updates={"0": random_update(8, 6, 2)})
    write_adapter(state, tmp_path / "a")
    merge_folders([tmp_path / "a"] * 2, [1, -1], tmp_path / "out", rule="truncated_svd", truncation=Truncation(rank=2))
    loaded = PeftModel.from_pretrained(network(), str(tmp_path / "out")).eval()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(x), network()(x))


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(importlib.import_module("flowra_compose.truncation")).failed == 0
