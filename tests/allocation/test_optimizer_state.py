"""Every optimiser that surgery serves, over every operation and every form of update; and those that it refuses."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes import functional
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowra_allocation import grow, keep, rebase
from flowra_allocation.changes import Kept
from flowra_allocation.factored_moments import carry_means
from flowra_allocation.forms import AnyLayer, factors, live_slots
from flowra_allocation.quantised_moments import decode, encode
from flowra_testing.stand_in_adapter import StandInAdapter
from flowra_testing.stand_in_triplets import StandInSlots, StandInTriplets
from flowra_testing.tiny_models import seeded

M, N, RANK, SLOTS, RATE = 72, 80, 4, 8, 1e-2
AXES = {"lora_A": 0, "lora_E": 0, "lora_B": 1}


FORMS = ("pair", "triplets", "slots")


@dataclass(frozen=True)
class Row:
    """An optimiser of the table."""

    build: Callable[[Any], Optimizer]
    bound: float | None = 1.001
    """The longest first step of an entry of a new direction, in learning rates; None if it has no bound."""
    quick: tuple[str, ...] = FORMS
    """Forms tried in every run; the others only in the slow one, where the state is laid out as in another row."""
    matrices_only: bool = False


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row(lambda groups: torch.optim.AdamW(groups, lr=RATE)),
    "adamw_foreach": Row(lambda groups: torch.optim.AdamW(groups, lr=RATE, foreach=True), quick=("pair",)),
    "adamw_fused": Row(lambda groups: torch.optim.AdamW(groups, lr=RATE, fused=True), quick=("slots",)),
    "amsgrad": Row(lambda groups: torch.optim.AdamW(groups, lr=RATE, amsgrad=True)),
    "adam": Row(lambda groups: torch.optim.Adam(groups, lr=RATE), quick=("triplets",)),
    "nadam": Row(
        lambda groups: torch.optim.NAdam(groups, lr=RATE), bound=3.0, quick=("triplets",)
    ),  # the gradient is not averaged alone
    "radam": Row(
        lambda groups: torch.optim.RAdam(groups, lr=RATE), bound=None, quick=("pair",)
    ),  # plain momentum at first
    "muon": Row(lambda groups: torch.optim.Muon(groups, lr=RATE), bound=1.5, quick=("pair",), matrices_only=True),
    "sgd": Row(lambda groups: torch.optim.SGD(groups, lr=RATE), bound=None, quick=("slots",)),
    "sgd_nesterov": Row(lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True), bound=None),
    "adafactor": Row(lambda groups: torch.optim.Adafactor(groups, lr=RATE)),
    "adafactor_transformers": Row(
        lambda groups: transformers.Adafactor(groups, lr=RATE, relative_step=False, scale_parameter=False),
        bound=4.0,  # it clips the mean square of a step to 1, not each entry
    ),
    "adafactor_first_moment": Row(
        lambda groups: transformers.Adafactor(groups, lr=RATE, relative_step=False, scale_parameter=False, beta1=0.9),
        quick=("pair",),
    ),
    "bnb_adamw8bit": Row(lambda groups: bnb.optim.AdamW8bit(groups, lr=RATE, min_8bit_size=64)),
    "bnb_adam8bit": Row(lambda groups: bnb.optim.Adam8bit(groups, lr=RATE, min_8bit_size=64), quick=("triplets",)),
    "bnb_adamw8bit_small": Row(lambda groups: bnb.optim.AdamW8bit(groups, lr=RATE), quick=("pair",)),
    "bnb_paged_adamw8bit": Row(
        lambda groups: bnb.optim.PagedAdamW8bit(groups, lr=RATE, min_8bit_size=64), quick=("pair",)
    ),
    "bnb_adamw": Row(lambda groups: bnb.optim.AdamW(groups, lr=RATE), quick=("slots",)),
    "bnb_sgd8bit": Row(
        lambda groups: bnb.optim.SGD8bit(groups, lr=RATE, momentum=0.9, min_8bit_size=64), bound=None, quick=("pair",)
    ),
    "bnb_lion8bit": Row(lambda groups: bnb.optim.Lion8bit(groups, lr=RATE, min_8bit_size=64), quick=("pair", "slots")),
}
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


def update(form: str, *, rank: int = RANK, dtype: torch.dtype = torch.float32) -> AnyLayer:
    lora_A, lora_E = torch.randn(rank, N, dtype=dtype) / N**0.5, torch.randn(rank, dtype=dtype)
    lora_B = torch.randn(M, rank, dtype=dtype) / M**0.5
    if form == "slots":
        return StandInSlots(lora_A, lora_E, lora_B, scaling=2.0, slots=SLOTS)
    if form == "triplets":
        return StandInTriplets(lora_A, lora_E, lora_B, scaling=2.0)
    pair = StandInAdapter(N, M, rank=0, scaling=2.0, dtype=dtype, generator=torch.Generator())
    pair.replace_factors(lora_A, lora_B)
    return pair


class Rig(nn.Module):
    """An update between a trained gain and a trained bias; B learns faster, in its own group, as LoRA+ has it."""

    def __init__(self, name: str, form: str, *, rank: int = RANK, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.row = OPTIMIZERS[name]
        with seeded(0):
            self.layer: Any = update(form, rank=rank, dtype=dtype)
            self.gain = nn.Parameter(torch.ones(1, N, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(1, M, dtype=dtype))
            self.x, self.target = torch.randn(32, N, dtype=dtype), torch.randn(32, M, dtype=dtype)
        self.optimizer = self.build()

    def groups(self) -> list[list[nn.Parameter]]:
        """The live parameters where they belong."""
        layer = self.layer
        middle = [layer.lora_E] if hasattr(layer, "lora_E") else []
        return [[self.gain], [layer.lora_A, self.bias, *middle], [layer.lora_B]]

    def build(self) -> Optimizer:
        rates = (RATE, RATE, 4 * RATE)
        return self.row.build([{"params": each, "lr": rate} for each, rate in zip(self.groups(), rates, strict=True)])

    def forward(self) -> Tensor:
        """Return the update's output on the rig's data; without the update where it has no direction."""
        base = self.bias.expand_as(self.target)
        return base + self.layer(self.x * self.gain) if self.layer.rank else base

    def loss(self) -> Tensor:
        return (self() - self.target).square().mean()

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def trained(name: str, form: str = "pair", **keywords: Any) -> Rig:  # noqa: ANN401 - passed on
    rig = Rig(name, form, **keywords)
    for _ in range(3):
        rig.step()
    return rig


def rebase_to_two(layer: Any, optimizer: Optimizer | None, **averages: Any) -> None:  # noqa: ANN401 - passed on
    with seeded(2):
        mix = torch.randn(2, layer.rank, dtype=torch.float64)
    lora_A, lora_B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    rebase(layer, mix @ lora_A, lora_B @ torch.linalg.pinv(mix), optimizer, **averages)


def grow_by_two(layer: Any, optimizer: Optimizer | None, **averages: Any) -> None:  # noqa: ANN401 - passed on
    with seeded(1):
        grow(layer, torch.randn(2, N, dtype=layer.lora_A.dtype) / N**0.5, optimizer, **averages)


OPERATIONS: dict[str, Callable[..., None]] = {
    "keep": lambda layer, optimizer, **averages: keep(layer, [2, 0], optimizer, **averages),
    "keep_none": lambda layer, optimizer, **averages: keep(layer, [], optimizer, **averages),
    "grow": grow_by_two,
    "rebase": rebase_to_two,
}
RANKS = {"keep": 2, "keep_none": 0, "grow": RANK + 2, "rebase": 2}
ALL = [
    (name, form, operation)
    for name, row in OPTIMIZERS.items()
    for form in FORMS
    for operation in OPERATIONS
    if not (operation == "rebase" and form != "pair") and not (row.matrices_only and form != "pair")
]
FORM_AND_OPERATION = sorted({case[1:] for case in ALL})


def cases(*operations: str) -> list[Any]:
    """Rows with these operations."""
    return [
        pytest.param(*case, marks=() if case[1] in OPTIMIZERS[case[0]].quick else pytest.mark.slow)
        for case in ALL
        if case[2] in operations
    ]


CASE = pytest.mark.parametrize(("name", "form", "operation"), cases(*OPERATIONS))


def decoded(state: Mapping[str, Any], number: int) -> Tensor:
    codes: Tensor = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes.clone()
    return functional.dequantize_blockwise(
        codes, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
    )


def moments(state: Mapping[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """What an optimiser remembers of one parameter, in its shape."""
    found = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape}
    if "row_var" in state and state["row_var"].numel() and state["col_var"].numel():
        found["estimate"] = state["row_var"] @ state["col_var"] / state["row_var"].mean()
    if "exp_avg_sq_row" in state and state["exp_avg_sq_row"].numel() and state["exp_avg_sq_col"].numel():
        rows = state["exp_avg_sq_row"]
        found["estimate"] = rows[:, None] * state["exp_avg_sq_col"] / rows.mean()
    if "state1" in state:
        found = {f"state{number}": decoded(state, number) for number in (1, 2) if f"state{number}" in state}
    return {key: each for key, each in found.items() if each.shape == shape}


def remembered(rig: Rig) -> dict[str, dict[str, Tensor]]:
    return {name: moments(rig.optimizer.state.get(each, {}), each.shape) for name, each in factors(rig.layer).items()}


def assert_kept(new: Tensor, old: Tensor, key: str, *, coarse: bool) -> None:
    """Bit by bit, but for products of means (to rounding) and 8-bit codes (to a step of the code, ≤ 1/20 or so)."""
    if coarse:
        assert (new - old).abs().max() <= 0.05 * old.abs().max()
        assert ((new - old).abs() <= 0.1 * old.abs() + 1e-2 * old.abs().max()).all()
    elif key == "estimate":
        torch.testing.assert_close(new, old, rtol=1e-5, atol=0)
    else:
        assert torch.equal(new, old)


@CASE
def test_the_optimiser_holds_exactly_the_live_parameters_and_fits_them(name: str, form: str, operation: str) -> None:
    rig = trained(name, form)
    options = [{key: value for key, value in group.items() if key != "params"} for group in rig.optimizer.param_groups]
    OPERATIONS[operation](rig.layer, rig.optimizer)
    assert rig.layer.rank == RANKS[operation]
    for group, expected, option in zip(rig.optimizer.param_groups, rig.groups(), options, strict=True):
        assert [id(each) for each in group["params"]] == [id(each) for each in expected]
        assert {key: value for key, value in group.items() if key != "params"} == option
    assert {id(each) for each in rig.optimizer.state} <= {id(each) for each in rig.parameters()}
    fresh = rig.build()  # what the optimiser itself would keep of tensors of these shapes
    for parameter in rig.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.numel() else None
    fresh.step()
    for parameter, state in rig.optimizer.state.items():
        if parameter.numel():
            shapes = [
                {key: (value.shape, value.dtype) for key, value in each.items() if isinstance(value, Tensor)}
                for each in (state, fresh.state[parameter])
            ]
            assert shapes[0] == shapes[1]
        assert all(torch.isfinite(each).all() for each in state.values() if isinstance(each, Tensor))


@pytest.mark.parametrize(("name", "form", "operation"), cases("keep", "grow"))
def test_directions_that_stay_keep_their_moments(name: str, form: str, operation: str) -> None:
    rig = trained(name, form)
    coarse = any(
        isinstance(value, Tensor) and value.dtype == torch.uint8
        for state in rig.optimizer.state.values()
        for value in state.values()
    )
    before, slots = remembered(rig), live_slots(rig.layer)
    assert name == "sgd" or before["lora_A"]
    OPERATIONS[operation](rig.layer, rig.optimizer)
    stay = [slots[index] for index in ([2, 0] if operation == "keep" else range(RANK))]
    places = stay if form == "slots" else list(range(len(stay)))
    after = remembered(rig)
    for factor, each in after.items():
        axis = AXES[factor]
        assert each.keys() == before[factor].keys()
        for key, moment in each.items():
            kept, old = (
                value.index_select(axis, torch.tensor(index))
                for value, index in ((moment, places), (before[factor][key], stay))
            )
            assert_kept(kept, old, key, coarse=coarse and factor != "lora_E")
    for factor in after if operation == "grow" else ():
        new = torch.tensor(live_slots(rig.layer)[RANK:])
        for key in after[factor].keys() & {"exp_avg", "momentum_buffer", "state1"}:
            assert after[factor][key].index_select(AXES[factor], new).count_nonzero() == 0
        for key in after[factor].keys() & {"exp_avg_sq", "max_exp_avg_sq", "variance", "state2"}:
            found = after[factor][key].index_select(AXES[factor], new)
            mean = before[factor][key].index_select(AXES[factor], torch.tensor(slots)).mean()
            torch.testing.assert_close(found, mean.expand_as(found), rtol=0.1 if coarse else 1e-6, atol=1e-12)


@CASE
def test_training_goes_on_and_a_fresh_optimiser_takes_up_the_state(name: str, form: str, operation: str) -> None:
    rig = trained(name, form)
    OPERATIONS[operation](rig.layer, rig.optimizer)
    losses = [rig.step() for _ in range(4)]
    assert losses[-1] < losses[0]
    state, values = copy.deepcopy(rig.optimizer.state_dict()), [each.detach().clone() for each in rig.parameters()]
    rig.step()
    expected = [each.detach().clone() for each in rig.parameters()]
    with torch.no_grad():
        for parameter, value in zip(rig.parameters(), values, strict=True):
            parameter.copy_(value)
    rig.optimizer = rig.build()
    rig.optimizer.load_state_dict(state)
    rig.step()
    assert all(torch.equal(*pair) for pair in zip(rig.parameters(), expected, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(values, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, row in OPTIMIZERS.items() if row.bound is not None for form in row.quick]
)
def test_the_first_step_of_new_directions_is_no_longer_than_the_learning_rate(name: str, form: str) -> None:
    rig = Rig(name, form)
    for _ in range(12):
        rig.step()
    grow_by_two(rig.layer, rig.optimizer)
    factor, rate = ("lora_B", 4 * RATE) if form == "pair" else ("lora_E", RATE)
    before, new = factors(rig.layer)[factor].detach().clone(), torch.tensor(live_slots(rig.layer)[RANK:])
    rig.step()
    moved = (factors(rig.layer)[factor] - before).index_select(AXES[factor], new).abs()
    bound = rig.row.bound
    assert bound is not None
    assert 0 < moved.max() <= bound * rate


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["adamw", "bnb_adamw8bit", "adafactor_transformers", "sgd_nesterov"])
def test_where_there_was_no_direction_the_optimiser_starts_afresh(name: str, form: str) -> None:
    rig = Rig(name, form)
    for _ in range(12):
        rig.step()
    keep(rig.layer, [], rig.optimizer)
    rig.step()
    grow_by_two(rig.layer, rig.optimizer)
    assert not any(rig.optimizer.state.get(each) for each in factors(rig.layer).values())
    before = {key: each.detach().clone() for key, each in factors(rig.layer).items()}
    losses = [rig.step()]
    if rig.row.bound is not None:
        for key, each in factors(rig.layer).items():
            rate = 4 * RATE if key == "lora_B" else RATE
            assert (each - before[key]).abs().max() <= 1.02 * rig.row.bound * rate
    losses += [rig.step() for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["adamw", "sgd_nesterov", "bnb_adamw"])
def test_what_a_slot_remembers_of_a_direction_that_left_is_forgotten_when_another_comes(name: str) -> None:
    rig = trained(name, "slots")
    keep(rig.layer, [2, 0], rig.optimizer)
    left = torch.tensor([1, 3])
    keys = {"exp_avg", "momentum_buffer", "state1"}
    assert all(
        moment.index_select(AXES[factor], left).count_nonzero() > 0
        for factor, each in remembered(rig).items()
        for key, moment in each.items()
        if key in keys
    )
    grow_by_two(rig.layer, rig.optimizer)
    assert live_slots(rig.layer) == [2, 0, 1, 3]
    for factor, each in remembered(rig).items():
        first, rest = each.keys() & keys, each.keys() - keys
        for key in first:
            assert each[key].index_select(AXES[factor], left).count_nonzero() == 0
        for key in rest:
            new, old = (each[key].index_select(AXES[factor], index) for index in (left, torch.tensor([2, 0])))
            torch.testing.assert_close(new, old.mean().expand_as(new))


@pytest.mark.parametrize("name", ["adamw", "sgd_nesterov", "adafactor_first_moment", "bnb_adamw"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_half_precision_factors_keep_their_dtypes(name: str, operation: str) -> None:
    rig = trained(name, "pair", dtype=torch.bfloat16)
    before = {
        key: value.dtype for key, value in rig.optimizer.state[rig.layer.lora_A].items() if isinstance(value, Tensor)
    }
    OPERATIONS[operation](rig.layer, rig.optimizer)
    assert rig.layer.lora_A.dtype == rig.layer.lora_B.dtype == torch.bfloat16
    after = {
        key: value.dtype for key, value in rig.optimizer.state[rig.layer.lora_A].items() if isinstance(value, Tensor)
    }
    assert after == before
    rig.step()


# Adafactor.


@pytest.mark.parametrize("build", [torch.optim.Adafactor, transformers.Adafactor], ids=["torch", "transformers"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [(shape, axis) for shape in ((4, 3), (4, 3, 5), (4, 3, 5, 2), (1, 2), (4,)) for axis in (0, 1)[: len(shape)]],
    ids=str,
)
def test_means_of_second_moments_fit_every_shape(
    build: Callable[[Any], Optimizer], axis: int, shape: tuple[int, ...]
) -> None:
    index = torch.arange(shape[axis] - 1, -1, -1)[: max(1, shape[axis] - 1)]
    parameter = nn.Parameter(torch.randn(shape))
    other = nn.Parameter(parameter.detach().index_select(axis, index))
    optimizer = build([parameter, other])
    for each in (parameter, other):
        each.grad = torch.randn_like(each)
    optimizer.step()
    state = {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    carried = carry_means(state, ndim=len(shape), change=Kept(axis, index))
    expected = {key: value.shape for key, value in optimizer.state[other].items() if key in carried}
    assert {key: value.shape for key, value in carried.items()} == expected
    assert bool(carried) == (len(shape) > 1)


@pytest.mark.parametrize("name", ["adafactor", "adafactor_transformers"])
@pytest.mark.parametrize("operation", ["keep", "grow", "rebase"])
def test_means_over_rows_and_over_columns_go_on_having_one_mean(name: str, operation: str) -> None:
    rig = trained(name)
    OPERATIONS[operation](rig.layer, rig.optimizer)
    for factor in (rig.layer.lora_A, rig.layer.lora_B):
        state = rig.optimizer.state[factor]
        rows, columns = (
            state[key] for key in state if key in ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")
        )
        torch.testing.assert_close(rows.mean(), columns.mean(), rtol=1e-5, atol=0)


# bitsandbytes.


@pytest.mark.parametrize("build", [bnb.optim.AdamW8bit, bnb.optim.Lion8bit], ids=["adamw", "lion"])
def test_a_tensor_that_crosses_the_limit_of_8_bits_is_kept_as_bitsandbytes_would(
    build: Callable[..., Optimizer],
) -> None:
    layer = StandInAdapter(100, 100, rank=40, scaling=1.0, dtype=torch.float32, generator=torch.Generator())
    optimizer, x = build(list(layer.parameters()), lr=RATE), torch.randn(8, 100)

    def step() -> None:
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()

    def kinds() -> list[torch.dtype]:
        return [optimizer.state[each]["state1"].dtype for each in layer.parameters()]

    step()
    step()
    small = {
        number: decoded(optimizer.state[layer.lora_A], number)
        for number in (1, 2)
        if f"state{number}" in optimizer.state[layer.lora_A]
    }
    assert kinds() == [torch.float32] * 2  # 4000 elements
    grow(layer, torch.randn(2, 100), optimizer)
    assert kinds() == [torch.uint8] * 2  # 4200
    for number, moment in small.items():
        assert_kept(decoded(optimizer.state[layer.lora_A], number)[:40], moment, "", coarse=True)
    step()
    large = decoded(optimizer.state[layer.lora_A], 1)
    keep(layer, range(1, 40), optimizer)
    assert kinds() == [torch.float32] * 2  # 3900
    assert torch.equal(optimizer.state[layer.lora_A]["state1"], large[1:40])
    assert optimizer.state[layer.lora_A]["step"] == 3
    step()


def test_settings_of_a_single_tensor_and_pages_follow_it() -> None:
    rig = trained("bnb_adamw8bit")
    manager, old = rig.optimizer.mng, rig.layer.lora_A
    manager.override_config(old, "optim_bits", 32)
    pages = rig.optimizer.page_mng.paged_tensors
    pages.append(rig.optimizer.state[rig.layer.lora_B]["state1"])
    keep(rig.layer, [2, 0], rig.optimizer)
    assert manager.pid2config.pop(id(rig.layer.lora_A)) == {"optim_bits": 32}
    assert id(old) not in manager.pid2config
    assert rig.optimizer.state[rig.layer.lora_A]["state1"].dtype == torch.float32
    assert rig.optimizer.state[rig.layer.lora_B]["state1"].dtype == torch.uint8
    assert not pages


@pytest.mark.parametrize("signed", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_codes_are_those_of_bitsandbytes(size: int, signed: bool) -> None:
    code = functional.create_dynamic_map(signed=signed)
    values = torch.randn(size, 1) * torch.rand(size, 1) ** 8
    values = values if signed else values.abs()
    codes, scales = encode(values, code)
    theirs, state = functional.quantize_blockwise(values, code=code, blocksize=256)
    assert torch.equal(scales, state.absmax)
    assert codes.shape == values.shape
    decoded_by_them = functional.dequantize_blockwise(codes, absmax=scales, code=code, blocksize=256)
    assert torch.equal(decode(codes, scales, code), decoded_by_them)
    errors = [
        (decode(each, scales, code) - values).abs() for each in (codes, theirs)
    ]  # theirs is not always the nearest
    assert (errors[0] <= errors[1] + 1e-7 * scales.max()).all()
    assert decode(*encode(torch.zeros(size), code), code).count_nonzero() == 0


# LoRA-FA.


def lora_fa(layer: StandInAdapter, head: nn.Linear) -> Optimizer:
    layer.lora_A.requires_grad_(False)
    named = [("up.lora_A.default", layer.lora_A), ("up.lora_B.default", layer.lora_B), ("head.weight", head.weight)]
    return LoraFAOptimizer([{
        "params": [each for _, each in named], "names": [name for name, _ in named],
        "scaling_factors": [2.0, 2.0, None], "lr": RATE,
    }])  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_lora_fa_s_optimiser_finds_the_moments_of_b_under_its_name(operation: str) -> None:
    layer, head = update("pair"), nn.Linear(M, 3, bias=False)
    assert isinstance(layer, StandInAdapter)
    optimizer, x = lora_fa(layer, head), torch.randn(8, N)

    def step() -> None:
        optimizer.zero_grad()
        head(layer(x)).square().mean().backward()
        if layer.rank:
            optimizer.step()

    step()
    before = {key: value.clone() for key, value in optimizer.state["up.lora"].items() if isinstance(value, Tensor)}
    OPERATIONS[operation](layer, optimizer)
    group = optimizer.param_groups[0]
    assert [id(each) for each in group["params"]] == [id(each) for each in (layer.lora_A, layer.lora_B, head.weight)]
    assert group["names"] == ["up.lora_A.default", "up.lora_B.default", "head.weight"]
    assert not layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad
    assert set(optimizer.state) == {"up.lora", "head.weight"}
    state = optimizer.state["up.lora"]
    assert state["exp_avg_B"].shape == state["exp_avg_sq_B"].shape == layer.lora_B.shape
    assert state["step"] == 1
    if operation == "keep":
        assert torch.equal(state["exp_avg_B"], before["exp_avg_B"][:, [2, 0]])
        assert torch.equal(state["exp_avg_sq_B"], before["exp_avg_sq_B"][:, [2, 0]])
    if operation == "grow":
        assert torch.equal(state["exp_avg_B"][:, :RANK], before["exp_avg_B"])
        assert torch.equal(state["exp_avg_sq_B"][:, RANK:], before["exp_avg_sq_B"].mean().expand(M, 2))
    old = layer.lora_B.detach().clone()
    step()
    assert layer.rank == 0 or not torch.equal(old, layer.lora_B)
    copied = lora_fa(layer, head)
    copied.load_state_dict(optimizer.state_dict())
    assert copied.state.keys() == optimizer.state.keys()


def test_what_lora_fa_averages_goes_where_b_goes_when_it_is_re_based() -> None:
    layer, head, x = update("pair"), nn.Linear(M, 3, bias=False), torch.randn(8, N)
    assert isinstance(layer, StandInAdapter)
    mix = torch.eye(RANK) + 0.3 * torch.randn(RANK, RANK)
    found = []
    for late in (True, False):  # the moment is mapped; the moment is made of the gradient of the re-based factors
        one = copy.deepcopy(layer)
        optimizer = lora_fa(one, head)
        optimizer.param_groups[0]["lr"] = 0.0
        for change in (late, not late):
            if not change:
                rebase(one, mix @ one.lora_A.detach(), one.lora_B.detach() @ mix.inverse(), optimizer)
            else:
                optimizer.zero_grad()
                head(one(x)).sum().backward()
                optimizer.step()
        found.append(optimizer.state["up.lora"]["exp_avg_B"])
    assert (found[0] - found[1]).abs().max() <= 0.03 * found[1].abs().max()  # it computes products in bfloat16


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_frozen_a_need_not_be_held(operation: str) -> None:
    layer = update("pair")
    layer.lora_A.requires_grad_(False)
    optimizer = torch.optim.AdamW([layer.lora_B], lr=RATE)
    layer(torch.ones(2, N)).square().sum().backward()  # type: ignore[operator]
    optimizer.step()
    OPERATIONS[operation](layer, optimizer)
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == [id(layer.lora_B)]
    assert [id(each) for each in optimizer.state] == [id(layer.lora_B)]
    assert not layer.lora_A.requires_grad


# What drives the optimiser, and what follows the model.

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
    "cosine": lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 3, 20),
    "constant": lambda optimizer: transformers.get_constant_schedule_with_warmup(optimizer, 10),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_schedule_drives_the_groups_on(operation: str, schedule: str) -> None:
    driven = []
    for operate in (False, True):
        rig = Rig("adamw", "pair")
        scheduler = SCHEDULES[schedule](rig.optimizer)
        settings = []
        for step in range(8):
            rig.step()
            scheduler.step(*([1.0] if schedule == "plateau" else []))
            if operate and step == 3:
                OPERATIONS[operation](rig.layer, rig.optimizer)
            settings.append([(group["lr"], group["betas"]) for group in rig.optimizer.param_groups])
        driven.append(settings)
    assert driven[0] == driven[1]
    assert driven[0][3] != driven[0][-1]


def test_names_of_parameters_stay_beside_them() -> None:
    rig = trained("adamw")
    rig.optimizer = torch.optim.AdamW([(name, each) for name, each in rig.named_parameters()])
    names = list(rig.optimizer.param_groups[0]["param_names"])
    OPERATIONS["keep"](rig.layer, rig.optimizer)
    group = rig.optimizer.param_groups[0]
    assert group["param_names"] == names
    assert [id(each) for each in group["params"]] == [id(each) for each in rig.parameters()]


def ema(layer: AnyLayer) -> AveragedModel:
    assert isinstance(layer, nn.Module)
    return AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.8))


@pytest.mark.parametrize(("form", "operation"), FORM_AND_OPERATION)
def test_an_average_is_that_of_the_changed_values_and_goes_on(form: str, operation: str) -> None:
    rig = trained("adamw", form, dtype=torch.float64)
    average, history = ema(rig.layer), []
    for _ in range(4):
        rig.step()
        average.update_parameters(rig.layer)
        history.append(copy.deepcopy(rig.layer))
    OPERATIONS[operation](rig.layer, rig.optimizer, averages=[average.module])
    for earlier in history:  # the same change of each value that was averaged
        if operation == "rebase":
            last = history[-1]
            to_A = rig.layer.lora_A.detach() @ torch.linalg.pinv(last.lora_A.detach())
            to_B = torch.linalg.pinv(last.lora_B.detach()) @ rig.layer.lora_B.detach()
            if earlier is not last:
                earlier.replace_factors(to_A @ earlier.lora_A.detach(), earlier.lora_B.detach() @ to_B)
        elif operation == "grow":
            new = torch.tensor(live_slots(rig.layer)[RANK:])
            values = {}
            for key, each in factors(earlier).items():
                entries = factors(rig.layer)[key].detach().index_select(AXES[key], new)
                old = each.detach()
                values[key] = (
                    old.index_copy(AXES[key], new, entries) if form == "slots" else torch.cat([old, entries], AXES[key])
                )
            if form == "slots":
                for key, value in values.items():
                    factors(earlier)[key].data = value
            else:
                earlier.replace_factors(**values)
        else:
            keep(earlier, [2, 0] if operation == "keep" else [])
    if operation == "rebase":
        history[-1] = copy.deepcopy(rig.layer)
    rig.step()
    average.update_parameters(rig.layer)
    history.append(copy.deepcopy(rig.layer))
    for key, found in factors(average.module).items():
        expected = factors(history[0])[key].detach()
        for later in history[1:]:
            expected = 0.8 * expected + 0.2 * factors(later)[key].detach()
        assert found.shape == factors(rig.layer)[key].shape
        torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-12)
    if form == "slots":
        assert torch.equal(average.module.mask, rig.layer.mask)
        assert average.module.slots() == rig.layer.slots()


@pytest.mark.parametrize(("form", "operation"), FORM_AND_OPERATION)
def test_an_average_may_lie_on_another_device(form: str, operation: str) -> None:
    rig = trained("adamw", form)
    average = copy.deepcopy(rig.layer).to("meta")
    OPERATIONS[operation](rig.layer, rig.optimizer, averages=[average])
    for key, each in factors(average).items():
        assert each.shape == factors(rig.layer)[key].shape
        assert each.device.type == "meta"


@pytest.mark.parametrize(("form", "operation"), FORM_AND_OPERATION)
def test_an_average_of_other_shapes_is_refused_before_anything_changes(form: str, operation: str) -> None:
    rig = trained("adamw", form)
    before, other = dict(factors(rig.layer)), update("triplets" if form == "slots" else form, rank=2)
    values = {key: each.detach().clone() for key, each in before.items()}
    with pytest.raises(ValueError, match="averages must have the factors of the layer"):
        OPERATIONS[operation](rig.layer, rig.optimizer, averages=[other])
    assert rig.layer.rank == RANK
    for key, each in factors(rig.layer).items():
        assert each is before[key]
        assert torch.equal(each, values[key])


# One step: accumulated, scaled, in mixed precision.


@pytest.mark.parametrize(("form", "operation"), FORM_AND_OPERATION)
def test_between_micro_batches_the_gradient_is_carried(form: str, operation: str) -> None:
    rig = trained("adamw", form, dtype=torch.float64)
    rig.optimizer.zero_grad()
    rig.loss().backward()
    first = {key: each.grad.clone() for key, each in factors(rig.layer).items() if each.grad is not None}
    slots = live_slots(rig.layer)
    before = {key: each.detach().clone() for key, each in factors(rig.layer).items()}
    OPERATIONS[operation](rig.layer, rig.optimizer)
    new = factors(rig.layer)
    if operation == "rebase":
        to_A = new["lora_A"].detach() @ torch.linalg.pinv(before["lora_A"])
        to_B = torch.linalg.pinv(before["lora_B"]) @ new["lora_B"].detach()
        expected = {"lora_A": to_B.T @ first["lora_A"], "lora_B": first["lora_B"] @ to_A.T}
        for key, each in new.items():
            torch.testing.assert_close(each.grad, expected[key])
        return
    stay = torch.tensor(
        [slots[each] for each in {"keep": [2, 0], "keep_none": [], "grow": range(RANK)}[operation]], dtype=torch.long
    )
    places = stay if form == "slots" else torch.arange(len(stay))
    for key, each in new.items():
        assert each.grad is not None
        assert torch.equal(each.grad.index_select(AXES[key], places), first[key].index_select(AXES[key], stay))
        if operation == "grow":
            later = torch.tensor(live_slots(rig.layer)[RANK:])
            assert each.grad.index_select(AXES[key], later).count_nonzero() == 0
    rig.loss().backward()
    rig.optimizer.step()


def test_a_step_accumulated_over_a_re_basing_is_that_of_the_re_based_factors() -> None:
    rig = trained("adamw", dtype=torch.float64)
    mix = torch.eye(RANK, dtype=torch.float64) + 0.3 * torch.randn(RANK, RANK, dtype=torch.float64)

    def backward() -> None:  # linear in the update: its gradient does not depend on the factors' basis
        (rig() * rig.target).sum().backward()

    rig.optimizer.zero_grad()
    backward()
    rebase(rig.layer, mix @ rig.layer.lora_A.detach(), rig.layer.lora_B.detach() @ mix.inverse(), rig.optimizer)
    carried = {key: each.grad.clone() for key, each in factors(rig.layer).items() if each.grad is not None}
    rig.layer.zero_grad()
    backward()
    for key, each in factors(rig.layer).items():
        torch.testing.assert_close(carried[key], each.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd_nesterov", "bnb_adamw8bit"])
@pytest.mark.parametrize(("form", "operation"), FORM_AND_OPERATION)
def test_a_gradient_scaler_goes_on_under_autocast(form: str, operation: str, name: str, dtype: torch.dtype) -> None:
    rig = Rig(name, form)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def step(*, overflow: bool = False) -> float:
        rig.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = rig.loss()
        scaler.scale(loss).backward()
        if overflow:
            rig.layer.lora_B.grad.fill_(float("inf"))
        scaler.unscale_(rig.optimizer)
        torch.nn.utils.clip_grad_norm_(rig.parameters(), 10.0)
        scaler.step(rig.optimizer)
        scaler.update()
        return loss.item()

    losses = [step() for _ in range(2)]
    assert scaler.get_scale() == 16.0
    OPERATIONS[operation](rig.layer, rig.optimizer)
    before = [each.detach().clone() for each in factors(rig.layer).values()]
    if rig.layer.rank:
        step(overflow=True)
        assert scaler.get_scale() == 8.0
        assert all(torch.equal(old, new) for old, new in zip(before, factors(rig.layer).values(), strict=True))
    losses += [step() for _ in range(4)]
    assert losses[-1] < losses[2]
    assert all(each.dtype == torch.float32 for each in factors(rig.layer).values())


# Refusals.


class Shampoo(Optimizer):
    """Keeps statistics of a kind that surgery does not know."""

    def __init__(self, params: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(params, {"lr": RATE})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401 - not used
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    self.state[each]["preconditioners"] = [each.grad @ each.grad.T, each.grad.T @ each.grad]


class Galore(torch.optim.AdamW):
    """Keeps moments of projected gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401 - not used
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each]["exp_avg"] = torch.zeros(2, *each.shape[1:])


class MyAdam(Optimizer):
    """An optimiser that nobody knows, with moments under the usual names."""

    def __init__(self, params: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(params, {"lr": RATE})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401 - not used
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    self.state[each].setdefault("exp_avg", torch.zeros_like(each)).lerp_(each.grad, 0.1)


class Codes(Tensor):
    """Moments in a class of their own."""


def refused(rig: Rig, operation: str, words: str) -> None:
    before = dict(factors(rig.layer))
    values = {key: each.detach().clone() for key, each in before.items()}
    held = [[id(each) for each in group["params"]] for group in rig.optimizer.param_groups]
    keys = {key: dict(value) for key, value in rig.optimizer.state.items()}
    with pytest.raises(ValueError, match=words):
        OPERATIONS[operation](rig.layer, rig.optimizer)
    for key, each in factors(rig.layer).items():
        assert each is before[key]
        assert torch.equal(each, values[key])
    assert [[id(each) for each in group["params"]] for group in rig.optimizer.param_groups] == held
    assert {key: dict(value) for key, value in rig.optimizer.state.items()} == keys


@pytest.mark.parametrize("stepped", [False, True], ids=["before_its_first_step", "after_it"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("build", "early", "late"),
    [
        (torch.optim.LBFGS, r"in its groups alone, got LBFGS, which has them in \['_params'\]", None),
        (Shampoo, "before its first step, got Shampoo", r"got \['preconditioners'\] in Shampoo"),
        (torch.optim.Adagrad, r"got \['sum'\] in Adagrad", r"got \['sum'\] in Adagrad"),
        (torch.optim.RMSprop, "before its first step, got RMSprop", r"got \['square_avg'\] in RMSprop"),
        (torch.optim.ASGD, "before its first step, got ASGD", r"got \['ax'\] in ASGD"),
        (torch.optim.Rprop, "before its first step, got Rprop", r"got \['prev', 'step_size'\] in Rprop"),
        (bnb.optim.AdEMAMix8bit, r"must be one of \['adam', 'lion', 'momentum'\] .* got ademamix", None),
        (bnb.optim.Adagrad8bit, r"must be one of \['adam', 'lion', 'momentum'\] .* got adagrad", None),
    ],
    ids=["lbfgs", "shampoo", "adagrad", "rmsprop", "asgd", "rprop", "ademamix", "adagrad8bit"],
)
def test_an_optimiser_that_is_not_known_is_refused_before_anything_changes(
    build: Callable[[Any], Optimizer], early: str, late: str | None, operation: str, stepped: bool
) -> None:
    rig = Rig("adamw", "pair")
    rig.optimizer = build(list(rig.parameters()))
    if stepped:
        rig.loss().backward()
        closure: Any = (lambda: rig.loss()) if isinstance(rig.optimizer, torch.optim.LBFGS) else None
        rig.optimizer.step(closure)
    refused(rig, operation, late if stepped and late else early)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_moments_of_another_shape_or_class_are_refused(operation: str) -> None:
    rig = Rig("adamw", "pair")
    rig.optimizer = Galore(list(rig.parameters()))
    rig.step()
    refused(rig, operation, r"got \['exp_avg'\] in Galore")
    rig = trained("adamw")
    state = rig.optimizer.state[rig.layer.lora_B]
    state["exp_avg_sq"] = state["exp_avg_sq"].as_subclass(Codes)
    refused(rig, operation, r"got \['exp_avg_sq'\] in AdamW")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_optimiser_with_known_moments_is_served_once_they_are_seen(operation: str) -> None:
    rig = Rig("adamw", "pair")
    rig.optimizer = MyAdam(list(rig.parameters()))
    refused(rig, operation, "before its first step, got MyAdam. Take a step")
    rig.step()
    OPERATIONS[operation](rig.layer, rig.optimizer)
    assert rig.optimizer.state[rig.layer.lora_A]["exp_avg"].shape == rig.layer.lora_A.shape


def test_a_wrapper_is_seen_through() -> None:
    rig = trained("bnb_adamw8bit")

    class Wrapper(Optimizer):  # as accelerate's
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    keep(rig.layer, [2, 0], Wrapper(rig.optimizer))
    assert rig.optimizer.param_groups[2]["params"][0] is rig.layer.lora_B
    assert rig.optimizer.state[rig.layer.lora_B]["state1"].shape == (M, 2)
