"""The flow spectrum against dense whitened singular value decompositions, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowra_allocation import BottleneckGram, balance, flow_spectrum, truncate
from flowra_allocation.bottleneck_gram import flow_spectra
from flowra_testing.tiny_models import seeded

SCALING = 1.5
SHAPES = st.tuples(st.integers(3, 9), st.integers(3, 9), st.integers(1, 3), st.integers(0, 2**31 - 1))


class Problem:
    """A random update with as many tokens as make both second moments regular."""

    def __init__(self, m: int, n: int, r: int, seed: int = 0, *, examples: int = 10, per_example: int = 4) -> None:
        tokens = examples * per_example
        with seeded(seed):
            self.a, self.b, x, g = (
                torch.randn(shape, dtype=torch.float64) for shape in ((r, n), (m, r), (tokens, n), (tokens, m))
            )
            mixing = torch.randn(n, n, dtype=torch.float64)
        x = x @ mixing  # inputs far from white
        self.delta_weight = SCALING * self.b @ self.a
        self.c = x.T @ x / tokens  # mean over tokens
        self.s = g.T @ g / examples  # sum over the tokens of an example, mean over examples
        self.gram = BottleneckGram.of(x @ self.a.T, SCALING * g @ self.b, examples=examples)

    def cost(self, difference: Tensor) -> float:
        """½ tr(S D C Dᵀ), the rise of the K-FAC model of the loss."""
        return (torch.trace(self.s @ difference @ self.c @ difference.T) / 2).item()

    def whitened(self) -> tuple[Tensor, Tensor, Tensor]:
        """Dense S^½ ΔW C^½ and its two factors."""
        s, c = _root(self.s), _root(self.c)
        return s @ self.delta_weight @ c, s, c


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@given(SHAPES)
def test_gains_are_half_the_squared_singular_values_of_the_whitened_update(shape: tuple[int, int, int, int]) -> None:
    problem = Problem(*shape)
    sigma = torch.linalg.svdvals(problem.whitened()[0])
    expected = sigma[: shape[2]].square() / 2
    assert relative(flow_spectrum(problem.gram, jitter=0).gains, expected) < 1e-9


@given(SHAPES)
def test_the_change_of_basis_keeps_the_update(shape: tuple[int, int, int, int]) -> None:
    problem = Problem(*shape)
    spectrum = flow_spectrum(problem.gram, jitter=0)
    product = SCALING * (problem.b @ spectrum.to_B) @ (spectrum.to_A @ problem.a)
    assert relative(product, problem.delta_weight) < 1e-9


@given(SHAPES)
def test_truncation_equals_the_dense_one_and_costs_the_gains_dropped(shape: tuple[int, int, int, int]) -> None:
    problem = Problem(*shape)
    spectrum = flow_spectrum(problem.gram, jitter=0)
    white, s, c = problem.whitened()
    u, sigma, vt = torch.linalg.svd(white)
    for rank in range(shape[2] + 1):
        a, b = truncate(problem.a, problem.b, spectrum, rank)
        dense = torch.linalg.solve(s, u[:, :rank] * sigma[:rank] @ vt[:rank]) @ torch.linalg.inv(c)
        assert a.shape == (rank, shape[1])
        assert b.shape == (shape[0], rank)
        assert (SCALING * b @ a - dense).abs().max() < 1e-7 * problem.delta_weight.abs().max()
        dropped = spectrum.gains[rank:].sum().item()
        assert problem.cost(problem.delta_weight - SCALING * b @ a) == pytest.approx(
            dropped, abs=1e-9 * spectrum.gains.sum().item()
        )


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_the_update_does_not_have_is_refused(rank: int) -> None:
    problem = Problem(6, 7, 3)
    with pytest.raises(ValueError, match=f"rank must be 0 to 3, that of the update, got {rank}"):
        truncate(problem.a, problem.b, flow_spectrum(problem.gram), rank)


@pytest.mark.parametrize("rank", [1, 2])
def test_no_random_update_of_the_same_rank_beats_the_truncation(rank: int) -> None:
    problem = Problem(6, 7, 3)
    a, b = truncate(problem.a, problem.b, flow_spectrum(problem.gram, jitter=0), rank)
    best = SCALING * b @ a
    cost = problem.cost(problem.delta_weight - best)
    generator = torch.Generator().manual_seed(1)
    for trial in range(2000):
        size = 10.0 ** -(trial % 5)  # from anywhere to close by
        wide_B, wide_A = (torch.randn(each, generator=generator, dtype=torch.float64) for each in (b.shape, a.shape))
        other = SCALING * (b + size * wide_B) @ (a + size * wide_A)
        assert problem.cost(problem.delta_weight - other) >= cost


def test_the_default_jitter_moves_gains_by_no_more_than_its_own_size() -> None:
    gram = Problem(6, 7, 3).gram
    exact, jittered = flow_spectrum(gram, jitter=0).gains, flow_spectrum(gram).gains
    conditioning = torch.linalg.cond(gram.activations).item()
    assert relative(jittered, exact) < 1e-6 * conditioning


def test_a_direction_that_saw_no_input_has_no_gain_and_the_rest_is_kept() -> None:
    z, delta = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    z[:, 1] = 0
    spectrum = flow_spectrum(BottleneckGram.of(z, delta, examples=30))
    alone = flow_spectrum(BottleneckGram.of(z[:, [0, 2]], delta[:, [0, 2]], examples=30), jitter=0)
    assert spectrum.gains[2] < 1e-5 * spectrum.gains[0]
    torch.testing.assert_close(spectrum.gains[:2], alone.gains, rtol=1e-4, atol=0)


def test_inputs_that_are_all_zero_have_zero_gains_and_truncate_to_finite_factors() -> None:
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    spectrum = flow_spectrum(BottleneckGram.of(torch.zeros(6, 2), torch.randn(6, 2), examples=2))
    assert spectrum.gains.max() < 1e-200
    kept_A, kept_B = truncate(a, b, spectrum, 2)
    torch.testing.assert_close(kept_B @ kept_A, b @ a)


def test_an_update_that_has_not_moved_has_zero_gains() -> None:
    spectrum = flow_spectrum(BottleneckGram.of(torch.randn(9, 3), torch.zeros(9, 3), examples=3))
    assert spectrum.gains.count_nonzero() == 0


def test_many_spectra_at_once_are_those_of_each_alone() -> None:
    ranks = (3, 0, 1, 3, 2, 3)
    grams = [BottleneckGram.of(torch.randn(9, rank), torch.randn(9, rank), examples=3) for rank in ranks]
    grams[3] = BottleneckGram.of(torch.zeros(9, 3), torch.randn(9, 3), examples=3)  # beside others of its rank
    for one, gram in zip(flow_spectra(grams), grams, strict=True):
        alone = flow_spectrum(gram)
        torch.testing.assert_close((one.gains, one.to_A, one.to_B), (alone.gains, alone.to_A, alone.to_B))


def test_rank_zero_has_an_empty_spectrum() -> None:
    spectrum = flow_spectrum(BottleneckGram.of(torch.zeros(4, 0), torch.zeros(4, 0), examples=2))
    assert spectrum.gains.shape == (0,)
    a, b = truncate(torch.zeros(0, 5), torch.zeros(3, 0), spectrum, 0)
    assert (a.shape, b.shape) == ((0, 5), (3, 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["activations", "gradients"])
def test_grams_that_are_not_finite_are_refused(value: float, where: str) -> None:
    z, delta = torch.randn(4, 2), torch.randn(4, 2)
    (z if where == "activations" else delta)[0, 0] = value
    with pytest.raises(ValueError, match=r"bottleneck Grams must be finite, got NaN or infinity\. Lower the learning"):
        flow_spectrum(BottleneckGram.of(z, delta, examples=2))


def test_activations_are_a_mean_over_tokens_and_gradients_a_sum_per_example() -> None:
    z, delta = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    once = flow_spectrum(BottleneckGram.of(z, delta, examples=3), jitter=0).gains
    # every token seen twice within its example: the same inputs on average, twice the gradient per example
    twice = flow_spectrum(BottleneckGram.of(z.repeat(2, 1), delta.repeat(2, 1), examples=3), jitter=0).gains
    torch.testing.assert_close(twice, 2 * once)
    # twice as many examples of the same kind change nothing
    more = flow_spectrum(BottleneckGram.of(z.repeat(2, 1), delta.repeat(2, 1), examples=6), jitter=0).gains
    torch.testing.assert_close(more, once)


def test_batches_add_up_to_the_whole() -> None:
    z, delta = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    whole = BottleneckGram.of(z, delta, examples=4)
    parts = BottleneckGram.of(z[:3], delta[:3], examples=1) + BottleneckGram.of(z[3:], delta[3:], examples=3)
    torch.testing.assert_close(parts.activations, whole.activations)
    torch.testing.assert_close(parts.gradients, whole.gradients)
    assert (parts.tokens, parts.examples) == (whole.tokens, whole.examples) == (12, 4)


def test_decay_discounts_the_past_and_leaves_the_spectrum_of_one_batch() -> None:
    gram = BottleneckGram.of(torch.randn(8, 2), torch.randn(8, 2), examples=4)
    faded = gram.decayed(0.25)
    assert (faded.tokens, faded.examples) == (2, 1)
    torch.testing.assert_close(flow_spectrum(faded).gains, flow_spectrum(gram).gains)


def test_half_precision_batches_are_summed_in_float32_and_held_in_float64() -> None:
    z = torch.full((1000, 1), 3.0, dtype=torch.bfloat16)
    gram = BottleneckGram.of(z, z, examples=1)
    assert gram.activations.dtype == gram.gradients.dtype == torch.float64
    assert gram.activations.item() == 9000


@given(SHAPES)
def test_balance_keeps_the_product_and_makes_both_factors_equally_large(shape: tuple[int, int, int, int]) -> None:
    problem = Problem(*shape)
    a, b = balance(1000 * problem.a, problem.b)
    assert relative(b @ a, 1000 * problem.b @ problem.a) < 1e-10
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-8, atol=1e-8 * a.square().sum().item())
    sigma = torch.linalg.svdvals(1000 * problem.b @ problem.a)[: shape[2]]
    assert relative((a @ a.T).diagonal(), sigma) < 1e-8
    off_diagonal = a @ a.T - torch.diag((a @ a.T).diagonal())
    assert off_diagonal.abs().max() <= 1e-9 * sigma.max()


@given(SHAPES)
def test_truncated_factors_are_balanced(shape: tuple[int, int, int, int]) -> None:
    problem = Problem(*shape)
    for rank in range(1, shape[2] + 1):
        a, b = truncate(problem.a, problem.b, flow_spectrum(problem.gram), rank)
        torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-8, atol=1e-8 * a.square().sum().item())


def test_a_dead_direction_keeps_a_live_row_and_a_zero_column() -> None:
    a, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    b[:, 1] = 0
    rows, columns = balance(a, b)
    torch.testing.assert_close(columns @ rows, b @ a)
    torch.testing.assert_close(rows[2].norm().item(), 3**-0.5)
    assert columns[:, 2].count_nonzero() == 0
    torch.testing.assert_close(rows[:2] @ rows[2], torch.zeros(2, dtype=torch.float64))


def test_an_update_of_zero_keeps_live_rows_throughout() -> None:
    rows, columns = balance(torch.randn(2, 4, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64) / 3)
    assert columns.count_nonzero() == 0


def test_truncation_returns_the_dtype_it_was_given() -> None:
    problem = Problem(4, 5, 2)
    a, b = truncate(problem.a.float(), problem.b.float(), flow_spectrum(problem.gram), 1)
    assert a.dtype == b.dtype == torch.float32
