"""A tiny refinement inside ``transformers.Trainer``, here or in a process that may be killed.

``python -m flowra_testing.trained_run KIND FOLDER`` trains to the end, from the last whole checkpoint in FOLDER if
there is one. With a third argument the process kills itself: ``step 7`` before the optimiser's seventh step, ``save 7``
when the Trainer has written its files of checkpoint 7 and the callback none.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from flowra_adapters import attach
from flowra_allocation import Breathe, Policy, RefinementSchedule, Refiner, peft_layers
from flowra_allocation.trainer_callback import RefinementCallback, last_checkpoint
from flowra_testing.tiny_models import batch, bert_classifier

Kind = Literal["pairs", "slots", "peft"]
STEPS = 12
SCHEDULE = RefinementSchedule(start=2, freeze=10, events=4, observe=2)  # events at 4, 6, 8 and 10


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows with padding and labels."""

    def __init__(self, size: int = 20) -> None:
        self.data = batch(size=size, length=7, num_labels=3)

    def __len__(self) -> int:
        return len(self.data["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: each[index] for key, each in self.data.items()}


class Die(TrainerCallback):
    """Kill the process as ``kill -9`` does."""

    def __init__(self, moment: str) -> None:
        self.event, _, step = moment.partition(" ")
        self.step = int(step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        if self.event == "step" and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        if self.event == "save" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def build(
    kind: Kind,
    folder: Path,
    *,
    moment: str | None = None,
    policy: Policy | None = None,
    **settings: Any,  # noqa: ANN401
) -> tuple[Trainer, RefinementCallback, Refiner]:
    """Make a Trainer with gradient accumulation, dropout and a learning-rate schedule; it saves after every step."""
    model: nn.Module = bert_classifier(training=True)
    layers: Mapping[str, Any]
    if kind == "peft":
        config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = get_peft_model(model, config)
        layers = peft_layers(model)
    else:
        names = {".query": 2, ".value": 2, ".output.dense": 0}
        ranks = {name: rank for name, _ in model.named_modules() for end, rank in names.items() if name.endswith(end)}
        method = "lora" if kind == "pairs" else "svd_masked"
        layers = attach(model, ranks, method=method, dropout=0.1, modules_to_save=["classifier"])
    costs = {name: layer.cost_per_rank for name, layer in layers.items()}
    refiner = Refiner(
        model,
        layers,
        policy=policy or Breathe(schedule=SCHEDULE, share=0.25),
        costs=costs,
        caps=dict.fromkeys(layers, 6),
        budget=sum(costs[name] * layer.rank for name, layer in layers.items()) + 40,
    )
    callback = RefinementCallback(refiner)
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 0,
        **settings,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Rows(),
        eval_dataset=Rows(4),
        callbacks=[*([Die(moment)] if moment else []), callback],
    )
    return trainer, callback, refiner


def resume(trainer: Trainer, callback: RefinementCallback, checkpoint: Path) -> None:
    """Train from a checkpoint to the end."""
    callback.resume(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint))


def outcome(folder: Path) -> dict[str, Any]:
    """Return what the last checkpoint of a finished run holds: bytes, and tensors from pickles."""
    end = folder / f"checkpoint-{STEPS}"
    files = {path.name: path.read_bytes() for path in sorted(end.glob("*.safetensors"))}
    files |= {path.name: path.read_bytes() for path in (end / "refinement_state.json",)}
    for name in ("optimizer.pt", "scheduler.pt"):
        loaded = torch.load(end / name, weights_only=True)
        files[name] = repr(_plain(loaded)).encode()
    return files


def _plain(value: Any) -> Any:  # noqa: ANN401 - what a pickle holds
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[2])
    trainer, callback, _ = build(sys.argv[1], output, moment=sys.argv[3] if len(sys.argv) > 3 else None)  # type: ignore[arg-type]
    found = last_checkpoint(output)
    if found is None:
        trainer.train()
    else:
        resume(trainer, callback, found)
