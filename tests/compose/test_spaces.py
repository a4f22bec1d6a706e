"""Coordinates of task vectors against dense singular value decompositions."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowra_compose import LowRankUpdate, MergeOptions, ModuleUpdates, merge_updates
from flowra_compose.entries import added_up, all_entries, merge_entries
from flowra_compose.spaces import Space, aligned_space, core_space, weight_space

SPACES = {"weight": weight_space, "aligned": aligned_space, "core": core_space}
SHAPES = [(5, 30), (30, 5), (6, 6), (1, 4), (4, 1), (12, 9)]
LOW_RANK_RULES = ["knots_ties", "knots_dare_linear", "knots_dare_ties", "core_task_arithmetic", "core_ties"]


def random_update(m: int, n: int, rank: int, *, scaling: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


def module_of(*updates: LowRankUpdate | None) -> ModuleUpdates:
    return ModuleUpdates(name="fc", updates=updates, statistics=(None,) * len(updates))


@st.composite
def modules(draw: st.DrawFn) -> ModuleUpdates:
    """Up to four tasks of any ranks, sizes 1e-6 to 1e6 apart, some of which leave the module alone."""
    m, n = draw(st.sampled_from(SHAPES))
    updates: list[LowRankUpdate | None] = [
        random_update(
            m,
            n,
            draw(st.integers(1, 9)),
            scaling=draw(st.sampled_from([-1.5, 1e-3, 1.0, 1e3])),
            seed=draw(st.integers(0, 10**6)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    absent = draw(st.lists(st.none(), max_size=2))
    return module_of(*draw(st.permutations(updates + absent)))


def size_of(module: ModuleUpdates) -> float:
    return sum(float(update.lora_B.norm() * update.lora_A.norm()) * abs(update.scaling) for update in module.present)


# nothing is lost


@settings(max_examples=60)
@given(modules(), st.sampled_from(sorted(SPACES)))
def test_every_space_holds_the_task_vectors_whole(module: ModuleUpdates, space: str) -> None:
    coordinates = SPACES[space](module)
    for update in module.present:
        back = coordinates.back(module, coordinates.of(update))
        assert back.shape == module.shape
        assert float((back.delta_weight() - update.delta_weight()).norm()) <= 1e-13 * size_of(module)


@settings(max_examples=60)
@given(modules(), st.sampled_from(sorted(SPACES)))
def test_a_sum_in_any_space_is_the_sum(module: ModuleUpdates, space: str) -> None:
    merged = merge_entries(module, MergeOptions(), space=SPACES[space], keep=all_entries, combine=added_up)
    expected = torch.stack([update.delta_weight() for update in module.present]).sum(0)
    assert float((merged.delta_weight() - expected).norm()) <= 1e-13 * size_of(module)
    if space != "weight":
        assert merged.rank <= sum(update.rank for update in module.present)


@settings(max_examples=60)
@given(modules(), st.sampled_from(["aligned", "core"]))
def test_bases_are_orthonormal_and_no_larger_than_they_must_be(module: ModuleUpdates, space: str) -> None:
    coordinates = SPACES[space](module)
    bases = [basis for basis in (coordinates.left, coordinates.right) if basis is not None]
    assert len(bases) == (1 if space == "aligned" else 2)
    for basis in bases:
        identity = torch.eye(basis.shape[1], dtype=torch.float64)
        assert float((basis.T @ basis - identity).abs().max()) <= 1e-13
        assert basis.shape[1] <= min(basis.shape[0], sum(update.rank for update in module.present))


@pytest.mark.parametrize("space", ["aligned", "core"])
def test_a_task_1e10_times_smaller_than_another_is_not_lost(space: str) -> None:
    large, small = random_update(20, 15, 2), random_update(20, 15, 3, scaling=1e-10, seed=1)
    module = module_of(large, small)
    coordinates = SPACES[space](module)
    back = coordinates.back(module, coordinates.of(small)).delta_weight()
    assert float((back - small.delta_weight()).norm()) <= 1e-4 * float(small.delta_weight().norm())


# what they are


def signless_distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of rows whose signs are free."""
    signs = torch.sign((found * expected).sum(1, keepdim=True))
    return float((found - signs * expected).abs().max())


@settings(max_examples=60)
@given(modules())
def test_aligned_coordinates_are_those_of_the_dense_decomposition(module: ModuleUpdates) -> None:
    dense = torch.cat([update.delta_weight() for update in module.present], dim=1)
    _, sigma, vh = torch.linalg.svd(dense, full_matrices=False)
    found = torch.cat([aligned_space(module).of(update) for update in module.present], dim=1)
    kept = len(found)
    assert float(sigma[kept:].sum()) <= 1e-13 * size_of(module)
    gaps = sigma[:kept] - torch.cat([sigma[1:kept], torch.zeros(1, dtype=torch.float64)])
    assume(float(gaps.min()) > 1e-6 * size_of(module))
    assert signless_distance(found, sigma[:kept, None] * vh[:kept]) <= 1e-8 * size_of(module)


@settings(max_examples=40)
@given(modules())
def test_the_core_is_aligned_on_both_sides(module: ModuleUpdates) -> None:
    core, deltas = core_space(module), [update.delta_weight() for update in module.present]
    assert core.left is not None
    assert core.right is not None
    for update, delta in zip(module.present, deltas, strict=True):
        expected = core.left.T @ delta @ core.right
        assert float((core.of(update) - expected).abs().max()) <= 1e-13 * size_of(module)
    grams = [
        core.left.T @ torch.stack([delta @ delta.T for delta in deltas]).sum(0) @ core.left,
        core.right.T @ torch.stack([delta.T @ delta for delta in deltas]).sum(0) @ core.right,
    ]
    for gram in grams:  # singular vectors of all tasks: they make the sum of Grams diagonal, the largest first
        largest_first = torch.diag(gram.diagonal().sort(descending=True).values)
        assert float((gram - largest_first).abs().max()) <= 1e-13 * size_of(module) ** 2


@pytest.mark.parametrize("factor", [1e-3, 3.0, -1e4])
@pytest.mark.parametrize("space", sorted(SPACES))
def test_coordinates_know_products_only(space: str, factor: float) -> None:
    updates = [random_update(12, 9, 3, seed=seed) for seed in range(3)]
    scaled = [LowRankUpdate(updates[0].lora_A * factor, updates[0].lora_B / factor), *updates[1:]]
    plain, other = module_of(*updates), module_of(*scaled)
    for one, same in zip(updates, scaled, strict=True):
        found, expected = SPACES[space](other).of(same), SPACES[space](plain).of(one)
        assert float((found.abs() - expected.abs()).abs().max()) <= 1e-11


@pytest.mark.parametrize("space", ["aligned", "core"])
def test_directions_that_tasks_share_are_there_once(space: str) -> None:
    one = random_update(20, 15, 3)
    coordinates = SPACES[space](module_of(one, random_update(20, 15, 3, scaling=-2.0), one))
    assert coordinates.of(one).shape == ((3, 15) if space == "aligned" else (3, 3))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_comes_back_from_the_core_has_the_rank_of_its_shorter_side(transposed: bool) -> None:
    one, other = random_update(20, 15, 3), random_update(20, 15, 3, seed=1)
    shared = [one, LowRankUpdate(one.lora_A, other.lora_B)]
    if transposed:
        shared = [LowRankUpdate(each.lora_B.T, each.lora_A.T) for each in shared]
    module = module_of(*shared)
    core = core_space(module)
    x = core.of(shared[0]) + core.of(shared[1])
    assert x.shape == ((3, 6) if transposed else (6, 3))
    assert core.back(module, x).rank == 3
    expected = shared[0].delta_weight() + shared[1].delta_weight()
    torch.testing.assert_close(core.back(module, x).delta_weight(), expected)


@pytest.mark.parametrize("space", sorted(SPACES))
def test_updates_of_zero_have_one_direction_at_least(space: str) -> None:
    zero = LowRankUpdate(torch.randn(2, 4), torch.zeros(3, 2))
    coordinates = SPACES[space](module_of(zero))
    assert not coordinates.of(zero).any()
    assert not coordinates.back(module_of(zero), coordinates.of(zero)).delta_weight().any()


@pytest.mark.parametrize("space", sorted(SPACES))
@pytest.mark.parametrize(("layout", "kernel", "shape"), [("vector", (), (6, 1)), ("conv", (2, 3), (6, 12))], ids=str)
def test_layouts_stay(space: str, layout: str, kernel: tuple[int, ...], shape: tuple[int, int]) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = LowRankUpdate.of_delta_weight(dense, layout=layout, kernel=kernel)  # type: ignore[arg-type]
    coordinates = SPACES[space](module_of(update))
    back = coordinates.back(module_of(update), coordinates.of(update))
    assert (back.layout, back.kernel) == (layout, kernel)
    torch.testing.assert_close(back.delta_weight(), dense)


# memory


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("space", [aligned_space, core_space])
def test_a_space_is_made_of_factors(space: Space) -> None:
    module = module_of(*(random_update(300, 200, 4, seed=seed) for seed in range(3)))
    with LargestTensor() as watch:
        coordinates = space(module)
        coordinates.back(module, torch.stack([coordinates.of(update) for update in module.present]).sum(0))
        assert watch.largest <= 3 * 300 * 12
        module.present[0].delta_weight()
        assert watch.largest == 300 * 200  # the watch would have seen it


@pytest.mark.parametrize("rule", LOW_RANK_RULES)
def test_nothing_of_the_size_of_a_weight_is_made_in_a_space_of_factors(rule: str) -> None:
    adapters = [{"fc": random_update(500, 400, 4, seed=seed)} for seed in range(3)]
    with LargestTensor() as watch:
        found = merge_updates(adapters, [1, 1, 1], rule=rule)["fc"]
    assert found.rank == 12
    assert watch.largest < 500 * 400 // 2
