"""Loads every adapter folder under a root in a fresh process, and writes what the model answers and saves again.

Run as ``python -m flowra_testing.reload_child ROOT THREADS``: with as many threads as whoever compares, for sums depend
on their number. Each ``ROOT/<case>/case.json`` names a dtype and either the modules of the tiny MLP that are trained in
full and the form, or a layer type of a row of the table of methods; ``input.safetensors`` holds ``x``.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flowra_adapters import load_adapter, save_adapter
from flowra_testing.adapter_table import METHODS
from flowra_testing.asserts import build_case
from flowra_testing.tiny_models import mlp


def reload_one(folder: Path) -> None:
    """Load ``folder/adapter`` into a fresh model; write ``output.safetensors`` and ``again/``."""
    case = json.loads((folder / "case.json").read_text())
    dtype = getattr(torch, case["dtype"])
    x = load_file(folder / "input.safetensors")["x"].clone()  # a file's memory is not aligned, which changes products
    if "layer_type" in case:
        row = next(each for each in METHODS if each.name == case["method"])
        host = build_case(row.layer_types[case["layer_type"]], dtype).model
        model, answering = host, host.layer
        forms = {}
    else:
        model = answering = mlp(dtype=dtype)
        forms = {"modules_to_save": case["modules_to_save"], "unit_scale": case["unit_scale"]}
    load_adapter(model, folder / "adapter")
    save_file({"y": answer(answering, x)}, folder / "output.safetensors")
    save_adapter(model, folder / "again", **forms)


def answer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a model answers, in memory of its own."""
    with torch.no_grad():
        y: torch.Tensor = model(x)
    return y.contiguous().clone()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    for each in sorted(Path(sys.argv[1]).iterdir()):
        reload_one(each)
