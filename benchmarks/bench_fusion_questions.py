"""Token-level fusion beyond one pair of skills: languages × mathematics, many adapters, and the paper's open questions.

FLOWRA_DATA=… python benchmarks/bench_fusion_questions.py FOLDER [--only language,many,transfer,data,places]
    [--seeds 3] [--threads 2] [--quick]

FOLDER is that of ``bench_fusion_quality.py``, whose base and adapters are used again: same recipe, the learning rate of
gates that it found, judged by nats per token of what nothing has seen, paired by sequence.

===========  ==========================================================================================================
`language`   A problem in Spanish or German, its solution in English (``_language_skills.py``): everything that
             ``bench_fusion_quality.py`` compares, each at the best of its own learning rates
`many`       Docstrings and code with 2, 4 and 8 adapters, those that are not needed trained on mathematics and on
             languages: sum, fixed weights, Arrow, SpectR, gates of layers
`transfer`   Gates trained with one pair of adapters on its data, used with another pair on the other's
`data`       Gates over adapters that were trained on 200, 1,000 and 1,500 examples of the same data
`places`     Eight adapters: W_g of rank 1, 2, 4 and full, with gates that learn only in the bottom, middle or top third
             of the layers; the others stay as they are born. One seed
===========  ==========================================================================================================

Every figure is kept in FOLDER and made once; a run that was broken off goes on where it stopped. `--quick` tries the
whole path in `FOLDER/quick`.
"""

import argparse
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import torch
from _code_skills import skills
from _fusion_bench import Fused, Workshop
from _language_skills import language, mathematics, problems
from _results import Row, write
from _segments import Examples, Nats, bootstrap, mean_nats, mean_of_runs
from safetensors.torch import load_file, save_file
from torch import nn

from flowra_compose import AdapterState
from flowra_compose.fusion import Arrow, Gates, Routing, SpectR, StaticWeights

LEVELS = ("layer", "step", "module")
RATES: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys((*LEVELS, "few-shot"), (3e-4, 1e-3, 3e-3)),
    "published": (3e-3, 1e-2, 3e-2),
    "xlora": (1e-3, 3e-3, 9e-3),
}
LANGUAGES = ("es", "de")
OTHERS = ("maths", "es", "de", "it", "ru", "zh")
"""Adapters that functions do not need, in the order in which they come in."""
COUNTS, RANKS, PLACES = (2, 4, 8), (1, 2, 4, None), ("bottom", "middle", "top")
OWN_EXAMPLES = (200, 1000, 1500)
"""Of each adapter; 1500 are those of ``bench_fusion_quality.py``, nearly all that there are."""
GATE_EXAMPLES, OWN, TRIALS, RATE = 200, 1500, 24, 1e-3


class Bench(Workshop):
    """Adapters and sequences of all settings."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        super().__init__(folder, quick=quick)
        self.rate = self.best_rate("layer") or RATE
        self.trials = 4 if quick else TRIALS
        self.code = {name: self._few(rows) for name, rows in skills(self.tokenizer).items()}

    def _few(self, rows: Examples) -> Examples:
        return rows[:8] if self.quick else rows

    def of_functions(self, count: int = 2, own: int = OWN, rank: int | None = None) -> Fused:
        """Return docstrings and code, with so many adapters, trained on so many examples."""
        ending = "" if own == OWN else f" of {own}"
        names = [*OTHERS[: count - 2], "docs", "code"]
        adapters = {
            name: self.other(name)
            if name in OTHERS
            else self.adapter(f"{name}{ending}", lambda name=name: self.code[name][:own])
            for name in names
        }
        rows = {"both": self.code["both"][:GATE_EXAMPLES], "tuning": self.code["tuning"], "test": self.code["test"]}
        return Fused(shop=self, adapters=adapters, options={"rank": rank, "gate_input": "normed"}, **rows)

    def of_problems(self, code: str, level: str = "layer") -> Fused:
        """Return problems in a language."""
        rows = {name: self._few(each) for name, each in problems(self.tokenizer, code).items()}
        adapters = {name: self.other(name) for name in (code, "maths")}
        options = {"level": level, "gate_input": "normed"} if level in LEVELS else {}
        return Fused(shop=self, adapters=adapters, options=options, **rows)

    def own(self, name: str) -> Examples:
        """Read what the adapter for mathematics or for a language learns from."""
        read = mathematics if name == "maths" else lambda tokenizer: language(tokenizer, name)
        return self._few(read(self.tokenizer))[:OWN]

    def other(self, name: str) -> AdapterState:
        """Read the adapter for mathematics or for a language."""
        return self.adapter(name, lambda: self.own(name))

    def gates_of(self, setting: str, fused: Fused, seed: int) -> tuple[Nats, Gates]:
        """Train gates of a setting, or read them, and return how they do on its test."""
        gates = fused.gates(seed=seed)
        file = self.folder / f"gates {setting} {self.rate:g} {seed}.safetensors"

        def train() -> Nats:
            with fused.trained(gates, self.rate, seed, f"{setting} seed {seed}") as model:
                found = self.nats(model, fused.test)
            save_file(gates.state_dict(), file)
            return found

        found: Nats = self.kept(f"{setting} gates {self.rate:g}, {seed}", train)
        gates.load_state_dict(load_file(file))
        return found, gates


def of_languages(bench: Bench, seeds: int) -> list[Row]:
    """Compare what combines a language and mathematics."""
    rows = []
    for code in LANGUAGES[:1] if bench.quick else LANGUAGES:
        fused = bench.of_problems(code)
        table = {name: [run] for name, run in _untrained(bench, code, fused).items()}
        own = {name: bench.own(name)[-64:] for name in fused.adapters}
        table["merged by flow"] = [bench.kept(f"{code} flow", lambda fused=fused, own=own: fused.merged_by_flow(own))]
        for kind, rates in RATES.items():
            of_kind, name = bench.of_problems(code, kind), f"{code} {kind}"
            best = bench.tuned(name, rates, lambda rate, seed, it=of_kind, kind=kind: it.at(kind, rate, seed))
            table[kind] = [
                bench.kept(f"{name} {best:g} {seed}", lambda it=of_kind, k=kind, r=best, s=seed: it.at(k, r, s))["test"]
                for seed in range(seeds)
            ]
        gates = table.pop("layer")
        sizes = f"{len(fused.both)} problems to learn from, {len(fused.test)} to judge"
        rows.append(_row(f"{code} × mathematics, {sizes}, gates by layer", gates))
        rows += [_row(f"{code} × mathematics, {name}", runs, against=gates) for name, runs in table.items()]
    return rows


def _untrained(bench: Bench, setting: str, fused: Fused) -> dict[str, Nats]:
    """Judge each adapter alone, their sum, the best fixed weights, and routing that was never trained."""
    count = len(fused.adapters)
    updates = [one.updates for one in fused.adapters.values()]
    best = bench.kept(f"{setting} weights of {bench.trials}", lambda: fused.searched(bench.trials))
    routings: dict[str, Routing] = {
        "base": StaticWeights([0.0] * count),
        **{
            f"{name} alone": StaticWeights([float(name == other) for other in fused.adapters])
            for name in (*fused.adapters,)[-2:]
        },
        "sum": StaticWeights([1.0] * count),
        f"best fixed weights {[round(weight, 2) for weight in best]}": StaticWeights(best),
        "Arrow": Arrow(updates),
        "SpectR": SpectR(updates),
    }
    return {
        name: bench.kept(f"{setting} {name}", lambda routing=routing: fused.judged(routing))
        for name, routing in routings.items()
    }


def of_many(bench: Bench, seeds: int) -> list[Row]:
    """Ask what adapters that are not needed cost."""
    rows = []
    for count in COUNTS[:2] if bench.quick else COUNTS:
        fused, what = bench.of_functions(count), f"docstrings and code with {count} adapters"
        gates = [bench.gates_of(_functions(count), fused, seed)[0] for seed in range(seeds)]
        rows.append(_row(f"{what}, gates by layer", gates))
        found = _untrained(bench, _functions(count), fused)
        rows += [_row(f"{what}, {name}", [run], against=gates) for name, run in found.items()]
    return rows


def of_transfer(bench: Bench, seeds: int) -> list[Row]:
    """Use gates that were trained on one setting in another."""
    settings = {_functions(2): bench.of_functions(), **{code: bench.of_problems(code) for code in LANGUAGES}}
    rows = []
    for (source, trained), (target, used) in product(settings.items(), repeat=2):
        runs = []
        for seed in range(seeds):
            found, gates = bench.gates_of(source, trained, seed)
            if source != target:
                found = bench.kept(
                    f"{source} to {target} {bench.rate:g}, {seed}", lambda gates=gates, used=used: used.judged(gates)
                )
            runs.append(found)
        rows.append(_row(f"gates of {source}, used for {target}", runs))
    return rows


def of_data(bench: Bench, seeds: int) -> list[Row]:
    """Ask what the adapters' own training is worth, with gates and without."""
    rows = []
    for own in OWN_EXAMPLES:
        fused = bench.of_functions(own=own)
        setting = _functions(2) if own == OWN else f"functions of {own}"
        gates = [bench.gates_of(setting, fused, seed)[0] for seed in range(seeds)]
        rows.append(_row(f"adapters of {own} examples, gates by layer", gates))
        found = _untrained(bench, setting, fused)
        rows += [_row(f"adapters of {own} examples, {name}", [run], against=gates) for name, run in found.items()]
    return rows


def of_places(bench: Bench, _: int) -> list[Row]:
    """Ask where gates are worth most, and which rank is enough."""
    rows = []
    for rank, place in product(RANKS[:1] if bench.quick else RANKS, PLACES):
        fused = bench.of_functions(4 if bench.quick else 8, rank=rank)

        def run(fused: Fused = fused, place: str = place, what: str = f"rank {rank} {place}") -> Nats:
            gates = fused.gates(seed=0)
            with fused.trained(gates, bench.rate, 0, what, which=_third(gates, place)) as model:
                return bench.nats(model, fused.test)

        found = bench.kept(f"8 adapters, rank {rank or 'full'}, {place}, {bench.rate:g}", run)
        rows.append(_row(f"8 adapters, gates of rank {rank or 'full'} in the {place} third", [found]))
    return rows


def _third(gates: Gates, place: str) -> list[nn.Module]:
    """Return the gates in one third of the layers."""
    blocks = list(gates)
    start = len(blocks) * PLACES.index(place) // len(PLACES)
    end = len(blocks) * (PLACES.index(place) + 1) // len(PLACES)
    return [*blocks[start:end]]


def _functions(count: int) -> str:
    return "functions" if count == 2 else f"functions with {count}"


def _row(what: str, runs: list[Nats], *, against: list[Nats] | None = None) -> Row:
    """Say nats per token of both skills and of all, and whether the gates' difference could be chance."""
    first, second = (mean_of_runs(runs, skill) for skill in (0, 1))
    said = f"{what}: nats per token, first skill {first:.4f}, second {second:.4f}, seeds {len(runs)}"
    if len(runs) > 1:
        said += f" ± {np.std([mean_nats(run) for run in runs], ddof=1):.4f}"
    if against is not None:
        low, high, p = bootstrap(against, runs)
        said += f", gates less this 95 % [{low:.4f}, {high:.4f}], p {p:g}"
    return Row(what=f"{said}; all", ours=round(mean_of_runs(runs), 4))


ASKED = {"language": of_languages, "many": of_many, "transfer": of_transfer, "data": of_data, "places": of_places}


def main() -> None:
    """Run what is asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(ASKED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen.folder, quick=chosen.quick)
    rows = [row for name in chosen.only.split(",") for row in ASKED[name](bench, chosen.seeds)]
    if not chosen.quick:
        write("fusion_questions", rows, command="python benchmarks/bench_fusion_questions.py FOLDER")


if __name__ == "__main__":
    main()
