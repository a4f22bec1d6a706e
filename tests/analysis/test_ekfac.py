import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_analysis import (
    EKFAC,
    EigenFactors,
    KroneckerFactors,
    MomentMatrix,
    Signals,
    fisher_trace,
    kronecker_factors,
    measure,
    read_state,
    weight_matrix,
    write_state,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # linear_operator uses torch.jit.script
    from curvlinops import EKFACLinearOperator

Sharing = Literal["expand", "reduce"]
Batch = tuple[Tensor, Tensor]
CLASSES = 3


class Tokens(nn.Module):
    """Layers over tokens, one of them called twice, and a head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.twice, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.up(x))))))
        out: Tensor = self.head(h.mean(1))
        return out


class Words(nn.Module):
    """An embedding, of which some ids are seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, CLASSES)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(ids)).mean(1))
        return out


def convolutions(groups: int) -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 2, groups=groups)
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES)).double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labelled(inputs: Tensor) -> Batch:
    return inputs, torch.arange(len(inputs)) * 2 % CLASSES


def ids(num: int) -> Tensor:
    return torch.randint(6, (num, 3), generator=torch.Generator().manual_seed(num))


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[Batch]]] = {
    "tokens": (Tokens, ["up", "twice", "head"], [labelled(normal(9, 3, 4)), labelled(normal(5, 3, 4, seed=2))]),
    "convolution": (
        lambda: convolutions(1),
        ["0", "3"],
        [labelled(normal(9, 4, 3, 3)), labelled(normal(5, 4, 3, 3, seed=2))],
    ),
    "groups": (lambda: convolutions(2), ["0"], [labelled(normal(9, 4, 3, 3)), labelled(normal(5, 4, 3, 3, seed=2))]),
    "embedding": (Words, ["embed", "head"], [labelled(ids(9)), labelled(ids(5))]),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def of_case(
    case: str, weight_sharing: Sharing = "expand"
) -> tuple[dict[str, KroneckerFactors], dict[str, EigenFactors]]:
    make, names, batches = CASES[case]
    model = make()
    factors = kronecker_factors(model, batches, loss, names, weight_sharing=weight_sharing)
    begun = {"ekfac": EKFAC.init(factors)}
    return factors, measure(model, batches, loss, names, begun)["ekfac"].finalise()


def exact_fisher(case: str, name: str) -> Tensor:
    """E_i[vec G_i vec G_iᵀ], rows of G one after the other, from autograd on one example at a time."""
    make, _, batches = CASES[case]
    model = make()
    weight = model.get_parameter(f"{name}.weight")
    rows = []
    for inputs, targets in batches:
        for each in zip(inputs.split(1), targets.split(1), strict=True):
            (gradient,) = torch.autograd.grad(loss(model, each).sum(), weight)
            is_embedding = isinstance(model.get_submodule(name), nn.Embedding)
            rows.append((gradient.T if is_embedding else gradient).flatten())
    G = torch.stack(rows)
    return G.T @ G / len(G)


def matrix_of(product: Callable[[Tensor], Tensor], m: int, n: int) -> Tensor:
    units = torch.eye(m * n, dtype=torch.float64).view(m * n, m, n)
    return product(units).flatten(1).T


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", ["convolution", "tokens"])
def test_products_are_those_of_curvlinops(case: str, weight_sharing: Sharing) -> None:
    make, names, _ = CASES[case]
    names = [name for name in names if name != "twice"]  # of which curvlinops would see one call
    shape = (4, 3, 3) if case == "convolution" else (3, 4)
    batches = [labelled(normal(30, *shape)), labelled(normal(7, *shape, seed=2))]  # so that no eigenvalue is 0 twice
    model = make()
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    operator = EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        weights,
        batches,
        fisher_type="empirical",
        kfac_approx=weight_sharing,
        check_deterministic=False,
    )
    factors = kronecker_factors(model, batches, loss, names, weight_sharing=weight_sharing)
    found = measure(model, batches, loss, names, {"ekfac": EKFAC.init(factors)})["ekfac"].finalise()
    changes = [normal(*weight_matrix(model.get_submodule(name)).shape, seed=7) for name in names]
    expected = operator @ torch.cat([each.flatten() for each in changes])
    ours = torch.cat([found[name].matmul(each).flatten() for name, each in zip(names, changes, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)
    assert sum(each.trace() for each in found.values()) == pytest.approx(float(operator.trace), rel=1e-10)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@EVERY_CASE
def test_it_is_the_best_diagonal_in_its_basis_and_no_farther_from_the_fisher_than_kfac(
    case: str, weight_sharing: Sharing
) -> None:
    factors, found = of_case(case, weight_sharing)
    for name, corrected in found.items():
        exact = exact_fisher(case, name)
        blocks = corrected.eigenvalues.view(-1, *corrected.eigenvalues.shape[-2:])  # of a layer of groups
        G, m, n = blocks.shape
        for group in range(G):
            rows = slice(group * m * n, (group + 1) * m * n)
            block = exact[rows, rows]
            ours = matrix_of(corrected.matmul, G * m, n)[rows, rows]
            kfac = matrix_of(factors[name].matmul, G * m, n)[rows, rows]
            U_C, U_S = (
                torch.eye(size, dtype=torch.float64) if each is None else each.view(G, size, size)[group].contiguous()
                for each, size in zip(corrected.basis, (n, m), strict=True)
            )
            basis = torch.kron(U_S, U_C)
            torch.testing.assert_close(basis.T @ basis, torch.eye(m * n, dtype=torch.float64))
            rotated = basis.T @ kfac @ basis
            torch.testing.assert_close(rotated, rotated.diagonal().diag(), rtol=0, atol=1e-12)
            best = basis @ torch.diag((basis.T @ block @ basis).diagonal()) @ basis.T
            torch.testing.assert_close(ours, best, rtol=1e-8, atol=1e-12)
            assert float((block - ours).norm()) <= float((block - kfac).norm()) * (1 + 1e-9)
            assert float((block - ours).norm()) > 0
        assert corrected.trace() == pytest.approx(float(exact.trace()), rel=1e-10)
        assert corrected.largest_eigenvalue() <= float(torch.linalg.eigvalsh(exact)[-1]) * (1 + 1e-9)


def test_other_diagonals_in_that_basis_are_farther_from_the_fisher() -> None:
    _, found = of_case("tokens")
    exact = exact_fisher("tokens", "up")
    error = float((exact - matrix_of(found["up"].matmul, 6, 4)).norm())
    for seed in range(20):
        eigenvalues = found["up"].eigenvalues * (1 + 0.1 * normal(6, 4, seed=seed))
        other = EigenFactors(basis=found["up"].basis, eigenvalues=eigenvalues)
        assert float((exact - matrix_of(other.matmul, 6, 4)).norm()) > error


def test_where_inputs_and_gradients_are_independent_it_is_kfac() -> None:
    x, g = normal(3, 5), normal(4, 2, seed=2)
    signals = Signals(x.repeat_interleave(4, 0)[:, None], g.repeat(3, 1)[:, None])  # all pairs
    C, S = (MomentMatrix(diagonal=each.square().mean(0), dense=each.T @ each / len(each)) for each in (x, g))
    factors = KroneckerFactors(C, S)
    found = EKFAC.init({"": factors}).update("", signals).finalise()[""]
    change = normal(2, 5, seed=3)
    torch.testing.assert_close(found.matmul(change), factors.matmul(change))
    assert found.largest_eigenvalue() == pytest.approx(factors.largest_eigenvalue())


@EVERY_CASE
def test_solving_undoes_the_damped_product(case: str) -> None:
    _, found = of_case(case)
    for corrected in found.values():
        n = corrected.eigenvalues.shape[-1]
        m = corrected.eigenvalues.numel() // n
        gradient = normal(2, m, n, seed=4)
        groups = len(corrected.eigenvalues) if corrected.eigenvalues.ndim == 3 else 1
        damping = 0.3 * corrected.eigenvalues.view(groups, -1).mean(1).repeat_interleave(m // groups)[:, None]
        solved = corrected.solve(gradient, 0.3)
        torch.testing.assert_close(corrected.matmul(solved) + damping * solved, gradient)


def test_the_fisher_of_no_gradient_has_a_zero_solution_and_a_singular_one_needs_damping() -> None:
    factors = kronecker_factors(Tokens(), CASES["tokens"][2], loss, ["up"])
    zero = EKFAC.init(factors).update("up", Signals(normal(2, 3, 4), torch.zeros(2, 3, 6).double())).finalise()["up"]
    assert not zero.solve(normal(6, 4)).any()
    _, found = of_case("embedding")  # one of the ids was not seen
    with pytest.raises(ValueError, match=r"damping must leave F \+ μI invertible, got 0 with a least eigenvalue of 0"):
        found["embed"].solve(normal(4, 7), 0)
    with pytest.raises(ValueError, match=r"damping must be at least 0, got -1"):
        found["embed"].solve(normal(4, 7), -1)


@EVERY_CASE
def test_the_trace_is_that_of_the_fisher_whatever_the_basis(case: str) -> None:
    make, names, batches = CASES[case]
    model = make()
    expected = fisher_trace(model, batches, loss, names)
    for weight_sharing in ("expand", "reduce"):
        _, found = of_case(case, weight_sharing)
        for name in names:
            assert found[name].trace() == pytest.approx(expected[name].mean, rel=1e-10)


@EVERY_CASE
def test_states_that_share_the_data_merge_to_what_one_gets(case: str) -> None:
    make, names, batches = CASES[case]
    model = make()
    begin = EKFAC.init(kronecker_factors(model, batches, loss, names))
    parts = [measure(model, [each], loss, names, {"ekfac": begin})["ekfac"] for each in batches]
    merged = begin.merge(parts[0]).merge(pickle.loads(pickle.dumps(parts[1]))).finalise()
    _, expected = of_case(case)
    for name in names:
        torch.testing.assert_close(merged[name].eigenvalues, expected[name].eigenvalues)
    assert not any(each.any() for each in begin.sums.values())


def test_a_state_that_was_written_and_read_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    make, names, batches = CASES["embedding"]
    model = make()
    begin = EKFAC.init(kronecker_factors(model, batches, loss, names))
    first = measure(model, batches[:1], loss, names, {"ekfac": begin})["ekfac"]
    write_state(first, tmp_path / "state.safetensors")
    again = read_state(tmp_path / "state.safetensors", EKFAC)
    ours, theirs = (measure(model, batches[1:], loss, names, {"ekfac": each})["ekfac"] for each in (again, first))
    for name in names:
        torch.testing.assert_close(ours.sums[name], theirs.sums[name])
    assert ours.counts == theirs.counts == {"embed": 14, "head": 14}


def test_factors_that_are_shared_are_decomposed_once() -> None:
    moment = MomentMatrix(diagonal=torch.ones(3), dense=torch.eye(3))
    state = EKFAC.init({"q": KroneckerFactors(moment, moment), "k": KroneckerFactors(moment, moment)})
    assert state.bases["q"].inputs is state.bases["k"].inputs


@pytest.mark.parametrize(("num", "length"), list(itertools.product([1, 3], [1, 2, 5])))
def test_examples_that_do_not_fit_in_the_room_at_once_are_taken_in_parts(
    num: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    C, S = (MomentMatrix(diagonal=torch.ones(size).double(), dense=torch.eye(size).double()) for size in (4, 2))
    x, g = normal(num, length, 4), normal(num, length, 2, seed=2)
    expected = torch.einsum("ntm,ntk->nmk", g, x).square().mean(0)
    for room in (1, 16, 2**24):
        monkeypatch.setattr("flowra_analysis.ekfac.MOST_NUMBERS", room)
        found = EKFAC.init({"": KroneckerFactors(C, S)}).update("", Signals(x, g)).finalise()[""]
        torch.testing.assert_close(found.eigenvalues, expected)


def test_what_does_not_fit_is_refused() -> None:
    C, S = (MomentMatrix(diagonal=torch.ones(size).double(), dense=torch.eye(size).double()) for size in (4, 2))
    state = EKFAC.init({"a": KroneckerFactors(C, S)})
    fits = Signals(normal(3, 2, 4), normal(3, 2, 2))
    with pytest.raises(ValueError, match=r"factors must hold every module, got none for module 'b', batch 1"):
        state.update("b", fits, batch=1)
    with pytest.raises(ValueError, match=r"x and g must be those of a weight \(2, 4\), as the factors, got \(2, 5\)"):
        state.update("a", Signals(normal(3, 2, 5), normal(3, 2, 2)))
    with pytest.raises(ValueError, match=r"x and g must be finite, .* for module 'a', batch 2\."):
        state.update("a", Signals(normal(3, 2, 4) * math.nan, normal(3, 2, 2)), batch=2)
    with pytest.raises(ValueError, match=r"every module must have seen at least one example, got none for \['a'\]"):
        state.finalise()
    with pytest.raises(ValueError, match=r"other must begin with the same factors, got other ones for \['a', 'b'\]"):
        state.merge(
            EKFAC.init({"a": KroneckerFactors(C, MomentMatrix(diagonal=torch.ones(2))), "b": KroneckerFactors(C, S)})
        )
    sketched = MomentMatrix(diagonal=torch.ones(4), low_rank=torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"factors must be dense or diagonal, got sketched ones for \['a'\]"):
        EKFAC.init({"a": KroneckerFactors(sketched, S)})
