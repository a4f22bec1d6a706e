"""Putting adapters on a model and taking them off."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from flowra_adapters import (
    LoRA,
    adapters,
    attach,
    delete,
    detach,
    disable,
    disabled,
    enable,
    merge,
    merged,
    save_adapter,
    sites,
    unmerge,
)
from flowra_testing.asserts import randomise
from flowra_testing.tiny_models import batch, bert_classifier, called_twice, llama_causal_lm, mlp, seeded, tied

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a failing call must leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "modules": [name for name, _ in model.named_modules()],
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][name], tensor) for name, tensor in before["state"].items())
    for key in before.keys() - {"state"}:
        assert after[key] == before[key], key


def adapt(model: nn.Module, ranks: dict[str, int], *, adapter: str = "default", seed: int = 0) -> dict[str, Any]:
    found = attach(model, ranks, adapter=adapter)
    for offset, one in enumerate(found.values()):
        randomise(one, seed=seed + offset)
    return found


def test_an_exact_name_wins_over_patterns() -> None:
    found = attach(mlp(), {"all-linear": 2, "up": 5, "head": 0})
    assert {name: one.rank for name, one in found.items()} == {"up": 5, "down": 2, "skip": 2, "head": 0}


def test_patterns_that_agree_may_overlap() -> None:
    found = attach(mlp(), {"u*": 2, "all-linear": 2})
    assert [one.rank for one in found.values()] == [2, 2, 2, 2]


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no_ranks": ({"ranks": {}}, "ranks must name at least one module"),
    "unknown_method": ({"method": "dora2"}, r"method must be one of \[.*'lora'.*\], got 'dora2'"),
    "empty_name": ({"adapter": ""}, "adapter must be a name without dots and colons, got ''"),
    "dotted_name": ({"adapter": "a.b"}, "adapter must be a name without dots and colons, got 'a.b'"),
    "typo": ({"ranks": {"up": 2, "dwon": 2}}, "got 'dwon'. Nearest names: down"),
    "conflict": ({"ranks": {"u*": 2, "?p": 3}}, r"patterns must agree on a rank, got 'u\*': 2 and '\?p': 3 for 'up'"),
    "rank_too_large": (
        {"ranks": {"up": 2, "head": 4}},
        r"rank must be in \[0, 3\] for a weight \(3, 6\), got 4; for module 'head'",
    ),
    "rank_negative": (
        {"ranks": {"up": -1}},
        r"rank must be in \[0, 8\] for a weight \(12, 8\), got -1; for module 'up'",
    ),
    "rank_not_whole": ({"ranks": {"up": 2.0}}, "rank must be a whole number, got 2.0 for 'up'"),
    "rank_bool": ({"ranks": {"up": True}}, "rank must be a whole number, got True for 'up'"),
    "scaling_zero": ({"scaling": 0.0}, "scaling must be finite and not 0, got 0.0"),
    "scaling_nan": ({"scaling": float("nan")}, "scaling must be finite and not 0, got nan"),
    "scaling_and_alpha": ({"scaling": 1.0, "alpha": 2.0}, "scaling and alpha must not both be given, got 1.0 and 2.0"),
    "alpha_zero": ({"alpha": 0.0}, "scaling must be finite and not 0, got 0.0"),
    "rslora_without_alpha": ({"method": "rslora"}, "rslora must be given alpha"),
    "dropout_one": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "dropout_negative": ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
    "unknown_module_to_save": ({"modules_to_save": ["heed"]}, "modules_to_save must name modules .*, got 'heed'"),
    "taken_name": ({"adapter": "first"}, "adapter must be a new name, got 'first', which is already attached to 'up'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_failing_attach_leaves_the_model_untouched(arguments: dict[str, Any], message: str) -> None:
    model = mlp()
    attach(model, {"up": 1}, adapter="first")
    model.head.requires_grad_(True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **{"ranks": {"up": 2, "down": 2}, **arguments})
    assert_untouched(model, before)


def test_only_adapters_and_modules_to_save_require_gradients() -> None:
    model = bert_classifier()
    attach(model, {"query": 2}, modules_to_save=["classifier"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    queries = [f"bert.encoder.layer.{index}.attention.self.query.adapters.default" for index in range(2)]
    assert trainable == {f"{name}.{end}" for name in queries for end in ("lora_A", "lora_B")} | {
        "classifier.weight",
        "classifier.bias",
    }


def test_attaching_a_second_set_keeps_the_first_trainable() -> None:
    model = mlp()
    attach(model, {"up": 2}, modules_to_save=["head"])
    attach(model, {"down": 2}, adapter="second")
    trainable = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable >= {"up", "down"}


def test_the_global_generator_is_not_touched_and_attaching_is_deterministic() -> None:
    state = torch.random.get_rng_state()
    first, second = (attach(mlp(), {"up": 2})["up"].state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first["lora_A"], second["lora_A"])
    other = attach(mlp(), {"up": 2}, generator=torch.Generator().manual_seed(1))["up"].state_dict()
    assert not torch.equal(first["lora_A"], other["lora_A"])


def test_a_is_uniform_within_one_over_root_n_and_b_is_zero() -> None:
    found = attach(nn.Sequential(nn.Linear(400, 400)), {"0": 100})["0"]
    assert isinstance(found, LoRA)
    assert found.lora_A.abs().max() <= 1 / 20
    assert found.lora_A.std().item() == pytest.approx(1 / (1200**0.5), rel=0.02)
    assert found.lora_A.mean().abs() < 1e-3
    assert found.lora_B.count_nonzero() == 0


def test_dropout_acts_on_the_adapter_path_in_training_only() -> None:
    model = mlp()
    found = attach(model, {"up": 2}, dropout=0.5)["up"]
    randomise(found)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    with disabled(model):
        assert torch.equal(model(X), model(X))


def test_state_dict_keys_of_the_base_stay_and_detach_restores_them() -> None:
    model = mlp()
    keys, output = list(model.state_dict()), model(X)
    adapt(model, {"all-linear": 2})
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    detach(model)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(hasattr(module, "adapters") for module in model.modules())
    assert torch.equal(model(X), output)


def test_detach_after_merge_keeps_the_merged_weights() -> None:
    model = mlp()
    adapt(model, {"all-linear": 2})
    expected = model(X)
    merge(model)
    detach(model)
    torch.testing.assert_close(model(X), expected)
    assert not merged(model)


def test_alpha_is_divided_by_each_module_s_rank_or_its_root() -> None:
    scalings = {name: one.scaling for name, one in attach(mlp(), {"up": 4, "down": 1}, alpha=6.0).items()}
    assert scalings == {"up": 1.5, "down": 6.0}
    scalings = {n: one.scaling for n, one in attach(mlp(), {"up": 4, "down": 0}, method="rslora", alpha=6.0).items()}
    assert scalings == {"up": 3.0, "down": 3.0}


def test_deleting_one_of_two_adapters_leaves_the_other_as_it_was() -> None:
    model = mlp()
    adapt(model, {"up": 2, "down": 2})
    alone = model(X)
    adapt(model, {"up": 1, "skip": 1}, adapter="second", seed=7)
    delete(model, "second")
    assert torch.equal(model(X), alone)
    assert sorted(adapters(model)) == ["down", "up"]
    assert not hasattr(model.skip, "adapters")
    assert not model.skip._forward_hooks
    with pytest.raises(ValueError, match="adapter must be attached to the model, got 'second'"):
        delete(model, "second")


def test_deleting_the_last_adapter_restores_the_model() -> None:
    model = mlp()
    base, keys = model(X), list(model.state_dict())
    adapt(model, {"up": 2})
    delete(model, "default")
    assert torch.equal(model(X), base)
    assert list(model.state_dict()) == keys


def test_a_merged_adapter_cannot_be_deleted() -> None:
    model = mlp()
    adapt(model, {"up": 2})
    merge(model)
    with pytest.raises(ValueError, match="adapter must not be merged, got 'default'"):
        delete(model, "default")
    assert adapters(model)


def test_a_model_can_be_adapted_again_after_detach() -> None:
    model = mlp()
    adapt(model, {"up": 2})
    detach(model)
    assert list(attach(model, {"up": 3})) == ["up"]


def test_disable_restores_the_base_output_and_enable_the_adapted_one() -> None:
    model = mlp()
    base = model(X)
    adapt(model, {"all-linear": 2})
    adapted = model(X)
    disable(model)
    assert torch.equal(model(X), base)
    enable(model)
    assert torch.equal(model(X), adapted)
    assert not torch.equal(base, adapted)


def test_disabled_restores_the_state_before_it_also_after_an_error() -> None:
    model = mlp()
    found = adapt(model, {"all-linear": 2})
    found["up"].enabled = False

    def fail_inside() -> None:
        with disabled(model):
            assert not any(one.enabled for one in found.values())
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert [one.enabled for one in found.values()] == [False, True, True, True]


def test_a_merged_adapter_cannot_be_disabled() -> None:
    model = mlp()
    adapt(model, {"up": 2})
    merge(model)
    with pytest.raises(ValueError, match="adapter must not be merged, got 'default', merged into 'up'"):
        disable(model)
    with pytest.raises(ValueError, match="adapter must not be merged"), disabled(model):
        raise AssertionError("the block must not run")
    unmerge(model)
    disable(model)


@pytest.mark.parametrize("call", [enable, disable, adapters], ids=lambda call: call.__name__)
def test_an_adapter_that_is_not_attached_is_named(call: Any) -> None:  # noqa: ANN401
    model = mlp()
    adapt(model, {"up": 2}, adapter="one")
    with pytest.raises(ValueError, match=r"adapter must be attached to the model, got 'default'; attached: \['one'\]"):
        call(model)


def test_merging_a_model_without_adapters_is_an_error() -> None:
    with pytest.raises(ValueError, match="model must carry adapters"):
        merge(mlp())


def test_a_disabled_adapter_is_not_merged() -> None:
    model = mlp()
    base = model(X)
    adapt(model, {"all-linear": 2})
    disable(model)
    merge(model)
    assert not merged(model)
    assert torch.equal(model(X), base)


def test_several_named_adapters_add_up_on_one_model() -> None:
    model = mlp()
    base = model.up(X)
    first = adapt(model, {"up": 2, "down": 1}, adapter="first")
    second = adapt(model, {"up": 3, "skip": 1}, adapter="second", seed=5)
    assert adapters(model, "first") == first
    assert adapters(model, "second") == second
    expected = base + X @ (first["up"].delta_weight() + second["up"].delta_weight()).T
    torch.testing.assert_close(model.up(X), expected)
    output = model(X)
    merge(model)
    torch.testing.assert_close(model(X), output)
    unmerge(model)
    assert torch.equal(model(X), output)


def test_an_adapter_and_its_negative_cancel() -> None:
    model = mlp()
    base = model(X)
    adapt(model, {"all-linear": 2}, adapter="plus")
    for one in adapt(model, {"all-linear": 2}, adapter="minus").values():
        one.scaling = -one.scaling
    torch.testing.assert_close(model(X), base)


def test_a_copy_of_an_adapted_model_is_independent() -> None:
    model = mlp()
    base = model(X)
    adapt(model, {"all-linear": 2})
    adapted = model(X)
    copy = deepcopy(model)
    assert torch.equal(copy(X), adapted)
    for one in adapters(copy).values():
        randomise(one, seed=50)
    assert not torch.equal(copy(X), adapted)
    merge(copy)
    assert not merged(model)
    unmerge(copy)
    detach(copy)
    assert torch.equal(copy(X), base)
    assert torch.equal(model(X), adapted)


def test_a_copy_of_a_merged_model_unmerges() -> None:
    model = mlp()
    base = model.up.weight.detach().clone()
    adapt(model, {"up": 2})
    merge(model)
    copy = deepcopy(model)
    unmerge(copy)
    assert torch.equal(copy.up.weight, base)
    assert merged(model)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_merging_a_tied_weight_is_refused_and_changes_nothing(name: str) -> None:
    model = tied()
    adapt(model, {name: 2, "middle": 2})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"weight must belong to one module only, got encoder.weight = decoder.weight"):
        merge(model)
    assert_untouched(model, before)
    assert not merged(model)


def test_merging_the_head_of_a_tied_language_model_is_refused() -> None:
    model = llama_causal_lm(tied=True)
    adapt(model, {"lm_head": 2})
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight = lm_head\.weight"):
        merge(model)


def test_a_tied_weight_that_carries_no_adapter_does_not_hinder_merging() -> None:
    model = tied()
    adapt(model, {"middle": 2})
    expected = model(X)
    merge(model)
    torch.testing.assert_close(model(X), expected)


def test_a_module_registered_under_two_names_merges_because_its_weight_is_one_module_s() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": layer, "same": layer})
    adapt(model, {"one": 2})
    expected = layer(X)
    merge(model)
    torch.testing.assert_close(layer(X), expected)


def test_a_weight_that_views_another_s_storage_is_not_merged() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    adapt(model, {"0": 2})
    with pytest.raises(ValueError, match="weight must belong to one module only"):
        merge(model)


def test_a_parametrised_weight_is_refused_or_merged_but_never_lost() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    try:
        adapt(model, {"0": 2})
        expected = model(X)
        merge(model)
    except ValueError:
        assert not merged(model)
    else:
        torch.testing.assert_close(model(X), expected)


def test_a_module_that_is_called_twice_is_adapted_in_both_calls() -> None:
    model = called_twice()
    found = adapt(model, {"shared": 3})["shared"]
    calls: list[Tensor] = []
    found.observer = calls.append
    expected = model(X)
    assert [z.shape for z in calls] == [(4, 3), (4, 3)]
    merge(model)
    torch.testing.assert_close(model(X), expected)


def test_an_adapted_transformer_merges_to_equal_logits() -> None:
    model = llama_causal_lm().double()
    adapt(model, {"all-linear": 2})
    expected = model(**batch()).logits
    merge(model)
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_layer_called_by_keyword_is_adapted_too() -> None:
    model = mlp()
    adapt(model, {"up": 2})
    assert torch.equal(model.up(input=X), model.up(X))


def test_an_empty_batch_gives_an_empty_output() -> None:
    model = mlp()
    adapt(model, {"all-linear": 2})
    assert model(torch.zeros(0, 8)).shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(8), r"rows must have shape \(k, 8\), got \(8,\)"),
        (torch.zeros(1, 7), r"rows must have shape \(k, 8\), got \(1, 7\)"),
        (torch.zeros(7, 8), r"rank must be in \[0, 8\], got 2 \+ 7"),
    ],
    ids=["one_dimension", "wrong_size", "too_many"],
)
def test_growing_by_what_does_not_fit_is_an_error_and_changes_nothing(rows: Tensor, message: str) -> None:
    model = mlp()
    found = adapt(model, {"up": 2})["up"]
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        found.grow(rows)
    assert_untouched(model, before)


@pytest.mark.parametrize("keep", [[2], [-1], [0, 0]], ids=str)
def test_shrinking_to_what_is_not_there_is_an_error_and_changes_nothing(keep: list[int]) -> None:
    model = mlp()
    found = adapt(model, {"up": 2})["up"]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"keep must hold distinct indices in \[0, 2\)"):
        found.shrink(keep)
    assert_untouched(model, before)


def test_growing_and_shrinking_keep_a_frozen_adapter_frozen() -> None:
    found = adapt(mlp(), {"up": 2})["up"]
    found.requires_grad_(False)
    found.grow(torch.ones(1, 8))
    found.shrink([2, 0])
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_the_representation_tells_rank_and_scaling() -> None:
    assert "LoRA(in_features=8, out_features=12, rank=2, scaling=2, dropout=0)" in repr(adapt_and_return())


def adapt_and_return() -> nn.Module:
    model = mlp()
    adapt(model, {"up": 2})
    return model


REWRITERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REWRITERS)
def test_what_a_hook_turns_into_a_weight_is_no_site(name: str) -> None:
    model = nn.Sequential(REWRITERS[name](nn.Linear(8, 8)))
    assert [*sites(model)] == ["0.bias"]


@pytest.mark.parametrize("name", ["merged", "kept", "sites", "hooks", "folded", "active", "named", "each", "training"])
def test_a_name_that_modules_use_is_refused_before_anything_changes(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="adapter must be a name that modules do not use themselves"):
        attach(model, {"0": 2}, adapter=name)
    assert model[0].weight.requires_grad
    assert not hasattr(model[0], "adapters")


def test_what_is_trained_beside_adapters_is_not_lost(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    attach(model, {"0": 2}, modules_to_save=["1"])
    with pytest.raises(ValueError, match=r"must name all that is trained beside adapters, got \[\] without '1.weight'"):
        save_adapter(model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    save_adapter(model, tmp_path / "whole", modules_to_save=["1"])


@pytest.mark.parametrize("method", ["lora", "dora", "svd", "flora"])
def test_a_transposed_convolution_may_be_told_the_size_of_its_output(method: str) -> None:
    with seeded(0):
        model, x = (
            nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1)).double(),
            torch.randn(2, 4, 5).double(),
        )
    layer = attach(model, {"0": 2}, method=method)["0"]
    with torch.no_grad():
        for each in layer.parameters():
            each.add_(0.1 * torch.randn_like(each))
    sizes = ([9], [10])
    found = [model[0](x, output_size=size) for size in sizes]
    torch.testing.assert_close(found[0], model[0](x), rtol=1e-12, atol=1e-12)
    found[1].sum().backward()
    assert all(each.grad is not None for each in layer.parameters())
    merge(model)
    for answer, size in zip(found, sizes, strict=True):
        torch.testing.assert_close(model[0](x, output_size=size), answer, rtol=1e-10, atol=1e-10)


def test_the_table_of_a_sparse_embedding_is_adapted_densely() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True))
    layer = attach(model, {"0": 2})["0"]
    model(torch.tensor([1, 2])).sum().backward()
    assert all(each.grad.layout is torch.strided for each in layer.parameters())


def test_a_pass_that_broke_off_leaves_nothing_when_adapters_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(512, 64)
    expected = model(x)
    layer = attach(model, {"0": 2})["0"]
    nn.init.normal_(layer.lora_B)

    def failing(*args: object, **kwargs: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", failing)
        with pytest.raises(MemoryError):
            model(x)
    detach(model)
    assert torch.equal(model(x), expected)
