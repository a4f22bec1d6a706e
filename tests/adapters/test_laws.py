"""The battery: every law over every method, layer type and dtype."""

import json
from pathlib import Path

import pytest
import torch

import flowra_adapters
from flowra_testing.adapter_table import METHODS, LayerType, Method, in_every_run
from flowra_testing.asserts import LAWS, attach_to, build_case, randomise, strength

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    pytest.param(
        law,
        method,
        layer_type,
        dtype,
        id=f"{law}-{method.name}-{kind}-{str(dtype).removeprefix('torch.')}",
        marks=() if in_every_run(method, kind, dtype) else pytest.mark.exhaustive,
    )
    for method in METHODS
    for kind, layer_type in method.layer_types.items()
    for dtype in method.dtypes
    if dtype in layer_type.dtypes
    for law in LAWS
    if law not in method.exceptions
]
METHOD = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
LOW_RANK = pytest.mark.parametrize(
    "method", [each for each in METHODS if each.key in ("lora", "rslora")], ids=lambda method: method.name
)
RESIZABLE = pytest.mark.parametrize(
    "method", [each for each in METHODS if "linear" in each.layer_types], ids=lambda method: method.name
)


@pytest.mark.parametrize(("law", "method", "layer_type", "dtype"), CASES)
def test_law_holds(law: str, method: Method, layer_type: LayerType, dtype: torch.dtype) -> None:
    LAWS[law](method, layer_type, dtype)


def test_every_method_of_the_package_has_one_row() -> None:
    assert sorted(method.key for method in METHODS) == sorted(flowra_adapters.METHODS)


@METHOD
def test_every_row_has_a_golden_value(method: Method) -> None:
    file, key = method.golden
    golden = json.loads((GOLDEN / f"{file}.json").read_text())
    cases = golden.get("cases", [])
    names = cases if isinstance(cases, dict) else [case.get("name") for case in cases]
    assert key in golden or key in names


@METHOD
def test_every_exception_names_a_law_and_a_reason(method: Method) -> None:
    assert method.exceptions.keys() <= LAWS.keys()
    assert all(reason.strip() for reason in method.exceptions.values())


@LOW_RANK
def test_the_first_gradient_reaches_the_new_rows_after_growth(method: Method) -> None:
    layer_type = method.layer_types["linear"]
    case = build_case(layer_type, torch.float64)
    adapter = attach_to(case, method, 1)
    randomise(adapter)
    adapter.grow(layer_type.rows(1))
    case.layer(case.x).sum().backward()
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert adapter.lora_B.grad[:, 1].count_nonzero() > 0


@LOW_RANK
def test_a_half_precision_adapter_still_materialises_in_float32(method: Method) -> None:
    layer_type = method.layer_types["linear"]
    case = build_case(layer_type, torch.float32)
    options = {"method": method.key, "dtype": torch.bfloat16, **strength(method)}
    adapter = flowra_adapters.attach(case.model, {"layer": 2}, **options)["layer"]
    randomise(adapter)
    delta = adapter.delta_weight()
    assert delta.dtype == torch.float32
    exact = adapter.scaling * (adapter.lora_B.double() @ adapter.lora_A.double())
    torch.testing.assert_close(delta.double(), exact, rtol=1e-5, atol=1e-6)


@RESIZABLE
def test_unmerge_without_copy_subtracts_what_was_merged_even_if_the_adapter_changed_since(method: Method) -> None:
    layer_type = method.layer_types["linear"]
    case = build_case(layer_type, torch.float64)
    adapter = attach_to(case, method, 3)
    randomise(adapter)
    base = case.weight.detach().clone()
    flowra_adapters.merge(case.model, keep_weight=False)
    adapter.shrink([0])
    flowra_adapters.unmerge(case.model)
    torch.testing.assert_close(case.weight.detach(), base, rtol=0, atol=1e-14)


@RESIZABLE
@pytest.mark.parametrize("keep_first", [True, False], ids=["copy_kept_first", "no_copy_first"])
@pytest.mark.parametrize("keep_second", [True, False], ids=["copy_kept_second", "no_copy_second"])
def test_merging_in_two_steps_unmerges_both(method: Method, keep_first: bool, keep_second: bool) -> None:
    layer_type = method.layer_types["linear"]
    case = build_case(layer_type, torch.float64)
    randomise(attach_to(case, method, 3))
    base = case.weight.detach().clone()
    flowra_adapters.merge(case.model, keep_weight=keep_first)
    randomise(attach_to(case, method, 2, adapter="second"), seed=5)
    adapted = case.output()
    flowra_adapters.merge(case.model, keep_weight=keep_second)
    torch.testing.assert_close(case.output(), adapted)
    flowra_adapters.unmerge(case.model)
    torch.testing.assert_close(case.weight.detach(), base, rtol=0, atol=1e-14)


@RESIZABLE
def test_a_failing_merge_leaves_every_weight_untouched(method: Method) -> None:
    layer_type = method.layer_types["linear"]
    case = build_case(layer_type, torch.float32)
    found = flowra_adapters.attach(case.model, {"layer": 2, "head": 1}, method=method.key, **strength(method))
    for adapter in found.values():
        randomise(adapter)
    next(found["head"].parameters()).data[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"merged weights must be finite.*'head'.*Nothing was merged"):
        flowra_adapters.merge(case.model)
    assert not flowra_adapters.merged(case.model)
    after = case.model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
