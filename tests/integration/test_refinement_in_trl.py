"""TRL's trainers take the same callback as ``transformers.Trainer``."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from flowra_allocation import BottleneckObserver, Breathe, PeftLayer, RefinementSchedule, Refiner, peft_layers
from flowra_allocation.trainer_callback import RefinementCallback
from flowra_testing.tiny_models import VOCABULARY, batch, llama_causal_lm, seeded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # trl 1.16 names it
]
CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
SCHEDULE = RefinementSchedule(start=1, freeze=7, events=3, observe=1)
COMMON = {
    "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "seed": 0, "bf16": False,
    "save_strategy": "no", "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    disable_progress_bars()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the first two are special."""
    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(VOCABULARY - 2))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>")


def words(start: int, count: int, step: int = 1) -> str:
    return " ".join(f"w{(start + step * index) % (VOCABULARY - 2)}" for index in range(count))


TEXTS = Dataset.from_list([{"text": words(index, 6 + index % 5)} for index in range(64)])
PAIRS = Dataset.from_list([
    {"prompt": words(i, 3), "chosen": " " + words(i + 3, 2 + i % 2), "rejected": " " + words(i + 3, 3, step=5)}
    for i in range(64)
])


def adapted() -> PeftModel:
    with seeded(5):
        return get_peft_model(llama_causal_lm(training=True), CONFIG)


def refiner_of(model: nn.Module) -> Refiner:
    layers = peft_layers(model)
    return Refiner(
        model,
        layers,
        policy=Breathe(schedule=SCHEDULE, share=0.3),
        costs={name: layer.cost_per_rank for name, layer in layers.items()},
        caps={name: min(layer.max_rank, 5) for name, layer in layers.items()},
        budget=sum(2 * layer.cost_per_rank for layer in layers.values()),
    )


class Losses(TrainerCallback):
    """Keeps what a trainer logs."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, *arguments: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
        self.values += [logs["loss"]] if logs and "loss" in logs else []


def check(refiner: Refiner, model: nn.Module, losses: Losses, folder: Path) -> None:
    """Rank moved inside the budget, the loss fell, and PEFT reads what it saves."""
    history = refiner.history
    assert tuple(event.step for event in history.events) == SCHEDULE.steps
    assert any(event.admitted for event in history.events)
    assert history.peak <= history.budget
    assert sum(losses.values[-4:]) < sum(losses.values[:4])
    assert isinstance(model, PeftModel)
    model.save_pretrained(folder, selected_adapters=["default"])
    fresh = PeftModel.from_pretrained(llama_causal_lm(), folder).eval()
    with torch.no_grad():
        assert torch.equal(fresh(**batch()).logits, model.eval()(**batch()).logits)


@pytest.mark.parametrize("made_by", ["us", "the trainer"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_supervised_fine_tuning_moves_rank(made_by: str, checkpointing: bool, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path / "run"), gradient_checkpointing=checkpointing, **COMMON)
    losses = Losses()
    if made_by == "us":
        trainer = SFTTrainer(model=adapted(), args=args, train_dataset=TEXTS, processing_class=tokenizer())
    else:
        trainer = SFTTrainer(
            model=llama_causal_lm(training=True),
            args=args,
            train_dataset=TEXTS,
            processing_class=tokenizer(),
            peft_config=CONFIG,
        )
    refiner = refiner_of(trainer.model)
    trainer.add_callback(RefinementCallback(refiner))
    trainer.add_callback(losses)
    trainer.train()
    check(refiner, trainer.model, losses, tmp_path / "adapter")


def preference_trainer(model: PeftModel, folder: Path, callbacks: list[TrainerCallback]) -> DPOTrainer:
    args = DPOConfig(output_dir=str(folder), gradient_checkpointing=False, beta=1.0, **COMMON)
    return DPOTrainer(model=model, args=args, train_dataset=PAIRS, processing_class=tokenizer(), callbacks=callbacks)


def test_preference_training_moves_rank_and_leaves_its_reference_alone(tmp_path: Path) -> None:
    model, losses = adapted(), Losses()
    refiner = refiner_of(model)
    trainer = preference_trainer(model, tmp_path / "run", [RefinementCallback(refiner), losses])
    reference = {name: each.clone() for name, each in model.named_parameters() if ".ref." in name}
    assert reference
    trainer.train()
    check(refiner, model, losses, tmp_path / "adapter")
    assert all(torch.equal(model.get_parameter(name), each) for name, each in reference.items())
    assert {layer.rank for layer in peft_layers(model, "ref").values()} == {2}


def test_the_pass_of_the_reference_is_not_observed(tmp_path: Path) -> None:
    model = adapted()
    layers = peft_layers(model)
    trainer = preference_trainer(model, tmp_path, [])
    with torch.no_grad(), seeded(6):
        for layer in layers.values():  # now the reference answers otherwise
            layer.lora_B.normal_(std=0.3)
    inputs = next(iter(trainer.get_train_dataloader()))
    generator = torch.Generator().manual_seed(0)
    with BottleneckObserver(model, layers, loss="mean", sketch=True, generator=generator) as observer:
        trainer.compute_loss(model, inputs).backward()
    expected = activations_of_one_pass(model, layers, inputs)
    assert inputs["attention_mask"].sum() < inputs["attention_mask"].numel()
    for name, grams in observer.grams.items():
        (gram,) = grams
        assert (gram.tokens, gram.examples) == (inputs["attention_mask"].sum(), 16)  # 8 pairs
        torch.testing.assert_close(gram.activations, expected[name], rtol=1e-4, atol=1e-6)
        assert gram.gradients.trace() > 0


def activations_of_one_pass(
    model: nn.Module, layers: dict[str, PeftLayer], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Σ z zᵀ over the tokens that are no padding, in a pass of the adapter that is trained."""
    kept, found = inputs["attention_mask"].bool(), {}
    for name, layer in layers.items():
        layer.observer = lambda z, name=name: found.update({name: z[kept].double().T @ z[kept].double()})
    with torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for layer in layers.values():
        layer.observer = None
    return found
