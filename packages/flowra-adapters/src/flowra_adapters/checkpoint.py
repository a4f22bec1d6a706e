"""A set of low-rank updates as values, and the way from a model to values and back."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowra_adapters.attach import adapters
from flowra_adapters.layers import is_conv1d
from flowra_adapters.lora import LoRA

__all__ = ["AdapterCheckpoint", "checkpoint_of", "own_copy", "owner_of"]

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCheckpoint:
    """A set of low-rank updates ΔW = scaling · B A, as values."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module name to (A ``(r, n)``, B ``(m, r)``), r ≥ 1."""
    scalings: Mapping[str, float]
    """Module name to s, for the same modules."""
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameter name to tensor, for modules trained in full."""
    trained_modules: tuple[str, ...] = ()
    """Names of those modules; every tensor of ``modules_to_save`` lies in one."""
    base_model_name_or_path: str | None = None
    """Where the base comes from, for the reader."""
    task_type: str | None = None
    """PEFT's task type, such as ``SEQ_CLS`` or ``CAUSAL_LM``."""
    fan_in_fan_out: bool = False
    """Whether the base stores the weights of these layers transposed (``Conv1D``); the factors mean the same."""

    def __post_init__(self) -> None:
        """Check that every module has a scaling and factors that fit each other, and nothing is NaN."""
        if self.factors.keys() != self.scalings.keys():
            raise ValueError(f"scalings must name the modules of factors, got {sorted(self.scalings)}")
        for name, (a, b) in self.factors.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
                raise ValueError(
                    f"factors must be A (r, n) and B (m, r) with r ≥ 1, got {tuple(a.shape)}, {tuple(b.shape)}"
                    f" for {name!r}"
                )
            if not {a.dtype, b.dtype} <= DTYPES:
                raise ValueError(f"factors must be floating point of ≥ 16 bits, got {a.dtype}, {b.dtype} for {name!r}")
            if not (torch.isfinite(a).all() and torch.isfinite(b).all() and math.isfinite(self.scalings[name])):
                raise ValueError(f"factors must be finite, got NaN or infinity for {name!r}")
        both = [name for name in self.factors if owner_of(f"{name}.weight", self.trained_modules) is not None]
        if both:
            raise ValueError(f"a module must be adapted or trained in full, got both for {both[0]!r}")
        strays = [name for name in self.modules_to_save if owner_of(name, self.trained_modules) is None]
        if strays:
            raise ValueError(f"modules_to_save must lie in trained_modules {self.trained_modules}, got {strays[0]!r}")
        for name, tensor in self.modules_to_save.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"modules_to_save must be finite, got NaN or infinity in {name!r}")


def checkpoint_of(
    model: nn.Module,
    *,
    adapter: str = "default",
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> AdapterCheckpoint:
    """Read the named adapter off a model.

    Returns:
        Its values; the tensors are copies, on the CPU.

    Raises:
        ValueError: if no such adapter is attached or a module to save does not exist.
        TypeError: if an adapter is not of a method that PEFT's LoRA format can hold.
    """
    factors, scalings = {}, {}
    for name, one in adapters(model, adapter).items():
        if not isinstance(one, LoRA):
            raise TypeError(
                f"adapter must be LoRA to be written in PEFT's format, got {type(one).__name__} at {name!r}"
            )
        if one.rank > 0:
            factors[name] = (own_copy(one.lora_A), own_copy(one.lora_B))
            scalings[name] = one.scaling
    saved = {}
    trained = tuple(modules_to_save)
    for module_name in trained:
        for name, tensor in model.get_submodule(module_name).state_dict().items():
            saved[f"{module_name}.{name}"] = own_copy(tensor)
    return AdapterCheckpoint(
        factors=factors,
        scalings=scalings,
        modules_to_save=saved,
        trained_modules=trained,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in factors),
    )


def owner_of(name: str, modules: Iterable[str]) -> str | None:
    """Return the outermost module above a tensor that is listed, where a listing means the end of a module's name."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    return next((each for each in above if any(f".{each}".endswith(f".{module}") for module in modules)), None)


def own_copy(tensor: Tensor) -> Tensor:
    """Copy to the CPU, contiguous, sharing memory with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()
