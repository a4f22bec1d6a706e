"""What a fused model answers: constant weights are a merge, one weight of 1 is one adapter, order means nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compose.fusion.families import FAMILIES, family, ids
from compose.fusion.stacks import (
    LEVELS,
    NAMES,
    adapter,
    adapters_of,
    constant,
    matrix,
    merged,
    randomised,
    stack,
    states,
)
from flowra_compose import AdapterState, merge_updates
from flowra_compose.fusion import Arrow, GateOptions, Routing, SpectR, StaticWeights, fuse, gates_for

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@torch.no_grad()
def answer(model: nn.Module, inputs: Tensor | None = None) -> Tensor:
    if hasattr(model, "blocks"):
        result: Tensor = model(states() if inputs is None else inputs)
        return result
    output = model(ids() if inputs is None else inputs)
    result = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits
    return result


def fused(
    model: nn.Module, adapters: dict[str, AdapterState], routing: Routing, inputs: Tensor | None = None
) -> Tensor:
    with fuse(model, adapters, routing):
        return answer(model, inputs)


# constant weights


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["stack", "gpt2", "bert"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gates_whose_matrix_is_zero_fuse_as_a_merge_does(kind: str, level: Any, count: int) -> None:  # noqa: ANN401 - a literal
    model = stack() if kind == "stack" else family(kind)
    adapters = adapters_of(model, kind, count)
    weights = [0.7, -0.4, 1.3][:count]
    gates = constant(gates_for(model, adapters, GateOptions(level=level)), weights)
    found = fused(model, adapters, gates)
    torch.testing.assert_close(found, answer(merged(model, adapters, weights)), **EXACT)
    assert (found - answer(model)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_it_does_so_in_models_whose_norms_count_in_float32(kind: str) -> None:
    model = family(kind)
    adapters = adapters_of(model, kind, 3)
    weights = [0.7, -0.4, 1.3]
    found = fused(model, adapters, constant(gates_for(model, adapters), weights))
    torch.testing.assert_close(found, answer(merged(model, adapters, weights)), rtol=1e-5, atol=1e-6)


def test_fresh_uniform_gates_are_the_mean_of_the_updates() -> None:
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    gates = gates_for(model, adapters, GateOptions(initial="uniform"))
    torch.testing.assert_close(fused(model, adapters, gates), answer(merged(model, adapters, [1 / 3] * 3)), **EXACT)


@pytest.mark.parametrize("kind", ["stack", "gpt2"])
def test_static_weights_are_a_merge_with_them(kind: str) -> None:
    model = stack() if kind == "stack" else family(kind)
    adapters = adapters_of(model, kind, 2)
    whole = merge_updates([dict(one.updates) for one in adapters.values()], [0.3, 0.9], rule="task_arithmetic")
    copied = merged(model, {"merged": AdapterState(updates=whole)}, [1.0])
    torch.testing.assert_close(fused(model, adapters, StaticWeights([0.3, 0.9])), answer(copied), **EXACT)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_one_hot_gate_is_that_adapter_alone(which: int, level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    alone = {NAMES[which]: adapters[NAMES[which]]}
    expected = answer(merged(model, alone, [1.0]))
    born = gates_for(model, adapters, GateOptions(level=level, primary=which))
    torch.testing.assert_close(fused(model, adapters, born), expected, rtol=1e-6, atol=1e-6)  # biases are float32
    set_to = constant(born, [float(index == which) for index in range(3)])
    torch.testing.assert_close(fused(model, adapters, set_to), expected, **EXACT)
    only = gates_for(model, alone, GateOptions(level=level))
    torch.testing.assert_close(fused(model, alone, only), expected, **EXACT)


# weights of each position


@pytest.mark.parametrize("level", LEVELS)
def test_outputs_are_those_of_the_equations_written_as_loops(level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    gates = randomised(gates_for(model, adapters, GateOptions(level=level))).double()

    def linear(name: str, x: Tensor, weights: Tensor | None) -> Tensor:
        module = model.get_submodule(name)
        output: Tensor = module(x)
        if level == "module" and name in gates.places:
            weights, _ = gates.weights(name, x)
        for index, one in enumerate(adapters.values()):
            if name in one.updates:
                assert weights is not None
                output = output + weights[..., index, None] * (x @ one.updates[name].delta_weight().T)
        return output

    with torch.no_grad():
        hidden = states()
        weights = gates.weights("", hidden)[0] if level == "step" else None
        for index in range(3):
            at = f"blocks.{index}"
            if level == "layer":
                weights, _ = gates.weights(at, hidden)
            inner = torch.tanh(linear(f"{at}.up", hidden, weights))
            hidden = hidden + linear(f"{at}.down", inner, weights) + linear(f"{at}.skip", hidden, weights)
        expected = model.head(hidden)
    torch.testing.assert_close(fused(model, adapters, gates), expected, **EXACT)


@given(order=st.permutations(range(3)), level=st.sampled_from(LEVELS))
def test_permuting_adapters_permutes_the_weights_and_nothing_else(order: list[int], level: Any) -> None:  # noqa: ANN401
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    shuffled = {NAMES[index]: adapters[NAMES[index]] for index in order}
    gates, other = (randomised(gates_for(model, adapters, GateOptions(level=level))).double() for _ in range(2))
    with torch.no_grad():
        for gate, permuted in zip(gates, other, strict=True):
            permuted.weight.copy_(gate.weight[order])
            permuted.bias.copy_(gate.bias[order])
    with fuse(model, adapters, gates) as fusion, fusion.recording() as record:
        expected = answer(model)
    with fuse(model, shuffled, other) as fusion, fusion.recording() as other_record:
        torch.testing.assert_close(answer(model), expected, **EXACT)
    assert list(record.weights) == list(other_record.weights)
    for place, (weights,) in record.weights.items():
        torch.testing.assert_close(other_record.weights[place][0], weights[..., order], **EXACT)


def routings(model: nn.Module, adapters: dict[str, AdapterState]) -> dict[str, Routing]:
    updates = [one.updates for one in adapters.values()]
    made: dict[str, Routing] = {
        level: randomised(gates_for(model, adapters, GateOptions(level=level))) for level in LEVELS
    }
    return made | {
        "static": StaticWeights([0.5, 0.2, 0.9]),
        "arrow": Arrow(updates, top_k=2),
        "spectr": SpectR(updates),
    }


@pytest.mark.parametrize("kind", ["stack", "gpt2"])
@pytest.mark.parametrize("routing", [*LEVELS, "static", "arrow", "spectr"])
def test_the_order_of_a_batch_does_not_matter(routing: str, kind: str) -> None:
    model = stack() if kind == "stack" else family(kind)
    adapters = adapters_of(model, kind, 3)
    inputs = states(size=4) if kind == "stack" else ids(size=4)
    order = torch.tensor([2, 0, 3, 1])
    with fuse(model, adapters, routings(model, adapters)[routing]):
        together = answer(model, inputs)
        torch.testing.assert_close(answer(model, inputs[order]), together[order], **EXACT)
        for index in range(4):
            torch.testing.assert_close(answer(model, inputs[index : index + 1]), together[index : index + 1], **EXACT)


@pytest.mark.parametrize("routing", LEVELS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_moved_by_its_gates(kind: str, routing: Any) -> None:  # noqa: ANN401 - a literal
    model = family(kind)
    adapters = adapters_of(model, kind)
    gates = gates_for(model, adapters, GateOptions(level=routing))
    born = fused(model, adapters, gates)
    with fuse(model, adapters, randomised(gates, size=2.0)) as fusion, fusion.recording() as record:
        assert (answer(model) - born).abs().max() > 1e-3
    assert record.weights.keys() == set(gates.places)
    flattened = (21, 2) if routing == "module" and kind in ("opt", "qwen2_moe") else (3, 7, 2)
    assert all(weights.shape in ((3, 7, 2), flattened) for (weights,) in record.weights.values())
    assert all(weights.std(dim=(0, 1)).max() > 1e-7 for (weights,) in record.weights.values())


def test_a_module_that_one_adapter_updates_has_that_update_times_its_weight() -> None:
    model = stack(layers=1)
    adapters = adapters_of(model, "stack", 3)
    gates = randomised(gates_for(model, adapters)).double()
    x = states()
    with fuse(model, adapters, gates) as fusion, fusion.recording() as record, torch.no_grad():
        model.blocks[0](x)
        model.blocks[0](x)  # after the first pass a module may be called by itself
        weights = record.weights["blocks.0"][-1]
        down = model.get_submodule("blocks.0.down")
        inner = states(width=16)
        found = down(inner)
    update = adapters["language"].updates["blocks.0.down"].delta_weight()
    assert [name for name, one in adapters.items() if "blocks.0.down" in one.updates] == ["language"]
    torch.testing.assert_close(found, down(inner) + weights[..., :1] * (inner @ update.T), **EXACT)


def test_the_record_of_a_module_s_own_gate_has_0_for_an_adapter_that_leaves_it_alone() -> None:
    model = stack(layers=1)
    adapters = adapters_of(model, "stack", 3)
    gates = randomised(gates_for(model, adapters, GateOptions(level="module"))).double()
    with fuse(model, adapters, gates) as fusion, fusion.recording() as record, torch.no_grad():
        model(states())
    for place, (weights,) in record.weights.items():
        for index, one in enumerate(adapters.values()):
            assert bool((weights[..., index] == 0).all()) is (place not in one.updates)
    assert not all("blocks.0.down" in one.updates for one in adapters.values())


def test_adapters_of_any_ranks_and_scalings_are_taken() -> None:
    model = stack()
    adapters = {str(rank): adapter(model, ("up", "down"), rank, seed=rank, size=0.1) for rank in (1, 3, 8, 17)}
    weights = [0.4, 0.3, -0.2, 0.1]
    torch.testing.assert_close(
        fused(model, adapters, StaticWeights(weights)), answer(merged(model, adapters, weights)), **EXACT
    )


@pytest.mark.parametrize("level", LEVELS)
def test_top_k_of_all_and_one_of_one_hot_change_nothing(level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    options: list[Callable[[], GateOptions]] = [
        lambda: GateOptions(level=level),
        lambda: GateOptions(level=level, top_k=3),
    ]
    first, second = (fused(model, adapters, randomised(gates_for(model, adapters, each()))) for each in options)
    assert torch.equal(first, second)
    born = fused(model, adapters, gates_for(model, adapters, GateOptions(level=level, top_k=1)))
    torch.testing.assert_close(born, answer(merged(model, {"style": adapters["style"]}, [1.0])), rtol=1e-6, atol=1e-6)


def test_a_sequence_of_modules_is_fused_as_any_model() -> None:
    inner = stack()
    model = nn.Sequential(inner.blocks[0], nn.Tanh(), inner.head)
    adapters = {"a": adapter(model, ("up",), 2), "b": adapter(model, ("down", "up"), 3, seed=1)}
    expected = merged(model, adapters, [0.5, 0.5])(states())
    gates = gates_for(model, adapters, GateOptions(level="module", initial="uniform"))
    with fuse(model, adapters, gates), torch.no_grad():
        torch.testing.assert_close(model(states()), expected, **EXACT)
    assert len(model) == 3


# what is switched off, and what is recorded


@pytest.mark.parametrize("level", LEVELS)
def test_within_disabled_the_base_answers(level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack()
    base = answer(model)
    adapters = adapters_of(model, "stack")
    with fuse(model, adapters, gates_for(model, adapters, GateOptions(level=level))) as fusion:
        with fusion.recording() as record, fusion.disabled():
            assert torch.equal(answer(model), base)
        assert record.weights == {}
        assert not torch.equal(answer(model), base)


def test_a_record_holds_what_was_used_and_its_entropy() -> None:
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    gates = gates_for(model, adapters, GateOptions(initial="uniform"))
    with fuse(model, adapters, gates) as fusion:
        with fusion.recording() as record:
            answer(model)
            answer(model, states(length=1))
        assert record.stacked().shape == (3, 2, 6, 3)
        torch.testing.assert_close(record.entropy(), torch.tensor(3.0, dtype=torch.float64).log())
        with fusion.recording() as empty:
            pass
        with pytest.raises(ValueError, match="shares must have been recorded, got none"):
            empty.entropy()
        with pytest.raises(ValueError, match="places must have weights for the same positions, got none"):
            empty.stacked()


@pytest.mark.parametrize("level", LEVELS)
def test_the_entropy_of_a_record_leaves_out_what_a_mask_leaves_out(level: Any) -> None:  # noqa: ANN401 - a literal
    model, hidden = stack(), states()
    adapters = adapters_of(model, "stack", 3)
    gates = randomised(gates_for(model, adapters, GateOptions(level=level)))
    mask = torch.ones(hidden.shape[:2], dtype=torch.long)
    mask[0, 2:] = 0
    with fuse(model, adapters, gates) as fusion, fusion.recording() as record:
        model(hidden)
    each = [torch.special.entr(shares[0]).sum(-1)[mask.bool()].mean() for shares in record.shares.values()]
    torch.testing.assert_close(record.entropy(mask), torch.stack(each).mean())
    assert not torch.isclose(record.entropy(mask), record.entropy())


def test_a_single_position_without_a_batch_is_fused() -> None:
    model, hidden = stack(), states()
    adapters = adapters_of(model, "stack")
    gates = randomised(gates_for(model, adapters, GateOptions(level="module")))
    with fuse(model, adapters, gates):
        torch.testing.assert_close(model(hidden[0, 0]), model(hidden)[0, 0])


def test_the_entropy_of_a_record_teaches_gates_to_decide() -> None:
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    gates = randomised(gates_for(model, adapters, GateOptions(initial="uniform")))
    optimizer = torch.optim.Adam([gate.weight for gate in gates], lr=0.1)
    with fuse(model, adapters, gates) as fusion:
        seen = []
        for _ in range(15):
            with fusion.recording() as record:
                model(states())
            loss = record.entropy()
            seen.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert seen[-1] < 0.5 * seen[0]


# dtypes


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_in_bfloat16_runs_with_adapters_in_float32(kind: str, level: Any) -> None:  # noqa: ANN401 - a literal
    exact = family(kind, dtype=torch.float32)
    adapters = adapters_of(exact, kind)
    model = family(kind, dtype=torch.bfloat16)
    gates = randomised(gates_for(model, adapters, GateOptions(level=level)))
    with fuse(model, adapters, gates) as fusion, fusion.recording() as record:
        found = answer(model)
    assert found.dtype == torch.bfloat16
    assert {each.dtype for calls in record.weights.values() for each in calls} == {torch.float32}
    assert {each.dtype for each in gates.parameters()} == {torch.float32}
    torch.testing.assert_close(found.float(), fused(exact, adapters, gates), rtol=0.1, atol=0.1)


def test_adapters_of_two_dtypes_are_counted_in_the_wider() -> None:
    model = stack()
    adapters = adapters_of(model, "stack")
    mixed = dict(adapters)
    mixed["task"] = adapter(stack(dtype=torch.float32), ("up", "skip"), 2, seed=1)
    torch.testing.assert_close(
        fused(model, mixed, StaticWeights([0.5, 1.0])), answer(merged(model, mixed, [0.5, 1.0])), rtol=1e-6, atol=1e-6
    )


def test_conv1d_is_read_as_the_transpose_that_it_keeps() -> None:
    model = family("gpt2")
    attention = model.get_submodule("transformer.h.0.attn.c_attn")
    assert matrix(attention).shape == (48, 16)
    adapters = {"a": adapter(model, ("c_attn",), 3)}
    torch.testing.assert_close(
        fused(model, adapters, StaticWeights([1.0])), answer(merged(model, adapters, [1.0])), **EXACT
    )


@pytest.mark.parametrize("level", LEVELS)
def test_no_batch_and_no_positions_are_fused(level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack()
    adapters = adapters_of(model, "stack")
    gates = randomised(gates_for(model, adapters, GateOptions(level=level))).double()
    with fuse(model, adapters, gates):
        for size, length in ((0, 5), (2, 0)):
            assert model(states(size=size, length=length)).shape == (size, length, 3)


def test_the_gate_of_a_step_looks_at_what_enters_the_first_block_be_it_adapted_or_not() -> None:
    model = stack()
    late = {name: adapter(model, ("1.up", "2.down"), 2, seed=seed) for seed, name in enumerate(("one", "other"))}
    gates = randomised(gates_for(model, late, GateOptions(level="step"))).double()
    x = states()
    with fuse(model, late, gates) as fusion, fusion.recording() as record:
        model(x)
    (weights,) = record.weights[""]
    assert torch.equal(weights, next(iter(gates))(x)[0])


def test_gates_count_in_float32_under_autocast() -> None:
    model = stack(dtype=torch.float32)
    adapters = adapters_of(model, "stack")
    gates = randomised(gates_for(model, adapters, GateOptions(level="step")))
    x = states(dtype=torch.float32)
    with fuse(model, adapters, gates) as fusion, fusion.recording() as record, torch.autocast("cpu", torch.bfloat16):
        model(x)
    (weights,) = record.weights[""]
    assert torch.equal(weights, next(iter(gates))(x)[0])


@pytest.mark.parametrize("level", LEVELS)
def test_a_fused_model_compiles_without_a_break_and_answers_alike(level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack()
    adapters = adapters_of(model, "stack")
    gates = randomised(gates_for(model, adapters, GateOptions(level=level))).double()
    x = states()
    with fuse(model, adapters, gates), torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(compiled(2 * x), model(2 * x), rtol=0, atol=1e-14)
