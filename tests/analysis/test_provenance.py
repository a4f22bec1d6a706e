import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from flowra_analysis import base_hash, data_hash, provenance_of


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return nn.ModuleDict({"body": net, "head": nn.Linear(2, 1)})


# models


def test_equal_weights_have_equal_hashes_in_any_order_and_memory_layout() -> None:
    one = model()
    assert isinstance(one, nn.ModuleDict)
    other = nn.ModuleDict({"head": copy.deepcopy(one["head"]), "body": copy.deepcopy(one["body"])})
    weight = other["head"].weight
    weight.data = torch.stack([weight.data, weight.data], dim=-1)[..., 0]
    assert not weight.is_contiguous() or weight.stride() != one["head"].weight.stride()
    assert base_hash(one) == base_hash(other)
    assert len(base_hash(one)) == 64


def test_the_hash_is_the_same_in_another_process() -> None:
    program = "import torch; from torch import nn; from flowra_analysis import base_hash\n"
    program += "net = nn.Linear(3, 2); nn.init.ones_(net.weight); nn.init.zeros_(net.bias); print(base_hash(net))"
    net = nn.Linear(3, 2)
    nn.init.ones_(net.weight)
    nn.init.zeros_(net.bias)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == base_hash(net)


def changed(name: str) -> nn.Module:
    net = model()
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    match name:
        case "one bit":
            flat = tensors["body.0.weight"].data.view(torch.int32)
            flat[1, 2] ^= 1
        case "the sign of a zero":
            tensors["body.1.running_mean"][0] = -0.0
        case "a buffer":
            tensors["body.1.running_var"] += 1
        case "dtype":
            net.double()
        case "two tensors exchanged":
            tensors["body.1.weight"].data, tensors["body.1.bias"].data = (
                tensors["body.1.bias"].data,
                tensors["body.1.weight"].data,
            )
        case "shape":
            tensors["head.weight"].data = tensors["head.weight"].data.T
        case "a name":
            return nn.ModuleDict({"body": net.get_submodule("body"), "tail": net.get_submodule("head")})
        case "a module less":
            return nn.ModuleDict({"body": net.get_submodule("body")})
    return net


CHANGES = ("one bit", "the sign of a zero", "a buffer", "dtype", "two tensors exchanged", "shape", "a name")


@pytest.mark.parametrize("change", [*CHANGES, "a module less"])
def test_any_change_of_the_weights_changes_the_hash(change: str) -> None:
    assert base_hash(changed(change)) != base_hash(model())


def test_the_same_numbers_as_other_types_have_another_hash() -> None:
    nets = [nn.Linear(2, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for net in nets:
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
    assert len({base_hash(net) for net in nets}) == 3


def test_a_tied_weight_counts_under_each_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    apart = copy.deepcopy(net)
    apart[1].weight = nn.Parameter(net[0].weight.detach().clone())
    assert base_hash(net) == base_hash(apart)
    assert base_hash(net) != base_hash(nn.Sequential(net[0]))


def test_what_is_left_out_does_not_count() -> None:
    one, other = model(), model()
    nn.init.ones_(other.get_submodule("head").weight)
    assert base_hash(one) != base_hash(other)
    assert base_hash(one, without=["head"]) == base_hash(other, without=["head"])


def test_leaving_out_what_is_not_there_is_refused() -> None:
    for name in ("hea", "body.9"):
        with pytest.raises(ValueError, match=f"without must name modules of the model that hold tensors, got '{name}'"):
            base_hash(model(), without=["head", name])


def test_hashing_changes_nothing_and_draws_no_random_numbers() -> None:
    net, state = model(), torch.random.get_rng_state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    base_hash(net)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_tensor_longer_than_a_chunk_has_the_hash_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = base_hash(model())
    monkeypatch.setattr("flowra_analysis.provenance.CHUNK", 4)
    assert base_hash(model()) == whole


def test_scalars_and_empty_tensors_are_hashed() -> None:
    found = {data_hash([torch.tensor(1.0)]), data_hash([torch.ones(1)]), data_hash([torch.ones(0)]), data_hash([])}
    assert len(found) == 4


# data


def batch(**changes: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.int64), **changes}


def test_equal_batches_have_equal_hashes_whatever_the_order_of_keys() -> None:
    assert data_hash([batch()]) == data_hash(iter([dict(reversed(batch().items()))]))


@pytest.mark.parametrize(
    "other",
    [
        [],
        [batch(), batch()],
        [batch(input_ids=torch.arange(1, 7).view(2, 3))],
        [batch(input_ids=torch.arange(6).view(3, 2))],
        [batch(input_ids=torch.arange(6, dtype=torch.int32).view(2, 3))],
        [batch(labels=torch.zeros(2))],
        [{"input_ids": batch()["attention_mask"], "attention_mask": batch()["input_ids"]}],
        [list(batch().values())],
        [[batch()]],
    ],
    ids=["none", "two", "values", "shape", "dtype", "key", "keys exchanged", "sequence", "nested"],
)
def test_any_change_of_the_batches_changes_the_hash(other: list[object]) -> None:
    assert data_hash([batch()]) != data_hash(other)


def test_the_order_of_the_batches_counts() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    assert len({data_hash([a, b]), data_hash([b, a]), data_hash([torch.cat([a, b])])}) == 3


def test_text_and_numbers_may_be_among_the_tensors() -> None:
    batches = [[(torch.ones(1), "a", 1, None)], [(torch.ones(1), "b", 1, None)], [(torch.ones(1), "a", 1.0, None)]]
    batches += [[(torch.ones(1), "a", True, None)], [(torch.ones(1), ["a", 1], None)]]
    assert len({data_hash(each) for each in batches}) == len(batches)


def test_what_cannot_be_hashed_is_refused() -> None:
    with pytest.raises(TypeError, match="batches must hold tensors, text and numbers in mappings and sequences, got"):
        data_hash([{"labels": {1, 2}}])


def test_a_provenance_has_what_comparisons_look_for() -> None:
    found = provenance_of(base="b", data="d", seed=3, examples=32, estimators=["empirical Fisher", "K-FAC"])
    assert found.pop("torch") == torch.__version__
    assert found.pop("flowra_analysis")
    assert found == {
        "base_hash": "b",
        "data_hash": "d",
        "seed": 3,
        "examples": 32,
        "estimators": "empirical Fisher; K-FAC",
    }
