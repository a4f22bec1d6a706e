"""One training step of every adapter method against its frozen lower bound, with PEFT's beside it; latency; memory.

python benchmarks/bench_adapters.py [--rounds N] [--narrow]

Set-up as in ``bench_step.py``: rank 8 on every linear layer, heads out, `model.train()`; a step is forward, backward,
AdamW and clearing the gradients; the lower bound is the same model frozen. All variants are interleaved in one process;
a figure is the median over rounds of the ratio within the round. The SVD form is trained with its regulariser, as
PEFT's AdaLoRA is. Convolutions: a ResNet-18, PEFT's LoRA of rank 8 on every 3 × 3 convolution against Tucker updates
of the largest rank that costs no more parameters. Latency: MiniLM, 64 tokens, no gradients, ratio to the bare model.
Narrow products: N × k times k × r as `flowra_adapters.fused.times_narrow` does it, ratio to `@`.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace

import peft
import torch
import transformers
from _results import Row, write
from bench_step import ALPHA, MODELS, RANK, Build, Step, frozen, peak_resident
from torch import Tensor, nn

import flowra_adapters
from flowra_adapters.fused import times_narrow

ORTHOGONALITY = 0.5  # PEFT's default weight


class WithLoss(nn.Module):
    """A model that gives its loss itself: PEFT's AdaLoRA adds its regulariser to nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Return the loss of ``bench_step.py``."""
        return SimpleNamespace(loss=self.inner(input_ids=input_ids).last_hidden_state.square().mean())


def _trained(model: nn.Module, tokens: Tensor, extra: Callable[[], Tensor] | None = None) -> Step:
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3, fused=True)

    def step() -> None:
        loss = model(input_ids=tokens).loss
        (loss if extra is None else loss + ORTHOGONALITY * extra()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(build: Build, method: str) -> Step:
    """Attach a method of flowra-adapters."""
    inner, tokens, names = build()
    model = WithLoss(inner)
    found = flowra_adapters.attach(model, dict.fromkeys(names, RANK), method=method, scaling=ALPHA / RANK)
    regulariser = None
    if method == "svd":

        def regulariser() -> Tensor:
            return flowra_adapters.orthogonality(found.values())

    return _trained(model, tokens, regulariser)


def peers(build: Build, config: Callable[..., peft.PeftConfig]) -> Step:
    """Attach a method of PEFT."""
    inner, tokens, names = build()
    return _trained(peft.get_peft_model(WithLoss(inner), config(target_modules=names, lora_alpha=ALPHA)), tokens)


def _lora(**options: object) -> peft.PeftConfig:
    return peft.LoraConfig(r=RANK, **options)


def _dora(**options: object) -> peft.PeftConfig:
    return peft.LoraConfig(r=RANK, use_dora=True, **options)


def _adalora(**options: object) -> peft.PeftConfig:
    return peft.AdaLoraConfig(init_r=RANK, target_r=RANK, total_step=1000, orth_reg_weight=ORTHOGONALITY, **options)


VARIANTS: Mapping[str, Callable[[Build], Step]] = {
    "frozen": frozen,
    "lora": lambda build: ours(build, "lora"),
    "dora": lambda build: ours(build, "dora"),
    "svd": lambda build: ours(build, "svd"),
    "flora": lambda build: ours(build, "flora"),
    "peft lora": lambda build: peers(build, _lora),
    "peft dora": lambda build: peers(build, _dora),
    "peft adalora": lambda build: peers(build, _adalora),
}
PEER = {"lora": "peft lora", "dora": "peft dora", "svd": "peft adalora"}
LIMITS = {"lora": 1.12, "dora": 1.25, "svd": 1.20}


def interleaved(steps: Mapping[str, Step], *, rounds: int) -> dict[str, list[float]]:
    """Run the steps in turns, in a changing order; the seconds of each, round by round."""
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(rounds):
        order = order[1:] + order[:1] if turn % 2 else order[::-1]
        gc.collect()
        for name in order:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """Return the median over rounds of the ratio within the round, and print its quartiles."""
    each = [one / other for one, other in zip(seconds[name], seconds[to], strict=True)]
    low, middle, high = statistics.quantiles(each, n=4)
    print(f"  {name} / {to}: {middle:.3f} (quartiles {low:.3f} – {high:.3f}, {len(each)} rounds)", flush=True)
    return round(middle, 3)


def training_rows(rounds: int) -> list[Row]:
    """Measure steps and peak memory of every linear method on both models."""
    rows = []
    for model, build in MODELS.items():
        print(model)
        seconds = interleaved({name: make(build) for name, make in VARIANTS.items()}, rounds=rounds)
        for name, limit in LIMITS.items():
            what = f"{model}: {name} r={RANK} step, ratio to frozen forward and backward"
            ours_, peer = ratio(seconds, name, "frozen"), ratio(seconds, PEER[name], "frozen")
            rows.append(Row(what=what, ours=ours_, peer=peer, limit=limit, sense="<="))
        what = f"{model}: FLoRA r={RANK} step, ratio to our LoRA's"
        rows.append(Row(what=what, ours=ratio(seconds, "flora", "lora"), limit=1.05, sense="<="))
        for name, peer_name in PEER.items():
            memory = {each: peak_memory(model, each) for each in (name, peer_name)}
            print(f"  peak MB: {memory}", flush=True)
            what = f"{model}: {name} peak memory of a fresh process, ratio to PEFT's"
            value = round(memory[name] / memory[peer_name], 3)
            rows.append(Row(what=what, ours=value, peer=1.0, limit=1.0, sense="<="))
    return rows


def peak_memory(model: str, variant: str) -> float:
    """Return the peak resident memory in MB of a fresh process that makes five steps."""
    command = [sys.executable, __file__, "--child", json.dumps([model, variant])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def convolution_rows(rounds: int) -> list[Row]:
    """Measure Tucker updates of a ResNet against PEFT's LoRA of as many parameters, and both memories."""
    seconds = interleaved({"tucker": tucker(), "peft conv": peft_conv()}, rounds=rounds)
    what = "ResNet-18, 8 × 3 × 64 × 64: Tucker step, ratio to PEFT's LoRA r=8 on convolutions of as many parameters"
    rows = [Row(what=what, ours=ratio(seconds, "tucker", "peft conv"), peer=1.0, limit=1.0, sense="<=")]
    memory = {name: peak_memory("", name) for name in ("tucker", "peft conv")}
    print(f"  peak MB: {memory}", flush=True)
    what = "ResNet-18: Tucker peak memory of a fresh process, ratio to PEFT's LoRA"
    value = round(memory["tucker"] / memory["peft conv"], 3)
    return [*rows, Row(what=what, ours=value, peer=1.0, limit=1.0, sense="<=")]


def resnet() -> tuple[nn.Module, Tensor]:
    """Return a ResNet-18 of random weights and images."""
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    torch.manual_seed(0)
    return transformers.ResNetModel(config), torch.randn(8, 3, 64, 64)


def _convolution_step(model: nn.Module, images: Tensor) -> Step:
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3, fused=True)

    def step() -> None:
        model(pixel_values=images).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {
        name: each for name, each in model.named_modules() if isinstance(each, nn.Conv2d) and each.kernel_size == (3, 3)
    }


def tucker() -> Step:
    """Attach Tucker updates, each of the largest rank that costs no more than PEFT's LoRA on the same layer."""
    model, images = resnet()
    ranks = {}
    for name, layer in _convolutions(model).items():
        operator = flowra_adapters.operator_of(layer)
        assert operator is not None
        allowed = RANK * (operator.in_size + operator.out_size)
        one = flowra_adapters.METHODS["flora"].adapter(
            operator, rank=1, scaling=1.0, dropout=0.0, dtype=torch.float32, generator=torch.Generator()
        )
        ranks[name] = max(r for r in range(1, operator.max_rank + 1) if one.cost(r) <= allowed)
    found = flowra_adapters.attach(model, ranks, method="flora", scaling=ALPHA / RANK)
    print(f"  Tucker: {sum(one.num_parameters() for one in found.values())} parameters, ranks {sorted(ranks.values())}")
    return _convolution_step(model, images)


def peft_conv() -> Step:
    """Attach PEFT's LoRA to the same layers."""
    model, images = resnet()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(_convolutions(model)))
    adapted = peft.get_peft_model(model, config)
    print(f"  PEFT: {sum(p.numel() for p in adapted.parameters() if p.requires_grad)} parameters")
    return _convolution_step(adapted, images)


def latency_rows(rounds: int) -> list[Row]:
    """Measure inference with LoRA, unmerged and merged, against the bare model."""
    rows = []
    for batch in (1, 32):
        steps: dict[str, Step] = {}
        for name in ("bare", "unmerged", "merged", "peft unmerged", "peft merged"):
            model, tokens, names = next(iter(MODELS.values()))()
            if name in ("unmerged", "merged"):
                flowra_adapters.attach(model, dict.fromkeys(names, RANK), scaling=ALPHA / RANK)
                if name == "merged":
                    flowra_adapters.merge(model)
            elif name != "bare":
                model = peft.get_peft_model(model, _lora(target_modules=names, lora_alpha=ALPHA))
                if name == "peft merged":
                    model.merge_adapter()
            steps[name] = _inference(model.eval(), tokens[:batch])
        seconds = interleaved(steps, rounds=rounds * (8 if batch == 1 else 1))
        for name in ("unmerged", "merged"):
            what = f"MiniLM-L6, {batch} × 64 tokens: latency {name}, ratio to the bare model"
            rows.append(Row(what=what, ours=ratio(seconds, name, "bare"), peer=ratio(seconds, f"peft {name}", "bare")))
    return rows


def narrow_rows(rounds: int) -> list[Row]:
    """Measure products with few columns against PyTorch's."""
    rows = []
    for count, size in ((2048, 384), (512, 1536)):
        for rank in (2, 8, 11):
            left, right = torch.randn(count, size), torch.randn(size, rank)
            steps: dict[str, Step] = {
                "times_narrow": partial(_often, lambda left=left, right=right: times_narrow(left, right)),
                "@": partial(_often, lambda left=left, right=right: left @ right),
            }
            what = f"{count} × {size} times {size} × {rank}: narrow product, ratio to @"
            rows.append(
                Row(what=what, ours=ratio(interleaved(steps, rounds=5 * rounds), "times_narrow", "@"), peer=1.0)
            )
    return rows


def _often(product: Callable[[], Tensor]) -> None:
    for _ in range(20):
        product()


def _inference(model: nn.Module, tokens: Tensor) -> Step:
    @torch.no_grad()
    def step() -> None:
        model(input_ids=tokens)

    return step


def _child(model: str, variant: str) -> None:
    convolutions = {"tucker": tucker, "peft conv": peft_conv}
    step = convolutions[variant]() if variant in convolutions else VARIANTS[variant](MODELS[model])
    for _ in range(5):
        step()
    print(peak_resident())


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--narrow", action="store_true", help="measure narrow products; the other figures stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*json.loads(arguments.child))
        return
    command = f"python benchmarks/bench_adapters.py --rounds {arguments.rounds}"
    if arguments.narrow:
        print(write("adapters", narrow_rows(arguments.rounds), command=f"{command} --narrow", part=True))
        return
    measured = (training_rows, convolution_rows, latency_rows, narrow_rows)
    print(write("adapters", [row for rows in measured for row in rows(arguments.rounds)], command=command))


if __name__ == "__main__":
    main()
