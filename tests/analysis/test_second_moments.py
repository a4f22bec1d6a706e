import dataclasses
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowra_analysis import MomentMatrix, SecondMoment

D, K = 60, 12
SPECTRA = {
    "1/i²": torch.arange(1, D + 1, dtype=torch.float64) ** -2,
    "exponential": 0.7 ** torch.arange(D, dtype=torch.float64),
    "low rank and noise": torch.cat([torch.ones(3), 0.01 * torch.ones(D - 3)]).double(),
}


def vectors(eigenvalues: Tensor) -> Tensor:
    """One example of D tokens whose second moment has these eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(D, D, generator=generator).double()).Q for _ in range(2))
    return (v * (D * eigenvalues).sqrt() @ u.T)[None]


def empty(
    *,
    dim: int = D,
    per: Literal["token", "example"] = "token",
    dense_limit: int = 0,
    size: int = K,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> SecondMoment:
    return SecondMoment.init(dim, per=per, dense_limit=dense_limit, size=size, seed=seed, dtype=dtype)


def whole(moment: MomentMatrix) -> Tensor:
    return moment.matmul(torch.eye(moment.diagonal.shape[-1], dtype=moment.diagonal.dtype))


def test_golden_mean_over_tokens_and_sum_over_the_tokens_of_an_example() -> None:
    v = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    real = torch.tensor([[True, True, False]])
    by_token = SecondMoment.init(2, per="token").update(v, real).finalise()
    by_example = SecondMoment.init(2, per="example").update(v, real).finalise()
    assert whole(by_token).tolist() == [[5, 7], [7, 10]]
    assert whole(by_example).tolist() == [[10, 14], [14, 20]]
    assert by_token.diagonal.tolist() == [5, 10]
    assert by_token.trace() == 15
    assert by_token.eigenvalues().tolist() == pytest.approx([7.5 + 0.5 * math.sqrt(221), 7.5 - 0.5 * math.sqrt(221)])


@pytest.mark.parametrize(("dense_limit", "is_dense"), [(D, True), (D - 1, False)])
def test_a_moment_is_dense_up_to_the_limit(dense_limit: int, is_dense: bool) -> None:
    state = empty(dense_limit=dense_limit)
    assert (state.triangle is not None) is is_dense
    assert (state.sums is not None) is not is_dense
    found = state.update(vectors(SPECTRA["exponential"])).finalise()
    assert (found.dense is not None) is is_dense
    assert (found.low_rank is None) is is_dense


def test_a_sketch_as_wide_as_the_moment_is_replaced_by_the_moment() -> None:
    assert empty(size=D).probes is None
    assert empty(size=D - 1).probes is not None


@pytest.mark.parametrize("dense_limit", [0, D], ids=["sketched", "dense"])
@pytest.mark.parametrize("rank", [1, 5, K - 1, K])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10], ids="{:g}".format)
def test_a_moment_of_rank_at_most_k_is_recovered(rank: int, scale: float, dense_limit: int) -> None:
    generator = torch.Generator().manual_seed(1)
    v = (
        scale
        * torch.randn(4, 5, rank, generator=generator).double()
        @ torch.randn(rank, D, generator=generator).double()
    )
    exact = torch.einsum("nti,ntj->ij", v, v) / 20
    found = empty(dense_limit=dense_limit).update(v).finalise()
    close = {"rtol": 0, "atol": 1e-8 * float(exact.norm())}
    torch.testing.assert_close(whole(found), exact, **close)
    torch.testing.assert_close(found.factor() @ found.factor().T, exact, **close)
    torch.testing.assert_close(found.eigenvalues()[:rank], torch.linalg.eigvalsh(exact).flip(0)[:rank], **close)
    q = torch.randn(D, 3, generator=generator).double()
    torch.testing.assert_close(found.quadratic_form(q), q.T @ exact @ q, rtol=0, atol=1e-6 * float(exact.norm()))


@pytest.mark.parametrize("rank", [1, 3, K - 1, K])
def test_rounding_of_float32_sums_is_not_amplified(rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(1, 400, rank, generator=generator) @ torch.randn(rank, D, generator=generator)
    exact = v[0].double().T @ v[0].double() / 400
    for seed in range(10):
        found = whole(empty(seed=seed, dtype=torch.float32).update(v).finalise())
        assert float((found - exact).norm()) < 1e-4 * float(exact.norm())


@pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA)
def test_a_sketched_moment_is_positive_semidefinite_below_the_exact_one_and_keeps_diagonal_and_trace(
    eigenvalues: Tensor,
) -> None:
    v = vectors(eigenvalues)
    exact = v[0].T @ v[0] / D
    for seed in range(10):
        found = empty(seed=seed).update(v).finalise()
        below = found.factor() @ found.factor().T
        assert float(torch.linalg.eigvalsh(whole(found)).min()) > -1e-13
        assert float(torch.linalg.eigvalsh(exact - below).min()) > -1e-13
        torch.testing.assert_close(whole(found).diagonal(), exact.diagonal())
        torch.testing.assert_close(found.diagonal, exact.diagonal())
        assert found.trace() == pytest.approx(float(eigenvalues.sum()), rel=1e-12)
        assert (found.eigenvalues() <= eigenvalues[:K] + 1e-13).all()
        assert (found.eigenvalues().diff() <= 0).all()


@pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA)
def test_the_mean_error_keeps_the_bound_of_the_paper_and_each_error_is_known(eigenvalues: Tensor) -> None:
    v = vectors(eigenvalues)
    exact = v[0].T @ v[0] / D
    bound = min((1 + r / (K - r - 1)) * float(eigenvalues[r:].sum()) for r in range(K - 1))
    errors = []
    for seed in range(30):
        found = empty(seed=seed).update(v).finalise()
        remainder = exact - found.factor() @ found.factor().T
        errors.append(float(torch.linalg.matrix_norm(remainder, "nuc")))
        assert found.trace() - float(found.eigenvalues().sum()) == pytest.approx(errors[-1], rel=1e-6)
        assert float((exact - whole(found)).norm()) <= float(remainder.norm())  # the diagonal put back helps
    assert sum(errors) / 30 <= bound


def test_the_factor_of_a_dense_moment_gives_its_best_approximations() -> None:
    v = vectors(SPECTRA["exponential"])
    found = empty(dense_limit=D).update(v).finalise()
    factor = found.factor()
    assert factor.shape == (D, D)
    torch.testing.assert_close(factor.square().sum(0), found.eigenvalues(), rtol=1e-9, atol=1e-12)
    error = torch.linalg.matrix_norm(whole(found) - factor[:, :4] @ factor[:, :4].T, 2)
    assert float(error) == pytest.approx(0.7**4, rel=1e-9)


def test_a_quadratic_form_is_symmetric_and_not_negative() -> None:
    found = empty(dtype=torch.float32).update(vectors(SPECTRA["1/i²"])).finalise()
    q = torch.randn(D, 7, generator=torch.Generator().manual_seed(0))
    form = found.quadratic_form(q)
    assert torch.equal(form, form.T)
    assert float(torch.linalg.eigvalsh(form).min()) > 0


@settings(max_examples=30, deadline=None)
@given(
    dense_limit=st.sampled_from([0, D]),
    order=st.permutations(range(6)),
    cuts=st.lists(st.integers(0, 6), min_size=2, max_size=2),
)
def test_neither_the_order_of_batches_nor_their_split_over_states_matters(
    dense_limit: int, order: list[int], cuts: list[int]
) -> None:
    generator = torch.Generator().manual_seed(2)
    v, real = torch.randn(6, 4, D, generator=generator).double(), torch.rand(6, 4, generator=generator) < 0.6
    begin = empty(dense_limit=dense_limit)
    expected = begin.update(v, real)
    states = []
    for part in (order[: min(cuts)], order[min(cuts) : max(cuts)], order[max(cuts) :]):
        state = begin
        for index in part:
            state = state.update(v[index : index + 1], real[index : index + 1])
        states.append(state)
    merged = states[1].merge(states[2]).merge(states[0])
    assert merged.count == expected.count == int(real.sum())
    torch.testing.assert_close(whole(merged.finalise()), whole(expected.finalise()))
    torch.testing.assert_close(merged.squares, expected.squares)
    assert begin.count == 0
    assert not begin.squares.any()


@pytest.mark.parametrize("dense_limit", [0, D], ids=["sketched", "dense"])
def test_tokens_that_are_not_real_are_not_looked_at(dense_limit: int) -> None:
    v = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0)).double()
    real = torch.tensor([[True, True, False], [True, False, False]])
    expected = empty(dense_limit=dense_limit).update(v, real).finalise()
    v[~real] = math.nan
    torch.testing.assert_close(whole(empty(dense_limit=dense_limit).update(v, real).finalise()), whole(expected))


@pytest.mark.parametrize("dense_limit", [0, D], ids=["sketched", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype, dense_limit: int) -> None:
    state = empty(dense_limit=dense_limit, dtype=torch.float32).update(torch.full((1, 4096, D), 30.0, dtype=dtype))
    assert {each.dtype for each in (state.triangle, state.sums, state.squares) if each is not None} == {torch.float32}
    found = state.finalise()
    torch.testing.assert_close(found.diagonal, torch.full((D,), 900.0))
    torch.testing.assert_close(whole(found), torch.full((D, D), 900.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dense_limit", [0, D], ids=["sketched", "dense"])
def test_the_moment_of_zeros_is_zero(dense_limit: int) -> None:
    found = empty(dense_limit=dense_limit).update(torch.zeros(2, 3, D)).finalise()
    assert not whole(found).any()
    assert not found.eigenvalues().any()
    assert found.trace() == 0


def test_the_seed_decides_and_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    first, again, other = (empty(seed=seed).probes for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert first is not None
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(first.T @ first, torch.eye(K, dtype=torch.float64))


@pytest.mark.parametrize(
    "other",
    [empty(seed=1), empty(size=3), empty(dim=D + 1), empty(per="example"), empty(dtype=torch.float32), empty(size=D)],
    ids=["seed", "size", "dim", "per", "dtype", "dense"],
)
def test_states_that_did_not_begin_alike_are_not_merged(other: SecondMoment) -> None:
    with pytest.raises(
        ValueError, match=r"other must begin with the same \(per, shape, seed, dtype\) \('token', \(60, 12"
    ):
        empty().merge(other)


def test_vectors_that_do_not_fit_or_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vectors and real must have shapes \(N, T, 60\) and \(N, T\), got \(2, 60\)"):
        empty().update(torch.ones(2, D))
    with pytest.raises(ValueError, match=r"got \(2, 3, 60\) and \(2, 2\)"):
        empty().update(torch.ones(2, 3, D), torch.ones(2, 2, dtype=torch.bool))
    for bad in (math.nan, math.inf, 1e30):
        with pytest.raises(ValueError, match=r"vectors must be finite, and their products too, got NaN or infinity"):
            empty(dtype=torch.float32).update(torch.full((2, 3, D), bad))


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        empty(size=0)
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64, got torch\.float16"):
        empty(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"the state must have seen at least one example, got none"):
        empty().finalise()


@pytest.mark.parametrize("dense_limit", [0, D], ids=["sketched", "dense"])
def test_vectors_that_are_zero_but_at_some_places_are_given_by_these_places(dense_limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.tensor([41, 3, 17])
    some = torch.randn(2, 5, 3, generator=generator).double()
    real = torch.rand(2, 5, generator=generator) < 0.6
    v = torch.zeros(2, 5, D, dtype=torch.float64)
    v[..., columns] = some
    begin = empty(dense_limit=dense_limit).update(torch.randn(1, 4, D, generator=generator).double())
    found, expected = begin.update(some, real, columns=columns), begin.update(v, real)
    torch.testing.assert_close(whole(found.finalise()), whole(expected.finalise()))
    torch.testing.assert_close(found.squares, expected.squares)
    assert found.count == expected.count
    only = SecondMoment.init(D, per="token", form="diagonal", dtype=torch.float64)
    torch.testing.assert_close(only.update(some, columns=columns).squares, v.square().sum((0, 1)))
    assert only.sums is only.triangle is None
    with pytest.raises(ValueError, match=r"must have shapes \(N, T, 3\) and \(N, T\), got \(2, 5, 60\)"):
        begin.update(v, columns=columns)


@pytest.mark.parametrize("form", ["full", "diagonal"])
@pytest.mark.parametrize("dense_limit", [0, D], ids=["sketched", "dense"])
def test_groups_are_as_many_moments_in_one(dense_limit: int, form: Literal["full", "diagonal"]) -> None:
    generator = torch.Generator().manual_seed(0)
    v, real = torch.randn(3, 2, 5, D, generator=generator).double(), torch.rand(2, 5, generator=generator) < 0.6
    arguments = {"per": "token", "form": form, "dense_limit": dense_limit, "size": K, "dtype": torch.float64}
    together = SecondMoment.init(D, groups=3, **arguments).update(v, real).update(v)
    assert together.squares.shape == (3, D)
    for group, found in enumerate(whole(together.finalise())):
        alone = SecondMoment.init(D, **arguments).update(v[group], real).update(v[group])
        torch.testing.assert_close(found, whole(alone.finalise()))
        assert alone.count == together.count
    with pytest.raises(ValueError, match=r"must have shapes \(3, N, T, 60\) and \(N, T\), got \(2, 2, 5, 60\)"):
        together.update(v[:2])


@pytest.mark.parametrize("dim", [1, 128, 129, 300, 1025])
def test_a_moment_that_is_kept_takes_little_more_than_half_of_its_square(dim: int) -> None:
    v = torch.randn(1, 3, dim, generator=torch.Generator().manual_seed(0)).double()
    state = SecondMoment.init(dim, per="token", dtype=torch.float64).update(v).update(2 * v)
    assert state.triangle is not None
    assert state.triangle.numel() <= dim * (dim + max(128, dim / 8 + 1)) / 2
    dense = state.finalise().dense
    assert dense is not None
    assert torch.equal(dense, dense.T)
    torch.testing.assert_close(dense, 5 * v[0].T @ v[0] / 6)
    with pytest.raises(ValueError, match=r"triangle must have shape \(\d+,\), got \(7,\)"):
        dataclasses.replace(state, triangle=torch.ones(7))


def test_a_state_that_has_seen_nothing_takes_no_room() -> None:
    for state in (SecondMoment.init(300, per="token"), empty(), empty().update(vectors(SPECTRA["1/i²"])).emptied()):
        kept = [each for each in (state.triangle, state.sums) if each is not None]
        assert [each.untyped_storage().nbytes() // each.element_size() for each in kept] == [1]
