"""Rank moves on PEFT's own layers; the judge is what PEFT alone loads afterwards."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from flowra_adapters import read_checkpoint
from flowra_allocation import (
    BottleneckObserver,
    Breathe,
    ModulePlan,
    PeftLayer,
    Policy,
    RankPlan,
    RefinementSchedule,
    Refiner,
    Shrink,
    grow,
    keep,
    peft_layers,
    plan_for_peft,
)
from flowra_allocation.forms import changed_together
from flowra_allocation.trainer_callback import RefinementCallback
from flowra_testing.explicit_grams import assert_same, explicit, losses
from flowra_testing.tiny_models import Tied, batch, bert_classifier, llama_causal_lm, mlp, nested, seeded, tied

TESTS = Path(__file__).parents[1]
TARGETS = ["q_proj", "v_proj", "up_proj"]
Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"
BIAS_IS_NO_FACTOR = "ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias"  # peft 0.21 takes a bias for a factor


def with_lora(model: nn.Module, **options: Any) -> PeftModel:  # noqa: ANN401 - of LoraConfig
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS}
    with seeded(3):
        adapted = get_peft_model(model, LoraConfig(**settings | options))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.data.normal_(std=0.3)
    return adapted


def move(layers: Mapping[str, PeftLayer], optimizer: Optimizer | None = None) -> None:
    """Shrink one layer, empty two, and let one of them come back larger."""
    keep(layers[Q], [2], optimizer)
    keep(layers[V], [], optimizer)
    keep(layers[UP], [], optimizer)
    grow(layers[UP], torch.randn(4, layers[UP].lora_A.shape[1]), optimizer)
    with torch.no_grad():
        layers[UP].lora_B.normal_()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(**batch()).logits
    return answer


def reload(model: PeftModel, base: nn.Module, folder: Path) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base, folder).eval()


# What a layer shows.


def test_layers_are_named_as_in_the_base_model_and_show_what_peft_holds() -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model)
    assert layers.keys() == {name for name, _ in llama_causal_lm().named_modules() if name.endswith(tuple(TARGETS))}
    layer, host = layers[V], model.get_submodule(f"base_model.model.{V}")
    assert layer.host is host
    assert layer.lora_A is host.lora_A["default"].weight
    assert layer.lora_B is host.lora_B["default"].weight
    assert (layer.rank, layer.scaling, layer.cost_per_rank, layer.max_rank) == (3, 5 / 3, 32 + 16, 16)


def test_some_layers_can_be_asked_for_and_the_others_keep_their_rank(tmp_path: Path) -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model, names=[Q])
    assert list(layers) == [Q]
    keep(layers[Q], [0])
    again = peft_layers(reload(model, llama_causal_lm(), tmp_path))
    assert {name: layer.rank for name, layer in again.items()} == {name: 1 if name == Q else 3 for name in again}


class Wide(nn.Module):
    """A linear layer in the layout of GPT-2, between two of the usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.turned, self.last = nn.Linear(6, 8), Conv1D(4, 8), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:  # noqa: ANN401 - as models of transformers
        class Output:
            logits = self.last(torch.tanh(self.turned(torch.tanh(self.first(input_ids))))).mean(1)

        return Output()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.0, "use_dora": True}], ids=str)
def test_observed_grams_are_those_of_explicit_per_example_gradients(options: dict[str, Any]) -> None:
    model = with_lora(bert_classifier().double(), target_modules=["query", "output.dense"], **options).double()
    layers, data = peft_layers(model), batch(num_labels=3)
    with BottleneckObserver(model, layers, loss="mean") as observer:
        losses(model, data).mean().backward()
    if options.get("use_dora"):  # the gradient at z is not s · Bᵀ that of the layer, so look at z alone
        for name, gram in explicit(model.get_base_model(), layers, data).items():
            torch.testing.assert_close(observer.total()[name].activations, gram.activations, rtol=1e-8, atol=1e-12)
            assert len(observer.grams[name]) == 1
    else:
        assert_same(observer.total(), explicit(model.get_base_model(), layers, data))


def test_a_conv1d_is_a_pair_like_any_other() -> None:
    with seeded(0):
        model = Wide().double()
        data = {"input_ids": torch.randn(3, 5, 6).double(), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    model = with_lora(model, target_modules=["turned"], fan_in_fan_out=True).double()
    layers = peft_layers(model)
    data["labels"] = torch.tensor([0, 2, 1])
    assert {name: (layer.lora_A.shape, layer.lora_B.shape) for name, layer in layers.items()} == {
        "turned": ((3, 8), (4, 3))
    }
    with BottleneckObserver(model, layers, loss="mean") as observer:
        losses(model, data).mean().backward()
    assert_same(observer.total(), explicit(model.get_base_model(), layers, data))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_shows_the_observer_activations_and_not_the_identity_of_its_norm(dropout: float) -> None:
    model = with_lora(mlp(), target_modules=["up", "down"], use_dora=True, lora_dropout=dropout).train()
    layers, seen = peft_layers(model), []
    layers["up"].observer = seen.append
    model(torch.randn(8, 8))  # as many rows as inputs
    assert [z.shape for z in seen] == [(8, 3)]
    assert not torch.allclose(seen[0], layers["up"].lora_A.T)
    layers["up"].observer = None
    model(torch.randn(8, 8))
    assert len(seen) == 1


@pytest.mark.parametrize("layer_type", [Linear4bit, Linear8bitLt])
def test_the_pair_beside_a_quantised_layer_moves(layer_type: type[nn.Module], tmp_path: Path) -> None:
    def quantised() -> nn.Module:
        with seeded(1):
            plain = nn.Linear(128, 64)
        options = {"has_fp16_weights": False} if layer_type is Linear8bitLt else {}
        layer = layer_type(128, 64, **options)
        layer.load_state_dict(plain.state_dict())
        model = nn.Sequential(layer.to("cpu"))
        model.is_loaded_in_8bit = layer_type is Linear8bitLt  # type: ignore[assignment]  # PEFT looks at these
        model.is_loaded_in_4bit = layer_type is Linear4bit  # type: ignore[assignment]
        return model

    model, x = with_lora(quantised(), target_modules=["0"]), torch.randn(5, 128)
    assert type(model.base_model.model[0]).__module__ == "peft.tuners.lora.bnb"
    layers, seen = peft_layers(model), []
    layers["0"].observer = seen.append
    keep(layers["0"], [2])
    grow(layers["0"], torch.randn(1, 128))
    with torch.no_grad():
        y = model.eval()(x)
        torch.testing.assert_close(seen[-1], x @ layers["0"].lora_A.T)
        assert torch.equal(reload(model, quantised(), tmp_path)(x), y)


def test_growth_is_sketched_at_the_layer_that_peft_wraps() -> None:
    model = with_lora(bert_classifier(), target_modules=["query"])
    layers, data = peft_layers(model), batch(num_labels=3)
    generator = torch.Generator().manual_seed(0)
    with BottleneckObserver(model, layers, loss="mean", sketch=True, generator=generator) as observer:
        losses(model, data).mean().backward()
    for name, sketch in observer.sketches.items():
        energy, direction = sketch.leading_direction()
        assert energy > 0
        assert direction.shape == (16,)
        assert (layers[name].lora_A.double() @ direction.double()).abs().max() < 1e-5


# What is saved.

VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True, "lora_dropout": 0.1}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_after_any_moves_peft_saves_and_loads_the_same_function(options: dict[str, Any], tmp_path: Path) -> None:
    model = with_lora(llama_causal_lm(), **options)
    layers = peft_layers(model)
    move(layers)
    assert [layers[name].rank for name in (Q, V, UP)] == [1, 0, 4]
    expected = logits(model)
    assert torch.equal(logits(reload(model, llama_causal_lm(), tmp_path)), expected)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any(V in name for name in tensors) == options.get("use_dora", False)  # its magnitude is more than a pair
    assert not any("idle" in name or each.numel() == 0 for name, each in tensors.items())


@pytest.mark.filterwarnings(BIAS_IS_NO_FACTOR)
def test_a_bias_beside_the_pair_outlives_rank_0(tmp_path: Path) -> None:
    model = with_lora(bert_classifier(), target_modules=["query"], lora_bias=True)
    layers = peft_layers(model)
    name = next(iter(layers))
    keep(layers[name], [])
    bias = model.get_submodule(f"base_model.model.{name}").lora_B["default"].bias
    assert bias.abs().sum() > 0
    expected = logits(model)
    assert torch.equal(logits(reload(model, bert_classifier(), tmp_path)), expected)
    grow(layers[name], torch.randn(2, 16))
    assert torch.equal(logits(model), expected)
    assert model.get_submodule(f"base_model.model.{name}").lora_B["default"].bias is bias


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_stays_and_peft_s_own_books_follow(use_rslora: bool) -> None:
    model = with_lora(llama_causal_lm(), use_rslora=use_rslora)
    layers = peft_layers(model)
    scaling = layers[UP].scaling
    host = layers[UP].host
    move(layers)
    assert host.scaling["default"] == scaling == 5 / (math.sqrt(3) if use_rslora else 3)
    assert host.r["default"] == 4
    host.set_scale("default", 1.0)  # PEFT computes it anew
    assert host.scaling["default"] == pytest.approx(scaling, rel=1e-15)
    linear = host.lora_A["default"]
    assert (linear.in_features, linear.out_features) == (32, 4)
    assert (host.lora_B["default"].in_features, host.lora_B["default"].out_features) == (4, 48)


def test_our_own_reader_understands_what_peft_then_saves(tmp_path: Path) -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model)
    move(layers)
    model.save_pretrained(tmp_path)
    found = read_checkpoint(tmp_path)
    assert {name: found.rank(name) for name in found.factors} == {n: each.rank for n, each in layers.items() if n != V}
    assert all(found.scalings[name] == pytest.approx(5 / 3) for name in found.factors)


def test_a_name_that_another_ends_in_stands_for_itself_alone(tmp_path: Path) -> None:
    def base() -> nn.Module:
        return nested("q", "x.q", "y.x.q", "z.q")

    model = with_lora(base(), target_modules=["q"])
    layers = peft_layers(model)
    keep(layers["q"], [1])
    keep(layers["x.q"], [])
    keep(layers["y.x.q"], [0, 1])
    again = peft_layers(reload(model, base(), tmp_path))
    assert {name: layer.rank for name, layer in again.items()} == {"q": 1, "y.x.q": 2, "z.q": 3}


def test_while_every_layer_has_rank_0_what_is_saved_answers_as_the_base(tmp_path: Path) -> None:
    model = with_lora(llama_causal_lm())
    for layer in peft_layers(model).values():
        keep(layer, [])
    assert torch.equal(logits(model), logits(llama_causal_lm()))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors") == {}


def test_each_change_makes_a_new_configuration_so_that_other_adapters_keep_theirs() -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model)
    before = model.peft_config["default"]
    model.add_adapter("ref", before)  # as DPO does
    reference = {name: each.clone() for name, each in model.named_parameters() if ".ref." in name}
    move(layers)
    assert model.peft_config["ref"] is before
    assert before.rank_pattern == {}
    assert peft_layers(model, "ref")[Q].rank == 3
    assert all(torch.equal(model.get_parameter(name), each) for name, each in reference.items())


def test_an_event_of_many_layers_writes_one_configuration_also_where_it_fails() -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model)
    before = model.peft_config["default"]

    def change() -> None:
        with changed_together(layers.values()):
            keep(layers[Q], [0])
            with changed_together(layers.values()):
                keep(layers[V], [])
            assert model.peft_config["default"] is before
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        change()
    after = model.peft_config["default"]
    assert after.rank_pattern == {f"^{Q}".replace(".", r"\."): 1}
    assert V not in after.target_modules
    with changed_together(layers.values()):
        pass
    assert model.peft_config["default"] is after


def test_an_adapter_that_transformers_itself_added_moves_too(tmp_path: Path) -> None:
    model = llama_causal_lm()
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    layers = peft_layers(model)
    with seeded(3):
        for layer in layers.values():
            layer.lora_B.data.normal_()
        move(layers)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama_causal_lm(), tmp_path)), logits(model))


def test_ranks_of_a_plan_become_a_lora_config_whose_model_has_those_ranks() -> None:
    ranks = {Q: 4, V: 2, UP: 0}
    plan = RankPlan(
        modules={
            name: ModulePlan(rank=rank, alpha=2.0 * rank, cost_per_rank=64, psi=0.5, gains=(1.0,) * rank)
            for name, rank in ranks.items()
        },
        budget=400,
        parameters=384,
        scaling=2.0,
        sensitivity_threshold=0.0,
    )
    model = get_peft_model(llama_causal_lm(), LoraConfig(**plan_for_peft(plan).as_dict()))
    layers = peft_layers(model)
    assert {name: (each.rank, each.scaling) for name, each in layers.items()} == {Q: (4, 2.0), V: (2, 2.0)}


# Rank 0, and the optimiser.


def test_at_rank_0_peft_skips_the_layer_and_its_empty_factors_stay_among_the_parameters() -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model)
    before = [id(each) for each in model.parameters() if each.requires_grad]
    keep(layers[V], [])
    host = layers[V].host
    assert "default" not in host.lora_A
    assert "default" not in host.lora_B
    assert (layers[V].lora_A.shape, layers[V].lora_B.shape) == ((0, 32), (16, 0))
    after = [each for each in model.parameters() if each.requires_grad]
    changed = [each for each, old in zip(after, before, strict=True) if id(each) != old]
    assert [id(each) for each in changed] == [id(layers[V].lora_A), id(layers[V].lora_B)]  # where the old ones were
    assert peft_layers(model)[V].lora_A is layers[V].lora_A


@pytest.mark.filterwarnings(BIAS_IS_NO_FACTOR)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_trainable_parameters_keep_their_order_through_rank_0_and_back(options: dict[str, Any]) -> None:
    model = with_lora(bert_classifier(), target_modules=["query"], **options)
    layers = peft_layers(model)

    def order() -> list[str]:
        by_id = {id(each): f"{name} {side}" for name, one in layers.items() for side, each in
                 (("A", one.lora_A), ("B", one.lora_B))}  # fmt: skip
        return [by_id.get(id(each), name) for name, each in model.named_parameters() if each.requires_grad]

    before = order()
    name = next(iter(layers))
    keep(layers[name], [])
    assert order() == before
    grow(layers[name], torch.randn(2, 16))
    assert order() == before


def test_factors_that_come_back_from_rank_0_train_and_take_their_place_in_the_optimiser() -> None:
    model = with_lora(bert_classifier(), target_modules=["query"])
    layers, data = peft_layers(model), batch(num_labels=3)
    name = next(iter(layers))
    optimizer = AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    places = [id(each) for each in optimizer.param_groups[0]["params"]].index(id(layers[name].lora_A))
    for step in range(6):
        optimizer.zero_grad()
        losses(model, data).mean().backward()
        optimizer.step()
        if step == 1:
            keep(layers[name], [], optimizer)
            assert optimizer.param_groups[0]["params"][places] is layers[name].lora_A
        if step == 3:
            grow(layers[name], torch.randn(2, 16), optimizer)
            grown = layers[name].lora_A.detach().clone(), layers[name].lora_B.detach().clone()
    assert optimizer.param_groups[0]["params"][places] is layers[name].lora_A
    assert not torch.equal(layers[name].lora_A, grown[0])
    assert layers[name].lora_B.abs().sum() > grown[1].abs().sum() == 0


def test_a_change_of_adapter_in_between_leaves_empty_factors_trainable() -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model)
    keep(layers[V], [])
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("other")
    model.set_adapter("default")
    grow(layers[V], torch.randn(1, 32))
    assert layers[V].lora_A.requires_grad
    assert layers[V].lora_B.requires_grad


def test_a_copy_of_the_model_has_layers_of_its_own_rank_0_included() -> None:
    model = with_lora(llama_causal_lm())
    layers = peft_layers(model)
    keep(layers[V], [])
    average = copy.deepcopy(model)
    others = peft_layers(average)
    assert others.keys() == layers.keys()
    assert others[V].rank == 0
    with torch.no_grad():
        others[Q].lora_A.add_(1)
    keep(layers[Q], [1], averages=[others[Q]])
    grow(layers[V], torch.ones(1, 32), averages=[others[V]])
    assert (others[Q].rank, others[V].rank) == (1, 1)
    torch.testing.assert_close(others[Q].lora_A, layers[Q].lora_A + 1)
    assert average.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


# What is refused.


def refusal(model: nn.Module, message: str, **options: Any) -> None:  # noqa: ANN401 - passed on
    with pytest.raises(ValueError, match=message):
        peft_layers(model, **options)


def test_layers_that_hold_no_pair_of_their_own_are_refused_by_name() -> None:
    refusal(
        with_lora(bert_classifier(), target_modules=["word_embeddings", "query"]),
        r"got an embedding, .* 'bert.embeddings.word_embeddings'. Name those that do",
    )
    convolution = with_lora(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), target_modules=["0", "1"])
    refusal(convolution, "got a convolution, whose factors are kernels; at '0'")
    assert list(peft_layers(convolution, names=["1"])) == ["1"]
    attention = with_lora(nn.Sequential(nn.MultiheadAttention(8, 2)), target_modules=["0"])
    refusal(attention, "got an nn.MultiheadAttention")
    parameters = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_parameters=["0.weight"]))
    refusal(parameters, "target_parameters must be empty where rank is to move, got an adapter on '0'")
    variant = with_lora(llama_causal_lm(), alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    refusal(variant, "got the variant ALoraLinearVariant")


def test_tied_factors_are_refused() -> None:
    model: Tied = tied()
    adapted = with_lora(model, target_modules=["encoder", "decoder"])
    encoder, decoder = (adapted.get_submodule(f"base_model.model.{name}") for name in ("encoder", "decoder"))
    decoder.lora_A["default"].weight = encoder.lora_A["default"].weight
    refusal(adapted, "got factors that another layer has, too; at 'encoder'")


def test_models_without_such_an_adapter_are_refused() -> None:
    refusal(mlp(), r"model must carry a LoRA adapter 'default' of PEFT, got None there and adapters \[\]")
    refusal(with_lora(mlp(), target_modules=["up"]), r"'other' of PEFT, got None there and adapters \['default'\]",
            adapter_name="other")  # fmt: skip
    adaptive = get_peft_model(mlp(), AdaLoraConfig(init_r=2, target_modules=["up"], total_step=10))
    refusal(adaptive, "got ADALORA there .* moves rank by itself; start from a LoraConfig")
    refusal(with_lora(mlp(), target_modules=["up"]), r"names must be of layers .* got \['down'\]", names=["down"])


def test_a_merged_adapter_is_not_resized() -> None:
    model = with_lora(mlp(), target_modules=["up"])
    layers = peft_layers(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter must not be merged while its rank changes"):
        keep(layers["up"], [0])
    model.unmerge_adapter()
    keep(layers["up"], [0])


# Inside transformers.Trainer.

SCHEDULE = RefinementSchedule(start=2, freeze=10, events=4, observe=2)
POLICIES: dict[str, Policy] = {
    "breathe": Breathe(schedule=SCHEDULE, share=0.3),
    "shrink by flow": Shrink(schedule=SCHEDULE, measure="flow", kappa=2.0),
    "shrink by magnitude": Shrink(schedule=SCHEDULE, measure="magnitude", kappa=2.0),
}


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Each next token is the one before plus a step: the model can learn it."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (index * 7 + torch.arange(12) * (1 + index % 3)) % 64
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


class Losses(TrainerCallback):
    """Keeps what the Trainer logs."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, *arguments: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
        self.values += [logs["loss"]] if logs and "loss" in logs else []


def training(
    policy: Policy,
    folder: Path,
    *,
    save_steps: int = 4,
    **options: Any,  # noqa: ANN401 - of LoraConfig
) -> tuple[Trainer, Refiner, RefinementCallback, Losses]:
    with seeded(4):
        settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
        model = get_peft_model(llama_causal_lm(), LoraConfig(**settings | options))
    layers = peft_layers(model)
    total = sum(2 * layer.cost_per_rank for layer in layers.values())
    refiner = Refiner(
        model,
        layers,
        policy=policy,
        costs={name: layer.cost_per_rank for name, layer in layers.items()},
        caps={name: min(layer.max_rank, 6) for name, layer in layers.items()},
        budget=int(total / policy.peak),
    )
    args = TrainingArguments(
        output_dir=str(folder), max_steps=14, per_device_train_batch_size=16, learning_rate=2e-2, seed=0,
        save_strategy="steps", save_steps=save_steps, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback, seen = RefinementCallback(refiner), Losses()
    trainer = Trainer(model=model, args=args, train_dataset=Sentences(), callbacks=[callback, seen])
    return trainer, refiner, callback, seen


@pytest.mark.parametrize(
    "name", ["breathe", *(pytest.param(name, marks=pytest.mark.slow) for name in list(POLICIES)[1:])]
)
def test_the_trainer_moves_rank_inside_the_budget_and_peft_reloads_it_in_a_fresh_process(
    name: str, tmp_path: Path
) -> None:
    trainer, refiner, _, seen = training(POLICIES[name], tmp_path / "run")
    trainer.train()
    model, values, history = trainer.model, seen.values, refiner.history
    assert tuple(event.step for event in history.events) == SCHEDULE.steps
    assert any(event.dropped for event in history.events)
    assert any(event.admitted for event in history.events) == (name == "breathe")
    assert history.events[-1].parameters <= history.budget
    assert history.peak <= history.budget * POLICIES[name].peak
    assert max(values[-3:]) < min(values[:3])
    ranks = history.events[-1].ranks
    assert {each: layer.rank for each, layer in refiner.layers.items()} == ranks
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert trainable == history.events[-1].parameters

    # Checkpoints have the ranks of their own moment.
    at = {4: history.events[0].ranks, 8: history.events[2].ranks, 12: ranks}
    for step, then in at.items():
        found = read_checkpoint(tmp_path / "run" / f"checkpoint-{step}")
        assert {each: found.rank(each) for each in found.factors} == {each: r for each, r in then.items() if r > 0}

    model.save_pretrained(tmp_path / "adapter")
    folders = [tmp_path / "adapter", tmp_path / "run" / "checkpoint-12"]
    done = subprocess.run(
        [sys.executable, "-m", "flowra_testing.peft_child", "llama_causal_lm", *map(str, folders)],
        cwd=TESTS, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(folders[0] / "logits.safetensors")["logits"], logits(model))


VARIANTS_IN_TRAINING = [{}, {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1}]


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS_IN_TRAINING, ids=str)
@pytest.mark.parametrize(
    "policy", [POLICIES["breathe"], Shrink(schedule=SCHEDULE, measure="flow", kappa=4.0)], ids=["breathe", "shrink"]
)
def test_training_resumes_bit_by_bit_from_a_checkpoint_between_two_events(
    policy: Policy, options: dict[str, Any], tmp_path: Path
) -> None:
    trainer, refiner, _, seen = training(policy, tmp_path / "whole", save_steps=5, **options)
    trainer.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"  # while statistics are gathered for the event after step 6
    again, resumed, callback, rest = training(policy, tmp_path / "resumed", save_steps=5, **options)
    callback.resume(checkpoint)
    assert any(rank == 0 for rank in refiner.history.events[0].ranks.values())
    again.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.history.events == refiner.history.events
    assert rest.values == seen.values[5:]
    assert resumed.layers.keys() == refiner.layers.keys()
    for name, layer in resumed.layers.items():
        assert torch.equal(layer.lora_A, refiner.layers[name].lora_A)
        assert torch.equal(layer.lora_B, refiner.layers[name].lora_B)
    assert again.model.peft_config["default"].rank_pattern == trainer.model.peft_config["default"].rank_pattern
    assert torch.equal(logits(again.model), logits(trainer.model))
    assert torch.equal(logits(reload(again.model, llama_causal_lm(), tmp_path / "adapter")), logits(trainer.model))
