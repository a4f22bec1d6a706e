"""The updates that sequential training works on: pairs y += s · B A x, while they train.

``LoRA`` of flowra-adapters is such a pair as it is; :func:`peft_pairs` shows the LoRA layers of a PEFT model as such.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import nn

__all__ = ["PeftPair", "TrainedPair", "check_pairs", "peft_pairs"]


class TrainedPair(Protocol):
    """A low-rank update whose factors are Parameters."""

    @property
    def lora_A(self) -> nn.Parameter:
        """A, ``(r, n)``."""

    @property
    def lora_B(self) -> nn.Parameter:
        """B, ``(m, r)``."""

    @property
    def scaling(self) -> float:
        """The constant s."""


class PeftPair:
    """One adapter of one LoRA layer of PEFT; made by :func:`peft_pairs`.

    Args:
        host: PEFT's layer.
        adapter_name: of the adapter.
    """

    def __init__(self, host: nn.Module, adapter_name: str) -> None:
        self._peft: Any = host
        self._name = adapter_name

    @property
    def lora_A(self) -> nn.Parameter:
        """A, ``(r, n)``."""
        return cast(nn.Parameter, self._peft.lora_A[self._name].weight)

    @property
    def lora_B(self) -> nn.Parameter:
        """B, ``(m, r)``."""
        return cast(nn.Parameter, self._peft.lora_B[self._name].weight)

    @property
    def scaling(self) -> float:
        """The constant s."""
        return float(self._peft.scaling[self._name])


def peft_pairs(model: nn.Module, adapter_name: str = "default") -> dict[str, PeftPair]:
    """Show the LoRA layers of a PEFT model as pairs. PEFT itself is not imported.

    Args:
        model: a ``PeftModel``, or a model of another library that carries PEFT's layers.
        adapter_name: of the adapter.

    Returns:
        Name of the layer in the base model to pair, in the model's order.

    Raises:
        ValueError: if no layer carries the adapter, or one that does is no plain pair beside a linear layer: an
            embedding, a convolution, DoRA or another variant, a bias in the update.
    """
    base = cast(nn.Module, model.get_base_model()) if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found: dict[str, PeftPair] = {}
    for name, host in base.named_modules():
        if not hasattr(host, "lora_A") or adapter_name not in getattr(host, "scaling", {}):
            continue
        peft: Any = host
        linear = adapter_name in peft.lora_A and isinstance(peft.lora_A[adapter_name], nn.Linear)
        if not linear or peft.lora_variant.get(adapter_name) is not None or peft.lora_bias.get(adapter_name, False):
            raise ValueError(
                f"layers must be plain LoRA on linear layers, got {type(host).__name__} with another update at"
                f" {name!r}. Leave it out of target_modules."
            )
        found[name] = PeftPair(host, adapter_name)
    if not found:
        raise ValueError(f"model must carry a LoRA adapter {adapter_name!r} of PEFT, got none.")
    return found


def check_pairs(layers: Mapping[str, TrainedPair], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse layers that a memory does not know, or whose update is more than s · B A.

    Args:
        layers: module name to pair.
        shapes: (m, n) of the modules that are remembered.

    Raises:
        ValueError: if one is, or there are none.
    """
    if not layers:
        raise ValueError("layers must hold at least one pair, got none")
    for name, layer in layers.items():
        if name not in shapes:
            raise ValueError(f"layers must be modules of the memory, got {name!r} beside {sorted(shapes)[:5]}…")
        shape = layer.lora_B.shape[0], layer.lora_A.shape[1]
        if shape != tuple(shapes[name]):
            raise ValueError(f"layers must have the shapes of the memory, {shapes[name]}, got {shape} for {name!r}")
        more = [each for each in ("lora_E", "lora_magnitude") if getattr(layer, each, None) is not None]
        if more:
            raise ValueError(f"layers must be pairs s · B A, got {type(layer).__name__} with {more[0]} at {name!r}")
