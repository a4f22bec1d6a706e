"""Golden values of the specification: the knapsack, the flow spectrum and the normal component."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowra_allocation import BottleneckGram, FlowSpectrum, GradientSketch, exact, flow_spectrum, greedy, truncate

FOLDER = Path(__file__).parents[1] / "golden"
ALLOCATION = json.loads((FOLDER / "flowra_allocation.json").read_text())
GRAM = json.loads((FOLDER / "flowra_bottleneck_gram.json").read_text())
REFINEMENT = json.loads((FOLDER / "flowra_refinement.json").read_text())
CASE = pytest.mark.parametrize("case", ALLOCATION["cases"], ids=lambda case: case["name"])
WRITTEN = {"rtol": 0, "atol": 1e-8}  # the file holds ten decimals


def as_problem(case: Any) -> tuple[dict[str, list[float]], dict[str, int]]:  # noqa: ANN401 - parsed JSON
    gains = {str(index): each for index, each in enumerate(case["gains"])}
    return gains, {str(index): each for index, each in enumerate(case["cost_per_rank"])}


def tensor(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@CASE
def test_greedy_gives_the_written_ranks_parameters_and_gain(case: Any) -> None:  # noqa: ANN401
    found = greedy(*as_problem(case), case["budget"])
    assert list(found.ranks.values()) == case["greedy_ranks"]
    assert found.parameters == case["greedy_used"]
    assert found.gain == pytest.approx(case["greedy_value"], abs=1e-12)


@CASE
def test_the_last_unit_taken_is_the_last_of_the_written_order(case: Any) -> None:  # noqa: ANN401
    found = greedy(*as_problem(case), case["budget"])
    if not case["order"]:
        assert found.last_in is None
        return
    module, _, density = case["order"][-1]
    assert found.last_in is not None
    assert found.last_in == (str(module), pytest.approx(density, abs=1e-9))


@CASE
def test_the_best_unit_left_out_is_the_first_that_did_not_fit(case: Any) -> None:  # noqa: ANN401
    gains, costs = as_problem(case)
    left, ranks, expected = case["budget"], dict.fromkeys(gains, 0), None
    units = sorted((-gain / costs[name], name, rank) for name in gains for rank, gain in enumerate(gains[name]))
    for negative, name, rank in units:
        if rank != ranks[name]:
            continue
        if costs[name] <= left:
            left, ranks[name] = left - costs[name], rank + 1
        elif expected is None:
            expected = (name, -negative)
    assert list(ranks.values()) == case["greedy_ranks"]
    assert greedy(gains, costs, case["budget"]).first_out == expected


@CASE
def test_exact_gives_the_written_optimum(case: Any) -> None:  # noqa: ANN401
    found = exact(*as_problem(case), case["budget"])
    assert list(found.ranks.values()) == case["optimal_ranks"]
    assert found.parameters == case["optimal_used"]
    assert found.gain == pytest.approx(case["optimal_value"], abs=1e-12)


@CASE
def test_the_gap_to_the_optimum_is_as_written_and_at_most_one_gain(case: Any) -> None:  # noqa: ANN401
    gap = case["optimal_value"] - greedy(*as_problem(case), case["budget"]).gain
    assert gap == pytest.approx(case["gap"], abs=1e-12)
    assert gap <= case["max_single_gain"]
    if len(set(case["cost_per_rank"])) == 1:
        assert gap == pytest.approx(0, abs=1e-12)


@pytest.fixture
def gram() -> BottleneckGram:
    return BottleneckGram.of(tensor(GRAM["z"]), tensor(GRAM["grad_z"]), examples=len(GRAM["x"]))


@pytest.fixture
def spectrum(gram: BottleneckGram) -> FlowSpectrum:
    return flow_spectrum(gram, jitter=0)


def test_bottleneck_grams_are_as_written(gram: BottleneckGram) -> None:
    torch.testing.assert_close(gram.activations / gram.tokens, tensor(GRAM["M_A"]), **WRITTEN)
    torch.testing.assert_close(gram.gradients / gram.examples / GRAM["s"] ** 2, tensor(GRAM["M_B"]), **WRITTEN)


def test_gains_are_half_the_squared_singular_values_written(spectrum: FlowSpectrum) -> None:
    torch.testing.assert_close(spectrum.gains, tensor(GRAM["gains"]), **WRITTEN)
    torch.testing.assert_close(spectrum.gains, tensor(GRAM["sv_squared_over_2"]), **WRITTEN)
    torch.testing.assert_close(spectrum.gains, GRAM["s"] ** 2 * tensor(GRAM["lam"]) / 2, **WRITTEN)


@pytest.mark.parametrize(("rank", "key"), [(2, "delta_W"), (1, "rank1_delta_W")])
def test_truncation_gives_the_written_update(spectrum: FlowSpectrum, rank: int, key: str) -> None:
    a, b = truncate(tensor(GRAM["A"]), tensor(GRAM["B"]), spectrum, rank)
    torch.testing.assert_close(GRAM["s"] * b @ a, tensor(GRAM[key]), **WRITTEN)


def test_dropping_costs_the_written_gain(spectrum: FlowSpectrum) -> None:
    a, b = truncate(tensor(GRAM["A"]), tensor(GRAM["B"]), spectrum, 1)
    x, g = tensor(GRAM["x"]), tensor(GRAM["grad_out"])
    lost = tensor(GRAM["delta_W"]) - GRAM["s"] * b @ a
    cost = torch.trace((g.T @ g / len(g)) @ lost @ (x.T @ x / len(x)) @ lost.T) / 2
    assert cost.item() == pytest.approx(GRAM["quadratic_cost_of_dropping"], abs=1e-8)
    assert spectrum.gains[1].item() == pytest.approx(GRAM["gain_of_dropped"], abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_the_sketch_finds_the_written_normal_component(seed: int) -> None:
    a, b, gradient = (tensor(REFINEMENT[key]) for key in ("A", "B", "G"))
    sketch = GradientSketch(a, b, generator=torch.Generator().manual_seed(seed))
    sketch.update(torch.eye(4), gradient.T)
    energy, row = sketch.leading_direction()
    # the sketch is held in float32: the written 1e-8 is out of its reach
    assert energy**0.5 == pytest.approx(REFINEMENT["normal_singular_values"][0], rel=1e-5)
    expected = torch.tensor(REFINEMENT["best_new_row"])
    torch.testing.assert_close(row * torch.sign(row @ expected), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_the_quadratic_part_of_the_written_shrink_cost_is_the_flow_gain(index: int) -> None:
    a, b, c, s = (tensor(REFINEMENT[key]) for key in ("A", "B", "C", "S"))
    u, sigma, vt = torch.linalg.svd(b @ a)
    linear = -sigma[index] * u[:, index] @ tensor(REFINEMENT["G"]) @ vt[index]
    spectrum = flow_spectrum(BottleneckGram(a @ c @ a.T, b.T @ s @ b, 1.0, 1.0), jitter=0)
    assert sigma[index].item() == pytest.approx(REFINEMENT["delta_singular_values"][index], abs=1e-8)
    # C and S are diagonal here, so the flow directions are the singular directions; order by gain
    gain = sorted(spectrum.gains.tolist(), reverse=True)[index]
    assert linear.item() + gain == pytest.approx(REFINEMENT["shrink_cost"][index], abs=1e-8)
