"""Tasks one after another on one model with flowra-adapters' LoRA: each past task keeps its answers."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from flowra_adapters import LoRA, attach
from flowra_compose import (
    LowRankUpdate,
    NullSpace,
    TaskMemory,
    merge_updates,
    read_task_memory,
    start_inflora,
    write_task_memory,
)
from flowra_compose.trainer_callback import NullSpaceCallback
from flowra_testing.past_tasks import input_statistics, lively_bert
from flowra_testing.tiny_models import batch, seeded

NAMES = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")]
PAST = [batch(size=1, length=4, seed=seed) for seed in (9, 10, 11)]  # of three tasks, so few that they are kept whole


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, seed: int) -> None:
        self.data = batch(size=16, length=7, seed=seed, num_labels=3)

    def __len__(self) -> int:
        return len(self.data["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: each[index] for key, each in self.data.items()}


def new_pairs(model: nn.Module, task: int) -> dict[str, LoRA]:
    generator = torch.Generator().manual_seed(task)
    attached = attach(model, dict.fromkeys(NAMES, 2), adapter=f"task{task}", dropout=0.1, generator=generator)
    return {name: each for name, each in attached.items() if isinstance(each, LoRA)}


def train(model: nn.Module, folder: Path, task: int, callbacks: list[NullSpaceCallback]) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        seed=task,
    )
    Trainer(model=model, args=arguments, train_dataset=Rows(20 + task), callbacks=callbacks).train()


def logits(model: nn.Module, data: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(**data).logits
    return answer


def updates(layers: Mapping[str, LoRA]) -> dict[str, LowRankUpdate]:
    return {
        name: LowRankUpdate(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
        for name, layer in layers.items()
    }


def after(memory: TaskMemory, model: nn.Module, task: int, layers: Mapping[str, LoRA], folder: Path) -> TaskMemory:
    """Remember a task, by way of files."""
    statistics = input_statistics(model, NAMES, lambda: model(**PAST[task]))
    write_task_memory(memory.after(statistics, updates(layers), energy=1.0), folder)
    return read_task_memory(folder)


@pytest.mark.parametrize("method", ["null space", "inflora"])
def test_three_tasks_in_sequence_keep_the_answers_of_all_past_tasks(method: str, tmp_path: Path) -> None:
    model = lively_bert(training=True)
    memory, kept, trained = TaskMemory.empty(dict.fromkeys(NAMES, (16, 16))), [], []
    for task in range(3):
        layers = new_pairs(model, task)
        space = NullSpace(layers, memory)
        if method == "inflora":
            new = batch(size=16, seed=20 + task)
            start_inflora(layers, memory, input_statistics(model, NAMES, lambda new=new: model(**new)))
        else:
            space.start()
        with seeded(task):
            train(model, tmp_path, task, [NullSpaceCallback(space)])
        assert all(layer.lora_B.abs().max() > 1e-3 for layer in layers.values())
        memory = after(memory, model, task, layers, tmp_path / "memory")
        for layer in layers.values():
            layer.requires_grad_(False)
        kept.append(logits(model, PAST[task]))
        trained.append(updates(layers))
        for past, then in zip(PAST, kept, strict=False):
            torch.testing.assert_close(logits(model, past), then, rtol=0, atol=1e-5)
    assert [module.rank for module in memory.modules.values()] == [11] * 4  # the cap: ⌊0.7 · 16⌋, of 12 inputs
    assert min(module.kept[-1] for module in memory.modules.values()) < 1


def test_adapters_trained_apart_sum_without_interference_on_the_old_task(tmp_path: Path) -> None:
    empty = TaskMemory.empty(dict.fromkeys(NAMES, (16, 16)))
    first = lively_bert(training=True)
    first_layers = new_pairs(first, 0)
    with seeded(0):
        train(first, tmp_path, 0, [])
    memory = after(empty, first, 0, first_layers, tmp_path / "memory")
    sums = {}
    for projecting in (True, False):
        second = lively_bert(training=True)
        layers = new_pairs(second, 1)
        space = NullSpace(layers, memory)
        space.start()
        with seeded(1):
            train(second, tmp_path, 1, [NullSpaceCallback(space)] if projecting else [])
        merged = lively_bert()
        with torch.no_grad():
            for name, update in merge_updates([updates(first_layers), updates(layers)], [1.0, 1.0], rule="cat").items():
                merged.get_submodule(name).weight += update.delta_weight()
        sums[projecting] = (logits(merged, PAST[0]) - logits(first, PAST[0])).abs().max().item()
    assert sums[True] <= 1e-5
    assert sums[False] > 1e-3
