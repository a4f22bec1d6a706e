import json
import math
import pickle
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
    GradientSketch,
    GradientSpectrum,
    KFACGradientSpectrum,
    KroneckerFactors,
    MeanGradients,
    MomentMatrix,
    SecondMoment,
    Signals,
    kfac_gradient_spectra,
    kfac_gradient_spectrum,
    kronecker_factors,
    measure,
    read_state,
    write_state,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_flow_spectrum.json").read_text())
Form = Literal["dense", "sketched", "diagonal", "groups"]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(dim: int, form: Form, seed: int = 0) -> MomentMatrix:
    """A second moment of full rank; the groups are two."""
    vectors = normal(2, 1, 3 * dim, dim, seed=seed) * torch.linspace(0.2, 2, dim).double()
    if form == "groups":
        state = SecondMoment.init(dim, per="token", groups=2, dtype=torch.float64).update(vectors)
    else:
        limit = 0 if form == "sketched" else 2048
        state = SecondMoment.init(
            dim,
            per="token",
            form="diagonal" if form == "diagonal" else "full",
            dense_limit=limit,
            size=max(1, dim // 2),
            dtype=torch.float64,
        ).update(vectors[0])
    return state.finalise()


def whole(of: MomentMatrix) -> Tensor:
    return of.matmul(torch.eye(of.diagonal.shape[-1], dtype=torch.float64))


def damped(of: MomentMatrix, damping: float) -> Tensor:
    matrix = whole(of)
    mean = of.diagonal.mean(-1)[..., None, None]
    return matrix + damping * mean * torch.eye(matrix.shape[-1]).double()


def model_value(change: Tensor, G: Tensor, C: Tensor, S: Tensor) -> float:
    """q(Δ) = ⟨G, Δ⟩ + ½ tr(Δᵀ S Δ C)."""
    return float((G * change).sum() + ((S @ change @ C) * change).sum() / 2)


def change_of(spectrum: KFACGradientSpectrum, rank: int) -> Tensor:
    B, A = spectrum.best_change(rank)
    return B @ A


def test_golden_spectrum_and_best_changes() -> None:
    G, C, S = (torch.tensor(GOLDEN[name], dtype=torch.float64) for name in "GCS")
    factors = KroneckerFactors(*(MomentMatrix(diagonal=each.diagonal(), dense=each) for each in (C, S)))
    close = {"rtol": 1e-8, "atol": 1e-9}
    whitened = factors.damped(0).whiten(G)
    symmetric = torch.tensor(GOLDEN["G_whitened"]).double()  # by S^-½ and C^-½, ours by other roots
    torch.testing.assert_close(*map(torch.linalg.svdvals, (whitened, symmetric)), rtol=1e-6, atol=1e-6)
    found = kfac_gradient_spectrum(G, factors, damping=0)
    torch.testing.assert_close(found.singular_values, torch.tensor(GOLDEN["sigma"], dtype=torch.float64), **close)
    for each in GOLDEN["optimal"]:
        change = change_of(found, each["r"])
        torch.testing.assert_close(change, torch.tensor(each["delta"], dtype=torch.float64), **close)
        assert model_value(change, G, C, S) == pytest.approx(each["model_value"], rel=1e-9)
        assert -found.gain(each["r"]) == pytest.approx(each["minus_half_sum_sigma2"], rel=1e-9)
    assert -found.gain(1) < GOLDEN["best_of_20000_random_rank1"]


FORMS = pytest.mark.parametrize(
    ("inputs", "gradients"),
    [("dense", "dense"), ("sketched", "dense"), ("diagonal", "sketched"), ("sketched", "sketched")],
)


@FORMS
@pytest.mark.parametrize("damping", [0.02, 0.1, 1.0])
def test_no_change_of_a_rank_beats_the_best_and_it_gains_what_it_says(
    inputs: Form, gradients: Form, damping: float
) -> None:
    m, n = 6, 8
    factors, G = KroneckerFactors(moment(n, inputs), moment(m, gradients, seed=5)), normal(m, n, seed=3)
    C, S = (damped(each, damping) for each in factors)
    found = kfac_gradient_spectrum(G, factors, damping=damping)
    roots = [torch.linalg.cholesky(each) for each in (S, C)]
    expected = torch.linalg.svdvals(torch.linalg.solve(roots[0], torch.linalg.solve(roots[1], G.T).T))
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-9, atol=1e-12)
    best = torch.linalg.solve(S, torch.linalg.solve(C, G.T).T)  # of full rank: the damped natural gradient
    torch.testing.assert_close(change_of(found, m), -best, rtol=1e-8, atol=1e-10)
    for rank in range(m + 1):
        change = change_of(found, rank)
        assert torch.linalg.matrix_rank(change) == rank
        assert model_value(change, G, C, S) == pytest.approx(-found.gain(rank), rel=1e-9)
        for seed in range(50):
            other = normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 100)
            step = -float((G * other).sum()) / max(float(((S @ other @ C) * other).sum()), 1e-300)  # its best length
            assert model_value(step * other, G, C, S) >= -found.gain(rank) * (1 + 1e-12)
            near = change + 1e-3 * normal(m, max(rank, 1), seed=seed) @ normal(max(rank, 1), n, seed=seed + 100)
            u, s, vt = torch.linalg.svd(near)
            near = (u[:, :rank] * s[:rank]) @ vt[:rank]
            assert model_value(near, G, C, S) >= -found.gain(rank) * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    seed=st.integers(0, 10**6),
    log_damping=st.floats(-3, 1),
    scales=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
)
def test_the_values_do_not_depend_on_the_scale_of_the_loss_and_fall_with_damping(
    m: int, n: int, seed: int, log_damping: float, scales: tuple[float, float]
) -> None:
    C, S = moment(n, "dense", seed=seed), moment(m, "dense", seed=seed + 1)
    G, damping, (a, b) = normal(m, n, seed=seed + 2), 10**log_damping, (10 ** scales[0], 10 ** scales[1])
    found = kfac_gradient_spectrum(G, KroneckerFactors(C, S), damping=damping)
    assert found.singular_values.shape == (min(m, n),)
    assert (found.singular_values.diff() <= 0).all()
    scaled = KroneckerFactors(
        *(MomentMatrix(diagonal=s * s * each.diagonal, dense=s * s * whole(each)) for each, s in ((C, a), (S, b)))
    )
    again = kfac_gradient_spectrum(a * b * G, scaled, damping=damping)
    torch.testing.assert_close(again.singular_values, found.singular_values, rtol=1e-8, atol=1e-10)
    more = kfac_gradient_spectrum(G, KroneckerFactors(C, S), damping=2 * damping)
    assert (more.singular_values <= found.singular_values * (1 + 1e-9)).all()


def test_the_gains_of_layers_add_up() -> None:
    """Two layers as one of two blocks: the best change of both together is that of each."""
    m, n, damping = 4, 5, 0.1
    pairs = [KroneckerFactors(moment(n, "dense", seed=k), moment(m, "dense", seed=k + 9)) for k in range(2)]
    gradients = [normal(m, n, seed=20), normal(m, n, seed=21)]
    found = [kfac_gradient_spectrum(G, pair, damping=damping) for G, pair in zip(gradients, pairs, strict=True)]
    blocks = [torch.kron(*(damped(each, damping) for each in (pair.gradients, pair.inputs))) for pair in pairs]
    together = torch.cat([G.flatten() for G in gradients])
    F = torch.block_diag(*blocks)
    total = float(together @ torch.linalg.solve(F, together)) / 2
    assert sum(each.gain(m) for each in found) == pytest.approx(total, rel=1e-10)
    changes = [change_of(each, rank) for each, rank in zip(found, (1, 3), strict=True)]
    joined = torch.cat([each.flatten() for each in changes])
    value = float(together @ joined + joined @ F @ joined / 2)
    assert value == pytest.approx(-found[0].gain(1) - found[1].gain(3), rel=1e-10)


def test_groups_are_layers_of_their_own_whose_values_are_pooled() -> None:
    m, n, damping = 3, 4, 0.1
    factors = KroneckerFactors(moment(n, "groups"), moment(m, "groups", seed=5))
    G = normal(2 * m, n, seed=3)
    found = kfac_gradient_spectrum(G, factors, damping=damping, num_examples=10)
    C, S = (damped(each, damping) for each in factors)
    alone = [
        kfac_gradient_spectrum(
            G[m * k : m * k + m],
            KroneckerFactors(*(MomentMatrix(diagonal=whole(e)[k].diagonal(), dense=whole(e)[k]) for e in factors)),
            damping=damping,
        )
        for k in range(2)
    ]
    expected = torch.cat([each.singular_values for each in alone]).sort(descending=True).values
    torch.testing.assert_close(found.singular_values, expected)
    assert found.noise_floor == (math.sqrt(3) + 2) / math.sqrt(10)
    for rank in range(7):
        change = change_of(found, rank)
        value = sum(model_value(change[m * k : m * k + m], G[m * k : m * k + m], C[k], S[k]) for k in range(2))
        assert value == pytest.approx(-found.gain(rank), rel=1e-9)
    for direction in found.left.T:
        assert (direction.view(2, m).abs().sum(1) > 0).sum() == 1
    u, s, vt = torch.linalg.svd(G, full_matrices=False)
    sketch = GradientSpectrum(singular_values=s, left=u, right=vt.T, squared_norm=1.0, squared_error=0.0)
    again = kfac_gradient_spectrum(sketch, factors, damping=damping)
    torch.testing.assert_close(again.singular_values[:6], expected)
    torch.testing.assert_close(change_of(again, 6), change_of(found, 6))


@FORMS
def test_a_gradient_of_small_rank_gives_the_same_by_its_sketch(inputs: Form, gradients: Form) -> None:
    m, n = 20, 30
    factors = KroneckerFactors(moment(n, inputs), moment(m, gradients, seed=5))
    x, g = normal(4, 3, 2, seed=7) @ normal(2, n, seed=8), normal(4, 3, m, seed=9)
    G = torch.einsum("ntm,ntk->mk", g, x) / 4  # of rank 2
    sketch = GradientSketch.init((m, n), size=4, dtype=torch.float64).update(Signals(x, g)).finalise()
    found, expected = (kfac_gradient_spectrum(each, factors, damping=0.1) for each in (sketch, G))
    torch.testing.assert_close(found.singular_values[:2], expected.singular_values[:2], rtol=1e-8, atol=0)
    assert float(found.singular_values[2:].max()) < 1e-8 * float(found.singular_values[0])
    torch.testing.assert_close(change_of(found, 2), change_of(expected, 2), rtol=1e-6, atol=1e-9)


def test_noise_ends_at_the_floor_and_a_signal_stands_above_it() -> None:
    m, n, N = 120, 180, 6000
    x, g = normal(N, n) @ normal(n, n, seed=2) / 8, normal(N, m, seed=3) @ normal(m, m, seed=4) / 6
    factors = KroneckerFactors(*(MomentMatrix(diagonal=v.square().mean(0), dense=v.T @ v / N) for v in (x, g)))
    found = kfac_gradient_spectrum(g.T @ x / N, factors, damping=0, num_examples=N)
    assert found.noise_floor == pytest.approx((math.sqrt(m) + math.sqrt(n)) / math.sqrt(N))
    assert float(found.singular_values[0]) == pytest.approx(found.noise_floor, rel=0.05)
    assert found.rank_above_noise() <= 1
    signal = (
        factors.damped(0).gradients.root(normal(m, 2, seed=5)) @ factors.damped(0).inputs.root(normal(n, 2, seed=6)).T
    )
    with_signal = kfac_gradient_spectrum(g.T @ x / N + signal, factors, damping=0, num_examples=N)
    assert with_signal.rank_above_noise() == 2
    assert with_signal.statistics()["kfac_gradient_rank_above_noise"] == 2


def test_a_layer_that_no_gradient_reaches_has_the_spectrum_zero() -> None:
    dead = MomentMatrix(diagonal=torch.zeros(3), dense=torch.zeros(3, 3))
    found = kfac_gradient_spectrum(torch.zeros(3, 4), KroneckerFactors(moment(4, "dense"), dead))
    assert not found.singular_values.any()
    assert not change_of(found, 3).any()
    assert found.statistics() == {
        "kfac_gradient_gain": 0.0,
        "kfac_gradient_effective_rank": 0.0,
        "kfac_gradient_stable_rank": 0.0,
    }


class Network(nn.Module):
    """An embedding, attention-like layers over tokens, a convolution of groups and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.mix = nn.Embedding(13, 6), nn.Linear(6, 8), nn.Conv1d(8, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.embed(ids)))
        out: Tensor = self.head(torch.tanh(self.mix(h.mT)).mean(2))
        return out


NAMES = ["embed", "up", "mix", "head"]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(13, (num, 5), generator=generator) for num in (6, 4)]


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids), ids[:, 0] % 3, reduction="none")


def exact_gradients(model: nn.Module) -> dict[str, Tensor]:
    """By autograd, as matrices (out, in)."""
    weights = [model.get_parameter(f"{name}.weight") for name in NAMES]
    total = sum((loss(model, ids).sum() for ids in batches()), torch.zeros(()))
    found = dict(zip(NAMES, torch.autograd.grad(total / 10, weights), strict=True))
    return {name: each.T if name == "embed" else each.flatten(1) for name, each in found.items()}


@pytest.mark.parametrize("gradient_limit", [0, 2**22], ids=["sketched", "dense"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_one_pass_gives_the_spectra_of_the_exact_gradients(
    weight_sharing: Literal["expand", "reduce"], gradient_limit: int
) -> None:
    model = Network()
    factors = kronecker_factors(model, batches(), loss, NAMES, weight_sharing=weight_sharing)
    found = kfac_gradient_spectra(
        model, batches(), loss, NAMES, weight_sharing=weight_sharing, gradient_limit=gradient_limit, damping=0.2
    )
    assert list(found) == NAMES
    for name, G in exact_gradients(model).items():
        expected = kfac_gradient_spectrum(G, factors[name], damping=0.2, num_examples=10)
        num = len(expected.singular_values)
        torch.testing.assert_close(found[name].singular_values[:num], expected.singular_values, rtol=1e-7, atol=1e-9)
        assert found[name].noise_floor == expected.noise_floor
        torch.testing.assert_close(change_of(found[name], num), change_of(expected, num), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("limit", [0, 30, 2**22])
def test_mean_gradients_are_those_of_autograd_and_their_states_merge_and_are_written(
    limit: int, tmp_path: Path
) -> None:
    model, begin = Network(), MeanGradients.init(dense_limit=limit)
    parts = [measure(model, [each], loss, NAMES, {"": begin})[""] for each in batches()]
    write_state(parts[0], tmp_path / "state.safetensors")
    states: list[Callable[[], MeanGradients]] = [
        lambda: measure(model, batches(), loss, NAMES, {"": begin})[""],
        lambda: parts[0].merge(pickle.loads(pickle.dumps(parts[1]))),
        lambda: begin.merge(read_state(tmp_path / "state.safetensors", MeanGradients)).merge(parts[1]),
    ]
    for make in states:
        found = make().finalise()
        assert list(found) == NAMES
        for name, G in exact_gradients(model).items():
            each = found[name]
            assert isinstance(each, Tensor) is (G.numel() <= limit)
            dense = each if isinstance(each, Tensor) else each.left * each.singular_values @ each.right.T
            torch.testing.assert_close(dense, G, rtol=1e-8, atol=1e-10)


def test_large_gradients_of_one_shape_share_their_probes() -> None:
    signals = Signals(normal(2, 3, 4), normal(2, 3, 5))
    state = MeanGradients.init(dense_limit=0).update("a", signals).update("b", signals)
    a, b = state.gradients["a"], state.gradients["b"]
    assert isinstance(a, GradientSketch)
    assert isinstance(b, GradientSketch)
    assert a.probes is b.probes


def test_what_does_not_fit_is_refused() -> None:
    factors = KroneckerFactors(moment(4, "dense"), moment(3, "dense"))
    found = kfac_gradient_spectrum(normal(3, 4), factors)
    with pytest.raises(ValueError, match=r"gradient must have shape \(3, 4\) as its factors say, got \(4, 3\)"):
        kfac_gradient_spectrum(normal(4, 3), factors)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 3\], got 4"):
        found.gain(4)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 3\], got -1"):
        found.best_change(-1)
    with pytest.raises(ValueError, match=r"num_examples must be given for a noise floor, got None"):
        found.rank_above_noise()
    with pytest.raises(ValueError, match=r"damping must be at least 0, got -0\.1"):
        kfac_gradient_spectrum(normal(3, 4), factors, damping=-0.1)
    signals = Signals(normal(2, 3, 4), normal(2, 3, 5))
    state = MeanGradients.init().update("a", signals)
    with pytest.raises(
        ValueError, match=r"x and g must be those of a weight \(5, 4\), got one of \(5, 3\)\. For .*'a'"
    ):
        state.update("a", Signals(normal(2, 3, 3), normal(2, 3, 5)))
    with pytest.raises(ValueError, match=r"x and g must be finite, .* For module 'a', batch 7\."):
        state.update("a", Signals(normal(2, 3, 4) * math.inf, normal(2, 3, 5)), batch=7)
    with pytest.raises(ValueError, match=r"begin with the same \(dense_limit, size, seed\) \(4194304, 32, 0\), got"):
        state.merge(MeanGradients.init(seed=1))
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        MeanGradients.init(size=0)
    with pytest.raises(ValueError, match=r"batches must hold at least one example, got none"):
        MeanGradients.init().finalise()
