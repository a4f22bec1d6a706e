"""A set of updates as values in PEFT's layout."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["DTYPES", "AdapterCheckpoint", "Kind", "check_saved", "is_odd", "own_copy", "owner_of"]

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
Kind = Literal["embedding", "attention", "parameter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterCheckpoint:
    """A set of low-rank updates ΔW = scaling · B A, and what PEFT keeps beside them, as values."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Name to (A, B), r ≥ 1. Of a linear layer ``(r, n)`` and ``(m, r)``; of a convolution in g groups ``(g·r, n, *k)``
    and ``(m, r, 1, …)``; of an embedding ``(r, V)`` and ``(d, r)``; of a raw parameter, a stack of E matrices,
    ``(E, r, n)`` and ``(E, m, r)``; of an ``nn.MultiheadAttention`` ``(r, d)`` and ``(3 d, r)``, for queries, keys and
    values together."""
    scalings: Mapping[str, float]
    """Name to s, for the same names."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """What is not a linear layer or convolution: name to kind. Raw parameters are called by their own names."""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """μ ``(m,)`` of DoRA, for all names or for none."""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a bias to its trained value."""
    bias_offsets: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a layer to what is added to its output beside s · B A x (PEFT's ``lora_bias``)."""
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
    errors: Mapping[str, float] = field(default_factory=dict)
    """Site to ‖ΔW - s · B A‖_F / ‖ΔW‖_F, where the update had to be cut or decomposed to become LoRA."""

    def __post_init__(self) -> None:
        """Check that every name has a scaling and factors that fit each other, and nothing is NaN."""
        if self.factors.keys() != self.scalings.keys():
            raise ValueError(f"scalings must name the modules of factors, got {sorted(self.scalings)}")
        for name, (a, b) in self.factors.items():
            self._check_factors(name, a, b)
        self._check_company()
        both = [name for name in self.factors if owner_of(f"{name}.weight", self.trained_modules) is not None]
        if both:
            raise ValueError(f"a module must be adapted or trained in full, got both for {both[0]!r}")
        strays = [name for name in self.modules_to_save if owner_of(name, self.trained_modules) is None]
        if strays:
            raise ValueError(f"modules_to_save must lie in trained_modules {self.trained_modules}, got {strays[0]!r}")
        for group in ("modules_to_save", "magnitudes", "biases", "bias_offsets"):
            tensors: Mapping[str, Tensor] = getattr(self, group)
            for name, tensor in tensors.items():
                _check_name(name)
                if tensor.dtype not in DTYPES and (group != "modules_to_save" or is_odd(tensor)):
                    raise ValueError(f"{group} must be floating point of ≥ 16 bits, got {tensor.dtype} for {name!r}")
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{group} must be finite, got NaN or infinity in {name!r}")

    def rank(self, name: str) -> int:
        """Return PEFT's r of a name: that of all groups together, and of one matrix of a stack."""
        return self.factors[name][0].shape[1 if self.kinds.get(name) == "parameter" else 0]

    def _check_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        _check_name(name)
        kind, shapes = self.kinds.get(name), f"{tuple(a.shape)}, {tuple(b.shape)} for {name!r}"
        if kind == "parameter":
            if a.ndim != 3 or b.ndim != 3 or len(a) != len(b) or a.shape[1] != b.shape[2] or 0 in (*a.shape, *b.shape):
                raise ValueError(f"factors must be A (E, r, n) and B (E, m, r) with r ≥ 1, got {shapes}")
        elif a.ndim > 2 and b.ndim == a.ndim and kind is None:
            if 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1] or set(b.shape[2:]) != {1}:
                raise ValueError(f"factors must be A (g·r, n, *k) and B (m, r, 1, …) with r ≥ 1, got {shapes}")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise ValueError(f"factors must be A (r, n) and B (m, r) with r ≥ 1, got {shapes}")
        if not {a.dtype, b.dtype} <= DTYPES:
            raise ValueError(f"factors must be floating point of ≥ 16 bits, got {a.dtype}, {b.dtype} for {name!r}")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all() and math.isfinite(self.scalings[name])):
            raise ValueError(f"factors must be finite, got NaN or infinity for {name!r}")

    def _check_company(self) -> None:
        """Check what belongs to factors: magnitudes of all or none, and their kinds."""
        if self.magnitudes:
            if self.magnitudes.keys() != self.factors.keys():
                odd = sorted(self.magnitudes.keys() ^ self.factors.keys())
                raise ValueError(f"magnitudes must be there for all modules or none, got {odd[0]!r} on one side only")
            for name, magnitude in self.magnitudes.items():
                if magnitude.shape != self.factors[name][1].shape[:1] or self.kinds.get(name) in SHAPELESS:
                    raise ValueError(f"magnitudes must be (m,), got {tuple(magnitude.shape)} for {name!r}")
        for name, kind in self.kinds.items():
            if name not in self.factors:
                raise ValueError(f"kinds must name modules of factors, got {name!r}")
            if kind == "attention" and tuple(self.factors[name][1].shape[:1]) != (3 * self.factors[name][0].shape[1],):
                shapes = [tuple(each.shape) for each in self.factors[name]]
                raise ValueError(
                    f"factors of an attention block must be (r, d) and (3 d, r), got {shapes} for {name!r}"
                )


SHAPELESS = ("attention", "parameter")


def _check_name(name: str) -> None:
    """Refuse what no module is called: names become no paths here, but may do so elsewhere."""
    if not all(part and part.isprintable() and not set(part) & set("/\\") for part in name.split(".")):
        raise ValueError(f"names must be dotted paths of modules, got {name[:200]!r}")


def owner_of(name: str, modules: Iterable[str]) -> str | None:
    """Return the outermost module above a tensor that is listed, where a listing means the end of a module's name."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    return next((each for each in above if any(f".{each}".endswith(f".{module}") for module in modules)), None)


def is_odd(tensor: Tensor) -> bool:
    """Tell whether a tensor is complex, or of a floating point that PyTorch cannot calculate with."""
    return tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in DTYPES)


def check_saved(name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> None:
    """Check that a tensor of a module trained in full can take the place of the model's own, of another width perhaps.

    Raises:
        ValueError: if there is none, or it has another shape, is of another kind, or has no room for the values.
    """
    have = own.get(name)
    if have is None or have.shape != tensor.shape:
        has = "no such tensor" if have is None else tuple(have.shape)
        raise ValueError(f"{name!r} must fit the model ({has}), got {tuple(tensor.shape)}")
    wide = have.is_floating_point() and tensor.dtype in DTYPES
    if not wide and have.dtype != tensor.dtype:
        raise ValueError(f"{name!r} must fit the model ({have.dtype}), got {tensor.dtype}")
    if wide and not torch.isfinite(tensor.to(have.dtype)).all():
        raise ValueError(f"{name!r} must fit the model's {have.dtype}, got NaN, infinity, or values beyond it")


def own_copy(tensor: Tensor) -> Tensor:
    """Copy to the CPU, contiguous, sharing memory with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()
