import pytest
import torch

from flowra_compose import LowRankUpdate, ModuleStatistics, merge_updates
from flowra_compose.statistics import statistics_at

KNOWN = {"fc": ModuleStatistics(inputs=torch.eye(3) * 2, outputs=torch.diag(torch.tensor([1.0, 4.0])))}


def test_a_bias_meets_the_input_1_and_the_gradients_of_its_module() -> None:
    found = statistics_at(KNOWN, "fc.bias")
    assert found is not None
    assert found.inputs is not None
    assert found.inputs.tolist() == [1.0]
    assert found.outputs is KNOWN["fc"].outputs
    assert found.fisher is None


def test_what_was_measured_under_the_name_comes_first() -> None:
    own = ModuleStatistics(inputs=torch.tensor([3.0]))
    assert statistics_at({**KNOWN, "fc.bias": own}, "fc.bias") is own
    assert statistics_at(KNOWN, "fc") is KNOWN["fc"]
    assert statistics_at(KNOWN, "other.bias") is None
    assert statistics_at(KNOWN, "other") is None


def test_biases_are_matched_in_the_metric_of_their_module() -> None:
    biases = [torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])]
    updates = [{"fc.bias": LowRankUpdate.of_delta_weight(each, layout="vector")} for each in biases]
    outputs = [torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([1.0, 1.0]))]
    known = [{"fc": ModuleStatistics(inputs=torch.eye(3), outputs=each)} for each in outputs]
    merged = merge_updates(updates, [1, 1], rule="flow", options=None, statistics=known)["fc.bias"]
    # weighed by S but for the shrinkage: (1 + 3) / 2 and (3 · 1 + 3) / 4
    assert merged.delta_weight().flatten().tolist() == pytest.approx([2.0, 1.5], abs=0.02)


def test_the_fisher_of_a_bias_is_the_diagonal_of_s() -> None:
    outputs = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    known = {"fc": ModuleStatistics(inputs=torch.eye(3), outputs=outputs, fisher=torch.ones(2, 3))}
    found = statistics_at(known, "fc.bias")
    assert found is not None
    assert found.fisher is not None
    assert torch.equal(found.fisher, torch.tensor([[2.0], [3.0]]))
    updates = [
        {"fc.bias": LowRankUpdate(torch.ones(1, 1), torch.tensor(values)[:, None], layout="vector")}
        for values in ([1.0, 0.0], [0.0, 1.0])
    ]
    others = torch.diag(torch.tensor([6.0, 1.0]))
    other = {"fc": ModuleStatistics(inputs=torch.eye(3), outputs=others, fisher=torch.ones(2, 3))}
    merged = merge_updates(updates, [1.0, 1.0], rule="fisher", statistics=[known, other])
    torch.testing.assert_close(merged["fc.bias"].delta_weight()[:, 0], torch.tensor([2 / 8, 1 / 4]))
    without = {"fc": ModuleStatistics(inputs=torch.eye(3), outputs=outputs)}
    assert statistics_at(without, "fc.bias").fisher is None  # type: ignore[union-attr]
