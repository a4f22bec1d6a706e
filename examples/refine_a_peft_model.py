"""Rank that moves while transformers.Trainer trains a PEFT model: flowra_allocation, and no other package of Flowra.

A tiny language model learns to count in three different steps. Its adapter starts at one rank everywhere; at each event
the directions worth least per parameter leave, and others are tried where the gradient asks for them. Parameters never
exceed the budget. What PEFT saves, PEFT loads.

Run: python examples/refine_a_peft_model.py [out_dir]
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from flowra_allocation import Breathe, RefinementSchedule, Refiner, peft_layers
from flowra_allocation.trainer_callback import RefinementCallback

warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # PEFT 0.21 on transformers 5
WORDS, LENGTH, STEPS = 48, 12, 40


def base_model() -> LlamaForCausalLM:
    """Build the base: two layers, the same numbers at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


class Counting(Dataset[dict[str, Tensor]]):
    """Rows of numbers, each one, two or three more than the one before."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return 256

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row."""
        row = (7 * index + (1 + index % 3) * torch.arange(LENGTH)) % WORDS
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


def loss_of(model: nn.Module) -> float:
    """Compute the mean loss of the first rows."""
    rows = [Counting()[index] for index in range(64)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def main(out: Path) -> None:
    """Adapt, refine in training, save, and load again with PEFT alone."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), config)
    print(f"before training: loss {loss_of(model):.3f}")

    layers = peft_layers(model)
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    refiner = Refiner(
        model,
        layers,
        policy=Breathe(schedule=RefinementSchedule(start=8, freeze=32, events=3), share=0.2),
        costs=costs,
        caps={name: min(layer.max_rank, 8) for name, layer in layers.items()},
        budget=sum(costs[name] * layer.rank for name, layer in layers.items()),
    )
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=24, learning_rate=1e-2, seed=0,
        save_strategy="no", logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Counting(), callbacks=[RefinementCallback(refiner)]).train()

    for event in refiner.history.events:
        dropped, admitted = sum(event.dropped.values()), sum(event.admitted.values())
        print(f"step {event.step}: {dropped} directions left, {admitted} came; {event.parameters} of {event.budget}")
    for name, layer in layers.items():
        print(f"  {name:<36} rank {layer.rank}")
    print(f"after training: loss {loss_of(model):.3f}")

    model.save_pretrained(out / "adapter")
    fresh = PeftModel.from_pretrained(base_model(), out / "adapter")
    print(f"saved to {out / 'adapter'}; PEFT loads it, loss {loss_of(fresh):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="flowra-")))
