"""Weights of texts, their averages, and each sign on both sides of its threshold."""

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from compose.fusion.families import family, ids
from compose.fusion.stacks import LEVELS, adapters_of, randomised
from flowra_compose.fusion import (
    FailureSign,
    FusionRecord,
    GateInspection,
    GateOptions,
    StaticWeights,
    TextWeights,
    failure_signs,
    fuse,
    gates_for,
    loss_gap_warning,
    weight_gap_warning,
    weights_of_texts,
)
from flowra_compose.fusion.failure_signs import (
    ALMOST_ALL,
    AMBIGUOUS_SHARE,
    BEYOND,
    FAR_SUM,
    FEWEST_POSITIONS,
    LOSS_GAP,
    OUTSIDE_SHARE,
    SAME_WEIGHTS,
    SATURATED_SHARE,
    STANDARD_GAP,
    birth_weights,
)
from flowra_compose.fusion.gates import Gate, Level
from flowra_compose.fusion.inspection import AMBIGUOUS_ENTROPY, layer_of

LAYERS = ("model.layers.0", "model.layers.1")
BIAS = torch.tensor([-0.5, 0.5], dtype=torch.float64)  # of two adapters at birth


def inspection(
    shares: Tensor,
    *,
    bias: Tensor = BIAS,
    places: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    level: Level = "layer",
    options: GateOptions | None = None,
) -> GateInspection:
    """Of one text with shares ``(places, positions, k)`` under gates of a bias, by default that of birth."""
    if places is None:
        places = [f"model.layers.{index}" for index in range(len(shares))]
    text = TextWeights(
        tokens=tuple(tokens or [f"t{index}" for index in range(shares.shape[1])]), weights=shares + bias, shares=shares
    )
    names = tuple("abcdefgh"[: shares.shape[2]])
    return GateInspection(
        adapters=names, level=level, places=tuple(places), texts=(text,), options=options or GateOptions(level=level)
    )


def pairs(first: Tensor) -> Tensor:
    """Shares of two adapters, from those of the first."""
    return torch.stack([first, 1 - first], dim=-1).double()


def varied(layers: int = 4, positions: int = 20) -> Tensor:
    """Shares that differ between tokens and layers, decide, and are not saturated."""
    generator = torch.Generator().manual_seed(0)
    low = 0.05 + 0.2 * torch.rand(layers, positions, generator=generator, dtype=torch.float64)
    return pairs(torch.where(torch.rand(layers, positions, generator=generator) < 0.5, low, 1 - low))


def kinds(found: GateInspection) -> list[str]:
    return [sign.kind for sign in failure_signs(found)]


def sign(found: GateInspection, kind: str) -> FailureSign:
    (one,) = [each for each in failure_signs(found) if each.kind == kind]
    return one


# values


def test_a_batch_is_taken_apart_without_its_padding() -> None:
    whole = torch.arange(2 * 2 * 3 * 2, dtype=torch.float64).reshape(2, 2, 3, 2)
    record = FusionRecord(
        weights={place: [whole[index, :, :2], whole[index, :, 2:]] for index, place in enumerate(LAYERS)},
        shares={place: [whole[index] / 100] for index, place in enumerate(LAYERS)},
    )
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])  # padded to the left
    first, second = weights_of_texts(record, [("a", "b"), ("c", "d", "e")], left)
    assert torch.equal(first.weights, whole[:, 0, 1:])
    assert torch.equal(second.weights, whole[:, 1])
    assert torch.equal(first.shares, whole[:, 0, 1:] / 100)
    assert first.tokens == ("a", "b")


def test_tokens_that_are_not_the_mask_s_are_refused() -> None:
    record = FusionRecord(weights={"": [torch.zeros(1, 3, 2)]}, shares={"": [torch.zeros(1, 3, 2)]})
    with pytest.raises(
        ValueError, match=r"weights must be \(places, 3 tokens, k\), at least one token, got \(1, 2, 2\)"
    ):
        weights_of_texts(record, [("a", "b", "c")], torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match=r"those of the batch \(1, 3\), got \(1, 2\) and 1"):
        weights_of_texts(record, [("a", "b")], torch.tensor([[1, 1]]))
    with pytest.raises(ValueError, match="at least one token"):
        weights_of_texts(record, [()], torch.tensor([[0, 0, 0]]))


def test_an_inspection_is_of_texts_of_the_same_places_and_adapters() -> None:
    with pytest.raises(ValueError, match=r"\(places, adapters\) = \(2, 2\), got no text"):
        GateInspection(adapters=("a", "b"), level="layer", places=LAYERS, texts=())
    text = TextWeights(tokens=("x",), weights=torch.zeros(1, 1, 2), shares=torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match=r"= \(2, 2\), got \[\(1, 2\)\]"):
        GateInspection(adapters=("a", "b"), level="layer", places=LAYERS, texts=(text,))
    with pytest.raises(ValueError, match=r"shares must be \(1, 1, 2\) as the weights, got \(1, 1, 3\)"):
        TextWeights(tokens=("x",), weights=torch.zeros(1, 1, 2), shares=torch.zeros(1, 1, 3))


def test_means_and_spreads_by_layer_are_exact() -> None:
    found = inspection(pairs(torch.tensor([[0.25, 0.75], [0.0, 0.5]])), bias=torch.zeros(2))
    first, second = found.by_layer()
    assert (first.name, first.mean, first.spread) == ("model.layers.0", (0.5, 0.5), (0.25, 0.25))
    assert (second.mean, second.lowest, second.highest) == ((0.25, 0.75), (0.0, 0.5), (0.5, 1.0))
    assert found.mean() == (0.375, 0.625)
    assert found.spread_over_tokens() == (0.25, 0.25)
    assert found.spread_over_places() == (0.125, 0.125)
    assert found.by_place() == found.by_layer()


def test_modules_are_averaged_by_their_layer() -> None:
    places = ("h.0.q", "h.0.v", "h.1.q", "head")
    found = inspection(
        pairs(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.25, 0.25]])),
        bias=torch.zeros(2),
        places=places,
        level="module",
    )
    assert found.layers == {"h.0": [0, 1], "h.1": [2], "head": [3]}
    assert [(each.name, each.mean[0], each.spread[0]) for each in found.by_layer()] == [
        ("h.0", 0.5, 0.5),
        ("h.1", 0.5, 0.0),
        ("head", 0.25, 0.0),
    ]
    assert [each.name for each in found.by_place()] == list(places)
    assert found.layer_weights(found.texts[0])[:, 0, 0].tolist() == [0.5, 0.5, 0.25]


def test_texts_count_by_their_tokens() -> None:
    texts = [
        TextWeights(tokens=("x",) * count, weights=torch.full((1, count, 1), value), shares=torch.ones(1, count, 1))
        for count, value in ((3, 1.0), (1, 5.0))
    ]
    found = GateInspection(adapters=("a",), level="step", places=("",), texts=tuple(texts))
    assert found.positions == 4
    assert found.mean() == (2.0,)


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("model.layers.12", "model.layers.12"),
        ("h.3.experts.2.up", "h.3"),
        ("0.fc", "0"),
        ("head.fc2", "head.fc2"),
        ("", ""),
    ],
)
def test_the_layer_of_a_place_ends_with_the_first_number(place: str, layer: str) -> None:
    assert layer_of(place) == layer


@pytest.mark.parametrize(
    ("adapters", "options", "weights"),
    [
        (2, GateOptions(), [0.0, 1.0]),
        (3, GateOptions(primary=0), [1.0, 0.0, 0.0]),
        (4, GateOptions(initial="uniform", rank=2), [0.25] * 4),
        (1, GateOptions(), [1.0]),
    ],
)
def test_weights_of_birth(adapters: int, options: GateOptions, weights: list[float]) -> None:
    torch.testing.assert_close(birth_weights(adapters, options), torch.tensor(weights))


@pytest.mark.parametrize("level", LEVELS)
def test_the_weights_of_a_padded_batch_are_those_of_each_text_alone(level: Level) -> None:
    model = family("llama")
    adapters = adapters_of(model, "llama")
    gates = randomised(gates_for(model, adapters, GateOptions(level=level)))
    texts = [ids(size=1, length=5, seed=1)[0], ids(size=1, length=3, seed=2)[0]]
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    batch = torch.zeros(2, 5, dtype=torch.long)
    batch[0], batch[1, 2:] = texts
    with fuse(model, adapters, gates) as fusion, torch.no_grad():
        alone = []
        for text in texts:
            with fusion.recording() as record:
                model(text[None])
            alone.append(record.stacked()[:, 0])
        with fusion.recording() as record:
            model(batch, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    found = weights_of_texts(record, ["abcde", "abc"], mask)
    for one, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(one.weights, expected, rtol=1e-5, atol=1e-6)
    whole = GateInspection(adapters=tuple(adapters), level=level, places=tuple(record.weights), texts=tuple(found))
    assert len(whole.by_layer()) == (1 if level == "step" else 3)
    assert whole.positions == 8


# signs


def test_gates_that_decide_and_differ_show_no_sign() -> None:
    assert failure_signs(inspection(varied())) == []


def test_one_adapter_has_nothing_to_weigh() -> None:
    assert failure_signs(inspection(torch.ones(3, 20, 1), bias=torch.zeros(1))) == []


def test_fresh_gates_have_not_moved_and_nothing_more_is_said() -> None:
    model = family("llama")
    adapters = adapters_of(model, "llama")
    gates = gates_for(model, adapters)
    with fuse(model, adapters, gates) as fusion, fusion.recording() as record, torch.no_grad():
        model(ids(size=2, length=9))
    texts = weights_of_texts(record, ["abcdefghi"] * 2, torch.ones(2, 9))
    found = GateInspection(
        adapters=tuple(adapters), level="layer", places=tuple(record.weights), texts=tuple(texts), options=gates.options
    )
    (only,) = failure_signs(found)
    assert only.kind == "unmoved"
    assert only.found == "No gate has moved from the weights of birth (0, 1; limit 0.01)."


def test_a_single_gate_that_has_not_moved_is_named() -> None:
    shares = varied()
    shares[2] = 0.5
    for far, expected in ((0.9 * SAME_WEIGHTS, ["unmoved"]), (1.1 * SAME_WEIGHTS, [])):
        moved = shares.clone()
        moved[2, 0] += torch.tensor([far, -far])
        assert [each for each in kinds(inspection(moved)) if each == "unmoved"] == expected
    found = sign(inspection(shares), "unmoved").found
    assert found == "1 of 4 gates have not moved from the weights of birth (0, 1; limit 0.01): model.layers.2."


def test_routing_that_is_no_gate_was_never_born_and_cannot_saturate() -> None:
    model = family("llama")
    adapters = adapters_of(model, "llama")
    with fuse(model, adapters, StaticWeights([0.0, 1.0])) as fusion, fusion.recording() as record, torch.no_grad():
        model(ids(size=1, length=9))
    texts = weights_of_texts(record, ["abcdefghi"], torch.ones(1, 9))
    found = GateInspection(adapters=tuple(adapters), level="module", places=tuple(record.weights), texts=tuple(texts))
    assert kinds(found) == ["same for all tokens"]


def test_few_tokens_say_nothing_of_how_weights_differ() -> None:
    assert kinds(inspection(varied(positions=FEWEST_POSITIONS - 1))) == ["few positions"]
    assert kinds(inspection(varied(positions=FEWEST_POSITIONS))) == []


@pytest.mark.parametrize(("spread", "expected"), [(0.99, ["same for all tokens"]), (1.01, [])])
def test_weights_equal_for_all_tokens_are_told_below_the_threshold(spread: float, expected: list[str]) -> None:
    sway = spread * SAME_WEIGHTS * torch.tensor([1.0, -1.0] * 10)  # its standard deviation is its size
    assert kinds(inspection(pairs(torch.tensor([[0.1], [0.8]]) + sway))) == expected


@pytest.mark.parametrize(("same", "expected"), [(9, ["same for all tokens"]), (8, [])])
def test_almost_all_layers_suffice_for_weights_equal_for_all_tokens(same: int, expected: list[str]) -> None:
    assert ALMOST_ALL == 0.9
    shares = varied(layers=10)
    shares[:same] = pairs(torch.linspace(0.1, 0.3, same))[:, None]
    assert kinds(inspection(shares)) == expected


def test_the_weights_of_the_static_merge_are_given_by_layer_where_layers_differ() -> None:
    equal = sign(inspection(pairs(torch.full((3, 10), 0.2))), "same for all tokens")
    assert equal.advice == ("A static merge does the same without gates: rule cat with weights -0.3, 1.3 for a, b.")
    by_layer = sign(inspection(pairs(torch.tensor([[0.1], [0.3]]).expand(2, 10))), "same for all tokens")
    assert "with the mean weights of each layer" in by_layer.advice
    assert "-0.3, 1.3 for a, b" in by_layer.advice


@pytest.mark.parametrize(("spread", "expected"), [(0.99, ["same in all layers"]), (1.01, [])])
def test_weights_equal_in_all_layers_are_told_below_the_threshold(spread: float, expected: list[str]) -> None:
    sway = spread * SAME_WEIGHTS * torch.tensor([[1.0], [-1.0]])
    assert kinds(inspection(pairs(torch.tensor([0.1, 0.9] * 10) + sway))) == expected


def test_one_gate_for_all_layers_is_no_collapse() -> None:
    assert kinds(inspection(varied(layers=1), places=[""], level="step")) == []


def test_ambiguous_positions_are_counted_and_their_tokens_named() -> None:
    for count, expected in ((2, ["ambiguous prefixes"]), (1, [])):
        shares = varied(positions=20)
        shares[:3, :count] = 0.5  # in three of four layers
        assert count / 20 >= AMBIGUOUS_SHARE or not expected
        assert kinds(inspection(shares, tokens=["def"] * 2 + ["x"] * 18)) == expected
    shares[:3, :2] = 0.5
    found = inspection(shares, tokens=["def"] * 2 + ["x"] * 18)
    assert [each.tolist() for each in found.ambiguous()] == [[True, True] + [False] * 18]
    assert sign(found, "ambiguous prefixes").found.startswith("At 10.0% of the tokens most gates do not decide")
    assert "'def'" in sign(found, "ambiguous prefixes").found


def test_half_of_the_layers_are_not_most() -> None:
    shares = varied(positions=20)
    shares[:2, :5] = 0.5
    assert not inspection(shares).ambiguous()[0].any()


@pytest.mark.parametrize(("share", "expected"), [(0.42, True), (0.41, False)])
def test_shares_do_not_decide_from_an_entropy_on(share: float, expected: bool) -> None:
    entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share)) / math.log(2)
    assert (entropy >= AMBIGUOUS_ENTROPY) is expected
    assert inspection(pairs(torch.full((3, 10), share))).ambiguous()[0].tolist() == [expected] * 10


def test_the_largest_entropy_is_that_of_all_adapters() -> None:
    shares = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).expand(3, 10, 4)
    assert not inspection(shares, bias=torch.zeros(4)).ambiguous()[0].any()
    assert inspection(torch.full((3, 10, 4), 0.25), bias=torch.zeros(4)).ambiguous()[0].all()


@pytest.mark.parametrize(("count", "expected"), [(18, ["saturated"]), (17, [])])
def test_saturated_gates_are_told_where_it_is_almost_everywhere(count: int, expected: list[str]) -> None:
    first = torch.tensor([0.9] * (20 - count) + [SATURATED_SHARE + 5e-4] * count)
    shares = pairs(torch.stack([first, 1 - first]))
    assert kinds(inspection(shares)) == expected
    shares = pairs(torch.stack([first - 1e-3, 1 - first + 1e-3]))
    assert "saturated" not in kinds(inspection(shares))


def test_weights_out_of_the_range_of_birth_are_told_from_a_share_of_positions_on() -> None:
    assert OUTSIDE_SHARE == 0.05
    moved = BIAS + (BEYOND + 0.02) * torch.tensor([1.0, -1.0])
    for count, expected in ((4, ["out of range"]), (3, [])):
        shares = varied(layers=4, positions=20)
        shares[0, :count] = torch.tensor([0.99, 0.01], dtype=torch.float64)
        assert kinds(inspection(shares)) == []
        assert kinds(inspection(shares, bias=moved)) == expected
    shares[0, :4] = torch.tensor([0.99, 0.01], dtype=torch.float64)
    assert sign(inspection(shares, bias=moved), "out of range").found == (
        "At 5.0% of places and tokens a weight lies more than 0.25 beyond what the softmax and the bias of birth can"
        " reach: model.layers.0."
    )


@pytest.mark.parametrize("initial", ["primary", "uniform"])
@pytest.mark.parametrize(("count", "top_k"), [(2, None), (3, None), (4, 2), (8, None), (8, 3)])
def test_gates_whose_bias_has_not_moved_have_no_sign_of_one(
    count: int, top_k: int | None, initial: Literal["primary", "uniform"]
) -> None:
    options = GateOptions(initial=initial, top_k=top_k)
    gate = Gate(count, 16, options)
    generator = torch.Generator().manual_seed(count)
    torch.nn.init.normal_(gate.weight, std=1.0, generator=generator)
    with torch.no_grad():
        weights, shares = gate(torch.randn(3, 50, 16, generator=generator))
    text = TextWeights(tokens=tuple(map(str, range(50))), weights=weights, shares=shares)
    found = GateInspection(
        adapters=tuple("abcdefgh"[:count]), level="layer", places=("l.0", "l.1", "l.2"), texts=(text,), options=options
    )
    assert not {"out of range", "far sum"} & {*kinds(found)}


def test_places_that_never_decide_do_not_make_the_others_ambiguous() -> None:
    shares = torch.cat([torch.full((19, 20, 2), 0.5, dtype=torch.float64), varied(layers=11, positions=20)])
    assert not inspection(shares).ambiguous()[0].any()
    assert "ambiguous prefixes" not in kinds(inspection(shares))
    assert inspection(shares[:19]).ambiguous()[0].all()  # where none ever does, nothing decides anywhere


@pytest.mark.parametrize(("far", "expected"), [(1.01, ["far sum"]), (0.99, []), (-0.99, []), (-1.01, ["far sum"])])
def test_a_sum_of_weights_far_from_1_is_told(far: float, expected: list[str]) -> None:
    bias = far * FAR_SUM * torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert kinds(inspection(varied(), bias=bias, options=GateOptions(initial="uniform"))) == expected


def test_a_gap_of_losses_is_told_from_its_threshold_on() -> None:
    assert loss_gap_warning(1.0, 1.0 + 0.99 * LOSS_GAP) is None
    assert loss_gap_warning(2.0, 1.0) is None
    found = loss_gap_warning(1.0, 1.25)
    assert found is not None
    assert found.found == "The loss of validation, 1.25, lies 0.25 nats above that of training, 1 (limit 0.2)."
    with pytest.raises(ValueError, match=r"losses must be finite, got 1\.0 and nan"):
        loss_gap_warning(1.0, math.nan)


def test_a_gap_of_weights_is_told_by_their_spread() -> None:
    sway = 0.1 * torch.tensor([1.0, -1.0] * 10)
    train = inspection(pairs(torch.stack([0.3 + sway, 0.5 + sway, 0.6 + sway])))
    for far, layers, told in ((1.01, 2, True), (0.99, 2, False), (1.01, 1, False)):
        shift = torch.tensor([[far * STANDARD_GAP * 0.1]] * layers + [[0.0]] * (3 - layers))
        other = inspection(pairs(torch.stack([0.3 + sway, 0.5 + sway, 0.6 + sway]) + shift))
        assert (weight_gap_warning(train, other) is not None) is told
        assert (weight_gap_warning(other, train) is not None) is told
    found = weight_gap_warning(train, inspection(pairs(torch.stack([0.4 + sway, 0.6 + sway, 0.6 + sway]))))
    assert found is not None
    assert found.found.startswith("In 2 of 3 layers the mean weights of training and validation differ")
    assert found.found.endswith("model.layers.0, model.layers.1.")


def test_a_difference_that_counts_as_equal_is_no_gap() -> None:
    train = inspection(pairs(torch.full((2, 10), 0.3)))
    near, far = (inspection(pairs(torch.full((2, 10), 0.3 + each * SAME_WEIGHTS))) for each in (0.9, 1.1))
    assert weight_gap_warning(train, near) is None
    assert weight_gap_warning(train, far) is not None


def test_gaps_need_tokens_and_the_same_gates() -> None:
    train = inspection(pairs(torch.full((2, 10), 0.3)))
    few = inspection(pairs(torch.full((2, FEWEST_POSITIONS - 1), 0.9)))
    assert weight_gap_warning(train, few) is None
    with pytest.raises(ValueError, match="inspections must be of the same gates"):
        weight_gap_warning(train, inspection(varied(layers=3)))
