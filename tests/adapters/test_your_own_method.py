"""A method outside the package joins the battery by a value: the one that docs/your_own_method.md shows."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowra_adapters import AdapterMethod
from flowra_testing.adapter_table import BLOCKS, EVERYWHERE, Method
from flowra_testing.asserts import LAWS

PAGE = Path(__file__).parents[2] / "docs" / "your_own_method.md"


def shown() -> dict[str, Any]:
    """Run the page's example and its row of the battery."""
    example, row = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for code in (example, row):
        exec(compile(code, str(PAGE), "exec"), names)
    return names


NAMES = shown()
METHOD = NAMES["METHOD"]
assert isinstance(METHOD, Method)
assert isinstance(METHOD.made_by, AdapterMethod)
LAYERS = {name: EVERYWHERE[name] for name in ("linear", "conv2d_grouped", "conv_transpose2d_grouped", "embedding")} | {
    "attention_output": BLOCKS["attention_output"]
}


def test_the_page_s_example_runs_and_merges() -> None:
    assert torch.isfinite(NAMES["model"](torch.ones(1, 3, 9, 9))).all()


def test_the_method_takes_about_twenty_lines() -> None:
    (code,) = re.findall(r"class RowGain.*?(?=\n\n\nROW_GAIN)", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("law", [law for law in LAWS if law != "shrink_loses_exactly_the_dropped_product"])
def test_every_law_holds_for_it(law: str, kind: str) -> None:
    layer_type = replace(LAYERS[kind], rank=1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        LAWS[law](METHOD, layer_type, dtype)
