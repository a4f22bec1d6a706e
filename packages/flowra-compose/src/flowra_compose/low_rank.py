"""The values that composition works on: low-rank updates by module, and an adapter made of them.

Conventions: an update is a matrix, ``(m, n)`` = (out, in); ΔW = s · B A with A ``(r, n)`` and B ``(m, r)``. How it lies
in a parameter that is no such matrix is its *layout*; the algebra of composition does not ask for it. What is not of
low rank, as the update of DoRA, is a pair whose one factor is the identity (:meth:`LowRankUpdate.of_delta_weight`).

=============  ==========================  ===============================================
layout         parameter                   ΔW
=============  ==========================  ===============================================
``linear``     ``(m, n)``                  as it is
``conv``       ``(m, n / (k₁ k₂ …), k₁…)``  every kernel flattened, one output channel a row
``embedding``  ``(n, m)``                  transposed: a linear map of one-hot tokens
``vector``     ``(m,)``                    n = 1: a bias, or the weight of a norm
=============  ==========================  ===============================================

Source: Hu et al. 2022 (arXiv:2106.09685), section 4.1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["AdapterState", "Layout", "LowRankUpdate"]

Layout = Literal["linear", "conv", "embedding", "vector"]

FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate:
    """The update of one module, ΔW = scaling · B A. With factors on the device ``meta`` it has all but values.

    Raises:
        ValueError: if the factors do not fit each other or the layout, are empty, not of a floating dtype or not
            finite.
    """

    lora_A: Tensor
    """A, ``(r, n)``, r ≥ 1; float16, bfloat16, float32 or float64."""
    lora_B: Tensor
    """B, ``(m, r)``; its dtype may differ from A's, its device may not."""
    scaling: float = 1.0
    """s, a finite number."""
    layout: Layout = field(default="linear", kw_only=True)
    """How ΔW lies in its parameter."""
    kernel: tuple[int, ...] = field(default=(), kw_only=True)
    """The sides of the kernel of a convolution, else empty."""

    def __post_init__(self) -> None:
        a, b = self.lora_A, self.lora_B
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise ValueError(f"lora_A and lora_B must be (r, n) and (m, r) without an empty side, got {shapes}")
        if a.dtype not in FACTOR_DTYPES or b.dtype not in FACTOR_DTYPES:
            raise ValueError(f"lora_A and lora_B must be float16, bfloat16, float32 or 64, got {a.dtype} and {b.dtype}")
        outline = a.is_meta or b.is_meta  # shapes and dtypes without values
        if not math.isfinite(self.scaling) or not (outline or (_is_finite(a) and _is_finite(b))):
            raise ValueError("lora_A, lora_B and scaling must be finite, got NaN or infinity")
        side = math.prod(self.kernel)
        fits = side > 0 and a.shape[1] % side == 0 if self.layout == "conv" else not self.kernel
        if not fits or (self.layout == "vector" and a.shape[1] != 1):
            raise ValueError(f"lora_A must fit the layout {self.layout!r}, kernel {self.kernel}, got {tuple(a.shape)}")

    @classmethod
    def of_delta_weight(
        cls, delta_weight: Tensor, *, layout: Layout = "linear", kernel: tuple[int, ...] = ()
    ) -> "LowRankUpdate":
        """Return the update whose product is a given matrix, exactly: the factor of the shorter side is the identity.

        Args:
            delta_weight: ΔW, ``(m, n)``.
            layout: how it lies in its parameter.
            kernel: of a convolution.
        """
        m, n = delta_weight.shape
        identity = torch.eye(min(m, n), dtype=delta_weight.dtype, device=delta_weight.device)
        factors = (delta_weight, identity) if m <= n else (identity, delta_weight)
        return cls(*factors, layout=layout, kernel=kernel)

    @property
    def rank(self) -> int:
        """r, the number of rows of A; the rank of ΔW is at most this."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of ΔW."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The promoted dtype of both factors."""
        return torch.promote_types(self.lora_A.dtype, self.lora_B.dtype)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter that is updated, see the table above."""
        m, n = self.shape
        shapes: dict[Layout, tuple[int, ...]] = {
            "linear": (m, n),
            "conv": (m, n // math.prod(self.kernel), *self.kernel),
            "embedding": (n, m),
            "vector": (m,),
        }
        return shapes[self.layout]

    @property
    def parameters(self) -> int:
        """Numbers in both factors, r (m + n)."""
        return self.lora_A.numel() + self.lora_B.numel()

    def delta_weight(self) -> Tensor:
        """Return ΔW, ``(m, n)``, in the promoted dtype of the factors, at least float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AdapterState:
    """An adapter as values: what it adds to each module, and the modules it trained in full.

    Raises:
        ValueError: if a name is not one a file can carry, a module is both adapted and trained in full, the trained
            modules and tensors do not match, or a trained tensor is not finite.
    """

    updates: Mapping[str, LowRankUpdate]
    """Qualified module name to the update of its weight, or for a ``vector`` the qualified name of the parameter
    (``fc.bias``, ``norm.weight``). What is not named is not changed. Read when needed: it may be a file."""
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    """Qualified tensor name (``classifier.weight``) to the trained value that replaces the base's."""
    trained_modules: tuple[str, ...] = ()
    """The modules that those tensors make up, by default the outermost of their owners. Name ``classifier`` where
    all of it was trained and its tensors lie deeper (``classifier.dense.weight``): PEFT wraps a head as a whole."""
    base_model_name_or_path: str | None = None
    """The base model, if known."""
    task_type: str | None = None
    """PEFT's task type, such as ``SEQ_CLS`` or ``CAUSAL_LM``, if known."""
    fan_in_fan_out: bool = False
    """Whether the base keeps adapted weights as (in, out), as GPT-2's ``Conv1D`` does. The factors mean the same."""

    def __post_init__(self) -> None:
        odd = [name for name in (*self.updates, *self.modules_to_save) if not _is_plain(name)]
        odd += [name for name in self.modules_to_save if "." not in name]
        if odd:
            raise ValueError(f"names must be dotted module paths, of printable parts other than lora_…, got {odd}")
        owners = {name.rpartition(".")[0] for name in self.modules_to_save}
        outermost = {one for one in owners if not any(_is_within(one, other) for other in owners - {one})}
        modules = tuple(sorted(self.trained_modules or outermost))
        object.__setattr__(self, "trained_modules", modules)
        empty = [one for one in modules if not any(_is_within(owner, one) for owner in owners)]
        loose = [owner for owner in owners if sum(_is_within(owner, one) for one in modules) != 1]
        if empty or loose:
            got = f"{list(modules)} for tensors of {sorted(owners)}"
            raise ValueError(f"trained_modules must hold each tensor of modules_to_save once, got {got}")
        both = sorted(name for name in self.updates if any(_is_within(name, one) for one in modules))
        if both:
            raise ValueError(f"a module must be either adapted or trained in full (modules_to_save), got both: {both}")
        for name, tensor in self.modules_to_save.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise ValueError(f"modules_to_save must be finite, got NaN or infinity in {name!r}")


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite: NaN and infinity reach the sum, which large values can overflow, too."""
    return bool(torch.isfinite(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def _is_plain(name: str) -> bool:
    """Tell whether a name survives the file format: no part is empty, unprintable or one of the format's own."""
    return all(part and part.isprintable() and not part.startswith("lora_") for part in name.split("."))


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
