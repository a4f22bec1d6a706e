"""Parts of a weight that deserve an adapter and a rank of their own: slices of a fused projection, single experts."""

from dataclasses import dataclass

from torch import Tensor, nn

from flowra_adapters.layouts import Layout, layout_of
from flowra_adapters.operators import CONVOLUTIONS, LinearOperator, Operator, ParameterOperator

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True)
class Part:
    """Some rows of a weight in its standard layout."""

    name: str
    """Such as ``q``, or the number of an expert."""
    rows: slice | tuple[int, ...] | int
    """Which: a slice or indices of output rows, or the index of one matrix of a stack."""
    operator: Operator
    """How the layer uses them."""
    whole: Operator
    """How it uses the whole weight."""

    @property
    def index(self) -> slice | list[int] | int:
        """The rows, as tensors are indexed."""
        return list(self.rows) if isinstance(self.rows, tuple) else self.rows

    def of(self, whole: Tensor) -> Tensor:
        """Take this part of the whole weight, or of its bias."""
        return whole[self.index]

    def of_output(self, output: Tensor) -> Tensor:
        """Take the channels that this part makes of a linear layer's output."""
        return output[..., self.index]

    def add_to_output(self, output: Tensor, update: Tensor) -> None:
        """Add to those channels, in place."""
        output[..., self.index] += update


def parts_of(model: nn.Module, name: str, owner: nn.Module, whole: Operator) -> list[Part]:
    """List the parts of a weight, in the order of their rows; empty where it has none, or none are known."""
    if isinstance(owner, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        size = owner.embed_dim
        return _rows(whole, Layout({"q": size, "k": size, "v": size}))
    if isinstance(whole, ParameterOperator) and len(whole.shape) == 3 and not isinstance(owner, CONVOLUTIONS):
        return [Part(str(index), index, ParameterOperator(whole.shape[1:]), whole) for index in range(whole.shape[0])]
    if isinstance(whole, LinearOperator):
        reader, _, layer = name.rpartition(".")
        layout = layout_of(model.get_submodule(reader), layer, whole.out_size)
        return _rows(whole, layout) if layout else []
    return []


def _rows(whole: Operator, layout: Layout) -> list[Part]:
    """Cut the rows of a matrix."""
    found = []
    for name, rows in layout.rows().items():
        shape = (layout.blocks * layout.sizes[name], *whole.shape[1:])
        operator = LinearOperator(shape) if isinstance(whole, LinearOperator) else ParameterOperator(shape)
        found.append(Part(name, rows, operator, whole))
    return found
