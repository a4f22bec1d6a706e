"""What `bench_equal_budget.py` found, as tables, tests and a picture."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _holm import holm
from _results import Row
from scipy import stats

__all__ = ["Outcome", "Table", "as_markdown", "between", "draw", "halves", "over_all", "show"]


def halves(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Split examples: rates are chosen on the first half, figures are of the second."""
    every = np.array(values)
    return every[0::2], every[1::2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One method on one task, at its best rate."""

    rate: float
    tried: Sequence[float]
    """Rates, with the first seed."""
    runs: Mapping[int, Mapping[str, Any]]
    """By seed; one whose loss was not finite is not there."""

    def values(self, key: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """Return each example's figure on the second half, ``(seeds, examples)``."""
        return np.stack([halves(self.runs[seed][key])[1] for seed in seeds or self.runs])

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest that was tried."""
        return self.rate in (min(self.tried), max(self.tried))

    @property
    def loss(self) -> float:
        """Mean loss on the second half, over seeds."""
        return float(self.values("losses").mean())

    @property
    def budget(self) -> int:
        """Of the final parameters, the same for all."""
        return int(next(iter(self.runs.values()))["budget"])

    @property
    def parameters(self) -> int:
        """Largest final count over seeds."""
        return max(run["parameters"] for run in self.runs.values())

    @property
    def fewest(self) -> int:
        """Smallest final count over seeds."""
        return min(run["parameters"] for run in self.runs.values())

    @property
    def peak(self) -> int:
        """Largest count at any time, over seeds."""
        return max(run["peak"] for run in self.runs.values())

    @property
    def minutes(self) -> float:
        """Median over seeds of a run's time, its scoring included; on whatever machine it was."""
        return statistics.median(run["seconds"] for run in self.runs.values()) / 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All methods on one task."""

    title: str
    methods: Mapping[str, Outcome]
    reference: str
    """The placement of LoRA that is best in this very table, which favours it."""
    placements: Collection[str]
    """Names of all its placements."""
    accuracy: bool
    """Whether the score is one; else it is the loss once more."""

    @property
    def limit(self) -> int:
        """Parameters that no method has at its end: the budget, or what the reference has if that is more."""
        return max(self.methods[self.reference].budget, self.methods[self.reference].peak)

    @property
    def spread(self) -> float:
        """Standard deviation of the reference's loss over seeds."""
        losses = self.methods[self.reference].values("losses").mean(1)
        return float(losses.std(ddof=1)) if len(losses) > 1 else 1.0

    def difference(self, name: str, to: str = "") -> np.ndarray:
        """Return a method's loss less that of another, by default the reference, ``(seeds of both, examples)``."""
        pair = [self.methods[each] for each in (name, to or self.reference)]
        seeds = sorted(set.intersection(*(set(each.runs) for each in pair)))
        loss, other = (each.values("losses", seeds) for each in pair)
        return loss - other


def as_markdown(table: Table) -> str:
    """Return the table as docs/results/refinement.md has it."""
    headings = ["", "learning rate", "parameters, at the end / at the peak", "loss", "accuracy", "difference"]
    rows, best = [headings, ["---"] * len(headings)], min(table.methods, key=lambda name: table.methods[name].loss)
    for name, each in table.methods.items():
        losses, difference = each.values("losses").mean(1), table.difference(name)
        low, high = bootstrap(difference)
        told = f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")
        rows.append([
            f"**{name}**" if name == best else name,
            f"{1000 * each.rate:g}e-3" + (" \\*" if each.at_the_edge else ""),
            (f"{each.fewest:,}–" if each.fewest < each.parameters else "") + f"{each.parameters:,} / {each.peak:,}",
            f"{losses.mean():.3f} ± {losses.std(ddof=1):.3f}",
            f"{100 * each.values('scores').mean():.1f}",
            "" if name == table.reference else told,
        ])
    column = headings.index("accuracy")
    kept = rows if table.accuracy else [[*row[:column], *row[column + 1 :]] for row in rows]
    return f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in kept)


def show(table: Table) -> list[Row]:
    """Print a table, and return its rows."""
    rows = []
    print(f"\n{table.title}: budget {table.limit:,}, best placement of LoRA: {table.reference}")
    print(
        f"{'method':<36}{'lr':>8}{'params, over seeds':>20}{'peak':>9}{'loss':>8} ±{'':<6}{'score':>8}  difference of"
        " loss; * rate at the edge of what was tried"
    )
    for name, each in table.methods.items():
        loss, score, difference = each.values("losses"), each.values("scores"), table.difference(name)
        low, high = bootstrap(difference)
        between_seeds = f"{each.fewest:,}" + (f"–{each.parameters:,}" if each.fewest < each.parameters else "")
        deviation = float(loss.mean(1).std(ddof=1)) if len(each.runs) > 1 else math.nan
        print(
            f"{name:<36}{each.rate:>7g}{'*' if each.at_the_edge else ' '}{between_seeds:>20}{each.peak:>9,}"
            f"{loss.mean():>8.4f} ±{deviation:<6.4f}{score.mean():>8.4f}  {difference.mean():+.4f} [{low:+.4f},"
            f" {high:+.4f}], {len(each.runs)} seeds, {each.minutes:.1f} min"
        )
        what = f"{table.title}: {name}: held-out loss (peer: standard deviation over seeds)"
        rows.append(Row(what=what, ours=_round(loss.mean()), peer=None if math.isnan(deviation) else _round(deviation)))
        if table.accuracy:
            rows.append(Row(what=f"{table.title}: {name}: accuracy", ours=_round(score.mean())))
        what = f"{table.title}: {name}: parameters at the end (peer: at the peak)"
        rows.append(Row(what=what, ours=each.parameters, peer=each.peak, limit=table.limit, sense="<="))
        what = f"{table.title}: {name}: fewest parameters at the end, over seeds (peer: parts of the budget)"
        rows.append(Row(what=what, ours=each.fewest, peer=_round(each.fewest / table.limit)))
        what = f"{table.title}: {name}: learning rate{', the edge of those tried' if each.at_the_edge else ''}"
        rows.append(Row(what=what, ours=each.rate))
    return rows


def between(table: Table, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Test one method beside another, paired over seeds, p-values uncorrected."""
    rows = []
    for one, other in pairs:
        if {one, other} <= table.methods.keys():
            by_seed = table.difference(one, other).mean(1)
            p = float(stats.ttest_1samp(by_seed, 0.0).pvalue) if len(by_seed) > 2 else math.nan
            print(f"{one} less {other}: {by_seed.mean():+.4f}, by seed {by_seed.round(4).tolist()}, p = {p:.3f}")
            what = f"{table.title}: {one} less {other}: mean difference of loss (peer: p, uncorrected)"
            rows.append(Row(what=what, ours=_round(by_seed.mean()), peer=None if math.isnan(p) else _round(p)))
    return rows


def over_all(tables: Sequence[Table]) -> list[Row]:
    """Test the differences over all pairs of task and seed, in standard deviations of the reference over seeds."""
    pairs: dict[str, list[float]] = {}
    for table in tables:
        for name in table.methods:
            if name not in table.placements:
                pairs.setdefault(name, []).extend((table.difference(name).mean(1) / table.spread).tolist())
    tested = {name: values for name, values in pairs.items() if len(values) > 2}
    p_values = holm({name: float(stats.ttest_1samp(values, 0.0).pvalue) for name, values in tested.items()})
    rows = []
    print("\nover all (task, seed) pairs, against LoRA at its best placement, in its standard deviations")
    for name, values in tested.items():
        print(f"{name:<32}{statistics.mean(values):+.2f} of {len(values)} pairs, p = {p_values[name]:.3f} after Holm")
        what = f"{name}: mean difference of loss in standard deviations over seeds (peer: p after Holm)"
        rows.append(Row(what=what, ours=_round(statistics.mean(values)), peer=_round(p_values[name])))
    return rows


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """Return a 95 % interval of the mean over examples, by drawing them again; ``(seeds, examples)``."""
    drawn = np.random.default_rng(0).integers(differences.shape[1], size=(2000, differences.shape[1]))
    means = differences.mean(0)[drawn].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def draw(tables: Sequence[Table], path: Path) -> None:
    """Draw each method's difference to the reference: seeds as dots, the mean with its interval over examples."""
    figure, every = plt.subplots(
        1, len(tables), figsize=(1.6 + 4.2 * len(tables), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    names = list(tables[0].methods)
    for axes, table in zip(every[0], tables, strict=True):
        for place, name in enumerate(names):
            if name not in table.methods:
                continue
            difference = table.difference(name)
            low, high = bootstrap(difference)
            colour = "tab:blue" if name.startswith("Flowra") else "tab:gray"
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(difference.mean(1), [place] * len(difference), "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(difference.mean(), place, "D", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=table.title, xlabel=f"held-out loss less that of {table.reference}")
        axes.grid(axis="x", alpha=0.3)
    every[0][0].set_yticks(range(len(names)), names)
    every[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _round(value: float) -> float:
    return round(float(value), 4)
