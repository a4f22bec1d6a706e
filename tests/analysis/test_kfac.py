import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flowra_analysis import (
    KFAC,
    KroneckerFactors,
    MomentMatrix,
    Signals,
    fisher_trace,
    kronecker_factors,
    measure,
    read_state,
    write_state,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # linear_operator uses torch.jit.script
    from curvlinops import KFACLinearOperator

Sharing = Literal["expand", "reduce"]
Batch = tuple[Tensor, Tensor]
SHARINGS = pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
CLASSES = 3


class Attention(nn.Module):
    """One head over tokens; its Q, K and V see one tensor, the head the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(5, 5) for _ in range(4))
        self.head = nn.Linear(5, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        mixed = (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        out: Tensor = self.head(torch.tanh(self.o(mixed)).mean(1))
        return out


class Convolutions(nn.Sequential):
    """An ordinary convolution, one of groups, and a head on the mean of the places."""

    def __init__(self, groups: int = 1) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 6, 2, groups=groups, dilation=2),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        )
        self.double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labelled(inputs: Tensor) -> Batch:
    return inputs, torch.arange(len(inputs)) * 2 % CLASSES


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[Batch]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double(),
        ["0", "2"],
        [labelled(normal(5, 4)), labelled(normal(3, 4, seed=2))],
    ),
    "attention": (
        Attention,
        ["q", "k", "v", "o", "head"],
        [labelled(normal(5, 4, 5)), labelled(normal(3, 4, 5, seed=2))],
    ),
    "convolution": (
        Convolutions,
        ["0", "2", "6"],
        [labelled(normal(3, 2, 9, 8)), labelled(normal(2, 2, 9, 8, seed=2))],
    ),
}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def whole(moment: MomentMatrix) -> Tensor:
    return moment.matmul(torch.eye(moment.diagonal.shape[-1], dtype=moment.diagonal.dtype))


def close(found: KroneckerFactors, C: Tensor, S: Tensor) -> None:
    torch.testing.assert_close(whole(found.inputs), C, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(whole(found.gradients), S, rtol=1e-9, atol=1e-13)


def from_tokens(x: Tensor, g: Tensor, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """C and S of tokens (N, T, ·), by their definition."""
    if sharing == "reduce":
        x, g = x.mean(1, keepdim=True), g.sum(1, keepdim=True)
    return torch.einsum("nti,ntj->ij", x, x) / x.shape[:2].numel(), torch.einsum("nti,ntj->ij", g, g) / len(g)


def captured(model: nn.Module, batches: list[Batch], name: str) -> tuple[Tensor, Tensor]:
    """Input and output gradient of one module by hooks and autograd, one example at a time."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0].detach(), output))

    with model.get_submodule(name).register_forward_hook(keep):
        for inputs, targets in batches:
            for each in zip(inputs.split(1), targets.split(1), strict=True):
                loss(model, each).sum().backward()
    gradients = [output.grad for _, output in seen if output.grad is not None]
    return torch.cat([x for x, _ in seen]), torch.cat(gradients)


def curvlinops_factors(
    model: nn.Module, names: list[str], batches: list[Batch], fisher_type: str, sharing: Sharing
) -> dict[str, tuple[Tensor, Tensor]]:
    """With reduction "mean" and one loss for each example, its scaling is ours: a mean over examples."""
    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [model.get_parameter(f"{name}.weight") for name in names],
        batches,
        fisher_type=fisher_type,
        kfac_approx=sharing,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    return {name: (operator._input_covariances[name], operator._gradient_covariances[name]) for name in names}


@SHARINGS
@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_of_curvlinops(case: str, weight_sharing: Sharing) -> None:
    make, names, batches = CASES[case]
    model = make()
    expected = curvlinops_factors(model, names, batches, "empirical", weight_sharing)
    found = kronecker_factors(model, batches, loss, names, weight_sharing=weight_sharing)
    assert list(found) == names
    for name in names:
        close(found[name], *expected[name])


@SHARINGS
@pytest.mark.parametrize("case", CASES)
def test_factors_of_the_true_fisher_summed_over_labels_are_those_of_curvlinops(
    case: str, weight_sharing: Sharing
) -> None:
    make, names, batches = CASES[case]
    model = make()
    expected = curvlinops_factors(model, names, batches, "type-2", weight_sharing)

    def of_label(label: int) -> Callable[[nn.Module, Batch], Tensor]:
        def weighted(model: nn.Module, batch: Batch) -> Tensor:
            log_p = model(batch[0]).log_softmax(1)[:, label]
            return log_p.detach().div(2).exp() * log_p  # so the square has the weight p

        return weighted

    found = [
        kronecker_factors(model, batches, of_label(each), names, weight_sharing=weight_sharing)
        for each in range(CLASSES)
    ]
    for name in names:
        S = sum((whole(each[name].gradients) for each in found), torch.zeros(()))
        torch.testing.assert_close(whole(found[0][name].inputs), expected[name][0], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(S, expected[name][1], rtol=1e-9, atol=1e-13)


@SHARINGS
def test_each_group_of_a_convolution_has_its_own_exact_factors(weight_sharing: Sharing) -> None:
    model = Convolutions(groups=2)
    batches = CASES["convolution"][2]
    x, g = captured(model, batches, "2")
    x = F.unfold(x, 2, dilation=2).mT  # (N, T, 16), the channels in order, those of a group together
    found = kronecker_factors(model, batches, loss, ["2"], weight_sharing=weight_sharing)["2"]
    assert found.inputs.diagonal.shape == (2, 8)
    assert found.gradients.diagonal.shape == (2, 3)
    for group in range(2):
        C, S = from_tokens(
            x[..., 8 * group : 8 * group + 8], g.flatten(2).mT[..., 3 * group : 3 * group + 3], weight_sharing
        )
        torch.testing.assert_close(whole(found.inputs)[group], C)
        torch.testing.assert_close(whole(found.gradients)[group], S)


@SHARINGS
def test_sketched_factors_of_groups_are_exact_where_their_rank_is_small(weight_sharing: Sharing) -> None:
    model, batches = Convolutions(groups=2), [labelled(normal(3, 2, 5, 5))]  # one place, so of rank 3
    exact = kronecker_factors(model, batches, loss, ["2"], weight_sharing=weight_sharing)["2"]
    found = kronecker_factors(model, batches, loss, ["2"], weight_sharing=weight_sharing, dense_limit=0, size=4)["2"]
    assert found.inputs.low_rank is not None
    assert found.inputs.low_rank.shape == (2, 8, 4)
    torch.testing.assert_close(whole(found.inputs), whole(exact.inputs), rtol=0, atol=1e-8)
    torch.testing.assert_close(whole(found.gradients), whole(exact.gradients))


class Words(nn.Module):
    """An embedding, and a head that is tied to it or not; a batch is a dictionary."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(ids)))
        return out


def words() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 5, 3, 1], [9, 0, 7, 0]])
    return {"ids": ids, "mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


def next_word(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    each = F.cross_entropy(model(batch["ids"])[:, :-1].mT, batch["ids"][:, 1:], reduction="none")
    return (each * batch["mask"][:, 1:]).sum(1)


def embedding_tokens(model: Words) -> tuple[Tensor, Tensor, Tensor]:
    """Ids one-hot, the padding index as zero; the gradient at the embedding's output; and which tokens are real."""
    batch, kept = words(), []

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    with model.embed.register_forward_hook(keep):
        next_word(model, batch).sum().backward()
    x = F.one_hot(batch["ids"], 11).double()
    x[..., 0] = 0
    assert kept[0].grad is not None
    return x, kept[0].grad, batch["mask"].bool()


def test_an_embedding_has_a_diagonal_c_the_shares_of_its_ids() -> None:
    model = Words(tied=False)
    x, g, real = embedding_tokens(model)
    found = kronecker_factors(model, [words()], next_word, ["embed"], mask=lambda batch: batch["mask"])["embed"]
    assert found.inputs.dense is found.inputs.low_rank is None
    torch.testing.assert_close(found.inputs.diagonal, x[real].mean(0))
    torch.testing.assert_close(whole(found.inputs), x[real].T @ x[real] / 7)
    torch.testing.assert_close(whole(found.gradients), g[real].T @ g[real] / 2)
    assert found.inputs.eigenvalues().tolist() == pytest.approx(sorted(found.inputs.diagonal.tolist(), reverse=True))
    factor = found.inputs.factor()
    torch.testing.assert_close(factor @ factor.T, whole(found.inputs))
    torch.testing.assert_close(factor.square().sum(0), found.inputs.eigenvalues())


@pytest.mark.parametrize("dense_limit", [0, 20], ids=["sketched", "dense"])
def test_reduced_an_embedding_has_the_moment_of_the_mean_of_its_one_hot_vectors(dense_limit: int) -> None:
    model = Words(tied=False)
    x, g, real = embedding_tokens(model)
    mean = torch.stack([each[keep].mean(0) for each, keep in zip(x, real, strict=True)])
    found = kronecker_factors(
        *(model, [words()], next_word, ["embed"]),
        weight_sharing="reduce",
        dense_limit=dense_limit,
        size=5,
        mask=lambda batch: batch["mask"],
    )["embed"]
    assert (found.inputs.dense is None) is (dense_limit == 0)
    torch.testing.assert_close(whole(found.inputs), mean.T @ mean / 2, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole(found.gradients), g.sum(1).T @ g.sum(1) / 2)


@SHARINGS
def test_an_embedding_and_the_head_tied_to_it_are_one_layer_called_twice(weight_sharing: Sharing) -> None:
    model = Words(tied=True)
    x, g, _ = embedding_tokens(model)
    hidden, logits = torch.tanh(model.embed(words()["ids"])).detach(), []

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        logits.append(output)

    with model.head.register_forward_hook(keep):
        next_word(model, words()).sum().backward()
    assert logits[0].grad is not None
    found = kronecker_factors(model, [words()], next_word, ["embed", "head"], weight_sharing=weight_sharing)
    assert list(found) == ["embed"]
    both = torch.cat([x, logits[0].grad], 1), torch.cat([g, hidden], 1)
    close(found["embed"], *from_tokens(*both, weight_sharing))


class Twice(nn.Module):
    """One layer called twice, with padding that the loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shared(torch.tanh(self.shared(x)))
        return out


def test_reduced_padding_is_left_out_of_the_mean_and_calls_are_tokens_of_one_example() -> None:
    model, x = Twice(), normal(3, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    expected_x, expected_g = [], []
    for each, keep in zip(x, mask.bool(), strict=True):
        first = model.shared(each[keep]).detach().requires_grad_()
        second = model.shared(torch.tanh(first))
        (g1,) = torch.autograd.grad(second.square().sum(), first)
        tokens = torch.cat([each[keep], torch.tanh(first).detach()])
        expected_x.append(tokens.mean(0) if len(tokens) else torch.zeros(4).double())
        expected_g.append((g1 + 2 * second.detach()).sum(0))
    X, G = torch.stack(expected_x), torch.stack(expected_g)
    x[~mask.bool()] = 1e6
    found = kronecker_factors(
        model,
        [(x, mask)],
        lambda model, batch: model(batch[0]).square().sum((1, 2)),
        ["shared"],
        weight_sharing="reduce",
        mask=lambda batch: batch[1],
    )["shared"]
    close(found, X.T @ X / 3, G.T @ G / 3)


@pytest.mark.parametrize("case", CASES)
def test_factors_are_symmetric_and_positive_semidefinite_and_scaling_the_loss_scales_s_by_the_square(case: str) -> None:
    make, names, batches = CASES[case]
    model = make()
    for weight_sharing in ("expand", "reduce"):
        once = kronecker_factors(model, batches, loss, names, weight_sharing=weight_sharing)
        thrice = kronecker_factors(
            model, batches, lambda model, batch: 3 * loss(model, batch), names, weight_sharing=weight_sharing
        )
        for name in names:
            for moment in once[name]:
                matrix = whole(moment)
                assert torch.equal(matrix, matrix.mT)
                assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-13
            close(thrice[name], whole(once[name].inputs), 9 * whole(once[name].gradients))


@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 5), n=st.integers(1, 6), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_with_one_token_expand_and_reduce_agree(num: int, n: int, m: int, seed: int) -> None:
    signals = Signals(normal(num, 1, n, seed=seed), normal(num, 1, m, seed=seed + 100))
    expand, reduce = (
        KFAC.init(weight_sharing=each).update("", signals).finalise()[""] for each in ("expand", "reduce")
    )
    close(reduce, whole(expand.inputs), whole(expand.gradients))


@SHARINGS
def test_with_one_token_and_independence_the_product_is_the_exact_fisher(weight_sharing: Sharing) -> None:
    x, g = normal(3, 5), normal(4, 2, seed=2)
    signals = Signals(x.repeat_interleave(4, 0)[:, None], g.repeat(3, 1)[:, None])  # all pairs
    factors = KFAC.init(weight_sharing=weight_sharing).update("", signals).finalise()[""]
    vec = torch.einsum("ntm,ntk->nkm", signals.g, signals.x).flatten(1)  # columns of G stacked
    fisher = vec.T @ vec / len(vec)
    torch.testing.assert_close(torch.kron(whole(factors.inputs), whole(factors.gradients)), fisher)
    change = normal(2, 5, seed=3)
    torch.testing.assert_close(factors.matmul(change).T.flatten(), fisher @ change.T.flatten())
    assert factors.trace() == pytest.approx(float(fisher.trace()))
    assert factors.largest_eigenvalue() == pytest.approx(float(torch.linalg.eigvalsh(fisher)[-1]))


def test_reduced_what_sees_the_mean_of_its_tokens_has_the_trace_of_its_fisher_where_inputs_are_one() -> None:
    model, data = nn.Linear(3, 2).double(), [normal(6, 1, 3).expand(6, 4, 3).contiguous()]

    def squares(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).mean(1).sum(1)  # the gradient is the same for each example

    factors = kronecker_factors(model, data, squares, [""], weight_sharing="reduce")[""]
    assert factors.trace() == pytest.approx(fisher_trace(model, data, squares, [""])[""].mean)


def test_modules_that_see_the_same_input_share_one_c() -> None:
    make, names, batches = CASES["attention"]
    model = make()
    for order in (names, ["q", "o", "k", "head", "v"]):
        state = measure(model, batches, loss, order, {"kfac": KFAC.init()})["kfac"]
        assert state.moments["q"].inputs is state.moments["k"].inputs is state.moments["v"].inputs
        assert state.moments["o"].inputs is not state.moments["q"].inputs
        factors = state.finalise()
        assert factors["q"].inputs is factors["k"].inputs
        alone = kronecker_factors(model, batches, loss, ["k"])["k"]
        torch.testing.assert_close(whole(factors["k"].inputs), whole(alone.inputs))


def test_sharing_ends_where_inputs_tokens_or_what_was_seen_before_differ() -> None:
    x, g = normal(2, 3, 4), normal(2, 3, 2, seed=2)
    real = torch.tensor([[True, True, False], [True, False, False]])

    def c_of_b(first: Signals, second: Signals, *, a_begins: bool = False) -> Tensor:
        state = KFAC.init()
        if a_begins:
            state = state.update("a", Signals(normal(1, 3, 4, seed=9), g[:1]))
        return whole(state.update("a", first).update("b", second).finalise()["b"].inputs)

    whole_c, _ = from_tokens(x, g, "expand")
    plain, masked = Signals(x, g), Signals(x, g, real)
    torch.testing.assert_close(c_of_b(plain, plain), whole_c)
    torch.testing.assert_close(c_of_b(masked, plain), whole_c)
    torch.testing.assert_close(c_of_b(plain, plain, a_begins=True), whole_c)
    torch.testing.assert_close(c_of_b(Signals(x, g), Signals(x[:1], g[:1])), from_tokens(x[:1], g[:1], "expand")[0])
    torch.testing.assert_close(c_of_b(plain, masked), x[real].T @ x[real] / 3)
    torch.testing.assert_close(c_of_b(masked, Signals(x, g, real.clone())), x[real].T @ x[real] / 3)
    state = KFAC.init().update("a", plain)
    x *= 2  # in the same place
    torch.testing.assert_close(whole(state.update("b", Signals(x, g)).finalise()["b"].inputs), 4 * whole_c)


def test_the_same_batch_twice_counts_twice() -> None:
    signals, other = Signals(normal(2, 3, 4), normal(2, 3, 2)), Signals(normal(2, 3, 4, seed=3), normal(2, 3, 2))
    state = KFAC.init().update("a", signals).update("a", signals)
    assert state.moments["a"].inputs.count == 12
    twice = state.update("a", other).finalise()["a"]
    expected = (2 * from_tokens(*signals[:2], "expand")[0] + from_tokens(*other[:2], "expand")[0]) / 3
    torch.testing.assert_close(whole(twice.inputs), expected)


def test_an_input_that_is_gone_is_not_mistaken_for_another_in_its_place() -> None:
    state, expected = KFAC.init(), {}
    for index in range(20):  # the allocator gives the same place again
        x = normal(2, 3, 4, seed=index)
        state = state.update(str(index), Signals(x, normal(2, 3, 2)))
        expected[str(index)] = from_tokens(x, x, "expand")[0]
        del x
    for name, factors in state.finalise().items():
        torch.testing.assert_close(whole(factors.inputs), expected[name])


@SHARINGS
@pytest.mark.parametrize("dense_limit", [0, 2048], ids=["sketched", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_states_that_share_the_data_merge_to_what_one_gets(
    case: str, dense_limit: int, weight_sharing: Sharing
) -> None:
    make, names, batches = CASES[case]
    model = make()
    begin = KFAC.init(weight_sharing=weight_sharing, dense_limit=dense_limit, size=3, seed=5)
    expected = measure(model, batches, loss, names, {"kfac": begin})["kfac"].finalise()
    parts = [measure(model, [each], loss, names, {"kfac": begin})["kfac"] for each in batches]
    sent = pickle.loads(pickle.dumps(parts[1]))  # as processes do
    merged = begin.merge(parts[0]).merge(sent)
    assert list(merged.moments) == names
    for name, factors in merged.finalise().items():
        for ours, theirs in zip(factors, expected[name], strict=True):
            torch.testing.assert_close(whole(ours), whole(theirs), rtol=1e-6, atol=1e-10)
    if case == "attention":
        assert merged.moments["q"].inputs is merged.moments["v"].inputs
    assert not begin.moments


def test_a_state_that_was_written_and_read_or_copied_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    make, names, batches = CASES["attention"]
    model = make()
    first = measure(model, batches[:1], loss, names, {"kfac": KFAC.init(dense_limit=0, size=3)})["kfac"]
    expected = measure(model, batches[1:], loss, names, {"kfac": first})["kfac"].finalise()
    write_state(first, tmp_path / "state.safetensors")
    for again in (read_state(tmp_path / "state.safetensors", KFAC), copy.deepcopy(first)):
        later = measure(model, batches[1:], loss, names, {"kfac": again})["kfac"]
        assert later.moments["q"].inputs is later.moments["v"].inputs
        for name, factors in later.finalise().items():
            assert torch.equal(whole(factors.inputs), whole(expected[name].inputs))
            assert torch.equal(whole(factors.gradients), whole(expected[name].gradients))


def test_sketches_of_one_kind_share_their_probes() -> None:
    make, names, batches = CASES["attention"]
    state = measure(make(), batches, loss, names, {"kfac": KFAC.init(dense_limit=0, size=3)})["kfac"]
    probes = [state.moments[name].gradients.probes for name in ("q", "k", "v", "o")]
    assert all(each is probes[0] for each in probes)
    assert probes[0] is not None


def test_a_state_is_a_value_and_holds_no_input() -> None:
    state = KFAC.init()
    signals = Signals(normal(2, 3, 4), normal(2, 3, 2))
    after = state.update("a", signals)
    sums = after.moments["a"].inputs.triangle
    assert sums is not None
    kept = sums.clone()
    after.update("a", signals)
    assert torch.equal(sums, kept)
    assert not state.moments
    del signals
    additions = vars(after.recent)["additions"]
    assert len(additions) == 2
    assert all(each.x() is None for each in additions)


@pytest.mark.parametrize("dim", [1, 127, 128, 129, 300, 1100])
def test_blocks_of_a_large_moment_fit_together(dim: int) -> None:
    x = normal(1, 7, dim)
    state = KFAC.init().update("", Signals(x, x[..., :1])).update("", Signals(x, x[..., :1]))
    torch.testing.assert_close(whole(state.finalise()[""].inputs), x[0].T @ x[0] / 7)


def test_states_and_signals_that_do_not_fit_are_refused() -> None:
    begin = KFAC.init()
    state = begin.update("a", Signals(normal(2, 3, 4), normal(2, 3, 2)))
    with pytest.raises(ValueError, match=r"vectors and real must have shapes \(N, T, 4\).*'a', batch 3\."):
        state.update("a", Signals(normal(2, 3, 5), normal(2, 3, 2)), batch=3)
    with pytest.raises(ValueError, match=r"vectors must be finite.* For module 'a'\."):
        state.update("a", Signals(normal(2, 3, 4) * math.nan, normal(2, 3, 2)))
    with pytest.raises(ValueError, match=r"vectors must be finite.* For module 'a'\."):
        state.update("a", Signals(normal(2, 3, 4), normal(2, 3, 2) * math.inf))
    with pytest.raises(ValueError, match=r"begin with the same \(weight_sharing, dense_limit, size, seed\) \('expand'"):
        state.merge(KFAC.init(weight_sharing="reduce"))
    with pytest.raises(ValueError, match=r"begin with the same .* got \('expand', 2048, 256, 1\)"):
        state.merge(KFAC.init(seed=1))
    with pytest.raises(ValueError, match=r"weight_sharing must be 'expand' or 'reduce', got 'mean'"):
        KFAC.init(weight_sharing="mean")
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        KFAC.init(size=0)
    with pytest.raises(ValueError, match=r"batches must hold at least one example, got none"):
        begin.finalise()


def test_half_precision_signals_of_every_kind_are_accumulated_in_float32() -> None:
    for weight_sharing in ("expand", "reduce"):
        x = torch.ones(2, 1000, 4, dtype=torch.bfloat16)
        factors = KFAC.init(weight_sharing=weight_sharing).update("", Signals(x, x)).finalise()[""]
        total = 1000.0 if weight_sharing == "expand" else 1e6
        torch.testing.assert_close(whole(factors.inputs), torch.ones(4, 4))
        torch.testing.assert_close(whole(factors.gradients), torch.full((4, 4), total))
