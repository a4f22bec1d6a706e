"""``torch.compile`` with slots: events and watching compile nothing anew, and the run is the eager one."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowra_adapters import MaskedSVDForm, compact, merge
from flowra_allocation import RankHistory, hand_over
from flowra_testing.refining_child import FROZEN, POLICIES, SCHEDULE, adapted, batches, refiner_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile's own


@pytest.fixture(autouse=True)
def runs_given_up_elsewhere_are_gone() -> None:
    gc.collect()


class Compilations:
    """A back end that runs what it is given, and counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


class Run:
    """One run to the end; ``compiled`` is how the model is compiled."""

    def __init__(self, policy: str, compiled: str, *, compacted: bool = False) -> None:
        torch._dynamo.reset()
        self.network, self.layers = adapted()
        self.compilations = Compilations()
        self.counts: list[int] = []
        self.losses: list[float] = []
        called = self.compile(compiled)
        optimizer = torch.optim.AdamW([each for each in self.network.parameters() if each.requires_grad], lr=0.02)
        refiner = refiner_of(self.network, self.layers, POLICIES[policy]())
        for step, (x, target) in enumerate(batches()):
            refiner.before_step(step)
            optimizer.zero_grad()
            loss = (called(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            refiner.before_zero_grad()
            refiner.after_step(step + 1, optimizer)
            self.losses.append(loss.item())
            self.counts.append(self.compilations.count)
            if compacted and step + 1 == FROZEN:
                for old, new in compact(self.network).values():
                    hand_over(optimizer, old, new)
                called = self.compile(compiled)
        self.history: RankHistory = refiner.finish()

    def compile(self, compiled: str) -> nn.Module:
        if compiled == "wrapped":
            wrapper = torch.compile(self.network, backend=self.compilations, fullgraph=True)
            assert isinstance(wrapper, nn.Module)
            return wrapper
        if compiled == "in place":
            self.network.compile(backend=self.compilations, fullgraph=True)
        return self.network


def events(run: Run) -> list[Mapping[str, int]]:
    return [event.ranks for event in run.history.events]


@pytest.mark.parametrize(
    ("policy", "compiled"),
    [
        ("breathe", "in place"),
        *(pytest.param(each, "wrapped", marks=[] if each == "breathe" else pytest.mark.slow) for each in POLICIES),
    ],
)
def test_a_run_is_compiled_once_and_is_the_eager_run(policy: str, compiled: str) -> None:
    eager, run = Run(policy, "not"), Run(policy, compiled)
    assert run.counts[-1] == 1
    assert events(run) == events(eager)
    torch.testing.assert_close(run.losses, eager.losses, rtol=1e-6, atol=0)  # sketches are float32
    for name, layer in run.layers.items():
        torch.testing.assert_close(layer.delta_weight(), eager.layers[name].delta_weight(), rtol=0, atol=1e-6)


def test_compacted_and_compiled_again_a_run_goes_on_as_it_would_have() -> None:
    eager, run = Run("adalora", "not"), Run("adalora", "wrapped", compacted=True)
    assert run.counts[FROZEN - 1 :] == [1, 2, 2, 2]
    assert not any(isinstance(each, MaskedSVDForm) for each in run.network.modules())
    torch.testing.assert_close(run.losses, eager.losses, rtol=1e-9, atol=0)
    for each in (eager, run):
        merge(each.network)
    for name in ("up", "down", "skip"):
        weights = (each.network.get_submodule(name).weight for each in (run, eager))
        torch.testing.assert_close(*weights, rtol=0, atol=1e-12)


def test_runs_given_up_while_they_watched_leave_the_compiler_on() -> None:
    compilations = Compilations()
    compiled = torch.compile(nn.Linear(2, 2), backend=compilations)
    watched = [adapted() for _ in range(2)]
    for network, layers in watched:
        refiner_of(network, layers, POLICIES["breathe"]()).before_step(SCHEDULE.steps[0] - 1)
    del network, layers
    while watched:
        compiled(torch.ones(1, 2))
        assert compilations.count == 0
        watched.pop()
        gc.collect()
    compiled(torch.ones(1, 2))
    assert compilations.count == 1
