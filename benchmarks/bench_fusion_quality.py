"""Token-level fusion against every fixed combination and other routers, on SmolLM2-135M-Instruct and real code.

FLOWRA_DATA=… python benchmarks/bench_fusion_quality.py FOLDER [--only layer,static] [--seeds 3] [--curve 50,100,440]
    [--finished] [--quick]

Two skills alternate inside one sequence (``_code_skills.py``): one adapter is trained on docstrings, one on code
without them, once each (LoRA of rank 16 on every linear layer, 1,500 examples, one epoch). Gates, and everything else
that learns or is tuned, see 200 functions that hold both, five times; settings are chosen on 60 others, with the first
seed: for what learns, the better of two learning rates; for fixed weights, 24 trials. The base is a 4-bit file,
read in bfloat16; adapters and gates are float32.

Judged by the mean negative log-likelihood of the tokens of 332 functions of other files: all, those in docstrings, and
those in code. Differences are paired by function: nats of a function summed, averaged over seeds, and functions drawn
again 10,000 times. Seeds vary the order of the functions, and what is drawn at the start.

=================  ====================================================================================================
`base`             no adapter
`docs`, `code`     one adapter alone
`sum`              both, each with weight 1
`static`           both with the best fixed weights (pattern search, as LoraHub)
`flow`             merged by the rule `flow`, statistics of 64 own examples of each adapter
`arrow`, `spectr`  routing by prototypes and by norms, untrained
`xlora`            PEFT's X-LoRA: weights for each token and layer from a first pass
`few-shot`         a new LoRA of rank 16 on the 200 functions
`layer`, `step`,   LoRA-Flow's gates at three levels; born as the adapter for code
`module`
=================  ====================================================================================================

Every figure is kept in FOLDER and made once; a run that was broken off goes on where it stopped, and `--finished`
reports what is there.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import peft
import torch
from _code_skills import Row as Example
from _code_skills import Rows, batch, skills
from _results import Row, write
from _smollm2 import smollm2
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from flowra_adapters import attach, match_modules, save_adapter
from flowra_analysis import KFAC, measure
from flowra_compose import AdapterState, ModuleStatistics, merge_updates, read_adapter
from flowra_compose.fusion import (
    Arrow,
    GateOptions,
    Gates,
    Routing,
    SpectR,
    StaticWeights,
    fuse,
    gates_for,
    search_static_weights,
)
from flowra_pipelines.tasks import TASKS
from flowra_pipelines.training import data_order

logging.disable_progress_bar()

NAMES = ("docs", "code")
LEVELS = ("layer", "step", "module")
LEARNED = ("layer", "step", "module", "few-shot", "xlora")
FIXED = ("base", "docs", "code", "sum", "static", "flow", "arrow", "spectr")
RATES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(LEVELS, (1e-3, 1e-2)),
    "xlora": (1e-4, 1e-3),
    "few-shot": (3e-4, 1e-3),
}
RANK, BATCH, EPOCHS, EXAMPLES = 16, 4, 5, 200
PICTURE = Path(__file__).parents[1] / "docs" / "results" / "fusion.png"
Nats = list[tuple[float, int, float, int]]
"""For each function nats and tokens of its docstring, and of its code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much of everything."""

    own: int = 1500
    """Examples of each adapter."""
    both: int = 440
    """Functions that there are for what learns, of which it gets 200 unless the curve asks for another number."""
    test: int = 10_000
    trials: int = 24
    """Of fixed weights."""


QUICK = Size(own=16, both=8, test=8, trials=4)


class Bench:
    """The base, the adapters and the examples; and what has been measured."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        self.source = smollm2(folder)
        self.rows = skills(AutoTokenizer.from_pretrained(self.source))
        self.test = self.rows["test"][: size.test]
        self.tuning = self.rows["tuning"][: size.test]
        self.both = self.rows["both"][: size.both]

    def fresh(self) -> PreTrainedModel:
        """Load the base."""
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.bfloat16).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base; whoever changes it puts it back."""
        return self.fresh()

    @cached_property
    def adapters(self) -> dict[str, AdapterState]:
        """The adapters, trained if they are not there yet."""
        for name in NAMES:
            if not (self.folder / name).exists():
                model = self.fresh()
                trained = lora(model, seed=0)
                rows = self.rows[name][: self.size.own]
                fit(model, trained, rows, rate=5e-4, epochs=1, size=8, seed=0, what=name)
                save_adapter(model, self.folder / name, consumer="peft")
        return {name: read_adapter(self.folder / name) for name in NAMES}

    def kept(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Return what was measured under a name, measured now if it was not."""
        file = self.folder / "figures" / f"{name}.json"
        if not file.exists():
            began = time.perf_counter()
            made = make()
            file.parent.mkdir(exist_ok=True)
            file.with_suffix(".partial").write_text(json.dumps(made))
            file.with_suffix(".partial").rename(file)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return json.loads(file.read_text())


def lora(model: PreTrainedModel, *, seed: int) -> list[nn.Parameter]:
    """Put LoRA on every linear layer but the head, and return what it learns with."""
    names = [name for name in match_modules(model, ("all-linear",)) if name != "lm_head"]
    layers = attach(model, dict.fromkeys(names, RANK), scaling=2.0, generator=torch.Generator().manual_seed(seed))
    return [parameter for layer in layers.values() for parameter in layer.parameters()]


def fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Rows,
    *,
    rate: float,
    epochs: int,
    size: int,
    seed: int,
    what: str,
) -> None:
    """Train with the recipe of LoRA-Flow: Adam, warmup over a fifth of the steps, cosine, gradients clipped at 1."""
    steps = epochs * math.ceil(len(rows) / size)
    optimizer = AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    lengths = [len(row.tokens) for row in rows]
    order = data_order(len(rows), needed=steps * size, seed=seed, lengths=lengths, batch_size=size, window=8)
    torch.manual_seed(seed)
    warmup = math.ceil(0.2 * steps)
    for done in range(steps):
        chosen = order[done * size : (done + 1) * size]
        progress = (done - warmup) / max(1, steps - warmup)
        factor = (done + 1) / warmup if done < warmup else (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = model(**batch([rows[index] for index in chosen]), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if done % 50 == 0:
            print(f"  {what}: step {done} of {steps}, loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def nats(model: nn.Module, rows: Rows) -> Nats:
    """Return the negative log-likelihood of each row, apart for docstring and code."""
    found: dict[int, tuple[float, int, float, int]] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    for first in range(0, len(order), 8):
        chosen = order[first : first + 8]
        inputs = batch([rows[index] for index in chosen])
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        lost = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        for place, index in enumerate(chosen):
            found[index] = _by_skill(lost[place], rows[index])
    return [found[index] for index in range(len(rows))]


def _by_skill(lost: Tensor, row: Example) -> tuple[float, int, float, int]:
    inside = torch.tensor(row.is_docstring[1:])
    each = lost[: len(inside)].double()
    return float(each[inside].sum()), int(inside.sum()), float(each[~inside].sum()), int((~inside).sum())


def mean_nats(found: Nats) -> float:
    """Return nats per token."""
    return sum(row[0] + row[2] for row in found) / sum(row[1] + row[3] for row in found)


# what is compared


def fixed(bench: Bench, name: str) -> Nats:
    """Judge what does not learn."""
    model, adapters = bench.model, bench.adapters
    updates = [one.updates for one in adapters.values()]
    weights: Mapping[str, Sequence[float]] = {"base": (0, 0), "docs": (1, 0), "code": (0, 1), "sum": (1, 1)}
    if name == "static":
        return judged(bench, StaticWeights(bench.kept("static weights", lambda: searched(bench))))
    if name == "flow":
        known = [statistics_of(bench, skill) for skill in NAMES]
        merged = AdapterState(updates=merge_updates(updates, [1, 1], rule="flow", statistics=known))
        with fuse(model, {"merged": merged}, StaticWeights([1.0])):
            return nats(model, bench.test)
    if name in weights:
        return judged(bench, StaticWeights(weights[name]))
    return judged(bench, Arrow(updates) if name == "arrow" else SpectR(updates))


def judged(bench: Bench, routing: Routing) -> Nats:
    """Judge a routing of both adapters."""
    with fuse(bench.model, bench.adapters, routing):
        return nats(bench.model, bench.test)


def searched(bench: Bench) -> list[float]:
    """Find the best fixed weights: on the 200 functions and the 60 others, since nothing is trained."""
    rows = [*bench.both[:EXAMPLES], *bench.tuning]

    def loss(weights: tuple[float, ...]) -> float:
        with fuse(bench.model, bench.adapters, StaticWeights(weights)):
            found = mean_nats(nats(bench.model, rows))
        print(f"  static: {weights} {found:.4f}", flush=True)
        return found

    return list(search_static_weights(loss, 2, evaluations=bench.size.trials).weights)


def statistics_of(bench: Bench, skill: str) -> dict[str, ModuleStatistics]:
    """Measure C and S under an adapter, on its own examples; the targets are drawn from the model."""
    model, rows = bench.fresh(), bench.rows[skill][bench.size.own : bench.size.own + 64]
    state = bench.adapters[skill]
    with torch.no_grad():
        for name, update in state.updates.items():
            model.get_submodule(name).weight += update.delta_weight()

    task, generator = TASKS["causal_lm"], torch.Generator().manual_seed(0)
    batches = [batch(rows[first : first + 8]) for first in range(0, len(rows), 8)]
    seen = measure(
        model,
        batches,
        lambda model, inputs: task.drawn_losses(model, inputs, generator),
        sorted(state.updates),
        {"kfac": KFAC.init()},
        mask=lambda inputs: inputs["attention_mask"],
    )
    factors = seen["kfac"].finalise()
    return {
        name: ModuleStatistics(inputs=factors[name].inputs.dense, outputs=factors[name].gradients.dense)
        for name in state.updates
    }


@contextmanager
def learned(bench: Bench, name: str, rate: float, seed: int, rows: Rows) -> Iterator[nn.Module]:
    """Train one of what learns, and give the model that it made."""
    settings: dict[str, Any] = {"rate": rate, "epochs": EPOCHS, "size": BATCH, "seed": seed}
    what = f"{name} {rate:g} seed {seed}"
    if name in LEVELS:
        options = GateOptions(level=name, initial="primary", primary=1)  # type: ignore[arg-type]
        gates = gates_for(bench.model, bench.adapters, options, seed=seed)
        with fuse(bench.model, bench.adapters, gates):
            fit(bench.model, list(gates.parameters()), rows, what=what, **settings)
            yield bench.model
    elif name == "few-shot":
        model = bench.fresh()
        fit(model, lora(model, seed=seed), rows, what=what, **settings)
        yield model
    else:
        torch.manual_seed(seed)
        folders = {str(index): str(bench.folder / skill) for index, skill in enumerate(NAMES)}  # PEFT counts them
        _ = bench.adapters
        base = bench.fresh()
        base.config.use_cache = False
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=folders, layerwise_scalings=True
        )
        made = peft.get_peft_model(base, config)
        fit(made, [each for each in made.parameters() if each.requires_grad], rows, what=what, **settings)
        made.eval()
        yield made


def of_learned(bench: Bench, name: str, seed: int, examples: int = EXAMPLES) -> Nats:
    """Judge one of what learns, at the learning rate that is better on the tuning rows with the first seed."""

    def at(rate: float, seed: int, examples: int = EXAMPLES) -> dict[str, Nats]:
        with learned(bench, name, rate, seed, bench.both[:examples]) as model:
            return {"tuning": nats(model, bench.tuning), "test": nats(model, bench.test)}

    first = {rate: bench.kept(f"{name} {rate:g} 0", lambda rate=rate: at(rate, 0)) for rate in RATES[name]}
    best = min(first, key=lambda rate: mean_nats(first[rate]["tuning"]))
    if examples == EXAMPLES:
        return bench.kept(f"{name} {best:g} {seed}", lambda: at(best, seed))["test"]
    return bench.kept(f"{name} of {examples}, {seed}", lambda: at(best, seed, examples))["test"]


# what is said of it


def report(bench: Bench, seeds: int) -> None:
    """Print a table of what is there, and write it."""
    table: dict[str, list[Nats]] = {}
    for name in FIXED:
        if (bench.folder / "figures" / f"{name}.json").exists():
            table[name] = [bench.kept(name, list)]
    for name in LEARNED:
        there = [(bench.folder / "figures" / f"{name} {rate:g} 0.json").exists() for rate in RATES[name]]
        if all(there):
            first = {rate: bench.kept(f"{name} {rate:g} 0", list) for rate in RATES[name]}
            best = min(first, key=lambda rate: mean_nats(first[rate]["tuning"]))
            files = [bench.folder / "figures" / f"{name} {best:g} {seed}.json" for seed in range(seeds)]
            table[name] = [json.loads(file.read_text())["test"] for file in files if file.exists()]
            print(f"{name}: learning rate {best:g} of {RATES[name]}, {len(table[name])} seeds")
    rows = []
    for name, runs in table.items():
        values = [mean_nats(run) for run in runs]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        docs = np.mean([sum(row[0] for row in run) / sum(row[1] for row in run) for run in runs])
        code = np.mean([sum(row[2] for row in run) / sum(row[3] for row in run) for run in runs])
        line = f"{name}: nats per token, docstrings {docs:.4f}, code {code:.4f}, seeds {len(runs)}{spread}; all"
        rows.append(Row(what=line, ours=round(float(np.mean(values)), 4)))
    for file in sorted((bench.folder / "figures").glob("* of *, 0.json")):
        stem = file.stem.removesuffix(", 0")
        found = [json.loads(each.read_text())["test"] for each in sorted(file.parent.glob(f"{stem}, *.json"))]
        what = f"{stem} functions: nats per token, seeds {len(found)}"
        rows.append(Row(what=what, ours=round(float(np.mean([mean_nats(run) for run in found])), 4)))
    if "layer" in table:
        for name, runs in table.items():
            if name == "layer":
                continue
            low, high, p = bootstrap(table["layer"], runs)
            level = name in LEVELS or name == "few-shot"
            rows.append(
                Row(
                    what=f"layer gates less {name}, nats per token, 95 % [{low:.4f}, {high:.4f}]; p",
                    ours=p,
                    limit=None if level else 0.05,
                    sense=None if level else "<=",
                )
            )
    rows += gate_sizes(bench)
    draw(table)
    write("fusion_quality", rows, command="python benchmarks/bench_fusion_quality.py FOLDER")


def draw(table: Mapping[str, list[Nats]]) -> None:
    """Draw the loss in code over that in docstrings, a point for each way; down and left is better."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for index, (name, runs) in enumerate(table.items()):
        if name == "base":
            continue  # far away
        docs, code = (
            float(np.mean([sum(row[at] for row in run) / sum(row[at + 1] for row in run) for run in runs]))
            for at in (0, 2)
        )
        axes.plot(docs, code, "D" if name in LEARNED else "o", color="tab:blue" if name in LEARNED else "tab:gray")
        axes.annotate(name, (docs, code), xytext=(6, 5 if index % 2 else -12), textcoords="offset points")
    axes.set(xlabel="nats per token of docstrings", ylabel="nats per token of code")
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def bootstrap(one: Sequence[Nats], other: Sequence[Nats], draws: int = 10_000) -> tuple[float, float, float]:
    """Return the 95 % interval of the difference in nats per token, and a one-sided p of `one` not being better."""
    sums = [np.mean([[row[0] + row[2] for row in run] for run in runs], axis=0) for runs in (one, other)]
    tokens = np.array([row[1] + row[3] for row in one[0]])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(draws, len(tokens)))
    differences = (sums[0] - sums[1])[drawn].sum(1) / tokens[drawn].sum(1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high), round(float((differences >= 0).mean()), 5)


def gate_sizes(bench: Bench) -> list[Row]:
    """Compare the gates' parameters with an adapter's, here and at rank 64."""
    layers = {name: (update.shape, update.rank) for name, update in bench.adapters["docs"].updates.items()}
    gates: Gates = gates_for(bench.model, bench.adapters, GateOptions())
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
    parser.add_argument("--curve", default="", help="numbers of functions, such as 50,100,440, for what learns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen.folder, QUICK if chosen.quick else Size())
    wanted = chosen.only.split(",") if chosen.only else [*FIXED, *LEARNED]
    if not chosen.finished:
        for name in wanted:
            if name in FIXED:
                bench.kept(name, lambda name=name: fixed(bench, name))
        counts = [EXAMPLES, *map(int, filter(None, chosen.curve.split(",")))]
        for count, seed, name in product(counts, range(chosen.seeds), wanted):
            if name in LEARNED:
                of_learned(bench, name, seed, count)
    if not chosen.quick:
        report(bench, chosen.seeds)


if __name__ == "__main__":
    main()
