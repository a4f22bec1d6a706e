"""K-FAC factors of a network of linear layers, ours and those of curvlinops, which must agree.

python benchmarks/bench_kfac.py [--rounds N]

The networks are perceptrons in float32 with the loss of given labels, every token a sample; the time is that of all
factors from the model and the batches on. The two are interleaved in one process in a changing order; a figure is the
median over rounds of the ratio within the round. Peak memory is that of a fresh process for each, less what it held
with the model and the data before.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _results import Row, write
from torch import Tensor, nn

from flowra_analysis import kronecker_factors

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # linear_operator uses torch.jit.script
    from curvlinops import KFACLinearOperator

Factors = dict[str, tuple[Tensor, Tensor]]
Batch = tuple[Tensor, Tensor]


class Net(NamedTuple):
    """Sizes of a network and its data."""

    widths: tuple[int, ...]
    num_batches: int
    batch_size: int
    num_tokens: int


NETS = {
    "784-1024-1024-1024-10, 8 batches of 128 vectors": Net((784, 1024, 1024, 1024, 10), 8, 128, 1),
    "576-1536-576-1536-576-10, 4 batches of 8 × 128 tokens": Net((576, 1536, 576, 1536, 576, 10), 4, 8, 128),
}


class Perceptron(nn.Module):
    """Linear layers with ReLU between them, over tokens; the logits are the mean over tokens."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, T, n)`` to ``(N, classes)``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        out: Tensor = last(x).mean(1)
        return out


def build(net: Net) -> tuple[Perceptron, list[Batch]]:
    """Make the network and its batches."""
    torch.manual_seed(0)
    model = Perceptron(net.widths)
    batches = [
        (torch.randn(net.batch_size, net.num_tokens, net.widths[0]), torch.randint(net.widths[-1], (net.batch_size,)))
        for _ in range(net.num_batches)
    ]
    return model, batches


def _names(model: Perceptron) -> list[str]:
    return [f"layers.{index}" for index in range(len(model.layers))]


def flowra(model: Perceptron, batches: list[Batch]) -> Factors:
    """Factors of flowra-analysis."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    found = kronecker_factors(model, batches, loss, _names(model))
    return {name: (C.dense, S.dense) for name, (C, S) in found.items() if C.dense is not None and S.dense is not None}


def curvlinops(model: Perceptron, batches: list[Batch]) -> Factors:
    """Factors of curvlinops, told the numbers of examples and losses so that it need not count them."""
    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [layer.weight for layer in model.layers],
        batches,
        fisher_type="empirical",
        kfac_approx="expand",
        check_deterministic=False,
        num_data=sum(len(targets) for _, targets in batches),
        num_per_example_loss_terms=1,
    )
    operator.compute_kronecker_factors()
    return {name: (operator._input_covariances[name], operator._gradient_covariances[name]) for name in _names(model)}


VARIANTS: dict[str, Callable[[Perceptron, list[Batch]], Factors]] = {"flowra": flowra, "curvlinops": curvlinops}


def ratio(name: str, *, rounds: int) -> float:
    """Return the median ratio of our time to that of curvlinops, once both have given the same factors."""
    model, batches = build(NETS[name])
    ours, theirs = (make(model, batches) for make in VARIANTS.values())
    assert ours.keys() == theirs.keys()
    for layer, pair in ours.items():
        for mine, other in zip(pair, theirs[layer], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    del ours, theirs, mine, other, pair
    found, order = [], list(VARIANTS)
    for _ in range(rounds):
        order.reverse()
        seconds = {}
        for variant in order:
            gc.collect()
            started = time.perf_counter()
            VARIANTS[variant](model, batches)
            seconds[variant] = time.perf_counter() - started
        found.append((seconds["flowra"] / seconds["curvlinops"], *seconds.values()))
    ratios = [each[0] for each in found]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{name}: time {middle:.3f} of that of curvlinops (quartiles {low:.3f} – {high:.3f}, {rounds} rounds)")
    return statistics.median(ratios)


def peak_memory(name: str, variant: str) -> float:
    """Return by how many MB a fresh process grows at most while it computes the factors."""
    command = [sys.executable, __file__, "--child", json.dumps([name, variant])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _child(name: str, variant: str) -> None:
    VARIANTS[variant](*build(Net((4, 3, 2), 1, 2, 1)))  # whatever is loaded at first use
    model, batches = build(NETS[name])
    before = _resident("VmRSS")
    VARIANTS[variant](model, batches)
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """Return the resident memory of this process in MB: VmRSS now, VmHWM at its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def rows(*, rounds: int = 21) -> list[Row]:
    """Measure both networks.

    Returns:
        For each a row of time and one of memory, both against curvlinops.
    """
    found = []
    for name in NETS:
        time_ratio = ratio(name, rounds=rounds)
        what = f"K-FAC factors of {name}: time, ratio to curvlinops"
        found.append(Row(what=what, ours=round(time_ratio, 3), peer=1.0, limit=1.0, sense="<="))
        memory = {variant: peak_memory(name, variant) for variant in VARIANTS}
        print(f"{name}: growth of memory in MB " + ", ".join(f"{key} {value:.0f}" for key, value in memory.items()))
        what = f"K-FAC factors of {name}: growth of memory in MB"
        found.append(Row(what=what, ours=round(memory["flowra"]), peer=round(memory["curvlinops"])))
    return found


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*json.loads(arguments.child))
        return
    command = f"python benchmarks/bench_kfac.py --rounds {arguments.rounds}"
    print(write("kfac", rows(rounds=arguments.rounds), command=command))


if __name__ == "__main__":
    main()
