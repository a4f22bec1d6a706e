"""What a merge costs: beside PEFT's, beside a dense form, by tasks and rank, and for a model of 7 B shape.

python benchmarks/bench_merge.py [--rounds N] [--quick]

One module of 2048 × 2048 with random adapters of rank 16 in float32: the truncated SVD of four beside PEFT's `svd` of
the same four, which must give the same product; KnOTS × TIES of four beside a dense form, the SVD of the whole weights
side by side, which must, too; `flow` of eight with random second moments, which must come nearer to all tasks than
their mean; every other rule once. Pairs are interleaved in one process in a changing order; a figure is the median over
rounds, of the ratio within the round where two are compared.

A model of 7 B shape: eight adapters of rank 16 on the 224 linear layers of a Llama 2 7B, written as PEFT folders, are
merged to rank 16 by `merge_folders` in a fresh process; the time is that of the process, imports included, its files in
the page cache; the memory is its peak.

Cost by tasks and by rank is drawn in ``docs/results/merging_speed.png``, on one module of 1024 × 1024. `--quick` takes
small shapes, to try the benchmark, and writes nothing.
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import peft
import torch
from _results import Row, write
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn

from flowra_compose import (
    RULES,
    LowRankUpdate,
    MergeOptions,
    ModuleStatistics,
    Truncation,
    merge_updates,
    read_adapter,
)

DOCS = Path(__file__).parents[1] / "docs" / "results"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
DENSITY = 0.2
DRAWN = ("truncated_svd", "ties", "knots_ties", "tsv_m", "flow")
"""The rules in the figure: low-rank algebra, dense algebra, an aligned space, polar factors, second moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of everything that is measured."""

    side: int = 2048
    rank: int = 16
    few: int = 4
    """Tasks beside PEFT and beside the dense form."""
    many: int = 8
    """Tasks of `flow`, of all rules, and of the model."""
    drawn_side: int = 1024
    drawn_tasks: tuple[int, ...] = (1, 2, 4, 8, 16)
    drawn_ranks: tuple[int, ...] = (4, 8, 16, 32, 64)
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return the names and shapes (out, in) of the linear layers of the model, heads and embeddings out."""
        wide = (self.intermediate, self.hidden)
        shapes = {f"self_attn.{name}_proj": (self.hidden, self.hidden) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
        return {f"model.layers.{layer}.{name}": shape for layer in range(self.layers) for name, shape in shapes.items()}


QUICK = Size(
    side=96,
    rank=4,
    drawn_side=64,
    drawn_tasks=(1, 2, 3),
    drawn_ranks=(1, 2, 4),
    layers=2,
    hidden=64,
    intermediate=160,
)


def updates(count: int, side: int, rank: int) -> list[LowRankUpdate]:
    """Draw updates of one module."""
    generator = torch.Generator().manual_seed(0)
    return [
        LowRankUpdate(
            torch.randn(rank, side, generator=generator) / side**0.5,
            0.02 * torch.randn(side, rank, generator=generator),
            2.0,
        )
        for _ in range(count)
    ]


def moments(count: int, side: int) -> list[ModuleStatistics]:
    """Draw second moments of inputs and outputs with a spectrum like 1/j and trace 1, and a diagonal Fisher."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    sizes = torch.arange(1, side + 1).rsqrt()

    def moment() -> Tensor:
        mixed = draw(2 * side, side) * sizes @ draw(side, side)
        gram = mixed.T @ mixed
        return gram / gram.trace()

    return [ModuleStatistics(inputs=moment(), outputs=moment(), fisher=draw(side, side).square()) for _ in range(count)]


def merged(
    rule: str,
    tasks: Sequence[LowRankUpdate],
    known: Sequence[ModuleStatistics] = (),
    *,
    weight: float = 1.0,
    options: MergeOptions | None = None,
) -> LowRankUpdate:
    """Merge updates of one module with a rule of ours; truncated to the rank of the first where the rule asks for it.

    Returns:
        The merged update.
    """
    row = RULES[rule]
    return merge_updates(
        [{"fc": one} for one in tasks],
        [weight] * len(tasks),
        rule=rule,
        options=options,
        truncation=Truncation(rank=tasks[0].rank) if row.truncates else None,
        statistics=[{"fc": one} for one in known[: len(tasks)]] if row.needs else None,
    )["fc"]


def in_turns(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Run each once to warm up, then all in turns, in a changing order; the seconds of each, round by round."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        order.reverse()
        gc.collect()
        for name in order:
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def against(peer: Callable[[], object], ours: Callable[[], object], what: str, bar: float, *, rounds: int) -> list[Row]:
    """Compare two forms of one merge.

    Returns:
        How many times ours is faster, with its bar, and the seconds of both.
    """
    seconds = in_turns({"peer": peer, "ours": ours}, rounds=rounds)
    ratios = [one / other for one, other in zip(seconds["peer"], seconds["ours"], strict=True)]
    print(f"{what}: {min(ratios):.0f} to {max(ratios):.0f} times faster in {rounds} rounds", flush=True)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    return [
        Row(
            what=f"{what}: times faster than the peer",
            ours=_rounded(statistics.median(ratios)),
            peer=1.0,
            limit=bar,
            sense=">=",
        ),
        Row(what=f"{what}: seconds per module", ours=_rounded(middle["ours"]), peer=_rounded(middle["peer"])),
    ]


def peft_rows(size: Size, *, rounds: int) -> list[Row]:
    """Measure the truncated SVD beside PEFT's, of the same adapters with the same product."""
    tasks = updates(size.few, size.side, size.rank)
    names = [f"task{index}" for index in range(size.few)]
    config = peft.LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(size.side, size.side, bias=False)), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, task in zip(names, tasks, strict=True):
        layer.lora_A[name].weight.data.copy_(task.lora_A)
        layer.lora_B[name].weight.data.copy_(task.lora_B)
        assert layer.scaling[name] == task.scaling
    weight = 1 / size.few
    fresh = map("merged{}".format, itertools.count())

    def theirs() -> str:
        made = next(fresh)
        model.base_model.add_weighted_adapter(
            names, [weight] * size.few, made, combination_type="svd", svd_rank=size.rank
        )
        return made

    ours = partial(merged, "truncated_svd", tasks, weight=weight)
    _assert_equal(ours().delta_weight(), layer.get_delta_weight(theirs()).detach(), 1e-4)
    what = f"truncated SVD of {size.few} adapters r={size.rank} at {size.side}², peer PEFT's svd"
    return against(theirs, ours, what, 100, rounds=rounds)


def dense_knots_ties(tasks: Sequence[LowRankUpdate]) -> Tensor:
    """Align by the SVD of all updates side by side, take TIES of what is aligned, and go back; all of it dense.

    Returns:
        ΔW, in float64.
    """
    deltas = [task.scaling * (task.lora_B.double() @ task.lora_A.double()) for task in tasks]
    u, sigma, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = sigma > 1e-5 * sigma[0]
    aligned = torch.stack((sigma[kept, None] * vh[kept]).chunk(len(tasks), dim=1))  # (task, direction, n)
    sizes = aligned.abs().float()
    least = sizes.flatten(1).topk(int(DENSITY * sizes[0].numel()), dim=1).values[:, -1]
    trimmed = torch.where(sizes >= least[:, None, None], aligned, 0)
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    mean = torch.where(agree, trimmed, 0).sum(0) / agree.sum(0).clamp(min=1)
    return u[:, kept] @ mean


def knots_rows(size: Size, *, rounds: int) -> list[Row]:
    """Measure KnOTS × TIES beside its dense form, which gives the same product."""
    tasks = updates(size.few, size.side, size.rank)
    ours = partial(merged, "knots_ties", tasks, options=MergeOptions(density=DENSITY))
    _assert_equal(ours().delta_weight().double(), dense_knots_ties(tasks), 1e-4)
    what = f"KnOTS × TIES of {size.few} adapters r={size.rank} at {size.side}², peer its dense form"
    return against(partial(dense_knots_ties, tasks), ours, what, 20, rounds=rounds)


def cross_talk(delta: Tensor, tasks: Sequence[LowRankUpdate], known: Sequence[ModuleStatistics]) -> float:
    """Return Σᵢ tr(Sᵢ (ΔW - ΔWᵢ) Cᵢ (ΔW - ΔWᵢ)ᵀ)."""
    total = 0.0
    for task, each in zip(tasks, known, strict=True):
        assert each.inputs is not None
        assert each.outputs is not None
        rest = (delta - task.delta_weight()).double()
        total += float(torch.sum((each.outputs.double() @ rest) * (rest @ each.inputs.double())))
    return total


def rule_rows(size: Size, *, rounds: int) -> list[Row]:
    """Measure every rule alone on one module, `flow` with its bar."""
    tasks, known = updates(size.many, size.side, size.rank), moments(size.many, size.side)
    mean = torch.stack([task.delta_weight() for task in tasks]).mean(0)
    assert cross_talk(merged("flow", tasks, known).delta_weight(), tasks, known) < cross_talk(mean, tasks, known)
    rows = []
    for rule in sorted(RULES, key=lambda rule: (rule != "flow", rule)):
        seconds = in_turns({rule: partial(merged, rule, tasks, known)}, rounds=rounds)[rule]
        print(f"{rule}: {min(seconds):.3g} to {max(seconds):.3g} s in {rounds} rounds", flush=True)
        what = f"{rule} of {size.many} adapters r={size.rank} at {size.side}²: seconds per module"
        bar = {"limit": 2.0, "sense": "<="} if rule == "flow" else {}
        rows.append(Row(what=what, ours=_rounded(statistics.median(seconds)), **bar))
    return rows


MERGING = """
import sys
from pathlib import Path
from flowra_compose import Truncation, merge_folders
rank, out, *folders = sys.argv[1:]
weights = [1 / len(folders)] * len(folders)
merge_folders(folders, weights, out, rule="truncated_svd", truncation=Truncation(rank=int(rank)))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 2**20)
"""
"""The fresh process: what it imports and prints is all that it does beside the merge."""


def write_adapters(size: Size, root: Path) -> list[Path]:
    """Write random adapters of the model as PEFT would."""
    folders = []
    for task in range(size.many):
        generator = torch.Generator().manual_seed(task)
        tensors = {}
        for name, (m, n) in size.linear_layers().items():
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(size.rank, n, generator=generator) / n**0.5
            tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(m, size.rank, generator=generator)
        folder = root / f"task{task}"
        targets = sorted({name.rpartition(".")[2] for name in size.linear_layers()})
        config = peft.LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules=targets, task_type="CAUSAL_LM")
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    return folders


def model_rows(size: Size) -> list[Row]:
    """Measure the merge of the adapters of a whole model, from folders to a folder, in a fresh process."""
    with tempfile.TemporaryDirectory() as root:
        folders, out = write_adapters(size, Path(root)), Path(root) / "out"
        command = [sys.executable, "-c", MERGING, str(size.rank), str(out), *map(str, folders)]
        started = time.perf_counter()
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds = time.perf_counter() - started
        found = read_adapter(out).updates
        assert {name: update.shape for name, update in found.items()} == size.linear_layers()
        assert {update.rank for update in found.values()} == {size.rank}
    what = (
        f"truncated SVD of {size.many} adapters r={size.rank} of a 7 B shape, {len(found)} modules, folders to folder"
    )
    return [
        Row(what=f"{what}: seconds", ours=_rounded(seconds), limit=180, sense="<="),
        Row(what=f"{what}: peak memory in GiB", ours=_rounded(peak), limit=4 * 1e9 / 2**30, sense="<="),
    ]


def draw(size: Size, *, rounds: int, path: Path | None) -> list[Row]:
    """Measure some rules by the number of tasks and by rank on one module.

    Args:
        size: of the sweep.
        rounds: of which each point is the median.
        path: where the figure goes, if anywhere.

    Returns:
        The seconds of the smallest and the largest point of each line.
    """
    known = moments(max(size.few, *size.drawn_tasks), size.drawn_side)
    sweeps = {
        "tasks": (size.drawn_tasks, f"r = {size.rank}", lambda tasks: (tasks, size.rank)),
        "rank": (size.drawn_ranks, f"{size.few} tasks", lambda rank: (size.few, rank)),
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = []
    for axes, (name, (values, fixed, point)) in zip(figure.subplots(1, 2, sharey=True), sweeps.items(), strict=True):
        for rule in DRAWN:
            seconds = {}
            for value in values:
                tasks, rank = point(value)
                call = partial(merged, rule, updates(tasks, size.drawn_side, rank), known)
                seconds[value] = statistics.median(in_turns({rule: call}, rounds=rounds)[rule])
            axes.plot(list(seconds), list(seconds.values()), "o-", label=rule)
            for value in (values[0], values[-1]):
                what = f"{rule} at {size.drawn_side}², {fixed}, {name} {value}: seconds per module"
                rows.append(Row(what=what, ours=_rounded(seconds[value])))
        axes.set(xlabel=f"{name} ({fixed})", xscale="log", yscale="log", xticks=values, xticklabels=values)
        axes.minorticks_off()
    axes.legend(frameon=False)
    figure.axes[0].set_ylabel(f"seconds per module of {size.drawn_side} × {size.drawn_side}")
    if path is not None:
        figure.savefig(path, dpi=120, metadata={"Software": None})
    return rows


def publish(rows: Sequence[Row], *, command: str) -> None:
    """Put the rows between the marks in docs/results/merging_speed.md, and leave the rest as it is."""
    lines = ["| what | ours | peer | bar | |", "|---|---|---|---|---|"]
    verdicts = MappingProxyType({None: "", True: "holds", False: "**missed**"})
    signs = MappingProxyType({None: "", "<=": "≤ ", ">=": "≥ "})
    for row in rows:
        peer, limit = ("" if value is None else f"{value:g}" for value in (row.peer, row.limit))
        lines.append(f"| {row.what} | {row.ours:g} | {peer} | {signs[row.sense]}{limit} | {verdicts[row.holds]} |")
    path = DOCS / "merging_speed.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    table = f"`{command}`\n\n" + "\n".join(lines) + "\n"
    path.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


def _assert_equal(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    distance = float((ours - theirs).norm() / theirs.norm())
    assert distance <= tolerance, f"the two forms differ by {distance:.2e} of the norm: their times say nothing"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small shapes; nothing is written")
    arguments = parser.parse_args()
    size, rounds = QUICK if arguments.quick else Size(), arguments.rounds
    rows = [*peft_rows(size, rounds=rounds), *knots_rows(size, rounds=rounds), *rule_rows(size, rounds=rounds)]
    rows += model_rows(size)
    rows += draw(size, rounds=rounds, path=None if arguments.quick else DOCS / "merging_speed.png")
    if arguments.quick:
        print(json.dumps([(row.what, row.ours, row.peer) for row in rows], indent=1, ensure_ascii=False))
        return
    command = f"python benchmarks/bench_merge.py --rounds {rounds}"
    print(write("merge", rows, command=command))
    publish(rows, command=command)


if __name__ == "__main__":
    main()
