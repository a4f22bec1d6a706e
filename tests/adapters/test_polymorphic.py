"""Methods that differ from site to site: chosen by the kind of layer, or named by a plan."""

from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn

from flowra_adapters import METHODS, LoRA, ParameterOffset, SVDForm, Tucker, adapters, attach, attach_plan, merge, sites
from flowra_adapters.methods import instead_of
from flowra_adapters.tucker_conv import TuckerConv
from flowra_testing.tiny_models import batch, bert_classifier, llama_causal_lm, seeded


@dataclass
class Entry:
    kind: str
    rank: int


class EveryKind(nn.Module):
    """One layer of each kind, 8 channels in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.spread = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm((5, 8))
        self.mix = nn.Conv1d(8, 8, 1)
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.randn(2, 8, 8))
        self.raw = nn.Module()
        self.raw.matrix = nn.Parameter(torch.randn(8, 8))
        self.out = nn.Linear(8, 3)


CHOICE = {
    "tokens": "polymorphic",
    "spread": "flora",
    "norm": "norm",
    "norm.bias": "norm",
    "mix": "polymorphic",
    "experts.weights": "flora",
    "experts.weights:1": "polymorphic",
    "raw.matrix": "polymorphic",
    "out": "polymorphic",
}


@pytest.mark.parametrize("name", CHOICE)
def test_the_kind_of_layer_chooses_the_method(name: str) -> None:
    with seeded(0):
        site = sites(EveryKind())[name]
    row = METHODS["polymorphic"]
    assert row.adapts(site)
    assert instead_of(row, site).name == CHOICE[name]


def test_each_choice_is_made() -> None:
    with seeded(0):
        model = EveryKind()
    attached = attach(model, {"all-layers": 2, "all-norms": 1, "tokens": 2, "raw.matrix": 1}, method="polymorphic")
    assert {name: type(one) for name, one in attached.items()} == {
        "tokens": LoRA,
        "spread": TuckerConv,
        "norm": ParameterOffset,
        "norm.bias": ParameterOffset,
        "mix": LoRA,
        "raw.matrix": LoRA,
        "out": LoRA,
    }


def test_scaling_and_dropout_go_where_there_is_a_scale() -> None:
    with seeded(0):
        model = EveryKind()
    attached = attach(model, {"all-layers": 2, "all-norms": 1}, method="polymorphic", alpha=3.0, dropout=0.5)
    assert {name: one.scaling for name, one in attached.items()} == {
        "spread": 1.5,
        "norm": 1.0,
        "norm.bias": 1.0,
        "mix": 1.5,
        "out": 1.5,
    }
    assert {one.dropout for one in attached.values() if isinstance(one, LoRA | TuckerConv)} == {0.5}


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(bert_classifier, batch), (llama_causal_lm, batch), (vit, pixels), (resnet, pixels)],
    ids=["bert", "llama", "vit", "resnet"],
)
def test_one_configuration_serves_text_and_images(build: object, inputs: object) -> None:
    assert callable(build)
    assert callable(inputs)
    with seeded(0):
        model = build().eval()
    x = inputs()
    before = model(**x).logits
    attached = attach(model, {"all-layers": 2, "all-norms": 1}, method="polymorphic", scaling=1.0)
    torch.testing.assert_close(model(**x).logits, before, rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(2):  # what starts at zero lets gradients through after the first step
        optimizer.zero_grad()
        model(**x).logits.square().mean().backward()
        optimizer.step()
    assert [
        name for name, one in attached.items() if not all(p.grad is not None and p.grad.any() for p in one.parameters())
    ] == []
    unmerged = model.eval()(**x).logits
    assert (unmerged - before).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(**x).logits, unmerged, rtol=1e-4, atol=1e-5)


# plans


def test_a_plan_gives_each_site_its_method_and_rank() -> None:
    model = bert_classifier()
    at = "bert.encoder.layer.0"
    plan = {
        f"{at}.attention.self.query": Entry("lora", 3),
        f"{at}.attention.self.key": Entry("lora", 0),
        f"{at}.intermediate.dense": Entry("svd", 2),
        f"{at}.output.dense": Entry("flora", 2),
        f"{at}.output.LayerNorm": Entry("norm", 1),
        f"{at}.output.dense.bias": Entry("bitfit", 1),
    }
    attached = attach_plan(model, plan, scaling=0.5, adapter="planned", dropout=0.1)
    assert {name: (type(one), one.rank, one.scaling) for name, one in attached.items()} == {
        f"{at}.attention.self.query": (LoRA, 3, 0.5),
        f"{at}.attention.self.key": (LoRA, 0, 0.5),
        f"{at}.intermediate.dense": (SVDForm, 2, 0.5),
        f"{at}.output.dense": (Tucker, 2, 0.5),
        f"{at}.output.dense.bias": (ParameterOffset, 1, 1.0),
        f"{at}.output.LayerNorm": (ParameterOffset, 1, 1.0),
    }
    assert adapters(model, "planned").keys() == attached.keys()


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("bert.nowhere", Entry("lora", 1), r"entries must name sites of the model, got 'bert.nowhere'"),
        ("bert.pooler.dense", Entry("magic", 1), r"kind must be one of \['bitfit', .*'svd_masked'\], got 'magic'"),
        (
            "bert.pooler.dense",
            Entry("norm", 1),
            r"kind must be a method that can adapt 'bert.pooler.dense', got 'norm'",
        ),
        ("bert.pooler.dense", Entry("rslora", 1), r"kind must be one of .*, got 'rslora'"),
        ("bert.pooler.dense", Entry("lora", 99), r"rank must be in \[0, 16\] .* for module 'bert.pooler.dense'"),
        ("bert.pooler.dense.bias", Entry("bitfit", 2), r"rank must be 0 or 1 for an offset"),
    ],
)
def test_a_plan_that_cannot_be_attached_leaves_the_model_as_it_was(name: str, entry: Entry, message: str) -> None:
    model = bert_classifier()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach_plan(model, {"bert.encoder.layer.0.attention.self.query": Entry("lora", 1), name: entry}, scaling=1.0)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
