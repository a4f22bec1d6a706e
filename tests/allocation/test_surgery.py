"""The surgery law: after any change of rank the optimiser holds exactly the live parameters, moments mapped."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_allocation import BottleneckGram, flow_spectrum, grow, keep, rebase, truncate
from flowra_testing.stand_in_adapter import StandInAdapter
from flowra_testing.tiny_models import seeded

M, N, RANK = 5, 7, 3
Operation = Callable[[StandInAdapter, Optimizer | None], None]
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adamw_foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "adam": lambda groups: torch.optim.Adam(groups),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd_nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "sgd": lambda groups: torch.optim.SGD(groups),
}
SECOND = ("exp_avg_sq", "max_exp_avg_sq")
FIRST = ("exp_avg", "momentum_buffer")
OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)


class Rig(nn.Module):
    """A frozen weight with a low-rank layer between a trained gain and a trained bias, in two parameter groups."""

    def __init__(self, name: str = "adamw", *, rank: int = RANK, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with seeded(0):
            self.layer = StandInAdapter(
                N, M, rank=rank, scaling=1.5, dtype=dtype, generator=torch.Generator().manual_seed(0)
            )
            self.layer.lora_B.data.normal_()
            self.gain, self.bias = nn.Parameter(torch.ones(N, dtype=dtype)), nn.Parameter(torch.zeros(M, dtype=dtype))
            self.x, self.target = torch.randn(9, N, dtype=dtype), torch.randn(9, M, dtype=dtype)
        self.optimizer = OPTIMIZERS[name]([
            {"params": [self.gain], "lr": 0.5e-2},
            {"params": [self.layer.lora_A, self.bias, self.layer.lora_B], "lr": 1e-2, "weight_decay": 0.1},
        ])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def forward(self) -> Tensor:
        """Return the layer's output on the rig's data."""
        output: Tensor = self.layer(self.x * self.gain) + self.bias
        return output

    def step(self) -> float:
        loss = (self() - self.target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler.optimizer is self.optimizer:
            self.scheduler.step()
        return loss.item()

    def states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Copies of the states of A and B."""
        return tuple(
            {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state.get(each, {}).items()
            }
            for each in (self.layer.lora_A, self.layer.lora_B)
        )


def trained(name: str, **keywords: Any) -> Rig:  # noqa: ANN401 - passed on
    rig = Rig(name, **keywords)
    for _ in range(3):
        rig.step()
    return rig


def grow_by_two(layer: StandInAdapter, optimizer: Optimizer | None) -> None:
    grow(layer, torch.randn(2, N), optimizer)


def keep_two(layer: StandInAdapter, optimizer: Optimizer | None) -> None:
    keep(layer, [2, 0], optimizer)


def keep_none(layer: StandInAdapter, optimizer: Optimizer | None) -> None:
    keep(layer, [], optimizer)


def rebase_to(rank: int) -> Operation:
    def operation(layer: StandInAdapter, optimizer: Optimizer | None) -> None:
        with seeded(1):
            gram = BottleneckGram.of(torch.randn(20, len(layer.lora_A)), torch.randn(20, len(layer.lora_A)), examples=5)
        rebase(layer, *truncate(layer.lora_A, layer.lora_B, flow_spectrum(gram), rank), optimizer)

    return operation


OPERATIONS: dict[str, tuple[Operation, int]] = {
    "grow": (grow_by_two, 5),
    "keep": (keep_two, 2),
    "keep_none": (keep_none, 0),
    "rebase_all": (rebase_to(3), 3),
    "rebase_to_two": (rebase_to(2), 2),
    "rebase_to_none": (rebase_to(0), 0),
}
OPERATION = pytest.mark.parametrize("operation", OPERATIONS)


@OPTIMIZER
@OPERATION
def test_the_optimiser_holds_exactly_the_live_parameters_at_their_places(name: str, operation: str) -> None:
    rig = trained(name)
    options = [{key: value for key, value in group.items() if key != "params"} for group in rig.optimizer.param_groups]
    change, rank = OPERATIONS[operation]
    change(rig.layer, rig.optimizer)
    assert rig.layer.lora_A.shape == (rank, N)
    assert rig.layer.lora_B.shape == (M, rank)
    expected = [[rig.gain], [rig.layer.lora_A, rig.bias, rig.layer.lora_B]]
    for group, parameters, option in zip(rig.optimizer.param_groups, expected, options, strict=True):
        assert [id(each) for each in group["params"]] == [id(each) for each in parameters]
        assert {key: value for key, value in group.items() if key != "params"} == option
    live = {id(each) for each in rig.parameters()}
    assert {id(each) for each in rig.optimizer.state} <= live
    for parameter, state in rig.optimizer.state.items():
        for key in FIRST + SECOND:
            if key in state:
                assert state[key].shape == parameter.shape
                assert state[key].dtype == parameter.dtype
                assert torch.isfinite(state[key]).all()


@OPTIMIZER
@OPERATION
def test_training_goes_on_and_the_state_can_be_saved_and_loaded(name: str, operation: str) -> None:
    rig = trained(name)
    OPERATIONS[operation][0](rig.layer, rig.optimizer)
    before = [each.detach().clone() for each in (rig.layer.lora_A, rig.layer.lora_B)]
    losses = [rig.step() for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    for old, new in zip(before, (rig.layer.lora_A, rig.layer.lora_B), strict=True):
        assert torch.isfinite(new).all()
        assert new.numel() == 0 or not torch.equal(old, new)
    rig.optimizer.load_state_dict(rig.optimizer.state_dict())
    rig.step()


@OPERATION
def test_the_scheduler_still_drives_the_group(operation: str) -> None:
    rig, reference = trained("adamw"), trained("adamw")
    OPERATIONS[operation][0](rig.layer, rig.optimizer)
    for _ in range(3):
        rig.step()
        reference.step()
        assert [group["lr"] for group in rig.optimizer.param_groups] == [
            group["lr"] for group in reference.optimizer.param_groups
        ]
    assert rig.optimizer.param_groups[1]["lr"] == pytest.approx(1e-2 / 7)


@OPTIMIZER
def test_kept_rows_keep_factors_and_moments_bitwise(name: str) -> None:
    rig = trained(name)
    a, b, (state_A, state_B) = rig.layer.lora_A.detach(), rig.layer.lora_B.detach(), rig.states()
    keep(rig.layer, [2, 0], rig.optimizer)
    new_A, new_B = rig.states()
    assert torch.equal(rig.layer.lora_A, a[[2, 0]])
    assert torch.equal(rig.layer.lora_B, b[:, [2, 0]])
    assert new_A.keys() == state_A.keys()
    for key in set(new_A) & {*FIRST, *SECOND}:
        assert torch.equal(new_A[key], state_A[key][[2, 0]])
        assert torch.equal(new_B[key], state_B[key][:, [2, 0]])


@OPTIMIZER
def test_grown_rows_start_with_zero_first_and_mean_second_moments_and_the_rest_is_kept_bitwise(name: str) -> None:
    rig = trained(name)
    a, b, (state_A, state_B) = rig.layer.lora_A.detach(), rig.layer.lora_B.detach(), rig.states()
    rows = torch.randn(2, N)
    grow(rig.layer, rows, rig.optimizer)
    new_A, new_B = rig.states()
    assert torch.equal(rig.layer.lora_A, torch.cat([a, rows]))
    assert torch.equal(rig.layer.lora_B, torch.cat([b, torch.zeros(M, 2)], 1))
    assert new_A.keys() == state_A.keys()
    for key in set(new_A) & {*FIRST, *SECOND}:
        assert torch.equal(new_A[key][:RANK], state_A[key])
        assert torch.equal(new_B[key][:, :RANK], state_B[key])
    for key in set(new_A) & set(FIRST):
        assert new_A[key][RANK:].count_nonzero() == new_B[key][:, RANK:].count_nonzero() == 0
    for key in set(new_A) & set(SECOND):
        assert torch.equal(new_A[key][RANK:], state_A[key].mean().expand(2, N))
        assert torch.equal(new_B[key][:, RANK:], state_B[key].mean().expand(M, 2))


@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "amsgrad"])
@OPERATION
def test_the_step_count_goes_on(name: str, operation: str) -> None:
    rig = trained(name)
    OPERATIONS[operation][0](rig.layer, rig.optimizer)
    assert [state["step"].item() for state in rig.states()] == [3, 3]


def test_the_first_step_of_new_rows_is_no_larger_than_the_learning_rate() -> None:
    rig = Rig("adamw")
    for _ in range(200):
        rig.step()
    rig.optimizer.param_groups[1]["weight_decay"] = 0.0
    grow(rig.layer, torch.zeros(2, N), rig.optimizer)
    before, rate = rig.layer.lora_B.detach().clone(), rig.optimizer.param_groups[1]["lr"]
    rig.step()
    moments = rig.optimizer.state[rig.layer.lora_B]["exp_avg_sq"]
    assert moments[:, RANK:].min() > 0
    assert (rig.layer.lora_B - before)[:, RANK:].abs().max() <= rate


@pytest.mark.parametrize(("name", "key", "factor"), [("sgd_momentum", "momentum_buffer", 1), ("adamw", "exp_avg", 10)])
@pytest.mark.parametrize("rank", [3, 2, 1])
def test_rebased_first_moments_are_the_gradients_of_the_rebased_factors(
    name: str, key: str, factor: int, rank: int
) -> None:
    rig = Rig(name, dtype=torch.float64)
    for group in rig.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0  # one step that moves nothing: moments are gradients

    def backward() -> None:
        rig.optimizer.zero_grad()
        (rig() * rig.target).sum().backward()  # linear in the update: the weight gradient does not depend on it

    backward()
    rig.optimizer.step()
    second = {k: v.mean() for k, v in rig.states()[0].items() if k in SECOND}
    rebase_to(rank)(rig.layer, rig.optimizer)
    backward()
    for parameter in (rig.layer.lora_A, rig.layer.lora_B):
        torch.testing.assert_close(factor * rig.optimizer.state[parameter][key], parameter.grad)
    for k, mean in second.items():
        assert torch.equal(rig.optimizer.state[rig.layer.lora_A][k], mean.expand(rank, N))


@OPTIMIZER
def test_rank_zero_grows_to_a_fresh_state_and_learns(name: str) -> None:
    rig = trained(name, rank=0)
    grow(rig.layer, torch.randn(2, N), rig.optimizer)
    assert rig.states() == ({}, {})
    losses = [rig.step() for _ in range(5)]
    assert rig.layer.lora_B.count_nonzero() > 0
    assert losses[-1] < losses[0]


@OPTIMIZER
def test_a_layer_goes_to_rank_zero_and_comes_back(name: str) -> None:
    rig = trained(name)
    keep(rig.layer, [], rig.optimizer)
    rig.step()
    grow(rig.layer, torch.randn(2, N), rig.optimizer)
    rig.step()
    rig.step()
    assert rig.layer.lora_B.count_nonzero() == M * 2
    assert [id(each) for each in rig.optimizer.param_groups[1]["params"]] == [
        id(rig.layer.lora_A), id(rig.bias), id(rig.layer.lora_B)
    ]  # fmt: skip


@OPERATION
def test_an_optimiser_that_has_not_stepped_yet_is_served(operation: str) -> None:
    rig = Rig("adamw")
    OPERATIONS[operation][0](rig.layer, rig.optimizer)
    assert not rig.optimizer.state
    rig.step()


@OPERATION
def test_a_layer_that_is_not_trained_needs_no_optimiser(operation: str) -> None:
    rig = Rig()
    rig.layer.requires_grad_(False)
    change, rank = OPERATIONS[operation]
    change(rig.layer, None)
    assert rig.layer.rank == rank
    assert not any(each.requires_grad for each in rig.layer.parameters())


def untouched(rig: Rig, operation: str, optimizer: Optimizer, words: str) -> None:
    factors = [rig.layer.lora_A, rig.layer.lora_B]
    copies = [each.detach().clone() for each in factors]
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    keys = {id(each): dict(state) for each, state in optimizer.state.items()}
    with pytest.raises(ValueError, match=words):
        OPERATIONS[operation][0](rig.layer, optimizer)
    assert rig.layer.lora_A is factors[0]
    assert rig.layer.lora_B is factors[1]
    assert all(torch.equal(old, new) for old, new in zip(copies, factors, strict=True))
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    assert {id(each): dict(state) for each, state in optimizer.state.items()} == keys


@pytest.mark.parametrize(
    ("build", "unknown"),
    [
        (torch.optim.RMSprop, "square_avg"),
        (torch.optim.Adagrad, "sum"),
        (torch.optim.Adamax, "exp_inf"),
    ],
)
@OPERATION
def test_an_unknown_optimiser_state_is_refused_before_anything_changes(
    operation: str, build: Callable[[Any], Optimizer], unknown: str
) -> None:
    rig = Rig()
    rig.optimizer = build(list(rig.parameters()))
    rig.step()
    untouched(rig, operation, rig.optimizer, rf"optimizer state must be moments .* got \['{unknown}'")


@OPERATION
def test_an_unknown_state_of_b_alone_is_refused_before_a_changes(operation: str) -> None:
    rig = trained("adamw")
    rig.optimizer.state[rig.layer.lora_B]["sketch"] = torch.zeros(2, 2)
    untouched(rig, operation, rig.optimizer, r"optimizer state must be moments .* got \['sketch'\] in AdamW")


@pytest.mark.parametrize("held", ["none", "only_A"])
@OPERATION
def test_an_optimiser_that_lacks_a_factor_is_refused_before_anything_changes(operation: str, held: str) -> None:
    rig = Rig()
    other = torch.optim.AdamW([rig.gain] if held == "none" else [rig.layer.lora_A])
    untouched(rig, operation, other, "optimizer must hold the layer's factors, got one that does not")


# Continuity.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_growing_leaves_the_output_as_it_was(dtype: torch.dtype, tolerance: float, rank: int) -> None:
    rig = trained("adamw", dtype=dtype, rank=rank)
    before = rig().detach()
    grow(rig.layer, 100 * torch.randn(2, N), rig.optimizer)
    assert (rig() - before).abs().max() <= tolerance * before.abs().max()


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_shrinking_changes_the_output_by_what_the_gains_say(rank: int) -> None:
    rig = Rig(dtype=torch.float64)
    z, seen = rig.x @ rig.layer.lora_A.detach().T, []
    rig.layer.observer = lambda each: each.register_hook(seen.append) and None
    output = rig.layer(rig.x)
    upstream = torch.autograd.grad((output - rig.target).square().sum() / 2, output, retain_graph=True)[0]
    output.backward(upstream)
    rig.layer.observer = None
    spectrum = flow_spectrum(BottleneckGram.of(z, seen[0], examples=3), jitter=0)  # three tokens per example
    rebase(rig.layer, *truncate(rig.layer.lora_A, rig.layer.lora_B, spectrum, rank), None)
    change = (rig.layer(rig.x) - output).detach()  # x Dᵀ
    # ½ tr(S D C Dᵀ) = ½ mean over tokens and examples of the squared inner products of g and D x
    cost = (upstream @ change.T).square().sum().item() / (2 * 3 * 9)
    assert cost == pytest.approx(spectrum.gains[rank:].sum().item(), rel=1e-9, abs=1e-12)


def test_rebasing_onto_all_directions_leaves_the_output_as_it_was() -> None:
    rig = trained("adamw", dtype=torch.float64)
    before = rig().detach()
    rebase_to(3)(rig.layer, rig.optimizer)
    assert (rig() - before).abs().max() <= 1e-12 * before.abs().max()
