"""Triplets of given values, appended while an optimiser and an average hold the update."""

import copy

import pytest
import torch

from flowra_allocation import append
from flowra_testing.stand_in_adapter import hang
from flowra_testing.stand_in_triplets import StandInTriplets, hang_triplets
from flowra_testing.tiny_models import mlp, seeded

FORMS = pytest.mark.parametrize("slots", [None, 6], ids=["resized", "slots"])
NEW_A, NEW_E, NEW_B = torch.full((2, 8), 3.0), torch.tensor([0.0, -0.5]), torch.full((12, 2), -2.0)


def trained(slots: int | None) -> tuple[StandInTriplets, torch.optim.AdamW]:
    model = mlp()
    layer = hang_triplets(model, {"up": 3}, slots=slots)["up"]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    with seeded(1):
        x = torch.randn(9, 8)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return layer, optimizer


@FORMS
def test_values_are_as_given_and_the_old_ones_stay(slots: int | None) -> None:
    layer, optimizer = trained(slots)
    average = copy.deepcopy(layer)
    before = [each.detach().clone() for each in (layer.lora_A, layer.lora_E, layer.lora_B)]
    append(layer, NEW_A, NEW_E, NEW_B, optimizer, averages=[average])
    assert layer.rank == average.rank == 5
    for one in (layer, average):
        live = one.slots()
        assert torch.equal(one.lora_A[live], torch.cat([before[0][:3], NEW_A]))
        assert torch.equal(one.lora_E[live], torch.cat([before[1][:3], NEW_E]))
        assert torch.equal(one.lora_B[:, live], torch.cat([before[2][:, :3], NEW_B], 1))


@FORMS
def test_new_ones_start_with_no_first_moment_and_the_mean_second_moment(slots: int | None) -> None:
    layer, optimizer = trained(slots)
    first, second = (optimizer.state[layer.lora_A][key][:3].clone() for key in ("exp_avg", "exp_avg_sq"))
    append(layer, NEW_A, NEW_E, NEW_B, optimizer)
    state = optimizer.state[layer.lora_A]
    assert torch.equal(state["exp_avg"][:3], first)
    assert torch.equal(state["exp_avg_sq"][:3], second)
    assert (state["exp_avg"][3:5] == 0).all()
    torch.testing.assert_close(state["exp_avg_sq"][3:5], second.mean().expand(2, 8))
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == [id(each) for each in layer.parameters()]


def test_a_pair_takes_no_triplets() -> None:
    layer = hang(mlp(), {"up": 2})["up"]
    with pytest.raises(
        TypeError, match=r"layer must be of triplets to append one, got StandInAdapter\. Grow it by rows"
    ):
        append(layer, NEW_A, NEW_E, NEW_B)
