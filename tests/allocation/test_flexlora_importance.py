"""How FlexLoRA scores an update: golden values, bounds, and what the paper's appendix C claims."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowra_allocation.flexlora_compat import released_entropy
from flowra_allocation.importance import (
    SPECTRAL_METRICS,
    elem_energy,
    frobenius,
    mat_energy,
    nuclear,
    spectral_entropy,
)

CASES = json.loads((Path(__file__).parents[1] / "golden" / "flexlora_entropy.json").read_text())["cases"]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
WITHOUT_A_VALUE = {"r1", "all_zero_r3"}

VALUES = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=9).filter(
    lambda each: sum(value * value for value in each) > 1e-6
)


@CASE
def test_the_entropy_is_the_written_one_and_zero_where_the_released_code_has_nan(case: Any) -> None:  # noqa: ANN401 - parsed JSON
    found = spectral_entropy(torch.tensor(case["singular_values"]))
    if case["name"] in WITHOUT_A_VALUE:
        assert case["official_score_fp32"] == "NaN"
        assert found == 0
        return
    assert found == pytest.approx(case["official_score_fp32"], abs=1e-6)
    exact = spectral_entropy(torch.tensor(case["singular_values"], dtype=torch.float64))
    assert exact == pytest.approx(case["exact_with_eps_1e_8"], abs=1e-9)
    assert exact == pytest.approx(case["exact_no_eps"], abs=1e-7)


@CASE
def test_the_released_entropy_is_the_written_one_in_float32_nan_included(case: Any) -> None:  # noqa: ANN401
    found = released_entropy(torch.tensor(case["singular_values"]))
    assert found == pytest.approx(float(case["official_score_fp32"]), abs=1e-6, nan_ok=True)


@CASE
def test_the_norms_are_the_written_ones(case: Any) -> None:  # noqa: ANN401
    values = torch.tensor(case["singular_values"], dtype=torch.float64)
    assert nuclear(values) == pytest.approx(case["nuclear_over_r"], abs=1e-9)
    assert frobenius(values) == pytest.approx(case["frobenius_over_r"], abs=1e-9)


@CASE
def test_the_entropy_is_the_logarithm_of_the_effective_rank(case: Any) -> None:  # noqa: ANN401
    if case["name"] in WITHOUT_A_VALUE:
        return
    found = spectral_entropy(torch.tensor(case["singular_values"], dtype=torch.float64))
    expected = math.log(case["effective_rank_energy"]) / math.log(len(case["singular_values"]))
    assert found == pytest.approx(expected, abs=1e-7)


@given(VALUES, st.floats(1e-3, 1e3), st.integers(0, 2**9 - 1))
def test_neither_scale_nor_signs_nor_order_matter_to_the_entropy(values: list[float], scale: float, signs: int) -> None:
    changed = [scale * value * (-1) ** (signs >> place) for place, value in enumerate(values)]
    one, other = (spectral_entropy(torch.tensor(each, dtype=torch.float64)) for each in (values, changed[::-1]))
    assert one == pytest.approx(other, abs=1e-9)
    assert -1e-7 <= one <= 1


def test_growing_a_flat_update_lowers_its_score() -> None:
    grown = spectral_entropy(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert grown == pytest.approx(math.log(4) / math.log(5), abs=1e-7)
    assert grown == pytest.approx(0.861, abs=1e-3)


def test_the_energies_weigh_the_entropy_element_by_element_and_as_a_whole() -> None:
    values = torch.tensor([2.0, 1.0], dtype=torch.float64)
    p = [0.8, 0.2]
    terms = [-each * math.log(each) / math.log(2) for each in p]
    assert elem_energy(values) == pytest.approx(4 * terms[0] + 1 * terms[1], abs=1e-6)
    assert mat_energy(values) == pytest.approx(5 * sum(terms), abs=1e-6)


@pytest.mark.parametrize("metric", SPECTRAL_METRICS)
@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0, 0.0], [1e-16, 1e-16]])
def test_every_metric_has_a_value_for_updates_that_do_nothing(metric: Any, values: list[float]) -> None:  # noqa: ANN401
    assert SPECTRAL_METRICS[metric](torch.tensor(values)) == pytest.approx(0, abs=1e-12)
