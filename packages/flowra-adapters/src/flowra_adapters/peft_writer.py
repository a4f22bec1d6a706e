"""Write PEFT's two files: ``adapter_config.json`` and ``adapter_model.safetensors``.

Two forms (docs/formats/adapter.md). A *checkpoint* keeps the scaling s of each module (``alpha_pattern = s · r``) and
can be trained on. An *export* has unit scale everywhere: s is folded into B, every alpha equals its rank, and the
global ``r`` and ``lora_alpha`` are the largest rank, so that a reader which knows only the global values cannot
mis-scale it. In both, modules of rank 0 are left out.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowra_adapters.checkpoint import AdapterCheckpoint, own_copy
from flowra_adapters.peft_layout import Consumer, stack_to_peft
from flowra_adapters.whole_files import replacing

__all__ = ["CONFIG_NAME", "PREFIX", "TENSORS_NAME", "VLLM_RANKS", "peft_files", "write_checkpoint"]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_checkpoint(
    checkpoint: AdapterCheckpoint, folder: str | Path, *, unit_scale: bool = False, consumer: Consumer | None = None
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; equal values give equal bytes.

    Both files are written under temporary names and then renamed.

    Args:
        checkpoint: what to write.
        folder: created if missing.
        unit_scale: fold every scaling into B (the *export* form) instead of keeping it (the *checkpoint* form).
        consumer: whose rules the files must obey; the form is then that of an export. For ``vllm`` all ranks are
            filled up with zeros to the next of :data:`VLLM_RANKS`.

    Raises:
        ValueError: if there is no update to write, or the consumer cannot serve it.
    """
    folder = Path(folder)
    tensors, config = peft_files(checkpoint, unit_scale=unit_scale, consumer=consumer)
    with replacing(folder / TENSORS_NAME, folder / CONFIG_NAME) as (tensors_file, config_file):
        save_file(tensors, tensors_file, metadata={"format": "pt"})
        config_file.write_text(config, encoding="utf-8")


def peft_files(
    checkpoint: AdapterCheckpoint, *, unit_scale: bool = False, consumer: Consumer | None = None
) -> tuple[dict[str, Tensor], str]:
    """Return the content of both files: tensors by name, and the configuration's text. See :func:`write_checkpoint`."""
    if not checkpoint.factors:
        raise ValueError("checkpoint must hold at least one module of rank ≥ 1, got none")
    if consumer == "vllm":
        checkpoint = _for_vllm(checkpoint)
    unit_scale = unit_scale or consumer is not None
    _refuse_mixtures(checkpoint)
    targets = {name: checkpoint.rank(name) for name in checkpoint.factors}
    alphas = {name: float(rank) if unit_scale else checkpoint.scalings[name] * rank for name, rank in targets.items()}
    # An export's global values are the largest rank's; a checkpoint's are those most modules have.
    default_rank = max(targets.values()) if unit_scale else int(_most_common(targets.values()))
    default_alpha = float(default_rank) if unit_scale else _most_common(alphas.values())
    parameters = [name for name in targets if checkpoint.kinds.get(name) == "parameter"]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": checkpoint.task_type,
        "base_model_name_or_path": checkpoint.base_model_name_or_path,
        "inference_mode": True,
        "r": default_rank,
        "lora_alpha": _integer_if_whole(default_alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(targets.keys() - set(parameters)),
        "rank_pattern": _pattern(targets, default_rank),
        "alpha_pattern": _pattern({name: _integer_if_whole(alpha) for name, alpha in alphas.items()}, default_alpha),
        "modules_to_save": sorted(checkpoint.trained_modules) or None,
        "bias": "all" if checkpoint.biases else "none",
        "fan_in_fan_out": checkpoint.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": bool(checkpoint.magnitudes),
        "init_lora_weights": True,
    }
    if checkpoint.bias_offsets:
        config["lora_bias"] = True
    if parameters:
        config["target_parameters"] = sorted(parameters)
    # Not sorted by json: the order inside the patterns has a meaning.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    tensors = {PREFIX + key: own_copy(tensor) for key, tensor in _tensors(checkpoint, unit_scale=unit_scale)}
    return dict(sorted(tensors.items())), text


def _tensors(checkpoint: AdapterCheckpoint, *, unit_scale: bool) -> Iterator[tuple[str, Tensor]]:
    """List the tensors under PEFT's names, without the prefix."""
    paths = _parameter_paths(checkpoint)
    for name, (a, b) in checkpoint.factors.items():
        folded = b * checkpoint.scalings[name] if unit_scale else b
        if not torch.isfinite(folded).all():
            raise ValueError(f"scaling · lora_B must fit {b.dtype}, got infinity for {name!r}. Use a wider dtype.")
        kind = checkpoint.kinds.get(name)
        if kind == "embedding":
            yield f"{name}.lora_embedding_A", a
            yield f"{name}.lora_embedding_B", folded
        elif kind == "parameter":
            rows, columns = stack_to_peft(a, folded)
            yield f"{paths[name]}.lora_A.weight", rows
            yield f"{paths[name]}.lora_B.weight", columns
        else:
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", folded
        if kind == "attention":  # PEFT adapts both projections or none
            yield f"{name}.base_layer.out_proj.lora_A.weight", torch.zeros_like(a)
            yield f"{name}.base_layer.out_proj.lora_B.weight", b.new_zeros(a.shape[1], len(a))
        if name in checkpoint.magnitudes:
            magnitude = checkpoint.magnitudes[name]
            yield (
                f"{name}.lora_magnitude_vector",
                magnitude.view(1, -1, *(1,) * (a.ndim - 2)) if a.ndim > 2 else magnitude,
            )
    for name, offset in checkpoint.bias_offsets.items():
        yield f"{name}.lora_B.bias", offset if unit_scale else offset / checkpoint.scalings[name]
    for name, bias in checkpoint.biases.items():
        module = name.removesuffix(".bias")
        yield f"{module}.base_layer.bias" if _is_wrapped(checkpoint, module) else name, bias
    yield from checkpoint.modules_to_save.items()


def _parameter_paths(checkpoint: AdapterCheckpoint) -> dict[str, str]:
    """Return where the wrapper of each raw parameter is: several of one module lie in each other, the first innermost.

    The order of the names is that of the module's parameters.
    """
    by_module: dict[str, list[str]] = {}
    for name in checkpoint.factors:
        if checkpoint.kinds.get(name) == "parameter":
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + ".base_layer" * (len(names) - 1 - depth)
        for module, names in by_module.items()
        for depth, name in enumerate(names)
    }


def _is_wrapped(checkpoint: AdapterCheckpoint, module: str) -> bool:
    """Tell whether PEFT wraps a module, which it does with all whose names end in a target."""
    targets = [name for name in checkpoint.factors if checkpoint.kinds.get(name) not in ("parameter", "attention")]
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _refuse_mixtures(checkpoint: AdapterCheckpoint) -> None:
    """Refuse what PEFT has, but not together."""
    kinds = set(checkpoint.kinds.values())
    raw = [name for name, kind in checkpoint.kinds.items() if kind == "parameter"]
    if "parameter" in kinds and (checkpoint.fan_in_fan_out or checkpoint.magnitudes or checkpoint.bias_offsets):
        raise ValueError(
            "raw parameters must not be adapted beside Conv1D, DoRA or lora_bias, got all of them. PEFT refuses that."
        )
    inside = [
        name for name in checkpoint.biases if name.removesuffix(".bias") in {each.rpartition(".")[0] for each in raw}
    ]
    if inside:
        raise ValueError(f"a bias beside an adapted raw parameter must stay as it is, got {inside[0]!r}")
    if checkpoint.bias_offsets and (kinds or checkpoint.bias_offsets.keys() != checkpoint.factors.keys()):
        raise ValueError("bias_offsets must be there for all modules, none of them an embedding, got another set")


def _for_vllm(checkpoint: AdapterCheckpoint) -> AdapterCheckpoint:
    """Fill all ranks up to one that vLLM has buffers for; a server needs ``max_lora_rank`` of at least that.

    Returns:
        The same updates at one rank.

    Raises:
        ValueError: if there is anything that vLLM does not serve.
    """
    odd = next((name for name, kind in checkpoint.kinds.items() if kind != "embedding"), None)
    conv = next(
        (name for name, (a, _) in checkpoint.factors.items() if a.ndim > 2 and name not in checkpoint.kinds), None
    )
    reasons = {
        "trained modules": next(iter(checkpoint.trained_modules), None),
        "DoRA": next(iter(checkpoint.magnitudes), None),
        "biases": next(iter([*checkpoint.biases, *checkpoint.bias_offsets]), None),
        "raw parameters and attention blocks of PyTorch": odd,
        "convolutions": conv,
    }
    for what, name in reasons.items():
        if name is not None:
            raise ValueError(f"adapter must be one that vLLM serves, got {name!r}: it does not serve {what}.")
    largest = max(checkpoint.rank(name) for name in checkpoint.factors)
    if largest > VLLM_RANKS[-1]:
        raise ValueError(f"rank must be at most {VLLM_RANKS[-1]} for vLLM, got {largest}. Cut the adapter first.")
    rank = next(step for step in VLLM_RANKS if step >= largest)
    padded = {
        name: (
            torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])]),
            torch.cat([b, b.new_zeros(len(b), rank - len(a))], 1),
        )
        for name, (a, b) in checkpoint.factors.items()
    }
    return dataclasses.replace(checkpoint, factors=padded)


def _integer_if_whole(value: float) -> float | int:
    """Return 16 for 16.0: readers that expect an integer alpha get one wherever it is one."""
    return int(value) if float(value).is_integer() else value


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Write per-module values as PEFT's patterns, where the first key that matches the end of a name wins.

    A key also matches longer names that end in it, so a module with the default value is written too if a shorter
    name would capture it; and longer names come first.

    Returns:
        Escaped name to value, in the order of the search.
    """
    special = {name for name, value in values.items() if value != default}
    captured = {name for name in values if any(name != other and name.endswith(f".{other}") for other in special)}
    ordered = sorted(special | captured, key=lambda name: (-len(name), name))
    return {re.escape(name).replace(r"\-", "-"): values[name] for name in ordered}


def _most_common(values: Iterable[float]) -> float:
    """Return the most common value; of several, the largest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))
