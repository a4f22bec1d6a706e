from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowra_analysis import DampedMoment, KroneckerFactors, MomentMatrix, SecondMoment

D, K, G = 12, 5, 3
SCALES = torch.linspace(0.1, 3, D, dtype=torch.float64)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(dim: int = D) -> MomentMatrix:
    state = SecondMoment.init(dim, per="token", dtype=torch.float64)
    return state.update(normal(2, 4 * D, dim) * SCALES[:dim]).finalise()


def sketched(dim: int = D) -> MomentMatrix:
    state = SecondMoment.init(dim, per="token", dense_limit=0, size=K, dtype=torch.float64)
    return state.update(normal(2, 4 * D, dim) * SCALES[:dim]).finalise()


def diagonal(dim: int = D) -> MomentMatrix:
    state = SecondMoment.init(dim, per="token", form="diagonal", dtype=torch.float64)
    return state.update(normal(2, 4 * D, dim) * SCALES[:dim]).finalise()


def dense_groups(dim: int = D) -> MomentMatrix:
    state = SecondMoment.init(dim, per="token", groups=G, dtype=torch.float64)
    return state.update(normal(G, 2, 4 * D, dim) * SCALES[:dim]).finalise()


def sketched_groups(dim: int = D) -> MomentMatrix:
    state = SecondMoment.init(dim, per="token", groups=G, dense_limit=0, size=K, dtype=torch.float64)
    return state.update(normal(G, 2, 4 * D, dim) * SCALES[:dim]).finalise()


FORMS = [dense, sketched, diagonal, dense_groups, sketched_groups]
EVERY_FORM = pytest.mark.parametrize("make", FORMS, ids=lambda each: each.__name__)
Make = Callable[[], MomentMatrix]


def whole(product: Callable[[Tensor], Tensor], dim: int = D) -> Tensor:
    return product(torch.eye(dim, dtype=torch.float64))


def shifted(moment: MomentMatrix, damping: float) -> Tensor:
    """What shall be inverted, M + λI with λ a fraction of the mean eigenvalue."""
    matrix = whole(moment.matmul)
    return matrix + damping * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(D).double()


@EVERY_FORM
@pytest.mark.parametrize("damping", [0.001, 0.1, 10])
def test_the_inverse_and_the_roots_are_those_of_the_matrix_that_it_multiplies_with(make: Make, damping: float) -> None:
    moment = make()
    expected, found = shifted(moment, damping), moment.damped(damping)
    torch.testing.assert_close(whole(found.matmul), expected)
    torch.testing.assert_close(whole(found.solve) @ expected, torch.eye(D).double().expand_as(expected))
    root, inverse = whole(found.root), whole(found.inverse_root)
    torch.testing.assert_close(root @ root.mT, expected)
    torch.testing.assert_close(inverse @ root, torch.eye(D).double().expand_as(expected))
    torch.testing.assert_close(whole(found.inverse_root_transposed), inverse.mT)
    torch.testing.assert_close(inverse.mT @ inverse, whole(found.solve))


@pytest.mark.parametrize("make", [dense, diagonal, dense_groups], ids=lambda each: each.__name__)
def test_the_root_of_what_is_not_sketched_is_lower_triangular_and_needs_no_damping(make: Make) -> None:
    found = make().damped(0)
    root = whole(found.root)
    torch.testing.assert_close(root, root.tril())
    torch.testing.assert_close(root @ root.mT, whole(make().matmul))


@EVERY_FORM
def test_products_keep_the_dtype_of_the_vectors_and_are_computed_in_double(make: Make) -> None:
    moment, vectors = make().damped(1e-3), normal(D, 2)
    for product in (moment.matmul, moment.solve, moment.root, moment.inverse_root, moment.inverse_root_transposed):
        found = product(vectors.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, product(vectors.float().double()).float())


@pytest.mark.parametrize("make", [dense_groups, sketched_groups], ids=lambda each: each.__name__)
def test_each_group_is_as_it_would_be_alone(make: Make) -> None:
    moment = make()
    vectors = normal(G, D, 2)
    for group in range(G):
        alone = MomentMatrix(
            diagonal=moment.diagonal[group],
            dense=None if moment.dense is None else moment.dense[group],
            low_rank=None if moment.low_rank is None else moment.low_rank[group],
        )
        torch.testing.assert_close(moment.matmul(vectors)[group], alone.matmul(vectors[group]))
        torch.testing.assert_close(moment.quadratic_form(vectors)[group], alone.quadratic_form(vectors[group]))
        torch.testing.assert_close(moment.eigenvalues()[group], alone.eigenvalues())
        torch.testing.assert_close(moment.factor()[group] @ moment.factor()[group].T, alone.factor() @ alone.factor().T)
        torch.testing.assert_close(moment.damped(0.1).solve(vectors)[group], alone.damped(0.1).solve(vectors[group]))
    assert moment.trace() == pytest.approx(float(moment.diagonal.sum()))


def test_a_zero_moment_has_a_zero_inverse_also_as_one_group_among_others() -> None:
    zeros = torch.zeros(2, D, dtype=torch.float64)
    for zero in (
        MomentMatrix(diagonal=zeros[0]),
        MomentMatrix(diagonal=zeros[0], dense=torch.zeros(D, D, dtype=torch.float64)),
        MomentMatrix(diagonal=zeros[0], low_rank=zeros[:1].T),
    ):
        for damping in (0, 0.1):
            assert not whole(zero.damped(damping).solve).any()
            assert not whole(zero.damped(damping).inverse_root).any()
    of_groups = dense_groups()
    assert of_groups.dense is not None
    keep = torch.tensor([1.0, 0.0, 1.0]).double()
    some = MomentMatrix(diagonal=of_groups.diagonal * keep[:, None], dense=of_groups.dense * keep[:, None, None])
    found = whole(some.damped(0.1).solve)
    assert not found[1].any()
    torch.testing.assert_close(found[::2], whole(of_groups.damped(0.1).solve)[::2])


def test_a_singular_moment_needs_damping() -> None:
    vectors = normal(1, 3, D)
    singular = SecondMoment.init(D, per="token", dtype=torch.float64).update(vectors).finalise()
    sketch = SecondMoment.init(D, per="token", dense_limit=0, size=4, dtype=torch.float64).update(vectors).finalise()
    unseen = MomentMatrix(diagonal=torch.tensor([1.0, 0.0]))
    for moment in (singular, sketch, unseen):
        with pytest.raises(ValueError, match=r"damping must leave M \+ λI invertible, got 0 with a least eigenvalue"):
            moment.damped(0)
        assert isinstance(moment.damped(0.01), DampedMoment)
    with pytest.raises(ValueError, match=r"damping must be at least 0, got -0\.1"):
        singular.damped(-0.1)


@pytest.mark.parametrize(
    ("inputs", "gradients"),
    [(dense, sketched), (diagonal, dense), (sketched, sketched), (dense_groups, sketched_groups)],
    ids=lambda each: each.__name__,
)
def test_factors_multiply_and_solve_as_the_whole_kronecker_product(inputs: Make, gradients: Make) -> None:
    m, n, damping = 4, D, 0.2
    C, S = inputs(), gradients(m)
    factors = KroneckerFactors(C, S)
    damped = factors.damped(damping)
    groups = factors.groups or 1
    change = normal(2, groups * m, n, seed=3)
    blocks, inverses, eigenvalues = [], [], []
    for group in range(groups):
        c, s = (whole(each.matmul, dim).view(-1, dim, dim)[group] for each, dim in ((C, n), (S, m)))
        blocks.append(torch.kron(s, c))  # rows of Δ one after the other
        c, s = (each + damping * each.diagonal().mean() * torch.eye(len(each)).double() for each in (c, s))
        inverses.append(torch.kron(s, c))
        eigenvalues.append(float(torch.linalg.eigvalsh(blocks[-1])[-1]))
    F, damped_F = torch.block_diag(*blocks), torch.block_diag(*inverses)
    vec = change.flatten(1).T
    torch.testing.assert_close(factors.matmul(change).flatten(1).T, F @ vec)
    torch.testing.assert_close(damped.matmul(change).flatten(1).T, damped_F @ vec)
    torch.testing.assert_close(damped.solve(change).flatten(1).T, torch.linalg.solve(damped_F, vec))
    torch.testing.assert_close(damped.unwhiten(damped.whiten(change)), damped.solve(change))
    norms = (vec * torch.linalg.solve(damped_F, vec)).sum(0)
    torch.testing.assert_close(damped.whiten(change).square().sum((1, 2)), norms)
    assert factors.trace() == pytest.approx(float(F.trace()))
    if C.low_rank is None and S.low_rank is None:
        assert factors.largest_eigenvalue() == pytest.approx(max(eigenvalues))
    else:
        assert 0.5 * max(eigenvalues) < factors.largest_eigenvalue() <= max(eigenvalues) * (1 + 1e-9)
    assert isinstance(factors, KroneckerFactors)
