"""A refinement that is interrupted in a training loop of one's own, and goes on in another process, bit by bit.

The adapters of a small network shrink to a budget while it trains. After every step a checkpoint is written, of
safetensors and JSON only. Then a fresh process takes up one of them, from the middle of the run, and must end with the
same bytes.

Run: python examples/resume_refinement.py [out_dir]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from flowra_adapters import LoRA, attach
from flowra_allocation import RefinementSchedule, Refiner, Shrink, optimizer_tensors, restore_optimizer

STEPS = 30
INTERRUPTED = 13  # after the first of four events, while the second is being prepared


class Run:
    """Everything that a run is made of, at its first step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 8))
        attached = attach(self.model, {"all-linear": 4}, dropout=0.1)
        self.layers = {name: one for name, one in attached.items() if isinstance(one, LoRA)}
        costs = {name: one.cost_per_rank for name, one in self.layers.items()}
        self.refiner = Refiner(
            self.model,
            self.layers,
            policy=Shrink(schedule=RefinementSchedule(start=4, freeze=24, events=4, observe=4), measure="flow"),
            costs=costs,
            caps=dict.fromkeys(costs, 4),
            budget=sum(2 * cost for cost in costs.values()),
        )
        self.step = 0

    def build_optimizer(self) -> None:
        """Build the optimiser; when resuming, after the ranks are in place."""
        self.optimizer = AdamW([each for each in self.model.parameters() if each.requires_grad], lr=1e-2)

    def train(self, out: Path, *, save: bool) -> None:
        """Train to the end, if wanted with a checkpoint after every step."""
        while self.step < STEPS:
            generator = torch.Generator().manual_seed(self.step)  # the data are a function of the step
            x = torch.randn(64, 16, generator=generator)
            self.refiner.before_step(self.step)
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :8].sin()).square().mean().backward()
            self.optimizer.step()
            self.refiner.before_zero_grad()
            self.step += 1
            self.refiner.after_step(self.step, self.optimizer)
            if save:
                self.save(out / f"checkpoint-{self.step}")
        self.refiner.finish()

    def save(self, folder: Path) -> None:
        """Write a checkpoint; the refinement's state comes last, so that where it is, all is."""
        folder.mkdir(parents=True)
        save_file(self.model.state_dict(), folder / "model.safetensors")
        save_file(optimizer_tensors(self.model, self.optimizer), folder / "optimizer.safetensors")
        save_file({"rng": torch.get_rng_state()}, folder / "rng.safetensors")  # of dropout
        self.refiner.save(folder)

    def restore(self, folder: Path) -> None:
        """Take up a checkpoint: ranks, values, then the optimiser."""
        self.step = self.refiner.restore(folder)
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.build_optimizer()
        restore_optimizer(self.model, self.optimizer, load_file(folder / "optimizer.safetensors"))
        torch.set_rng_state(load_file(folder / "rng.safetensors")["rng"])


def resumed(out: Path) -> None:
    """Go on from the interruption; write what comes out."""
    run = Run()
    run.restore(out / f"checkpoint-{INTERRUPTED}")
    print(f"resumed at step {run.step} with ranks {[one.rank for one in run.layers.values()]}")
    run.train(out, save=False)
    run.save(out / "resumed")


def main(out: Path) -> None:
    """Train without a break; resume in a fresh process; compare."""
    run = Run()
    run.build_optimizer()
    run.train(out, save=True)
    for event in run.refiner.history.events:
        print(f"step {event.step}: ranks {list(event.ranks.values())}, {event.parameters} of {event.budget} parameters")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-B", __file__, str(out), "resume"], check=True)
    for file in sorted((out / f"checkpoint-{STEPS}").iterdir()):
        same = file.read_bytes() == (out / "resumed" / file.name).read_bytes()
        print(f"{file.name}: {'equal' if same else 'DIFFERENT'} bytes")
    print(f"checkpoints: {out}")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="flowra-"))
    resumed(folder) if sys.argv[2:] == ["resume"] else main(folder)
