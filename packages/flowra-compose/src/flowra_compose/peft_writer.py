"""Write adapters in PEFT's format, at unit scale.

What is written has the scaling 1 everywhere: s is folded into B, every alpha equals its rank, and the global ``r`` and
``lora_alpha`` are the largest rank. A reader that knows only the global values then scales every module as meant.

Updates of linear layers, convolutions and embeddings are pairs. Updates of biases go into ``lora_bias`` where all
belong to adapted linear layers or convolutions; PEFT then wants one of every adapted module, and the others get zeros.
Other biases can only be written as trained values (``bias: all``), which takes the base. There is no word for anything
else, such as the weight of a norm.

Source: key names and pattern matching as PEFT 0.21 writes and resolves them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowra_compose.base_weights import Base, BaseReader, base_outline, base_reader
from flowra_compose.lazy_updates import outlines_of
from flowra_compose.low_rank import AdapterState, LowRankUpdate
from flowra_compose.peft_files import CONFIG_NAME, PREFIX, TENSORS_NAME
from flowra_compose.whole_files import replacing
from flowra_compose.whole_tensors import write_tensors

__all__ = ["PeftForm", "write_adapter"]


@torch.no_grad()
def write_adapter(state: AdapterState, folder: str | Path, base: Base | None = None) -> None:
    """Write an adapter at unit scale in PEFT's format, one module at a time; equal values give equal bytes.

    Both files are written under temporary names first, then renamed.

    Args:
        state: what to write; scalings are multiplied into B in at least float32, and B keeps its dtype.
        folder: created if missing; an adapter in it is replaced.
        base: the parameters of the base, as for :func:`read_adapter`; needed where a bias is updated whose module has
            no update that is a pair, or beside an embedding. Such biases are written as trained values, in float32 at
            least.

    Raises:
        ValueError: if there is no update to write, PEFT's files have no word for one, or a scaled B does not fit its
            dtype.
    """
    outlines = outlines_of(state.updates)
    form = PeftForm.of(outlines, base)
    of_modules = {name: form.outlines(name, each) for name, each in outlines.items()}
    shapes = {key: each for one in of_modules.values() for key, each in one.items()}
    keys = {key: name for name, one in of_modules.items() for key in one}
    heads = {PREFIX + name: name for name in state.modules_to_save}

    @lru_cache(maxsize=1)
    def tensors(name: str) -> Mapping[str, Tensor]:
        return form.tensors(name, state.updates[name])

    def read(key: str) -> Tensor:
        return state.modules_to_save[heads[key]] if key in heads else tensors(keys[key])[key]

    shapes |= {key: state.modules_to_save[name].to("meta") for key, name in heads.items()}
    config = form.config(state, {name: each.rank for name, each in outlines.items()})
    with replacing(Path(folder) / TENSORS_NAME, Path(folder) / CONFIG_NAME) as (new_tensors, new_config):
        write_tensors(new_tensors, shapes, read, {"format": "pt"})
        new_config.write_text(config, encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftForm:
    """In which words of PEFT the updates of an adapter are written."""

    layouts: Mapping[str, str]
    """The layout of every update."""
    biases: Literal["none", "lora", "all"]
    """Whether updates of biases are in ``lora_bias`` or trained values."""
    base: Base | None

    @classmethod
    def of(cls, outlines: Mapping[str, LowRankUpdate], base: Base | None) -> "PeftForm":
        """Choose the form.

        Args:
            outlines: every update; values are not looked at.
            base: the parameters of the base, if they are at hand.

        Returns:
            The form.

        Raises:
            ValueError: if PEFT has no word for an update.
        """
        layouts = {name: each.layout for name, each in outlines.items()}
        pairs = {name for name, layout in layouts.items() if layout != "vector"}
        vectors = sorted(layouts.keys() - pairs)
        if not pairs:
            raise ValueError(
                f"updates must hold at least one module, got {'vectors only' if vectors else 'none'}."
                " Was every weight 0? PEFT has no adapter of biases alone."
            )
        odd = [name for name in vectors if not name.endswith(".bias")]
        if odd:
            raise ValueError(
                f"updates must be ones that PEFT's files have a word for, got vectors that are no biases: {odd[:3]}."
                " Add their delta_weight() to the model instead."
            )
        away = [name for name in vectors if layouts.get(name.removesuffix(".bias")) not in ("linear", "conv")]
        if vectors and not away and "embedding" not in layouts.values():
            return cls(layouts=layouts, biases="lora", base=base)
        if vectors and base is None:
            raise ValueError(
                "updates of biases must be of adapted linear layers or convolutions, without an embedding beside them,"
                f" or be written as trained values, got {(away or vectors)[:3]}. Give base=base_weights(<folder of the"
                " model>), or add their delta_weight() to the model instead."
            )
        return cls(layouts=layouts, biases="all" if vectors else "none", base=base)

    def tensors(self, name: str, update: LowRankUpdate) -> dict[str, Tensor]:
        """Return what stands for an update, by key, on the CPU.

        Raises:
            ValueError: if a scaled B does not fit its dtype, or the base does not fit.
        """
        return self._tensors(name, update, base_reader(self.base))

    def outlines(self, name: str, update: LowRankUpdate) -> dict[str, Tensor]:
        """Return the same without values, on the device ``meta``."""
        return {key: each.to("meta") for key, each in self._tensors(name, _outline(update), base_outline).items()}

    def config(self, state: AdapterState, ranks: Mapping[str, int]) -> str:
        """Return the text of the configuration.

        Args:
            state: the adapter; its updates are not looked at.
            ranks: of all updates as they are written.
        """
        pairs = {name: rank for name, rank in ranks.items() if self.layouts[name] != "vector"}
        largest = max(pairs.values())
        pattern = _pattern(pairs, largest)
        config = {
            "base_model_name_or_path": state.base_model_name_or_path,
            "bias": "all" if self.biases == "all" else "none",
            "fan_in_fan_out": state.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": largest,
            **({"lora_bias": True} if self.biases == "lora" else {}),
            "lora_dropout": 0.0,
            "modules_to_save": list(state.trained_modules) or None,
            "peft_type": "LORA",
            "r": largest,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(pairs),
            "task_type": state.task_type,
            "use_dora": False,
            "use_rslora": False,
        }
        return json.dumps(config, indent=2) + "\n"  # not sorted: the order within the patterns has a meaning

    def _tensors(self, name: str, update: LowRankUpdate, base: BaseReader) -> dict[str, Tensor]:
        path = PREFIX + name
        if update.layout == "vector":
            module = name.removesuffix(".bias")
            values = update.delta_weight().flatten()
            if self.biases == "lora":
                return {f"{PREFIX}{module}.lora_B.bias": _within(name, values, update.dtype)}
            trained = base(name, tuple(values.shape), False).to(values.device, values.dtype) + values
            inner = ".base_layer.bias" if self._wrapped(module) else ".bias"
            return {f"{PREFIX}{module}{inner}": _own(trained)}
        dtype = update.lora_B.dtype
        b = _within(name, update.scaling * update.lora_B.to(torch.promote_types(dtype, torch.float32)), dtype)
        a = _own(update.lora_A)
        if update.layout == "embedding":
            return {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
        tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        if update.layout == "conv":
            ones = (1,) * len(update.kernel)
            tensors = {
                f"{path}.lora_A.weight": a.unflatten(1, (-1, *update.kernel)),
                f"{path}.lora_B.weight": b.reshape(*b.shape, *ones),
            }
        if self.biases == "lora" and f"{name}.bias" not in self.layouts:
            tensors[f"{path}.lora_B.bias"] = b.new_zeros(b.shape[0])
        return tensors

    def _wrapped(self, module: str) -> bool:
        """Tell whether PEFT wraps a module, which it does with all whose names end in a target."""
        targets = [name for name, layout in self.layouts.items() if layout != "vector"]
        return any(f".{module}".endswith(f".{target}") for target in targets)


def _outline(update: LowRankUpdate) -> LowRankUpdate:
    a, b = update.lora_A.to("meta"), update.lora_B.to("meta")
    return LowRankUpdate(a, b, layout=update.layout, kernel=update.kernel)


def _own(tensor: Tensor) -> Tensor:
    """Bring to the CPU, where it is not an outline."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()


def _within(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    scaled = _own(values.to(dtype))
    if not scaled.is_meta and not torch.isfinite(scaled).all():
        raise ValueError(f"scaling · lora_B must fit {dtype}, got infinity for {name!r}. Write a float32 copy.")
    return scaled


def _pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Write ranks as PEFT's pattern, longest name first because the first key that matches the end of a name wins.

    A module of the default rank is written too where the shorter name of another would capture it.

    Returns:
        Escaped name to rank, in the order of the search.
    """
    special = [name for name, rank in ranks.items() if rank != default]
    captured = [name for name in ranks if any(name.endswith(f".{other}") for other in special)]
    ordered = sorted({*special, *captured}, key=lambda name: (-len(name), name))
    return {re.escape(name): ranks[name] for name in ordered}
