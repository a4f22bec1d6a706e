"""Whoever is killed while an adapter is saved leaves the old one, the new one, or a folder that is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flowra_adapters import attach, load_adapter, save_adapter
from flowra_testing.tiny_models import seeded

KINDS = {
    "lora": {"method": "lora", "scaling": 1.0},
    "other lora": {"method": "lora", "scaling": 8.0},
    "svd": {"method": "svd"},
}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def base() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def adapted(kind: str, seed: int) -> nn.Sequential:
    model = base()
    layers = attach(model, {"0": 2}, **KINDS[kind])  # type: ignore[arg-type]
    with seeded(seed), torch.no_grad():
        for each in layers["0"].parameters():
            each.copy_(torch.randn_like(each))
    return model


def found(folder: Path) -> Tensor | None:
    """What a reader gets; None if the folder is refused."""
    model = base()
    try:
        load_adapter(model, folder)
    except ValueError:
        return None
    answer: Tensor = model(X).detach()
    return answer


@pytest.mark.parametrize("consumer", [None, "peft"])
@pytest.mark.parametrize(("old", "new"), [(old, new) for old in KINDS for new in KINDS if old != new])
def test_a_kill_between_any_two_changes_of_files(
    old: str, new: str, consumer: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = adapted(old, 1), adapted(new, 2)
    answers = [model(X).detach() for model in models]
    refused, left = 0, 9
    changes = {name: getattr(os, name) for name in ("replace", "unlink")}
    for last in range(20):
        folder = tmp_path / str(last)
        save_adapter(models[0], folder, consumer=consumer)  # type: ignore[arg-type]
        left = last

        def change(name: str) -> Callable[..., None]:
            def work(*places: object, **options: object) -> None:
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                changes[name](*places, **options)

            return work

        with monkeypatch.context() as patched:
            for name in changes:
                patched.setattr(os, name, change(name))
            try:
                save_adapter(models[1], folder, consumer=consumer)  # type: ignore[arg-type]
                done = True
            except KeyboardInterrupt:
                done = False
        answer = found(folder)
        refused += answer is None
        assert answer is None or any(torch.allclose(answer, each, atol=1e-5) for each in answers), last
        if done:
            assert answer is not None
            assert torch.allclose(answer, answers[1], atol=1e-5)
            break
    assert done
    assert last > 2
    assert refused > 0
