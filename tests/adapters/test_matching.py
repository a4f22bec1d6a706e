"""Which modules a name or pattern means."""

import pytest
from torch import nn

from flowra_adapters import adaptable_modules, attach, match_modules
from flowra_testing.tiny_models import MLP, bert_classifier, called_twice, llama_causal_lm, mlp, nested, tied

QUERIES = [f"bert.encoder.layer.{index}.attention.self.query" for index in range(2)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (QUERIES[1], QUERIES[1:]),
        ("query", QUERIES),
        ("self.query", QUERIES),
        ("layer.0.attention.self.query", QUERIES[:1]),
        ("layer.[0-1].*.query", QUERIES),
        ("bert.encoder.layer.?.attention.self.q*", QUERIES),
        ("classifier", ["classifier"]),
    ],
    ids=str,
)
def test_a_pattern_means_these_modules(pattern: str, expected: list[str]) -> None:
    assert match_modules(bert_classifier(), [pattern]) == expected


def test_all_linear_means_every_linear_layer_in_model_order() -> None:
    assert match_modules(mlp(), ["all-linear"]) == ["up", "down", "skip", "head"]
    model = llama_causal_lm()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert match_modules(model, ["all-linear"]) == linear


def test_a_tail_is_whole_names_only() -> None:
    with pytest.raises(ValueError, match=r"must match at least one module, got 'uery'"):
        match_modules(bert_classifier(), ["uery"])


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(ValueError, match=r"got 'UP'"):
        match_modules(mlp(), ["UP"])


def test_excluded_modules_are_taken_out() -> None:
    assert match_modules(mlp(), ["all-linear"], exclude=["head", "s*"]) == ["up", "down"]


def test_modules_are_listed_once_in_model_order_whatever_the_patterns() -> None:
    assert match_modules(mlp(), ["down", "u*", "all-linear", "up"]) == ["up", "down", "skip", "head"]


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"patterns must leave at least one module, got \['up'\] without \['u\*'\]"):
        match_modules(mlp(), ["up"], exclude=["u*"])


def test_an_exclude_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"exclude must match at least one module, got 'haed'.*head"):
        match_modules(mlp(), ["up"], exclude=["haed"])


def test_no_pattern_is_an_error() -> None:
    with pytest.raises(ValueError, match="patterns must leave at least one module"):
        match_modules(mlp(), [])


def test_a_typo_names_the_nearest_module() -> None:
    with pytest.raises(ValueError, match=r"got 'qury'\. Nearest names: .*query"):
        match_modules(bert_classifier(), ["qury"])


def test_all_unmatched_patterns_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"got 'nope'.*got 'neither'"):
        match_modules(mlp(), ["up", "nope", "neither"])


@pytest.mark.parametrize(
    ("pattern", "kind"), [("word_embeddings", "Embedding"), ("LayerNorm", "LayerNorm"), ("bert.encoder", "BertEncoder")]
)
def test_a_module_that_cannot_be_adapted_is_named_with_its_class(pattern: str, kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"must match modules that can carry an adapter, got '{pattern}': .* is a {kind}"
    ):
        match_modules(bert_classifier(), [pattern])


def test_attached_adapters_are_not_adaptable_themselves() -> None:
    model = bert_classifier()
    before = list(adaptable_modules(model))
    attach(model, {"all-linear": 2})
    assert list(adaptable_modules(model)) == before


def test_a_module_of_the_model_may_be_called_adapters() -> None:
    assert list(adaptable_modules(nested("adapters.q", "block.adapters.q", "k"))) == [
        "adapters.q",
        "block.adapters.q",
        "k",
    ]


def test_a_module_that_is_called_twice_is_listed_once() -> None:
    assert list(adaptable_modules(called_twice())) == ["shared", "head"]


def test_modules_with_tied_weights_are_listed_apart() -> None:
    assert list(adaptable_modules(tied())) == ["encoder", "middle", "decoder"]


def test_the_projection_inside_multihead_attention_is_not_adaptable_because_it_is_never_called() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(adaptable_modules(model)) == ["linear1", "linear2"]


def test_a_type_of_the_model_is_kept() -> None:
    model = mlp()
    attach(model, {"up": 2})
    assert type(model) is MLP
    assert type(model.up) is nn.Linear
