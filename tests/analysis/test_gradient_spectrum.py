import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flowra_analysis import (
    GradientSketch,
    Signals,
    effective_rank,
    effective_rank_energy,
    gradient_spectra,
    participation_ratio,
    per_example_signals,
    stable_rank,
)

M, N_IN, K = 48, 64, 12
DECAYING = {
    "1/i": 1 / torch.arange(1, M + 1, dtype=torch.float64),
    "exponential": 0.7 ** torch.arange(M, dtype=torch.float64),
    "low rank and noise": torch.cat([torch.ones(3), 0.02 * torch.ones(M - 3)]).double(),
}


def matrix(sigma: Tensor) -> Tensor:
    """A (M, N_IN) matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(d, len(sigma), generator=generator).double()).Q for d in (M, N_IN))
    return u * sigma @ v.T


def stream(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """One example whose x (1, T, n) and g (1, T, m) have this gradient."""
    return torch.eye(gradient.shape[1], dtype=gradient.dtype)[None], gradient.T[None]


def sketch(gradient: Tensor, *, size: int = K, seed: int = 0) -> GradientSketch:
    state = GradientSketch.init((gradient.shape[0], gradient.shape[1]), size=size, seed=seed, dtype=torch.float64)
    return state.update(Signals(*stream(gradient)))


def examples(num: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(num, 5, N_IN, generator=generator, dtype=torch.float64),
        torch.randn(num, 5, M, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("rank", [1, 5, K - 1, K])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10], ids="{:g}".format)
def test_a_gradient_of_rank_at_most_k_is_recovered(rank: int, scale: float) -> None:
    sigma = scale * torch.linspace(2, 1, rank, dtype=torch.float64)
    exact = matrix(sigma)
    found = sketch(exact).finalise()
    torch.testing.assert_close(found.singular_values[:rank], sigma, rtol=1e-10, atol=0)
    assert (found.singular_values[rank:] < 1e-10 * scale).all()
    torch.testing.assert_close(found.left * found.singular_values @ found.right.T, exact, rtol=0, atol=1e-10 * scale)
    assert found.squared_norm == pytest.approx(float(sigma.square().sum()), rel=1e-10)
    assert found.squared_error < 1e-18 * found.squared_norm
    assert found.energy_share(rank) == pytest.approx(1, rel=1e-10)
    assert found.energy_share(0) == 0


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (7, 7), (1, 1)])
def test_a_matrix_with_a_side_of_at_most_k_is_not_approximated(shape: tuple[int, int]) -> None:
    exact = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sketch(exact).finalise()
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(exact), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma", DECAYING.values(), ids=DECAYING)
def test_on_decaying_spectra_the_mean_error_keeps_the_bound_of_the_paper_and_the_values_mirsky_s(sigma: Tensor) -> None:
    exact, s = matrix(sigma), 4 * K
    factors = [(K + rho - 1) / (K - rho - 1) * float(sigma[rho:].square().sum()) for rho in range(K - 1)]
    bound = (s - 1) / (s - K - 1) * min(factors)
    errors = []
    for seed in range(30):
        found = sketch(exact, seed=seed).finalise()
        errors.append(float((exact - found.left * found.singular_values @ found.right.T).square().sum()))
        padded = torch.cat([found.singular_values, torch.zeros(M - K)])
        assert float((padded - sigma).square().sum()) <= errors[-1] * (1 + 1e-9)
    assert sum(errors) / 30 <= bound


def test_the_leading_quarter_of_a_decaying_spectrum_is_found() -> None:
    sigma = DECAYING["exponential"]
    for seed in range(10):
        found = sketch(matrix(sigma), seed=seed).finalise()
        torch.testing.assert_close(found.singular_values[:3], sigma[:3], rtol=0.03, atol=0)
        _, _, vt = torch.linalg.svd(matrix(sigma))
        assert float((vt[:3] @ found.right[:, :3]).diagonal().abs().min()) > 0.99


@pytest.mark.parametrize("sigma", DECAYING.values(), ids=DECAYING)
def test_norm_and_error_are_unbiased_and_the_norm_scatters_less_than_that_of_the_check_alone(sigma: Tensor) -> None:
    exact, norms, surplus, alone = matrix(sigma), [], [], []
    for seed in range(200):
        state = sketch(exact, seed=seed)
        found = state.finalise()
        true_error = float((exact - found.left * found.singular_values @ found.right.T).square().sum())
        norms.append(found.squared_norm)
        surplus.append(found.squared_error - true_error)
        alone.append(float(state.sums.check.square().sum()) / len(state.sums.check))
    true_norm = float(sigma.square().sum())
    for values, expected in [(norms, true_norm), (alone, true_norm), (surplus, 0.0)]:
        error = float(torch.tensor(values).std()) / math.sqrt(200)
        assert abs(sum(values) / 200 - expected) < 4 * error
    assert float(torch.tensor(norms).std()) < 0.5 * float(torch.tensor(alone).std())


def test_a_squared_norm_is_positive_however_little_the_sketch_says() -> None:
    flat, fell_back = matrix(torch.ones(12, dtype=torch.float64)), 0
    for seed in range(60):
        state = sketch(flat, size=1, seed=seed)
        found = state.finalise()
        alone = float(state.sums.check.square().sum()) / len(state.sums.check)
        assert found.squared_norm > 0
        fell_back += found.squared_norm == alone
    assert 0 < fell_back < 30


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)), cuts=st.lists(st.integers(0, 6), min_size=2, max_size=2))
def test_neither_the_order_of_batches_nor_their_split_over_states_matters(order: list[int], cuts: list[int]) -> None:
    x, g = examples(6)
    empty = GradientSketch.init((M, N_IN), size=K, dtype=torch.float64)
    whole = empty.update(Signals(x, g))
    parts = [order[: min(cuts)], order[min(cuts) : max(cuts)], order[max(cuts) :]]
    states = []
    for part in parts:
        state = empty
        for index in part:
            state = state.update(Signals(x[index : index + 1], g[index : index + 1]))
        states.append(state)
    merged = states[2].merge(states[0]).merge(states[1])
    assert merged.num_examples == 6
    for found, expected in zip(merged.sums, whole.sums, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)
    assert empty.num_examples == 0
    assert not any(each.any() for each in empty.sums)


def test_the_seed_decides_and_the_global_generator_is_not_touched() -> None:
    exact, before = matrix(DECAYING["1/i"]), torch.get_rng_state()
    first, again, other = (sketch(exact, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.probes, again.probes, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.probes, other.probes, strict=True))
    values = [each.finalise().singular_values for each in (first, again, other)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0)
    assert not torch.allclose(values[0], values[2], rtol=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        GradientSketch.init((4, 5), size=2, seed=1),
        GradientSketch.init((4, 5), size=3),
        GradientSketch.init((5, 4), size=2),
        GradientSketch.init((4, 5), size=2, dtype=torch.float64),
    ],
    ids=["seed", "size", "shape", "dtype"],
)
def test_states_that_did_not_begin_alike_are_not_merged(other: GradientSketch) -> None:
    with pytest.raises(
        ValueError, match=r"other must begin with the same \(shape, size, seed, dtype\) \(\(4, 5\), 2, 0"
    ):
        GradientSketch.init((4, 5), size=2).merge(other)


def test_half_precision_is_accumulated_in_float32() -> None:
    x = torch.ones(1, 4096, 6, dtype=torch.bfloat16)
    state = GradientSketch.init((5, 6)).update(Signals(x, torch.ones(1, 4096, 5, dtype=torch.bfloat16)))
    assert {each.dtype for each in state.sums} == {torch.float32}
    assert float(state.finalise().singular_values[0]) == pytest.approx(4096 * math.sqrt(30), rel=1e-5)


def test_a_zero_gradient_has_a_zero_spectrum() -> None:
    found = sketch(torch.zeros(M, N_IN, dtype=torch.float64)).finalise()
    assert not found.singular_values.any()
    known = found.statistics()
    assert {key for key, value in known.items() if value} <= {"gradient_redundancy", "gradient_redundancy_lower"}
    assert found.energy_share(K) == 0


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.integers(1, 12))
def test_leaving_out_the_smallest_values_lowers_the_rank_measures(values: list[float], keep: int) -> None:
    sigma = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    for measure in (effective_rank, effective_rank_energy, stable_rank, participation_ratio):
        assert measure(sigma[:keep]) <= measure(sigma) * (1 + 1e-12)


@pytest.mark.parametrize("sigma", DECAYING.values(), ids=DECAYING)
def test_statistics_bound_the_rank_measures_of_the_gradient(sigma: Tensor) -> None:
    known = sketch(matrix(sigma)).finalise().statistics()
    for name, measure in (("effective_rank", effective_rank), ("participation_ratio", participation_ratio)):
        low, high = known[f"gradient_{name}"], known[f"gradient_{name}_upper"]
        assert 0.8 * low <= measure(sigma) <= 1.2 * high, name  # the values of a sketch are a little off
    assert known["gradient_stable_rank"] == pytest.approx(stable_rank(sigma), rel=0.2)


@pytest.mark.parametrize("rank", [-1, K + 1])
def test_the_share_of_more_directions_than_were_sketched_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be in \[0, {K}\], got {rank}"):
        sketch(matrix(DECAYING["1/i"])).finalise().energy_share(rank)


def test_signals_that_do_not_fit_or_are_not_finite_are_refused() -> None:
    state = GradientSketch.init((3, 4))
    for x, g in [(torch.ones(2, 4), torch.ones(2, 3)), (torch.ones(1, 2, 3), torch.ones(1, 2, 4))]:
        with pytest.raises(ValueError, match=r"x and g must have shapes \(N, T, 4\) and \(N, T, 3\), got"):
            state.update(Signals(x, g))
    for bad in (math.nan, math.inf, 1e38):
        with pytest.raises(ValueError, match=r"x and g must be finite, and their products too, got NaN or infinity"):
            state.update(Signals(torch.full((1, 2, 4), bad), torch.full((1, 2, 3), bad)))


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        GradientSketch.init((3, 4), size=0)
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64, got torch\.bfloat16"):
        GradientSketch.init((3, 4), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"the state must have seen at least one example, got none"):
        GradientSketch.init((3, 4)).finalise()


class Network(nn.Module):
    """Tokens, a module called twice, a head on a pooled vector; padding reaches nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.shared, self.head = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.up(x))))))
        out: Tensor = self.head((h * mask[..., None]).sum(1))
        return out


NAMES = ["up", "shared", "head"]
Batch = tuple[Tensor, Tensor]


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for num, length in [(4, 5), (3, 2)]:
        lengths = torch.randint(1, length + 1, (num, 1), generator=generator)
        mask = torch.arange(length) < lengths
        made.append((torch.randn(num, length, 6, dtype=torch.float64, generator=generator), mask))
    return made


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch).square().sum(1)


def mean_gradients(model: nn.Module) -> dict[str, Tensor]:
    total = sum(loss(model, batch).sum() for batch in batches()) / 7
    return dict(
        zip(NAMES, torch.autograd.grad(total, [model.get_submodule(each).weight for each in NAMES]), strict=True)
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_spectra_of_a_model_are_those_of_the_mean_weight_gradient_and_no_grad_is_written(frozen: bool) -> None:
    model = Network()
    expected = mean_gradients(model)
    model.requires_grad_(not frozen)
    found = gradient_spectra(model, batches(), loss, NAMES, size=9, mask=lambda batch: batch[1])
    assert list(found) == NAMES
    for name, gradient in expected.items():
        spectrum = found[name]
        assert spectrum.left.dtype == spectrum.singular_values.dtype == torch.float64
        torch.testing.assert_close(spectrum.left * spectrum.singular_values @ spectrum.right.T, gradient)
        assert spectrum.squared_norm == pytest.approx(float(gradient.square().sum()), rel=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_processes_that_share_the_data_get_together_what_one_gets() -> None:
    model = Network()
    whole = gradient_spectra(model, batches(), loss, ["shared"], size=4, seed=5)["shared"]
    states = []
    for part in batches():
        state = GradientSketch.init((9, 9), size=4, seed=5, dtype=torch.float64)
        for batch in per_example_signals(model, [part], loss, ["shared"]):
            state = state.update(batch["shared"])
        states.append(state)
    merged = states[0].merge(states[1]).finalise()
    torch.testing.assert_close(merged.singular_values, whole.singular_values)
    assert merged.squared_norm == pytest.approx(whole.squared_norm)


def test_padding_that_the_loss_reads_is_left_out_by_the_mask() -> None:
    model = Network()
    ones = torch.ones(4, 5, dtype=torch.bool)
    x, mask = batches()[0]
    masked = gradient_spectra(model, [(x, ones)], loss, ["up"], mask=lambda _: mask)["up"]
    (signals,) = per_example_signals(model, [(x, ones)], loss, ["up"])
    g = signals["up"].g * mask[..., None]
    exact = torch.linalg.svdvals(torch.einsum("ntm,ntk->mk", g, x) / 4)
    torch.testing.assert_close(masked.singular_values, exact, rtol=1e-9, atol=1e-12)


def test_layers_of_one_shape_share_their_probes() -> None:
    torch.manual_seed(0)
    same = nn.Linear(6, 6).double()
    model = nn.Sequential(same, nn.Identity(), nn.Linear(6, 6).double())
    model[2].load_state_dict(same.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    found = gradient_spectra(
        model, [x], lambda model, x: (model[0](x) + model[2](x)).square().sum(1), ["0", "2"], size=2
    )
    torch.testing.assert_close(found["0"].singular_values, found["2"].singular_values)


def test_a_batch_that_is_not_finite_is_named_with_its_module() -> None:
    bad = torch.full((2, 4), math.nan)
    with pytest.raises(ValueError, match=r"must be finite.* For module '', batch 1\."):
        gradient_spectra(nn.Linear(4, 2), [torch.ones(2, 4), bad], lambda model, x: model(x).sum(1), [""])
    with pytest.raises(ValueError, match=r"batches must hold at least one example, got none"):
        gradient_spectra(nn.Linear(4, 2), [], lambda model, x: model(x).sum(1), [""])
