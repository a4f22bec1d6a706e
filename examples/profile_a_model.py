"""Measure a transformers model layer by layer: flowra_analysis on a tiny BERT that is made here, with random weights.

Run: python examples/profile_a_model.py [out_dir]
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from flowra_analysis import FlowProfile, ModuleProfile, fisher_trace, profile_weights, read_profile, write_profile

Batch = dict[str, Tensor]


def tiny_bert() -> BertForSequenceClassification:
    """Build two blocks of width 32 with a head for three classes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def batches(count: int) -> list[Batch]:
    """Draw batches of eight sequences; the last two sequences of each are padded."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        mask = torch.ones(8, 12, dtype=torch.long)
        mask[-2:, 9:] = 0
        made.append({
            "input_ids": torch.randint(0, 100, (8, 12), generator=generator),
            "attention_mask": mask,
            "labels": torch.randint(0, 3, (8,), generator=generator),
        })
    return made


def per_example_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute each example's own cross-entropy, ``(N,)``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def main(out: Path) -> None:
    """Measure, print, write and read back."""
    model = tiny_bert()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and name.count(".") > 1}
    base_parameters = sum(parameter.numel() for parameter in model.bert.parameters())
    print(f"{len(layers)} linear layers in a base of {base_parameters:,} parameters; the head is left out")

    data = batches(8)
    traces = fisher_trace(model, data, per_example_loss, layers, mask=lambda batch: batch["attention_mask"])
    statistics, spectra = profile_weights(model, layers)
    profile = FlowProfile(
        modules={
            name: ModuleProfile(
                shape=(layer.out_features, layer.in_features),
                cost_per_rank=layer.out_features + layer.in_features,
                statistics={
                    "fisher_trace": traces[name].mean,
                    "fisher_trace_stderr": traces[name].standard_error,
                    **statistics[name],
                },
            )
            for name, layer in layers.items()
        },
        spectra={"weight": spectra},
        base_parameters=base_parameters,
        provenance={"model": "a tiny BERT with random weights", "examples": sum(len(b["labels"]) for b in data)},
    )
    write_profile(profile, out)

    again = read_profile(out)
    print(f"{'module':<42} {'Fisher trace':>20} {'effective rank':>15} {'redundancy':>11}")
    for name, module in again.modules.items():
        found = module.statistics
        trace = f"{found['fisher_trace']:.2e} ± {found['fisher_trace_stderr']:.0e}"
        print(f"{name:<42} {trace:>20} {found['weight_effective_rank']:>15.1f} {found['weight_redundancy']:>11.2f}")
    assert all(parameter.grad is None for parameter in model.parameters())  # nothing is left on the model
    print(f"profile written to {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="flowra-")))
