"""Token-level fusion beyond one pair of skills: languages × mathematics, many adapters, and the paper's open questions.

FLOWRA_DATA=… python benchmarks/bench_fusion_questions.py FOLDER [--only language,many,transfer,data,places]
    [--seeds 3] [--threads 2] [--finished] [--quick]

FOLDER is that of ``bench_fusion_quality.py``, whose base and adapters are used again: same recipe, the learning rate of
gates that it found, judged by nats per token of what nothing has seen, paired by sequence, p-values corrected after
Holm within each table.

===========  ==========================================================================================================
`language`   A problem in Spanish or German, its solution in English (``_language_skills.py``): everything that
             ``bench_fusion_quality.py`` compares. Gates of layers, X-LoRA and the new LoRA have the best of their
             learning rates on the tuning problems of both languages; gates by step and module that of layers, and those
             as published the one that ``bench_fusion_quality.py`` found
`many`       Docstrings and code with 2, 4 and 8 adapters, those that are not needed trained on mathematics and on
             languages: sum, fixed weights, Arrow, SpectR, gates of layers
`transfer`   Gates trained with one pair of adapters on its data, used with another pair on the other's; beside those
             trained there, at the rates of `language`
`data`       Gates over adapters that were trained on 200, 1,000 and 1,500 examples of the same data
`places`     Eight adapters: W_g of rank 1, 2, 4 and full, with gates that learn only in the bottom, middle or top third
             of the layers; the others stay as they are born. One seed
===========  ==========================================================================================================

Weights of k adapters are searched with 12 k trials, from the best of two padded with zeros. Every figure is kept in
FOLDER and made once; a run that was broken off goes on where it stopped, processes that are given the same folder share
the work, and `--finished` reports what is there. `--quick` tries the whole path in `FOLDER/quick`.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from _code_skills import skills
from _fusion_bench import Fused, Missing, Workshop
from _holm import holm
from _language_skills import language, mathematics, problems
from _results import Row, write
from _segments import Examples, Nats, bootstrap, mean_nats, mean_of_runs
from _shared_work import share
from safetensors.torch import load_file, save_file
from torch import nn

from flowra_compose import AdapterState
from flowra_compose.fusion import Arrow, Gates, Routing, SpectR, StaticWeights

LEVELS = ("layer", "step", "module")
RATES: Mapping[str, tuple[float, ...]] = {
    "layer": (3e-4, 1e-3, 3e-3),
    "few-shot": (3e-4, 1e-3, 3e-3),
    "xlora": (1e-3, 3e-3, 9e-3),
}
"""Of what finds its own learning rate on the problems."""
KINDS = (*RATES, "step", "module", "published")
LANGUAGES = ("es", "de")
OTHERS = ("maths", "es", "de", "it", "ru", "zh")
"""Adapters that functions do not need, in the order in which they come in."""
COUNTS, RANKS, PLACES = (2, 4, 8), (1, 2, 4, None), ("bottom", "middle", "top")
OWN_EXAMPLES = (200, 1000, 1500)
"""Of each adapter; 1500 are those of ``bench_fusion_quality.py``, nearly all that there are."""
GATE_EXAMPLES, OWN, TRIALS, RATE, PUBLISHED_RATE = 200, 1500, 12, 1e-3, 1e-2


class Bench(Workshop):
    """Adapters and sequences of all settings."""

    def __init__(self, folder: Path, *, quick: bool, finished: bool) -> None:
        super().__init__(folder, quick=quick, finished=finished)
        self.rate = self.best_rate("layer") or RATE
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
        rate = (self.best_rate("languages layer") if setting in LANGUAGES else None) or self.rate
        file = self.folder / f"gates {setting} {rate:g} {seed}.safetensors"

        def train() -> Nats:
            with fused.trained(gates, rate, seed, f"{setting} seed {seed}") as model:
                found = self.nats(model, fused.test)
            save_file(gates.state_dict(), file)
            return found

        found: Nats = self.kept(f"{setting} gates {rate:g}, {seed}", train)
        gates.load_state_dict(load_file(file))
        return found, gates

    def weights(self, setting: str, fused: Fused) -> list[float]:
        """Find the best fixed weights of a setting; of more than two adapters from those of the last two."""
        count = len(fused.adapters)
        trials = 4 + count if self.quick else TRIALS * count
        begin = None
        if count > 2:
            begin = [0.0] * (count - 2) + self.weights(_functions(2), self.of_functions())
        return list(self.kept(f"{setting} weights of {trials}", lambda: fused.searched(trials, begin=begin)))

    def on_problems(self, kind: str, rate: float, seed: int) -> dict[str, Nats]:
        """Train one of what learns on each language; what it loses on all tuning problems, and on each test."""
        found: dict[str, Nats] = {"tuning": []}
        for code in LANGUAGES:
            each = self.of_problems(code, kind).at(kind, rate, seed)
            found["tuning"] += each["tuning"]
            found[code] = each["test"]
        return found

    def rate_of(self, kind: str) -> float:
        """Find the learning rate of one of what learns on problems."""
        if kind in RATES:
            return self.tuned(f"languages {kind}", RATES[kind], lambda rate, seed: self.on_problems(kind, rate, seed))
        if kind == "published":
            return self.best_rate("published") or PUBLISHED_RATE
        return self.rate_of("layer")

    def learned(self, kind: str, seed: int) -> dict[str, Nats]:
        """Return what one of what learns loses on each language's test."""
        rate = self.rate_of(kind)
        found: dict[str, Nats] = self.kept(
            f"languages {kind} {rate:g} {seed}", lambda: self.on_problems(kind, rate, seed)
        )
        return found


def of_languages(bench: Bench, seeds: int) -> list[Row]:
    """Compare what combines a language and mathematics."""
    share([partial(bench.learned, kind, seed) for seed, kind in product(range(seeds), KINDS)])
    rows = []
    for code in LANGUAGES:
        fused = bench.of_problems(code)
        table = _untrained(bench, code, fused)
        own = {name: bench.own(name)[-64:] for name in fused.adapters}
        merge = partial(fused.merged_by_flow, own)
        table["merged by flow"] = [bench.kept(f"{code} flow", merge)]
        table |= {kind: [bench.learned(kind, seed)[code] for seed in range(seeds)] for kind in KINDS}
        sizes = f"{len(fused.both)} problems to learn from, {len(fused.test)} to judge"
        rows += _rows(f"{code} × mathematics, {sizes}", table.pop("layer"), table)
    return rows


def _untrained(bench: Bench, setting: str, fused: Fused) -> dict[str, list[Nats]]:
    """Judge each adapter alone, their sum, the best fixed weights, and routing that was never trained."""
    count = len(fused.adapters)
    updates = [one.updates for one in fused.adapters.values()]
    best = bench.weights(setting, fused)
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
        name: [bench.kept(f"{setting} {name}", partial(fused.judged, routing))] for name, routing in routings.items()
    }


def of_many(bench: Bench, seeds: int) -> list[Row]:
    """Ask what adapters that are not needed cost."""
    counts = COUNTS[:2] if bench.quick else COUNTS
    _train(bench, {_functions(count): partial(bench.of_functions, count) for count in counts}, seeds)
    rows = []
    for count in counts:
        fused = bench.of_functions(count)
        gates = [bench.gates_of(_functions(count), fused, seed)[0] for seed in range(seeds)]
        table = _untrained(bench, _functions(count), fused)
        rows += _rows(f"docstrings and code with {count} adapters", gates, table)
    return rows


def of_transfer(bench: Bench, seeds: int) -> list[Row]:
    """Use gates that were trained on one setting in another."""
    settings = {_functions(2): bench.of_functions, **{code: partial(bench.of_problems, code) for code in LANGUAGES}}
    _train(bench, settings, seeds)
    rows = []
    for target, used in settings.items():
        table: dict[str, list[Nats]] = {}
        for source, trained in settings.items():
            for seed in range(seeds):
                found, gates = bench.gates_of(source, trained(), seed)
                if source != target:
                    judged = partial(used().judged, gates)
                    found = bench.kept(f"{source} to {target} {bench.rate:g}, {seed}", judged)
                table.setdefault(f"gates of {source}", []).append(found)
        rows += _rows(f"used for {target}", table.pop(f"gates of {target}"), table)
    return rows


def of_data(bench: Bench, seeds: int) -> list[Row]:
    """Ask what the adapters' own training is worth, with gates and without."""
    settings = {
        (_functions(2) if own == OWN else f"functions of {own}"): partial(bench.of_functions, own=own)
        for own in OWN_EXAMPLES
    }
    _train(bench, settings, seeds)
    rows = []
    for own, (setting, made) in zip(OWN_EXAMPLES, settings.items(), strict=True):
        fused = made()
        gates = [bench.gates_of(setting, fused, seed)[0] for seed in range(seeds)]
        rows += _rows(f"adapters of {own} examples", gates, _untrained(bench, setting, fused))
    return rows


def of_places(bench: Bench, _: int) -> list[Row]:
    """Ask where gates are worth most, and which rank is enough."""
    choices = [*product(RANKS[:1] if bench.quick else RANKS, PLACES)]
    count = 4 if bench.quick else 8

    def judged(rank: int | None, place: str) -> Nats:
        def run() -> Nats:
            fused = bench.of_functions(count, rank=rank)
            gates = fused.gates(seed=0)
            what = f"rank {rank} {place}"
            with fused.trained(gates, bench.rate, 0, what, which=_third(gates, place)) as model:
                return bench.nats(model, fused.test)

        found: Nats = bench.kept(f"{count} adapters, rank {rank or 'full'}, {place}, {bench.rate:g}", run)
        return found

    share([partial(judged, *each) for each in choices])
    return [
        _row(f"{count} adapters, gates of rank {rank or 'full'} in the {place} third, at the rate of full rank", found)
        for rank, place in choices
        for found in ([judged(rank, place)],)
    ]


def _train(bench: Bench, settings: Mapping[str, Callable[[], Fused]], seeds: int) -> None:
    """Train the gates of all settings, and judge what does not learn beside them."""

    def gates(setting: str, seed: int) -> None:
        bench.gates_of(setting, settings[setting](), seed)

    def others(setting: str) -> None:
        _untrained(bench, setting, settings[setting]())

    share([
        *(partial(gates, setting, seed) for setting, seed in product(settings, range(seeds))),
        *(partial(others, setting) for setting in settings),
    ])


def _third(gates: Gates, place: str) -> list[nn.Module]:
    """Return the gates in one third of the layers."""
    blocks = list(gates)
    start = len(blocks) * PLACES.index(place) // len(PLACES)
    end = len(blocks) * (PLACES.index(place) + 1) // len(PLACES)
    return [*blocks[start:end]]


def _functions(count: int) -> str:
    return "functions" if count == 2 else f"functions with {count}"


def _rows(what: str, gates: list[Nats], others: Mapping[str, list[Nats]]) -> list[Row]:
    """Say what gates of layers lose, what others do, and whether the difference could be chance."""
    found = {name: bootstrap(gates, runs) for name, runs in others.items()}
    surely = holm({name: p for name, (_, _, p) in found.items()})
    rows = [_row(f"{what}, gates by layer", gates)]
    for name, (low, high, _) in found.items():
        said = f", gates less this 95 % [{low:.4f}, {high:.4f}], p {surely[name]:.2g}"
        rows.append(_row(f"{what}, {name}", others[name], said=said))
    return rows


def _row(what: str, runs: list[Nats], *, said: str = "") -> Row:
    """Say nats per token of both skills and of all."""
    first, second = (mean_of_runs(runs, skill) for skill in (0, 1))
    values = f"{what}: nats per token, first skill {first:.4f}, second {second:.4f}, seeds {len(runs)}"
    if len(runs) > 1:
        values += f" ± {np.std([mean_nats(run) for run in runs], ddof=1):.4f}"
    return Row(what=f"{values}{said}; all", ours=round(mean_of_runs(runs), 4))


ASKED = {"language": of_languages, "many": of_many, "transfer": of_transfer, "data": of_data, "places": of_places}


def main() -> None:
    """Run what is asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(ASKED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--finished", action="store_true", help="report the questions that are answered, and run nothing"
    )
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen.folder, quick=chosen.quick, finished=chosen.finished)
    rows, answered = [], []
    for name in chosen.only.split(","):
        try:
            rows += ASKED[name](bench, chosen.seeds)
        except Missing as figure:
            print(f"{name}: not answered yet, {figure} is missing")
        else:
            answered.append(name)
    if rows and not chosen.quick:
        command = f"python benchmarks/bench_fusion_questions.py FOLDER --only {','.join(answered)}"
        write("fusion_questions", rows, command=command)


if __name__ == "__main__":
    main()
