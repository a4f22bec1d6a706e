"""Rules on entries: golden numbers, the definitions written as loops, what the draws depend on, and PEFT."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flowra_compose import RULES, LowRankUpdate, MergeOptions, merge_updates
from flowra_compose.entries import DROP_DENSITY, elected_mean
from flowra_compose.thresholds import TRIM_DENSITY

Updates = Mapping[str, LowRankUpdate]
FOLDER = Path(__file__).parents[1] / "golden"
UTILITIES = json.loads((FOLDER / "merge_utils.json").read_text())
ADAPTERS = json.loads((FOLDER / "peft_add_weighted_adapter.json").read_text())
SHAPES = {"a": (5, 7), "b": (3, 2), "c": (1, 6), "d": (8, 1)}
TRIMS = ["ties", "magnitude_prune", "knots_ties", "core_ties"]
DRAWS = ["dare_linear", "dare_ties", "knots_dare_linear", "knots_dare_ties"]
ELECTIONS = [rule for rule in (*TRIMS, *DRAWS) if "ties" in rule]


def merged(
    adapters: Sequence[Updates],
    weights: Sequence[float],
    rule: str,
    *,
    density: float | None = None,
    trim: str | None = None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    options = MergeOptions(density=density, trim=trim, seed=seed)  # type: ignore[arg-type]
    made = merge_updates(adapters, weights, rule=rule, options=options)
    return {name: update.delta_weight() for name, update in made.items()}


def dense(*matrices: object) -> list[Updates]:
    return [
        {"fc": LowRankUpdate.of_delta_weight(torch.as_tensor(each, dtype=torch.float64))}  # type: ignore[call-overload]
        for each in matrices
    ]


def random_update(
    m: int, n: int, rank: int, *, scaling: float = 1.0, seed: int = 0, whole: bool = False
) -> LowRankUpdate:
    """Factors with normal entries, or with small whole numbers: many entries of ΔW are then equal, or 0."""
    generator = torch.Generator().manual_seed(seed)
    if whole:
        a, b = (torch.randint(-1, 2, shape, generator=generator).double() for shape in ((rank, n), (m, rank)))
    else:
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[Updates], list[float]]:
    """Up to four adapters of unequal ranks over up to four modules, and their weights."""
    made: list[Updates] = []
    whole = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True, min_size=1))
        made.append({
            name: random_update(
                *SHAPES[name],
                draw(st.integers(1, 4)),
                scaling=draw(st.sampled_from([-2.0, 0.5, 1.0])),
                seed=draw(st.integers(0, 10**6)),
                whole=whole,
            )
            for name in names
        })
    weights = st.sampled_from([-1.0, 0.5, 1.0, 2.0])
    return made, draw(st.lists(weights, min_size=len(made), max_size=len(made)))


def size_of(adapters: Sequence[Updates]) -> float:
    return sum(float(update.lora_A.norm() * update.lora_B.norm()) for one in adapters for update in one.values())


# golden numbers of PEFT


def test_golden_trim_of_each_tensor() -> None:
    for tensor, expected in zip(UTILITIES["tensors"], UTILITIES["magnitude_pruned"], strict=True):
        found = merged(dense(tensor), [1.0], "magnitude_prune", density=0.5)["fc"]
        assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))


def test_golden_magnitude_prune() -> None:
    found = merged(dense(*UTILITIES["tensors"]), UTILITIES["weights"], "magnitude_prune", density=0.5)["fc"]
    torch.testing.assert_close(found, torch.tensor(UTILITIES["magnitude_prune"]).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["dare_linear", "knots_dare_linear", "core_task_arithmetic"])
def test_golden_sum_where_nothing_is_dropped(rule: str) -> None:
    density = None if rule == "core_task_arithmetic" else 1.0
    found = merged(dense(*UTILITIES["tensors"]), UTILITIES["weights"], rule, density=density)["fc"]
    torch.testing.assert_close(found, torch.tensor(UTILITIES["task_arithmetic"]).double(), rtol=0, atol=1e-7)


def test_golden_election_of_equal_weights() -> None:
    masks = torch.tensor(UTILITIES["majority_sign_mask_total"])
    pruned = torch.tensor(UTILITIES["magnitude_pruned"], dtype=torch.float64)
    expected = (pruned * masks).sum(0) / masks.sum(0).clamp(min=1)
    found = merged(dense(*UTILITIES["tensors"]), [1, 1, 1], "ties", density=0.5)["fc"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_weights_vote_which_they_do_not_in_peft() -> None:
    found = merged(dense(*UTILITIES["tensors"]), UTILITIES["weights"], "ties", density=0.5)["fc"]
    ours, theirs = float(found[0, 2]), UTILITIES["ties_total"][0][2]
    assert ours == pytest.approx(2 * -0.7)  # of 0.3, 0.5 · 0.6 and 2 · -0.7, the last is the largest
    assert theirs == pytest.approx((0.3 + 0.5 * 0.6) / 2)  # 0.3 + 0.6 - 0.7 > 0
    same = torch.ones(2, 3, dtype=torch.bool)
    same[0, 2] = same[1, 1] = same[1, 2] = False
    torch.testing.assert_close(found[same], torch.tensor(UTILITIES["ties_total"]).double()[same], rtol=0, atol=1e-7)


def test_golden_ties_svd_but_for_a_tie_of_which_peft_keeps_one() -> None:
    pair = [
        {"fc": LowRankUpdate(*(torch.tensor(ADAPTERS[f"{side}{i}"]).double() for side in "AB"), scaling=2.0)}
        for i in (1, 2)
    ]
    found = merged(pair, [0.5, 0.5], "ties", density=0.5, trim="tensor")["fc"]
    expected = torch.tensor(ADAPTERS["results"]["ties_svd"]["merged_delta"]).double()
    assert abs(ADAPTERS["delta2"][1][3]) == abs(ADAPTERS["delta2"][2][1])  # the sixth largest of 12, twice
    expected[2, 1] = 0.5 * 0.24
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


# the definitions


def trimmed_by_sorting(vectors: Sequence[Tensor], density: float) -> list[Tensor]:
    """Keep the K largest magnitudes of one task over its modules, and all that equal the last."""
    everything = torch.cat([each.flatten() for each in vectors]).abs().float()
    smallest = everything.sort(descending=True).values[max(1, int(density * len(everything))) - 1]
    return [torch.where(each.abs().float() >= smallest, each, 0) for each in vectors]


def elected_entry(entries: Sequence[float]) -> float:
    total = math.fsum(entries)
    agree = [value for value in entries if value * total > 0]
    return math.fsum(agree) / len(agree) if agree else 0.0


def combined(matrices: Sequence[Tensor], *, election: bool) -> Tensor:
    """Entry by entry."""
    shape = matrices[0].shape
    columns = zip(*(each.flatten().tolist() for each in matrices), strict=True)
    return torch.tensor(
        [elected_entry(column) if election else math.fsum(column) for column in columns], dtype=torch.float64
    ).reshape(shape)


@settings(max_examples=120)
@given(tasks(), st.floats(0.01, 1), st.sampled_from(["global", "tensor"]), st.sampled_from(["ties", "magnitude_prune"]))
def test_trims_are_their_definitions(
    case: tuple[list[Updates], list[float]], density: float, trim: str, rule: str
) -> None:
    adapters, weights = case
    kept: dict[str, list[Tensor]] = {}
    for one, weight in zip(adapters, weights, strict=True):
        vectors = {name: weight * update.delta_weight() for name, update in one.items()}
        groups: Iterable[dict[str, Tensor]] = (
            [vectors] if trim == "global" else ({name: vector} for name, vector in vectors.items())
        )
        for group in groups:
            for name, matrix in zip(group, trimmed_by_sorting(list(group.values()), density), strict=True):
                kept.setdefault(name, []).append(matrix)
    found = merged(adapters, weights, rule, density=density, trim=trim)
    assert found.keys() == kept.keys()
    for name, matrices in kept.items():
        expected = combined(matrices, election=rule == "ties")
        assert float((found[name] - expected).abs().max()) <= 1e-12 * size_of(adapters)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.permutations(range(5))
)
def test_the_election_is_its_definition_in_any_order(rows: list[list[int]], order: list[int]) -> None:
    matrices = [torch.tensor(row, dtype=torch.float64).reshape(2, 3) for row in rows]
    shuffled = [matrices[index] for index in order if index < len(matrices)]
    expected = combined(matrices, election=True)
    torch.testing.assert_close(elected_mean(matrices), expected)
    torch.testing.assert_close(elected_mean(shuffled), expected)


@pytest.mark.parametrize("entries", [[1.0, -1.0], [0.1, 0.2, -0.3], [-0.3, 0.2, 0.1], [1e10, -1e10, 1e-5], [0.0, 0.0]])
def test_a_sum_of_zero_to_rounding_elects_no_sign(entries: list[float]) -> None:
    assert float(elected_mean([torch.tensor(each, dtype=torch.float64) for each in entries])) == 0.0


def test_entries_of_zero_do_not_count() -> None:
    matrices = [torch.tensor([value], dtype=torch.float64) for value in (3.0, 0.0, -1.0, 1.0, 0.0)]
    assert elected_mean(matrices).tolist() == [2.0]


@settings(max_examples=30)
@given(tasks())
def test_ties_of_one_sign_and_density_1_is_the_mean(case: tuple[list[Updates], list[float]]) -> None:
    adapters = [
        {name: LowRankUpdate(each.lora_A.abs() + 0.1, each.lora_B.abs() + 0.1) for name, each in one.items()}
        for one in case[0]
    ]
    found = merged(adapters, [1.0] * len(adapters), "ties", density=1)
    for name, matrix in found.items():
        deltas = [one[name].delta_weight() for one in adapters if name in one]
        torch.testing.assert_close(matrix, torch.stack(deltas).mean(0))


def test_knots_elects_in_the_coordinates_of_the_dense_decomposition() -> None:
    pair = [{"fc": random_update(6, 9, 2, seed=seed)} for seed in range(3)]
    deltas = [one["fc"].delta_weight() for one in pair]
    u, sigma, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    coordinates = [sigma[:, None] * each for each in vh.split(9, dim=1)]
    kept = [trimmed_by_sorting([each], 0.3)[0] for each in coordinates]
    expected = u @ combined(kept, election=True)
    torch.testing.assert_close(merged(pair, [1, 1, 1], "knots_ties", density=0.3)["fc"], expected)


def test_the_core_elects_in_the_coordinates_of_both_sides() -> None:
    pair = [{"fc": random_update(6, 9, 2, seed=seed)} for seed in range(3)]
    deltas = [one["fc"].delta_weight() for one in pair]
    u = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False).U[:, :6]
    vh = torch.linalg.svd(torch.cat(deltas), full_matrices=False).Vh[:6]
    kept = [trimmed_by_sorting([u.T @ each @ vh.T], 0.3)[0] for each in deltas]
    expected = u @ combined(kept, election=True) @ vh
    torch.testing.assert_close(merged(pair, [1, 1, 1], "core_ties", density=0.3)["fc"], expected)


# chance


@settings(max_examples=40)
@given(tasks(), st.floats(0.05, 1), st.integers(0, 100))
def test_dare_keeps_some_entries_divided_by_the_density(
    case: tuple[list[Updates], list[float]], density: float, seed: int
) -> None:
    adapter = case[0][0]
    found = merged([adapter], [1.0], "dare_linear", density=density, seed=seed)
    for name, update in adapter.items():
        expected = torch.where(found[name] != 0, update.delta_weight() / density, 0)
        torch.testing.assert_close(found[name], expected)


def test_dare_keeps_each_entry_with_the_probability_of_the_density() -> None:
    adapter = [{"fc": random_update(100, 100, 2)}]
    for density in (0.1, 0.5, 0.9):
        kept = int((merged(adapter, [1], "dare_linear", density=density)["fc"] != 0).sum())
        assert abs(kept - 1e4 * density) <= 4 * math.sqrt(1e4 * density * (1 - density))


@pytest.mark.parametrize("rule", ["dare_linear", "knots_dare_linear"])
def test_the_mean_of_many_draws_is_the_sum(rule: str) -> None:
    adapters = [{"fc": random_update(4, 5, 2, seed=seed)} for seed in range(3)]
    draws = torch.stack([merged(adapters, [1, -1, 2], rule, density=0.4, seed=seed)["fc"] for seed in range(400)])
    expected = merged(adapters, [1, -1, 2], "task_arithmetic")["fc"]
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(400))
    assert float(error.abs().max()) <= 4


@settings(max_examples=30)
@given(tasks(), st.sampled_from(["dare_linear", "knots_dare_linear"]))
def test_dare_of_density_1_is_task_arithmetic(case: tuple[list[Updates], list[float]], rule: str) -> None:
    found, expected = merged(*case, rule, density=1.0), merged(*case, "task_arithmetic")
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert float((found[name] - matrix).abs().max()) <= 1e-12 * size_of(case[0])


@pytest.mark.parametrize("rule", DRAWS)
def test_draws_are_reproducible_and_follow_the_seed(rule: str) -> None:
    adapters = [{"fc": random_update(6, 5, 2, seed=seed)} for seed in range(3)]
    draw = partial(merged, adapters, [1, 0.5, 2], rule)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(seed=3)["fc"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, draw(seed=3)["fc"])
    assert not torch.equal(first, draw(seed=4)["fc"])
    assert torch.equal(draw(seed=0)["fc"], draw()["fc"])


def mask(update: LowRankUpdate, *, name: str = "fc", weight: float = 1.0) -> list[list[int]]:
    found = merged([{name: update}], [weight], "dare_linear", density=0.5)[name]
    return (found != 0).int().tolist()


def test_draws_are_those_of_this_version() -> None:
    update = LowRankUpdate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0], [-2.0], [5.0]]))
    assert mask(update) == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("factor", [2.0, -1 / 3, 1e5])
def test_draws_depend_on_the_product_alone(factor: float) -> None:
    update = random_update(6, 5, 3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    expected = mask(update)
    assert mask(LowRankUpdate(update.lora_A * factor, update.lora_B / factor)) == expected
    assert mask(LowRankUpdate(update.lora_A, update.lora_B / factor, factor)) == expected
    assert mask(LowRankUpdate(turn @ update.lora_A, update.lora_B @ turn.T)) == expected
    assert mask(LowRankUpdate.of_delta_weight(update.delta_weight())) == expected
    assert mask(update, weight=factor) == expected


def test_draws_differ_between_modules_and_between_adapters() -> None:
    update = random_update(6, 5, 3)
    assert mask(update) != mask(update, name="other")
    assert mask(update) != mask(random_update(6, 5, 3, seed=1))
    assert mask(update) != mask(LowRankUpdate(update.lora_A, update.lora_B * (1 + 1e-3 * torch.arange(3))))


# laws


@pytest.mark.parametrize("rule", [*TRIMS, *DRAWS, "core_task_arithmetic"])
def test_the_order_of_the_tasks_does_not_matter(rule: str) -> None:
    adapters: list[Updates] = [
        {name: random_update(*SHAPES[name], 2, seed=seed + len(name) * 7) for name in names}
        for seed, names in enumerate(["abcd", "abd", "bc", "a"])
    ]
    weights = [1.0, -0.5, 2.0, 0.7]
    expected = merged(adapters, weights, rule)
    found = merged(adapters[::-1], weights[::-1], rule)
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix)


@pytest.mark.parametrize("rule", [*TRIMS, *DRAWS, "core_task_arithmetic"])
def test_a_task_and_its_negative_cancel(rule: str) -> None:
    adapter = {name: random_update(*shape, 2, seed=len(name)) for name, shape in SHAPES.items()}
    for matrix in merged([adapter, adapter], [0.7, -0.7], rule).values():
        assert float(matrix.abs().max()) <= 1e-14


@pytest.mark.parametrize("factor", [-1.0, 1e-10, 1e10])
@pytest.mark.parametrize("rule", [*TRIMS, *DRAWS, "core_task_arithmetic"])
def test_a_merge_is_as_large_as_its_weights(rule: str, factor: float) -> None:
    adapters = [{name: random_update(*shape, 2, seed=seed) for name, shape in SHAPES.items()} for seed in range(3)]
    expected = merged(adapters, [1, -2, 0.5], rule)
    for name, matrix in merged(adapters, [factor, -2 * factor, 0.5 * factor], rule).items():
        torch.testing.assert_close(matrix / factor, expected[name])


@pytest.mark.parametrize("rule", [*TRIMS, *DRAWS])
def test_one_adapter_of_which_everything_is_kept_is_itself(rule: str) -> None:
    adapter = {name: random_update(*shape, 2, seed=3) for name, shape in SHAPES.items()}
    for name, matrix in merged([adapter], [1.0], rule, density=1.0).items():
        torch.testing.assert_close(matrix, adapter[name].delta_weight())


@pytest.mark.parametrize("rule", ELECTIONS)
def test_identical_adapters_elect_themselves(rule: str) -> None:
    adapter = {name: random_update(*shape, 2, seed=3) for name, shape in SHAPES.items()}
    alone = merged([adapter], [1.0], rule)
    for name, matrix in merged([adapter] * 3, [1.0] * 3, rule).items():
        torch.testing.assert_close(matrix, alone[name])


# options


@pytest.mark.parametrize("rule", [*TRIMS, *DRAWS])
def test_the_density_that_is_not_given_is_the_default_of_the_rule(rule: str) -> None:
    adapters = [{name: random_update(*shape, 2, seed=seed) for name, shape in SHAPES.items()} for seed in range(2)]
    default = TRIM_DENSITY if rule in TRIMS else DROP_DENSITY
    expected = merged(adapters, [1, 1], rule, density=default)
    for name, matrix in merged(adapters, [1, 1], rule).items():
        assert torch.equal(matrix, expected[name])
    other = merged(adapters, [1, 1], rule, density=0.9)
    assert any(not torch.equal(other[name], matrix) for name, matrix in expected.items())


@pytest.mark.parametrize("rule", TRIMS)
def test_a_global_trim_is_the_default_and_another_than_that_of_each_module(rule: str) -> None:
    adapters = [{"a": random_update(5, 7, 2), "b": random_update(5, 7, 2, scaling=10.0, seed=1)}]
    expected = merged(adapters, [1], rule, trim="global")
    each = merged(adapters, [1], rule, trim="tensor")
    for name, matrix in merged(adapters, [1], rule).items():
        assert torch.equal(matrix, expected[name])
    assert int((expected["a"] != 0).sum()) < int((each["a"] != 0).sum())  # the larger module takes more than its share


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("ties", {"seed": 1}, r"seed must be left out with the rule 'ties', got 1\. It takes \['density', 'trim'\]"),
        ("dare_ties", {"trim": "tensor"}, "trim must be left out with the rule 'dare_ties', got tensor"),
        ("core_task_arithmetic", {"density": 0.5}, "density must be left out with the rule 'core_task_arithmetic'"),
        ("ties", {"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ("ties", {"trim": "layer"}, "trim must be 'global' or 'tensor', got 'layer'"),
        ("dare_linear", {"seed": "x"}, "seed must be a whole number ≥ 0, got 'x'"),
        ("dare_linear", {"seed": 1.5}, "seed must be a whole number ≥ 0, got 1.5"),
        ("dare_linear", {"seed": -1}, "seed must be a whole number ≥ 0, got -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(rule: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged(dense([[1.0]]), [1.0], rule, **options)  # type: ignore[arg-type]


def test_rules_that_trim_say_in_which_space() -> None:
    assert sorted(name for name, row in RULES.items() if row.trims) == sorted(TRIMS)


# peft as the judge


def pair_of_peft() -> nn.Module:
    """Two adapters of unequal scaling in PEFT, on two layers."""
    generator = torch.Generator().manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
        LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]),
        adapter_name="first",
    )
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def read(model: nn.Module, adapter: str) -> Updates:
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in ("0", "2")}
    return {
        name: LowRankUpdate(
            layer.lora_A[adapter].weight.data,
            layer.lora_B[adapter].weight.data,
            layer.scaling[adapter],  # type: ignore[index,union-attr]
        )
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("density", [0.13, 0.2, 0.5, 0.77])
@pytest.mark.parametrize(
    ("theirs", "ours", "weights"),
    [
        ("ties_svd", "ties", [1.0, 1.0]),
        ("ties_svd", "ties", [0.4, 0.4]),
        ("magnitude_prune_svd", "magnitude_prune", [1.0, 1.0]),
        ("magnitude_prune_svd", "magnitude_prune", [0.7, -1.3]),
    ],
)
def test_peft_merges_to_the_same_products(theirs: str, ours: str, weights: list[float], density: float) -> None:
    model = pair_of_peft()
    model.add_weighted_adapter(  # type: ignore[operator]
        ["first", "second"], weights, "merged", combination_type=theirs, density=density, svd_rank=6
    )
    found = merged([read(model, "first"), read(model, "second")], weights, ours, density=density, trim="tensor")
    for name, update in read(model, "merged").items():
        torch.testing.assert_close(found[name], update.delta_weight(), rtol=0, atol=2e-5, check_dtype=False)
