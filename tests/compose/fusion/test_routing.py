"""Routing that nobody trained: Arrow and SpectR against dense products and against PEFT, and static weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn

from compose.fusion.stacks import adapter, adapters_of, merged, stack, states
from flowra_compose import AdapterState, LowRankUpdate
from flowra_compose.fusion import Arrow, SpectR, StaticWeights, fuse


def updates_of(count: int, *, ranks: tuple[int, ...] = (4, 2, 3, 1)) -> list[dict[str, LowRankUpdate]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for rank in ranks[:count]:
        a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rank, 8), (6, rank)))
        made.append({"fc": LowRankUpdate(a, b, 0.5 + rank)})
    return made


def coordinates(x: Tensor, updates: list[dict[str, LowRankUpdate]]) -> Tensor:
    return torch.cat([x @ one["fc"].lora_A.T for one in updates], dim=-1)


def softmax_of_largest(scores: Tensor, top_k: int) -> Tensor:
    """Write the softmax of the k' largest as a loop over positions."""
    result = torch.zeros_like(scores)
    for row, found in zip(scores.flatten(0, -2), result.flatten(0, -2), strict=True):
        chosen = row.argsort(descending=True)[:top_k]
        found[chosen] = row[chosen].exp() / row[chosen].exp().sum()
    return result


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_arrow_scores_by_the_first_right_singular_vector_of_the_dense_update(top_k: int) -> None:
    updates, x = updates_of(4), states()
    first = torch.stack([torch.linalg.svd(one["fc"].delta_weight()).Vh[0] for one in updates])
    weights, shares = Arrow(updates, top_k=top_k).weights("fc", x)
    torch.testing.assert_close(weights, softmax_of_largest((x @ first.T).abs(), top_k))
    assert torch.equal(weights, shares)


@pytest.mark.parametrize("top_k", [1, 2, 4, None])
def test_spectr_scores_by_the_length_of_the_output_of_the_dense_update(top_k: int | None) -> None:
    updates, x = updates_of(4), states()
    lengths = torch.stack([(x @ one["fc"].delta_weight().T).norm(dim=-1) for one in updates], dim=-1)
    weights, _ = SpectR(updates, top_k=top_k).weights("fc", x, coordinates(x, updates))
    torch.testing.assert_close(weights, softmax_of_largest(lengths, top_k or 4))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_arrow_weighs_as_peft_s_does(top_k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours: list[dict[str, LowRankUpdate]] = []
    lora_a, lora_b, names = nn.ModuleDict(), nn.ModuleDict(), ["task_0", "task_1", "task_2"]
    for name in names:
        a, b = (torch.randn(*shape, generator=generator) for shape in ((2, 8), (6, 2)))
        a[0] *= 10  # PEFT takes 15 steps of a power iteration: let the first direction lead
        lora_a[name], lora_b[name] = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
        lora_a[name].weight.data, lora_b[name].weight.data = a, b
        ours.append({"fc": LowRankUpdate(a, b, 2.0)})
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    config.task_adapter_names = names
    theirs = ArrowLoraLinearLayer(8, config)
    theirs.build_prototypes(lora_a, lora_b)
    x = 0.3 * states(dtype=torch.float32)
    expected = theirs(x, lora_a, lora_b, dropout=nn.Identity(), scaling=dict.fromkeys(names, 2.0))
    model = nn.Module()
    model.fc = nn.Linear(8, 6)
    adapters = {name: AdapterState(updates=each) for name, each in zip(names, ours, strict=True)}
    with torch.no_grad():
        base = model.fc(x)
        with fuse(model, adapters, Arrow(ours, top_k=top_k, temperature=temperature)):
            torch.testing.assert_close(model.fc(x) - base, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Arrow, SpectR])
def test_routing_does_not_see_how_an_update_is_factorised(make: Callable[..., Any]) -> None:
    updates, x = updates_of(3), states()
    mix = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q * 3
    other = [dict(each) for each in updates]
    whole = updates[0]["fc"]
    other[0]["fc"] = LowRankUpdate(mix @ whole.lora_A, whole.lora_B @ torch.linalg.inv(mix), whole.scaling)
    found = [make(each, top_k=2).weights("fc", x, coordinates(x, each))[0] for each in (updates, other)]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("make", [Arrow, SpectR])
def test_an_adapter_that_leaves_a_module_alone_takes_no_part_there(make: Callable[..., Any]) -> None:
    model = stack()
    adapters = adapters_of(model, "stack", 3)  # down: the first; up: the first two; skip: the last two
    with (
        fuse(model, adapters, make([one.updates for one in adapters.values()])) as fusion,
        fusion.recording() as record,
        torch.no_grad(),
    ):
        model(states())
    assert all(torch.equal(each, torch.eye(3).double()[0].expand_as(each)) for each in record.weights["blocks.0.down"])
    assert record.weights["blocks.1.up"][0][..., 2].eq(0).all()
    assert record.weights["blocks.2.skip"][0][..., 0].eq(0).all()
    for calls in record.weights.values():
        torch.testing.assert_close(calls[0].sum(-1), torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("make", [Arrow, SpectR])
def test_one_adapter_has_all_the_weight(make: Callable[..., Any]) -> None:
    model = stack()
    one = {"a": adapter(model, ("up", "down"), 3)}
    with fuse(model, one, make([one["a"].updates])), torch.no_grad():
        found = model(states())
    torch.testing.assert_close(found, merged(model, one, [1.0])(states()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [Arrow, SpectR])
def test_a_lower_temperature_decides_more(make: Callable[..., Any]) -> None:
    updates, x = updates_of(4), states()
    largest = [
        make(updates, top_k=None, temperature=each).weights("fc", x, coordinates(x, updates))[0].amax(-1).mean()
        for each in (0.1, 1.0, 10.0)
    ]
    assert largest[0] > largest[1] > largest[2]


def test_static_weights_are_the_same_at_every_position() -> None:
    weights, shares = StaticWeights([0.5, -1.5]).weights("fc", states())
    assert torch.equal(weights, torch.tensor([0.5, -1.5], dtype=torch.float64).expand(2, 5, 2))
    assert torch.equal(shares, torch.tensor([0.25, 0.75], dtype=torch.float64).expand(2, 5, 2))
    assert StaticWeights([0.0, 0.0]).weights("fc", states())[1].eq(0).all()


@pytest.mark.parametrize("make", [Arrow, SpectR])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number ≥ 1, or None, got 0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a finite number > 0"),
        ({"adapters": []}, "adapters must be at least one, got none"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(make: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(
            changes.get("adapters", updates_of(2)), **{key: each for key, each in changes.items() if key != "adapters"}
        )


def test_spectr_without_coordinates_is_refused() -> None:
    with pytest.raises(ValueError, match="coordinates must be given to SpectR, got none"):
        SpectR(updates_of(2)).weights("fc", states())
