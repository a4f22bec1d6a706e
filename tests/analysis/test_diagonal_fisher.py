import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flowra_analysis import DiagonalFisher, EmpiricalFisher, Signals, diagonal_fisher, measure, weight_matrix

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_fisher.json").read_text())
REDUCTIONS = ["none", "rows", "columns"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reduced(diagonal: Tensor, reduction: str) -> Tensor:
    return {"none": diagonal, "rows": diagonal.sum(1), "columns": diagonal.sum(0)}[reduction]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_golden_diagonal_and_its_sums(reduction: str) -> None:
    x, g = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("x", "grad_out"))
    expected = reduced(torch.tensor(GOLDEN["diagonal_fisher"], dtype=torch.float64), reduction)
    found = DiagonalFisher.init(reduction=reduction).update("layer", Signals(x, g)).finalise()["layer"]
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=0)
    assert found.trace.mean == pytest.approx(GOLDEN["trace_empirical_fisher"], rel=1e-8)


class Ids(nn.Module):
    """An embedding with a padding id, whose table is the last layer's weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx=0)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.table(ids)))
        return output


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(torch.tanh(self.layer(x)))
        return output


def ids() -> Tensor:
    return torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], str, Tensor]] = {
    "vector": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), "0", draw(6, 6)),
    "short-sequence": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), "0", draw(6, 2, 6)),
    "long-sequence": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh()), "0", draw(6, 9, 6)),
    "Conv1D": (lambda: nn.Sequential(Conv1D(4, 6), nn.Tanh()), "0", draw(6, 2, 6)),
    "called-twice": (Twice, "layer", draw(6, 3, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh()), "0", draw(6, 3, 5, 7)),
    "wide-convolution": (lambda: nn.Sequential(nn.Conv1d(8, 6, 3), nn.Tanh()), "0", draw(6, 8, 4)),
    "grouped-convolution": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh()), "0", draw(6, 4, 4, 5)),
    "wide-groups": (lambda: nn.Sequential(nn.Conv1d(16, 12, 3, groups=2), nn.Tanh()), "0", draw(6, 16, 4)),
    "depthwise": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Tanh()), "0", draw(6, 4, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Tanh()), "0", draw(6, 4, 5)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.Tanh()), "0", ids()),
    "tied": (Ids, "table", ids()),
}


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch).flatten(1)
    return (y * torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)).sum(1) + y.square().sum(1)


def squares_by_autograd(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """Squares of the weight's gradient for each example, ``(N, m, n)``, as the weight matrix is laid out."""
    layer = model.get_submodule(name)
    made = []
    for example in inputs.split(1):
        shell = copy.deepcopy(layer)
        (gradient,) = torch.autograd.grad(losses(model, example).sum(), [layer.weight])
        shell.weight = nn.Parameter(gradient, requires_grad=False)
        made.append(weight_matrix(shell).square())
    return torch.stack(made)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_diagonal_is_that_of_per_example_autograd(case: str, reduction: str) -> None:
    build, name, inputs = CASES[case]
    model = build().double()
    squares = squares_by_autograd(model, name, inputs)
    names = [name, "head"] if case == "tied" else [name]
    begun = {"diagonal": DiagonalFisher.init(reduction=reduction), "trace": EmpiricalFisher.init()}
    seen = measure(model, [inputs[:2], inputs[2:]], losses, names, begun)
    found = seen["diagonal"].finalise()[name]
    torch.testing.assert_close(found.values, reduced(squares.mean(0), reduction), rtol=1e-10, atol=1e-12)
    norms = squares.sum((1, 2))
    assert found.trace.mean == pytest.approx(float(norms.mean()), rel=1e-10)
    assert found.trace.standard_error == pytest.approx(float(norms.std()) / math.sqrt(6), rel=1e-10)
    trace = seen["trace"].finalise()[name]
    assert float(found.values.sum()) == pytest.approx(trace.mean, rel=1e-10)
    assert found.trace == pytest.approx(trace, rel=1e-10)


@given(
    num=st.integers(2, 5),
    length=st.integers(1, 8),
    groups=st.integers(1, 3),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    chunk=st.sampled_from([1, 30, 2**22]),
    seed=st.integers(0, 2**31),
)
def test_rows_columns_and_entries_all_sum_to_the_trace(
    num: int, length: int, groups: int, rows: int, columns: int, chunk: int, seed: int
) -> None:
    x, g = draw(num, length, groups * columns, seed=seed), draw(num, length, groups * rows, seed=seed + 1)
    signals = Signals(x, g, groups=groups)
    trace = EmpiricalFisher.init().update("a", signals).finalise()["a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagonal_fisher, "CHUNK_NUMBERS", chunk)
        found = {
            reduction: DiagonalFisher.init(reduction=reduction).update("a", signals).finalise()["a"]
            for reduction in REDUCTIONS
        }
    assert found["none"].values.shape == (groups * rows, columns)
    for each in found.values():
        assert (each.values >= 0).all()
        assert float(each.values.sum()) == pytest.approx(trace.mean, rel=1e-9)
        assert each.trace == pytest.approx(trace, rel=1e-9)
    torch.testing.assert_close(found["none"].values.sum(1), found["rows"].values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["none"].values.sum(0), found["columns"].values, rtol=1e-9, atol=1e-9)


def test_gradients_are_formed_a_few_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagonal_fisher, "CHUNK_NUMBERS", 3 * 20)
    sizes = []
    form = diagonal_fisher._gradients

    def spy(x: Tensor, g: Tensor) -> list[Tensor]:
        formed = list(form(x, g))
        sizes.extend(each.numel() for each in formed)
        return formed

    monkeypatch.setattr(diagonal_fisher, "_gradients", spy)
    signals = Signals(draw(8, 9, 5), draw(8, 9, 4))
    for reduction in REDUCTIONS:
        DiagonalFisher.init(reduction=reduction).update("a", signals)
    assert sizes == [60, 60, 40] * 3


@pytest.mark.parametrize("reduction", ["rows", "columns"])
def test_sums_of_a_wide_layer_form_no_gradient(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagonal_fisher, "_gradients", None)  # calling it would fail
    signals = Signals(draw(3, 10, 40), draw(3, 10, 60))
    found = DiagonalFisher.init(reduction=reduction).update("a", signals).finalise()["a"].values
    formed = torch.einsum("ntm,ntk->nmk", signals.g, signals.x).square().mean(0)
    torch.testing.assert_close(found, reduced(formed, reduction), rtol=1e-10, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_squared_in_float32_and_summed_in_double(dtype: torch.dtype, reduction: str) -> None:
    signals = Signals(torch.full((2, 64, 8), 30.0, dtype=dtype), torch.full((2, 64, 8), 30.0, dtype=dtype))
    found = DiagonalFisher.init(reduction=reduction).update("a", signals).finalise()["a"].values
    assert found.dtype == torch.float64
    assert float(found.sum()) == pytest.approx(64 * (64 * 900) ** 2, rel=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_examples_after_a_large_one_still_count(reduction: str) -> None:
    large, small = (
        Signals(torch.ones(1, 1, 1) * 1e4, torch.ones(1, 1, 1)),
        Signals(torch.ones(1, 1, 1), torch.ones(1, 1, 1)),
    )
    state = DiagonalFisher.init(reduction=reduction).update("a", large)
    for _ in range(100):  # each is below the rounding of the float32 sum, 1e8
        state = state.update("a", small)
    assert float(state.finalise()["a"].values) * 101 == pytest.approx(1e8 + 100, abs=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_states_are_values_that_merge(reduction: str) -> None:
    x, g = draw(10, 3, 4), draw(10, 3, 5, seed=1)
    empty = DiagonalFisher.init(reduction=reduction)
    whole = empty.update("a", Signals(x, g)).update("b", Signals(g, x)).finalise()
    first = empty.update("a", Signals(x[:3], g[:3]))
    second = empty.update("b", Signals(g, x)).update("a", Signals(x[3:], g[3:]))
    before = first.sums["a"].clone()
    for merged in (first.merge(second), second.merge(first), first.merge(empty).merge(second)):
        found = merged.finalise()
        for name, expected in whole.items():
            torch.testing.assert_close(found[name].values, expected.values, rtol=1e-12, atol=1e-12)
            assert found[name].trace == pytest.approx(expected.trace, rel=1e-12)
    first.update("a", Signals(x, g))
    assert torch.equal(first.sums["a"], before)
    assert not empty.sums


def test_an_embedding_is_not_changed_by_what_other_batches_saw() -> None:
    columns = torch.tensor([1, 4])
    signals = Signals(torch.eye(2).double().expand(3, 2, 2), draw(3, 2, 5), None, columns, 7)
    first = DiagonalFisher.init(reduction="columns").update("a", signals)
    before = first.sums["a"].clone()
    first.update("a", signals)
    assert torch.equal(first.sums["a"], before)
    assert before.nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("length", [1, 9], ids=["gram", "formed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_a_gradient_that_is_not_finite_is_refused_with_its_place(bad: float, length: int, reduction: str) -> None:
    x, g = draw(4, length, 4, dtype=torch.float32), draw(4, length, 5, dtype=torch.float32)
    g[2, 0, 1] = bad
    with pytest.raises(
        ValueError, match=r"must be finite, got (nan|inf) for 'head', batch 7, example 2\. Check the loss"
    ):
        DiagonalFisher.init(reduction=reduction).update("head", Signals(x, g), batch=7)


def test_a_batch_without_examples_changes_nothing() -> None:
    state = DiagonalFisher.init().update("a", Signals(draw(3, 2, 4), draw(3, 2, 5)))
    assert state.update("a", Signals(draw(0, 2, 4), draw(0, 2, 5))) is state


def test_one_example_is_too_few() -> None:
    with pytest.raises(ValueError, match=r"at least 2 examples, got \{'a': 1\}"):
        DiagonalFisher.init().update("a", Signals(draw(1, 2, 4), draw(1, 2, 5))).finalise()
    with pytest.raises(ValueError, match="at least 2 examples, got none"):
        DiagonalFisher.init().finalise()


def test_states_that_do_not_fit_are_refused() -> None:
    state = DiagonalFisher.init(reduction="rows").update("a", Signals(draw(3, 2, 4), draw(3, 2, 5)))
    with pytest.raises(ValueError, match=r"must fit sums \(5,\), got \(6,\) for 'a', batch 1"):
        state.update("a", Signals(draw(3, 2, 4), draw(3, 2, 6)), batch=1)
    with pytest.raises(ValueError, match=r"sums \(5,\), got \(6,\) for 'a'"):
        state.merge(DiagonalFisher.init(reduction="rows").update("a", Signals(draw(3, 2, 4), draw(3, 2, 6))))
    with pytest.raises(ValueError, match="reduction 'rows', got 'none'"):
        state.merge(DiagonalFisher.init())
    with pytest.raises(ValueError, match="reduction must be one of"):
        DiagonalFisher.init(reduction="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of 1 axes, got torch.float32"):
        DiagonalFisher(reduction="rows", sums={"a": torch.ones(5)}, traces=state.traces)
    with pytest.raises(ValueError, match=r"same modules, got \[\] and \['a'\]"):
        DiagonalFisher(reduction="rows", traces=state.traces)
