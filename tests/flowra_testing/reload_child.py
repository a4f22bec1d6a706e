"""Loads every adapter folder under a root in a fresh process, and writes what the model answers and saves again.

Run as ``python -m flowra_testing.reload_child ROOT``. Each ``ROOT/<case>/case.json`` names the dtype and the modules
trained in full; ``input.safetensors`` holds ``x``.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flowra_adapters import load_adapter, save_adapter
from flowra_testing.tiny_models import mlp


def reload_one(folder: Path) -> None:
    """Load ``folder/adapter`` into a fresh model; write ``output.safetensors`` and ``again/``."""
    case = json.loads((folder / "case.json").read_text())
    model = mlp(dtype=getattr(torch, case["dtype"]))
    load_adapter(model, folder / "adapter")
    x = load_file(folder / "input.safetensors")["x"]
    with torch.no_grad():
        save_file({"y": model(x)}, folder / "output.safetensors")
    save_adapter(model, folder / "again", modules_to_save=case["modules_to_save"], unit_scale=case["unit_scale"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sorted(Path(sys.argv[1]).iterdir()):
        reload_one(each)
