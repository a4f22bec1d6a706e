"""Loads PEFT adapters with PEFT alone in a fresh process, and writes what the model answers.

Run as ``python -m flowra_testing.peft_child MODEL FOLDER…``: MODEL is a function of ``tiny_models``. Each folder gets a
``logits.safetensors`` for ``tiny_models.batch()``.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from flowra_testing import tiny_models


def reload_one(base: torch.nn.Module, folder: Path) -> None:
    """Answer with a fresh base and the adapter of a folder."""
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        save_file({"logits": model(**tiny_models.batch()).logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[2:]:
        reload_one(getattr(tiny_models, sys.argv[1])(), Path(each))
