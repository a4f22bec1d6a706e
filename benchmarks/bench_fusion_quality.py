"""Token-level fusion against every fixed combination and other routers, on SmolLM2-135M-Instruct and real code.

FLOWRA_DATA=… python benchmarks/bench_fusion_quality.py FOLDER [--only layer,static] [--seeds 3] [--threads 2]
    [--finished] [--quick]

Two skills alternate inside one sequence (``_code_skills.py``): one adapter is trained on docstrings, one on code
without them, once each (LoRA of rank 16 on every linear layer, 1,500 examples, one epoch). Gates, and everything else
that learns or is tuned, see 200 functions that hold both, five times; settings are chosen on 60 others, with the first
seed: for what learns, the best of three learning rates, and of more beyond the edge while that is the best; for fixed
weights, 24 trials. The base is a 4-bit file; all that learns is float32.

Judged by the mean negative log-likelihood of the tokens of 424 functions of other files: all, those in docstrings, and
those in code. Differences are paired by function: nats of a function summed, averaged over seeds, and functions drawn
again 10,000 times; p-values are corrected after Holm. Seeds vary the order of the functions, and what is drawn at the
start. Gates of layers and the new LoRA are trained on 50, 100 and 500 functions, too, at the rates found with 200.

=================  ====================================================================================================
`base`             no adapter
`docs`, `code`     one adapter alone
`sum`              both, each with weight 1
`static`           both with the best fixed weights (pattern search, as LoraHub)
`flow`             merged by the rule `flow`, statistics of 64 own examples of each adapter
`arrow`, `spectr`  routing by prototypes and by norms, untrained
`xlora`            PEFT's X-LoRA: weights for each token and layer from a first pass
`few-shot`         a new LoRA of rank 16 on the 200 functions
`published`        LoRA-Flow's gates of layers as its code trains them: the residual stream as it is, one learning rate,
                   weight decay on biases, too
`layer`, `step`,   gates at three levels with the recipe of `flowra fuse train --gate-input normed`: the residual stream
`module`           over its root mean square, and biases that learn ten times as fast. All gates are born as the adapter
                   for code
=================  ====================================================================================================

Every figure is kept in FOLDER and made once; a run that was broken off goes on where it stopped, processes that are
given the same folder share the work, and `--finished` reports what is there. `--quick` tries the whole path in
`FOLDER/quick`.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from _code_skills import skills
from _fusion_bench import RANK, Fused, Workshop
from _holm import holm
from _results import Row, write
from _segments import Nats, bootstrap, mean_nats, mean_of_runs
from _shared_work import share

from flowra_compose import AdapterState
from flowra_compose.fusion import Arrow, GateOptions, SpectR, StaticWeights, gates_for

NAMES = ("docs", "code")
LEVELS = ("layer", "step", "module")
LEARNED = ("layer", "step", "module", "published", "few-shot", "xlora")
FIXED = ("base", "docs", "code", "sum", "static", "flow", "arrow", "spectr")
RATES: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(LEARNED, (3e-4, 1e-3, 3e-3)),
    "published": (3e-3, 1e-2, 3e-2),
    "xlora": (1e-3, 3e-3, 9e-3),
}
"""Where the search begins: about the best of an earlier round."""
EXAMPLES, HOURS = 200, 6
CURVED, CURVE = ("layer", "few-shot"), (50, 100, 500)
"""What learns from other numbers of functions, too, and how many."""
BELOW = {"arrow", "code", "layer", "static", "step"}
"""Whose names stand below their marks in the picture."""
PICTURE = Path(__file__).parents[1] / "docs" / "results" / "fusion.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much of everything."""

    own: int = 1500
    """Examples of each adapter."""
    both: int = 500
    """Functions that there are for what learns, of which it gets 200 but for the curve."""
    test: int = 10_000
    trials: int = 24
    """Of fixed weights."""


QUICK = Size(own=16, both=8, test=8, trials=4)


class Bench(Workshop):
    """The two skills, and as much of their examples as is asked for."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        super().__init__(folder, quick=quick)
        self.size = QUICK if quick else Size()
        self.rows = skills(self.tokenizer)

    @cached_property
    def adapters(self) -> dict[str, AdapterState]:
        """The adapters, trained if they are not there yet."""
        return {name: self.adapter(name, lambda name=name: self.rows[name][: self.size.own]) for name in NAMES}

    def fused(self, level: str = "layer", examples: int = EXAMPLES) -> Fused:
        """Return both adapters, with so many functions for what learns."""
        rows, size = self.rows, self.size
        both = rows["both"][: min(examples, size.both)]
        parts = {name: rows[name][: size.test] for name in ("tuning", "test")}
        options = {"level": level, "gate_input": "normed"} if level in LEVELS else {}
        return Fused(shop=self, adapters=self.adapters, both=both, options=options, **parts)


# what is compared


def fixed(bench: Bench, name: str) -> Nats:
    """Judge what does not learn."""
    fused = bench.fused()
    updates = [one.updates for one in bench.adapters.values()]
    weights: Mapping[str, Sequence[float]] = {"base": (0, 0), "docs": (1, 0), "code": (0, 1), "sum": (1, 1)}
    if name == "static":
        return fused.judged(StaticWeights(bench.kept("static weights", lambda: fused.searched(bench.size.trials))))
    if name == "flow":
        return fused.merged_by_flow({skill: bench.rows[skill][bench.size.own :][:64] for skill in NAMES})
    if name in weights:
        return fused.judged(StaticWeights(weights[name]))
    return fused.judged(Arrow(updates) if name == "arrow" else SpectR(updates))


def of_learned(bench: Bench, name: str, seed: int, examples: int) -> None:
    """Judge one of what learns, at the learning rate that is best on the tuning rows with the first seed."""
    fused = bench.fused(name)
    best = bench.tuned(name, RATES[name], lambda rate, seed: fused.at(name, rate, seed))
    if examples == EXAMPLES:
        bench.kept(f"{name} {best:g} {seed}", lambda: fused.at(name, best, seed))
    else:
        fewer = bench.fused(name, examples)
        bench.kept(f"{name} of {examples}, {seed}", lambda: fewer.at(name, best, seed))


# what is said of it


def report(bench: Bench, seeds: int) -> None:
    """Print a table of what is there, and write it."""
    table: dict[str, list[Nats]] = {}
    for name in FIXED:
        if bench.has(name):
            table[name] = [bench.kept(name, list)]
    for name in LEARNED:
        best = bench.best_rate(name)
        if best is not None:
            files = [f"{name} {best:g} {seed}" for seed in range(seeds)]
            table[name] = [bench.kept(file, dict)["test"] for file in files if bench.has(file)]
            print(f"{name}: learning rate {best:g}, {len(table[name])} seeds")
    print(f"not run: {', '.join(name for name in (*FIXED, *LEARNED) if name not in table) or 'nothing'}")
    took = bench.hours(["trained docs", "trained code", "static weights", *FIXED, *(f"{name} *" for name in LEARNED)])
    rows = [Row(what="machine-hours of all figures", ours=round(took, 2), limit=HOURS, sense="<=")]
    if "base" in table:
        rows.append(Row(what="base: perplexity of a token", ours=round(math.exp(mean_nats(table["base"][0])), 3)))
    for name, runs in table.items():
        values = [mean_nats(run) for run in runs]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        docs, code = (mean_of_runs(runs, skill) for skill in (0, 1))
        line = f"{name}: nats per token, docstrings {docs:.4f}, code {code:.4f}, seeds {len(runs)}{spread}; all"
        rows.append(Row(what=line, ours=round(float(np.mean(values)), 4)))
    for name, count in product(CURVED, CURVE):
        files = [f"{name} of {count}, {seed}" for seed in range(seeds)]
        found = [bench.kept(file, dict)["test"] for file in files if bench.has(file)]
        if found:
            what = f"{name} of {count} functions: nats per token, seeds {len(found)}"
            rows.append(Row(what=what, ours=round(mean_of_runs(found), 4)))
    if "layer" in table:
        rows += compared(table, seeds)
    rows += gate_sizes(bench)
    draw(table)
    write("fusion_quality", rows, command="python benchmarks/bench_fusion_quality.py FOLDER")


def compared(table: Mapping[str, list[Nats]], seeds: int) -> list[Row]:
    """Say by how much gates of layers are better than each other way, and how surely."""
    found = {name: bootstrap(table["layer"], runs) for name, runs in table.items() if name != "layer"}
    surely = holm({name: p for name, (_, _, p) in found.items()})
    rows = []
    for name, (low, high, _) in found.items():
        whole = len(table["layer"]) == seeds and (name in FIXED or len(table[name]) == seeds)
        barred = whole and name not in (*LEVELS, "published", "few-shot")
        what = f"layer gates less {name}, nats per token, 95 % [{low:.4f}, {high:.4f}]"
        what += "; p after Holm" if whole else f", of fewer than {seeds} seeds; p after Holm"
        limit = 0.05 if barred else None
        rows.append(Row(what=what, ours=round(surely[name], 5), limit=limit, sense="<=" if barred else None))
    return rows


def draw(table: Mapping[str, list[Nats]]) -> None:
    """Draw the loss in code over that in docstrings, a point for each way; down and left is better."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, runs in table.items():
        if name == "base":
            continue  # far away
        docs, code = (mean_of_runs(runs, skill) for skill in (0, 1))
        axes.plot(docs, code, "D" if name in LEARNED else "o", color="tab:blue" if name in LEARNED else "tab:gray")
        axes.annotate(name, (docs, code), xytext=(6, -12 if name in BELOW else 5), textcoords="offset points")
    axes.set(xlabel="nats per token of docstrings", ylabel="nats per token of code")
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def gate_sizes(bench: Bench) -> list[Row]:
    """Compare the gates' parameters with an adapter's, here and at rank 64."""
    layers = {name: (update.shape, update.rank) for name, update in bench.adapters["docs"].updates.items()}
    gates = gates_for(bench.model, bench.adapters, GateOptions())
    rows = []
    for rank in (8, RANK, 64):
        adapter = sum(rank * (m + n) for (m, n), _ in layers.values())
        share = round(100 * gates.num_parameters() / adapter, 4)
        bar = 0.2 if rank == 64 else None
        what = f"gates of layers, k = 2, percent of one adapter of rank {rank} on all linear layers"
        rows.append(Row(what=what, ours=share, limit=bar, sense=None if bar is None else "<="))
    return rows


def main() -> None:
    """Run what is asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen.folder, quick=chosen.quick)
    wanted = chosen.only.split(",") if chosen.only else [*FIXED, *LEARNED]
    if not chosen.finished:
        pieces = [partial(bench.kept, name, partial(fixed, bench, name)) for name in wanted if name in FIXED]
        for count, seed, name in product((EXAMPLES, *CURVE), range(chosen.seeds), wanted):
            if name in (LEARNED if count == EXAMPLES else CURVED):
                pieces.append(partial(of_learned, bench, name, seed, count))
        share(pieces)
    if not chosen.quick:
        report(bench, chosen.seeds)


if __name__ == "__main__":
    main()
