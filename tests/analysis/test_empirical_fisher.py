import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowra_analysis import EmpiricalFisher, Estimate, Signals, fisher_trace, squared_gradient_norms

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/flowra_fisher.json").read_text())
Batch = dict[str, Tensor]
NAMES = ["query", "key", "value", "shared", "head"]


class Network(nn.Module):
    """Attention over tokens with a padding mask, one module called twice, a head on a pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.query, self.key, self.value, self.shared = (nn.Linear(6, 6) for _ in range(4))
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 6)
        self.double()

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embedding(tokens)
        scores = (self.query(h) @ self.key(h).mT).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        h = self.norm(h + scores.softmax(-1) @ self.value(h))
        h = h + self.shared(torch.relu(self.shared(self.dropout(h))))
        pooled = (h * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        logits: Tensor = self.head(pooled)
        return logits


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for num, length in [(3, 5), (2, 9), (4, 2)]:
        lengths = torch.randint(1, length + 1, (num, 1), generator=generator)
        made.append({
            "tokens": torch.randint(11, (num, length), generator=generator),
            "attention_mask": (torch.arange(length) < lengths).long(),
            "labels": torch.randint(3, (num,), generator=generator),
        })
    return made


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["tokens"], batch["attention_mask"]), batch["labels"], reduction="none")


def exact(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Squared gradient norms by autograd, one unpadded example at a time."""
    norms: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches():
        for tokens, mask, label in zip(*batch.values(), strict=True):
            real = mask.bool()
            alone = {"tokens": tokens[real][None], "attention_mask": mask[real][None], "labels": label[None]}
            weights = [model.get_submodule(name).weight for name in names]
            for name, gradient in zip(names, torch.autograd.grad(loss(model, alone).sum(), weights), strict=True):
                norms[name].append(gradient.square().sum())
    return {name: torch.stack(values) for name, values in norms.items()}


def test_golden_norms_and_trace() -> None:
    x, g = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("x", "grad_out"))
    expected = torch.tensor(GOLDEN["per_example_grads"], dtype=torch.float64).square().sum((1, 2))
    torch.testing.assert_close(squared_gradient_norms(x, g), expected, rtol=1e-8, atol=0)
    found = EmpiricalFisher.init().update("layer", Signals(x, g)).finalise()["layer"]
    assert found.mean == pytest.approx(GOLDEN["trace_empirical_fisher"], rel=1e-8)
    assert found.standard_error == pytest.approx(float(expected.std()) / math.sqrt(2), rel=1e-8)


def test_trace_is_not_the_square_of_the_mean_gradient() -> None:
    x, g = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("x", "grad_out"))
    square_of_mean = sum(map(sum, GOLDEN["square_of_mean_gradient_NOT_fisher"]))
    assert EmpiricalFisher.init().update("layer", Signals(x, g)).finalise()["layer"].mean > 2 * square_of_mean


@pytest.mark.parametrize("length", [1, 3, 4, 5, 30], ids=lambda length: f"T={length}")
def test_ghost_norm_equals_the_norm_of_the_formed_gradient(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, length, 4, dtype=torch.float64, generator=generator)  # m n = 20: both branches are taken
    g = torch.randn(3, length, 5, dtype=torch.float64, generator=generator)
    formed = torch.einsum("ntm,ntk->nmk", g, x).square().sum((1, 2))
    torch.testing.assert_close(squared_gradient_norms(x, g), formed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    x, g = torch.full((1, 64, 8), 30.0, dtype=dtype), torch.full((1, 64, 8), 30.0, dtype=dtype)
    found = squared_gradient_norms(x, g)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(64 * (64 * 900) ** 2, rel=1e-6)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_trace_and_standard_error_are_those_of_per_example_autograd(frozen: bool) -> None:
    model = Network().eval()
    expected = exact(model, NAMES)
    model.requires_grad_(not frozen)
    found = fisher_trace(model, batches(), loss, NAMES)
    assert list(found) == NAMES
    for name, norms in expected.items():
        assert found[name].mean == pytest.approx(float(norms.mean()), rel=1e-10)
        assert found[name].standard_error == pytest.approx(float(norms.std()) / math.sqrt(9), rel=1e-10)


def test_mask_changes_nothing_where_padding_reaches_neither_attention_nor_loss() -> None:
    model = Network()
    plain = fisher_trace(model, batches(), loss, NAMES)
    masked = fisher_trace(model, batches(), loss, NAMES, mask=lambda batch: batch["attention_mask"])
    assert all(masked[name] == pytest.approx(plain[name], rel=1e-12) for name in NAMES)


def test_mask_leaves_padding_out_where_the_loss_reads_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    x = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [2], [5]])
    read_all = fisher_trace(model, [x], lambda model, x: model(x).sum((1, 2)), ["0"], mask=lambda _: mask)
    read_real = fisher_trace(model, [x], lambda model, x: (model(x) * mask[..., None]).sum((1, 2)), ["0"])
    assert read_all["0"] == pytest.approx(read_real["0"], rel=1e-12)


def test_batching_does_not_matter() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()

    def squares(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum(1)

    whole = fisher_trace(model, [x], squares, ["0", "2"])
    for size in (1, 5):
        split = fisher_trace(model, x.split(size), squares, ["0", "2"])
        assert all(split[name] == pytest.approx(whole[name], rel=1e-12) for name in whole)


def test_two_halves_merged_equal_the_whole_and_states_are_values() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(10, 3, size, dtype=torch.float64, generator=generator) for size in (4, 5))
    empty = EmpiricalFisher.init()
    whole = empty.update("a", Signals(x, g))
    first, second = (
        empty.update("a", Signals(x[:3], g[:3])),
        empty.update("a", Signals(x[3:], g[3:])).update("b", Signals(x, g)),
    )
    merged = first.merge(second)
    assert merged.finalise()["a"] == pytest.approx(whole.finalise()["a"], rel=1e-12)
    assert merged.finalise()["b"] == pytest.approx(whole.finalise()["a"], rel=1e-12)
    assert second.merge(first).finalise()["a"] == pytest.approx(merged.finalise()["a"], rel=1e-12)
    assert first.moments["a"].num_examples == 3
    assert empty.moments == {}
    assert empty.merge(whole) == whole


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_equal_examples_have_no_standard_error_at_any_scale(scale: float) -> None:
    x = torch.full((4, 2, 3), scale, dtype=torch.float64)
    assert EmpiricalFisher.init().update("a", Signals(x, x)).finalise()["a"] == Estimate(
        pytest.approx(36 * scale**4), 0.0
    )


def test_model_and_gradients_are_left_as_they_were() -> None:
    model = Network().train()
    model.norm.eval()
    model.key.weight.requires_grad_(False)
    kept = torch.ones_like(model.query.weight)
    model.query.weight.grad = kept
    fired: list[int] = []
    model.query.weight.register_hook(lambda g: fired.append(1))
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        fisher_trace(model, batches(), loss, NAMES)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["key.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["query.weight"]
    assert model.query.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert not fired
    assert not any(module._forward_hooks for module in model.modules())


def test_nan_names_the_module_the_batch_and_the_example() -> None:
    model = nn.Linear(4, 2)
    good, bad = torch.ones(2, 4), torch.ones(2, 4)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"must be finite, got nan for '', batch 1, example 1\. Check the loss"):
        fisher_trace(model, [good, bad], lambda model, batch: model(batch).sum(1), [""])


def test_model_is_restored_after_an_error() -> None:
    model = Network().train()
    with pytest.raises(ValueError, match=r"must be reached by the loss, got no gradient for \['unused'\]; in batch 0"):
        fisher_trace(model, batches(), loss, ["query", "unused"])
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_module_whose_rows_are_not_examples_is_refused() -> None:
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.router(x.flatten(0, 1)).view_as(x).sum((1, 2))

    with pytest.raises(ValueError, match=r"one row per example, got \{'router': 6\} for 2 examples; in batch 0"):
        fisher_trace(Flattening(), [torch.ones(2, 3, 4)], lambda model, batch: model(batch), ["router"])


@pytest.mark.parametrize(
    "per_example_loss",
    [
        lambda model, batch: model(batch).sum(),
        lambda model, batch: model(batch),
        lambda model, batch: model(batch).sum(1).detach(),
    ],
    ids=["batch sum", "not reduced", "detached"],
)
def test_loss_that_is_not_per_example_is_refused(per_example_loss: object) -> None:
    with pytest.raises(ValueError, match=r"per_example_loss must give losses \(N,\) that depend on the modules, got"):
        fisher_trace(nn.Linear(4, 2), [torch.ones(2, 4)], per_example_loss, [""])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [([], "at least 2 examples, got none"), ([torch.ones(1, 4)], r"at least 2 examples, got \{'': 1\}")],
)
def test_fewer_than_two_examples_are_refused(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_trace(nn.Linear(4, 2), inputs, lambda model, batch: model(batch).sum(1), [""])


def test_signals_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shapes \(N, T, n\) and \(N, T, m\), got \(2, 3, 4\) and \(2, 4\)"):
        squared_gradient_norms(torch.ones(2, 3, 4), torch.ones(2, 4))


def test_empty_batch_adds_nothing() -> None:
    state = EmpiricalFisher.init().update("a", Signals(torch.ones(2, 1, 3), torch.ones(2, 1, 3)))
    assert state.update("a", Signals(torch.ones(0, 1, 3), torch.ones(0, 1, 3))) == state


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_real_bert_agrees_with_per_example_autograd(frozen: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == 2 * 6 + 2

    def bert_loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["tokens"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    expected = dict.fromkeys(names, 0.0)
    for batch in batches():
        for value in bert_loss(model, batch):
            weights = [model.get_submodule(name).weight for name in names]
            gradients = torch.autograd.grad(value, weights, retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                expected[name] += float(gradient.square().sum()) / 9
    found = fisher_trace(model.requires_grad_(not frozen), batches(), bert_loss, names)
    assert {name: each.mean for name, each in found.items()} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("made", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_layers_whose_weight_is_made_anew_are_not_taken_for_tied(made: Callable[..., nn.Module], frozen: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(made(nn.Linear(6, 6)) for _ in range(6))).double().eval().requires_grad_(not frozen)
    names, x = [str(index) for index in range(6)], torch.randn(5, 6, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    found = fisher_trace(model, [x], loss, names)
    alone = {name: fisher_trace(model, [x], loss, [name])[name].mean for name in names}
    assert {name: each.mean for name, each in found.items()} == pytest.approx(alone, rel=1e-12)
