"""Coefficients learned by entropy, on networks whose best coefficients are known."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowra_compose import AdapterState, LowRankUpdate, learn_coefficients, merge_adapters, merge_updates
from flowra_compose.learned_coefficients import MergedModel, prediction_entropy

B = 6.0
Call = Callable[..., Any]


def random_update(m: int, n: int, rank: int, *, scaling: float = 1.0, seed: int = 0) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rank, n), (m, rank)))
    return LowRankUpdate(a, b, scaling)


class Pair(nn.Module):
    """Two layers side by side, for two tasks with two inputs and two classes each.

    Of each task the base is sure of the second input, by B, and knows nothing of the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(4, 2, bias=False, dtype=torch.float64) for _ in range(2))
        for layer in (self.left, self.right):
            layer.weight.data = torch.tensor([[0, B, 0, B], [0, 0, 0, 0]], dtype=torch.float64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.cat([self.left(x), self.right(x)])}


def trade(best: float, task: int) -> LowRankUpdate:
    """An update that gives a task's first input what it takes from the second: they are equally sure at λ = best."""
    column = [0.0] * 4
    column[2 * task : 2 * task + 2] = [B / (2 * best), -B / (2 * best)]
    return LowRankUpdate(torch.tensor([column], dtype=torch.float64), torch.tensor([[1], [0]], dtype=torch.float64))


def examples(task: int) -> Tensor:
    return torch.eye(4, dtype=torch.float64)[2 * task : 2 * task + 2]


def logits(call: Call, batch: Tensor, task: int) -> Tensor:
    return call(x=batch)["logits"]


BEST = [{"left": 0.4, "right": 0.7}, {"left": 0.6, "right": 0.55}]
UPDATES = [{name: trade(best, task) for name, best in one.items()} for task, one in enumerate(BEST)]
BATCHES = [[examples(task)] for task in range(2)]


def test_layer_wise_coefficients_are_the_best_there_are() -> None:
    learned = learn_coefficients(Pair().eval(), UPDATES, BATCHES, logits, initial=0.2, learning_rate=0.02, steps=300)
    for found, best in zip(learned.weights, BEST, strict=True):
        assert isinstance(found, Mapping)
        assert found == pytest.approx(best, abs=1e-4)
    # at the best, every prediction has a margin of B / 2
    p = torch.tensor([B / 2, 0.0], dtype=torch.float64).softmax(0)
    assert learned.entropies[-1] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-6)
    assert learned.entropies[-1] < 0.65 * learned.entropies[0]


def test_task_wise_coefficients_are_the_best_there_are() -> None:
    updates = [{name: trade(best, task) for name in ("left", "right")} for task, best in enumerate((0.4, 0.7))]
    learned = learn_coefficients(Pair().eval(), updates, BATCHES, logits, per="task", learning_rate=0.02, steps=300)
    assert learned.weights == pytest.approx((0.4, 0.7), abs=1e-4)


def test_what_hurts_goes_to_the_lower_bound_and_what_helps_to_the_upper() -> None:
    helps = LowRankUpdate(torch.tensor([[3.0, 0, 0, 0]]), torch.tensor([[1.0], [0]]))
    hurts = LowRankUpdate(torch.tensor([[-1.0, 0, 0, 0]]), torch.tensor([[1.0], [0]]))
    learned = learn_coefficients(
        Pair().eval(), [{"left": helps}, {"left": hurts}], [[examples(0)]] * 2, logits, learning_rate=0.1, steps=60
    )
    assert learned.weights == ({"left": 1.0}, {"left": 0.0})
    wide = learn_coefficients(
        Pair().eval(),
        [{"left": helps}, {"left": hurts}],
        [[examples(0)]] * 2,
        logits,
        per="task",
        bounds=(-0.5, 2.0),
        initial=0.7,
        learning_rate=0.1,
        steps=60,
    )
    assert wide.weights == (2.0, -0.5)


def test_entropy_falls_at_every_step_of_a_small_rate() -> None:
    told: list[tuple[int, float]] = []
    learned = learn_coefficients(
        Pair().eval(), UPDATES, BATCHES, logits, learning_rate=1e-3, steps=40, progress=lambda *each: told.append(each)
    )
    assert all(later < earlier for earlier, later in zip(learned.entropies, learned.entropies[1:], strict=False))
    assert told == list(enumerate(learned.entropies, start=1))


def test_the_weights_go_into_an_ordinary_merge() -> None:
    model = Pair().eval()
    learned = learn_coefficients(model, UPDATES, BATCHES, logits, learning_rate=0.02, steps=300)
    merged = merge_updates(UPDATES, learned.weights, rule="task_arithmetic")
    for name, update in merged.items():
        model.get_submodule(name).weight.data += update.delta_weight()
    with torch.no_grad():
        entropies = [float(prediction_entropy(model(examples(task))["logits"])) for task in range(2)]
    assert sum(entropies) / 2 == pytest.approx(learned.entropies[-1], abs=1e-6)


def test_updates_of_several_tasks_and_a_module_of_one_task_alone() -> None:
    updates = [{"left": UPDATES[0]["left"]}, UPDATES[1]]
    learned = learn_coefficients(Pair().eval(), updates, BATCHES, logits, steps=3)
    assert [sorted(one) for one in learned.weights if isinstance(one, Mapping)] == [["left"], ["left", "right"]]
    assert set(merge_updates(updates, learned.weights)) == {"left", "right"}


# what it leaves alone


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def buffered_case() -> tuple[nn.Module, list[dict[str, LowRankUpdate]], list[list[Tensor]]]:
    updates = [
        {"net.0": random_update(5, 4, 2, seed=seed), "net.3": random_update(3, 5, 1, seed=seed)} for seed in (1, 2)
    ]
    generator = torch.Generator().manual_seed(3)
    return Buffered().eval(), updates, [[torch.randn(6, 4, generator=generator) for _ in range(5)] for _ in range(2)]


def test_model_updates_and_batches_are_bit_equal_afterwards_and_no_gradient_is_left() -> None:
    model, updates, batches = buffered_case()
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(updates)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    learn_coefficients(model, updates, batches, lambda call, batch, task: call(batch), steps=5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    for one, other in zip(updates, kept, strict=True):
        assert all(torch.equal(one[name].lora_A, other[name].lora_A) for name in one)
        assert all(torch.equal(one[name].lora_B, other[name].lora_B) for name in one)


def test_a_seed_gives_the_same_coefficients_and_another_seed_others() -> None:
    model, updates, batches = buffered_case()

    def learn(seed: int) -> object:
        torch.manual_seed(seed + 17)  # what was drawn before plays no part
        torch.randn(3)
        return learn_coefficients(model, updates, batches, lambda call, batch, task: call(batch), steps=6, seed=seed)

    state = torch.get_rng_state()
    assert learn(0) == learn(0)
    assert learn(0) != learn(1)
    torch.set_rng_state(state)
    learn_coefficients(model, updates, batches, lambda call, batch, task: call(batch), steps=2)
    assert torch.equal(torch.get_rng_state(), state)


# gradients


@pytest.mark.parametrize("columns", [1, 2], ids=["task", "module"])
def test_gradients_are_finite_differences(columns: int) -> None:
    model, updates, batches = buffered_case()
    merged = MergedModel(model.double(), updates, fan_in_fan_out=False)
    assert merged.names == ["net.0", "net.3"]

    def entropy(coefficients: Tensor) -> Tensor:
        return prediction_entropy(merged.with_coefficients(coefficients, {})(batches[0][0].double()))

    point = torch.tensor([[0.3, 0.8], [0.6, 0.1]], dtype=torch.float64)[:, :columns].clone().requires_grad_()
    assert torch.autograd.gradcheck(entropy, (point,), eps=1e-6, atol=1e-8, rtol=1e-6)
    (gradient,) = torch.autograd.grad(entropy(point), point)
    assert gradient.shape == (2, columns)
    assert float(gradient.abs().min()) > 1e-5


def test_the_first_step_goes_against_the_gradient_by_the_learning_rate() -> None:
    model, updates, batches = buffered_case()
    merged = MergedModel(model.double(), updates, fan_in_fan_out=False)
    doubled = [[batches[task][0].double()] for task in range(2)]
    point = torch.full((2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    losses = [prediction_entropy(merged.with_coefficients(point, {})(one[0])) for one in doubled]
    (gradient,) = torch.autograd.grad(sum(losses, torch.zeros((), dtype=torch.float64)), point)
    learned = learn_coefficients(
        model, updates, doubled, lambda call, batch, task: call(batch), learning_rate=1e-3, steps=1
    )
    moved = torch.tensor([[one["net.0"], one["net.3"]] for one in learned.weights if isinstance(one, Mapping)])
    torch.testing.assert_close(moved.double(), 0.5 - 1e-3 * gradient.sign(), rtol=0, atol=1e-6)
    assert learned.entropies == (pytest.approx(float(sum(one.detach() for one in losses)) / 2),)


# any layer and layout


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), as that of transformers does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(6)
        self.square = Conv1D(6, 6)
        self.plain = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.out(self.plain(self.square(self.norm(x))))


def zoo_updates(seed: int) -> dict[str, LowRankUpdate]:
    def of(m: int, n: int, rank: int, layout: Any = "linear", kernel: tuple[int, ...] = ()) -> LowRankUpdate:  # noqa: ANN401
        plain = random_update(m, n, rank, scaling=0.5, seed=seed)
        return LowRankUpdate(plain.lora_A, plain.lora_B, plain.scaling, layout=layout, kernel=kernel)

    return {
        "embed": of(4, 7, 2, "embedding"),
        "conv": of(6, 6, 2, "conv", (3,)),
        "norm.weight": of(6, 1, 1, "vector"),
        "out.bias": of(3, 1, 1, "vector"),
        "square": of(6, 6, 3),
        "plain": of(6, 6, 2),
    }


@pytest.mark.parametrize("noted", [True, False])
def test_the_merged_model_is_the_model_with_the_updates_added_in_every_layout(noted: bool) -> None:
    model, updates = Zoo().eval(), [zoo_updates(1), zoo_updates(2)]
    merged = MergedModel(model, updates, fan_in_fan_out=noted)
    coefficients = torch.rand(2, len(merged.names), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = copy.deepcopy(model)
    for column, name in enumerate(merged.names):
        key = name if name in ("norm.weight", "out.bias") else f"{name}.weight"
        parameter = expected.get_parameter(key)
        for task, one in enumerate(updates):
            delta = one[name].delta_weight()
            delta = delta.T if name in ("embed", "square") else delta.reshape(parameter.shape)
            parameter.data += coefficients[task, column] * delta
    ids = torch.tensor([[0, 3, 6, 1, 1], [2, 4, 5, 6, 0]])
    with torch.no_grad():
        found = merged.with_coefficients(coefficients, {})(ids=ids)
        torch.testing.assert_close(found, expected(ids), rtol=0, atol=1e-10)
        assert float((found - model(ids)).abs().max()) > 0.1


def test_a_weight_that_two_modules_share_is_updated_in_both_and_by_one_name_only() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).double().eval()
    model[1].weight = model[0].weight
    one = random_update(5, 4, 2)
    call = MergedModel(model, [{"1": one}], fan_in_fan_out=False).with_coefficients(torch.ones(1, 1), {})
    weight = model[0].weight.detach() + one.delta_weight()
    torch.testing.assert_close(call(torch.arange(5)), weight @ weight.T)
    other = LowRankUpdate(random_update(4, 5, 1).lora_A, random_update(4, 5, 1).lora_B, layout="embedding")
    with pytest.raises(ValueError, match=r"of parameters that no other module shares, got '0' and '1' of '0\.weight'"):
        MergedModel(model, [{"1": one, "0": other}], fan_in_fan_out=False)


def test_heads_of_their_own_shape_stand_in_for_those_of_the_model() -> None:
    model, updates, batches = buffered_case()
    generator = torch.Generator().manual_seed(5)
    heads = [
        {"net.3.weight": torch.randn(classes, 5, generator=generator), "net.3.bias": torch.zeros(classes)}
        for classes in (2, 4)
    ]
    updates = [{"net.0": one["net.0"]} for one in updates]
    seen: dict[int, torch.Size] = {}

    def scores(call: Call, batch: Tensor, task: int) -> Tensor:
        seen[task] = call(batch).shape
        return call(batch)

    with_heads = learn_coefficients(model, updates, batches, scores, heads=heads, steps=3)
    assert seen == {0: (6, 2), 1: (6, 4)}

    def by_hand(call: Call, batch: Tensor, task: int) -> Tensor:
        hidden: list[Tensor] = []
        handle = model.net[3].register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
        call(batch)
        handle.remove()
        return hidden[0] @ heads[task]["net.3.weight"].T

    assert with_heads.entropies == pytest.approx(
        learn_coefficients(model, updates, batches, by_hand, steps=3).entropies
    )


def test_a_base_in_bfloat16_is_called_in_bfloat16() -> None:
    model, updates, batches = buffered_case()
    dtypes = set()

    def scores(call: Call, batch: Tensor, task: int) -> Tensor:
        out = call(batch.bfloat16())
        dtypes.add(out.dtype)
        return out

    learned = learn_coefficients(model.bfloat16(), updates, batches, scores, per="task", steps=2)
    assert dtypes == {torch.bfloat16}
    assert all(isinstance(one, float) and math.isfinite(one) for one in learned.weights)


# entropy


def test_entropy_of_known_distributions() -> None:
    even, sure = torch.zeros(3, 2, 4), torch.tensor([[0.0, 1e4, 0.0]])
    assert float(prediction_entropy(even)) == pytest.approx(math.log(4))
    assert float(prediction_entropy(sure)) == 0.0
    p = torch.tensor([0.5, 0.25, 0.25])
    assert float(prediction_entropy(p.log())) == pytest.approx(1.5 * math.log(2))
    assert prediction_entropy(even.bfloat16()).dtype == torch.float32


# weights by module, in any merge


def test_weights_by_module_are_those_of_each_module() -> None:
    updates = [
        {"a": random_update(4, 5, 2, seed=1), "b": random_update(3, 6, 1, seed=2)},
        {"b": random_update(3, 6, 2)},
    ]
    found = merge_updates(updates, [{"a": 0.5, "b": -2.0}, {"b": 3.0}])
    torch.testing.assert_close(found["a"].delta_weight(), 0.5 * updates[0]["a"].delta_weight())
    expected = -2 * updates[0]["b"].delta_weight() + 3 * updates[1]["b"].delta_weight()
    torch.testing.assert_close(found["b"].delta_weight(), expected)
    mixed = merge_updates(updates, [{"a": 1.0, "b": -2.0}, 3.0])
    torch.testing.assert_close(mixed["b"].delta_weight(), expected)
    adapters = [AdapterState(updates=one) for one in updates]
    torch.testing.assert_close(
        merge_adapters(adapters, [{"a": 0.5, "b": -2.0}, {"b": 3.0}]).updates["b"].delta_weight(), expected
    )


def test_a_weight_of_0_at_a_module_leaves_it_alone() -> None:
    one, two = random_update(4, 5, 2, seed=1), random_update(4, 5, 2, seed=2)
    found = merge_updates([{"a": one, "b": one}, {"a": two, "b": two}], [{"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0}])
    torch.testing.assert_close(found["a"].delta_weight(), two.delta_weight())
    torch.testing.assert_close(found["b"].delta_weight(), one.delta_weight())
    assert set(merge_updates([{"a": one, "b": one}], [{"a": 0.0, "b": 1.0}])) == {"b"}
    assert merge_updates([{"a": one}], [{"a": 0.0}]) == {}


def test_weights_by_module_must_name_the_modules_and_be_finite() -> None:
    one = random_update(4, 5, 2)
    message = r"weights by module must name the modules that their task updates, got none for \['b'\] and one for"
    with pytest.raises(ValueError, match=message + r" unknown \['c'\]; of task 1"):
        merge_updates([{"a": one}, {"a": one, "b": one}], [1.0, {"a": 1.0, "c": 2.0}])
    with pytest.raises(ValueError, match=r"weights must be finite numbers, got {'a': nan} for adapters\[0\]"):
        merge_adapters([AdapterState(updates={"a": one})], [{"a": math.nan}])


# refusals


def refused(match: str, **changes: Any) -> None:  # noqa: ANN401
    given: dict[str, Any] = {
        "model": Pair().eval(),
        "updates": UPDATES,
        "batches": BATCHES,
        "logits": logits,
        "steps": 1,
    }
    with pytest.raises(ValueError, match=match):
        learn_coefficients(**{**given, **changes})


def unfitting(name: str) -> Sequence[Mapping[str, LowRankUpdate]]:
    return [{name: random_update(3, 4, 1)}]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": Pair().train()}, r"model must be in evaluation mode, got training mode. Call model.eval\(\)"),
        ({"updates": []}, "updates must hold at least one module of one task, got none"),
        ({"batches": [[examples(0)]]}, r"batches must be at least one for each of 2 tasks, got \[1\]"),
        ({"batches": [[examples(0)], []]}, r"batches must be at least one for each of 2 tasks, got \[1, 0\]"),
        ({"heads": [{}]}, "heads must be one for each of 2 tasks, got 1"),
        ({"heads": [{}, {"head.weight": torch.ones(1)}]}, r"must name parameters or buffers of the model, got \['head"),
        ({"bounds": (1.0, 0.0)}, r"bounds must be two finite numbers, the smaller one first, got \(1.0, 0.0\)"),
        ({"bounds": (0.0, math.inf)}, "bounds must be two finite numbers"),
        ({"initial": 1.5}, r"initial must be within bounds \(0.0, 1.0\), got 1.5"),
        ({"initial": math.nan}, "initial must be within bounds"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"steps": 0}, "steps must be ≥ 1, got 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], match: str) -> None:
    refused(match, **changes)


def test_updates_that_do_not_fit_the_model_are_refused() -> None:
    batches = [[examples(0)]]
    refused(
        r"got linear \(3, 4\) for 'middle.weight', which is none. Give the base",
        updates=unfitting("middle"),
        batches=batches,
    )
    refused(r"for 'left.weight', which is torch.float64 \(2, 4\)", updates=unfitting("left"), batches=batches)
    two = [unfitting("left")[0], UPDATES[0]]
    refused(r"got linear \(2, 4\) and linear \(3, 4\) for 'left.weight'", updates=two)


def test_logits_without_classes_or_gradient_and_an_entropy_that_is_not_finite_are_refused() -> None:
    refused(
        r"logits must be \(…, classes\) with at least two classes, got \(4, 1\)",
        logits=lambda call, batch, task: call(batch)["logits"][:, :1],
    )
    refused(
        "logits must come from the merged model, with gradients, got none for task 0",
        logits=lambda call, batch, task: call(batch)["logits"].detach(),
    )
    refused(
        "entropy must be finite, got nan for task 1 at step 1. Look at the logits",
        logits=lambda call, batch, task: call(batch)["logits"] * (math.nan if task else 1),
    )
