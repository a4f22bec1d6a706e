"""What cannot be fused is refused with one line, and the model is left as it was."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from compose.fusion.families import PAD, family, ids
from compose.fusion.stacks import adapter, adapters_of, merged, randomised, stack, states
from flowra_compose import AdapterState, LowRankUpdate
from flowra_compose.fusion import Arrow, GateOptions, OtherPositionsError, SpectR, StaticWeights, fuse, gates_for
from flowra_testing.tiny_models import bert_classifier, mlp, seeded


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=61,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        decoder_start_token_id=0,
    )
    with seeded(0):
        return T5ForConditionalGeneration(config).eval()


def linear(*shape: int) -> LowRankUpdate:
    m, n = shape
    return LowRankUpdate(torch.ones(2, n), torch.ones(m, 2))


# adapters


def test_adapters_of_a_base_with_other_modules_are_refused() -> None:
    model = stack()
    other = {"a": AdapterState(updates={"blocks.7.up": linear(16, 8)})}
    for action in (lambda: gates_for(model, other), lambda: fuse(model, other, StaticWeights([1.0]))):
        with pytest.raises(
            ValueError, match=r"got 'blocks\.7\.up' .* that it lacks.*Were they trained on another base"
        ):
            action()


def test_adapters_of_a_base_with_other_shapes_are_refused() -> None:
    model = stack()
    other = adapters_of(stack(width=6), "stack")
    for action in (lambda: gates_for(model, other), lambda: fuse(model, other, StaticWeights([1.0, 1.0]))):
        with pytest.raises(
            ValueError, match=r"updates must fit the model, got \(6, 12\) for 'blocks.0.down' of \(8, 16\)"
        ):
            action()


def test_adapters_that_say_different_bases_are_refused() -> None:
    model = stack()
    adapters = {
        name: dataclasses.replace(one, base_model_name_or_path=f"base-{name}")
        for name, one in adapters_of(model, "stack").items()
    }
    with pytest.raises(ValueError, match=r"adapters must be of one base, got \['base-language', 'base-task'\]"):
        fuse(model, adapters, StaticWeights([1.0, 1.0]))
    unnamed = adapters | {"task": dataclasses.replace(adapters["task"], base_model_name_or_path=None)}
    fuse(model, unnamed, StaticWeights([1.0, 1.0])).remove()


def test_adapters_that_disagree_on_a_shape_are_refused() -> None:
    adapters = {
        "a": AdapterState(updates={"blocks.0.up": linear(16, 8)}),
        "b": AdapterState(updates={"blocks.0.up": linear(8, 8)}),
    }
    with pytest.raises(ValueError, match="adapters must agree on a module's shape"):
        fuse(stack(), adapters, StaticWeights([1.0, 1.0]))


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("conv", LowRankUpdate(torch.ones(1, 6), torch.ones(4, 1), layout="conv", kernel=(3,))),
        ("embedding", LowRankUpdate(torch.ones(1, 6), torch.ones(4, 1), layout="embedding")),
        ("blocks.0.up.bias", LowRankUpdate(torch.ones(1, 1), torch.ones(16, 1), layout="vector")),
    ],
)
def test_layouts_other_than_linear_are_refused(name: str, update: LowRankUpdate) -> None:
    adapters = {"a": AdapterState(updates={name: update, "blocks.0.up": linear(16, 8)})}
    with pytest.raises(ValueError, match=f"only updates of linear layers can be fused, got layout '{update.layout}'"):
        fuse(stack(), adapters, StaticWeights([1.0]))


def test_a_module_that_is_no_linear_layer_is_refused() -> None:
    model = nn.ModuleDict({"token": nn.Embedding(6, 4)})
    with pytest.raises(ValueError, match="modules must be linear layers, got Embedding at 'token'"):
        fuse(model, {"a": AdapterState(updates={"token": linear(6, 4)})}, StaticWeights([1.0]))


def test_the_output_of_multihead_attention_is_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    adapters = {"a": AdapterState(updates={"self_attn.out_proj": linear(8, 8)})}
    with pytest.raises(ValueError, match=r"got 'self_attn\.out_proj' of an nn\.MultiheadAttention"):
        fuse(model, adapters, StaticWeights([1.0]))
    fuse(model, {"a": AdapterState(updates={"linear1": linear(16, 8)})}, StaticWeights([1.0])).remove()


def test_no_adapter_and_an_empty_one_are_refused() -> None:
    with pytest.raises(ValueError, match="routing must be for the 0 adapters given, at least one, got 1"):
        fuse(stack(), {}, StaticWeights([1.0]))
    with pytest.raises(ValueError, match="adapters must update at least one module, got none"):
        fuse(stack(), {"a": AdapterState(updates={})}, StaticWeights([1.0]))
    with pytest.raises(ValueError, match="adapters must update at least one module, got none"):
        gates_for(stack(), {})


# routing


def test_a_model_that_is_fused_already_is_refused_and_stays_fused() -> None:
    model = stack()
    adapters = adapters_of(model, "stack")
    with fuse(model, adapters, StaticWeights([1.0, 0.5])):
        answer = model(states())
        with pytest.raises(ValueError, match=r"model must carry no fusion yet, got one. Call its remove"):
            fuse(model, adapters, StaticWeights([1.0, 1.0]))
        assert torch.equal(model(states()), answer)


def test_a_routing_for_another_number_of_adapters_is_refused() -> None:
    model = stack()
    adapters = adapters_of(model, "stack", 3)
    gates = gates_for(model, {name: adapters[name] for name in ("language", "task")})
    for routing in (gates, StaticWeights([1.0])):
        with pytest.raises(ValueError, match=r"routing must be for the 3 adapters given, at least one, got [12]"):
            fuse(model, adapters, routing)


@pytest.mark.parametrize("level", ["layer", "step", "module"])
def test_gates_of_another_model_are_refused(level: Any) -> None:  # noqa: ANN401 - a literal
    model = stack()
    wider = stack(width=6) if level == "step" else stack(layers=2)
    gates = gates_for(wider, adapters_of(wider, "stack"), GateOptions(level=level))
    before = set(model.state_dict())
    with pytest.raises(
        ValueError, match=r"gates must stand where the model needs them, at .* Make them with gates_for"
    ):
        fuse(model, adapters_of(model, "stack"), gates)
    assert set(model.state_dict()) == before
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("make", [Arrow, SpectR])
def test_untrained_routing_made_of_other_adapters_is_refused(make: type[Arrow | SpectR]) -> None:
    model = stack()
    adapters = adapters_of(model, "stack")
    others = list(reversed(adapters.values()))
    with pytest.raises(ValueError, match=f"routing must be made of the adapters that are fused.*got {make.__name__}"):
        fuse(model, adapters, make([one.updates for one in others]))
    with fuse(model, adapters, make([one.updates for one in adapters.values()])):
        model(states())


# architectures


@pytest.mark.parametrize("level", ["layer", "step"])
def test_an_encoder_with_a_decoder_is_refused_at_levels_of_blocks(level: Any) -> None:  # noqa: ANN401 - a literal
    model = t5()
    everywhere = adapter(model, ("q", "v"), 2).updates
    for stack_of in ("encoder", "decoder", ""):
        some = AdapterState(updates={name: each for name, each in everywhere.items() if name.startswith(stack_of)})
        with pytest.raises(ValueError, match=r"must have one stack of blocks.*Use level='module'"):
            gates_for(model, {"a": some}, GateOptions(level=level))


def test_an_encoder_with_a_decoder_is_fused_module_by_module() -> None:
    model = t5().double()
    adapters = {"a": adapter(model, ("q", "wi"), 2), "b": adapter(model, ("v", "wo", "EncDecAttention.k"), 3, seed=1)}
    inputs: dict[str, Tensor] = {"input_ids": ids(), "decoder_input_ids": ids(length=4, seed=2)}
    gates = gates_for(model, adapters, GateOptions(level="module", initial="uniform"))
    expected = merged(model, adapters, [0.5, 0.5])(**inputs).logits
    with fuse(model, adapters, gates), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
        randomised(gates)
        found = model.generate(ids(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        uncached = model.generate(ids(), max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(found, uncached)


def test_modules_outside_of_blocks_are_refused_at_levels_of_blocks() -> None:
    model: BertForSequenceClassification = bert_classifier()
    adapters = {"a": adapter(model, ("query", "pooler.dense"), 2)}
    with pytest.raises(
        ValueError, match=r"must lie in repeated blocks for gates of layers, got \['bert\.pooler\.dense'\]"
    ):
        gates_for(model, adapters)
    gates = gates_for(model, adapters, GateOptions(level="module"))
    with fuse(model, adapters, gates), torch.no_grad():
        assert model(ids(), attention_mask=torch.ones(3, 7)).logits.shape == (3, 3)


def test_a_model_without_blocks_or_a_width_is_refused_at_levels_of_blocks() -> None:
    with pytest.raises(ValueError, match="must lie in repeated blocks for gates of layers"):
        gates_for(mlp(), {"a": AdapterState(updates={"up": linear(12, 8)})})
    model = stack()
    del model.config
    with pytest.raises(ValueError, match="the model's config must say hidden_size for gates of layers, got none"):
        gates_for(model, adapters_of(model, "stack"))


def test_modules_that_see_other_positions_than_their_block_are_refused_when_they_are_called() -> None:
    model = stack()
    adapters = adapters_of(model, "stack")
    with fuse(model, adapters, gates_for(model, adapters)):
        with pytest.raises(RuntimeError, match=r"modules must see the positions that their block saw, got \(2, 3, 8\)"):
            model.blocks[0].up(states(length=3))
        model.blocks[0](states())
        with pytest.raises(RuntimeError, match="Use gates of level 'module'"):
            model.blocks[0].up(states(length=3))


class Twice(nn.Module):
    """A block that sends something else through a layer of its own, too, as DeBERTa its relative positions."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.key = nn.Linear(8, 8).double()
        self.places = nn.Parameter(torch.randn(1, places, 8, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.key(hidden) + self.key(self.places).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("places", [3, 5, 7])
def test_a_layer_that_sees_something_else_as_well_is_refused_whatever_its_length(places: int) -> None:
    model = stack()
    model.blocks[1] = Twice(places)
    adapters = {name: adapter(model, ("key",), 2, seed=seed) for seed, name in enumerate(("one", "other"))}
    hidden = states(length=5, size=1)
    assert hidden.shape[:2] == (1, 5)
    with fuse(model, adapters, gates_for(model, adapters).double()):
        for _ in range(2):
            with pytest.raises(OtherPositionsError, match="Use gates of level 'module'"):
                model(hidden)
    with fuse(model, adapters, gates_for(model, adapters, GateOptions(level="module")).double()):
        assert model(hidden).isfinite().all()


def test_an_axis_of_one_between_batch_and_positions_is_no_other_position() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(8, 8).double()

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.key(hidden.unsqueeze(1)).squeeze(1)

    model = stack()
    model.blocks[1] = Wide()
    adapters = {name: adapter(model, ("key",), 2, seed=seed) for seed, name in enumerate(("one", "other"))}
    with fuse(model, adapters, StaticWeights([0.3, 0.7])):
        expected = model(states())
    gates = gates_for(model, adapters, GateOptions(initial="uniform")).double()
    with torch.no_grad():
        for gate in gates:
            gate.bias += torch.tensor([-0.2, 0.2])
    with fuse(model, adapters, gates):
        torch.testing.assert_close(model(states()), expected, rtol=1e-6, atol=1e-6)


def test_a_part_of_a_model_that_is_fused_makes_the_whole_one_that_is() -> None:
    model = nn.Sequential(stack())
    adapters = {"a": adapter(model, ("up",), 2), "b": adapter(model, ("up",), 1)}
    inner = {"a": adapter(model[0], ("up",), 2), "b": adapter(model[0], ("up",), 1)}
    with (
        fuse(model[0], inner, StaticWeights([1, 0])),
        pytest.raises(ValueError, match="model must carry no fusion yet, got one"),
    ):
        fuse(model, adapters, StaticWeights([1, 0]))


def test_names_of_places_are_those_of_the_blocks_around_the_modules() -> None:
    model = family("bert")
    adapters = adapters_of(model, "bert")
    assert gates_for(model, adapters).places == ("encoder.layer.0", "encoder.layer.1", "encoder.layer.2")
    upper = {"a": adapter(model, ("layer.2.attention.self.query",), 2)}
    assert gates_for(model, upper).places == ("encoder.layer.2",)


def test_a_fused_model_is_not_copied() -> None:
    model = stack()
    adapters = adapters_of(model, "stack")
    with fuse(model, adapters, gates_for(model, adapters)), pytest.raises(TypeError, match=r"Call remove\(\) first"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_a_model_that_is_not_on_one_device_is_refused_and_the_gates_stay() -> None:
    model = stack()
    adapters = adapters_of(model, "stack")
    gates = randomised(gates_for(model, adapters))
    before = {name: each.clone() for name, each in gates.state_dict().items()}
    model.blocks[1].to("meta")
    with pytest.raises(ValueError, match=r"model must be on one device to be fused, got \['cpu', 'meta'\]"):
        fuse(model, adapters, gates)
    assert all(torch.equal(each, before[name]) for name, each in gates.state_dict().items())


def test_an_expert_that_sees_all_positions_in_an_order_of_its_own_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8).double()])

        def forward(self, hidden: Tensor) -> Tensor:
            routed: Tensor = self.experts[0](hidden.flatten(0, 1).flip(0))
            return hidden + routed.flip(0).view(hidden.shape)

    model = stack()
    model.blocks[1] = Experts()
    adapters = {name: adapter(model, ("experts.0",), 2, seed=seed) for seed, name in enumerate(("one", "other"))}
    fusion = fuse(model, adapters, gates_for(model, adapters).double())
    with fusion, pytest.raises(RuntimeError, match="modules must see the positions that their block saw"):
        model(states())
