"""What calibration's statistics cost, in plain forward and backward passes over the same examples, and in memory.

python benchmarks/bench_analysis.py [--rounds N] [--memory]

The statistics are those that the stage calibrate takes of a trained probe: "default" is what it takes when it is not
told otherwise, rank measures of weights and updates included; "everything" adds the K-FAC gradient spectrum, the
diagonal Fisher, exact second moments of all inputs, and on 16 of the examples the Jacobians of all blocks, the largest
Hessian eigenvalue and the Hessian trace over the adapters. The plain pass is forward and backward of the base model
with all its parameters learning, as it comes from ``from_pretrained``; beside it, without a bar, a pass of the frozen
base, which computes no gradient of a weight. All are interleaved in one process; a figure is the median over rounds of
the ratio within the round. Peak memory is that of a fresh process for each, against five training steps of LoRA r = 8
on batches of the same examples, head and loss included.

Cost in examples and in layers is measured on Llama-shaped models and drawn in ``docs/results/analysis.png``.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import bench_kfac
import bench_step
import torch
import transformers
from _results import Row, write
from matplotlib.figure import Figure
from torch import Tensor, nn

import flowra_adapters
from flowra_allocation import BottleneckGram
from flowra_analysis import (
    KFAC,
    ActivationSpectra,
    DiagonalFisher,
    EmpiricalFisher,
    GradientSpectra,
    HessianProducts,
    Signals,
    block_jacobians,
    find_blocks,
    hutchinson_trace,
    largest_eigenvalue,
)
from flowra_pipelines.config_sections import CalibrationConfig
from flowra_pipelines.estimators import KINDS, estimate
from flowra_pipelines.stages.calibrate import activation_spectra, spectra_of
from flowra_pipelines.stages.setting import Layers
from flowra_pipelines.tasks import TASKS

RANK, SEED = 4, 0
SMALL = 16
"""Examples for Jacobians and the Hessian."""
FIGURE = Path(__file__).parents[1] / "docs" / "results" / "analysis.png"
Batch = dict[str, Tensor]


class Subject:
    """A model, its examples, and the statistics that are taken of it."""

    def __init__(self, model: nn.Module, task: str, batches: list[Batch], names: Sequence[str]) -> None:
        self.model, self.batches, self.task = model.eval(), batches, TASKS[task]
        self.setting: Any = SimpleNamespace(task=self.task)
        found = flowra_adapters.match_modules(model, names)
        shapes = {name: flowra_adapters.linear_size(model.get_submodule(name)) for name in found}
        costs = {name: sum(shape) for name, shape in shapes.items()}
        self.layers = Layers(costs=costs, shapes=shapes, base_parameters=1, head_parameters=0, budget=1)

    def adapt(self) -> None:
        """Attach a probe whose updates are not zero, and freeze the base."""
        generator = torch.Generator().manual_seed(SEED)
        made = flowra_adapters.attach(self.model, dict.fromkeys(self.layers.costs, RANK), scaling=2.0)
        with torch.no_grad():
            for one in made.values():
                one.lora_B.normal_(std=1e-3, generator=generator)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each example's own loss."""
        return self.task.losses(model, batch)[0]

    def plain(self) -> None:
        """Forward and backward, all parameters learning."""
        for batch in self.batches:
            self.losses(self.model, batch).sum().backward()
            self.model.zero_grad(set_to_none=True)

    def default(self) -> None:
        """What calibrate takes by default."""
        kinds = CalibrationConfig().estimators
        also = {"activation": activation_spectra()}
        found = estimate(self.model, self.setting, self.layers, self.batches, kinds, also=also)
        spectra_of(self.model, self.layers, found)

    def everything(self) -> None:
        """All that there is, in one go."""
        also = {
            "activation": ActivationSpectra.init(),
            "rows": DiagonalFisher.init(reduction="rows"),
            "columns": DiagonalFisher.init(reduction="columns"),
        }
        found = estimate(self.model, self.setting, self.layers, self.batches, KINDS, also=also)
        spectra_of(self.model, self.layers, found)
        few = {key: value[:SMALL] for key, value in self.batches[0].items()}
        inputs = {key: value for key, value in few.items() if key != "labels"}
        block_jacobians(
            self.model,
            [inputs],
            lambda model, batch: model(**batch),
            find_blocks(self.model),
            mask=lambda batch: batch["attention_mask"],
        )
        parameters = {name: each for name, each in self.model.named_parameters() if ".lora_" in name}
        curvature = HessianProducts(self.model, few, self.losses, parameters)
        size = sum(each.numel() for each in parameters.values())
        largest_eigenvalue(curvature.product, torch.randn(size, generator=torch.Generator().manual_seed(SEED)))
        hutchinson_trace(
            lambda block: torch.stack([curvature.product(each) for each in block.T], 1), size, num_probes=8, seed=SEED
        )


def minilm(*, examples: int = 128, size: int = 16) -> Subject:
    """Return all-MiniLM-L6-v2 with a new head and texts of 64 tokens."""
    model, _, names = bench_step.minilm()
    classifier = transformers.BertForSequenceClassification(model.config)
    classifier.bert.load_state_dict(model.state_dict(), strict=False)
    return Subject(classifier, "sequence_classification", _batches(examples, size, 64, model.config.vocab_size), names)


def smollm2(
    *, examples: int = 128, size: int = 16, layers: int = 30, dtype: torch.dtype = torch.float32, tokens: int = 32
) -> Subject:
    """Return a decoder of SmolLM2-135M's shape (random weights: only shapes count here)."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        use_cache=False,
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Subject(model, "causal_lm", _batches(examples, size, tokens, config.vocab_size, language=True), names)


def _batches(examples: int, size: int, tokens: int, vocabulary: int, *, language: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(SEED)
    made = []
    for start in range(0, examples, size):
        rows = min(size, examples - start)
        ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
        labels = ids if language else torch.randint(0, 2, (rows,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "MiniLM-L6, 128 × 64 tokens": minilm,
    "SmolLM2-135M, 128 × 32 tokens": smollm2,
    "SmolLM2-135M in bf16, 128 × 32 tokens": lambda: smollm2(dtype=torch.bfloat16),
}


def ratios(build: Callable[[], Subject], kinds: Sequence[str], *, rounds: int) -> dict[str, float]:
    """Return the median ratio of each kind of pass to the plain one."""
    learning, measured = build(), build()
    measured.adapt()
    frozen = build()
    frozen.model.requires_grad_(False)
    frozen.model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: output.requires_grad_())
    passes = {"plain": learning.plain, "frozen": frozen.plain} | {kind: getattr(measured, kind) for kind in kinds}
    for batches in (learning, frozen, measured):
        held, batches.batches = batches.batches, batches.batches[:1]
        batches.plain()
        batches.batches = held
    found: dict[str, list[float]] = {kind: [] for kind in ("frozen", *kinds)}
    for turn in range(rounds):
        seconds = {}
        for kind in passes if turn % 2 else [*passes][::-1]:
            gc.collect()
            started = time.perf_counter()
            passes[kind]()
            seconds[kind] = time.perf_counter() - started
        for kind, each in found.items():
            each.append(seconds[kind] / seconds["plain"])
        print("  " + ", ".join(f"{kind} {value:.2f} s" for kind, value in seconds.items()), flush=True)
    return {kind: statistics.median(each) for kind, each in found.items()}


def peak_memory(name: str, what: Literal["default", "step"]) -> float:
    """Return the peak resident memory in MB of a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps([name, what])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _child(name: str, what: str) -> None:
    if what == "default":
        subject = SUBJECTS[name]()
        subject.adapt()
        subject.default()
    else:
        subject = SUBJECTS[name]()
        flowra_adapters.attach(subject.model, dict.fromkeys(subject.layers.costs, bench_step.RANK), scaling=2.0)
        subject.model.train()
        trained = [each for each in subject.model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        for batch in subject.batches[:5]:
            subject.losses(subject.model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    print(bench_step.peak_resident())


def costs(name: str, *, rounds: int, everything: bool) -> list[Row]:
    """Measure time and memory on one model."""
    print(name, flush=True)
    found = ratios(SUBJECTS[name], ["default", "everything"] if everything else ["default"], rounds=rounds)
    against_frozen = found["default"] / found["frozen"]
    rows = [
        Row(what=f"{name}: default statistics over plain passes", ours=_round(found["default"]), limit=2, sense="<="),
        Row(what=f"{name}: default statistics over passes of the frozen base", ours=_round(against_frozen)),
    ]
    if everything:
        what = f"{name}: everything together over plain passes"
        rows.append(Row(what=what, ours=_round(found["everything"]), limit=12, sense="<="))
    return [*rows, memory(name)]


def memory(name: str) -> Row:
    """Compare the peaks on one model."""
    default, step = peak_memory(name, "default"), peak_memory(name, "step")
    print(f"  peak MB: default {default:.0f}, step {step:.0f}", flush=True)
    what = f"{name}: peak memory of default statistics over a LoRA training step's"
    return Row(what=what, ours=_round(default / step), limit=1.2, sense="<=")


def scaling(*, rounds: int) -> list[Row]:
    """Measure how the default statistics' time grows with examples and with layers, less what is there at none."""
    by_examples = {
        count: _seconds(lambda count=count: smollm2(examples=count, layers=4), rounds) for count in (16, 32, 64, 128)
    }
    by_layers = {
        count: _seconds(lambda count=count: smollm2(examples=16, layers=count), rounds) for count in (2, 4, 8, 16)
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    rows = []
    for axes, (label, found) in zip(
        figure.subplots(1, 2), {"examples": by_examples, "layers": by_layers}.items(), strict=True
    ):
        counts, seconds = list(found), list(found.values())
        slope, start = statistics.linear_regression(counts, seconds)
        error = max(abs(start + slope * count - value) / value for count, value in found.items())
        axes.plot(counts, seconds, "o", label="measured")
        axes.plot([0, counts[-1]], [start, start + slope * counts[-1]], label="line of least squares")
        axes.set(xlabel=label, ylabel="seconds, default statistics", xlim=0, ylim=0)
        axes.legend(frameon=False)
        rows.append(Row(what=f"cost in {label}: largest distance from a line, relative", ours=_round(error)))
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120, metadata={"Software": None})
    return rows


def components() -> list[Row]:
    """Measure by which power each statistic's time grows with the width m = n, the tokens and the rank.

    Returns:
        A row for each; what the power should be (``peer``) counts multiplications.
    """
    widths, tokens, ranks = (256, 512, 1024, 2048), (512, 1024, 2048, 4096), (32, 64, 128, 256)
    rows = []
    statistics: dict[str, tuple[Any, int]] = {
        "Fisher trace by ghost norms": (EmpiricalFisher.init(), 1),
        "gradient sketch": (GradientSpectra.init(size=16), 1),
        "diagonal Fisher": (DiagonalFisher.init(), 2),
        "K-FAC factors": (KFAC.init(), 2),
    }
    for name, (begun, by_width) in statistics.items():
        by = {width: _fastest(partial(begun.update, "", _signals(width, 512))) for width in widths}
        rows.append(Row(what=f"{name}: power of the width", ours=_power(by), peer=by_width))
        by = {count: _fastest(partial(begun.update, "", _signals(256, count))) for count in tokens}
        rows.append(Row(what=f"{name}: power of the tokens", ours=_power(by), peer=1))
    z = {rank: torch.randn(4096, rank) for rank in ranks}
    by = {rank: _fastest(partial(BottleneckGram.of, each, each, examples=64)) for rank, each in z.items()}
    rows.append(Row(what="bottleneck Grams: power of the rank", ours=_power(by), peer=2))
    return rows


def _signals(width: int, count: int) -> Signals:
    x, g = (torch.randn(count // 32, 32, width, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return Signals(x, g)


def _power(seconds: dict[int, float]) -> float:
    """Return the slope of the logarithms."""
    sizes = [math.log(size) for size in seconds]
    return _round(statistics.linear_regression(sizes, [math.log(each) for each in seconds.values()]).slope)


def _fastest(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _seconds(build: Callable[[], Subject], rounds: int) -> float:
    subject = build()
    subject.adapt()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        subject.default()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _round(value: float) -> float:
    return round(value, 3)


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure the peaks again; the other figures stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*json.loads(arguments.child))
        return
    command = f"python benchmarks/bench_analysis.py --rounds {arguments.rounds}"
    if arguments.memory:
        print(write("analysis", [memory(name) for name in SUBJECTS], command=f"{command} --memory", part=True))
        return
    small, whole, half = SUBJECTS
    rows = costs(small, rounds=arguments.rounds, everything=True)
    rows += costs(whole, rounds=arguments.rounds, everything=False)
    rows += costs(half, rounds=arguments.rounds, everything=False)
    rows += scaling(rounds=2)
    rows += components()
    rows += bench_kfac.rows(rounds=11)
    print(write("analysis", rows, command=command))


if __name__ == "__main__":
    main()
