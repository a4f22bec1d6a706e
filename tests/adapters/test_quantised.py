"""Adapters on layers that bitsandbytes and torchao have quantised."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from safetensors.torch import load_file
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from flowra_adapters import (
    LinearOperator,
    LoRA,
    MergeReport,
    adapters,
    attach,
    dequantised_weight,
    detach,
    initialise,
    load_adapter,
    merge,
    merged,
    save_adapter,
    sites,
    unmerge,
)
from flowra_adapters.initialisation import pissa
from flowra_adapters.methods import METHODS, AdapterMethod
from flowra_testing.asserts import assert_close, randomise
from flowra_testing.tiny_models import seeded

IN, OUT, RANK = 128, 64, 4
Quantise = Callable[[nn.Linear], nn.Module]


def four_bit(
    plain: nn.Linear, *, quant_type: str = "nf4", double: bool = True, storage: torch.dtype = torch.uint8
) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(
        plain.in_features, plain.out_features, compress_statistics=double, quant_type=quant_type, quant_storage=storage
    )
    layer.load_state_dict(plain.state_dict())
    layer.to(plain.weight.dtype).to("cpu")  # the second quantises
    layer.support_avx512bf16_for_cpu = False  # the same arithmetic on every processor
    return layer


def eight_bit(plain: nn.Linear, *, threshold: float = 0.0) -> nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(
        plain.in_features, plain.out_features, has_fp16_weights=False, threshold=threshold
    )
    layer.load_state_dict(plain.state_dict())
    layer.to(plain.weight.dtype).to("cpu")
    return layer


def by_torchao(config: Any) -> Quantise:  # noqa: ANN401 - torchao's AOBaseConfig
    def quantise(plain: nn.Linear) -> nn.Module:
        quantize_(plain, config)
        return plain

    return quantise


FORMATS: Mapping[str, Quantise] = MappingProxyType({
    "nf4": four_bit,
    "fp4_plain_scales": lambda plain: four_bit(plain, quant_type="fp4", double=False),
    "nf4_stored_as_bf16": lambda plain: four_bit(plain, storage=torch.bfloat16),
    "int8": eight_bit,
    "int8_with_outliers": lambda plain: eight_bit(plain, threshold=2.0),
    "torchao_int8_rows": by_torchao(Int8WeightOnlyConfig()),
    "torchao_int8_groups": by_torchao(Int8WeightOnlyConfig(granularity=PerGroup(32))),
    "torchao_int8_tensor": by_torchao(Int8WeightOnlyConfig(granularity=PerTensor())),
    "torchao_int4_groups": by_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "torchao_float8": by_torchao(Float8WeightOnlyConfig()),
})
# ‖E‖ / ‖W + ΔW‖ of these formats, at least and at most, on weights that are uniform or Gaussian.
COST = {4: (0.06, 0.13), 8: (0.004, 0.03)}
BITS = {name: 8 if "8" in name else 4 for name in FORMATS}
FORMAT = pytest.mark.parametrize("form", FORMATS)
METHOD = pytest.mark.parametrize("method", ["lora", "rslora", "svd", "dora"])
OPTIONS: Mapping[str, dict[str, float]] = {"rslora": {"alpha": 3.0}}


def linear(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Linear:
    with seeded(seed):
        return nn.Linear(IN, OUT).to(dtype)


def quantised(form: str, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Module:
    return FORMATS[form](linear(dtype, seed=seed)).requires_grad_(False)


def network(form: str) -> nn.Sequential:
    """A layer, a quantised one on top of it, a head: its gradients pass the quantised one."""
    with seeded(1):
        return nn.Sequential(nn.Linear(6, IN), nn.Tanh(), quantised(form), nn.Linear(OUT, 3))


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(layer: nn.Module) -> dict[str, Tensor]:
    """Copy the codes and the scales of a layer."""
    weight: Any = layer._parameters["weight"]
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        found = {"codes": weight.data, "scales": scales}
    elif isinstance(weight, bitsandbytes.nn.Params4bit):
        state = weight.quant_state
        found = {"codes": weight.data.view(torch.uint8), "absmax": state.absmax}
        if state.nested:
            found |= {"absmax of absmax": state.state2.absmax, "offset": state.offset}
    else:
        found = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same_codes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def attach_here(
    layer: nn.Module, method: str = "lora", *, adapter: str = "default", size: float = 0.02
) -> tuple[nn.Module, Any]:
    """Put an adapter that has left its birth state on a layer, in a model of its own."""
    model = nn.ModuleDict({"layer": layer})
    model.train()
    one: Any = attach(model, {"layer": RANK}, method=method, adapter=adapter, **OPTIONS.get(method, {}))["layer"]
    with torch.no_grad():
        for seed, parameter in enumerate(one.parameters()):
            noise = inputs(*parameter.shape, seed=seed + 10)
            parameter.add_(math.sqrt(size) * noise if parameter.ndim == 2 else 0.1 * noise)
    return model, one


# Attaching


@METHOD
@FORMAT
def test_attaching_changes_no_bit_of_the_output_and_no_code(form: str, method: str) -> None:
    model = network(form)
    x = inputs(5, 6)
    for mode in (True, False):
        expected = model.train(mode)(x)
        before = codes(model[2])
        attached = attach(model, {"2": RANK}, method=method, **OPTIONS.get(method, {}))
        assert list(attached) == ["2"]
        assert torch.equal(model(x), expected)
        assert_same_codes(codes(model[2]), before)
        detach(model)


@FORMAT
def test_a_quantised_layer_is_a_linear_site_of_the_plain_ones_shape(form: str) -> None:
    model = network(form)
    found = sites(model)
    assert found["2"].operator == LinearOperator((OUT, IN))
    assert set(found) == {"0", "0.bias", "2", "2.bias", "3", "3.bias"}
    assert attach(model, {"all-linear": 1}).keys() == {"0", "2", "3"}


@METHOD
@FORMAT
def test_gradients_are_those_of_the_dequantised_twin(form: str, method: str) -> None:
    model = network(form)
    twin = copy.deepcopy(model)
    twin[2] = nn.Linear(IN, OUT)
    twin[2].load_state_dict({"weight": dequantised_weight(model[2]), "bias": model[2].bias})
    gradients = []
    for each in (model, twin):
        each.train()
        attached = attach(each, {"0": RANK, "2": RANK}, method=method, **OPTIONS.get(method, {}))
        for seed, one in enumerate(attached.values()):
            randomise(one, seed=seed)
        x = inputs(2, 5, 6).requires_grad_()
        each(x).square().mean().backward()
        own = [parameter.grad for one in attached.values() for parameter in one.parameters()]
        assert all(gradient is not None and gradient.count_nonzero() > 0 for gradient in [x.grad, *own])
        gradients.append([x.grad, *own])
    for ours, exact in zip(*gradients, strict=True):
        assert_close(ours, exact, 2e-5)


@METHOD
@FORMAT
def test_training_and_evaluating_changes_adapters_and_nothing_else(form: str, method: str) -> None:
    model = network(form)
    attached = attach(model, {"2": RANK}, method=method, **OPTIONS.get(method, {}))
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        f"2.adapters.default.{name}" for name, _ in attached["2"].named_parameters()
    }
    base = codes(model[2])
    others = {name: each.clone() for name, each in model.state_dict().items() if not name.startswith("2.")}
    adapter = {name: each.detach().clone() for name, each in attached["2"].named_parameters()}
    optimizer = torch.optim.AdamW(attached["2"].parameters(), lr=0.05, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model.train()(inputs(5, 6, seed=step)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(inputs(5, 6))
    assert_same_codes(codes(model[2]), base)
    assert [name for name, each in others.items() if not torch.equal(model.state_dict()[name], each)] == []
    assert [name for name, each in attached["2"].named_parameters() if torch.equal(each, adapter[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@FORMAT
def test_a_half_precision_layer_has_adapters_in_float32_and_answers_in_its_own_dtype(
    form: str, dtype: torch.dtype
) -> None:
    layer = quantised(form, dtype)
    x = inputs(5, IN, dtype=dtype)
    model, one = attach_here(layer)
    base = dequantised_weight(layer)
    assert base.dtype == torch.float32
    assert {each.dtype for each in one.parameters()} == {torch.float32}
    answer = layer(x)
    assert answer.dtype == dtype
    exact = x.double() @ (base + one.delta_weight()).double().T + layer.bias.double()
    assert_close(answer.detach(), exact.detach(), 2e-2)
    restored = codes(layer)
    merge(model)
    assert_close(layer(x), exact.detach(), 3 * COST[BITS[form]][1])
    unmerge(model)
    assert_same_codes(codes(layer), restored)
    assert torch.equal(layer(x), answer)


def test_eight_bit_inputs_in_evaluation_stay_the_librarys_own() -> None:
    layer = quantised("int8_with_outliers")
    x = inputs(5, IN)
    x[0, 3] = 9.0  # an outlier, which the library computes apart
    _, one = attach_here(layer.eval())
    layer.eval()
    adapted = layer(x)
    one.enabled = False
    assert torch.equal(adapted, layer(x) + one(x))
    assert not torch.allclose(layer(x), layer.train()(x), atol=1e-4)


def test_a_method_that_takes_the_weights_place_is_added_to_the_output_of_a_quantised_layer() -> None:
    class InPlace(LoRA):
        def materialises(self, x: Tensor) -> bool:
            return True

        def plain_factors(self) -> None:
            return None

    row = AdapterMethod(name="in_place", adapter=InPlace, scaling=METHODS["lora"].scaling)
    for form in FORMATS:
        layer = quantised(form)
        x = inputs(5, IN)
        base = layer.train()(x)
        one = attach(nn.ModuleDict({"layer": layer}), {"layer": RANK}, method=row)["layer"]
        randomise(one)
        assert torch.equal(layer(x), base + one(x))


# What is refused


def test_packed_weights_of_unknown_use_are_no_sites() -> None:
    model = nn.ModuleDict({
        "embedding_4": bitsandbytes.nn.Embedding4bit(8, 64).to("cpu"),
        "embedding_8": bitsandbytes.nn.Embedding8bit(8, 64).to("cpu"),
        "not_yet": bitsandbytes.nn.Linear4bit(IN, OUT, bias=False),
        "on_the_fly": bitsandbytes.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=True),
        "head": nn.Linear(OUT, 2, bias=False),
    })
    assert list(sites(model)) == ["head"]
    with pytest.raises(ValueError, match=r"'not_yet' is a Linear4bit"):
        attach(model, {"not_yet": 1})


def test_a_layer_that_quantises_its_input_without_a_gradient_is_refused() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 2))
    quantize_(model[1], Int8DynamicActivationInt8WeightConfig())
    x = inputs(3, OUT).requires_grad_()
    assert model[1](x).grad_fn is None or torch.autograd.grad(model[1](x).sum(), x, allow_unused=True)[0] is None
    with pytest.raises(ValueError, match=r"weights must leave the input.*Int8Tensor.*'1.weight'.*passes no gradient"):
        attach(model, {"0": 1})
    assert model[0].weight.requires_grad


@FORMAT
def test_a_quantised_module_cannot_be_trained_in_full(form: str) -> None:
    model = network(form)
    with pytest.raises(ValueError, match=r"modules_to_save must not be quantised, got '2'"):
        attach(model, {"0": 1}, modules_to_save=["3", "2"])
    assert model[0].weight.requires_grad


# The inference format of bitsandbytes


def packed(double: bool) -> tuple[nn.Module, Tensor]:
    """Bring a layer into the format that it takes on processors with AVX512-BF16; return its weight before."""
    layer: Any = four_bit(linear(), double=double).requires_grad_(False)
    before = dequantised_weight(layer)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    return layer, before


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_a_repacked_layer_gets_its_own_format_back_and_passes_gradients(double: bool) -> None:
    layer, before = packed(double)
    now = dequantised_weight(layer)  # with the scales in bfloat16
    assert_close(now, before, 2**-8)
    assert not torch.equal(now, before)
    model = nn.ModuleDict({"head": nn.Linear(OUT, 2), "layer": layer})
    attach(model, {"head": 1})  # not the layer itself
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(dequantised_weight(layer), now)
    with torch.no_grad():
        layer.eval()(inputs(3, IN))
    x = inputs(3, IN).requires_grad_()
    answer = layer.train()(x)
    assert_close(answer.detach(), (x @ now.T + layer.bias).detach(), 1e-6)
    assert_close(torch.autograd.grad(answer.sum(), x)[0], now.sum(0).expand(3, IN), 1e-6)


# Merging


@METHOD
@FORMAT
def test_merging_answers_as_unmerged_within_the_reported_error(form: str, method: str) -> None:
    layer = quantised(form)
    base = dequantised_weight(layer)
    model, one = attach_here(layer, method)
    x = inputs(7, IN)
    delta = one.delta_weight(base).detach()
    target = base + delta
    unmerged = layer(x).detach()
    assert_close(unmerged, x @ target.T + layer.bias, 1e-5)
    report = merge(model)
    assert merged(model)
    lost = (dequantised_weight(layer) - target).norm()
    assert report.error == {"layer": pytest.approx((lost / target.norm()).item(), rel=1e-4)}
    assert report.error_over_update == {"layer": pytest.approx((lost / delta.norm()).item(), rel=1e-4)}
    at_least, at_most = COST[BITS[form]]
    assert at_least < report.error["layer"] < at_most
    difference = (layer(x) - unmerged).norm()
    assert difference > 0
    rounding = 1e-5 * unmerged.norm()
    assert difference <= report.error["layer"] * target.norm() * torch.linalg.matrix_norm(x, 2) + rounding


def test_merging_quantises_in_the_layers_own_format_and_block_size() -> None:
    for form, block in (("nf4", 64), ("nf4_stored_as_bf16", 64), ("fp4_plain_scales", 64)):
        layer = quantised(form)
        base, before = dequantised_weight(layer), codes(layer)
        model, one = attach_here(layer)
        merge(model)
        state, parameter = layer.weight.quant_state, layer.weight
        expected, theirs = bitsandbytes.functional.quantize_4bit(
            base + one.delta_weight().detach(),
            blocksize=block,
            compress_statistics=form != "fp4_plain_scales",
            quant_type="fp4" if form == "fp4_plain_scales" else "nf4",
            quant_storage=parameter.dtype,
        )
        assert torch.equal(parameter.data.view(torch.uint8), expected.view(torch.uint8))
        assert state == theirs
        assert state is layer.quant_state
        assert codes(layer).keys() == before.keys()
        assert isinstance(parameter, bitsandbytes.nn.Params4bit)
    for form in ("torchao_int8_rows", "torchao_int8_groups", "torchao_int8_tensor", "torchao_float8"):
        layer = quantised(form)
        base, kind, block_size = dequantised_weight(layer), type(layer.weight), list(layer.weight.block_size)
        model, one = attach_here(layer)
        merge(model)
        fresh = linear()
        fresh.weight.data = base + one.delta_weight().detach()
        expected = FORMATS[form](fresh).weight
        assert type(layer.weight) is kind
        assert list(layer.weight.block_size) == block_size
        assert torch.equal(layer.weight.qdata.view(torch.int8), expected.qdata.view(torch.int8))
        torch.testing.assert_close(layer.weight.scale, expected.scale)


@METHOD
@FORMAT
def test_unmerging_restores_codes_scales_and_output_bit_by_bit(form: str, method: str) -> None:
    layer = quantised(form)
    model, _ = attach_here(layer, method)
    x = inputs(7, IN)
    parameter = layer.weight
    base, unmerged = codes(layer), layer(x)
    merge(model)
    once = codes(layer)
    assert not all(torch.equal(base[name], once[name]) for name in base)
    assert merge(model) == MergeReport()
    assert_same_codes(codes(layer), once)
    layer(x)  # an 8-bit layer now holds its scales elsewhere
    unmerge(model)
    assert not merged(model)
    assert_same_codes(codes(layer), base)
    assert torch.equal(layer(x), unmerged)
    assert layer.weight is parameter
    unmerge(model)
    assert_same_codes(codes(layer), base)


@FORMAT
def test_merging_in_two_steps_stays_within_both_errors_and_unmerges_both(form: str) -> None:
    layer = quantised(form)
    base, before = dequantised_weight(layer), codes(layer)
    model, one = attach_here(layer)
    first = merge(model)
    middle = dequantised_weight(layer)
    other = attach(model, {"layer": 2}, adapter="second")["layer"]
    randomise(other)
    second = merge(model, keep_weight=False)  # the copy is there already
    bound = first.error["layer"] * (base + one.delta_weight()).norm()
    bound = bound + second.error["layer"] * (middle + other.delta_weight()).norm()
    target = base + one.delta_weight() + other.delta_weight()
    assert (dequantised_weight(layer) - target).norm() <= bound * (1 + 1e-5)
    unmerge(model)
    assert_same_codes(codes(layer), before)


@FORMAT
def test_a_quantised_weight_must_be_kept(form: str) -> None:
    layer = quantised(form)
    model, _ = attach_here(layer)
    before = codes(layer)
    with pytest.raises(ValueError, match=r"keep_weight must be True.*'layer'.*does not bring the codes back"):
        merge(model, keep_weight=False)
    assert not merged(model)
    assert_same_codes(codes(layer), before)


def test_an_update_below_the_step_of_the_format_is_reported_as_lost() -> None:
    model, _ = attach_here(quantised("nf4"), size=1e-5)
    assert merge(model).error_over_update["layer"] > 0.9
    model, _ = attach_here(quantised("int8"), size=0.02)
    assert merge(model).error_over_update["layer"] < 0.1


def test_plain_weights_have_nothing_to_report() -> None:
    model, _ = attach_here(linear())
    assert merge(model) == MergeReport(error={}, error_over_update={})
    assert merged(model)


@FORMAT
def test_a_merge_that_is_not_finite_leaves_every_code_untouched(form: str) -> None:
    model = nn.ModuleDict({"first": quantised(form), "second": quantised(form, seed=1)})
    for name, one in attach(model, {"*": RANK}).items():
        randomise(one)
        if name == "second":
            one.lora_B.data[0, 0] = torch.nan
    before = {name: codes(layer) for name, layer in model.items()}
    with pytest.raises(ValueError, match=r"merged weights must be finite.*'second'.*Nothing was merged"):
        merge(model)
    assert not merged(model)
    for name, layer in model.items():
        assert_same_codes(codes(layer), before[name])


def test_weights_beyond_float16_are_refused_by_an_eight_bit_layer() -> None:
    model, one = attach_here(quantised("int8"))
    one.lora_B.data.fill_(1e6)
    with pytest.raises(ValueError, match="merged weights must be finite"):
        merge(model)


@FORMAT
def test_a_quantised_weight_that_two_modules_share_is_not_merged(form: str) -> None:
    model = nn.ModuleDict({"one": quantised(form), "other": quantised(form)})
    model["other"].weight = model["one"].weight
    attach(model, {"one": 1})
    randomise(adapters(model)["one"])
    with pytest.raises(ValueError, match=r"weight must belong to one module only, got one.weight = other.weight"):
        merge(model)


def test_biases_of_a_quantised_layer_are_trained_and_merged_as_plain_ones() -> None:
    for form in FORMATS:
        layer = quantised(form)
        model = nn.ModuleDict({"layer": layer})
        x = inputs(5, IN)
        base = layer.train()(x)
        one = attach(model, {"layer.bias": 1}, method="bitfit")["layer.bias"]
        assert torch.equal(layer(x), base)
        layer(x).sum().backward()
        assert one.offset.grad.count_nonzero() > 0
        randomise(one)
        assert_close(layer(x).detach(), base + one.offset.detach(), 1e-5)
        assert merge(model) == MergeReport()
        assert_close(layer(x), base + one.offset.detach(), 1e-5)
        unmerge(model)
        detach(model)
        assert torch.equal(layer(x), base)


# Reading


def test_a_dequantised_weight_is_what_the_library_says() -> None:
    layer = quantised("nf4")
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantised_weight(layer), expected)
    layer = quantised("int8")
    expected = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    torch.testing.assert_close(dequantised_weight(layer), expected, rtol=1e-6, atol=0)
    layer(inputs(2, IN))  # takes the scales over
    torch.testing.assert_close(dequantised_weight(layer), expected, rtol=1e-6, atol=0)
    for form in (name for name in FORMATS if "torchao" in name):
        layer = quantised(form)
        assert torch.equal(dequantised_weight(layer), layer.weight.dequantize())
        assert type(dequantised_weight(layer)) is Tensor
    plain = linear()
    assert torch.equal(dequantised_weight(plain), plain.weight)
    assert dequantised_weight(quantised("nf4", torch.bfloat16)).dtype == torch.float32


@FORMAT
def test_pissa_decomposes_the_dequantised_weight(form: str) -> None:
    layer = quantised(form)
    model = nn.ModuleDict({"layer": layer})
    x = inputs(5, IN)
    base, before = layer.train()(x), codes(layer)
    one = attach(model, {"layer": RANK})["layer"]
    initialise(model, "pissa")
    expected = pissa(dequantised_weight(layer), RANK, scaling=one.scaling)
    assert torch.equal(one.lora_A, expected.lora_A)
    assert torch.equal(one.lora_B, expected.lora_B)
    assert_close(layer(x).detach(), base, 1e-5)
    assert_same_codes(codes(layer), before)


# Copies, state dicts, files


@FORMAT
def test_a_deep_copy_merges_and_unmerges_on_its_own(form: str) -> None:
    model = network(form).train()
    randomise(attach(model, {"2": RANK})["2"])
    x = inputs(5, 6)
    base, unmerged = codes(model[2]), model(x)
    twin = copy.deepcopy(model)
    merge(twin)
    assert torch.equal(model(x), unmerged)
    assert not torch.equal(twin(x), unmerged)
    third = copy.deepcopy(twin)
    unmerge(third)
    assert torch.equal(third(x), unmerged)
    assert merged(twin)
    assert_same_codes(codes(third[2]), base)
    assert_same_codes(codes(model[2]), base)


@FORMAT
def test_a_state_dict_has_the_layers_own_keys_and_the_adapters(form: str) -> None:
    model = network(form)
    own = set(model.state_dict())
    randomise(attach(model, {"2": RANK})["2"])
    added = {"2.adapters.default.lora_A", "2.adapters.default.lora_B"}
    assert set(model.state_dict()) == own | added
    if "4" in form and "torchao" not in form:
        return  # bitsandbytes itself does not load these into a quantised layer
    twin = network(form)
    attach(twin, {"2": RANK})
    twin.load_state_dict(model.state_dict())
    x = inputs(5, 6)
    assert torch.equal(twin(x), model(x))


def llama_folder(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    with seeded(0):
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


LOADED: Mapping[str, Any] = MappingProxyType({
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao_int8": TorchAoConfig(Int8WeightOnlyConfig()),
})


def load(folder: Path, form: str) -> Any:  # noqa: ANN401 - a LlamaForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LOADED[form], device_map="cpu")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", LOADED)
def test_peft_gives_equal_logits_on_a_base_that_transformers_loads_quantised(
    form: str, dora: bool, tmp_path: Path
) -> None:
    base = llama_folder(tmp_path / "base")
    model = load(base, form)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        untouched = model(ids).logits
    ranks = {"q_proj": 3, "v_proj": 2, "down_proj": 4}
    attached = attach(model, ranks, method="dora" if dora else "lora", scaling=1.5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, untouched)
    for seed, one in enumerate(attached.values()):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.1 * inputs(*parameter.shape, seed=seed))
    save_adapter(model, tmp_path / "adapter", task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(load(base, form), tmp_path / "adapter")
    with torch.no_grad():
        ours = model(ids).logits
        assert not torch.allclose(ours, untouched, atol=1e-2)
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_the_file_of_an_adapter_of_a_quantised_base_is_plain_lora(tmp_path: Path) -> None:
    base = llama_folder(tmp_path / "base")
    model = load(base, "nf4")
    attached = attach(model, {"q_proj": 3})
    randomise(next(iter(attached.values())))
    save_adapter(model, tmp_path / "adapter", task_type="CAUSAL_LM")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {name: tensor.shape for name, tensor in found.items()} == {
        f"{stem}.lora_A.weight": (3, 64),
        f"{stem}.lora_B.weight": (64, 3),
    }
    for other in (load(base, "int8"), LlamaForCausalLM.from_pretrained(base)):
        load_adapter(other, tmp_path / "adapter")
        (again,) = adapters(other).values()
        (one,) = attached.values()
        torch.testing.assert_close(again.delta_weight(), one.delta_weight())


# Imports


def test_without_quantised_layers_no_library_of_theirs_is_imported() -> None:
    code = """
import sys
import torch
from flowra_adapters import attach, merge, unmerge
model = torch.nn.Sequential(torch.nn.Linear(4, 3))
attach(model, {"0": 2})
model(torch.ones(2, 4)).sum().backward()
merge(model)
unmerge(model)
print(sorted({"bitsandbytes", "torchao", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
