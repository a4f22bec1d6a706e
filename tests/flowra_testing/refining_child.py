"""A tiny model that is refined in one process, or in two that train it together.

``python -m flowra_testing.refining_child FOLDER RANK`` is one of two processes: it goes through all scenarios and
writes what it ended with to ``FOLDER/<scenario>.<RANK>.safetensors`` and ``….json``, and what was refused to
``FOLDER/problems.<RANK>.json``. Tests run the same scenarios in one process, on whole batches.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from safetensors.torch import load, save, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowra_adapters import MaskedSVDForm, SVDForm, adapters, attach, compact
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
    grow,
    hand_over,
    keep,
    optimizer_tensors,
    restore_optimizer,
)
from flowra_allocation.sharding import whole

STEPS, FROZEN = 12, 9
SCHEDULE = RefinementSchedule(start=1, freeze=FROZEN, events=4, observe=2)
RANKS = {"up": 2, "down": 3, "skip": 1}
POLICIES: Mapping[str, Callable[[], Policy]] = {
    "breathe": lambda: Breathe(schedule=SCHEDULE, share=0.3),
    "shrink": lambda: Shrink(schedule=SCHEDULE, measure="flow", kappa=1.7),
    "adalora": lambda: AdaLoRA(total_steps=FROZEN + 1, tinit=1, tfinal=1, delta_t=2, kappa=1.7),
    "flexlora": lambda: FlexLoRA(
        schedule=FlexLoRASchedule(total_steps=11, warmup=1, final=1, interval=2, b0=1), metric="sensitivity"
    ),
    "flexlora-compat": lambda: FlexLoRACompat(
        schedule=FlexLoRASchedule(total_steps=11, warmup=1, final=1, interval=2, b0=1, decay="constant")
    ),
}
Parallel = Literal["alone", "ddp", "fsdp"]


class Network(nn.Module):
    """``up`` (8 → 13), ``down`` (13 → 6), ``skip`` (8 → 6), then ``head`` (6 → 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.skip = nn.Linear(8, 13), nn.Linear(13, 6), nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 8)`` to ``(N, 3)``."""
        output: Tensor = self.head(torch.tanh(self.down(torch.tanh(self.up(x))) + self.skip(x)))
        return output


def adapted(method: str = "svd_masked") -> tuple[Network, dict[str, MaskedSVDForm]]:
    """Return the model in float64 with its updates, and a head that is trained in full."""
    network = Network().double()
    made = attach(network, RANKS, method=method, modules_to_save=["head"])
    return network, cast(dict[str, MaskedSVDForm], made)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets of each step."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    for _ in range(STEPS):
        x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        yield x, torch.sin(x @ teacher)


def refiner_of(network: nn.Module, layers: Mapping[str, Any], policy: Policy) -> Refiner:
    """Return a refiner whose budget is what is there, or what the policy's peak makes of it."""
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    used = sum(costs[name] * layer.rank for name, layer in layers.items())
    budget = -int(-used // policy.peak)
    return Refiner(network, layers, policy=policy, costs=costs, caps=dict.fromkeys(costs, 6), budget=budget)


@dataclass
class Result:
    """What a run ended with."""

    tensors: dict[str, Tensor]
    """Whole tensors by name: parameters, masks, moments and the last gradients."""
    update: dict[str, Tensor]
    """What compaction must leave alone: ΔW and the moments of the directions that are there, in their order."""
    history: dict[str, Any]


def wrapped(network: nn.Module, parallel: Parallel) -> nn.Module:
    """Return what is called in training."""
    if parallel == "ddp":
        return DistributedDataParallel(network)
    if parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard  # here, since it takes seconds

        fully_shard(network.get_submodule("up"))
        return fully_shard(network)
    return network


def run(policy: str, parallel: Parallel, *, compacted: bool = False, rank: int = 0) -> Result:
    """Train; at the freeze, compact and wrap again if asked to."""
    network, layers = adapted()
    called = wrapped(network, parallel)
    optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=0.02)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    refiner = refiner_of(network, layers, POLICIES[policy]())
    for step, (x, target) in enumerate(batches()):
        mine = slice(None) if parallel == "alone" else slice(4 * rank, 4 * rank + 4)
        refiner.before_step(step)
        optimizer.zero_grad()
        (called(x[mine]) - target[mine]).square().mean().backward()
        optimizer.step()
        scheduler.step()
        refiner.before_zero_grad()
        with torch.no_grad():  # an evaluation, which leaves the root's parameters whole under fully_shard
            called(x[mine])
        refiner.after_step(step + 1, optimizer)
        if compacted and step + 1 == FROZEN:
            del called  # its hooks go with it
            network = compacted_network(network, optimizer, parallel)
            called = wrapped(network, parallel) if parallel != "fsdp" else network
    history = refiner.finish().as_json()
    del history["seconds"]
    if parallel == "fsdp":
        optimizer = restarted(network, optimizer)
    return ended(network, optimizer, history)


def restarted(network: Network, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return another optimiser that goes on from what this one would write to a file."""
    tensors = load(save(optimizer_tensors(network, optimizer)))
    again = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=0.02)
    restore_optimizer(network, again, tensors)
    for parameter, state in optimizer.state.items():
        assert all(type(again.state[parameter][key]) is type(value) for key, value in state.items())
    return again


def compacted_network(network: Network, optimizer: torch.optim.Optimizer, parallel: Parallel) -> Network:
    """Return a network without free slots, that the optimiser holds; it is sharded if the given one was."""
    if parallel != "fsdp":
        for old, new in compact(network).values():
            hand_over(optimizer, old, new)
        return network
    fresh, _ = adapted()
    fresh.load_state_dict({name: whole(each) for name, each in network.state_dict().items()})
    compact(fresh)
    wrapped(fresh, parallel)
    hand_over(optimizer, network, fresh)
    return fresh


def ended(network: Network, optimizer: torch.optim.Optimizer, history: dict[str, Any]) -> Result:
    """Gather what a run ended with."""
    if hasattr(network, "reshard"):
        network.reshard()
    tensors = {name: whole(each.detach()).clone() for name, each in network.state_dict().items()}
    moments: dict[str, Tensor] = {}
    for name, each in network.named_parameters():
        if each.requires_grad:
            assert each.grad is not None
            tensors[f"gradient/{name}"] = whole(each.grad)
            for key in ("exp_avg", "exp_avg_sq"):
                moments[f"{key}/{name}"] = whole(optimizer.state[each][key])
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert {id(each) for each in network.parameters() if each.requires_grad} <= held
    update = {}
    for site, layer in adapters(network).items():
        assert isinstance(layer, SVDForm)
        if layer.rank == 0:  # compaction takes it off
            continue
        a, e, b = layer.triplets()
        update[f"update/{site}"] = (b * e) @ a
        slots = layer.slots() if isinstance(layer, MaskedSVDForm) else list(range(layer.rank))
        for factor, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            for key in ("exp_avg", "exp_avg_sq"):
                found = moments.get(f"{key}/{site}.adapters.default.{factor}")
                if found is not None:
                    update[f"{key}/{site}.{factor}"] = found.index_select(axis, torch.tensor(slots, dtype=torch.long))
    update |= {name: tensors[name] for name in ("head.weight", "head.bias")}
    update = {name: each.detach().contiguous() for name, each in update.items()}
    return Result(tensors | moments, update, history)


def problems() -> dict[str, str]:
    """Return what is refused in two processes."""
    found = {}

    def refused(name: str, what: Callable[[], object]) -> None:
        try:
            what()
        except ValueError as error:
            found[name] = str(error)

    policy = POLICIES["breathe"]()
    pairs, layers = adapted("lora")
    refused("pairs", lambda: refiner_of(pairs, layers, policy))
    resized, others = adapted("svd")
    refused("triplets", lambda: refiner_of(DistributedDataParallel(resized), others, policy))
    for method in ("lora", "svd"):
        sharded, layers = adapted(method)
        wrapped(sharded, "fsdp")
        one = layers["down"]
        refused(f"keep-{method}", lambda one=one: keep(one, [2, 0]))
        refused(f"grow-{method}", lambda one=one: grow(one, torch.ones(1, 13, dtype=torch.float64)))
        values = {name: whole(each.detach()) for name, each in one.named_parameters()}
        refused(f"replace-{method}", lambda one=one, values=values: one.replace_factors(**values))
        refused(f"shrink-{method}", lambda one=one: one.shrink([2, 0]))
        refused(f"append-{method}", lambda one=one: one.grow(torch.ones(1, 13, dtype=torch.float64)))
    masked, _ = adapted()
    refused("compact-ddp", lambda: compact(DistributedDataParallel(masked)))
    refused("compact-fsdp", lambda: compact(wrapped(masked, "fsdp")))
    alone = [dist.new_group([each]) for each in (0, 1)][dist.get_rank()]
    pairs, layers = adapted("lora")
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    Refiner(pairs, layers, policy=policy, costs=costs, caps=costs, budget=1000, group=alone)  # trains by itself
    return found


SCENARIOS: Mapping[str, tuple[str, Parallel, bool]] = {
    **{f"{policy}-{parallel}": (policy, parallel, False) for policy in POLICIES for parallel in ("ddp", "fsdp")},
    **{
        f"{policy}-{parallel}-compacted": (policy, parallel, True)
        for policy in ("breathe", "adalora")
        for parallel in ("ddp", "fsdp")
    },
}


def main(folder: Path, rank: int) -> None:
    """Be one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, (policy, parallel, compacted) in SCENARIOS.items():
        result = run(policy, parallel, compacted=compacted, rank=rank)
        tensors = {key: each.contiguous() for key, each in result.tensors.items()}
        save_file(tensors, folder / f"{name}.{rank}.safetensors")
        save_file(result.update, folder / f"{name}.update.{rank}.safetensors")
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result.history))
    (folder / f"problems.{rank}.json").write_text(json.dumps(problems()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
