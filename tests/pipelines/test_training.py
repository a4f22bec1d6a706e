import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowra_adapters import attach
from flowra_pipelines.config_sections import TrainingConfig
from flowra_pipelines.data import Examples
from flowra_pipelines.errors import UserError
from flowra_pipelines.tasks import TASKS
from flowra_pipelines.training import LossCurve, build_optimizer, data_order, learning_rate_factor, train_phase
from flowra_pipelines.training_state import (
    TrainingState,
    capture_tensors,
    read_training_state,
    restore_moments,
    write_training_state,
)
from flowra_testing.tiny_models import bert_classifier

CONFIG = TrainingConfig(steps=20, batch_size=4, learning_rate=0.01)


def collate(rows: list[dict[str, object]]) -> dict[str, Tensor]:
    return TASKS["sequence_classification"].collate(rows, {"input_ids": 0})


def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(30):
        ids = torch.randint(0, 60, (5 + index % 4,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": index % 3})
    return Examples(rows)


def prepared() -> tuple[nn.Module, Optimizer]:
    model = bert_classifier(training=True)
    attach(model, {"query": 2, "value": 1}, modules_to_save=["classifier"], dropout=0.1)
    return model, build_optimizer(model, CONFIG, heads=["classifier"])


def phase(model: nn.Module, optimizer: Optimizer, first: int, last: int, rng: Tensor | None = None) -> LossCurve:
    return train_phase(
        model,  # type: ignore[arg-type]
        examples(),
        optimizer,
        config=CONFIG,
        collate=collate,  # type: ignore[arg-type]
        first_step=first,
        last_step=last,
        seed=3,
        description="test",
        rng=rng,
    )


def state_of(model: nn.Module, optimizer: Optimizer, step: int) -> TrainingState:
    return TrainingState(
        step=step,
        total_steps=CONFIG.steps,
        schedule=CONFIG.schedule,
        seed=3,
        examples_seen=4 * step,
        peak_parameters=1,
        tensors=capture_tensors(model, optimizer),
    )


def trained_in_two_phases(folder: Path) -> dict[str, Tensor]:
    """Train 8 steps, write everything, build everything anew, train 12 steps."""
    model, optimizer = prepared()
    phase(model, optimizer, 0, 8)
    write_training_state(state_of(model, optimizer, 8), folder)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    again, optimizer = prepared()
    again.load_state_dict(weights)
    state = read_training_state(folder)
    restore_moments(state, again, optimizer)
    phase(again, optimizer, 8, 20, state.rng)
    return again.state_dict()


def test_two_phases_with_files_between_them_equal_one_bit_by_bit(tmp_path: Path) -> None:
    model, optimizer = prepared()
    curve = phase(model, optimizer, 0, 20)
    assert [step for step, _, _ in curve] == list(range(1, 21))
    for name, value in trained_in_two_phases(tmp_path).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_second_process_trains_to_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = prepared()
    phase(model, optimizer, 0, 20)
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]; torch.set_num_threads(1)\n"
        "import test_training; from pathlib import Path; from safetensors.torch import save_file\n"
        "save_file({k: v.contiguous() for k, v in test_training.trained_in_two_phases(Path(sys.argv[1])).items()},"
        " sys.argv[1] + '/weights.safetensors')\n"
    )
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(here), str(here.parent)], check=True, timeout=300)
    from safetensors.torch import load_file

    for name, value in load_file(tmp_path / "weights.safetensors").items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_every_example_is_seen_once_per_epoch_in_an_order_of_the_seed() -> None:
    order = data_order(7, needed=20, seed=1)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14]
    assert data_order(7, needed=9, seed=1) == order[:9]
    assert data_order(7, needed=20, seed=2) != order


def test_sorting_by_length_keeps_each_window_s_examples_and_saves_padding() -> None:
    lengths = [3 + (7 * index) % 50 for index in range(100)]
    plain = data_order(100, needed=320, seed=1)
    grouped = data_order(100, needed=320, seed=1, lengths=lengths, batch_size=8, window=4)
    for start in range(0, 320, 32):
        assert sorted(plain[start : start + 32]) == sorted(grouped[start : start + 32])

    def padded(order: list[int]) -> int:
        return sum(max(lengths[index] for index in order[start : start + 8]) for start in range(0, 320, 8))

    assert padded(grouped) < 0.8 * padded(plain)
    assert data_order(100, needed=72, seed=1, lengths=lengths, batch_size=8, window=4) == grouped[:72]


@pytest.mark.parametrize(("schedule", "end"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)])
def test_the_learning_rate_rises_then_follows_its_shape(schedule: str, end: float) -> None:
    config = TrainingConfig(steps=100, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate_factor(step, config) for step in range(10)] == pytest.approx([
        (step + 1) / 10 for step in range(10)
    ])
    assert learning_rate_factor(10, config) == 1.0
    assert learning_rate_factor(100, config) == pytest.approx(end)


def test_a_loss_that_is_not_finite_ends_training_with_one_line() -> None:
    model, optimizer = prepared()
    model.bert.encoder.layer[0].attention.self.query.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss must be finite, got nan at step 1\. Lower training\.learning_rate"):
        phase(model, optimizer, 0, 3)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = prepared()
    phase(model, optimizer, 0, 2)
    state = state_of(model, optimizer, 2)
    other = bert_classifier()
    with pytest.raises(UserError, match="training state must fit the model"):
        restore_moments(state, other, optimizer)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    model, optimizer = prepared()
    write_training_state(state_of(model, optimizer, 0), tmp_path)
    (tmp_path / "training_state.json").write_text("{}")
    with pytest.raises(UserError, match="training state must be whole"):
        read_training_state(tmp_path)
