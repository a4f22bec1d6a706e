"""The observer against Grams written out by autograd, example by example."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from flowra_allocation import BottleneckObserver
from flowra_allocation.observe import check_growable
from flowra_testing.explicit_grams import assert_same, explicit, losses
from flowra_testing.stand_in_adapter import StandInAdapter, hang
from flowra_testing.tiny_models import batch, bert_classifier, called_twice, mlp

QUERY = "bert.encoder.layer.0.attention.self.query"
OUTPUT = "bert.encoder.layer.1.output.dense"
POOLER = "bert.pooler.dense"
RANKS = {QUERY: 3, OUTPUT: 2, POOLER: 2}


def model_and_layers(
    *, dtype: torch.dtype = torch.float64
) -> tuple[BertForSequenceClassification, dict[str, StandInAdapter]]:
    model = bert_classifier().to(dtype)
    layers = hang(model, RANKS)
    generator = torch.Generator().manual_seed(7)
    for layer in layers.values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64))
    return model, layers


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_grams_are_those_of_each_example_s_own_loss_without_padding(loss: str) -> None:
    model, layers = model_and_layers()
    data = batch(num_labels=3)
    with BottleneckObserver(model, layers, loss=loss) as observer:  # type: ignore[arg-type]
        getattr(losses(model, data), loss)().backward()
    assert_same(observer.total(), explicit(model, layers, data))
    assert observer.total()[QUERY].tokens == data["attention_mask"].sum()
    assert observer.total()[POOLER].tokens == 3  # pooled: one token per example, no padding


def test_the_model_s_own_loss_is_a_mean() -> None:
    model, layers = model_and_layers()
    data = batch(num_labels=3)
    with BottleneckObserver(model, layers, loss="mean") as observer:
        model(**data).loss.backward()
    assert_same(observer.total(), explicit(model, layers, data))


def test_batches_add_up_one_entry_each() -> None:
    model, layers = model_and_layers()
    batches = [batch(num_labels=3, seed=1), batch(num_labels=3, seed=2, size=5, length=9)]
    with BottleneckObserver(model, layers, loss="mean") as observer:
        for data in batches:
            losses(model, data).mean().backward()
    assert [len(each) for each in observer.grams.values()] == [2, 2, 2]
    first, second = (explicit(model, layers, data) for data in batches)
    assert_same(observer.total(), {name: first[name] + second[name] for name in first})


def test_two_forward_passes_before_their_backward_passes_keep_their_own_masks() -> None:
    model, layers = model_and_layers()
    batches = [batch(num_labels=3, seed=1), batch(num_labels=3, seed=2, size=5, length=9)]
    with BottleneckObserver(model, layers, loss="mean") as observer:
        waiting = [losses(model, data).mean() for data in batches]
        for each in waiting:
            each.backward()
    first, second = (explicit(model, layers, data) for data in batches)
    assert_same(observer.total(), {name: first[name] + second[name] for name in first})


def test_passes_without_gradient_are_not_counted() -> None:
    model, layers = model_and_layers()
    data = batch(num_labels=3)
    with BottleneckObserver(model, layers, loss="mean") as observer:
        with torch.no_grad():
            model.eval()(**data)
        with torch.inference_mode():
            model(**batch(num_labels=3, size=6))
        losses(model, data).mean().backward()
        with torch.no_grad():
            model(**batch(num_labels=3, size=6))
        model(**data)  # forward alone
    assert_same(observer.total(), explicit(model, layers, data))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("sketch", [False, True], ids=["grams", "with_sketch"])
def test_gradient_checkpointing_counts_once(reentrant: bool, sketch: bool) -> None:
    data = batch(num_labels=3)
    grams, energies = [], []
    for checkpointing in (False, True):
        model, layers = model_and_layers()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})  # transformers 5 renames it
            model.enable_input_require_grads()
        generator = torch.Generator().manual_seed(0)
        with BottleneckObserver(model, layers, loss="mean", sketch=sketch, generator=generator) as observer:
            losses(model, data).mean().backward()
        assert [len(each) for each in observer.grams.values()] == [1, 1, 1]
        grams.append(observer.total())
        energies.append([each.leading_direction()[0] for each in observer.sketches.values()])
    assert_same(grams[1], grams[0])
    assert energies[1] == pytest.approx(energies[0], rel=1e-4)


def test_a_module_called_twice_counts_its_examples_once() -> None:
    model = called_twice().double()
    layers = hang(model, {"shared": 2})
    layers["shared"].lora_B.data.normal_()
    x = torch.randn(5, 8, dtype=torch.float64)
    with BottleneckObserver(model, layers, loss="sum") as observer:
        model(x).square().sum().backward()
    total = observer.total()["shared"]
    assert total.tokens == 10
    assert total.examples == 5


def test_a_batch_given_as_one_dictionary_counts_its_examples() -> None:
    class FromDictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(dtype=torch.float64)

        def forward(self, data: dict[str, Tensor]) -> Tensor:
            output: Tensor = self.inner(data["x"])
            return output

    model = FromDictionary()
    layers = hang(model, {"inner.up": 2})
    layers["inner.up"].lora_B.data.normal_()
    with BottleneckObserver(model, layers, loss="mean") as observer:
        model({"x": torch.randn(5, 8, dtype=torch.float64)}).square().sum(1).mean().backward()
    assert observer.total()["inner.up"].examples == 5


def test_observing_changes_no_bit_of_loss_or_gradient() -> None:
    data, found = batch(num_labels=3), []
    for observed in (False, True):
        model, layers = model_and_layers(dtype=torch.float32)
        if observed:
            generator = torch.Generator().manual_seed(0)
            with BottleneckObserver(model, layers, loss="mean", sketch=True, generator=generator):
                loss = model(**data).loss
                loss.backward()
        else:
            loss = model(**data).loss
            loss.backward()
        found.append([loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
    assert all(torch.equal(plain, watched) for plain, watched in zip(*found, strict=True))


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


@pytest.mark.parametrize("sketch", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_observers_and_hooks_are_gone_on_exit_even_after_an_exception(sketch: bool, fails: bool) -> None:
    model, layers = model_and_layers()
    before = hooks(model)
    observer = BottleneckObserver(model, layers, loss="mean", sketch=sketch, generator=torch.Generator().manual_seed(0))

    def observe() -> None:
        with observer:
            assert all(layer.observer is not None for layer in layers.values())
            assert hooks(model) != before
            losses(model, batch(num_labels=3)).mean().backward()
            if fails:
                raise RuntimeError("the batch is lost")

    if fails:
        with pytest.raises(RuntimeError, match="the batch is lost"):
            observe()
    else:
        observe()
    assert all(layer.observer is None for layer in layers.values())
    assert hooks(model) == before
    seen = len(observer.grams[QUERY])
    losses(model, batch(num_labels=3)).mean().backward()
    assert len(observer.grams[QUERY]) == seen == 1


def test_layers_of_rank_zero_are_skipped_and_still_sketched() -> None:
    model = bert_classifier()
    layers = hang(model, {QUERY: 0, OUTPUT: 2})
    layers[OUTPUT].lora_B.data.normal_()
    generator = torch.Generator().manual_seed(0)
    with BottleneckObserver(model, layers, loss="mean", sketch=True, generator=generator) as observer:
        assert layers[QUERY].observer is None
        model(**batch(num_labels=3)).loss.backward()
    assert list(observer.total()) == [OUTPUT]
    assert observer.sketches[QUERY].leading_direction()[0] > 0


def test_the_sketch_sees_the_weight_gradient_that_the_adapter_cannot_follow() -> None:
    model = mlp(dtype=torch.float64)
    layers = hang(model, {"up": 2})
    layer = layers["up"]
    layer.lora_B.data.normal_()
    model.up.weight.requires_grad_(True)
    x = torch.randn(5, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with BottleneckObserver(model, layers, loss="mean", sketch=True, generator=generator) as observer:
        model(x).square().mean().backward()
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    normal = model.up.weight.grad - b @ torch.linalg.pinv(b) @ model.up.weight.grad
    normal -= normal @ torch.linalg.pinv(a) @ a
    _, sigma, vt = torch.linalg.svd(normal)
    energy, row = observer.sketches["up"].leading_direction()
    assert energy == pytest.approx(sigma[0].item() ** 2, rel=1e-3)
    assert abs(row.double() @ vt[0]).item() == pytest.approx(1, abs=1e-3)


def test_no_sketch_is_made_unless_asked_for() -> None:
    model, layers = model_and_layers()
    with BottleneckObserver(model, layers, loss="mean") as observer:
        losses(model, batch(num_labels=3)).mean().backward()
    assert observer.sketches == {}


def test_an_observer_that_saw_nothing_says_so() -> None:
    model, layers = model_and_layers()
    with BottleneckObserver(model, layers, loss="mean") as observer:
        pass
    with pytest.raises(ValueError, match="observer must see at least one forward and backward pass, got none"):
        observer.total()


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    model, layers = model_and_layers()
    data = batch(num_labels=3)
    with BottleneckObserver(model, layers, loss="mean", sketch=True, generator=torch.Generator()) as observer:
        model(**data).loss.backward()
        (model(**data).loss * float("inf")).backward()
    assert_same(observer.total(), explicit(model, layers, data))
    assert all(
        torch.isfinite(direction).all()
        for each in observer.sketches.values()
        for direction in [each.leading_direction()[1]]
    )


def test_gradients_in_half_precision_are_widened_before_they_are_scaled() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).half()
    layers = hang(model, {"0": 2})
    layers["0"].lora_B.data.fill_(1.0)
    with BottleneckObserver(model, layers, loss="mean") as observer:
        model(torch.ones(64, 8, dtype=torch.float16)).sum().mul(1000).backward()
    assert observer.total()["0"].finite  # 64 · 12,000 would not be


def test_an_update_that_learns_but_never_shows_its_bottleneck_is_an_error() -> None:
    model = mlp()
    layers = hang(model, {"up": 2, "down": 2})
    hidden = layers["up"]
    hidden.forward = lambda x: x @ (hidden.lora_B @ hidden.lora_A).mT  # type: ignore[method-assign]
    with BottleneckObserver(model, layers, loss="mean") as observer:
        model(torch.ones(3, 8)).sum().backward()
    with pytest.raises(
        ValueError, match="layers must show their bottleneck where directions are ranked by flow, got none from 'up'"
    ):
        observer.total()


def test_growth_by_gradients_is_refused_for_what_is_not_linear() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    layers = {"0": hang(mlp(), {"up": 2})["up"]}
    with pytest.raises(
        ValueError, match="layers must be linear where new directions follow the gradient, got Conv1d at '0'"
    ):
        check_growable(model, layers)
    with pytest.raises(ValueError, match="got a part of a weight at '0:q'"):
        check_growable(model, {"0:q": layers["0"]})
