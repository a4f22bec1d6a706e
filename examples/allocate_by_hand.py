"""Rank allocation in a training loop of one's own: flowra_adapters and flowra_allocation on a small torch model.

A frozen network must learn to act like another one, which differs from it by a low-rank change in two of its four
layers. A probe at a uniform rank finds out where the change is; the budget is then spent there.

Run: python examples/allocate_by_hand.py [out_dir]
"""

import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from flowra_adapters import LoRA, adapters, attach, load_adapter, save_adapter
from flowra_allocation import BottleneckObserver, allocate, flow_spectrum, read_plan, rebase, truncate, write_plan

SCALING = 2.0
PROBE_RANK = 4
BATCH = 64


def network() -> nn.Sequential:
    """Build the base: four layers, the same numbers at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            up=nn.Linear(16, 48),
            act1=nn.Tanh(),
            mid1=nn.Linear(48, 48),
            act2=nn.Tanh(),
            mid2=nn.Linear(48, 48),
            act3=nn.Tanh(),
            down=nn.Linear(48, 8),
        )
    )


def changed_network() -> nn.Sequential:
    """Build what is to be learned: the base with an update of rank 3 on ``mid1`` and of rank 1 on ``down``."""
    model = network()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, rank in {"mid1": 3, "down": 1}.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            left = torch.randn(weight.shape[0], rank, generator=generator)
            right = torch.randn(rank, weight.shape[1], generator=generator)
            weight += 0.15 * left @ right
    return model


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    """Name the adapters of a model, with their type."""
    return {name: one for name, one in adapters(model).items() if isinstance(one, LoRA)}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean over examples of the squared error, a sum over outputs."""
    loss: Tensor = (model(x) - y).square().sum(1).mean()
    return loss


def train(model: nn.Module, target: nn.Module, optimizer: AdamW, *, steps: int, generator: torch.Generator) -> None:
    """Train the adapters on fresh inputs."""
    for _ in range(steps):
        x = torch.randn(BATCH, 16, generator=generator)
        optimizer.zero_grad()
        loss_of(model, x, target(x).detach()).backward()
        optimizer.step()


def observe_gains(model: nn.Module, target: nn.Module, *, generator: torch.Generator) -> BottleneckObserver:
    """Pass eight batches forward and backward, and gather each bottleneck's Grams on the way."""
    with BottleneckObserver(model, lora_layers(model), loss="mean") as observer:
        for _ in range(8):
            x = torch.randn(BATCH, 16, generator=generator)
            loss_of(model, x, target(x).detach()).backward()
            model.zero_grad(set_to_none=True)
    return observer


def show(title: str, ranks: Mapping[str, int], used: int, loss: float) -> None:
    """Print ranks, parameters and held-out loss in one line."""
    print(f"{title:<28} {dict(ranks)}  {used} parameters, held-out loss {loss:.4f}")


def main(out: Path) -> None:
    """Attach, probe, observe, allocate, cut, train on, export."""
    model, target = network(), changed_network()
    x_test = torch.randn(512, 16, generator=torch.Generator().manual_seed(9))
    y_test = target(x_test).detach()
    print(f"base: held-out loss {loss_of(model, x_test, y_test):.4f}")

    attach(model, {"all-linear": PROBE_RANK}, scaling=SCALING)
    layers = lora_layers(model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    train(model, target, optimizer, steps=150, generator=generator)
    used = sum(one.num_parameters() for one in layers.values())
    show("probe at a uniform rank:", {n: one.rank for n, one in layers.items()}, used, loss_of(model, x_test, y_test))

    totals = observe_gains(model, target, generator=generator).total()
    spectra = {name: flow_spectrum(gram) for name, gram in totals.items()}
    costs = {name: one.cost_per_rank for name, one in layers.items()}
    plan = allocate({n: each.gains.tolist() for n, each in spectra.items()}, costs, budget=400, scaling=SCALING)
    write_plan(plan, out)
    plan = read_plan(out)  # the plan is a file: it could come from another process
    for name, module in plan.modules.items():
        gains = ", ".join(f"{gain:.1e}" for gain in module.gains)
        print(f"  {name:<5} rank {module.rank}, sensitivity {module.psi:.2f}, gains {gains}")
    print(f"plan: {plan.parameters} of {plan.budget} parameters")
    if plan.first_out is not None:
        print(f"best unit left out: {plan.first_out[0]}, gain {plan.first_out[1]:.1e} per parameter")

    for name, layer in layers.items():
        a, b = truncate(layer.lora_A, layer.lora_B, spectra[name], plan.ranks[name])
        rebase(layer, a, b, optimizer)  # the optimiser's moments move with the factors
    show("cut to the plan:", plan.ranks, plan.parameters, loss_of(model, x_test, y_test))
    train(model, target, optimizer, steps=400, generator=generator)
    loss = loss_of(model, x_test, y_test)
    show("trained on at those ranks:", {name: one.rank for name, one in layers.items()}, plan.parameters, loss)

    save_adapter(model, out / "adapter", unit_scale=True)
    load_adapter(fresh := network(), out / "adapter")
    difference = (fresh(x_test) - model(x_test)).abs().max()
    print(f"exported to {out / 'adapter'}; a fresh base with it differs by at most {difference:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="flowra-")))
