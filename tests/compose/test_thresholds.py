"""Thresholds of a trim against a sort over everything."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate, MergeOptions, merge_updates
from flowra_compose.module_updates import modules_of
from flowra_compose.spaces import aligned_space, core_space, weight_space
from flowra_compose.thresholds import global_thresholds, threshold

Updates = Mapping[str, LowRankUpdate]
SPACES = {"weight": weight_space, "aligned": aligned_space, "core": core_space}
SHAPES = {"a": (5, 7), "b": (3, 2), "c": (1, 6), "d": (8, 1)}


def matrix(shape: tuple[int, int], *, whole: bool, scale: float, seed: int) -> Tensor:
    """Normal entries, or whole numbers, of which many are equal and many are 0."""
    generator = torch.Generator().manual_seed(seed)
    if whole:
        return scale * torch.randint(-2, 3, shape, generator=generator).double()
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def tasks(draw: st.DrawFn) -> list[Updates]:
    """Up to three tasks that update some of the modules each, one of them maybe none."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        whole, scale = draw(st.booleans()), draw(st.sampled_from([1e-30, 1e-5, 1.0, 1e30]))
        names = draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True))
        made.append({
            name: LowRankUpdate.of_delta_weight(
                matrix(SHAPES[name], whole=whole, scale=scale, seed=draw(st.integers(0, 10**6)))
            )
            for name in names
        })
    return made


def survey(adapters: Sequence[Updates], density: float, space: str = "weight") -> tuple[float, ...]:
    modules = partial(modules_of, adapters, [1.0] * len(adapters))
    return global_thresholds(modules, space=SPACES[space], density=density)


def by_sorting(entries: Tensor, density: float) -> float:
    """The K-th largest magnitude, in float32."""
    kept = max(1, int(density * len(entries)))
    return float(entries.abs().float().sort(descending=True).values[kept - 1])


@settings(max_examples=100)
@given(tasks(), st.floats(0.01, 1), st.sampled_from(sorted(SPACES)))
def test_the_global_threshold_is_that_of_a_sort_over_all_modules(
    adapters: list[Updates], density: float, space: str
) -> None:
    if not any(adapters):
        assert survey(adapters, density, space) == ()
        return
    found = survey(adapters, density, space)
    for task, one in enumerate(adapters):
        entries = [
            SPACES[space](module).of(update).flatten()
            for module in modules_of(adapters, [1.0] * len(adapters))
            if (update := module.updates[task]) is not None
        ]
        assert found[task] == (by_sorting(torch.cat(entries), density) if one else 0.0)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.booleans(), st.floats(0.01, 1), st.sampled_from([1e-30, 1.0, 1e30]))
def test_the_threshold_of_one_matrix_is_that_of_a_sort(seed: int, whole: bool, density: float, scale: float) -> None:
    entries = matrix((7, 9), whole=whole, scale=scale, seed=seed)
    assert threshold(entries, density=density) == by_sorting(entries.flatten(), density)


@pytest.mark.parametrize(("density", "kept"), [(0.001, 1), (0.1, 1), (0.25, 3), (0.3, 3), (0.5, 6), (1.0, 12)])
def test_a_density_keeps_its_share_rounded_down_and_one_entry_at_least(density: float, kept: int) -> None:
    entries = torch.arange(1.0, 13.0).reshape(3, 4)
    assert threshold(entries, density=density) == 13 - kept
    assert survey([{"fc": LowRankUpdate.of_delta_weight(entries)}], density) == (13 - kept,)


def test_entries_that_differ_by_the_rounding_of_products_are_equal() -> None:
    entries = torch.tensor([[0.1 + 0.2, 0.3, -0.3, 0.2]], dtype=torch.float64)
    assert entries[0, 0] != entries[0, 1]
    for density in (0.25, 0.5, 0.75):
        assert threshold(entries, density=density) == float(torch.tensor(0.3))


def test_a_few_large_modules_take_the_share_of_the_small_ones() -> None:
    large, small = torch.full((2, 5), 10.0), torch.full((2, 5), 0.1)
    adapter = {"large": LowRankUpdate.of_delta_weight(large), "small": LowRankUpdate.of_delta_weight(small)}
    everywhere = merge_updates([adapter], [1.0], rule="ties", options=MergeOptions(density=0.5))
    each = merge_updates([adapter], [1.0], rule="ties", options=MergeOptions(density=0.5, trim="tensor"))
    assert torch.equal(everywhere["large"].delta_weight(), large)
    assert not everywhere["small"].delta_weight().any()
    assert torch.equal(each["small"].delta_weight(), small)  # all equal: all are kept


def test_thresholds_follow_the_weight_of_their_task() -> None:
    adapter = {"fc": LowRankUpdate.of_delta_weight(torch.arange(1.0, 13.0).reshape(3, 4))}
    modules = partial(modules_of, [adapter, adapter, adapter], [1.0, 0.0, -2.0])
    assert global_thresholds(modules, space=weight_space, density=0.5) == (7.0, 14.0)


class Watched(Mapping[str, LowRankUpdate]):
    """Count how often each update is read."""

    def __init__(self, updates: Updates) -> None:
        self.updates, self.reads = updates, Counter[str]()

    def __getitem__(self, name: str) -> LowRankUpdate:
        self.reads[name] += 1
        return self.updates[name]

    def __contains__(self, name: object) -> bool:
        return name in self.updates

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


@pytest.mark.parametrize(("trim", "reads"), [("global", 3), ("tensor", 1), (None, 3)])
def test_a_survey_reads_every_update_twice_and_the_merge_once(trim: str | None, reads: int) -> None:
    updates = {
        name: LowRankUpdate.of_delta_weight(matrix(shape, whole=False, scale=1, seed=0))
        for name, shape in SHAPES.items()
    }
    watched = Watched(updates)
    options = MergeOptions(trim=trim)  # type: ignore[arg-type]
    merge_updates([watched], [1.0], rule="magnitude_prune", options=options)
    assert watched.reads == dict.fromkeys(SHAPES, reads)
