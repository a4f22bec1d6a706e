"""One gate: the official numbers, how it is born, and its options."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from compose.fusion.stacks import LEVELS, adapters_of, randomised, stack, states
from flowra_compose import AdapterState, LowRankUpdate
from flowra_compose.fusion import Gate, GateOptions, Gates, StaticWeights, fuse, gates_for

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lora_flow_gate.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}


def golden_gate(case: dict[str, Any]) -> Gate:
    gate = Gate(2, 4, GateOptions(temperature=case["temperature"])).double()
    with torch.no_grad():
        gate.weight.copy_(torch.tensor(case["W_gate"]))
        gate.bias.copy_(torch.tensor(case["bias"][0]))
    return gate


def learned(adapters: int, width: int, options: GateOptions) -> Gate:
    return next(iter(randomised(Gates({"": width}, adapters, options)))).double()


# the official code


@pytest.mark.parametrize("name", CASES)
def test_golden_weights_of_the_official_gate(name: str) -> None:
    case = CASES[name]
    weights, shares = golden_gate(case)(torch.tensor(case["hidden_in"], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor(case["fusion_weights"], dtype=torch.float64), rtol=0, atol=2e-7)
    expected = torch.tensor(case["sum_over_loras"], dtype=torch.float64)
    torch.testing.assert_close(weights.sum(-1), expected, rtol=0, atol=2e-7)
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(expected))


def test_a_fresh_gate_has_the_official_start() -> None:
    gate = Gate(2, 4, GateOptions())
    assert gate.weight.tolist() == GOLDEN["initial_W_gate"]
    assert gate.bias.tolist() == GOLDEN["initial_bias"][0]


def test_golden_combination_of_two_adapters() -> None:
    case = GOLDEN["combine"]
    deltas = [torch.tensor(case[f"lora_delta_{name}"][0], dtype=torch.float64) for name in ("language", "task")]
    hidden = torch.tensor(CASES["trained_like"]["hidden_in"][0], dtype=torch.float64)
    inputs = torch.linalg.pinv(hidden)  # hidden @ inputs = 1, so an update of inputs @ delta gives delta
    adapters = {
        name: AdapterState(updates={"fc": LowRankUpdate.of_delta_weight((inputs @ delta).T)})
        for name, delta in zip(("language", "task"), deltas, strict=True)
    }
    model = nn.Module()
    model.fc = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.fc.weight)
    gates = gates_for(model, adapters, GateOptions(level="module"))
    next(iter(gates)).load_state_dict(golden_gate(CASES["trained_like"]).state_dict())
    with fuse(model, adapters, gates), torch.no_grad():
        combined = model.fc(hidden[None])
    torch.testing.assert_close(combined, torch.tensor(case["combined"], dtype=torch.float64), rtol=0, atol=2e-7)


def test_golden_counts_of_llama_2_7b() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
        )
        linear = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
        updates = {
            f"model.{name}": LowRankUpdate(torch.empty(64, one.in_features), torch.empty(one.out_features, 64), 0.25)
            for name, one in linear.items()
        }
    adapters = dict.fromkeys(("language", "task"), AdapterState(updates=updates))
    places = {level: _places(model, adapters, level) for level in LEVELS}
    counts = {level: sum(2 * width + 2 for width in widths) for level, widths in places.items()}
    assert counts == {"layer": GOLDEN["parameter_count"]["gate"], "step": 8_194, "module": 2_277_824}
    assert {level: len(widths) for level, widths in places.items()} == {"layer": 32, "step": 1, "module": 224}
    assert sum(each.parameters for each in updates.values()) == GOLDEN["parameter_count"]["lora_true"]


def _places(model: nn.Module, adapters: dict[str, AdapterState], level: Any) -> list[int]:  # noqa: ANN401 - a literal
    with torch.device("meta"):
        gates = gates_for(model, adapters, GateOptions(level=level))
    assert gates.num_parameters() == sum(2 * width + 2 for width in gates.widths.values())
    return list(gates.widths.values())


# birth


@given(adapters=st.integers(1, 5), primary=st.integers(-5, 4), low=st.booleans())
def test_a_gate_born_primary_gives_one_adapter_everything(adapters: int, primary: int, low: bool) -> None:
    primary = max(-adapters, min(primary, adapters - 1))
    weights, _ = Gate(adapters, 6, GateOptions(primary=primary, rank=1 if low else None)).double()(states(width=6))
    expected = torch.eye(adapters, dtype=torch.float64)[primary].expand_as(weights)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("adapters", [1, 2, 3, 8])
def test_a_gate_born_uniform_gives_all_the_same(adapters: int) -> None:
    weights, shares = Gate(adapters, 8, GateOptions(initial="uniform"))(states())
    assert torch.equal(weights, shares)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / adapters))


def test_a_gate_of_one_adapter_has_nothing_to_learn() -> None:
    for initial in ("primary", "uniform"):
        gate = Gate(1, 8, GateOptions(initial=initial))
        assert gate(states())[0].eq(1).all()
        assert not any(each.requires_grad for each in gate.parameters())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("adapters", [1, 2, 3])
def test_gates_have_k_d_plus_k_parameters_at_each_place(level: Any, adapters: int) -> None:  # noqa: ANN401 - a literal
    model = stack(width=8, layers=3)
    named = adapters_of(model, "stack", adapters)
    modules = {name for one in named.values() for name in one.updates}
    widths = {
        "layer": [8, 8, 8],
        "step": [8],
        "module": [model.get_submodule(name).weight.shape[1] for name in modules],
    }[level]
    gates = gates_for(model, named, GateOptions(level=level))
    assert gates.num_parameters() == sum(adapters * width + adapters for width in widths)
    assert len(gates.places) == len(widths)
    assert all(each.dtype == torch.float32 for each in gates.parameters())


# what it computes


def test_a_gate_is_a_softmax_of_scores_over_the_temperature_plus_the_bias() -> None:
    gate = learned(3, 8, GateOptions(temperature=0.7))
    hidden = states()
    expected = torch.softmax(hidden @ gate.weight.T / 0.7, dim=-1)
    weights, shares = gate(hidden)
    torch.testing.assert_close(shares, expected)
    torch.testing.assert_close(weights, expected + gate.bias)


@given(order=st.permutations(range(4)))
def test_permuting_the_rows_of_a_gate_permutes_its_weights(order: list[int]) -> None:
    gate, other = learned(4, 8, GateOptions()), learned(4, 8, GateOptions())
    with torch.no_grad():
        other.weight.copy_(gate.weight[order])
        other.bias.copy_(gate.bias[order])
    torch.testing.assert_close(other(states())[0], gate(states())[0][..., order])


def test_a_lower_temperature_decides_more() -> None:
    shares = [learned(3, 8, GateOptions(temperature=each))(states())[1] for each in (0.1, 1.0, 10.0)]
    entropies = [torch.special.entr(each).sum(-1).mean() for each in shares]
    assert entropies[0] < entropies[1] < entropies[2]


def test_a_gate_of_low_rank_is_a_gate_whose_matrix_is_the_product() -> None:
    low, full = learned(3, 8, GateOptions(rank=2)), learned(3, 8, GateOptions())
    with torch.no_grad():
        full.weight.copy_(low.weight_B @ low.weight_A)
        full.bias.copy_(low.bias)
    torch.testing.assert_close(low(states())[0], full(states())[0])
    assert sum(each.numel() for each in low.parameters()) == 2 * (3 + 8) + 3


def test_a_seed_fixes_a_gate_of_low_rank() -> None:
    rows = [Gate(3, 8, GateOptions(rank=2), seed=seed).weight_A for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_normed_gate_does_not_see_the_length_of_its_input() -> None:
    gate, hidden = learned(3, 8, GateOptions(gate_input="normed")), states()
    torch.testing.assert_close(gate(100 * hidden)[0], gate(hidden)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(learned(3, 8, GateOptions())(100 * hidden)[0], gate(hidden)[0], atol=0.1)


@given(top_k=st.integers(1, 4), seed=st.integers(0, 20))
def test_top_k_keeps_the_weights_of_the_largest_magnitude(top_k: int, seed: int) -> None:
    gate, all_of_them = (learned(4, 8, GateOptions(top_k=each)) for each in (top_k, None))
    weights, whole = gate(states(seed=seed))[0], all_of_them(states(seed=seed))[0]
    assert weights.ne(0).sum(-1).eq(top_k).all()
    kept = weights.ne(0)
    assert torch.equal(weights[kept], whole[kept])
    assert (whole.abs().where(kept, torch.inf).amin(-1) >= whole.abs().where(~kept, -1).amax(-1)).all()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_top_k_of_equals_keeps_them_all(count: int) -> None:
    gate = Gate(count, 4, GateOptions(initial="uniform", top_k=1))
    weights, _ = gate(torch.randn(6, 4))
    torch.testing.assert_close(weights, torch.full((6, count), 1 / count))


def test_top_k_at_birth_keeps_the_primary() -> None:
    weights, _ = Gate(3, 8, GateOptions(top_k=1, primary=1))(states())
    torch.testing.assert_close(weights, torch.eye(3, dtype=torch.float64)[1].expand_as(weights), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_gate_counts_in_float32_at_least(dtype: torch.dtype) -> None:
    gate = next(iter(randomised(Gates({"": 8}, 2, GateOptions()))))
    hidden: Tensor = states().to(dtype)
    weights, shares = gate(hidden)
    assert weights.dtype == shares.dtype == torch.promote_types(dtype, torch.float32)
    exact, _ = gate(hidden.double())
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-6)


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "token"}, "level must be one of layer, step, module, got 'token'"),
        ({"initial": "zero"}, "initial must be one of primary, uniform"),
        (
            {"initial": "uniform", "primary": 0},
            "primary must be left out with a uniform start, where all are alike, got 0",
        ),
        ({"gate_input": "raw"}, "gate_input must be one of residual, normed"),
        ({"temperature": 0.0}, "temperature must be a number from 1e-6 to 1e6"),
        ({"temperature": float("nan")}, "temperature must be a number from 1e-6 to 1e6"),
        ({"temperature": float("inf")}, "temperature must be a number from 1e-6 to 1e6"),
        ({"rank": 0}, "rank must be a whole number ≥ 1, or None, got 0"),
        ({"rank": True}, "rank must be a whole number"),
        ({"top_k": 0}, "top_k must be a whole number ≥ 1"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"primary": "task"}, "primary must be the index of an adapter, got 'task'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateOptions(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GateOptions(rank=3), "rank must be at most 2 with 2 adapters, got 3"),
        (GateOptions(top_k=3), "top_k must be at most 2 with 2 adapters, got 3"),
        (GateOptions(primary=2), "primary must be the index of one of 2 adapters, got 2"),
        (GateOptions(primary=-3), "primary must be the index of one of 2 adapters, got -3"),
    ],
)
def test_options_that_do_not_fit_the_adapters_are_refused(options: GateOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(2, 8, options)


@pytest.mark.parametrize("weights", [[], [1.0, float("nan")], [float("inf")]])
def test_static_weights_are_finite_and_at_least_one(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be finite numbers, at least one"):
        StaticWeights(weights)
