"""What the tensors of PEFT's kinds of adapters add to a parameter.

=========================  ===========================================================================================
kind                       ΔW
=========================  ===========================================================================================
LoRA of a linear layer     s B A with A ``(r, n)`` and B ``(m, r)``
of a convolution           the same with A ``(r, n, *k)`` and B ``(m, r, 1, …)``, every kernel flattened
of an embedding            the same with A ``(r, V)`` and B ``(d, r)``, transposed
AdaLoRA                    s B diag(E) A with E ``(r, 1)``
DoRA                       D (W + s B A) − W with D = diag(magnitude / ‖rows of W + s B A‖); W is the base's
``lora_bias``              s b, of the bias of the layer
``bias``                   trained − base, of a bias
=========================  ===========================================================================================

PEFT's LoRA of a convolution in g > 1 groups has no ΔW: its A reads the channels of all groups, which no grouped weight
does, and PEFT does not merge it.

Source: PEFT 0.21.2, ``get_delta_weight`` of its layers, and the forward pass of its DoRA (Liu et al. 2024,
arXiv:2402.09353, equation 5). Deviation: DoRA is computed in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowra_compose.base_weights import BaseReader
from flowra_compose.low_rank import LowRankUpdate

__all__ = ["BiasRecipe", "Recipe", "WeightRecipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRecipe:
    """How the update of a weight is made of tensors of a file."""

    name: str
    """The module's."""
    parts: Mapping[str, str]
    """What a tensor is (``lora_A``, ``lora_embedding_A``, ``lora_E``, ``lora_magnitude_vector``, ``weight`` …) to its
    key in the file."""
    rank: float
    """The configured one."""
    scaling: float
    """s."""
    transposed: bool = False
    """Whether the base keeps its linear weights as (in, out)."""

    def update(self, tensors: Mapping[str, Tensor], base: BaseReader) -> LowRankUpdate:
        """Make the update, on the device of the tensors.

        Returns:
            Of layout ``linear``, ``conv`` or ``embedding``.

        Raises:
            ValueError: if a tensor is not finite or does not fit the others, the rank, or the base.
        """
        found = {part: tensors[key] for part, key in self.parts.items()}
        lora = self._lora(found)
        if lora.rank != self.rank:
            raise ValueError(f"rank must be the configured {self.rank:g}, got {lora.rank}")
        own, magnitude = found.get("weight"), found.get("lora_magnitude_vector")
        if own is not None or magnitude is not None:
            weight = base(f"{self.name}.weight", lora.parameter_shape, self.transposed and lora.layout == "linear")
            if own is not None:
                _check_unchanged(own, weight)
            if magnitude is not None:
                return _dora(lora, magnitude, weight)
        return lora

    def _lora(self, found: Mapping[str, Tensor]) -> LowRankUpdate:
        if "lora_embedding_A" in found:
            a, b = found["lora_embedding_A"], found["lora_embedding_B"]
            return LowRankUpdate(a, b, self.scaling, layout="embedding")
        a, b, e = found["lora_A"], found["lora_B"], found.get("lora_E")
        if e is not None:
            if tuple(e.shape) != (*a.shape[:1], 1) or e.dtype != b.dtype or b.ndim != 2 or b.shape[1] != len(e):
                shapes = f"{tuple(a.shape)}, {tuple(e.shape)}, {tuple(b.shape)}"
                raise ValueError(f"lora_A, lora_E, lora_B must be (r, n), (r, 1), (m, r) of one dtype, got {shapes}")
            return LowRankUpdate(a, b * e.T, self.scaling)
        if a.ndim == b.ndim > 2 and set(b.shape[2:]) == {1}:
            if b.shape[1] < a.shape[0] and a.shape[0] % b.shape[1] == 0:
                raise ValueError(
                    f"convolutions must have one group, got {a.shape[0] // b.shape[1]}: PEFT's lora_A reads the"
                    " channels of all groups, so there is no update of the grouped weight"
                )
            return LowRankUpdate(a.flatten(1), b.flatten(1), self.scaling, layout="conv", kernel=tuple(a.shape[2:]))
        return LowRankUpdate(a, b, self.scaling)


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasRecipe:
    """How the update of a bias is made of tensors of a file: of ``lora_bias``, of a trained value, or of both."""

    name: str
    """The bias's, such as ``fc.bias``."""
    offset: str | None = None
    """Key of ``lora_B.bias``."""
    scaling: float = 1.0
    """s of ``lora_bias``."""
    trained: str | None = None
    """Key of the trained value."""

    def update(self, tensors: Mapping[str, Tensor], base: BaseReader) -> LowRankUpdate:
        """Make the update.

        Returns:
            Of layout ``vector``.

        Raises:
            ValueError: if a tensor is no finite vector, or does not fit the base.
        """
        added = []
        if self.offset is not None:
            added.append(_vector(tensors[self.offset], self.scaling))
        if self.trained is not None:
            trained = tensors[self.trained]
            dtype = torch.promote_types(trained.dtype, torch.float32)
            before = base(self.name, tuple(trained.shape), False)
            added.append(_vector(trained.to(dtype) - before.to(dtype)))
        if len(added) == 1:
            return added[0]
        if added[0].shape != added[1].shape:
            raise ValueError(f"biases must have one shape, got {added[0].shape[0]} and {added[1].shape[0]} values")
        return _vector((added[0].delta_weight() + added[1].delta_weight()).flatten())


Recipe = WeightRecipe | BiasRecipe


def _vector(values: Tensor, scaling: float = 1.0) -> LowRankUpdate:
    if values.ndim != 1:
        raise ValueError(f"biases must be vectors, got {tuple(values.shape)}")
    return LowRankUpdate(values.new_ones(1, 1), values[:, None], scaling, layout="vector")


def _dora(lora: LowRankUpdate, magnitude: Tensor, weight: Tensor) -> LowRankUpdate:
    """Return D (W + s B A) − W, of full rank, in the dtype of the factors or float32 if that is wider."""
    rows = lora.shape[0]
    if magnitude.numel() != rows or max(magnitude.shape, default=0) != rows:
        raise ValueError(f"lora_magnitude_vector must have {rows} values, got {tuple(magnitude.shape)}")
    matrix = (weight.T if lora.layout == "embedding" else weight.flatten(1)).double()
    moved = matrix + lora.scaling * (lora.lora_B.double() @ lora.lora_A.double())
    longer = magnitude.flatten().double() / moved.norm(dim=1)
    dtype = torch.promote_types(lora.dtype, torch.float32)
    delta = (longer[:, None] * moved - matrix).to(dtype)
    return LowRankUpdate.of_delta_weight(delta, layout=lora.layout, kernel=lora.kernel)


def _check_unchanged(own: Tensor, weight: Tensor) -> None:
    """Refuse a weight of the base in the file that is not the base's: PEFT would put it there."""
    if own.is_meta:
        return
    weights = [weight, weight.T] if weight.ndim == 2 else [weight]
    if not any(own.shape == each.shape and torch.equal(own, each.to(own.dtype)) for each in weights):
        raise ValueError("base_layer.weight must be the base's own weight, got another: the adapter replaces it")
