import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flowra_analysis import (
    effective_rank,
    effective_rank_energy,
    energy_rank,
    participation_ratio,
    profile_weights,
    redundancy,
    stable_rank,
    weight_spectrum,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_estimators.json").read_text())["rank_measures"]
MEASURES = [stable_rank, participation_ratio, effective_rank_energy, effective_rank]  # in increasing order
values = st.just(0.0) | st.floats(1e-200, 1)  # smaller ones would vanish when scaled
spectra = st.lists(values, min_size=1, max_size=12).map(lambda each: torch.tensor(each, dtype=torch.float64))
scales = st.floats(-10, 10).map(lambda exponent: 10**exponent)


def test_golden_values() -> None:
    sigma = torch.tensor(GOLDEN["singular_values"], dtype=torch.float64)
    assert effective_rank(sigma) == pytest.approx(GOLDEN["effective_rank_roy_vetterli"], rel=1e-9)
    assert effective_rank_energy(sigma) == pytest.approx(GOLDEN["effective_rank_energy"], rel=1e-9)
    assert stable_rank(sigma) == pytest.approx(GOLDEN["stable_rank"], rel=1e-9)
    assert participation_ratio(sigma) == pytest.approx(GOLDEN["participation_ratio"], rel=1e-9)
    assert energy_rank(sigma, 0.9) == GOLDEN["energy_rank_0_9"]
    assert redundancy(sigma, (4, 7)) == pytest.approx(1 - GOLDEN["effective_rank_roy_vetterli"] / 4, rel=1e-9)


@settings(deadline=None)
@given(sigma=spectra, scale=scales)
def test_measures_are_ordered_and_bounded_by_the_rank(sigma: Tensor, scale: float) -> None:
    rank = int((sigma > 0).sum())
    values = [0.0 if rank == 0 else 1.0, *(measure(sigma * scale) for measure in MEASURES), float(rank)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(values))


@settings(deadline=None)
@given(sigma=spectra, scale=scales, fraction=st.floats(0.01, 1))
def test_measures_do_not_depend_on_scale_or_order(sigma: Tensor, scale: float, fraction: float) -> None:
    for measure in MEASURES:
        assert measure(sigma.flip(0) * scale) == pytest.approx(measure(sigma), rel=1e-12)
    shape = (len(sigma), 20)
    assert redundancy(sigma * scale, shape) == pytest.approx(redundancy(sigma, shape), rel=1e-12, abs=1e-12)
    k = energy_rank(sigma, fraction)
    energy = sigma.sort(descending=True).values.square()
    assert energy[:k].sum() >= fraction * energy.sum() * (1 - 1e-12)
    assert k == 0 or energy[: k - 1].sum() <= fraction * energy.sum() * (1 + 1e-12)


@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_flat_spectrum_measures_its_rank(rank: int, scale: float) -> None:
    sigma = torch.cat([torch.full((rank,), scale), torch.zeros(5)])
    for measure in MEASURES:
        assert measure(sigma) == pytest.approx(rank, rel=1e-12)
    assert energy_rank(sigma, 1.0) == rank
    assert redundancy(sigma[:rank], (rank, rank)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sigma", [torch.zeros(3), torch.zeros(0)], ids=["zero", "empty"])
def test_zero_spectrum_measures_zero(sigma: Tensor) -> None:
    assert [measure(sigma) for measure in MEASURES] == [0, 0, 0, 0]
    assert energy_rank(sigma, 0.5) == 0
    assert redundancy(sigma, (3, 4)) == 1


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (torch.ones(2, 2), r"sigma must be 1-D and floating point, got torch.float32 \(2, 2\)"),
        (torch.ones(2, dtype=torch.int64), "sigma must be 1-D and floating point, got torch.int64"),
        (torch.tensor([1.0, -1.0]), "sigma must be finite and not negative"),
        (torch.tensor([1.0, torch.nan]), "sigma must be finite and not negative"),
    ],
)
def test_what_is_not_a_spectrum_is_refused(sigma: Tensor, message: str) -> None:
    for measure in MEASURES:
        with pytest.raises(ValueError, match=message):
            measure(sigma)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got"):
        energy_rank(torch.ones(3), fraction)


def test_shape_too_small_for_the_spectrum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape must have at least 3 rows and columns, got \(2, 9\)"):
        redundancy(torch.ones(3), (2, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weight_spectrum_is_exact_for_a_known_matrix(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, 0.0]], dtype=dtype)
    found = weight_spectrum(nn.Parameter(weight))
    assert torch.equal(found, torch.tensor([4.0, 2.0], dtype=torch.float64))
    assert not found.requires_grad


def test_large_weights_are_factorised_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowra_analysis.rank_measures.FLOAT64_MAX_SIDE", 2)
    assert weight_spectrum(torch.ones(3, 3)).dtype == torch.float32
    assert weight_spectrum(torch.ones(3, 3).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"weight must be a floating-point matrix, got torch.float32 \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int8), "weight must be a floating-point matrix, got torch.int8"),
        (torch.full((2, 3), torch.inf), r"weight must be finite, got NaN or infinity in a matrix \(2, 3\)"),
    ],
)
def test_what_is_not_a_finite_matrix_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_spectrum(weight)


def test_profile_weights_measures_each_module() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8))
    nn.init.ones_(model[1].weight)
    statistics, found = profile_weights(model, ["1", "0"])
    assert list(statistics) == list(found) == ["1", "0"]
    assert statistics["1"] == pytest.approx(
        {"weight_effective_rank": 1, "weight_stable_rank": 1, "weight_redundancy": 0.75}, abs=1e-6
    )
    assert statistics["0"]["weight_effective_rank"] == effective_rank(found["0"])
    torch.testing.assert_close(found["0"], torch.linalg.svdvals(model[0].weight.detach().double()))


def test_profile_weights_names_the_module_of_a_damaged_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(ValueError, match=r"weight must be finite, .*; for module '0'"):
        profile_weights(model, ["0"])
