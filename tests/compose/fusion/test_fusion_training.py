"""Only gates learn, with or without checkpoints of activations, and taking the fusion off leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compose.fusion.families import FAMILIES, family, ids
from compose.fusion.stacks import LEVELS, Stack, adapter, adapters_of, randomised, stack, states
from flowra_compose import AdapterState
from flowra_compose.fusion import GateOptions, Gates, StaticWeights, fuse, gates_for
from flowra_compose.fusion.fusion import CHILD
from flowra_testing.tiny_models import llama_causal_lm


def outputs(model: nn.Module) -> Tensor:
    output = model(ids())
    result: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits
    return result


def factors(adapters: dict[str, AdapterState]) -> list[Tensor]:
    return [
        each for one in adapters.values() for update in one.updates.values() for each in (update.lora_A, update.lora_B)
    ]


def gradients(model: nn.Module, gates: Gates) -> list[Tensor]:
    gates.zero_grad(set_to_none=True)
    outputs(model).pow(2).mean().backward()
    return [each.grad.clone() for each in gates.parameters() if each.grad is not None]


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_only_gates_learn(kind: str, level: Any, rank: int | None) -> None:  # noqa: ANN401 - a literal
    model = family(kind, dtype=torch.float32).train()
    adapters = adapters_of(model, kind)
    base = copy.deepcopy(model.state_dict())
    kept = [each.clone() for each in factors(adapters)]
    gates = gates_for(model, adapters, GateOptions(level=level, rank=rank))
    before = copy.deepcopy(gates.state_dict())
    fusion = fuse(model, adapters, gates)
    learning = [each for each in model.parameters() if each.requires_grad]
    assert {id(each) for each in learning} == {id(each) for each in gates.parameters()}
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1)
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        outputs(model).pow(2).mean().backward()
        reached |= {name for name, each in gates.named_parameters() if each.grad is not None and each.grad.any()}
        optimizer.step()
    assert reached == {name for name, _ in gates.named_parameters()}
    fusion.remove()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.items())
    assert model.state_dict().keys() == base.keys()
    assert all(torch.equal(one, other) for one, other in zip(factors(adapters), kept, strict=True))
    assert all(each.grad is None for each in model.parameters())
    assert not any(torch.equal(tensor, gates.state_dict()[name]) for name, tensor in before.items())


def checkpointed(model: Any, *, reentrant: bool) -> None:  # noqa: ANN401 - transformers
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def to_checkpoint(kind: str, level: Any) -> tuple[Any, dict[str, AdapterState], Gates]:  # noqa: ANN401 - transformers
    """Return a model that trains, adapters of which one updates the last block only, and gates."""
    model = family(kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    last = ("2.self_attn.k_proj", "2.attn.c_proj", "2.attention.self.value")
    adapters = {**adapters_of(model, kind), "style": adapter(model, last, 3, seed=9)}
    return model, adapters, randomised(gates_for(model, adapters, GateOptions(level=level)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpoints_of_activations_give_the_same_gradients(kind: str, level: Any) -> None:  # noqa: ANN401 - a literal
    model, adapters, gates = to_checkpoint(kind, level)
    with fuse(model, adapters, gates):
        expected = gradients(model, gates)
        checkpointed(model, reentrant=False)
        for _ in range(2):
            found = gradients(model, gates)
            assert len(found) == len(expected) == len(list(gates.parameters()))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_reentrant_checkpoints_give_the_same_gradients_at_level_module(kind: str) -> None:
    model, adapters, gates = to_checkpoint(kind, "module")
    with fuse(model, adapters, gates):
        expected = gradients(model, gates)
        checkpointed(model, reentrant=True)
        model.enable_input_require_grads()
        for one, other in zip(gradients(model, gates), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("level", ["layer", "step"])
def test_reentrant_checkpoints_are_refused_where_a_gate_stands_outside_of_them(level: str) -> None:
    model, adapters, gates = to_checkpoint("llama", level)
    with fuse(model, adapters, gates):
        checkpointed(model, reentrant=True)
        model.enable_input_require_grads()
        with pytest.raises(RuntimeError, match="Checkpoint activations with use_reentrant=False"):
            outputs(model).pow(2).mean().backward()


class CheckpointedStack(Stack):
    """Blocks that are called, hooks and all, from a checkpoint, as in older versions of transformers."""

    reentrant = False

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(batch, positions, width)`` to ``(batch, positions, 3)``."""
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
        result: Tensor = self.head(hidden)
        return result


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_blocks_whose_hooks_run_again_in_a_checkpoint_give_the_same_gradients(level: Any, reentrant: bool) -> None:  # noqa: ANN401
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    gates = randomised(gates_for(model, adapters, GateOptions(level=level)))
    found = []
    for kind in (Stack, CheckpointedStack):
        model.__class__ = kind
        CheckpointedStack.reentrant = reentrant
        gates.zero_grad()
        with fuse(model, adapters, gates):
            loss = model(states().requires_grad_()).pow(2).sum()
            if level == "step" and reentrant and kind is CheckpointedStack:
                with pytest.raises(RuntimeError, match="Checkpoint activations with use_reentrant=False"):
                    loss.backward()
                return
            loss.backward()
        found.append([each.grad.clone() for each in gates.parameters() if each.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_gates_are_those_of_finite_differences(level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack(width=4, layers=2)
    adapters = adapters_of(model, "stack", 3)
    gates = randomised(gates_for(model, adapters, GateOptions(level=level))).double()
    inputs = states(width=4, length=2)
    with fuse(model, adapters, gates):

        def loss(*values: Tensor) -> Tensor:
            named = dict(zip((f"{CHILD}.routing.{name}" for name, _ in gates.named_parameters()), values, strict=True))
            result: Tensor = torch.func.functional_call(model, named, (inputs,)).pow(2).sum()
            return result

        assert torch.autograd.gradcheck(loss, tuple(each.detach().requires_grad_() for each in gates.parameters()))


# taken off


class Headed(nn.Module):
    """A stack with a buffer, a parameter that does not learn, and a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = stack()
        self.config = self.body.config
        self.body.head.bias.requires_grad_(False)
        self.seen = 0
        self.body.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.seen += 1

    def forward(self, hidden: Tensor) -> Tensor:
        """Ask the body."""
        result: Tensor = self.body(hidden)
        return result


def with_head(adapters: dict[str, AdapterState], name: str, head: dict[str, Tensor]) -> dict[str, AdapterState]:
    updates = {f"body.{key}": update for key, update in adapters[name].updates.items()}
    return {name: AdapterState(updates=updates, modules_to_save=head)}


def pair(model: Headed) -> dict[str, AdapterState]:
    """Two adapters with heads of their own."""
    made = adapters_of(model.body, "stack")
    heads = [
        {"body.head.weight": torch.full((3, 8), value, dtype=torch.float64), "body.head.bias": torch.ones(3).double()}
        for value in (0.25, 0.5)
    ]
    return with_head(made, "language", heads[0]) | with_head(made, "task", heads[1])


def trace(model: nn.Module) -> dict[str, Any]:
    """What a fusion could leave behind."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": {name: id(each) for name, each in model.named_parameters()},
        "flags": {name: each.requires_grad for name, each in model.named_parameters()},
        "children": [name for name, _ in model.named_modules()],
        "hooks": {
            name: (len(each._forward_hooks), len(each._forward_pre_hooks), len(each._backward_hooks))
            for name, each in model.named_modules()
        },
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["tensors"].keys() == expected["tensors"].keys()
    assert all(torch.equal(found["tensors"][name], tensor) for name, tensor in expected["tensors"].items())
    assert {key: each for key, each in found.items() if key != "tensors"} == {
        key: each for key, each in expected.items() if key != "tensors"
    }


@pytest.mark.parametrize("level", LEVELS)
def test_remove_leaves_no_trace(level: Any) -> None:  # noqa: ANN401 - a literal
    model = Headed()
    before, answer = trace(model), model(states()).detach()
    adapters = pair(model)
    gates = randomised(gates_for(model, adapters, GateOptions(level=level)))
    fusion = fuse(model, adapters, gates, heads_from="task")
    assert hasattr(model, CHILD)
    assert not torch.equal(model(states()), answer)
    assert torch.equal(model.body.head.weight, adapters["task"].modules_to_save["body.head.weight"])
    model(states()).sum().backward()
    fusion.remove()
    assert_same(trace(model), before)
    fusion.remove()
    assert_same(trace(model), before)
    assert torch.equal(model(states()), answer)
    assert model.seen == 4
    fuse(model, adapters, gates, heads_from="language").remove()
    assert_same(trace(model), before)


def test_an_error_inside_of_the_with_block_takes_the_fusion_off() -> None:
    model = Headed()
    before, adapters = trace(model), pair(model)
    with (
        pytest.raises(RuntimeError, match="of the training"),
        fuse(model, adapters, gates_for(model, adapters), heads_from="task"),
    ):
        raise RuntimeError("of the training")
    assert_same(trace(model), before)


@pytest.mark.parametrize(
    "head",
    [{"body.head.weight": torch.ones(3, 9)}, {"body.other.weight": torch.ones(3, 8)}],
    ids=["another shape", "another name"],
)
def test_heads_that_do_not_fit_are_refused_and_the_model_left_as_it_was(head: dict[str, Tensor]) -> None:
    model = Headed()
    before = trace(model)
    adapters = with_head(adapters_of(model.body, "stack"), "task", head)
    with pytest.raises(ValueError, match="heads must fit the model, got"):
        fuse(model, adapters, StaticWeights([1.0]))
    assert_same(trace(model), before)


def test_a_head_that_is_tied_to_embeddings_is_refused() -> None:
    model = llama_causal_lm(tied=True)
    before = trace(model)
    updates = adapter(model, ("q_proj",), 2).updates
    one = AdapterState(updates=updates, modules_to_save={"lm_head.weight": torch.ones(64, 32)})
    with pytest.raises(ValueError, match=r"got 'lm_head\.weight', which is 'model\.embed_tokens\.weight'\. Untie"):
        fuse(model, {"a": one}, StaticWeights([1.0]))
    assert_same(trace(model), before)


@pytest.mark.parametrize("after", range(1, 8))
def test_an_error_in_the_middle_of_fusing_leaves_the_model_as_it_was(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Headed()
    before, adapters = trace(model), pair(model)
    register, calls = nn.Module.register_forward_hook, []

    def failing(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - of torch
        calls.append(arguments)
        if len(calls) == after:
            raise MemoryError("no room for a hook")
        return register(*arguments, **options)

    monkeypatch.setattr(nn.Module, "register_forward_hook", failing)
    with pytest.raises(MemoryError, match="no room"):
        fuse(model, adapters, gates_for(model, adapters), heads_from="task")
    assert_same(trace(model), before)


def test_heads_that_differ_need_a_choice_and_equal_ones_do_not() -> None:
    model = Headed()
    adapters = pair(model)
    with pytest.raises(ValueError, match="modules_to_save must be equal in all adapters"):
        fuse(model, adapters, StaticWeights([1.0, 1.0]))
    with pytest.raises(ValueError, match=r"heads_from must be the name of an adapter, one of .*, got 'other'"):
        fuse(model, adapters, StaticWeights([1.0, 1.0]), heads_from="other")
    head = adapters["task"].modules_to_save["body.head.weight"]
    with fuse(model, {"task": adapters["task"]}, StaticWeights([1.0])):
        assert torch.equal(model.body.head.weight, head)


def test_a_model_that_moves_takes_its_fusion_along() -> None:
    model = stack(dtype=torch.float32)
    adapters = adapters_of(model, "stack")
    gates = gates_for(model, adapters)
    with fuse(model, adapters, gates):
        model.double()
        assert model(states()).dtype == torch.float64
        assert {each.dtype for each in gates.parameters()} == {torch.float64}
