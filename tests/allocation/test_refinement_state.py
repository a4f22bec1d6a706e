"""What a refinement writes, and what it refuses to read; `tests/integration/test_refinement_resume.py` trains on."""

import copy
import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from flowra_allocation import (
    AdaLoRA,
    Breathe,
    Policy,
    RefinementSchedule,
    Refiner,
    Shrink,
    optimizer_tensors,
    refinement_files,
    restore_optimizer,
)
from flowra_allocation.refinement_files import FILES, read_refinement_state
from flowra_allocation.trainer_callback import last_checkpoint
from flowra_testing.policy_run import Form, PolicyRun
from flowra_testing.stand_in_adapter import hang
from flowra_testing.tiny_models import mlp

SCHEDULE = RefinementSchedule(start=2, freeze=10, events=4, observe=2)  # events at 4, 6, 8 and 10
WATCHED = 5  # a step between two events with statistics of one step
POLICIES: Mapping[str, Callable[[], Policy]] = {
    "breathe": lambda: Breathe(schedule=SCHEDULE, share=0.3),
    "shrink": lambda: Shrink(schedule=SCHEDULE, measure="flow", kappa=2.0),
    "adalora": lambda: AdaLoRA(total_steps=12, tinit=2, tfinal=2, delta_t=2, kappa=2.0),
}


def saved(folder: Path, *, form: Form = "pair", policy: str = "breathe", step: int = WATCHED) -> PolicyRun:
    run = PolicyRun(POLICIES[policy](), form)
    for _ in range(step):
        run.step()
    run.refiner.save(folder)
    return run


def fresh(form: Form = "pair", policy: str = "breathe") -> PolicyRun:
    return PolicyRun(POLICIES[policy](), form)


def refined(run: PolicyRun) -> list[Tensor]:
    """Return all that a restored refinement may change."""
    return [*run.model.state_dict().values(), *(each for each in run.model.parameters())]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of pairs and of slots; not to be changed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kept")
    saved(folder / "pair")
    saved(folder / "slots", form="slots")
    return folder


@pytest.fixture
def pairs(kept: Path, tmp_path: Path) -> Path:
    """A copy of the state of pairs."""
    return Path(shutil.copytree(kept / "pair", tmp_path / "pairs"))


# What is written.


@pytest.mark.parametrize("form", ["pair", "triplets", "slots"])
@pytest.mark.parametrize("step", [0, 3, 4, WATCHED, 10, 11])
def test_what_is_read_and_written_again_has_equal_bytes(form: Form, step: int, tmp_path: Path) -> None:
    saved(tmp_path / "first", form=form, step=step)
    run = fresh(form)
    assert run.refiner.restore(tmp_path / "first") == step
    run.refiner.save(tmp_path / "second")
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in FILES)


def test_saving_changes_nothing_and_may_be_done_twice(tmp_path: Path) -> None:
    run, other = fresh(), fresh()
    for step in range(11):
        run.refiner.save(tmp_path / f"{step}")
        run.refiner.save(tmp_path / "again")
        assert all(
            (tmp_path / f"{step}" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in FILES
        )
        run.step()
        other.step()
    assert run.refiner.finish().events == other.refiner.finish().events
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(refined(run), refined(other), strict=True))


def test_the_files_hold_no_pickle_and_no_values_of_factors(tmp_path: Path) -> None:
    saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    tensors = load_file(tmp_path / FILES[0])
    assert not any("lora_" in name for name in tensors)
    for path in tmp_path.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())
    assert {name.split("/")[0] for name in tensors} == {
        *("activations", "gradients", "counts", "basis_A", "basis_B", "omega", "psi", "y", "z")
    }


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run.step()
    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.refiner.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What is restored.


@pytest.mark.parametrize("form", ["pair", "triplets", "slots"])
def test_ranks_and_slots_are_restored_and_values_are_not_a_number_until_they_are_loaded(
    form: Form, tmp_path: Path
) -> None:
    old = saved(tmp_path, form=form)
    new = fresh(form)
    new.refiner.restore(tmp_path)
    assert {name: each.rank for name, each in new.layers.items()} == {
        name: each.rank for name, each in old.layers.items()
    }
    assert all(each.isnan().all() for layer in new.layers.values() for each in layer.parameters())
    new.model.load_state_dict(old.model.state_dict())
    assert torch.equal(new.output(), old.output())
    assert new.refiner.history.events == old.refiner.history.events


def test_running_averages_get_the_ranks_too(tmp_path: Path) -> None:
    def averaged() -> tuple[PolicyRun, nn.Module, Refiner]:
        run = fresh()
        average = copy.deepcopy(run.model)
        layers = {name: average.get_submodule(f"{name}.stand_in") for name in run.layers}
        refiner = Refiner(
            run.model,
            run.layers,
            policy=POLICIES["breathe"](),
            costs=run.costs,
            caps=dict.fromkeys(run.layers, 6),
            budget=run.budget,
            averages=[layers],  # type: ignore[list-item]
        )
        run.refiner = refiner
        return run, average, refiner

    run, average, refiner = averaged()
    for _ in range(WATCHED):
        run.step()
    refiner.save(tmp_path)
    again, other, resumed = averaged()
    resumed.restore(tmp_path)
    other.load_state_dict(average.state_dict())
    again.model.load_state_dict(run.model.state_dict())


def test_a_model_that_has_the_present_ranks_already_can_be_restored(tmp_path: Path) -> None:
    old = saved(tmp_path)
    ranks = {name: each.rank for name, each in old.layers.items()}
    new = PolicyRun(POLICIES["breathe"](), "pair", ranks=ranks, budget=old.budget)
    assert new.refiner.restore(tmp_path) == WATCHED
    assert new.refiner.history.initial == old.refiner.history.initial


# What is refused. Nothing is changed then.


def refuse(run: PolicyRun, folder: Path, message: str) -> None:
    before = [each.clone() for each in refined(run)]
    history = copy.deepcopy(run.refiner.history)
    with pytest.raises(ValueError, match=message) as raised:
        run.refiner.restore(folder)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(before, refined(run), strict=True))
    assert run.refiner.history == history
    assert run.refiner.step is None


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: fresh(policy="shrink"), "got budget .* where it is|got policy breathe where it is shrink now"),
        (lambda: fresh("triplets"), r"got layer 'up' LayerForm\(form='pair'.* where it is LayerForm\(form='triplets'"),
        (
            lambda: PolicyRun(Breathe(schedule=SCHEDULE, share=0.2), "pair"),
            r"got settings .*'share': 0\.3.*'share': 0\.2",
        ),
        (
            lambda: PolicyRun(Breathe(schedule=RefinementSchedule(start=2, freeze=14), share=0.3), "pair"),
            r"got settings .* Resume with what the run began with\.",
        ),
        (lambda: PolicyRun(POLICIES["breathe"](), "pair", ranks={"up": 4, "down": 3}), "got (layers|budget)"),
        (lambda: PolicyRun(POLICIES["breathe"](), "pair", budget=200), r"got budget \d+ where it is 200 now"),
    ],
    ids=["policy", "form", "setting", "schedule", "layers", "budget"],
)
def test_the_state_of_another_run_is_refused(run: Callable[[], PolicyRun], message: str, pairs: Path) -> None:
    other = run()
    with pytest.raises(ValueError, match=message):
        other.refiner.restore(pairs)
    assert other.refiner.step is None
    assert all(each.isfinite().all() for each in other.model.parameters())


def rewritten(
    folder: Path,
    *,
    json_change: Callable[[dict[str, Any]], None] = lambda _: None,
    tensor_change: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> None:
    """Change what the files say, as somebody would who keeps the hash right."""
    tensors = load_file(folder / FILES[0])
    tensor_change(tensors)
    save_file(tensors, folder / FILES[0])
    content = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    content["sha256"] = hashlib.sha256((folder / FILES[0]).read_bytes()).hexdigest()
    json_change(content)
    (folder / FILES[1]).write_text(json.dumps(content), encoding="utf-8")


def at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:  # noqa: ANN401 - JSON
    def change(content: Any) -> None:  # noqa: ANN401
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("surplus", value=1), "unknown \\['surplus'\\]"),
        (lambda content: content.pop("seed"), "missing \\['seed'\\]"),
        (at("format_version", value=1), "format_version must be 2, got 1"),
        (at("format_version", value=True), "format_version must be 2, got True"),
        (at("step", value=4.0), "step must be a whole number ≥ 0, got 4.0"),
        (at("step", value=6), "step must lie where 1 events of .* have been held, got 6"),
        (at("step", value=3), "step must lie where 1 events"),
        (at("loss", value="median"), "loss must be 'mean' or 'sum'"),
        (at("layers", "up", "form", value="tensor"), "layers must have a known form"),
        (at("layers", "up", "shape", value=[12]), "layers must have a known form and a shape"),
        (at("layers", "up", "shape", value=[12, 2**60]), "basis_A/up|must be torch"),
        (at("layers", "up", value=None), "layer 'up' must be an object"),
        (at("history", "events", 0, "ranks", "up", value=9), r"rank must be in \[0, 8\], got 9; 'up'"),
        (at("history", "events", 0, "ranks", "up", value=2**40), "rank must be in"),
        (at("history", "events", 0, "ranks", "up", value=-1), "rank of 'up' must be a whole number ≥ 0, got -1"),
        (at("history", "events", 0, "ranks", "new", value=1), "unknown \\['new'\\]"),
        (at("history", "events", 0, "dropped", value={"new": 1}), "events must be of the layers, got \\['new'\\]"),
        (at("history", "events", 0, "dropped", value={"up": 0}), "dropped must be a whole number ≥ 1"),
        (at("history", "events", 0, "importance", value={"up": "high"}), "importance and kkt_gap must be numbers"),
        (at("history", "events", 0, "importance", value={"up": math.nan}), "numbers must be finite, got NaN"),
        (at("history", "events", 0, "step", value=5), "events must be the first of those at steps"),
        (at("history", "events", value=None), "TypeError"),
        (at("history", "steps", value=[4, 4, 8, 10]), "events must be the first of those"),
        (at("history", "settings", value=[1]), "settings must be plain values"),
        (at("history", "format_version", value=1), "format_version of the history must be 2"),
        (at("policy_state", value=["a"]), "missing \\['policy/a'\\]"),
        (at("processes", value=2), "KeyError|missing"),
        (at("processes", value=0), "unknown \\['activations/0/down'"),
        (at("sha256", value="0" * 64), "sha256 must be that of refinement_state.safetensors"),
    ],
)
def test_a_state_that_no_refinement_writes_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, pairs: Path
) -> None:
    rewritten(pairs, json_change=change)
    refuse(fresh(), pairs, f"refinement state must follow docs/formats/refinement_state.md, got .*({message})")


def put(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("activations/0/up", torch.zeros(9, 9, dtype=torch.float64)), "activations/0/up must be torch.float64"),
        (put("activations/0/up", None), "KeyError: 'activations/0/up'"),
        (put("y/0/up", torch.zeros(12, 3)), r"y/0/up must be torch.float32 \(12, \d\), got torch.float32 \(12, 3\)"),
        (put("omega/up", None), "omega/up"),
        (put("basis_A/up", torch.zeros(8, 8)), "bases must have at most|basis_A/up|omega/up"),
        (put("counts/0/up", torch.tensor([-1.0, 1.0], dtype=torch.float64)), "counts must be ≥ 0"),
        (put("counts/0/up", torch.tensor([math.nan, 1.0], dtype=torch.float64)), "NaN or infinity in 'counts/0/up'"),
        (put("other", torch.zeros(1)), "unknown \\['other'\\]"),
    ],
)
def test_tensors_that_no_refinement_writes_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, pairs: Path
) -> None:
    rewritten(pairs, tensor_change=change)
    refuse(fresh(), pairs, f"refinement state must follow .*({message})")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("mask/up", torch.ones(6, dtype=torch.bool)), "mask must hold [0-5] directions, got 6; 'up'"),
        (put("mask/up", torch.ones(6)), "mask and order must be bool and int64"),
        (put("order/up", torch.arange(5)), "mask and order must be bool and int64 of one length"),
    ],
)
def test_slots_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, kept: Path, tmp_path: Path
) -> None:
    shutil.copytree(kept / "slots", tmp_path, dirs_exist_ok=True)
    rewritten(tmp_path, tensor_change=change)
    refuse(fresh("slots"), tmp_path, message)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_a_damaged_file_is_refused(name: str, damage: str, pairs: Path) -> None:
    path = pairs / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 128]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": data[:-9], "flipped": flipped}[damage])
    refuse(fresh(), pairs, "refinement state must follow .* Resume from another checkpoint")


def test_a_refinement_that_refused_a_state_trains_as_if_nothing_had_been(pairs: Path) -> None:
    rewritten(pairs, json_change=at("seed", value=9))
    run = fresh()
    refuse(run, pairs, "got seed 9 where it is 0 now")
    assert run.train(12).events == fresh().train(12).events


def test_files_of_two_states_are_refused(tmp_path: Path) -> None:
    run = saved(tmp_path / "now")
    run.step()
    run.refiner.save(tmp_path / "then")
    (tmp_path / "then" / FILES[0]).replace(tmp_path / "now" / FILES[0])  # what a kill between two renamings leaves
    refuse(fresh(), tmp_path / "now", "sha256 must be that of refinement_state.safetensors")


def test_what_a_policy_has_seen_is_kept_and_what_is_not_its_own_is_refused(tmp_path: Path) -> None:
    old = saved(tmp_path, form="triplets", policy="adalora")
    state = old.refiner.policy.state()
    assert state
    found = read_refinement_state(tmp_path)
    assert list(found.policy) == list(state)
    assert all(torch.equal(found.policy[name], each) for name, each in state.items())

    def renamed(tensors: dict[str, Tensor]) -> None:
        tensors["policy/other"] = tensors.pop(f"policy/{next(iter(state))}")

    rewritten(
        tmp_path,
        tensor_change=renamed,
        json_change=lambda content: content["policy_state"].__setitem__(0, "other"),
    )
    new = fresh("triplets", "adalora")
    with pytest.raises(ValueError, match="state must be of sensitivities and uncertainties, got the key 'other'"):
        new.refiner.restore(tmp_path)
    assert all(each.isfinite().all() for each in new.model.parameters())


# What is forgotten.


def test_an_optimiser_that_was_built_before_the_ranks_were_restored_is_an_error(tmp_path: Path) -> None:
    old = saved(tmp_path)
    new = fresh()
    new.refiner.restore(tmp_path)
    new.model.load_state_dict(old.model.state_dict())
    new.finished = WATCHED
    with pytest.raises(
        ValueError,
        match=r"optimizer must hold the layers' factors, got one that lacks those of 'up'\. .* after restore",
    ):
        new.step()


def test_going_on_without_the_state_is_an_error(tmp_path: Path) -> None:
    run = PolicyRun(POLICIES["adalora"](), "triplets")
    run.finished = 4
    with pytest.raises(ValueError, match=r"refinement must hold its event at step 4, got step 5\. .* restore the"):
        run.step()


def test_the_newest_checkpoint_with_a_whole_state_is_found(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x"):
        saved(tmp_path / name, step=1)
    (tmp_path / "checkpoint-11").mkdir()  # the Trainer was killed in it
    saved(tmp_path / "checkpoint-12", step=1)
    (tmp_path / "checkpoint-12" / FILES[1]).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_what_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path / "one")
    size = (tmp_path / "one" / FILES[1]).stat().st_size
    monkeypatch.setattr(refinement_files, "MAX_JSON_BYTES", size)
    run.refiner.save(tmp_path / "two")
    read_refinement_state(tmp_path / "two")
    monkeypatch.setattr(refinement_files, "MAX_JSON_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"at most {size - 1} bytes, .* got {size} after 1 events. Let rank move less"):
        run.refiner.save(tmp_path / "three")
    assert not list((tmp_path / "three").iterdir())
    with pytest.raises(ValueError, match=f"at most {size - 1} bytes are read, got {size}"):
        read_refinement_state(tmp_path / "two")


def test_adalora_lets_go_of_what_it_has_seen_when_ranks_are_frozen() -> None:
    run = PolicyRun(POLICIES["adalora"](), "triplets")
    for _ in range(10):
        assert not run.refiner.frozen
        run.step()
        assert bool(run.refiner.policy.state()) == (not run.refiner.frozen)
    assert run.refiner.frozen


# The optimiser by name.


def lora_fa(model: nn.Module) -> torch.optim.Optimizer:
    for name, each in model.named_parameters():
        each.requires_grad_("lora_A" not in name)
    held = {name: each for name, each in model.named_parameters() if "lora" in name and each.numel()}
    named = {"params": list(held.values()), "names": list(held), "scaling_factors": [2.0] * len(held)}
    return LoraFAOptimizer([{**named, "lr": 0.1}])


OPTIMISERS: Mapping[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(trained(model), lr=0.1, momentum=0.9),
    "AdamW, the rate a tensor": lambda model: torch.optim.AdamW(trained(model), lr=torch.tensor(0.1), foreach=False),
    "LoRA-FA": lora_fa,
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_goes_on_from_its_tensors(name: str) -> None:
    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        hang(model, {"up": 2, "skip": 0})
        return model, OPTIMISERS[name](model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (model(torch.ones(4, 8)) - 1).square().sum().backward()
        optimizer.step()

    model, optimizer = built()
    step(model, optimizer)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = rate.mul_(0.5) if isinstance(rate, Tensor) else 0.05
    tensors = load(save(optimizer_tensors(model, optimizer)))
    key = {"SGD": "momentum_buffer", "LoRA-FA": "exp_avg_sq_B"}.get(name, "exp_avg_sq")
    assert tensors.keys() >= {"group/0/lr", f"state/{key}/up.stand_in.lora_B"}
    other, again = built()
    other.load_state_dict(model.state_dict())
    restore_optimizer(other, again, tensors)
    for each in ((model, optimizer), (other, again)):
        step(*each)
    assert all(torch.equal(mine, other.state_dict()[name]) for name, mine in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state/exp_avg/nothing", torch.zeros(1), "tensors must be of parameters that the optimizer holds, got 'state"),
        ("state/exp_avg/up.weight", torch.zeros(1), "tensors must be of parameters that the optimizer holds"),
        ("other/exp_avg/up.stand_in.lora_A", torch.zeros(1), "tensors must be of parameters"),
        ("group/7/lr", torch.tensor(0.1), "tensors must be of parameters"),
        ("state/exp_avg/up.stand_in.lora_A", torch.zeros(1, 8), r"fit their parameters, got \(1, 8\) for \(2, 8\)"),
        ("state/exp_avg/up.stand_in.lora_A", torch.full((2, 8), math.nan), "tensors must be finite"),
        ("group/0/lr", torch.tensor(math.inf), "tensors must be finite"),
        ("group/0/params", torch.tensor(3.0), "numbers that the optimizer's groups have, got 'group/0/params'"),
        ("group/0/new", torch.tensor(3.0), "numbers that the optimizer's groups have"),
        ("group/0/amsgrad", torch.tensor(1), "numbers that the optimizer's groups have"),
        ("group/0/lr", torch.tensor([0.1, 0.2]), "numbers that the optimizer's groups have"),
        ("group/0/betas", torch.tensor(0.1), "numbers that the optimizer's groups have"),
        ("group/0/betas", torch.tensor([0.1, 0.2, 0.3]), "numbers that the optimizer's groups have"),
    ],
)
def test_an_optimiser_refuses_tensors_without_a_place(name: str, value: Tensor, message: str) -> None:
    model = mlp()
    hang(model, {"up": 2})
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    (model(torch.ones(4, 8)) - 1).square().sum().backward()
    optimizer.step()
    before = optimizer_tensors(model, optimizer)
    with pytest.raises(ValueError, match=message):
        restore_optimizer(model, optimizer, {"group/0/lr": torch.tensor(9.0), **before, name: value})
    after = optimizer_tensors(model, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in after.items())


def test_an_optimiser_of_another_model_and_a_memory_that_is_no_tensor_are_refused() -> None:
    model = mlp()
    layers = hang(model, {"up": 2})
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    other.state[other.param_groups[0]["params"][0]] = {"momentum_buffer": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"optimizer must hold parameters of the model, got another of shape \(12, 8\)"
    ):
        optimizer_tensors(model, other)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[layers["up"].lora_A] = {"note": "text"}
    with pytest.raises(TypeError, match="must be tensors and numbers, got str in 'note'"):
        optimizer_tensors(model, optimizer)
