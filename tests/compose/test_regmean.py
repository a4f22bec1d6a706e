"""RegMean on updates, against the formula on whole weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_compose import LowRankUpdate, MergeOptions, ModuleStatistics, merge_updates

MERGE = json.loads((Path(__file__).parents[1] / "golden" / "flowra_merge.json").read_text())
CORE = json.loads((Path(__file__).parents[1] / "golden" / "flowra_core_merge.json").read_text())


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regmean(
    updates: Sequence[LowRankUpdate | None], moments: Sequence[Tensor | None], *, shrinkage: float | None = None
) -> LowRankUpdate:
    return merge_updates(
        [{} if update is None else {"fc": update} for update in updates],
        [1.0] * len(updates),
        rule="regmean",
        options=MergeOptions(shrinkage=shrinkage),
        statistics=[{} if each is None else {"fc": ModuleStatistics(inputs=each)} for each in moments],
    )["fc"]


def on_weights(base: Tensor, tau: Sequence[Tensor], moments: Sequence[Tensor], kept: float) -> Tensor:
    """The paper's formula for the weights themselves, less the base."""
    scaled = [kept * each + (1 - kept) * torch.diag(each.diagonal()) for each in moments]
    summed = torch.stack([(base + t) @ c for t, c in zip(tau, scaled, strict=True)]).sum(0)
    return summed @ torch.linalg.inv(torch.stack(scaled).sum(0)) - base


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_it_is_the_regression_of_whole_weights_whatever_the_base(m: int, n: int, tasks: int, seed: int) -> None:
    updates = [
        LowRankUpdate(random_tensor(2, n, seed=seed + i), random_tensor(m, 2, seed=seed - i), 0.5) for i in range(tasks)
    ]
    moments = [x.T @ x / 9 for x in (random_tensor(9, n, seed=seed + 50 + i) for i in range(tasks))]
    expected = on_weights(random_tensor(m, n, seed=seed), [u.delta_weight() for u in updates], moments, 0.9)
    found = regmean(updates, moments)
    torch.testing.assert_close(found.delta_weight(), expected, rtol=1e-7, atol=1e-7)
    assert found.rank <= 2 * tasks


def test_golden_closed_forms_at_shrinkage_0() -> None:
    pair = [LowRankUpdate.of_delta_weight(tensor(MERGE[name])) for name in ("D1", "D2")]
    found = regmean(pair, [tensor(MERGE[name]) for name in ("C1", "C2")], shrinkage=0.0)
    torch.testing.assert_close(found.delta_weight(), tensor(MERGE["regmean_closed_form"]), rtol=0, atol=1e-9)
    pair = [LowRankUpdate(tensor(each["A"]), tensor(each["B"])) for each in CORE["factors"]]
    found = regmean(pair, [tensor(c) for c in CORE["C"]], shrinkage=0.0)
    expected = tensor(CORE["S_identity"]["regmean_closed_form"])
    torch.testing.assert_close(found.delta_weight(), expected, rtol=0, atol=1e-9)


def test_at_shrinkage_0_it_is_flow_without_output_moments() -> None:
    updates = [LowRankUpdate(random_tensor(2, 6, seed=i), random_tensor(4, 2, seed=9 + i)) for i in range(3)]
    statistics = [
        {"fc": ModuleStatistics(inputs=x.T @ x)} for x in (random_tensor(9, 6, seed=20 + i) for i in range(3))
    ]
    regression, flow = (
        merge_updates(
            [{"fc": update} for update in updates],
            [1.0] * 3,
            rule=rule,
            options=MergeOptions(shrinkage=0.0),
            statistics=statistics,
        )["fc"].delta_weight()
        for rule in ("regmean", "flow")
    )
    torch.testing.assert_close(regression, flow, rtol=1e-8, atol=1e-8)


def test_a_feature_that_no_input_has_gets_the_mean() -> None:
    updates = [LowRankUpdate(random_tensor(2, 4, seed=i), random_tensor(3, 2, seed=9 + i)) for i in range(2)]
    seen = [tensor([1.0, 0.0, 2.0, 0.0]), tensor([3.0, 0.0, 0.0, 0.5])]
    first, second = (update.delta_weight() for update in updates)
    expected = torch.stack(
        [(first + 3 * second)[:, 0] / 4, (first + second)[:, 1] / 2, first[:, 2], second[:, 3]], dim=1
    )
    for moments in (seen, [torch.diag(each) for each in seen]):
        torch.testing.assert_close(regmean(updates, moments).delta_weight(), expected, rtol=1e-12, atol=1e-12)


def test_a_task_without_an_update_counts_by_its_inputs_and_one_without_either_does_not() -> None:
    update = LowRankUpdate(random_tensor(2, 4, seed=0), random_tensor(3, 2, seed=1))
    moments = [x.T @ x for x in (random_tensor(9, 4, seed=20 + i) for i in range(2))]
    zero = LowRankUpdate(0 * update.lora_A, update.lora_B)
    expected = regmean([update, zero], moments).delta_weight()
    torch.testing.assert_close(regmean([update, None], moments).delta_weight(), expected, rtol=1e-12, atol=1e-12)
    alone = regmean([update, None], [moments[0], None]).delta_weight()
    torch.testing.assert_close(alone, update.delta_weight(), rtol=1e-9, atol=1e-9)


def test_fewer_inputs_than_features_are_enough_unless_nothing_is_shrunk() -> None:
    update = LowRankUpdate(random_tensor(2, 6, seed=0), random_tensor(3, 2, seed=1))
    x = random_tensor(2, 6, seed=2)
    torch.testing.assert_close(regmean([update], [x.T @ x]).delta_weight(), update.delta_weight(), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match=r"got singular ones; 'fc', shrinkage 0\.0\. Raise the shrinkage"):
        regmean([update], [x.T @ x], shrinkage=0.0)


def test_an_update_without_input_moments_is_refused() -> None:
    update = LowRankUpdate(random_tensor(2, 6, seed=0), random_tensor(3, 2, seed=1))
    with pytest.raises(ValueError, match=r"must hold the inputs of every task for the rule 'regmean'.*of task 1"):
        regmean([update, update], [torch.eye(6), None])
