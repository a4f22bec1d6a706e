import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MixtralConfig, MixtralModel, T5Config, T5Model

from flowra_analysis import (
    BlockJacobians,
    JacobianNorms,
    block_jacobians,
    find_blocks,
    per_example_jacobian_norms,
)
from flowra_analysis.state_files import state_from_bytes, state_to_bytes
from flowra_testing.tiny_models import VOCABULARY, batch

Batch = Mapping[str, Tensor]


def bert(implementation: str = "sdpa") -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        initializer_range=0.5,
        attn_implementation=implementation,
    )
    return BertModel(config).double()


def llama(implementation: str = "sdpa") -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=12,
        initializer_range=0.3,
        attn_implementation=implementation,
    )
    return LlamaModel(config).double()


MODELS: dict[str, Callable[[str], nn.Module]] = {"bert": bert, "llama": llama}


def run(model: nn.Module, batch: Batch) -> object:
    options = {"use_cache": False} if isinstance(model, LlamaModel) else {}
    return model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), **options)


def mask(batch: Batch) -> Tensor:
    return batch["attention_mask"]


def exact_jacobians(model: nn.Module, name: str, batch: Batch) -> list[Tensor]:
    """The Jacobian of a block for each example, real positions only, by the formula of attention and autograd."""
    seen: dict[str, Any] = {}
    block = model.get_submodule(name)

    def remember(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)

    handle = block.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        run(model.eval(), batch)
    handle.remove()
    hidden, *others = seen["args"]

    def function(x: Tensor) -> Tensor:
        output: Tensor = block(x, *others, **seen["kwargs"])
        return output

    whole = torch.autograd.functional.jacobian(function, hidden)  # (N, T, d, N, T, d)
    found = []
    for index, real in enumerate(mask(batch).bool()):
        own = whole[index, :, :, index]
        found.append(own[real][:, :, real].flatten(2).flatten(0, 1))
    return found


def linear_stack(*, training: bool = False) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.5)) for _ in range(3)]
    return nn.Sequential(*layers).train(training)


def call(model: nn.Module, batch: Tensor) -> object:
    return model(batch)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", MODELS)
def test_blocks_of_transformers_have_the_norms_of_their_exact_jacobians(family: str, implementation: str) -> None:
    model, data = MODELS[family](implementation), batch(size=3, length=4)
    exact = {name: exact_jacobians(model, name, data) for name in find_blocks(model)}
    found = next(
        per_example_jacobian_norms(
            model, [data], run, exact, mask=mask, num_probes=300, max_iterations=1500, tolerance=1e-13
        )
    )
    assert list(found) == list(exact)
    for name, jacobians in exact.items():
        for index, jacobian in enumerate(jacobians):
            measured = JacobianNorms(*(each[index] for each in found[name]))
            sigma, square = float(torch.linalg.matrix_norm(jacobian, 2)), float(jacobian.square().sum())
            gram = jacobian.T @ jacobian
            error = math.sqrt(2 * float(gram.square().sum() - gram.diagonal().square().sum()) / 300)
            assert float(measured.spectral_norm) == pytest.approx(sigma, rel=1e-7)
            assert abs(float(measured.gain) * len(jacobian) - square) < 3.5 * error
            condition = float(measured.spectral_norm / measured.gain.sqrt())  # d_in = d_out
            assert float(measured.condition) == pytest.approx(condition)
            assert condition == pytest.approx(sigma * math.sqrt(len(jacobian) / square), rel=0.1)


@pytest.mark.parametrize("family", MODELS)
def test_the_default_estimate_of_the_spectral_norm_is_a_lower_bound_that_says_how_far_it_got(family: str) -> None:
    model, data = MODELS[family]("sdpa"), batch(size=3, length=5)
    for name, found in block_jacobians(model, [data], run, find_blocks(model), mask=mask).items():
        exact = [float(torch.linalg.matrix_norm(each, 2)) for each in exact_jacobians(model, name, data)]
        assert found.spectral_norm.mean <= sum(exact) / 3
        assert found.spectral_norm.mean > 0.9 * sum(exact) / 3
        assert found.num_iterations == 10 or found.relative_change <= 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_padding_changes_nothing_that_is_measured_of_an_example(family: str) -> None:
    model, padded = MODELS[family]("sdpa"), batch(size=3, length=7)
    cropped = {key: each[-1:, :5] for key, each in padded.items()}
    long, short = (
        next(
            per_example_jacobian_norms(
                model, [each], run, find_blocks(model), mask=mask, num_probes=1, max_iterations=1000, tolerance=1e-12
            )
        )
        for each in (padded, cropped)
    )
    for name in long:
        torch.testing.assert_close(long[name].spectral_norm[-1:], short[name].spectral_norm, rtol=1e-6, atol=0)


def test_a_layer_of_pytorch_is_measured_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    found = next(per_example_jacobian_norms(model, [x], call, find_blocks(model), max_iterations=2000, tolerance=1e-13))
    model.eval()
    for index in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda one: model.layers[0](one[None])[0], x[index])
        expected = torch.linalg.matrix_norm(jacobian.view(32, 32), 2)
        torch.testing.assert_close(found["layers.0"].spectral_norm[index], expected, rtol=1e-7, atol=0)


def test_a_wide_layer_counts_its_outputs_and_its_condition_the_smaller_side() -> None:
    layer = nn.Linear(3, 6, dtype=torch.float64)
    norms = next(
        per_example_jacobian_norms(
            nn.ModuleDict({"a": layer}),
            [torch.randn(2, 4, 3, dtype=torch.float64)],
            lambda model, batch: model["a"](batch),
            "a",
            num_probes=4000,
            max_iterations=1000,
            tolerance=1e-13,
        )
    )["a"]
    square = float(layer.weight.detach().square().sum())
    sigma = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    assert norms.gain.tolist() == pytest.approx([square / 6] * 2, rel=0.05)  # 4 ‖W‖² over 4 · 6 outputs
    assert norms.spectral_norm.tolist() == pytest.approx([sigma] * 2)
    assert norms.condition.tolist() == pytest.approx([sigma * math.sqrt(3 / square)] * 2, rel=0.05)


def test_mean_and_standard_error_are_those_over_examples_in_any_split() -> None:
    model, x = linear_stack(), torch.randn(7, 5)
    batches = list(per_example_jacobian_norms(model, x.split([3, 1, 3]), call, ["2", "0"]))
    whole = block_jacobians(model, x.split([3, 1, 3]), call, ["2", "0"])
    assert list(whole) == ["2", "0"]
    left, right = BlockJacobians.init(), BlockJacobians.init()
    for name in ("0", "2"):
        left = left.update(name, batches[2][name])
        right = right.update(name, batches[0][name]).update(name, batches[1][name])
    merged = left.merge(right).finalise()
    for name in ("0", "2"):
        gains = torch.cat([each[name].gain for each in batches])
        assert whole[name].gain.mean == pytest.approx(float(gains.mean()))
        assert whole[name].gain.standard_error == pytest.approx(float(gains.std()) / math.sqrt(7))
        assert merged[name].statistics() == pytest.approx(whole[name].statistics())
    assert BlockJacobians.init().norms == {}


def test_a_state_that_was_saved_goes_on() -> None:
    model, x = linear_stack(), torch.randn(3, 5)
    first, second = (each["0"] for each in per_example_jacobian_norms(model, [x, x], call, ["0"]))
    saved = state_to_bytes(BlockJacobians.init().update("0", first))
    resumed = state_from_bytes(saved, BlockJacobians).update("0", second)
    assert resumed.finalise() == block_jacobians(model, [x, x], call, ["0"])


def test_statistics_have_the_names_of_a_profile() -> None:
    found = block_jacobians(linear_stack(), [torch.randn(3, 5)], call, ["1"])["1"]
    assert found.statistics() == {
        "jacobian_relative_change": found.relative_change,
        "jacobian_gain": found.gain.mean,
        "jacobian_gain_stderr": found.gain.standard_error,
        "jacobian_spectral_norm": found.spectral_norm.mean,
        "jacobian_spectral_norm_stderr": found.spectral_norm.standard_error,
        "jacobian_condition": found.condition.mean,
        "jacobian_condition_stderr": found.condition.standard_error,
    }


def test_the_seed_decides_batches_have_their_own_probes_and_other_blocks_do_not_matter() -> None:
    model, x = linear_stack(), torch.randn(3, 5)
    before = torch.get_rng_state()

    def gains(names: list[str], seed: int) -> list[Tensor]:
        return [each["1"].gain for each in per_example_jacobian_norms(model, [x, x], call, names, seed=seed)]

    both, alone, other = gains(["0", "1"], 5), gains(["1"], 5), gains(["1"], 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[1], alone[1])
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], other[0])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(*, fails: bool) -> None:
    model = linear_stack(training=True)
    model[1].eval()
    modes = [module.training for module in model.modules()]
    parameters = {name: each.clone() for name, each in model.named_parameters()}

    def run_or_fail(model: nn.Module, batch: Tensor) -> object:
        assert not model.training
        assert not torch.is_grad_enabled()
        model(batch)
        if fails:
            raise RuntimeError("stop")
        return None

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            block_jacobians(model, [torch.randn(3, 5)], run_or_fail, ["0"])
    else:
        for _ in per_example_jacobian_norms(model, [torch.randn(3, 5)] * 2, run_or_fail, ["0", "1"]):
            assert [module.training for module in model.modules()] == modes
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, each in model.named_parameters():
        assert each.requires_grad
        assert each.grad is None
        assert torch.equal(each, parameters[name])


def test_a_block_that_is_called_twice_has_the_mean_over_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x) * 3)

    model, x = Twice(), torch.randn(2, 5, dtype=torch.float64)
    found = next(per_example_jacobian_norms(model, [x], call, ["block"], max_iterations=1000, tolerance=1e-12))
    with torch.no_grad():
        inputs = [x, model.block(x) * 3]
    expected = [
        sum(
            torch.linalg.matrix_norm(torch.autograd.functional.jacobian(model.block, each[index]), 2) for each in inputs
        )
        for index in range(2)
    ]
    torch.testing.assert_close(found["block"].spectral_norm, torch.stack(expected) / 2, rtol=1e-8, atol=0)


def test_a_block_that_changes_its_input_in_place_is_measured_at_what_it_got() -> None:
    model = nn.Sequential(Wrapped(lambda x: x * 2), nn.Sequential(nn.ReLU(inplace=True)))
    x = torch.tensor([[-1.0, 2.0, 3.0, -4.0], [1.0, -1.0, -1.0, -1.0]])
    norms = next(per_example_jacobian_norms(model, [x], call, ["0", "1"]))
    assert norms["0"].gain.tolist() == pytest.approx([4, 4])  # its output was changed after the call
    assert norms["1"].gain.tolist() == pytest.approx([0.5, 0.25])  # measured after the change, it would be 1


class Odd(nn.Module):
    """Blocks with odd arguments and outputs."""

    def __init__(self, block: Callable[..., object]) -> None:
        super().__init__()
        self.block = Wrapped(block)

    def forward(self, x: Tensor) -> None:
        self.block(None, 3, hidden=x, scale=torch.full_like(x, 2))


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    "pack",
    [lambda y: y, lambda y: (None, y, y * 9), lambda y: {"loss": None, "hidden": y}, lambda y: [y]],
    ids=["tensor", "tuple", "mapping", "list"],
)
def test_the_first_tensor_among_arguments_and_outputs_counts(pack: Callable[[Tensor], object]) -> None:
    model = Odd(lambda _, number, hidden, scale: pack(hidden * scale * number))
    found = block_jacobians(model, [torch.randn(4, 3, 2)], call, "block")["block"]
    assert found.spectral_norm == pytest.approx((6, 0), abs=1e-5)
    assert found.gain == pytest.approx((36, 0), abs=1e-4)
    assert found.condition == pytest.approx((1, 0), abs=1e-5)


def test_a_block_without_effect_has_norm_zero() -> None:
    found = block_jacobians(Odd(lambda _, number, hidden, scale: hidden * 0), [torch.randn(4, 3)], call, "block")
    assert set(found["block"].statistics().values()) == {0}


def test_narrow_models_are_measured() -> None:
    model, data = llama().bfloat16(), batch(size=4, length=6)
    half = block_jacobians(model, [data], run, find_blocks(model), mask=mask)
    double = block_jacobians(model.double(), [data], run, find_blocks(model), mask=mask)
    for name, found in half.items():
        assert found.spectral_norm.mean == pytest.approx(double[name].spectral_norm.mean, rel=0.02)
        assert found.gain.mean == pytest.approx(double[name].gain.mean, rel=0.02)


def test_a_cache_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"got a DynamicCache. Pass use_cache=False; in block 'layers.0', batch 0"):
        block_jacobians(model, [batch()], lambda model, batch: model(batch["input_ids"]), find_blocks(model))


def test_what_cannot_be_measured_is_refused() -> None:
    model, data = linear_stack(), [torch.randn(3, 5)]
    with pytest.raises(ValueError, match=r"block_names must be names of modules, .*got 'O', nearest names"):
        block_jacobians(model, data, call, ["O"])
    with pytest.raises(ValueError, match="block_names must be names of modules, at least one, got none"):
        block_jacobians(model, data, call, [])
    with pytest.raises(ValueError, match="blocks must be called by run, got no call of '1' in batch 0"):
        block_jacobians(model, data, lambda model, batch: model[0](batch), ["0", "1"])
    with pytest.raises(ValueError, match=r"every block must have at least 2 examples, got \{'0': 1\}"):
        block_jacobians(model, [torch.randn(1, 5)], call, ["0"])
    with pytest.raises(ValueError, match="every block must have at least 2 examples, got none"):
        block_jacobians(model, [], call, ["0"])
    with pytest.raises(ValueError, match=r"num_probes must be at least 1, got 1 and 0; in block '0', batch 0"):
        block_jacobians(model, data, call, ["0"], num_probes=0)
    with pytest.raises(ValueError, match=r"mask must have one row per example, got 2 for 3; in block '0'"):
        block_jacobians(model, data, call, ["0"], mask=lambda batch: torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"outside torch.inference_mode, .*; in block '0', batch 0"):
        block_jacobians(model, data, torch.inference_mode()(call), ["0"])
    empty = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"real must leave something of each example, got none at \[1\]; in block"):
        block_jacobians(model, [torch.randn(2, 2, 5)], call, ["0"], mask=lambda batch: empty)
    with pytest.raises(ValueError, match=r"a block must give the same .*; in block '', batch 0"):
        block_jacobians(Wrapped(lambda x: x + torch.rand(()) * x), data, call, [""])
    with pytest.raises(ValueError, match="a block must take a tensor, got none among its arguments"):
        block_jacobians(Wrapped(lambda: 3), data, lambda model, batch: model(), [""])
    with pytest.raises(ValueError, match=r"a block must give a tensor, got a int without one"):
        block_jacobians(Wrapped(lambda x: 3), data, call, [""])
    with pytest.raises(ValueError, match=r"x must have shape .* floating point, got \(3, 5\) of torch.int64"):
        block_jacobians(nn.Embedding(9, 4), [torch.ones(3, 5, dtype=torch.long)], call, [""])


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_fused_attention_is_refused_with_the_way_out(implementation: str) -> None:
    model = bert()
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=rf'got \'{implementation}\' in a BertModel. .*attn_implementation="eager"'):
        block_jacobians(model, [batch()], run, find_blocks(model))


def test_blocks_are_found_in_transformers() -> None:
    assert find_blocks(bert()) == ["encoder.layer.0", "encoder.layer.1"]
    assert find_blocks(llama()) == ["layers.0", "layers.1"]
    small = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
    assert find_blocks(T5Model(T5Config(**small))) == [
        f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)
    ]
    config = MixtralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    assert find_blocks(MixtralModel(config)) == ["layers.0"]


def test_blocks_are_found_in_plain_models() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    model = nn.Sequential(nn.Sequential(block(), block()), block())
    assert find_blocks(nn.ModuleDict({"a": model, "b": nn.ModuleList([block()])})) == ["a.0", "a.1", "b.0"]
    heads = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2)]), "norms": nn.ModuleList([nn.LayerNorm(2)])})
    with pytest.raises(ValueError, match=r"model must hold an nn.ModuleList of blocks, got none in ModuleDict"):
        find_blocks(heads)
