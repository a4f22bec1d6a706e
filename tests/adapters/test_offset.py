"""Norm tuning, BitFit, and the bias option: parameters that are trained as offsets."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from torch import nn

from flowra_adapters import (
    LoRA,
    ParameterOffset,
    adapters,
    attach,
    create_missing_biases,
    delete,
    detach,
    disabled,
    load_adapter,
    match_sites,
    merge,
    save_adapter,
    sites,
    unmerge,
)
from flowra_testing.tiny_blocks import ExpertList, Mixture, SelfAttention, used_norm
from flowra_testing.tiny_models import batch, bert_classifier, llama_causal_lm, mlp, seeded

GOLDEN = {
    case["name"]: case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "offsets.json").read_text())["cases"]
}


def fill(found: dict[str, Any], *, seed: int = 5) -> None:
    """Give every adapter tensor values of its own."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in found.values():
        for parameter in adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def double(values: Any) -> torch.Tensor:  # noqa: ANN401 - parsed JSON
    """Read a golden tensor."""
    return torch.tensor(values, dtype=torch.float64)


def test_norm_tuning_gives_peft_s_golden_output() -> None:
    case = GOLDEN["norm"]
    model = nn.Sequential(nn.LayerNorm(4, dtype=torch.float64))
    model[0].load_state_dict({"weight": double(case["weight"]), "bias": double(case["bias"])})
    found = attach(model, {"all-norms": 1}, method="norm")
    for name, key in (("0", "delta_weight"), ("0.bias", "delta_bias")):
        offset = found[name]
        assert isinstance(offset, ParameterOffset)
        offset.replace_offset(double([case[key]]))
    assert sum(each.num_parameters() for each in found.values()) == case["trainable_params"]
    torch.testing.assert_close(model(double(case["x"])).detach(), double(case["y"]), rtol=0, atol=1e-11)
    merge(model)
    torch.testing.assert_close(model(double(case["x"])).detach(), double(case["y"]), rtol=0, atol=1e-11)


def test_bitfit_gives_the_output_computed_by_hand() -> None:
    case = GOLDEN["bitfit"]
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64))
    model[0].load_state_dict({"weight": double(case["W"]), "bias": double(case["bias"])})
    offset = attach(model, {"all-biases": 1}, method="bitfit")["0.bias"]
    assert isinstance(offset, ParameterOffset)
    offset.replace_offset(double([case["delta_bias"]]))
    assert offset.num_parameters() == case["trainable_params"]
    torch.testing.assert_close(model(double(case["x"])).detach(), double(case["y"]), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT of a norm that is not in its list
@pytest.mark.parametrize("build", [bert_classifier, llama_causal_lm], ids=lambda build: build.__name__)
def test_the_same_norm_parameters_give_the_same_output_as_peft_s_norm_tuning(build: Callable[[], nn.Module]) -> None:
    ours, theirs, x = build().double(), build().double(), batch()
    found = attach(ours, {"all-norms": 1}, method="norm")
    fill(found)
    names = sorted({name.removesuffix(".bias") for name in found})
    peft_model = get_peft_model(theirs, LNTuningConfig(target_modules=names))
    for name, adapter in found.items():
        site = sites(ours)[name]
        module = peft_model.base_model.model.get_submodule(name.removesuffix(".bias")).ln_tuning_layers["default"]
        getattr(module, site.parameter).data += adapter.delta_weight().detach()
    trainable = sum(each.numel() for each in peft_model.parameters() if each.requires_grad)
    assert sum(adapter.num_parameters() for adapter in found.values()) == trainable
    with torch.no_grad():
        expected = peft_model(**x).logits
        torch.testing.assert_close(ours(**x).logits, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(build().double()(**x).logits, expected, atol=1e-3)


def test_all_norms_are_gains_and_shifts_of_norms_and_nothing_else() -> None:
    model = nn.ModuleDict({
        "norm": nn.LayerNorm(4),
        "flat": nn.LayerNorm((3, 4), bias=False),
        "batch": nn.BatchNorm2d(4),
        "slopes": nn.PReLU(4),
        "layer": nn.Linear(4, 4),
        "plain": nn.GroupNorm(2, 4, affine=False),
    })
    expected = ["norm", "norm.bias", "flat", "batch", "batch.bias"]
    assert list(attach(model, {"all-norms": 1}, method="norm")) == expected
    llama = llama_causal_lm()
    assert list(attach(llama, {"*norm": 1}, method="norm")) == [n for n, _ in llama.named_modules() if n[-4:] == "norm"]


def test_all_biases_are_those_of_layers_attention_experts_and_norms() -> None:
    model = nn.ModuleDict({
        "attention": SelfAttention(),
        "mixture": Mixture("gpt_oss"),
        "norm": nn.LayerNorm(4),
        "conv": nn.Conv2d(3, 4, 3),
        "bare": nn.Linear(4, 4, bias=False),
    })
    assert list(attach(model, {"all-biases": 1}, method="bitfit")) == [
        "attention.attention.in_proj_bias",
        "attention.attention.out_proj.bias",
        "mixture.block.router.bias",
        "mixture.block.experts.gate_up_proj_bias",
        "mixture.block.experts.down_proj_bias",
        "norm.bias",
        "conv.bias",
    ]
    named = sum(tensor.numel() for name, tensor in model.named_parameters() if name.endswith("bias"))
    assert sum(each.num_parameters() for each in adapters(model).values()) == named


def test_bitfit_may_mean_some_biases_only() -> None:
    model = bert_classifier()
    found = attach(model, {"*.query.bias": 1, "*intermediate.dense.bias": 1}, method="bitfit")
    assert list(found) == [
        f"bert.encoder.layer.{index}.{name}.bias"
        for index in range(2)
        for name in ("attention.self.query", "intermediate.dense")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": {"up.bias": 2}}, r"rank must be 0 or 1 .* got 2; for module 'up.bias'"),
        ({"ranks": {"up.bias": 1}, "dropout": 0.1}, r"dropout must be 0 for an offset, .* got 0.1; for module"),
        ({"ranks": {"up.bias": 1}, "scaling": 2.0}, "bitfit must be given neither scaling nor alpha, got 2.0"),
        ({"ranks": {"up": 1}}, r"patterns must match modules that can carry an adapter, got 'up': 'up' is a Linear"),
    ],
    ids=["rank", "dropout", "scaling", "weight"],
)
def test_what_an_offset_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(mlp(), method="bitfit", **arguments)


def test_an_offset_refuses_a_scaling_of_its_own() -> None:
    options = {"rank": 1, "dropout": 0.0, "dtype": torch.float32, "generator": torch.Generator()}
    operator = sites(mlp())["up.bias"].operator
    with pytest.raises(ValueError, match=r"scaling must be 1 for an offset, got 2\.0"):
        ParameterOffset(operator, scaling=2.0, **options)


def test_an_offset_is_there_once_or_not() -> None:
    offset = attach(mlp(), {"up.bias": 1}, method="bitfit")["up.bias"]
    with pytest.raises(ValueError, match=r"rank must be in \[0, 1\], got 1 \+ 1"):
        offset.grow(torch.zeros(1, 1))
    for keep in ([1], [0, 0]):
        with pytest.raises(ValueError, match=r"keep must be distinct indices below the rank 1, got"):
            offset.shrink(keep)
    assert [offset.cost(0), offset.cost(1), offset.rank] == [0, 12, 1]
    offset.requires_grad_(False)
    offset.shrink([])
    offset.grow(torch.zeros(1, 1))
    assert not any(parameter.requires_grad for parameter in offset.parameters())


# Running statistics.

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_norm1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 2)),
    "batch_norm3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 3, 2)),
    "sync_batch_norm": (lambda: nn.SyncBatchNorm(4), (6, 4)),
    "instance_norm": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (3, 4, 5)),
}


def normalised(kind: str) -> tuple[nn.Sequential, torch.Tensor]:
    """A norm with statistics from earlier on, between two others without, and a batch for it."""
    build, shape = NORMS[kind]
    with seeded(0):
        return nn.Sequential(nn.Tanh(), used_norm(build())).eval(), torch.randn(shape)


@pytest.mark.parametrize("kind", NORMS)
def test_running_statistics_stay_as_they_are_while_a_norm_is_tuned(kind: str) -> None:
    model, x = normalised(kind)
    found = attach(model, {"all-norms": 1}, method="norm")
    statistics = {name: tensor.clone() for name, tensor in model[1].named_buffers()}
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    with disabled(model):
        model(x)
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in model[1].named_buffers())
    assert statistics
    trained = model(x).detach()
    assert model[1].training
    model.eval()
    assert torch.equal(model(x).detach(), trained)
    again, _ = normalised(kind)
    copies = attach(again, {"all-norms": 1}, method="norm")
    for name, copy in copies.items():
        copy.load_state_dict(found[name].state_dict())
    assert torch.equal(again(x).detach(), trained)


@pytest.mark.parametrize("method", ["lora", "flora", "bitfit"])
def test_running_statistics_stay_as_they_are_while_other_layers_are_adapted(method: str, tmp_path: Path) -> None:
    def built() -> nn.Sequential:
        with seeded(0):
            return nn.Sequential(nn.Conv2d(3, 4, 3), used_norm(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(36, 2))

    model, x = built(), torch.randn(6, 3, 5, 5)
    attach(model, {"0.bias" if method == "bitfit" else "0": 1}, method=method)
    statistics = {name: tensor.clone() for name, tensor in model.named_buffers()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()
    assert statistics
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in model.named_buffers())
    save_adapter(model, tmp_path)
    again = built()
    load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(x), model.eval()(x))
    copied = deepcopy(model).train()
    copied(x)
    assert copied[1].training
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in copied.named_buffers())


def test_statistics_of_a_norm_that_is_trained_in_full_go_on() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train()
    attach(model, {"0": 1}, modules_to_save=["2"])
    model(torch.randn(6, 3))
    assert [int(norm.num_batches_tracked) for norm in (model[1], model[2])] == [0, 1]


@pytest.mark.parametrize("leave", [detach, lambda model: delete(model, "default")], ids=["detach", "delete"])
def test_a_norm_gathers_statistics_again_after_its_adapters_are_gone(leave: Callable[[nn.Module], None]) -> None:
    model, x = normalised("batch_norm2d")
    other, _ = normalised("batch_norm2d")
    attach(model, {"all-norms": 1}, method="norm")
    model.train()
    model(x)
    leave(model)
    other.train()
    assert torch.equal(model(x), other(x))
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks


def test_a_norm_is_back_in_the_mode_of_the_model_after_an_error() -> None:
    model, _ = normalised("batch_norm2d")
    attach(model, {"all-norms": 1}, method="norm")
    model.train()
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.zeros(3, 4))
    assert model[1].training
    assert "weight" not in model[1].__dict__


# Biases that are not there, and biases beside LoRA.


def test_bitfit_on_a_model_without_biases_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"got 'all-biases': no layer has one\. Call create_missing_biases first"):
        attach(llama_causal_lm(), {"all-biases": 1}, method="bitfit")
    for option in ("adapted", "all"):
        with pytest.raises(ValueError, match=rf"bias must be 'none' .* got '{option}'\. Call create_missing_biases"):
            attach(llama_causal_lm(), {"q_proj": 1}, bias=option)


def test_created_biases_change_nothing_until_they_are_trained_and_merge_into_the_layer() -> None:
    model, plain, x = llama_causal_lm(), llama_causal_lm(), batch()
    created = create_missing_biases(model, ["*_proj"])
    assert created == match_sites(plain, ["*_proj"])
    assert create_missing_biases(model, ["*_proj"]) == []
    with torch.no_grad():
        torch.testing.assert_close(model(**x).logits, plain(**x).logits, rtol=0, atol=1e-6)
        found = attach(model, {"all-biases": 1}, method="bitfit")
        assert list(found) == [f"{name}.bias" for name in created]
        fill(found)
        adapted = model(**x).logits
        merge(model)
        torch.testing.assert_close(model(**x).logits, adapted, rtol=0, atol=1e-6)
    assert all(torch.equal(model.get_parameter(name), found[name].delta_weight()) for name in found)


def test_a_bias_is_not_created_beside_integers() -> None:
    model = mlp()
    model.skip.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight must be floating point .* got torch.int8 for 'skip'"):
        create_missing_biases(model, ["all-linear"])


@pytest.mark.parametrize(
    ("option", "biases"), [("none", []), ("adapted", ["up.bias"]), ("all", ["up.bias", "down.bias"])]
)
def test_the_bias_option_trains_these_biases_with_lora(option: Any, biases: list[str]) -> None:  # noqa: ANN401
    model = mlp()
    found = attach(model, {"up": 2, "skip": 1}, bias=option, modules_to_save=["head"], adapter="task")
    assert list(found) == sorted(["up", *biases, "skip"], key=list(sites(mlp())).index)
    assert list(adapters(model, "task")) == list(found)
    assert all(type(found[name]) is (ParameterOffset if name in biases else LoRA) for name in found)
    assert ("task:bias" in model.up.adapters) == (option != "none")
    learning = {name for name, each in model.named_parameters() if each.requires_grad and ".adapters." not in name}
    assert learning == {"head.weight", "head.bias"}


@pytest.mark.parametrize("bias_first", [False, True], ids=["weight_first", "bias_first"])
def test_weight_and_bias_of_one_layer_act_disable_merge_and_unmerge_together(bias_first: bool) -> None:
    model = mlp(dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    base = model(x).detach()
    if bias_first:
        found = attach(model, {"up.bias": 1}, method="bitfit", adapter="other")
        found |= attach(model, {"up": 2}, adapter="task")
    else:
        found = attach(model, {"up": 2}, bias="adapted", adapter="task")
    fill(found)
    expected = mlp(dtype=torch.float64)
    expected.up.weight.data += found["up"].delta_weight().detach()
    expected.up.bias.data += found["up.bias"].delta_weight().detach()
    adapted = model(x).detach()
    torch.testing.assert_close(adapted, expected(x).detach(), rtol=0, atol=1e-12)
    merge(model)
    torch.testing.assert_close(model.up.bias, expected.up.bias, rtol=0, atol=1e-15)
    torch.testing.assert_close(model(x).detach(), adapted, rtol=0, atol=1e-12)
    unmerge(model)
    assert torch.equal(model(x).detach(), adapted)
    for adapter in {"other", "task"} if bias_first else {"task"}:
        delete(model, adapter)
    assert torch.equal(model(x).detach(), base)


def test_the_bias_of_a_layer_that_is_adapted_in_part_is_the_whole_bias() -> None:
    found = attach(SelfAttention(), {"in_proj_weight:q": 2}, bias="adapted")
    assert list(found) == ["attention.in_proj_weight:q", "attention.in_proj_bias"]
    listed = attach(ExpertList(), {"experts.1": 2}, bias="adapted")
    assert list(listed) == ["experts.1", "experts.1.bias"]


def test_an_unknown_bias_option_is_refused_and_changes_nothing() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="bias must be 'none', 'adapted' or 'all', got 'lora_only'"):
        attach(model, {"up": 1}, bias="lora_only")  # type: ignore[arg-type]
    assert all(each.requires_grad for each in model.parameters())
    assert not hasattr(model.up, "adapters")
