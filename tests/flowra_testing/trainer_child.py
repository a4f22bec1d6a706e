"""A refinement inside ``transformers.Trainer``, in one process or under ``torchrun``.

``python -m torch.distributed.run … -m flowra_testing.trainer_child FOLDER`` trains to the end, resumes from a
checkpoint on the way, and writes what each process ended with to ``FOLDER/<run>.<RANK>.safetensors`` and ``….json``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from flowra_adapters import attach
from flowra_allocation import Breathe, RefinementSchedule, Refiner
from flowra_allocation.trainer_callback import RefinementCallback
from flowra_testing.tiny_models import batch, bert_classifier

STEPS, CHECKPOINT = 12, 5
SCHEDULE = RefinementSchedule(start=2, freeze=10, events=4, observe=2)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twenty-four rows with labels."""

    def __init__(self) -> None:
        self.data = batch(size=24, length=7, num_labels=3)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: each[index] for key, each in self.data.items()}


class LastGradients(TrainerCallback):
    """Keep the gradients of the last step, which the Trainer forgets."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_optimizer_step(self, *arguments: object, model: nn.Module, **kwargs: object) -> None:
        """Copy them."""
        self.gradients = {
            f"gradient/{name}": each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
        }


def train(folder: Path, *, batch_size: int, method: str = "svd_masked", resume: bool = False) -> Any:  # noqa: ANN401
    """Train to the end, from the start or from the checkpoint on the way.

    Returns:
        Trained tensors by name, and the history as JSON has it.
    """
    model = bert_classifier(training=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # processes draw their own
    layers: Any = attach(model, {"*.query": 2, "*.value": 2, "*.output.dense": 1}, method=method)
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    budget = sum(costs[name] * layer.rank for name, layer in layers.items())
    policy = Breathe(schedule=SCHEDULE, share=0.2)
    refiner = Refiner(model, layers, policy=policy, costs=costs, caps=dict.fromkeys(costs, 8), budget=budget)
    callback, last = RefinementCallback(refiner), LastGradients()
    settings = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=STEPS, per_device_train_batch_size=batch_size, learning_rate=1e-2,
        seed=0, save_strategy="steps", save_steps=CHECKPOINT, logging_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, average_tokens_across_devices=False,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=Rows(), callbacks=[callback, last])
    checkpoint = folder / "run" / f"checkpoint-{CHECKPOINT}"
    if resume:
        callback.resume(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    history = refiner.history.as_json()
    del history["seconds"]
    tensors = {name: each.detach() for name, each in model.state_dict().items() if ".adapters." in name}
    return tensors | last.gradients, history


def main(folder: Path) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    try:  # first, so that the refiner is made before the processes have met
        train(folder, batch_size=4, method="lora")
    except ValueError as error:
        (folder / f"problem.{rank}").write_text(str(error))
    for name, resume in (("whole", False), ("resumed", True)):
        tensors, history = train(folder, batch_size=4, resume=resume)
        save_file({key: each.contiguous() for key, each in tensors.items()}, folder / f"{name}.{rank}.safetensors")
        (folder / f"{name}.{rank}.json").write_text(json.dumps(history))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
