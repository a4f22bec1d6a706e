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
    leading_weight_spectrum,
    participation_ratio,
    profile_weights,
    redundancy,
    spectrum_decay,
    spectrum_statistics,
    stable_rank,
    update_spectrum,
    weight_spectrum,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_estimators.json").read_text())["rank_measures"]
MEASURES = [stable_rank, participation_ratio, effective_rank_energy, effective_rank]  # in increasing order
SLACK = 1e-6  # what is left of the energy is a difference, and values are its root: half of the digits
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


@st.composite
def truncated(draw: st.DrawFn) -> tuple[Tensor, int, tuple[int, int]]:
    """A spectrum of some matrix, how many of its leading values are known, and the matrix's shape."""
    sigma = torch.tensor(draw(st.lists(st.floats(1e-3, 1), min_size=2, max_size=14)), dtype=torch.float64)
    sigma = sigma.sort(descending=True).values
    zeros = draw(st.integers(0, 4))
    return torch.cat([sigma, sigma.new_zeros(zeros)]), draw(st.integers(1, len(sigma) - 1)), (len(sigma) + zeros, 40)


@settings(deadline=None, max_examples=300)
@given(case=truncated(), scale=scales)
def test_statistics_of_a_truncated_spectrum_bound_those_of_the_whole(
    case: tuple[Tensor, int, tuple[int, int]], scale: float
) -> None:
    sigma, known, shape = case
    whole = spectrum_statistics("w", sigma, shape)
    energy = float((sigma * scale).square().sum())
    part = spectrum_statistics("w", sigma[:known] * scale, shape, squared_norm=energy)
    for name in ("effective_rank", "participation_ratio"):
        assert part[f"w_{name}"] <= whole[f"w_{name}"] * (1 + SLACK)
        assert whole[f"w_{name}"] <= part[f"w_{name}_upper"] * (1 + SLACK)
    assert part["w_energy_rank_90"] <= whole["w_energy_rank_90"] <= part["w_energy_rank_90_upper"]
    assert part["w_redundancy_lower"] <= whole["w_redundancy"] + SLACK
    assert whole["w_redundancy"] <= part["w_redundancy"] + SLACK
    assert part["w_stable_rank"] == pytest.approx(whole["w_stable_rank"], rel=1e-9)
    missing = float(sigma[known:].square().sum() / sigma.square().sum())
    assert part["w_unresolved_energy"] == pytest.approx(missing, abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(case=truncated())
def test_bounds_of_a_truncated_spectrum_are_ordered_as_the_measures_are(
    case: tuple[Tensor, int, tuple[int, int]],
) -> None:
    sigma, known, shape = case
    found = spectrum_statistics("w", sigma[:known], shape, squared_norm=float(sigma.square().sum()))
    rank = float(min(shape))
    for end in ("", "_upper"):
        ordered = [
            1.0,
            found["w_stable_rank"],
            found[f"w_participation_ratio{end}"],
            found[f"w_effective_rank{end}"],
            rank,
        ]
        assert all(low <= high * (1 + 1e-9) for low, high in pairwise(ordered))
    assert found["w_effective_rank"] <= found["w_effective_rank_upper"] * (1 + 1e-12)


@pytest.mark.parametrize("known", [1, 3, 7])
def test_bounds_of_a_truncated_spectrum_are_attained(known: int) -> None:
    head = torch.linspace(3, 1, known, dtype=torch.float64)
    few = torch.cat([head, head[-1:].expand(4), head[-1:] / 2, torch.zeros(7)])  # as few further values as can be
    flat = torch.cat([head, torch.full((12,), 0.5)])
    for sigma, end in ((few, ""), (flat, "_upper")):
        whole = spectrum_statistics("w", sigma, (known + 12, 90))
        part = spectrum_statistics("w", head, (known + 12, 90), squared_norm=float(sigma.square().sum()))
        for name in ("effective_rank", "participation_ratio", "energy_rank_90"):
            assert part[f"w_{name}{end}"] == pytest.approx(whole[f"w_{name}"], rel=1e-9)


def test_only_truncated_spectra_have_bounds() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0])
    names = {
        f"w_{name}" for name in ("effective_rank", "stable_rank", "participation_ratio", "energy_rank_90", "redundancy")
    }
    assert spectrum_statistics("w", sigma, (5, 6)).keys() == names
    assert spectrum_statistics("w", sigma, (3, 6), squared_norm=14.0) == spectrum_statistics("w", sigma, (3, 6))
    assert spectrum_statistics("w", sigma, (5, 6), squared_norm=14.0).keys() > names


def test_an_estimate_of_the_energy_that_is_too_small_leaves_nothing() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0])
    whole = spectrum_statistics("w", sigma, (5, 6))
    found = spectrum_statistics("w", sigma, (5, 6), squared_norm=13.9)
    assert found["w_unresolved_energy"] == 0
    for name, value in whole.items():
        assert found[name] == pytest.approx(value, rel=1e-12)
    assert found["w_effective_rank_upper"] == pytest.approx(whole["w_effective_rank"], rel=1e-12)


def test_energy_that_the_missing_values_cannot_hold_is_spread_evenly() -> None:
    found = spectrum_statistics("w", torch.tensor([2.0, 0.0]), (6, 6), squared_norm=8.0)
    assert found["w_participation_ratio"] == found["w_participation_ratio_upper"] == pytest.approx(64 / (16 + 4))
    nothing_known = spectrum_statistics("w", torch.zeros(0), (6, 6), squared_norm=8.0)
    assert (nothing_known["w_effective_rank"], nothing_known["w_effective_rank_upper"]) == pytest.approx((1.0, 6.0))


@pytest.mark.parametrize("squared_norm", [-1.0, float("nan"), float("inf")])
def test_energy_that_is_none_is_refused(squared_norm: float) -> None:
    with pytest.raises(ValueError, match="squared_norm must be finite and not negative, got"):
        spectrum_statistics("w", torch.ones(2), (5, 5), squared_norm=squared_norm)
    with pytest.raises(ValueError, match=r"shape must have at least 2 rows and columns"):
        spectrum_statistics("w", torch.ones(2), (1, 5), squared_norm=2.0)


@settings(deadline=None)
@given(sigma=spectra, scale=scales)
def test_decay_begins_at_one_and_does_not_depend_on_scale(sigma: Tensor, scale: float) -> None:
    curve = spectrum_decay(sigma * scale)
    assert (len(curve), curve.dtype) == (len(sigma), torch.float64)
    assert (curve[1:] <= curve[:-1]).all()
    if sigma.max() > 0:
        assert curve[0] == 1
        torch.testing.assert_close(curve, sigma.sort(descending=True).values / sigma.max(), rtol=1e-12, atol=0)
    else:
        assert not curve.any()


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_leading_values_of_a_decaying_weight_are_accurate(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(side, 60, generator=generator, dtype=torch.float64)).Q for side in shape)
    weight = ((left * 0.8 ** torch.arange(60)) @ right.T).to(dtype)
    exact = torch.linalg.svdvals(weight.double())
    sigma, squared_norm = leading_weight_spectrum(weight, size=20)
    assert squared_norm == pytest.approx(float(exact.square().sum()), rel=1e-12)
    assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sigma.double(), exact[:20], rtol=1e-3, atol=0)
    assert (sigma.double() <= exact[:20] * (1 + 1e-6)).all()
    missed = float((exact[:20].square() - sigma.double().square()).sum())
    assert missed <= squared_norm - float(sigma.double().square().sum())
    assert torch.equal(sigma, leading_weight_spectrum(weight, size=20)[0])  # its own generator


def test_as_many_leading_values_as_there_are_are_exact() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, squared_norm = leading_weight_spectrum(weight, size=128)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(weight), rtol=1e-12, atol=0)
    assert squared_norm == pytest.approx(float(weight.square().sum()), rel=1e-12)
    assert squared_norm >= float(sigma.square().sum())


def test_arguments_of_the_leading_spectrum_are_checked() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        leading_weight_spectrum(torch.ones(3, 3), size=0)
    with pytest.raises(ValueError, match="weight must be finite"):
        leading_weight_spectrum(torch.full((3, 3), torch.nan))


@pytest.mark.parametrize(("m", "n", "r"), [(7, 9, 3), (7, 4, 6), (5, 5, 5), (4, 3, 1), (4, 3, 0)])
def test_spectrum_of_an_update_is_that_of_the_product(m: int, n: int, r: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, n), (m, r)))
    found = update_spectrum(a, b)
    exact = torch.linalg.svdvals(b @ a)
    assert len(found) == min(m, n, r)
    torch.testing.assert_close(found, exact[: len(found)], rtol=1e-10, atol=1e-12)
    rotation = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(update_spectrum(3 * rotation.T @ a, b @ rotation / 3), found, rtol=1e-10, atol=1e-12)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shapes \(r, n\) and \(m, r\), got \(2, 3\) and \(3, 4\)"):
        update_spectrum(torch.ones(2, 3), torch.ones(3, 4))
    with pytest.raises(ValueError, match="lora_A and lora_B must be finite"):
        update_spectrum(torch.ones(2, 3), torch.full((4, 2), torch.inf))


def test_large_weights_are_profiled_by_their_leading_values() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(9, 40))
    statistics, found = profile_weights(model, ["0", "1"], exact_limit=10, size=8)
    assert [len(each) for each in found.values()] == [8, 9]  # the second is small enough
    exact = profile_weights(model, ["0"])[0]["0"]
    assert statistics["0"]["weight_effective_rank"] < exact["weight_effective_rank"]
    assert exact["weight_effective_rank"] < statistics["0"]["weight_effective_rank_upper"]
    assert "weight_effective_rank_upper" not in statistics["1"]


def test_convolutions_and_embeddings_are_profiled() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(3, 5, 2), nn.Embedding(11, 4))
    _, found = profile_weights(model, ["0", "1", "2"])
    torch.testing.assert_close(found["0"], torch.linalg.svdvals(model[0].weight.detach().double().flatten(1)))
    torch.testing.assert_close(
        found["1"], torch.linalg.svdvals(model[1].weight.detach().double().flatten(1).view(3, 10).T.reshape(10, 3))
    )
    torch.testing.assert_close(found["2"], torch.linalg.svdvals(model[2].weight.detach().double()))


class WholeNumbers(nn.Linear):
    """A linear layer that stores its weight in int8, at a common scale."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        stored = torch.randint(-9, 9, (4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 0.1, self.bias)


def test_a_quantised_weight_is_profiled_as_what_it_stands_for() -> None:
    model = nn.Sequential(WholeNumbers())
    _, found = profile_weights(model, ["0"])
    exact = torch.linalg.svdvals(model[0].weight.double() * 0.1)
    torch.testing.assert_close(found["0"], exact, rtol=1e-5, atol=1e-6)


def test_profile_weights_measures_each_module() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 8))
    nn.init.ones_(model[1].weight)
    statistics, found = profile_weights(model, ["1", "0"])
    assert list(statistics) == list(found) == ["1", "0"]
    ones = {"effective_rank": 1, "stable_rank": 1, "participation_ratio": 1, "energy_rank_90": 1, "redundancy": 0.75}
    assert statistics["1"] == pytest.approx({f"weight_{name}": value for name, value in ones.items()}, abs=1e-6)
    assert statistics["0"]["weight_effective_rank"] == effective_rank(found["0"])
    torch.testing.assert_close(found["0"], torch.linalg.svdvals(model[0].weight.detach().double()))


def test_profile_weights_names_the_module_of_a_damaged_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(ValueError, match=r"weight must be finite, .*; for module '0'"):
        profile_weights(model, ["0"])
