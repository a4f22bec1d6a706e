"""What moving rank costs: events, allocation, the step afterwards, and whole runs beside AdaLoRA and LoRA.

python benchmarks/bench_refinement.py [--rounds N] [--steps N] [--memory]

Every linear layer of all-MiniLM-L6-v2 carries adapters, 32 × 64 tokens, AdamW, `model.train()`. "Events" is the share
of the time of a run that its refinement events take, statistics gathered before them apart (those are in the runs'
times). "Whole run" is T steps with the policy's events: ours beside PEFT's AdaLoRA at the same start and end, and
PEFT's LoRA; their steps are interleaved in one process, and a figure is the ratio of sums. The two AdaLoRAs start at
twice the final rank and have the same penalty; FlexLoRA keeps its sum of ranks, by its formula. Floating point
operations are those of one step at the end; evaluation is a forward pass at the end, without gradient; memory is the
peak of a fresh process. As FlexLoRA's appendix E does it, on our machine.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import bench_step
import peft
import torch
from _results import Row, write
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from flowra_adapters import attach, orthogonality
from flowra_allocation import (
    AdaLoRA,
    Breathe,
    FlexLoRA,
    FlexLoRASchedule,
    Policy,
    RefinementSchedule,
    Refiner,
    Shrink,
    allocate,
)

RANK = 2
SCALING = 2.0
ORTHOGONALITY = 0.1
Step = Callable[[], None]


class Training:
    """A model, its optimiser, and what happens around a step."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens, self.done = model.train(), tokens, 0
        self.optimizer: Optimizer = AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)

    def loss(self) -> Tensor:
        """Of a made-up regression on the hidden states."""
        output: Tensor = self.model(input_ids=self.tokens).last_hidden_state
        return output.square().mean()

    def before(self) -> None:
        """Do nothing."""

    def between(self) -> None:
        """Do nothing."""

    def after(self) -> None:
        """Do nothing."""

    def step(self) -> None:
        """Train one step."""
        self.before()
        self.loss().backward()
        self.optimizer.step()
        self.between()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.after()

    @torch.inference_mode()
    def evaluate(self) -> None:
        """Run forward once."""
        self.model.eval()
        self.model(input_ids=self.tokens)
        self.model.train()


class Refined(Training):
    """Adapters of flowra-adapters whose rank a policy moves."""

    def __init__(
        self, rank: int, budget: Callable[[int], int], policy: Policy, *, method: str = "lora", penalty: float = 0.0
    ) -> None:
        model, tokens, names = bench_step.minilm()
        self.penalty = penalty
        made = attach(model, dict.fromkeys(names, rank), method=method, scaling=SCALING)
        self.layers: dict[str, Any] = dict(made)
        super().__init__(model, tokens)
        costs = {name: layer.cost_per_rank for name, layer in self.layers.items()}
        self.refiner = Refiner(
            model,
            self.layers,
            policy=policy,
            costs=costs,
            caps=dict.fromkeys(costs, 4 * rank),
            budget=budget(sum(costs.values())),
        )

    def loss(self) -> Tensor:
        """Add the orthogonality penalty, where there is one."""
        loss = super().loss()
        return loss + self.penalty * orthogonality(self.layers.values()) if self.penalty else loss

    def before(self) -> None:
        """Watch if an event is near."""
        self.refiner.before_step(self.done)

    def between(self) -> None:
        """Show the gradients."""
        self.refiner.before_zero_grad()

    def after(self) -> None:
        """Hold an event if one is due."""
        self.refiner.after_step(self.done, self.optimizer)


class PeftAdaLoRA(Training):
    """AdaLoRA of PEFT from twice the target rank."""

    def __init__(self, steps: int) -> None:
        model, tokens, names = bench_step.minilm()
        config = peft.AdaLoraConfig(
            init_r=2 * RANK,
            target_r=RANK,
            tinit=steps // 10,
            tfinal=3 * steps // 10,
            deltaT=max(1, steps // 30),
            total_step=steps,
            orth_reg_weight=ORTHOGONALITY,
            target_modules=names,
        )
        super().__init__(peft.get_peft_model(model, config), tokens)

    def loss(self) -> Tensor:
        """Add the orthogonality penalty, as PEFT does where the model returns a loss."""
        penalty = sum(
            (
                torch.linalg.matrix_norm(product - torch.eye(len(product)))
                for name, each in self.model.named_parameters()
                if "lora_A" in name or "lora_B" in name
                for product in [each @ each.T if "lora_A" in name else each.T @ each]
            ),
            torch.zeros(()),
        )
        return super().loss() + ORTHOGONALITY * penalty / 72

    def between(self) -> None:
        """Sensitivities and masks."""
        self.model.base_model.update_and_allocate(self.done + 1)  # type: ignore[operator, union-attr]


class PeftLoRA(Training):
    """LoRA of PEFT at the final rank."""

    def __init__(self) -> None:
        model, tokens, names = bench_step.minilm()
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
        super().__init__(peft.get_peft_model(model, config), tokens)


def schedule(steps: int) -> RefinementSchedule:
    """Events every T/30 between 0.1 T and 0.7 T: eighteen of them (docs/methods.md, section 7)."""
    return RefinementSchedule(start=steps // 10, freeze=7 * steps // 10, events=18, observe=4)


def made(name: str, steps: int) -> Training:
    """Build one of the runs."""
    match name:
        case "shrink":
            return Refined(
                2 * RANK, lambda unit: RANK * unit, Shrink(schedule=schedule(steps), measure="flow", kappa=2.0)
            )
        case "shrink by magnitude":
            policy = Shrink(schedule=schedule(steps), measure="magnitude", kappa=2.0)
            return Refined(2 * RANK, lambda unit: RANK * unit, policy)
        case "breathe":
            return Refined(RANK, lambda unit: RANK * unit, Breathe(schedule=schedule(steps)))
        case "adalora":
            fall = AdaLoRA(
                total_steps=steps, tinit=steps // 10, tfinal=3 * steps // 10, delta_t=max(1, steps // 30), kappa=2.0
            )
            return Refined(2 * RANK, lambda unit: RANK * unit, fall, method="svd", penalty=ORTHOGONALITY)
        case "flexlora":
            exchange = FlexLoRASchedule(
                total_steps=steps, warmup=steps // 10, final=3 * steps // 10, interval=max(1, steps // 30), b0=4
            )
            flexlora = FlexLoRA(schedule=exchange, budget="params")
            return Refined(RANK, lambda unit: RANK * unit, flexlora, method="svd", penalty=ORTHOGONALITY)
        case "adalora of PEFT":
            return PeftAdaLoRA(steps)
        case _:
            return PeftLoRA()


OURS = ("shrink", "shrink by magnitude", "breathe", "adalora", "flexlora")
PEERS = ("adalora of PEFT", "lora of PEFT")


def runs(steps: int) -> list[Row]:
    """Train all of them, step by step in turn, and compare what they took."""
    trainings = {name: made(name, steps) for name in (*OURS, *PEERS)}
    seconds = dict.fromkeys(trainings, 0.0)
    order = list(trainings)
    for _ in range(steps):
        order = order[1:] + order[:1]
        for name in order:
            began = time.perf_counter()
            trainings[name].step()
            seconds[name] += time.perf_counter() - began
    print("  " + ", ".join(f"{name} {each:.0f} s" for name, each in seconds.items()), flush=True)
    rows = []
    peer = seconds["adalora of PEFT"]
    for name in OURS:
        training = trainings[name]
        assert isinstance(training, Refined)
        share = training.refiner.finish().seconds / seconds[name]
        rows.append(
            Row(what=f"{name}: share of a run's time in its events", ours=_round(share), limit=0.01, sense="<=")
        )
        what = f"{name}: time of a whole run, ratio to PEFT's AdaLoRA (peer: PEFT's LoRA)"
        lora = _round(seconds["lora of PEFT"] / peer)
        rows.append(Row(what=what, ours=_round(seconds[name] / peer), peer=lora, limit=1.0, sense="<="))
    flops = {name: operations(training) for name, training in trainings.items()}
    evaluation = evaluation_times(trainings)
    for name in OURS:
        for what, figures in (("floating point operations of a step at the end", flops), ("evaluation", evaluation)):
            peer, lora = figures["adalora of PEFT"], figures["lora of PEFT"]
            rows.append(
                Row(
                    what=f"{name}: {what}, ratio to PEFT's AdaLoRA (peer: PEFT's LoRA)",
                    ours=_round(figures[name] / peer),
                    peer=_round(lora / peer),
                    limit=1.0,
                    sense="<=",
                )
            )
    return rows


def operations(training: Training) -> float:
    """Count the multiplications and additions of one step."""
    with FlopCounterMode(display=False) as counter:
        training.loss().backward()
    training.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def evaluation_times(trainings: Mapping[str, Training], *, rounds: int = 30) -> dict[str, float]:
    """Return the median time of a forward pass, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            began = time.perf_counter()
            training.evaluate()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


def memory(name: str, steps: int) -> float:
    """Return the peak resident memory in MB of a fresh process that makes a run."""
    command = [sys.executable, __file__, "--child", json.dumps([name, steps])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memories() -> list[Row]:
    """Compare peaks."""
    peaks = {name: memory(name, 30) for name in (*OURS, *PEERS)}
    print("  peak MB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items()), flush=True)
    peer, lora = peaks["adalora of PEFT"], _round(peaks["lora of PEFT"] / peaks["adalora of PEFT"])
    return [
        Row(
            what=f"{name}: peak memory of a fresh process, ratio to PEFT's AdaLoRA (peer: PEFT's LoRA)",
            ours=_round(peaks[name] / peer),
            peer=lora,
            limit=1.0,
            sense="<=",
        )
        for name in OURS
    ]


def after_shrinking(*, rounds: int) -> Row:
    """Compare the step of a shrunken model with that of a model created at its ranks."""
    shrunken = made("shrink by magnitude", 100)
    assert isinstance(shrunken, Refined)
    for _ in range(71):
        shrunken.step()
    model, tokens, _ = bench_step.minilm()
    attach(model, {name: layer.rank for name, layer in shrunken.layers.items() if layer.rank}, scaling=SCALING)
    trainings = {"shrunken": shrunken, "created": Training(model, tokens)}
    ratios = []
    for turn in range(rounds):
        seconds = {}
        gc.collect()
        for name in trainings if turn % 2 else reversed(trainings):
            began = time.perf_counter()
            trainings[name].step()
            seconds[name] = time.perf_counter() - began
        ratios.append(seconds["shrunken"] / seconds["created"])
    what = "step after shrinking, ratio to a model created at those ranks"
    return Row(what=what, ours=_round(statistics.median(ratios)), limit=1.03, sense="<=")


def allocation() -> Row:
    """Plan the ranks of a 70 B model: 80 layers of seven linear maps, grouped keys and values, cap 128."""
    hidden, inner, kept = 8192, 28672, 1024
    shapes = {"q": (hidden, hidden), "k": (kept, hidden), "v": (kept, hidden), "o": (hidden, hidden),
              "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    gains, costs = {}, {}
    for layer in range(80):
        for name, (m, n) in shapes.items():
            values = torch.rand(128, generator=generator).double().sort(descending=True).values
            gains[f"layers.{layer}.{name}"], costs[f"layers.{layer}.{name}"] = values.tolist(), m + n
    budget = 16 * sum(costs.values())
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        allocate(gains, costs, budget=budget)
        taken.append(time.perf_counter() - began)
    what = "allocate on the shapes of a 70 B model, 560 modules, cap 128: seconds, best of five"
    return Row(what=what, ours=_round(min(taken)), limit=1.0, sense="<=")


def _round(value: float) -> float:
    return round(value, 4)


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--memory", action="store_true", help="measure the peaks again; the other figures stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, steps = json.loads(arguments.child)
        training = made(name, steps)
        for _ in range(steps):
            training.step()
        print(bench_step.peak_resident())
        return
    command = f"python benchmarks/bench_refinement.py --steps {arguments.steps}"
    if arguments.memory:
        print(write("refinement", memories(), command=f"{command} --memory", part=True))
        return
    rows = [allocation(), *runs(arguments.steps), after_shrinking(rounds=arguments.rounds), *memories()]
    print(write("refinement", rows, command=command))


if __name__ == "__main__":
    main()
