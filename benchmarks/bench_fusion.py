"""What token-level fusion costs: generation, gate training, activation memory, and gates for a model of 70 B.

python benchmarks/bench_fusion.py [--rounds 7] [--tokens 32] [--batch 1]

SmolLM2-135M-Instruct in float32 with adapters of rank 16 on every linear layer, their factors drawn at random: speed
does not ask what they have learned. Generation is greedy, of the same number of tokens for all, in turn in every round;
ratios are medians over rounds. PEFT's X-LoRA refuses a cache of keys and values, so it generates without.

Saved bytes are what autograd keeps of one fused layer for the backward pass, counted tensor by tensor; gate training is
5 epochs over 200 rows of 70 tokens in batches of 4, timed on the first 20 of its 250 steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import peft
import torch
from _results import Row, write
from _smollm2 import smollm2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from flowra_adapters import attach, match_modules
from flowra_compose import AdapterState, LowRankUpdate, write_adapter
from flowra_compose.fusion import GateOptions, fuse, gates_for

logging.disable_progress_bar()

RANK, PROMPT = 16, 16


def adapters_of(model: nn.Module, count: int, *, rank: int = RANK) -> dict[str, AdapterState]:
    """Draw adapters on every linear layer but the head."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name in match_modules(model, ("all-linear",)) if name != "lm_head"]

    def update(layer: nn.Linear) -> LowRankUpdate:
        a = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        return LowRankUpdate(a, 0.01 * torch.randn(layer.out_features, rank, generator=generator), 2.0)

    return {
        f"adapter{index}": AdapterState(
            updates={name: update(cast(nn.Linear, model.get_submodule(name))) for name in names}, task_type="CAUSAL_LM"
        )
        for index in range(count)
    }


def generation(source: Path, folder: Path, *, rounds: int, tokens: int, batch: int) -> list[Row]:
    """Compare tokens per second: fused, one adapter of ours and of PEFT's, X-LoRA."""
    fused, ours, theirs, routed = (load(source) for _ in range(4))
    states = adapters_of(fused, 2)
    for name, state in states.items():
        write_adapter(state, folder / name)
    first = states["adapter0"]
    fuse(fused, states, gates_for(fused, states))
    layers = attach(ours, dict.fromkeys(first.updates, RANK), scaling=2.0)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(first.updates[name].lora_A)  # type: ignore[operator, union-attr]
            layer.lora_B.copy_(first.updates[name].lora_B)  # type: ignore[operator, union-attr]
    with_peft = peft.PeftModel.from_pretrained(theirs, str(folder / "adapter0"))
    routed.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=routed.config.hidden_size,
        adapters={str(index): str(folder / name) for index, name in enumerate(states)},  # PEFT counts them
        layerwise_scalings=True,
    )
    with_xlora = peft.get_peft_model(routed, config)
    prompt = torch.randint(10, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    models = {"fused": fused, "one": ours, "peft": with_peft, "xlora": with_xlora, "base": load(source)}
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda model=model, name=name: model.generate(  # type: ignore[misc]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=name != "xlora",
        )
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            made = call()
            assert made.shape == (batch, PROMPT + tokens)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
        print({name: round(times[-1], 2) for name, times in seconds.items() if times}, flush=True)

    def ratio(slow: str, fast: str) -> float:
        pairs = zip(seconds[slow], seconds[fast], strict=True)
        return round(statistics.median(one / other for one, other in pairs), 3)

    what = f"SmolLM2-135M, two adapters of rank {RANK}, batch {batch}, {tokens} tokens"
    rate = batch * tokens / statistics.median(seconds["fused"])
    return [
        Row(what=f"{what}: tokens per second, fused", ours=round(rate, 1)),
        Row(what=f"{what}: speed of one unmerged adapter of ours", ours=ratio("one", "fused"), limit=0.85, sense=">="),
        Row(what=f"{what}: speed of one unmerged adapter of PEFT", ours=ratio("peft", "fused")),
        Row(what=f"{what}: speed of PEFT's X-LoRA", ours=ratio("xlora", "fused"), limit=4, sense=">="),
        Row(what=f"{what}: speed of the base", ours=ratio("base", "fused")),
    ]


def training(source: Path, *, steps: int = 20) -> Row:
    """Extrapolate the minutes of gate training from its first steps."""
    model = load(source)
    states = adapters_of(model, 2)
    gates = gates_for(model, states)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3)
    rows = torch.randint(10, 1000, (4, 70), generator=torch.Generator().manual_seed(0))
    seconds = []
    with fuse(model, states, gates):
        for _ in range(steps):
            began = time.perf_counter()
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
    minutes = 250 * statistics.median(seconds) / 60
    what = "minutes of gate training, 200 rows of 70 tokens, 5 epochs, batch 4, k = 2, layer level"
    return Row(what=what, ours=round(minutes, 2), limit=10, sense="<=")


def memory() -> list[Row]:
    """Count what autograd saves of one block's layers, with the ranks' sum and with k growing."""

    def saved(count: int, rank: int) -> int:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
        )
        model = LlamaForCausalLM(config)
        states = adapters_of(model, count, rank=rank)
        seen: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.zeros(1, 128, dtype=torch.long)
        with fuse(model, states, gates_for(model, states)), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            made = model(input_ids=tokens, use_cache=False).logits
            fixed = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        del made
        return sum(size for place, size in seen.items() if place not in fixed)

    outputs = 128 * 4 * (256 * 4 + 512 * 2 + 256)  # bytes of the outputs of the seven layers for one adapter
    rows = [
        Row(
            what="bytes saved by 8 adapters of rank 2, over 2 of rank 8",
            ours=round(saved(8, 2) / saved(2, 8), 3),
            limit=1.1,
            sense="<=",
        )
    ]
    for count in (4, 8):
        grown = saved(count, 8) - saved(2, 8)
        extra_rank = 8 * (count - 2)
        rows.append(
            Row(
                what=f"bytes saved per token, layer and unit of rank, from 2 to {count} adapters of rank 8",
                ours=round(grown / 128 / 7 / extra_rank, 2),
            )
        )
        stacked = (count - 2) * outputs
        rows.append(
            Row(
                what=f"what {count - 2} more adapters save, as a share of their outputs' size",
                ours=round(grown / stacked, 3),
                limit=0.25,
                sense="<=",
            )
        )
    return rows


def large() -> list[Row]:
    """Count gates for Llama-3-70B's sizes, on the device `meta`."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        states = adapters_of_shapes(model)
        adapter = sum(update.parameters for update in states["a"].updates.values())
        counts: Mapping[str, int] = {
            level: gates_for(model, states, GateOptions(level=level)).num_parameters()  # type: ignore[arg-type]
            for level in ("layer", "step", "module")
        }
    what = "70 B (hidden 8192, 80 layers), k = 2: gate parameters"
    rows = [Row(what=f"{what}, level {level}", ours=float(count)) for level, count in counts.items()]
    return [
        *rows,
        Row(what=f"{what}, percent of an adapter of rank 64", ours=round(100 * counts["layer"] / adapter, 4)),
    ]


def adapters_of_shapes(model: nn.Module) -> dict[str, AdapterState]:
    """Return two adapters of rank 64 without values."""
    names = [name for name in match_modules(model, ("all-linear",)) if name != "lm_head"]
    layers = {name: cast(nn.Linear, model.get_submodule(name)) for name in names}
    updates = {
        name: LowRankUpdate(torch.empty(64, layer.in_features), torch.empty(layer.out_features, 64))
        for name, layer in layers.items()
    }
    return {name: AdapterState(updates=updates) for name in ("a", "b")}


def load(source: Path) -> PreTrainedModel:
    """Load the base."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = smollm2(Path(folder))
        rows = generation(source, Path(folder), rounds=chosen.rounds, tokens=chosen.tokens, batch=chosen.batch)
        rows += [training(source), *memory(), *large()]
    options = f"--rounds {chosen.rounds} --tokens {chosen.tokens} --batch {chosen.batch}"
    write("fusion", rows, command=f"python benchmarks/bench_fusion.py {options}")


if __name__ == "__main__":
    main()
