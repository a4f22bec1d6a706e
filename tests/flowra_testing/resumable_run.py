"""A tiny run in plain PyTorch that can be saved after any step, without pickle, and gone on with in another process.

Dropout, gradient accumulation and a learning-rate schedule take part. Each case is one policy and one form of update.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowra_adapters import adapters, attach
from flowra_allocation import (
    AdaLoRA,
    Breathe,
    FlexLoRA,
    FlexLoRACompat,
    FlexLoRASchedule,
    Policy,
    RefinementSchedule,
    Refiner,
    Shrink,
    optimizer_tensors,
    restore_optimizer,
)
from flowra_testing.tiny_models import mlp, seeded

STEPS = 14
SCHEDULE = RefinementSchedule(start=2, freeze=12, events=4, observe=2)  # events at 4, 7, 9 and 12
FLEXIBLE = FlexLoRASchedule(total_steps=STEPS, warmup=2, final=1, interval=3, b0=1, decay="constant")
RANKS = {"up": 3, "down": 2, "skip": 2}


@dataclass(frozen=True)
class Case:
    """What is refined, and how."""

    method: str
    policy: Callable[[], Policy]
    spare: int = 0
    averaged: bool = False
    """Whether a running average of the model goes along."""
    one_cycle: bool = False
    """Whether the schedule moves rate and momentum, up and down."""


CASES: Mapping[str, Case] = {
    "breathe of pairs": Case("lora", lambda: Breathe(schedule=SCHEDULE, share=0.2)),
    "breathe of pairs with an average": Case("lora", lambda: Breathe(schedule=SCHEDULE, share=0.2), averaged=True),
    "breathe of pairs in one cycle": Case("lora", lambda: Breathe(schedule=SCHEDULE, share=0.2), one_cycle=True),
    "breathe of triplets": Case("svd", lambda: Breathe(schedule=SCHEDULE, share=0.4)),
    "breathe of slots": Case("svd_masked", lambda: Breathe(schedule=SCHEDULE, share=0.4)),
    "shrink of pairs by flow": Case("lora", lambda: Shrink(schedule=SCHEDULE, measure="flow", kappa=2.0)),
    "shrink of pairs by magnitude": Case("lora", lambda: Shrink(schedule=SCHEDULE, measure="magnitude", kappa=2.0)),
    "shrink of slots by flow": Case("svd_masked", lambda: Shrink(schedule=SCHEDULE, measure="flow", kappa=2.0)),
    "adalora of triplets": Case("svd", lambda: AdaLoRA(total_steps=14, tinit=2, tfinal=2, delta_t=3, kappa=2.0)),
    "adalora of slots": Case("svd_masked", lambda: AdaLoRA(total_steps=14, tinit=2, tfinal=2, delta_t=3, kappa=2.0)),
    "flexlora of triplets": Case("svd", lambda: FlexLoRA(schedule=FLEXIBLE), spare=60),
    "flexlora of slots by sensitivity": Case(
        "svd_masked", lambda: FlexLoRA(schedule=FLEXIBLE, metric="sensitivity"), spare=60
    ),
    "flexlora as published": Case("svd", lambda: FlexLoRACompat(schedule=FLEXIBLE), spare=60),
}


class ResumableRun:
    """One run of a case from step 0; :meth:`restore` puts it elsewhere.

    Args:
        name: of the case.
        process: which of several processes this is. Each has data and dropout of its own, gradients are averaged.
    """

    def __init__(self, name: str, process: int = 0) -> None:
        case = CASES[name]
        self.process, self.one_cycle = process, case.one_cycle
        self.model = mlp()
        self.layers: Mapping[str, Any] = attach(
            self.model, RANKS, method=case.method, dropout=0.2, modules_to_save=["head"]
        )
        self.model.train()
        costs = {each: layer.cost_per_rank for each, layer in self.layers.items()}
        used = sum(costs[each] * rank for each, rank in RANKS.items())
        policy = case.policy()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if case.averaged else None
        self.refiner = Refiner(
            self.model,
            self.layers,
            policy=policy,
            costs=costs,
            caps=dict.fromkeys(RANKS, 5),
            budget=int(used / policy.peak) + 1 + case.spare,
            averages=[adapters(self.average.module)] if self.average else [],
            seed=3,
        )
        self.build_optimizer()
        self.finished = 0
        torch.manual_seed(7 + process)  # of dropout

    def build_optimizer(self) -> None:
        """Make optimiser and schedule for the parameters that are there now."""
        head = list(self.model.head.parameters())
        rest = [each for each in self.model.parameters() if each.requires_grad and all(each is not it for it in head)]
        self.optimizer = torch.optim.AdamW([{"params": rest, "lr": 0.02}, {"params": head}], lr=0.01)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler = (
            torch.optim.lr_scheduler.OneCycleLR(self.optimizer, [0.02, 0.01], total_steps=STEPS)
            if self.one_cycle
            else torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.7)  # each step follows from the last
        )

    def step(self) -> None:
        """Train on two batches."""
        self.refiner.before_step(self.finished)
        for part in range(2):
            with seeded(1000 * self.process + 2 * self.finished + part):
                x, target = torch.randn(8, 8), torch.randn(8, 3)
            ((self.model(x) - target).square().mean() / 2).backward()
        if dist.is_initialized():
            for each in self.model.parameters():
                if each.grad is not None:
                    dist.all_reduce(each.grad.div_(dist.get_world_size()))
        self.optimizer.step()
        self.scheduler.step()
        self.refiner.before_zero_grad()
        self.optimizer.zero_grad()
        self.finished += 1
        if self.average:
            self.average.update_parameters(self.model)
        self.refiner.after_step(self.finished, self.optimizer)

    def save(self, folder: Path, refinement: Path | None = None) -> None:
        """Write model, optimiser, schedule, generator and refinement, which several processes have in common."""
        folder.mkdir(parents=True, exist_ok=True)
        self.refiner.save(refinement or folder)
        tensors = {f"optimizer/{name}": each for name, each in optimizer_tensors(self.model, self.optimizer).items()}
        tensors |= {f"model/{name}": each for name, each in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"average/{name}": each for name, each in self.average.state_dict().items()}
        save_file(tensors | {"rng": torch.get_rng_state()}, folder / "training.safetensors")
        (folder / "schedule.json").write_text(json.dumps(self.scheduler.state_dict()))

    def restore(self, folder: Path, refinement: Path | None = None) -> None:
        """Take up what was written."""
        self.finished = self.refiner.restore(refinement or folder)
        tensors = load_file(folder / "training.safetensors")
        self.model.load_state_dict(_part(tensors, "model/"))
        if self.average:
            self.average.load_state_dict(_part(tensors, "average/"))
        self.build_optimizer()
        restore_optimizer(self.model, self.optimizer, _part(tensors, "optimizer/"))
        self.scheduler.load_state_dict(json.loads((folder / "schedule.json").read_text()))
        torch.set_rng_state(tensors["rng"])

    def finish(self) -> None:
        """Train to the end."""
        while self.finished < STEPS:
            self.step()
        self.refiner.finish()

    def fingerprint(self) -> dict[str, Any]:
        """Return hashes of all tensors, the optimiser's included, and the history."""
        tensors = {**self.model.state_dict(), **optimizer_tensors(self.model, self.optimizer)}
        if self.average:
            tensors |= {f"average/{name}": each for name, each in self.average.state_dict().items()}
        return {
            "tensors": {name: digest(each) for name, each in tensors.items()},
            "rng": digest(torch.get_rng_state()),
            "events": json.loads(json.dumps(self.refiner.history.as_json()["events"])),
            "peak": self.refiner.history.peak,
        }


def digest(tensor: Tensor) -> str:
    """Return shape, dtype and a hash of the bytes."""
    values = tensor.detach().cpu().contiguous()
    data = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return f"{tuple(values.shape)} {values.dtype} {data[:16]}"


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
