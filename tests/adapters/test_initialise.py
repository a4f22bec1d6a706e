"""Another start for attached adapters: the output stays, the base is never touched, files are plain LoRA."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowra_adapters import (
    INITIALISATIONS,
    InputPCA,
    LoRA,
    attach,
    attach_checkpoint,
    disabled,
    initialise,
    load_adapter,
    merge,
    read_checkpoint,
    save_adapter,
    unmerge,
)
from flowra_testing.tiny_models import seeded

IMAGES = torch.randn(3, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
RESIDUAL = {"pissa", "milora", "olora", "lora_ga", "lora_one"}
NAMES = pytest.mark.parametrize("name", sorted(INITIALISATIONS))


def network() -> nn.Sequential:
    """A convolution and two linear layers, in float64."""
    with seeded(0):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(96, 8), nn.Linear(8, 8)).double()


def adapted(name: str) -> tuple[nn.Sequential, dict[str, LoRA]]:
    model = network()
    found = attach(model, {"0": 2, "2": 2, "3": 4}, scaling=0.7)
    initialise(model, name, evidence=evidence(name, model))
    return model, {site: one for site, one in found.items() if isinstance(one, LoRA)}


def evidence(name: str, model: nn.Sequential) -> dict[str, Tensor | InputPCA] | None:
    weights = {site: model.get_submodule(site).weight.detach().flatten(1) for site in ("0", "2", "3")}
    kind = INITIALISATIONS[name].evidence
    if kind is None:
        return None
    if kind is InputPCA:
        inputs = torch.randn(40, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        return {
            site: InputPCA.init(weight.shape[1], 4, dtype=torch.float64).update(inputs[:, : weight.shape[1]])
            for site, weight in weights.items()
        }
    return {site: torch.sin(3 * weight) for site, weight in weights.items()}


def train(model: nn.Sequential) -> None:
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()


@NAMES
def test_the_output_stays_and_the_base_is_never_touched(name: str) -> None:
    model, found = adapted(name)
    torch.testing.assert_close(model(IMAGES), network()(IMAGES), rtol=1e-10, atol=1e-12)
    base = network().state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert {site for site, one in found.items() if one.offset_A is not None} == (
        set(found) if name in RESIDUAL else set()
    )


@NAMES
def test_a_trained_start_merges_disables_and_unmerges_like_any_adapter(name: str) -> None:
    model, _ = adapted(name)
    train(model)
    trained, base = model(IMAGES), network()(IMAGES)
    assert not torch.allclose(trained, base)
    with disabled(model):
        assert torch.equal(model(IMAGES), base)
    merge(model)
    torch.testing.assert_close(model(IMAGES), trained, rtol=1e-10, atol=1e-12)
    unmerge(model)
    assert torch.equal(model(IMAGES), trained)


@pytest.mark.parametrize("name", sorted(RESIDUAL))
def test_the_first_weights_are_those_of_the_paper_s_residual_form(name: str) -> None:
    """W - s B₀ A₀ as base and s B A beside it is the paper's model; ours is the same function after any step."""
    model, found = adapted(name)
    residual = network()
    starts = {site: (one.lora_A.detach().clone(), one.lora_B.detach().clone()) for site, one in found.items()}
    with torch.no_grad():
        for site, (a, b) in starts.items():
            weight = residual.get_submodule(site).weight
            weight -= 0.7 * (b @ a).view(weight.shape)
    papers = attach(residual, {"0": 2, "2": 2, "3": 4}, scaling=0.7)
    for site, one in papers.items():
        assert isinstance(one, LoRA)
        one.replace_factors(*starts[site])
    train(model)
    train(residual)
    torch.testing.assert_close(model(IMAGES), residual(IMAGES), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", sorted(RESIDUAL))
def test_exported_it_is_plain_lora_of_twice_the_rank(name: str, tmp_path: Path) -> None:
    model, found = adapted(name)
    train(model)
    assert not save_adapter(model, tmp_path, consumer="peft")
    fresh = network()
    loaded = attach_checkpoint(fresh, read_checkpoint(tmp_path))
    assert {site: one.rank for site, one in loaded.items()} == {site: 2 * one.rank for site, one in found.items()}
    torch.testing.assert_close(fresh(IMAGES), model(IMAGES), rtol=1e-10, atol=1e-12)


@NAMES
def test_saved_it_comes_back_as_it_was_and_trains_on(name: str, tmp_path: Path) -> None:
    model, _ = adapted(name)
    train(model)
    save_adapter(model, tmp_path)
    fresh = network()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    train(model)
    train(fresh)
    assert torch.equal(fresh(IMAGES), model(IMAGES))


def test_growing_and_shrinking_keep_the_constant_part() -> None:
    model, found = adapted("pissa")
    train(model)
    one = found["3"]
    before, whole = model(IMAGES), one.delta_weight()
    one.grow(torch.eye(8, dtype=torch.float64)[:1])
    torch.testing.assert_close(model(IMAGES), before, rtol=1e-10, atol=1e-12)
    dropped = 0.7 * one.lora_B[:, :1] @ one.lora_A[:1]
    one.shrink(range(1, one.rank))
    torch.testing.assert_close(one.delta_weight() + dropped, whole)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("pisa", None, r"initialisation must be one of \['eva'"),
        ("pissa", {"0": torch.ones(1)}, "evidence must be None for 'pissa'"),
        ("lora_ga", None, "evidence must be given for every adapted site with 'lora_ga', got none for '0'"),
        ("eva", dict.fromkeys("023", torch.ones(1)), "evidence must be InputPCA for 'eva', got Tensor for '0'"),
        ("lora_one", dict.fromkeys("023", torch.ones(4, 4)), "for module '0'"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    name: str, given: dict[str, Tensor | InputPCA] | None, message: str
) -> None:
    model = network()
    found = attach(model, {"0": 2, "2": 2, "3": 4})
    before = {site: one.state_dict() for site, one in found.items()}
    with pytest.raises(ValueError, match=message):
        initialise(model, name, evidence=given)
    assert all(
        torch.equal(one.state_dict()[key], before[site][key]) for site, one in found.items() for key in before[site]
    )


def test_a_grouped_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    attach(model, {"0": 1})
    with pytest.raises(ValueError, match="must be given layers of one group, got '0'"):
        initialise(model, "pissa")
