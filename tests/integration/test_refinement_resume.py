"""N + M steps are N steps, saving, another process, M steps: bit by bit, across a change of rank."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from flowra_adapters import adapters, attach, orthogonality
from flowra_allocation import (
    AdaLoRA,
    Breathe,
    FlexLoRA,
    FlexLoRACompat,
    FlexLoRASchedule,
    Policy,
    RefinementSchedule,
    Refiner,
    Shrink,
)
from flowra_allocation.refinement_files import FILES
from flowra_allocation.trainer_callback import PenaltyCallback, RefinementCallback, last_checkpoint
from flowra_testing import trained_run
from flowra_testing.resumable_run import CASES, STEPS, ResumableRun
from flowra_testing.tiny_models import bert_classifier
from flowra_testing.trained_run import Kind, Rows, build, outcome, resume

FEW_CASES = ("breathe of pairs with an average", "breathe of pairs in one cycle", "adalora of slots")
FEW_STEPS = (3, 7, 12)  # among observed steps, right after events
MODULES = str(Path(__file__).parents[1])


def child(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": MODULES, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )


# A loop in plain PyTorch: safetensors and JSON only.


def goes_on_alike(root: Path, cases: Mapping[str, object], steps: Iterator[int] | range | tuple[int, ...]) -> None:
    """Save runs after some steps, go on in a fresh process, and compare all that they end with."""
    ends = {}
    for name in cases:
        run = ResumableRun(name)
        for step in range(STEPS):
            if step in steps:
                run.save(root / name / str(step))
            if step - 1 in steps:
                run.save(root.with_name("uninterrupted") / name / str(step))
            run.step()
        ends[name] = run.fingerprint()
        history = run.refiner.finish()
        assert any(event.dropped or event.admitted for event in history.events), name
    done = child("flowra_testing.resuming_child", str(root))
    assert done.returncode == 0, done.stderr
    for name, end in ends.items():
        resumed = json.loads((root / name / "resumed.json").read_text())
        assert resumed.keys() == {str(step) for step in steps}
        for step, found in resumed.items():
            assert found == end, (name, step)
            followed = root.with_name("uninterrupted") / name / str(int(step) + 1)
            for file in followed.iterdir() if followed.exists() else ():
                assert file.read_bytes() == (root / name / step / "next" / file.name).read_bytes(), (
                    name,
                    step,
                    file.name,
                )


def test_a_saved_run_goes_on_bit_by_bit_in_another_process(tmp_path: Path) -> None:
    goes_on_alike(tmp_path / "runs", dict.fromkeys(FEW_CASES), FEW_STEPS)


@pytest.mark.slow
def test_every_case_goes_on_bit_by_bit_in_another_process_from_every_step(tmp_path: Path) -> None:
    goes_on_alike(tmp_path / "runs", CASES, range(STEPS))


@pytest.mark.slow
def test_two_processes_go_on_bit_by_bit_each_with_what_it_had_seen(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda process: child("flowra_testing.resuming_pair", str(tmp_path), process), "01"))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    ends = [json.loads((tmp_path / f"{process}.json").read_text()) for process in "01"]
    for end in ends:
        assert all(each == end["uninterrupted"] for each in end.values())
    first, second = (end["uninterrupted"] for end in ends)
    assert first["events"] == second["events"]
    adapted = [name for name in first["tensors"] if "lora_" in name]
    assert adapted
    assert all(first["tensors"][name] == second["tensors"][name] for name in adapted)
    found = load_file(tmp_path / "3" / FILES[0])
    assert not torch.equal(found["activations/0/up"], found["activations/1/up"])


# Inside transformers.Trainer.

Uninterrupted = Callable[[Kind], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Train once for each kind of model, with a checkpoint after every step."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(kind: Kind) -> tuple[Path, dict[str, Any]]:
        if kind not in done:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp(kind)
            build(kind, folder)[0].train()
            done[kind] = folder, outcome(folder)
        return done[kind]

    return run


def assert_same_outcome(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("pairs", 5),
        ("peft", 6),
        *(
            pytest.param(kind, step, marks=pytest.mark.slow)
            for kind, steps in {"pairs": (1, 3, 4, 11), "slots": (3, 4, 5, 11), "peft": (3, 4, 5, 11)}.items()
            for step in steps
        ),
    ],
)
def test_a_trainer_resumes_bit_by_bit_across_a_change_of_rank(
    kind: Kind, step: int, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    folder, expected = uninterrupted(kind)
    trainer, callback, refiner = build(kind, tmp_path)
    resume(trainer, callback, folder / f"checkpoint-{step}")
    assert_same_outcome(outcome(tmp_path), expected)
    content = json.loads((folder / "checkpoint-12" / FILES[1]).read_text())
    assert refiner.history.as_json()["events"] == content["history"]["events"]
    moved = {event["step"] for event in content["history"]["events"] if event["dropped"] or event["admitted"]}
    assert moved & {4, 6}
    assert moved & {8, 10}


def test_a_checkpoint_holds_the_state_beside_the_trainer_s_files_and_only_the_trainer_s_hold_pickles(
    uninterrupted: Uninterrupted,
) -> None:
    folder, _ = uninterrupted("pairs")
    files = {path.name: path for path in (folder / "checkpoint-5").iterdir()}
    assert load_file(files[FILES[0]])  # a step is being watched
    assert json.loads(files[FILES[1]].read_text())
    pickles = {name for name, path in files.items() if path.read_bytes()[:2] in (b"PK", b"\x80\x02")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step 7", "save 7"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    moment: str, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    _, expected = uninterrupted("pairs")
    killed = child("flowra_testing.trained_run", "pairs", str(tmp_path), moment)
    assert killed.returncode == -signal.SIGKILL
    found = last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-6"
    assert (tmp_path / "checkpoint-7").exists() == (moment == "save 7")  # not whole
    done = child("flowra_testing.trained_run", "pairs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_outcome(outcome(tmp_path), expected)


@pytest.mark.slow
def test_a_run_that_is_killed_from_outside_ends_as_if_it_had_not_been(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    _, expected = uninterrupted("pairs")
    command = [sys.executable, "-m", "flowra_testing.trained_run", "pairs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": MODULES, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as running:
        while running.poll() is None and last_checkpoint(tmp_path) is None:
            pass
        running.kill()
    assert last_checkpoint(tmp_path) is not None
    done = child("flowra_testing.trained_run", "pairs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same_outcome(outcome(tmp_path), expected)


# What is forgotten.


@pytest.mark.parametrize("kind", ["pairs", "peft"])
def test_resuming_without_the_ranks_is_an_error_that_says_what_to_call(
    kind: Kind, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    folder, _ = uninterrupted(kind)
    trainer, _, _ = build(kind, tmp_path)
    with pytest.raises(
        ValueError, match=r"ranks must be those of the model, got .*call callback\.resume\(checkpoint\)"
    ):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))


def test_resuming_without_the_state_is_an_error_where_ranks_are_still_the_same(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    folder, _ = uninterrupted("pairs")
    trainer, _, _ = build("pairs", tmp_path)
    with pytest.raises(
        ValueError, match=r"refinement must be where training is, at step 3, got step 0\. To resume, call"
    ):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_resuming_from_another_checkpoint_than_the_trainer_is_an_error(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    folder, _ = uninterrupted("pairs")
    trainer, callback, _ = build("pairs", tmp_path)
    callback.resume(folder / "checkpoint-3")
    with pytest.raises(ValueError, match="refinement must be where training is, at step 2, got step 3"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(ValueError, match="refinement must be where training is, at step 0, got step 3"):
        trainer.train()


def test_a_checkpoint_without_the_state_is_refused_and_nothing_is_changed(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    trainer, callback, refiner = build("pairs", tmp_path)
    with pytest.raises(ValueError, match=r"refinement state must follow .*No such file.* Resume from another"):
        callback.resume(tmp_path)
    assert refiner.step is None
    assert trainer.train().global_step == trained_run.STEPS


def test_exchanging_the_model_for_an_earlier_one_at_the_end_is_an_error_before_training(tmp_path: Path) -> None:
    trainer, _, _ = build(
        "pairs",
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
    )
    with pytest.raises(ValueError, match="load_best_model_at_end must be False, for an earlier checkpoint has other"):
        trainer.train()


def test_a_model_that_is_not_the_refiner_s_is_an_error_before_training(tmp_path: Path) -> None:
    _, callback, _ = build("pairs", tmp_path)
    other = bert_classifier()
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=12, report_to=[], use_cpu=True)
    trainer = Trainer(model=other, args=arguments, train_dataset=Rows(), callbacks=[callback])
    with pytest.raises(
        ValueError, match=r"layers must be part of the model that is trained, got 'bert\..*not model_init"
    ):
        trainer.train()


# Schedules that cannot fire, or did not.

LATE: Mapping[str, Callable[[], Policy]] = {  # the last event of each lies behind step 12
    "breathe": lambda: Breathe(schedule=RefinementSchedule(start=2, freeze=14)),
    "shrink": lambda: Shrink(schedule=RefinementSchedule(start=2, freeze=14), measure="magnitude"),
    "adalora": lambda: AdaLoRA(total_steps=20, tinit=2, tfinal=2, delta_t=4, kappa=2.0),
    "flexlora": lambda: FlexLoRA(
        schedule=FlexLoRASchedule(total_steps=20, warmup=2, final=2, interval=3, b0=1, decay="constant")
    ),
    "flexlora_compat": lambda: FlexLoRACompat(
        schedule=FlexLoRASchedule(total_steps=20, warmup=2, final=2, interval=3, b0=1, decay="constant")
    ),
}


class Endless(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Rows without a length."""

    def __init__(self, size: int) -> None:
        self.rows = Rows(size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.rows[index] for index in range(len(self.rows)))


def late(name: str, folder: Path, callbacks: list[TrainerCallback], **settings: Any) -> Trainer:  # noqa: ANN401
    """Make a Trainer with a policy whose last event is at step 14 or later."""
    model = bert_classifier(training=True)
    names = [each for each, _ in model.named_modules() if each.endswith((".query", ".value"))]
    layers: Mapping[str, Any] = attach(model, dict.fromkeys(names, 3), method="svd")
    costs = {each: layer.cost_per_rank for each, layer in layers.items()}
    policy = LATE[name]()
    budget = int(sum(costs[each] * 3 for each in names) / policy.peak) + 80
    caps = dict.fromkeys(names, 6)
    refiner = Refiner(model, layers, policy=policy, costs=costs, caps=caps, budget=budget)
    arguments: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments |= {"per_device_train_batch_size": 4, "logging_strategy": "no", **settings}
    data = arguments.pop("data", None) or Rows()
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data,
        callbacks=[RefinementCallback(refiner), *callbacks],
    )


class Stop(TrainerCallback):
    """Stop after a step; count steps."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self.steps = state.global_step
        control.should_training_stop = state.global_step >= self.after


@pytest.mark.parametrize("length", [{"max_steps": 12}, {"num_train_epochs": 2}], ids=["steps", "epochs"])
@pytest.mark.parametrize("name", LATE)
def test_a_schedule_that_cannot_fire_is_an_error_before_training(
    name: str, length: dict[str, int], tmp_path: Path
) -> None:
    stop = Stop(99)
    trainer = late(name, tmp_path, [stop], **length)
    assert isinstance(trainer.model, nn.Module)
    before = {each: tensor.clone() for each, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"training must reach the freeze at step 1\d, got 1[02] steps\. Train longer"):
        trainer.train()
    assert stop.steps == 0
    assert all(torch.equal(tensor, before[each]) for each, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    "name", [name if name == "breathe" else pytest.param(name, marks=pytest.mark.slow) for name in LATE]
)
def test_a_schedule_that_did_not_fire_is_an_error_after_training(name: str, tmp_path: Path) -> None:
    trainer = late(name, tmp_path, [Stop(7)], max_steps=20)
    with pytest.raises(ValueError, match=r"refinement must fire at steps .* Train to the freeze"):
        trainer.train()


def test_epochs_over_data_without_a_length_are_an_error_before_training(tmp_path: Path) -> None:
    stop = Stop(99)
    trainer = late("breathe", tmp_path, [stop], num_train_epochs=9, max_steps=20, data=Endless(8))
    trainer.args.max_steps = -1
    with pytest.raises(ValueError, match="max_steps must be set to a positive value"):
        trainer.train()
    assert stop.steps == 0


def test_data_without_a_length_is_repeated_until_the_schedule_has_fired(tmp_path: Path) -> None:
    trainer = late("breathe", tmp_path, [], max_steps=15, data=Endless(8))
    assert trainer.train().global_step == 15


# Penalties.


def penalised(folder: Path, *, in_loss: bool, **settings: Any) -> Trainer:  # noqa: ANN401
    """Train adapters whose directions are held near orthogonal, by the loss or by the callback."""
    model = bert_classifier(training=False)
    layers = attach(model, {"bert.pooler.dense": 3}, method="svd")

    def penalty() -> Tensor:
        return 0.1 * orthogonality(adapters(model).values())

    class WithPenalty(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            loss = super().compute_loss(model, inputs, *arguments, **kwargs)
            return loss + penalty() / self.current_gradient_accumulation_steps if in_loss else loss

    torch.manual_seed(0)
    for layer in layers.values():
        for each in layer.parameters():
            each.data.normal_()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        **settings,
    }
    return WithPenalty(
        model=model.double(),
        args=TrainingArguments(
            output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **arguments
        ),
        train_dataset=Rows(),
        callbacks=[] if in_loss else [PenaltyCallback(penalty)],
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_by_callback_is_a_penalty_in_the_loss(accumulation: int, tmp_path: Path) -> None:
    ends = []
    for in_loss in (True, False):
        trainer = penalised(tmp_path, in_loss=in_loss, gradient_accumulation_steps=accumulation)
        trainer.train()
        assert isinstance(trainer.model, nn.Module)
        ends.append(trainer.model.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-9, atol=1e-12)
    plain = penalised(tmp_path, in_loss=False, gradient_accumulation_steps=accumulation)
    plain.pop_callback(PenaltyCallback)
    plain.train()
    assert isinstance(plain.model, nn.Module)
    assert any(not torch.allclose(ends[0][name], tensor) for name, tensor in plain.model.state_dict().items())


def before_optimizer_step(penalty: Callable[[], Tensor], model: nn.Module) -> None:
    PenaltyCallback(penalty).on_pre_optimizer_step(None, None, None, model=model)  # type: ignore[arg-type]


def test_a_penalty_is_added_to_gradients_or_becomes_them_and_a_zero_constant_adds_nothing() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    before_optimizer_step(lambda: model.weight.sum() + 3 * model.bias.sum(), model)
    assert torch.equal(model.weight.grad, torch.full((1, 2), 2.0))
    assert torch.equal(model.bias.grad, torch.tensor([3.0]))
    before_optimizer_step(lambda: torch.tensor(0.0), model)
    assert torch.equal(model.weight.grad, torch.full((1, 2), 2.0))


@pytest.mark.parametrize("penalty", [lambda: torch.tensor(0.5), lambda: torch.zeros(2, requires_grad=True)])
def test_a_penalty_that_is_a_constant_or_no_scalar_is_refused(penalty: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="penalty must be a scalar that depends on trained parameters, got"):
        before_optimizer_step(penalty, nn.Linear(2, 1))


def test_a_penalty_beside_scaled_gradients_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_grad_norm=0.0)
    arguments.fp16 = True
    with pytest.raises(ValueError, match="max_grad_norm must be > 0 with fp16 and a penalty, got 0"):
        PenaltyCallback(lambda: torch.tensor(0.0)).on_train_begin(arguments, None, None)  # type: ignore[arg-type]
