"""A whole refinement in every setting that a training loop brings: the run is the one of the plain loop."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from flowra_allocation import RankHistory
from flowra_testing.refining_child import POLICIES, STEPS, Network, adapted, batches, refiner_of

METHODS = {"breathe": ("lora", "svd", "svd_masked"), "shrink": ("lora", "svd", "svd_masked")}
RUNS = [(policy, method) for policy in POLICIES for method in METHODS.get(policy, ("svd", "svd_masked"))]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step is made; a plain loop has one batch, the network as it is, and no scale."""

    parts: int = 1
    called: Callable[[Network], Callable[[Tensor], Tensor]] = lambda network: network
    scale: float | None = None
    autocast: bool = False
    inputs_require_grad: bool = False


def checkpointed(network: Network, *, reentrant: bool) -> Callable[[Tensor], Tensor]:
    return partial(checkpoint, network, use_reentrant=reentrant)


@dataclass
class Run:
    """What a run ended with."""

    network: Network
    history: RankHistory
    losses: list[float]
    skipped: int


def run(policy: str, method: str, setting: Setting, *, overflow_at: int | None = None) -> Run:
    """Train to the end; at ``overflow_at`` the gradients of one step are infinite."""
    network, layers = adapted(method)
    optimizer = AdamW([each for each in network.parameters() if each.requires_grad], lr=0.02)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=setting.scale or 1.0, enabled=setting.scale is not None, growth_interval=10 * STEPS
    )
    refiner = refiner_of(network, layers, POLICIES[policy]())
    losses, skipped = [], 0
    for step, (x, target) in enumerate(batches()):
        refiner.before_step(step)
        optimizer.zero_grad()
        losses.append(0.0)
        for part, wanted in zip(x.chunk(setting.parts), target.chunk(setting.parts), strict=True):
            inputs = part.clone().requires_grad_(setting.inputs_require_grad)
            with torch.autocast("cpu", dtype=torch.bfloat16) if setting.autocast else nullcontext():
                output = setting.called(network)(inputs)
            loss = (output - wanted).square().mean() / setting.parts
            if step == overflow_at:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            losses[-1] += loss.item()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        refiner.before_zero_grad()
        refiner.after_step(step + 1, optimizer)
    return Run(network, refiner.finish(), losses, skipped)


def decisions(history: RankHistory) -> list[dict[str, int]]:
    return [dict(event.ranks) for event in history.events]


SAME_BITS: Mapping[str, Setting] = {
    "checkpointing": Setting(called=partial(checkpointed, reentrant=False)),
    "reentrant checkpointing": Setting(called=partial(checkpointed, reentrant=True), inputs_require_grad=True),
    "a gradient scaler": Setting(scale=2.0**10),  # a power of two is taken off again without a rounding
}


@pytest.fixture(scope="module", params=RUNS, ids=" ".join)
def plain(request: pytest.FixtureRequest) -> tuple[tuple[str, str], Run]:
    return request.param, run(*request.param, Setting())


@pytest.mark.parametrize("name", SAME_BITS)
def test_a_run_ends_with_the_bits_of_the_plain_run(name: str, plain: tuple[tuple[str, str], Run]) -> None:
    case, expected = plain
    found = run(*case, SAME_BITS[name])
    assert decisions(found.history) == decisions(expected.history)
    assert any(event.dropped or event.admitted for event in found.history.events)
    tensors = expected.network.state_dict()
    assert tensors.keys() == found.network.state_dict().keys()
    for key, value in found.network.state_dict().items():
        assert torch.equal(value, tensors[key]), key


def test_accumulated_parts_make_the_decisions_of_the_whole_batch(plain: tuple[tuple[str, str], Run]) -> None:
    case, expected = plain
    found = run(*case, Setting(parts=2))
    assert decisions(found.history) == decisions(expected.history)
    assert found.losses == pytest.approx(expected.losses, rel=1e-7)  # AdamW divides what is nearly 0


def test_under_autocast_ranks_move_inside_the_budget_and_parameters_keep_their_dtype(
    plain: tuple[tuple[str, str], Run],
) -> None:
    case, expected = plain
    found = run(*case, Setting(autocast=True))
    assert [event.step for event in found.history.events] == [event.step for event in expected.history.events]
    assert found.history.peak <= expected.history.peak
    assert any(event.dropped or event.admitted for event in found.history.events)
    for name, each in found.network.named_parameters():
        assert each.dtype == torch.float64, name
        assert each.isfinite().all(), name
    assert found.losses == pytest.approx(expected.losses, rel=0.1)


@pytest.mark.parametrize("step", [1, 3], ids=["unobserved", "observed"])
def test_a_step_that_overflows_is_left_out_and_the_run_goes_on(step: int, plain: tuple[tuple[str, str], Run]) -> None:
    case, _ = plain
    found = run(*case, Setting(scale=2.0**10), overflow_at=step)
    assert found.skipped == 1
    assert all(each.isfinite().all() for each in found.network.parameters())
    assert any(event.dropped or event.admitted for event in found.history.events)
