"""Weights that a library keeps quantised: read in full precision, written back in the layer's own format.

Known are ``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes, and the tensor classes that torchao puts in the place of
a weight. They are recognised by the names of their classes; the libraries are imported only where such a layer is
there. An adapter needs none of this to be added to a layer's output: its base stays as it is, frozen. Reading is for
methods that depend on the base weight (DoRA, PiSSA), writing for :func:`flowra_adapters.merge`.
"""

from abc import ABC, abstractmethod
from copy import copy, deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = [
    "QuantisedWeight",
    "dequantised_weight",
    "has_codes",
    "is_quantised",
    "is_quantised_linear",
    "keep_gradients",
    "quantised_weight",
    "refuse_blocked_gradients",
]


class QuantisedWeight(ABC):
    """One quantised weight as a value: its codes, its scales and what else its format says."""

    @abstractmethod
    def dequantised(self) -> Tensor:
        """Return the weight that the codes stand for, in the layer's layout, float32."""

    @abstractmethod
    def requantised(self, weight: Tensor) -> Self:
        """Quantise another weight of this shape in the same format, with the same block size, and new scales."""

    @abstractmethod
    def write(self, owner: nn.Module, name: str) -> None:
        """Put this into the parameter of a layer, which holds it from then on; the Parameter object stays."""

    @abstractmethod
    def clone(self) -> Self:
        """Copy, sharing memory with nothing."""


def dequantised_weight(layer: nn.Module, parameter: str = "weight") -> Tensor:
    """Return a layer's weight in full precision, such as an initialisation that decomposes it needs.

    Args:
        layer: whose parameter is read; not changed. Updates that are merged into it are part of it.
        parameter: name of the parameter in the layer.

    Returns:
        float32 if it is quantised, else as it is stored; in the layer's layout, detached.

    Raises:
        ValueError: if it is in a format that cannot be read.
    """
    quantised = quantised_weight(layer, parameter)
    if quantised is not None:
        return quantised.dequantised()
    plain = layer._parameters[parameter]
    assert plain is not None
    return plain.detach()


def quantised_weight(owner: nn.Module, name: str) -> QuantisedWeight | None:
    """Read a parameter as a value that shares its memory; None if it is not quantised."""
    parameter = owner._parameters[name]
    if parameter is None or not is_quantised(parameter):
        return None
    if _descends(type(parameter), "Params4bit"):
        return _FourBit.of(parameter)
    return _EightBit.of(parameter, owner) if _descends(type(parameter), "Int8Params") else _TorchAO(parameter.detach())


def is_quantised(parameter: Tensor) -> bool:
    """Tell whether a parameter holds codes and scales of one of the known libraries."""
    kind = type(parameter)
    if kind is nn.Parameter:  # the usual case, and the fast one
        return False
    if _descends(kind, "Params4bit"):
        return getattr(parameter, "quant_state", None) is not None
    return kind.__module__.startswith("torchao.") or (_descends(kind, "Int8Params") and parameter.dtype == torch.int8)


def is_quantised_linear(layer: nn.Module) -> bool:
    """Tell whether a layer is a linear one of bitsandbytes whose weight is quantised by now."""
    weight = layer._parameters.get("weight")
    if weight is None or not is_quantised(weight):
        return False
    own = _class_named(type(layer), "Linear4bit") or _class_named(type(layer), "Linear8bitLt")
    return own is not None and type(layer).forward is own.__dict__["forward"]


def has_codes(parameter: Tensor) -> bool:
    """Tell whether the elements of a parameter are not the values of a weight, so that nothing can be added to them."""
    kind = type(parameter)
    codes = not (parameter.is_floating_point() or parameter.is_complex())
    return codes or _descends(kind, "Params4bit") or _descends(kind, "Int8Params")


def refuse_blocked_gradients(model: nn.Module) -> None:
    """Refuse a model with a weight of torchao that quantises the layer's input, too: no gradient passes it.

    Raises:
        ValueError: if there is one.
    """
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and type(parameter).__module__.startswith("torchao."):
                kwargs = [getattr(parameter, each, None) for each in _OF_THE_INPUT]
                if any(each is not None for each in kwargs):
                    raise ValueError(
                        f"weights must leave the input of their layer as it is, got {type(parameter).__name__} with"
                        f" quantised or scaled inputs at {f'{module_name}.{name}'.lstrip('.')!r}, which passes no"
                        " gradient. Quantise weights only (Int8WeightOnlyConfig), or merge before quantising."
                    )


_OF_THE_INPUT = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")


def keep_gradients(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes out of their inference format, for good.

    On processors with AVX512-BF16 such a layer repacks itself in the first pass without gradients in evaluation mode:
    it rounds its scales to bfloat16, and from then on no gradient reaches its input, in training mode either. Here the
    repacked ones get their own format back, with the scales they have now, and repack no more.
    """
    for module in model.modules():
        if _class_named(type(module), "Linear4bit") is None:
            continue
        weight = module._parameters["weight"]
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            assert weight is not None
            _FourBit.of(weight).write(module, "weight")
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute of nn.Module


@dataclass(frozen=True, eq=False)
class _FourBit(QuantisedWeight):
    """NF4 or FP4 in blocks, whose scales may be quantised again (Dettmers et al. 2023, arXiv:2305.14314)."""

    codes: Tensor
    state: Any  # bitsandbytes' QuantState
    double: bool

    @classmethod
    def of(cls, parameter: Any) -> Self:  # noqa: ANN401 - a Params4bit
        """Read a parameter, also one in the inference format."""
        codes, state = parameter.data, parameter.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            state = copy(state)
            state.original_nested = False  # the scales are not to be quantised again: that would change them
            functional = import_module("bitsandbytes.functional")
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
            state.absmax = state.absmax.T.reshape(-1).float()
        return cls(codes, state, bool(parameter.compress_statistics))

    def dequantised(self) -> Tensor:
        wide = copy(self.state)
        wide.dtype = torch.float32
        weight: Tensor = import_module("bitsandbytes.functional").dequantize_4bit(self.codes, wide)
        return weight

    def requantised(self, weight: Tensor) -> Self:
        codes, state = import_module("bitsandbytes.functional").quantize_4bit(
            weight.to(self.state.dtype),
            blocksize=self.state.blocksize,
            compress_statistics=self.double,
            quant_type=self.state.quant_type,
            quant_storage=self.codes.dtype,
        )
        return type(self)(codes, state, self.double)

    def write(self, owner: Any, name: str) -> None:  # noqa: ANN401 - a Linear4bit
        parameter = owner._parameters[name]
        self.state.to(parameter.device)
        parameter.data = self.codes.to(parameter.device)
        parameter.quant_state = owner.quant_state = self.state

    def clone(self) -> Self:
        return type(self)(self.codes.clone(), deepcopy(self.state), self.double)


@dataclass(frozen=True, eq=False)
class _EightBit(QuantisedWeight):
    """int8 with one scale for each output channel (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339)."""

    codes: Tensor
    largest: Tensor
    """Of each row, in absolute value; stands for code 127."""

    @classmethod
    def of(cls, parameter: Any, owner: Any) -> Self:  # noqa: ANN401 - an Int8Params and its layer
        """Read a parameter; the layer takes the scales over in its first pass."""
        return cls(parameter.data, parameter.SCB if parameter.SCB is not None else owner.state.SCB)

    def dequantised(self) -> Tensor:
        return self.codes.float() * (self.largest * (1 / 127)).unsqueeze(1)

    def requantised(self, weight: Tensor) -> Self:
        quantise = import_module("bitsandbytes.functional").int8_vectorwise_quant
        codes, largest, _ = quantise(weight.to(torch.float16))  # the only dtype that it takes
        return type(self)(codes, largest)

    def write(self, owner: Any, name: str) -> None:  # noqa: ANN401 - a Linear8bitLt
        parameter = owner._parameters[name]
        parameter.data = self.codes.to(parameter.device)
        parameter.CB, parameter.SCB = parameter.data, self.largest.to(parameter.device)  # taken over in its next pass

    def clone(self) -> Self:
        return type(self)(self.codes.clone(), self.largest.clone())


@dataclass(frozen=True, eq=False)
class _TorchAO(QuantisedWeight):
    """A tensor class of torchao."""

    tensor: Any

    def dequantised(self) -> Tensor:
        weight: Tensor
        match self.kind:
            case "Int8Tensor" | "Float8Tensor":
                weight = self.tensor.dequantize(torch.float32)
            case "IntxUnpackedToInt8Tensor":
                weight = self.tensor.dequantize().float()
            case other:
                raise ValueError(
                    f"weight must be in a format that can be read and written, got torchao's {other}."
                    " Use Int8WeightOnlyConfig, IntxWeightOnlyConfig or Float8WeightOnlyConfig."
                )
        return weight

    def requantised(self, weight: Tensor) -> Self:
        old, kind = self.tensor, type(self.tensor)
        wide, block = weight.to(old.dtype), tuple(old.block_size)
        blocks = import_module("torchao.quantization").PerBlock(block)
        match self.kind:
            case "Int8Tensor":
                new = kind.from_hp(
                    wide, granularity=blocks, mapping_type=self._mapping(), reduce_range=old.reduce_range
                )
            case "Float8Tensor":
                new = kind.from_hp(
                    wide,
                    float8_dtype=old.qdata.dtype,
                    granularity=blocks,
                    mm_config=old.mm_config,
                    kernel_preference=old.kernel_preference,
                )
            case _:
                new = kind.from_hp(wide, block, old.target_dtype, mapping_type=self._mapping())
        return type(self)(new)

    def write(self, owner: nn.Module, name: str) -> None:
        parameter = owner._parameters[name]
        assert parameter is not None
        parameter.data.copy_(self.tensor)

    def clone(self) -> Self:
        return type(self)(self.tensor.clone())

    @property
    def kind(self) -> str:
        """Name of the tensor class."""
        return type(self.tensor).__name__

    def _mapping(self) -> object:
        """Tell whether 0 lies in the middle of the codes, by what the tensor has."""
        mapping = import_module("torchao.quantization").MappingType
        shifted = self.tensor.zero_point is not None and bool(self.tensor.zero_point.any())
        return mapping.ASYMMETRIC if shifted else mapping.SYMMETRIC


def _descends(kind: type, name: str) -> bool:
    return _class_named(kind, name) is not None


def _class_named(kind: type, name: str) -> type | None:
    """Return the class of bitsandbytes with this name that a class is or descends from."""
    return next(
        (each for each in kind.__mro__ if each.__name__ == name and each.__module__.startswith("bitsandbytes.")), None
    )
