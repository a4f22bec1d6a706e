"""The page docs/starts.md: its code runs, and both starts are those that evidence by hand would give."""

import re
from pathlib import Path
from typing import Any

import torch

from flowra_adapters import InputPCA, adapters, attach, detach, initialise

PAGE = Path(__file__).parents[2] / "docs" / "starts.md"


def shown() -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "starts"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": each for name, one in adapters(model).items() for key, each in one.named_parameters()}


def test_the_page_s_starts_are_those_of_evidence_gathered_by_hand() -> None:
    names = shown()
    model, batches, ranks = names["model"], names["batches"], names["ranks"]
    by_page = {"eva": {key: each.clone() for key, each in factors(model).items()}}
    initialise(model, "lora_ga", evidence=names["seen"]["gradients"].finalise())
    by_page["lora_ga"] = {key: each.clone() for key, each in factors(model).items()}
    detach(model)

    gradients, inputs = {}, {}
    for name in ranks:
        inputs[name] = InputPCA.init(model[int(name)].in_features, 8)
        model[int(name)].weight.requires_grad_(True)
    for batch in batches:
        names["losses"](model, batch).sum().backward()
        with torch.no_grad():
            inputs["0"] = inputs["0"].update(batch[0])
            inputs["2"] = inputs["2"].update(model[:2](batch[0]))
    for name in ranks:
        gradients[name] = model[int(name)].weight.grad / sum(len(x) for x, _ in batches)
    attach(model, ranks)
    for start, evidence in (("eva", inputs), ("lora_ga", gradients)):
        initialise(model, start, evidence=evidence)
        for key, each in factors(model).items():
            torch.testing.assert_close(each, by_page[start][key], rtol=1e-3, atol=1e-4)
