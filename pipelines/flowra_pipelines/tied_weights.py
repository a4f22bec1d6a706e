"""Whose weight a language model's output layer shares: files hold a tied weight once, under the input's name."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["tied_to"]


def tied_to(folder: Path, parameter: str) -> str | None:
    """Find the name under which the weight of a tied output layer is saved.

    Args:
        folder: of a model that transformers can load; its configuration alone is read.
        parameter: name in the model, such as ``lm_head.weight``.

    Returns:
        That of the input embedding, such as ``transformer.wte.weight``; None if it is not the weight of a tied output
        layer, or the folder holds no causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if not config.tie_word_embeddings:
            return None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, AttributeError):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    outputs, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if outputs is None or parameter != f"{names[id(outputs)]}.weight":
        return None
    return f"{names[id(inputs)]}.weight"
