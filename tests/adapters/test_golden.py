"""Golden values made with peft 0.21.2; every input that matters is written in the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flowra_adapters import LoRA, attach, merge, save_adapter, unmerge

FOLDER = Path(__file__).parents[1] / "golden"
FAMILY = json.loads((FOLDER / "lora_family.json").read_text())
FORMAT = json.loads((FOLDER / "peft_save_format.json").read_text())
TOLERANCE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(params=["lora", "rslora"])
def case(request: pytest.FixtureRequest) -> Any:  # noqa: ANN401 - parsed JSON
    return next(each for each in FAMILY["cases"] if each["name"] == request.param)


@pytest.fixture
def model(case: Any) -> nn.Sequential:  # noqa: ANN401 - parsed JSON
    layer = nn.Linear(4, 3)
    layer.weight.data = torch.tensor(FAMILY["W"])
    layer.bias.data = torch.tensor(FAMILY["bias"])
    made = nn.Sequential(layer)
    adapter = attach(made, {"0": FAMILY["r"]}, method=case["name"], alpha=FAMILY["lora_alpha"])["0"]
    assert isinstance(adapter, LoRA)
    assert adapter.scaling == pytest.approx(case["scaling"], rel=1e-9)
    adapter.replace_factors(torch.tensor(FAMILY["A"]), torch.tensor(FAMILY["B"]))
    return made


def test_output_equals_peft_s(case: Any, model: nn.Sequential) -> None:  # noqa: ANN401
    torch.testing.assert_close(model(torch.tensor(FAMILY["x"])).detach(), torch.tensor(case["y_unmerged"]), **TOLERANCE)


def test_merged_weight_and_output_equal_peft_s(case: Any, model: nn.Sequential) -> None:  # noqa: ANN401
    merge(model)
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor(case["W_merged"]), **TOLERANCE)
    torch.testing.assert_close(model(torch.tensor(FAMILY["x"])).detach(), torch.tensor(case["y_merged"]), **TOLERANCE)
    unmerge(model)
    assert torch.equal(model[0].weight, torch.tensor(FAMILY["W"]))


def test_number_of_parameters_equals_peft_s(case: Any, model: nn.Sequential) -> None:  # noqa: ANN401
    assert model[0].adapters["default"].num_parameters() == case["trainable_params"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "v_proj")})
    model["head"] = nn.Linear(4, 2)
    attach(model, {"q_proj": 2, "v_proj": 4}, modules_to_save=["head"])
    save_adapter(model, tmp_path, modules_to_save=["head"])
    return tmp_path


def test_keys_and_shapes_of_linear_layers_equal_peft_s(saved: Path) -> None:
    shapes = {key: list(tensor.shape) for key, tensor in load_file(saved / "adapter_model.safetensors").items()}
    expected = {
        key: shape for key, shape in FORMAT["lora_keys_shapes"].items() if ".conv." not in key and ".emb." not in key
    }
    assert shapes == expected


def test_files_are_peft_s_without_the_readme(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [name for name in FORMAT["files"] if name != "README.md"]


def test_configuration_fields_are_peft_s_and_mean_the_same(saved: Path) -> None:
    ours, theirs = json.loads((saved / "adapter_config.json").read_text()), FORMAT["adapter_config"]
    assert ours.keys() <= theirs.keys()
    assert {type(ours["r"]), type(ours["lora_alpha"])} == {int}
    assert ours["modules_to_save"] == theirs["modules_to_save"]
    for key in ("peft_type", "bias", "fan_in_fan_out", "inference_mode", "use_dora", "use_rslora", "lora_dropout"):
        assert ours[key] == theirs[key]
