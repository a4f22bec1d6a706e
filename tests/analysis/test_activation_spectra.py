import pickle

import pytest
import torch
from torch import Tensor, nn

from flowra_analysis import KFAC, ActivationSpectra, SecondMoment, Signals, effective_rank, measure


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def signals(x: Tensor, real: Tensor | None = None) -> Signals:
    return Signals(x, torch.zeros(*x.shape[:2], 1, dtype=x.dtype), real)


class Attention(nn.Module):
    """Q, K and V see one input, O another one of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        mixed: Tensor = self.o(weights @ self.v(x))
        return mixed


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    losses: Tensor = model(batch).square().flatten(1).sum(1)
    return losses


@pytest.mark.parametrize("masked", [False, True])
def test_values_are_those_of_the_matrix_of_tokens(masked: bool) -> None:
    batches = [drawn(4, 5, 7), drawn(2, 3, 7, seed=1)]
    masks = [drawn(*each.shape[:2], seed=2) > 0 if masked else None for each in batches]
    state = ActivationSpectra.init()
    for index, (x, mask) in enumerate(zip(batches, masks, strict=True)):
        state = state.update("layer", signals(x, mask), batch=index)
    rows = torch.cat([x[mask] if mask is not None else x.flatten(0, 1) for x, mask in zip(batches, masks, strict=True)])
    found = state.finalise()["layer"]
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(rows) / len(rows) ** 0.5, rtol=1e-10, atol=0)
    assert found.shape == (7, len(rows))
    assert found.squared_norm == pytest.approx(float(rows.square().sum(1).mean()), rel=1e-12)
    statistics = found.statistics()
    assert statistics["activation_effective_rank"] == pytest.approx(
        effective_rank(torch.linalg.svdvals(rows)), rel=1e-9
    )
    assert statistics["activation_redundancy"] == pytest.approx(1 - statistics["activation_effective_rank"] / 7)


def test_there_are_no_more_values_than_tokens() -> None:
    found = ActivationSpectra.init().update("layer", signals(drawn(1, 3, 9))).finalise()["layer"]
    assert (len(found.singular_values), found.shape) == (3, (9, 3))
    assert found.statistics()["activation_redundancy"] < 1 - found.statistics()["activation_effective_rank"] / 9


def test_activations_of_known_rank_measure_it() -> None:
    x = torch.linalg.qr(drawn(40, 3)).Q @ torch.linalg.qr(drawn(8, 3, seed=1)).Q.T
    statistics = ActivationSpectra.init().update("layer", signals(x.view(4, 10, 8))).finalise()["layer"].statistics()
    for name in ("effective_rank", "stable_rank", "participation_ratio", "energy_rank_90"):
        assert statistics[f"activation_{name}"] == pytest.approx(3, rel=1e-6)
    assert statistics["activation_redundancy"] == pytest.approx(5 / 8, rel=1e-6)


def test_modules_with_one_input_hold_one_moment() -> None:
    model, batches = Attention().double(), [drawn(3, 4, 6), drawn(2, 4, 6, seed=1)]
    names = ["q", "k", "v", "o"]
    state = measure(model, batches, loss, names, {"": ActivationSpectra.init()})[""]
    assert state.keys["q"] == state.keys["k"] == state.keys["v"] != state.keys["o"]
    assert len(state.moments) == 2
    found = state.finalise()
    assert list(found) == names
    rows = torch.cat([each.flatten(0, 1) for each in batches])
    expected = torch.linalg.svdvals(rows) / len(rows) ** 0.5
    for name in ("q", "k", "v"):
        torch.testing.assert_close(found[name].singular_values, expected, rtol=1e-10, atol=0)
    alone = measure(model, batches, loss, ["o"], {"": ActivationSpectra.init()})[""].finalise()["o"]
    assert torch.equal(found["o"].singular_values, alone.singular_values)


def test_a_shared_moment_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    update = SecondMoment.update

    def counting(self: SecondMoment, *args: Tensor, columns: Tensor | None = None) -> SecondMoment:
        calls.append(self)
        return update(self, *args, columns=columns)

    monkeypatch.setattr(SecondMoment, "update", counting)
    batches = [drawn(3, 4, 6), drawn(2, 4, 6, seed=1)]
    measure(Attention().double(), batches, loss, ["q", "k", "v", "o"], {"": ActivationSpectra.init()})
    assert len(calls) == 2 * len(batches)


def test_modules_that_part_later_keep_what_they_have_in_common() -> None:
    common, own = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    state = ActivationSpectra.init()
    for name in ("a", "b"):
        state = state.update(name, signals(common), batch=0)
    assert len(state.moments) == 1
    state = state.update("a", signals(common), batch=1).update("b", signals(own), batch=1)
    assert len(state.moments) == 2
    for name, second in (("a", common), ("b", own)):
        rows = torch.cat([common, second]).flatten(0, 1)
        found = state.finalise()[name].singular_values
        torch.testing.assert_close(found, torch.linalg.svdvals(rows) / len(rows) ** 0.5, rtol=1e-10, atol=0)


def test_equal_memory_with_other_content_is_another_input() -> None:
    memory = drawn(2, 3, 4)
    first = memory.clone()
    state = ActivationSpectra.init().update("a", signals(memory))
    memory.copy_(drawn(2, 3, 4, seed=1))
    state = state.update("b", signals(memory))
    found = state.finalise()
    for name, x in (("a", first), ("b", memory)):
        exact = torch.linalg.svdvals(x.flatten(0, 1)) / 6**0.5
        torch.testing.assert_close(found[name].singular_values, exact, rtol=1e-10, atol=0)


class Ids(nn.Module):
    """Three layers, each on one-hot inputs of its own: all of these have the same sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 8) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        hot = nn.functional.one_hot(ids, 64).to(self.a.weight.dtype)
        made: Tensor = self.a(hot[:, 0]) + self.b(hot[:, 1]) + self.c(hot[:, 2])
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_lie_at_one_address_one_after_another_are_told_apart(dtype: torch.dtype) -> None:
    ids = torch.stack([torch.randint(0, most, (16, 8)) for most in (4, 32, 64)], dim=1)
    seen = measure(Ids().to(dtype), [ids], loss, ["a", "b", "c"], {"x": ActivationSpectra.init()})["x"]
    assert len(seen.moments) == 3
    for index, each in enumerate(seen.finalise().values()):
        shares = torch.bincount(ids[:, index].flatten(), minlength=64) / 128
        torch.testing.assert_close(each.singular_values.square(), shares.sort(descending=True).values.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_k_and_v_share_their_moments_in_any_precision(dtype: torch.dtype) -> None:
    begun = {"x": ActivationSpectra.init(), "factors": KFAC.init()}
    seen = measure(Attention().to(dtype), [drawn(2, 3, 6).to(dtype)], loss, ["q", "k", "v", "o"], begun)
    assert len(seen["x"].moments) == 2
    assert len({id(each.inputs.squares) for each in seen["factors"].moments.values()}) == 2


def test_one_input_under_two_masks_is_two_inputs() -> None:
    x, mask = drawn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    state = ActivationSpectra.init().update("a", signals(x)).update("b", signals(x, mask))
    assert len(state.moments) == 2
    assert state.finalise()["b"].shape == (4, 3)


def test_a_state_is_a_value() -> None:
    begun = ActivationSpectra.init()
    once = begun.update("a", signals(drawn(2, 3, 4)))
    twice = once.update("a", signals(drawn(2, 3, 4, seed=1)))
    assert not begun.keys
    assert (once.finalise()["a"].shape, twice.finalise()["a"].shape) == ((4, 6), (4, 12))


@pytest.mark.parametrize("dense_limit", [2048, 4], ids=["dense", "sketched"])
def test_states_of_parts_merge_to_that_of_the_whole(dense_limit: int) -> None:
    model, batches = Attention().double(), [drawn(3, 4, 6, seed=seed) for seed in range(4)]
    names = ["q", "k", "o"]

    def begun() -> dict[str, ActivationSpectra]:
        return {"": ActivationSpectra.init(dense_limit=dense_limit, size=5)}

    whole = measure(model, batches, loss, names, begun())[""].finalise()
    one, two = (measure(model, part, loss, names, begun())[""] for part in (batches[:1], batches[1:]))
    for merged in (one.merge(two), pickle.loads(pickle.dumps(two)).merge(one)):
        assert len(merged.moments) == 2
        for name, expected in whole.items():
            found = merged.finalise()[name]
            assert found.shape == expected.shape
            assert found.squared_norm == pytest.approx(expected.squared_norm, rel=1e-12)
            torch.testing.assert_close(found.singular_values, expected.singular_values, rtol=1e-8, atol=0)


def test_a_merge_keeps_modules_that_only_one_has_seen() -> None:
    one = ActivationSpectra.init().update("a", signals(drawn(2, 3, 4)))
    two = ActivationSpectra.init().update("b", signals(drawn(2, 5, 4, seed=1)))
    assert {name: each.shape for name, each in one.merge(two).finalise().items()} == {"a": (4, 6), "b": (4, 10)}


def test_large_inputs_are_sketched_with_an_exact_trace_and_bounds() -> None:
    decay = 0.9 ** torch.arange(60, dtype=torch.float64)
    x = drawn(8, 20, 60) * decay
    begun = ActivationSpectra.init(dense_limit=50, size=20)
    state = begun.update("a", signals(x)).update("b", signals(x.flip(0)))
    moments = list(state.moments.values())
    assert moments[0].sums is not None
    assert moments[0].sums.shape == (60, 20)
    assert moments[0].probes is moments[1].probes
    found = state.finalise()["a"]
    exact = torch.linalg.svdvals(x.flatten(0, 1)) / 160**0.5
    assert len(found.singular_values) == 5
    assert (found.singular_values <= exact[:5] * (1 + 1e-9)).all()
    torch.testing.assert_close(found.singular_values, exact[:5], rtol=0.06, atol=0)
    assert found.squared_norm == pytest.approx(float(exact.square().sum()), rel=1e-12)
    statistics = found.statistics()
    assert (
        statistics["activation_effective_rank"] < effective_rank(exact) < statistics["activation_effective_rank_upper"]
    )
    held = float(found.singular_values.square().sum()) / found.squared_norm
    assert statistics["activation_unresolved_energy"] == pytest.approx(1 - held, abs=1e-9)


def test_ids_of_an_embedding_have_the_spectrum_of_their_shares() -> None:
    model = nn.Sequential(nn.Embedding(50, 3, padding_idx=0))
    ids = torch.tensor([[1, 7, 7, 7], [1, 9, 0, 0]])
    mask = ids != 0

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        losses: Tensor = (model(batch).square().sum(-1) * (batch != 0)).sum(1)
        return losses

    state = measure(
        model, [ids[:1], ids[1:]], loss_of, ["0"], {"": ActivationSpectra.init()}, mask=lambda batch: batch != 0
    )[""]
    found = state.finalise()["0"]
    assert found.shape == (50, int(mask.sum()))
    expected = torch.tensor([3, 2, 1, 0, 0, 0], dtype=torch.float64) / 6
    torch.testing.assert_close(found.singular_values, expected.sqrt(), rtol=1e-6, atol=0)
    assert found.squared_norm == pytest.approx(1, rel=1e-6)
    merged = state.merge(state).finalise()["0"]
    torch.testing.assert_close(merged.singular_values[:3], found.singular_values[:3])
    assert next(iter(state.moments.values())).sums is None  # no ids × ids


def test_patches_are_the_inputs_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3)).double()
    image = drawn(2, 2, 5, 6)
    found = measure(model, [image], loss, ["0"], {"": ActivationSpectra.init()})[""].finalise()["0"]
    patches = nn.functional.unfold(image, 3).mT.flatten(0, 1)
    exact = torch.linalg.svdvals(patches) / len(patches) ** 0.5
    torch.testing.assert_close(found.singular_values, exact, rtol=1e-9, atol=1e-12)


def test_wrong_arguments_are_refused() -> None:
    begun = ActivationSpectra.init()
    with pytest.raises(ValueError, match="every module must have seen at least one real token, got none"):
        begun.finalise()
    with pytest.raises(ValueError, match="every module must have seen at least one real token, got none"):
        begun.update("a", signals(drawn(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))).finalise()
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        ActivationSpectra.init(size=0)
    with pytest.raises(ValueError, match=r"vectors must be finite.*For module 'a', batch 3\."):
        begun.update("a", signals(drawn(1, 2, 3) * torch.nan), batch=3)
    with pytest.raises(ValueError, match=r"\(N, T, 3\).*For module 'a'\."):
        begun.update("a", signals(drawn(1, 2, 3))).update("a", signals(drawn(1, 2, 4)))
    with pytest.raises(ValueError, match=r"other must begin with the same \(dense_limit, size, seed\)"):
        begun.merge(ActivationSpectra.init(seed=1))
    wide = begun.update("a", signals(drawn(1, 2, 4)))
    with pytest.raises(ValueError, match=r"other must begin with the same .*; for module 'a'"):
        begun.update("a", signals(drawn(1, 2, 3))).merge(wide)
