"""What the benchmarks of token-level fusion share: one base, adapters trained once, figures made once.

Everything is kept in a folder; a run that was broken off goes on where it stopped.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import peft
import torch
from _precision import fast_dtype
from _segments import Examples, Nats, batch, mean_nats, nats
from _shared_work import Elsewhere, claimed
from _smollm2 import smollm2
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flowra_adapters import attach, match_modules, save_adapter
from flowra_analysis import KFAC, measure
from flowra_compose import AdapterState, ModuleStatistics, merge_updates, read_adapter
from flowra_compose.fusion import GateOptions, Gates, Routing, StaticWeights, fuse, gates_for, search_static_weights
from flowra_pipelines.tasks import TASKS
from flowra_pipelines.training import data_order

__all__ = ["RANK", "Fused", "Group", "Missing", "Workshop", "lora"]

logging.disable_progress_bar()

RANK, BATCH, EPOCHS = 16, 4, 5
FURTHER = 2
"""How often a search for a learning rate goes on while the best one is at the edge of what was tried."""
At = Callable[[float, int], dict[str, Nats]]
"""Trains at a learning rate and a seed; gives what is lost on the rows for ``tuning`` and for the ``test``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Parameters that learn at one rate."""

    parameters: Sequence[nn.Parameter]
    rate: float
    decay: float = 0.0


class Missing(Exception):
    """A figure is not there."""


class Workshop:
    """The base, adapters that are trained once, and figures that are made once, in one folder.

    The base is SmolLM2-135M-Instruct, a file of 4 bits, read in float32; adapters, gates and classifiers are float32,
    too. All products of a folder are of one precision, that of its first run: bfloat16 (autocast) where that is faster.

    Args:
        folder: of all that is kept.
        quick: whether the whole path is only tried: in ``folder/quick``, one epoch, one learning rate.
        finished: whether nothing is measured that is not there.
    """

    def __init__(self, folder: Path, *, quick: bool, finished: bool = False) -> None:
        folder = folder / "quick" if quick else folder
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.quick, self.finished = folder, quick, finished
        self.source = smollm2(folder)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.source)
        known = folder / "precision"
        if not known.exists():
            known.write_text(str(fast_dtype()))
        self._half = known.read_text() == str(torch.bfloat16)

    def multiplying(self) -> torch.autocast:
        """Within the block, multiply in the folder's precision."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._half)

    def fresh(self) -> PreTrainedModel:
        """Load the base."""
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base; whoever changes it puts it back."""
        return self.fresh()

    def nats(self, model: nn.Module, rows: Examples) -> Nats:
        """Return what a model loses on each row."""
        with self.multiplying():
            return nats(model, rows)

    def adapter(self, name: str, rows: Callable[[], Examples]) -> AdapterState:
        """Read an adapter, LoRA of rank 16 on every linear layer; trained for one epoch if it is not there yet."""

        def train() -> int:
            model, examples = self.fresh(), rows()
            learning = Group(parameters=lora(model, seed=0), rate=5e-4)
            self.fit(model, [learning], examples, epochs=1, size=8, seed=0, what=name)
            save_adapter(model, self.folder / name, consumer="peft")
            return len(examples)

        self.kept(f"trained {name}", train)
        return read_adapter(self.folder / name)

    def fit(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        rows: Examples,
        *,
        seed: int,
        what: str,
        epochs: int | None = None,
        size: int = BATCH,
        eps: float = 1e-8,
    ) -> None:
        """Train with LoRA-Flow's schedule: Adam, warmup over a fifth of the steps, cosine, gradients clipped at 1."""
        epochs = epochs or (1 if self.quick else EPOCHS)
        steps = epochs * math.ceil(len(rows) / size)
        settings = [{"params": [*each.parameters], "weight_decay": each.decay} for each in groups]
        optimizer = AdamW(settings, betas=(0.9, 0.95), eps=eps)
        lengths = [len(row.tokens) for row in rows]
        order = data_order(len(rows), needed=steps * size, seed=seed, lengths=lengths, batch_size=size, window=8)
        torch.manual_seed(seed)
        warmup = math.ceil(0.2 * steps)
        learning = [parameter for each in groups for parameter in each.parameters]
        for done in range(steps):
            chosen = order[done * size : (done + 1) * size]
            progress = (done - warmup) / max(1, steps - warmup)
            factor = (done + 1) / warmup if done < warmup else (1 + math.cos(math.pi * progress)) / 2
            for setting, each in zip(optimizer.param_groups, groups, strict=True):
                setting["lr"] = each.rate * factor
            with self.multiplying():
                loss = model(**batch([rows[index] for index in chosen]), use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if done % 50 == 0:
                print(f"  {what}: step {done} of {steps}, loss {loss.item():.3f}", flush=True)

    def tuned(self, name: str, rates: Sequence[float], at: At) -> float:
        """Find the best learning rate by the rows for tuning, with the first seed.

        Args:
            name: of what learns.
            rates: three, evenly spaced on a logarithmic scale, all of which are tried; while the best one is at the
                edge, the next one beyond is, too, at most twice.
            at: trains.

        Returns:
            The rate.
        """
        if self.quick:
            self.kept(f"{name} {rates[1]:g} 0", partial(at, rates[1], 0))
            return rates[1]
        step, tried = rates[1] / rates[0], list(rates)
        for further in range(FURTHER + 1):
            lost = {rate: mean_nats(self.kept(f"{name} {rate:g} 0", partial(at, rate, 0))["tuning"]) for rate in tried}
            best = min(tried, key=lost.__getitem__)
            if further == FURTHER or min(tried) < best < max(tried):
                break
            tried.append(best / step if best == min(tried) else best * step)
        return best

    def best_rate(self, name: str) -> float | None:
        """Return the best of the learning rates that have been tried; None if none has been."""
        files = sorted((self.folder / "figures").glob(f"{name} * 0.json"))
        tried = {float(rate): each for each in files if _is_number(rate := each.stem[len(name) + 1 : -2])}
        lost = {rate: mean_nats(self.kept(each.stem, dict)["tuning"]) for rate, each in tried.items()}
        return min(lost, key=lost.__getitem__) if lost else None

    def has(self, name: str) -> bool:
        """Say whether a figure has been measured."""
        return self._file(name).exists()

    def kept(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Return what was measured under a name, measured now if it was not.

        Raises:
            Elsewhere: if another process is measuring it.
            Missing: if it is not there and nothing is to be measured.
        """
        file = self._file(name)
        if not file.exists():
            if self.finished:
                raise Missing(name)
            with claimed(file) as mine:
                if mine:
                    self._measure(name, make, file)
            if not file.exists():
                raise Elsewhere(name)
        return json.loads(file.read_text())["figure"]

    def _measure(self, name: str, make: Callable[[], Any], file: Path) -> None:
        began = time.perf_counter()
        made = make()
        seconds = round(time.perf_counter() - began, 1)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"seconds": seconds, "figure": made}))
        partial.rename(file)
        print(f"{name}: {seconds:.0f} s", flush=True)

    def hours(self, names: Iterable[str]) -> float:
        """Add up what the figures of these names have taken; ``*`` stands for anything."""
        files = {file for name in names for file in (self.folder / "figures").glob(f"{name}.json")}
        return sum(json.loads(file.read_text())["seconds"] for file in files) / 3600

    def _file(self, name: str) -> Path:
        return self.folder / "figures" / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Adapters on the base of a workshop, the last of which gates are born as, and sequences that need them in turn."""

    shop: Workshop
    adapters: Mapping[str, AdapterState]
    """By the folder that each is in."""
    both: Examples
    """What gates learn from."""
    tuning: Examples
    """What settings are chosen on."""
    test: Examples
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the gates."""

    # what does not learn

    def judged(self, routing: Routing) -> Nats:
        """Judge a routing on the test."""
        with fuse(self.shop.model, self.adapters, routing):
            return self.shop.nats(self.shop.model, self.test)

    def searched(self, trials: int, *, begin: Sequence[float] | None = None) -> list[float]:
        """Find the best fixed weights, on all that gates learn from and are chosen on, since nothing is trained.

        Args:
            trials: of weights.
            begin: other weights to try at first.

        Returns:
            One for each adapter.
        """

        def loss(weights: tuple[float, ...]) -> float:
            with fuse(self.shop.model, self.adapters, StaticWeights(weights)):
                found = mean_nats(self.shop.nats(self.shop.model, [*self.both, *self.tuning]))
            print(f"  static: {weights} {found:.4f}", flush=True)
            return found

        starts = [] if begin is None else [begin]
        return list(search_static_weights(loss, len(self.adapters), evaluations=trials, starts=starts).weights)

    def merged_by_flow(self, own: Mapping[str, Examples]) -> Nats:
        """Judge the merge by `flow`, with statistics of each adapter's own examples."""
        known = [self._statistics(state, own[name]) for name, state in self.adapters.items()]
        updates = [one.updates for one in self.adapters.values()]
        merged = AdapterState(updates=merge_updates(updates, [1.0] * len(updates), rule="flow", statistics=known))
        with fuse(self.shop.model, {"merged": merged}, StaticWeights([1.0])):
            return self.shop.nats(self.shop.model, self.test)

    def _statistics(self, state: AdapterState, rows: Examples) -> dict[str, ModuleStatistics]:
        """Measure C and S under an adapter; the targets are drawn from the model."""
        model = self.shop.fresh()
        with torch.no_grad():
            for name, update in state.updates.items():
                model.get_submodule(name).weight += update.delta_weight()
        task, generator = TASKS["causal_lm"], torch.Generator().manual_seed(0)
        seen = measure(
            model,
            [batch(rows[first : first + 8]) for first in range(0, len(rows), 8)],
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

    # what learns

    def at(self, kind: str, rate: float, seed: int) -> dict[str, Nats]:
        """Train one of what learns, and judge it."""
        with self.learned(kind, rate, seed) as model:
            return {name: self.shop.nats(model, rows) for name, rows in (("tuning", self.tuning), ("test", self.test))}

    @contextmanager
    def learned(self, kind: str, rate: float, seed: int) -> Iterator[nn.Module]:
        """Train ``xlora``, ``few-shot``, gates as ``published`` or with our recipe, on ``both``.

        Yields:
            The model.
        """
        what = f"{kind} {rate:g} seed {seed}"
        if kind in ("xlora", "few-shot"):
            yield self._routed(rate, seed, what) if kind == "xlora" else self._few_shot(rate, seed, what)
            return
        with self.trained(self.gates(seed=seed), rate, seed, what, published=kind == "published") as model:
            yield model

    def gates(self, *, seed: int) -> Gates:
        """Make gates that have learned nothing."""
        options = GateOptions(initial="primary", primary=len(self.adapters) - 1, **self.options)
        return gates_for(self.shop.model, self.adapters, options, seed=seed)

    @contextmanager
    def trained(
        self,
        gates: Gates,
        rate: float,
        seed: int,
        what: str,
        *,
        which: Sequence[nn.Module] = (),
        published: bool = False,
    ) -> Iterator[nn.Module]:
        """Train gates, or only some of them, and give the model with them.

        Biases learn ten times as fast and do not decay, as in ``flowra fuse train``, or as published at one rate and
        decay.

        Yields:
            The model; gates are taken away from it at the end of the ``with`` block.
        """
        named = [each for gate in which or [gates] for each in gate.named_parameters()]
        biases = [each for name, each in named if name.endswith("bias")]
        weights = [each for name, each in named if not name.endswith("bias")]
        of_biases = {"rate": rate, "decay": 0.1} if published else {"rate": 10 * rate}
        groups = [Group(parameters=weights, rate=rate, decay=0.1), Group(parameters=biases, **of_biases)]
        with fuse(self.shop.model, self.adapters, gates):
            self.shop.fit(self.shop.model, groups, self.both, seed=seed, what=what, eps=1e-5)
            yield self.shop.model

    def _few_shot(self, rate: float, seed: int, what: str) -> nn.Module:
        """Train a new LoRA of rank 16 on the base."""
        model = self.shop.fresh()
        learning = Group(parameters=lora(model, seed=seed), rate=rate)
        self.shop.fit(model, [learning], self.both, seed=seed, what=what)
        return model

    def _routed(self, rate: float, seed: int, what: str) -> nn.Module:
        """Train PEFT's X-LoRA."""
        torch.manual_seed(seed)
        base = self.shop.fresh()
        base.config.use_cache = False
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters={str(index): str(self.shop.folder / name) for index, name in enumerate(self.adapters)},
            layerwise_scalings=True,
        )  # PEFT counts the adapters
        model = peft.get_peft_model(base, config)
        learning = [each for each in model.parameters() if each.requires_grad]
        assert all(each.dtype is torch.float32 for each in learning)
        self.shop.fit(model, [Group(parameters=learning, rate=rate)], self.both, seed=seed, what=what)
        return model.eval()


def lora(model: PreTrainedModel, *, seed: int) -> list[nn.Parameter]:
    """Put LoRA on every linear layer but the head, and return what it learns with."""
    names = [name for name in match_modules(model, ("all-linear",)) if name != "lm_head"]
    layers = attach(model, dict.fromkeys(names, RANK), scaling=2.0, generator=torch.Generator().manual_seed(seed))
    return [parameter for layer in layers.values() for parameter in layer.parameters()]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
