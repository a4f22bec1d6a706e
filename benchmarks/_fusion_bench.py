"""What the benchmarks of token-level fusion share: one base, adapters trained once, figures made once.

Everything is kept in a folder; a run that was broken off goes on where it stopped.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _precision import fast_dtype
from _segments import Examples, Nats, batch, mean_nats, nats
from _smollm2 import smollm2
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flowra_adapters import attach, match_modules, save_adapter
from flowra_compose import AdapterState, read_adapter
from flowra_compose.fusion import GateOptions, Gates, Routing, StaticWeights, fuse, gates_for, search_static_weights
from flowra_pipelines.training import data_order

__all__ = ["BATCH", "EPOCHS", "RANK", "Fused", "Workshop", "fit", "lora"]

logging.disable_progress_bar()

RANK, BATCH, EPOCHS = 16, 4, 5


class Workshop:
    """The base, adapters that are trained once, and figures that are made once, in one folder.

    The base is SmolLM2-135M-Instruct, a file of 4 bits that is read in bfloat16, or in float32 where that is faster;
    adapters and gates are float32.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.source = smollm2(folder)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.source)

    def fresh(self) -> PreTrainedModel:
        """Load the base."""
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=fast_dtype()).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base; whoever changes it puts it back."""
        return self.fresh()

    def adapter(self, name: str, rows: Callable[[], Examples]) -> AdapterState:
        """Read an adapter, LoRA of rank 16 on every linear layer; trained for one epoch if it is not there yet."""
        if not (self.folder / name).exists():
            model = self.fresh()
            fit(model, lora(model, seed=0), rows(), rate=5e-4, epochs=1, size=8, seed=0, what=name)
            save_adapter(model, self.folder / name, consumer="peft")
        return read_adapter(self.folder / name)

    def has(self, name: str) -> bool:
        """Say whether a figure has been measured."""
        return self._file(name).exists()

    def kept(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Return what was measured under a name, measured now if it was not."""
        file = self._file(name)
        if not file.exists():
            began = time.perf_counter()
            made = make()
            file.parent.mkdir(exist_ok=True)
            file.with_suffix(".partial").write_text(json.dumps(made))
            file.with_suffix(".partial").rename(file)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return json.loads(file.read_text())

    def _file(self, name: str) -> Path:
        return self.folder / "figures" / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Adapters on the base of a workshop, the last of which gates are born as, and sequences that need them in turn."""

    shop: Workshop
    adapters: Mapping[str, AdapterState]
    both: Examples
    """What gates learn from."""
    tuning: Examples
    """What settings are chosen on."""
    test: Examples
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the gates."""

    def judged(self, routing: Routing) -> Nats:
        """Judge a routing on the test."""
        with fuse(self.shop.model, self.adapters, routing):
            return nats(self.shop.model, self.test)

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
        one_rate: bool = False,
    ) -> Iterator[nn.Module]:
        """Train gates, or only some of them, on ``both``, and give the model with them.

        Biases learn ten times as fast, as in ``flowra fuse train``, or as published at one rate.

        Yields:
            The model; gates are taken away from it at the end of the ``with`` block.
        """
        named = [each for gate in which or [gates] for each in gate.named_parameters()]
        slow = [each for name, each in named if one_rate or not name.endswith("bias")]
        fast = [each for name, each in named if not one_rate and name.endswith("bias")]
        settings: dict[str, Any] = {"rate": rate, "epochs": EPOCHS, "size": BATCH, "seed": seed, "what": what}
        with fuse(self.shop.model, self.adapters, gates):
            fit(self.shop.model, slow, self.both, fast=fast, **settings)
            yield self.shop.model

    def searched(self, trials: int) -> list[float]:
        """Find the best fixed weights, on all that gates learn from and are chosen on, since nothing is trained."""

        def loss(weights: tuple[float, ...]) -> float:
            with fuse(self.shop.model, self.adapters, StaticWeights(weights)):
                found = mean_nats(nats(self.shop.model, [*self.both, *self.tuning]))
            print(f"  static: {weights} {found:.4f}", flush=True)
            return found

        return list(search_static_weights(loss, len(self.adapters), evaluations=trials).weights)


def lora(model: PreTrainedModel, *, seed: int) -> list[nn.Parameter]:
    """Put LoRA on every linear layer but the head, and return what it learns with."""
    names = [name for name in match_modules(model, ("all-linear",)) if name != "lm_head"]
    layers = attach(model, dict.fromkeys(names, RANK), scaling=2.0, generator=torch.Generator().manual_seed(seed))
    return [parameter for layer in layers.values() for parameter in layer.parameters()]


def fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Examples,
    *,
    rate: float,
    epochs: int,
    size: int,
    seed: int,
    what: str,
    fast: Sequence[nn.Parameter] = (),
) -> None:
    """Train with the recipe of LoRA-Flow: Adam, warmup over a fifth of the steps, cosine, gradients clipped at 1.

    Some parameters may learn ten times as fast as the others.
    """
    steps = epochs * math.ceil(len(rows) / size)
    rates = [rate, 10 * rate]
    groups = [{"params": [*each]} for each in (parameters, fast) if each]
    optimizer = AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    lengths = [len(row.tokens) for row in rows]
    order = data_order(len(rows), needed=steps * size, seed=seed, lengths=lengths, batch_size=size, window=8)
    torch.manual_seed(seed)
    warmup = math.ceil(0.2 * steps)
    for done in range(steps):
        chosen = order[done * size : (done + 1) * size]
        progress = (done - warmup) / max(1, steps - warmup)
        factor = (done + 1) / warmup if done < warmup else (1 + math.cos(math.pi * progress)) / 2
        for group, peak in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = peak * factor
        loss = model(**batch([rows[index] for index in chosen]), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([*parameters, *fast], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if done % 50 == 0:
            print(f"  {what}: step {done} of {steps}, loss {loss.item():.3f}", flush=True)
