"""Sequential learning inside ``transformers.Trainer``, on plain pairs and on PEFT's LoRA."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from flowra_compose import (
    LowRankUpdate,
    NullSpace,
    TaskMemory,
    TrainedPair,
    o_lora_penalty,
    orthogonality_penalty,
    peft_pairs,
)
from flowra_compose.trainer_callback import NullSpaceCallback, PenaltyCallback
from flowra_testing.past_tasks import input_statistics, lively_bert
from flowra_testing.stand_in_adapter import hang
from flowra_testing.tiny_models import batch, seeded

STEPS = 6
Layers = Mapping[str, TrainedPair]
NAMES = [
    f"bert.encoder.layer.{layer}.{name}"
    for layer in (0, 1)
    for name in ("attention.self.query", "attention.self.value", "attention.output.dense")
]
PAST = batch(size=1, length=7, seed=9)
SHAPES = dict.fromkeys(NAMES, (16, 16))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, size: int = 20) -> None:
        self.data = batch(size=size, length=7, num_labels=3)

    def __len__(self) -> int:
        return len(self.data["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: each[index] for key, each in self.data.items()}


def remembered() -> TaskMemory:
    """Return a memory of one sentence, exactly, and of an adapter."""
    model = lively_bert()
    updates = {name: LowRankUpdate(torch.linspace(-1, 1, 16)[None], torch.ones(16, 1)) for name in NAMES}
    return TaskMemory.empty(SHAPES).after(input_statistics(model, NAMES, lambda: model(**PAST)), updates, energy=1.0)


def adapted(kind: str) -> tuple[nn.Module, Layers]:
    """Return a model with new pairs on the remembered modules; all else is frozen."""
    with seeded(5):
        if kind == "plain":
            model: nn.Module = lively_bert(training=True)
            return model, hang(model, dict.fromkeys(NAMES, 2))
        config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=NAMES)
        peft_model = get_peft_model(lively_bert(training=True), config)
        return peft_model, peft_pairs(peft_model)


def trainer_of(
    model: nn.Module,
    folder: Path,
    callbacks: list[Any],
    *,
    kind: type[Trainer] = Trainer,
    **settings: Any,  # noqa: ANN401
) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 0,
        **settings,
    }
    return kind(model=model, args=TrainingArguments(**arguments), train_dataset=Rows(), callbacks=callbacks)


def logits(model: nn.Module, data: Mapping[str, Tensor] = PAST) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(**data).logits
    model.train()
    return answer


class Counting(NullSpace):
    calls = 0

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls += 1
        super().after_step(optimizer)


# The projection.


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_the_trainer_leaves_past_outputs_and_learns_under_accumulation(kind: str, tmp_path: Path) -> None:
    model, layers = adapted(kind)
    space = Counting(layers, remembered())
    space.start()
    other = batch(size=4, seed=3)
    before, elsewhere = logits(model), logits(model, other)
    trainer_of(model, tmp_path, [NullSpaceCallback(space)]).train()
    assert space.calls == STEPS
    assert max(space.overlaps().values()) <= 1e-6
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert (logits(model, other) - elsewhere).abs().max() > 1e-3
    assert all(layer.lora_B.abs().max() > 1e-3 for layer in layers.values())


def test_without_the_callback_the_trainer_changes_past_outputs(tmp_path: Path) -> None:
    model, layers = adapted("plain")
    NullSpace(layers, remembered()).start()
    before = logits(model)
    trainer_of(model, tmp_path, []).train()
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_the_first_task_is_ordinary_training_bit_by_bit(kind: str, tmp_path: Path) -> None:
    ends = []
    for projecting in (True, False):
        model, layers = adapted(kind)
        space = NullSpace(layers, TaskMemory.empty(SHAPES))
        if projecting:
            space.start()
        trainer_of(model, tmp_path, [NullSpaceCallback(space)] if projecting else []).train()
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], each) for name, each in ends[1].items())


def outcome(folder: Path) -> list[Tensor]:
    end = folder / f"checkpoint-{STEPS}"
    state = torch.load(end / "optimizer.pt", weights_only=True)["state"]
    tensors = load_file(next(end.glob("*.safetensors")))
    return [*tensors.values(), *(each for one in state.values() for each in one.values())]


@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_a_resumed_run_ends_as_an_uninterrupted_one_bit_by_bit(kind: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    model, layers = adapted(kind)
    space = NullSpace(layers, remembered())
    space.start()
    trainer_of(model, tmp_path / "whole", [NullSpaceCallback(space)], **settings).train()
    model, layers = adapted(kind)
    callback = NullSpaceCallback(NullSpace(layers, remembered()))
    resumed = trainer_of(model, tmp_path / "resumed", [callback], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    found, expected = outcome(tmp_path / "resumed"), outcome(tmp_path / "whole")
    assert len(found) == len(expected) > 12
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_every_checkpoint_is_off_the_memory(tmp_path: Path) -> None:
    model, layers = adapted("plain")
    memory = remembered()
    space = NullSpace(layers, memory)
    space.start()
    trainer_of(model, tmp_path, [NullSpaceCallback(space)], save_strategy="steps", save_steps=1).train()
    for step in range(1, STEPS + 1):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        for name in NAMES:
            overlap = saved[f"{name}.stand_in.lora_A"].double() @ memory.modules[name].basis.double()
            assert overlap.abs().max() <= 1e-6


def test_the_new_task_s_own_head_may_be_trained_and_what_it_reads_stays(tmp_path: Path) -> None:
    model, layers = adapted("plain")
    head: nn.Module = model.classifier  # type: ignore[assignment]
    head.requires_grad_(True)
    space = NullSpace(layers, remembered())
    space.start()
    body: nn.Module = model.bert  # type: ignore[assignment]
    with torch.no_grad():
        before, head_before = body.eval()(**PAST).pooler_output, head.weight.clone()  # type: ignore[operator]
    trainer_of(model, tmp_path, [NullSpaceCallback(space, also_trained=head.parameters())]).train()
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(**PAST).pooler_output, before, rtol=0, atol=1e-5)
    assert not torch.equal(head.weight, head_before)


# What the projection refuses.


def refused(model: nn.Module, callback: Any, folder: Path, message: str, **settings: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        trainer_of(model, folder, [callback], **settings).train()


def test_training_without_a_start_or_from_another_memory_s_checkpoint_is_refused(tmp_path: Path) -> None:
    model, layers = adapted("plain")
    refused(model, NullSpaceCallback(NullSpace(layers, remembered())), tmp_path, r"A U must be zero .*Call start\(\)")
    trainer_of(model, tmp_path, [], save_strategy="steps", save_steps=3).train()
    model, layers = adapted("plain")
    space = NullSpace(layers, remembered())
    space.start()
    resumed = trainer_of(model, tmp_path, [NullSpaceCallback(space)])
    with pytest.raises(ValueError, match="a run that is resumed needs the memory that it began with"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_training_other_parameters_is_refused(tmp_path: Path) -> None:
    model, layers = adapted("plain")
    space = NullSpace(layers, remembered())
    space.start()
    model.bert.encoder.layer[0].output.LayerNorm.requires_grad_(True)  # type: ignore[union-attr, operator, index]
    refused(model, NullSpaceCallback(space), tmp_path, r"must be frozen, got \['bert.encoder.*LayerNorm.weight'")


def test_training_another_model_is_refused(tmp_path: Path) -> None:
    _, layers = adapted("plain")
    space = NullSpace(layers, remembered())
    space.start()
    refused(adapted("plain")[0], NullSpaceCallback(space), tmp_path, "layers must be part of the model")


def test_an_optimiser_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    model, layers = adapted("plain")
    space = NullSpace(layers, remembered())
    space.start()
    refused(model, NullSpaceCallback(space), tmp_path, r"moments as those of AdamW, got \['sum'\]", optim="adagrad")


# PEFT's layers.


def test_peft_s_layers_are_named_as_in_the_base_model_and_are_what_peft_holds() -> None:
    model, layers = adapted("peft")
    assert list(layers) == NAMES
    host = model.get_submodule(f"base_model.model.{NAMES[0]}")
    assert layers[NAMES[0]].lora_A is host.lora_A["default"].weight
    assert layers[NAMES[0]].lora_B is host.lora_B["default"].weight
    assert layers[NAMES[0]].scaling == 2.0


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["query", "word_embeddings"]}],
    ids=["dora", "bias", "embedding"],
)
def test_peft_s_other_updates_are_refused(options: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["query"], **options})
    with pytest.raises(ValueError, match="layers must be plain LoRA on linear layers, got"):
        peft_pairs(get_peft_model(lively_bert(), config))


def test_a_model_without_the_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="model must carry a LoRA adapter 'default' of PEFT, got none"):
        peft_pairs(lively_bert())
    with pytest.raises(ValueError, match="model must carry a LoRA adapter 'other' of PEFT"):
        peft_pairs(adapted("peft")[0], "other")


# Penalties.


class PenaltyInLoss(Trainer):
    penalty: Callable[[], Tensor]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        loss = super().compute_loss(*args, **kwargs)
        assert isinstance(loss, Tensor)
        return loss + self.penalty() * (1 if self.args.gradient_accumulation_steps == 1 else 0.5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_penalty_acts_as_in_the_loss(accumulation: int, tmp_path: Path) -> None:
    memory, ends = remembered(), []
    plain = {"max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation, "optim": "sgd", "weight_decay": 0.0}
    for in_loss in (True, False):
        model, layers = adapted("plain")
        model.eval()

        def penalty(layers: Layers = layers) -> Tensor:
            return 0.1 * orthogonality_penalty(layers, memory)

        callbacks = [] if in_loss else [PenaltyCallback(penalty)]
        trainer = trainer_of(model, tmp_path, callbacks, kind=PenaltyInLoss if in_loss else Trainer, **plain)
        if in_loss:
            trainer.penalty = penalty  # type: ignore[attr-defined]
        with seeded(11):
            trainer.train()
        ends.append([each.detach() for layer in layers.values() for each in (layer.lora_A, layer.lora_B)])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "penalty"), [("plain", o_lora_penalty), ("peft", orthogonality_penalty)])
def test_a_penalty_draws_new_adapters_away_from_past_ones(
    kind: str, penalty: Callable[[Layers, TaskMemory], Tensor], tmp_path: Path
) -> None:
    memory, ends = remembered(), []
    for strength in (0.0, 1.0):
        model, layers = adapted(kind)
        callback = PenaltyCallback(lambda strength=strength, layers=layers: strength * penalty(layers, memory))
        trainer_of(model, tmp_path, [callback], learning_rate=2e-2, max_steps=12).train()
        ends.append(orthogonality_penalty(layers, memory).item())
    assert ends[1] < 0.1 * ends[0]


def test_a_penalty_before_any_task_ended_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for penalised in (True, False):
        model, layers = adapted("plain")
        empty = TaskMemory.empty(SHAPES)
        callback = PenaltyCallback(lambda layers=layers, empty=empty: o_lora_penalty(layers, empty))
        trainer_of(model, tmp_path, [callback] if penalised else []).train()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], each) for name, each in ends[1].items())


@pytest.mark.parametrize("penalty", [torch.ones(2), torch.tensor(1.0)])
def test_what_is_no_penalty_is_refused(penalty: Tensor, tmp_path: Path) -> None:
    callback = PenaltyCallback(lambda: penalty)
    refused(adapted("plain")[0], callback, tmp_path, "penalty must be a scalar that depends on trained parameters")


def test_a_penalty_that_would_be_scaled_down_is_refused() -> None:
    class Half:
        fp16, max_grad_norm = True, 0.0

    with pytest.raises(ValueError, match="max_grad_norm must be > 0 with fp16 and a penalty, got 0"):
        PenaltyCallback(lambda: torch.zeros(())).on_train_begin(Half(), None, None)  # type: ignore[arg-type]
