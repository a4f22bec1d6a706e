"""The seam between a method and the machinery.

A method says how its update is parameterised, applied, materialised, resized and counted. It never touches the layer
it adapts: it knows the layer's :class:`~flowra_adapters.operators.Operator`, a value. The machinery
(:mod:`flowra_adapters.attach`, :mod:`flowra_adapters.applying`, :mod:`flowra_adapters.merge`, the readers and writers)
does the rest once for all methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flowra_adapters.operators import Operator, ParameterOperator
from flowra_adapters.quantised import QuantisedWeight
from flowra_adapters.sharding import is_sharded

if TYPE_CHECKING:
    from flowra_adapters.sites import Site

__all__ = ["Adapter", "AdapterDict", "Base", "refuse_sharded"]


@dataclass(frozen=True, slots=True)
class Base:
    """What a layer does without adapters."""

    output: Tensor
    """For the input at hand, bias excluded."""
    weight: Tensor
    """In the standard layout ``(m, n/g, *kernel)``, detached."""


class Adapter(nn.Module, ABC):
    """One method's update of one weight.

    Attributes:
        operator: how the layer uses the weight.
        scaling: the factor ``s`` of the update. Fixed at birth: it does not depend on the current rank, so that growing
            or shrinking never rescales the directions that stay.
        enabled: whether the layer adds this update to its output.
        observer: called with the bottleneck activation z, channels last, ``(…, r)``, a tensor of the graph that
            gradients pass, on every forward pass, or None. This is how statistics are gathered as a by-product of
            training. An update that has no bottleneck, or stands in the weight's place, never calls it.
        reads_base: whether the update depends on the base weight; then :meth:`forward` and :meth:`delta_weight` are
            given it.
    """

    operator: Operator
    scaling: float
    enabled: bool
    observer: Callable[[Tensor], None] | None
    reads_base: ClassVar[bool] = False

    def __init__(self, operator: Operator, *, scaling: float = 1.0) -> None:
        super().__init__()
        self.operator = operator
        self.scaling = scaling
        self.enabled = True
        self.observer = None

    def placed(self, base_weight: Callable[[], Tensor]) -> None:
        """Take note of being put on a site; called once, before the first pass.

        Args:
            base_weight: returns the site's weight without any update, whenever it is called, as :attr:`Base.weight`.
        """

    @property
    @abstractmethod
    def rank(self) -> int:
        """Current rank, ≥ 0. An adapter of rank 0 holds no parameters and contributes nothing, but may grow."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to apply. Asked on every pass, so it must not look at values of tensors."""
        return self.rank == 0

    @abstractmethod
    def forward(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Apply the update to the layer's input; the result is added to the layer's output."""

    @abstractmethod
    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Materialise ΔW in the standard layout ``(m, n/g, *kernel)``, in at least float32, differentiably.

        Args:
            weight: the base weight in the standard layout, where ``reads_base``.
        """

    def materialises(self, x: Tensor) -> bool:
        """Tell whether for this input W + ΔW should take the weight's place, instead of adding to the output."""
        return isinstance(self.operator, ParameterOperator)

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return (A ``(r, n)``, B ``(m, r)``) if the update in this pass is exactly s · (x Aᵀ) Bᵀ, else None.

        The machinery then applies them faster than :meth:`forward`, which nobody sees being called, and shows x Aᵀ to
        an observer if there is one: that must be z. Where ``reads_base``, the update is exactly what makes the output
        :meth:`plain_gain` times (base + s · (x Aᵀ) Bᵀ), and an observer sees nothing of it.
        """
        return None

    def plain_gain(self, weight: Tensor) -> Tensor | None:
        """Return the gain of each output channel ``(m,)``, differentiable, if ``reads_base`` and there is one.

        Args:
            weight: the base weight in the standard layout.
        """
        return None

    @abstractmethod
    def grow(self, rows: Tensor) -> None:
        """Append directions given by their input side ``(k, n·∏k)``; the output does not change."""

    @abstractmethod
    def shrink(self, keep: Sequence[int]) -> None:
        """Keep the directions with these indices, in this order, and drop the others."""

    @abstractmethod
    def cost(self, rank: int) -> int:
        """Count the parameters that an adapter of this weight has at this rank; none at rank 0."""

    @property
    def cost_per_rank(self) -> int:
        """Parameters that one more unit of rank costs now."""
        return self.cost(self.rank + 1) - self.cost(self.rank)

    def num_parameters(self) -> int:
        """Count the adapter's trainable parameters at its current rank."""
        return sum(parameter.numel() for parameter in self.parameters())


def refuse_sharded(parameter: Tensor) -> None:
    """Refuse to put a new Parameter in the place of a sharded one.

    Raises:
        ValueError: if it is sharded.
    """
    if is_sharded(parameter):
        raise ValueError(
            "factors must be whole to be replaced, got sharded ones, of which fully_shard would go on to use the old."
            " Use method 'svd_masked', whose Parameters stay."
        )


class AdapterDict(nn.ModuleDict):
    """The adapters of one module's parameters, and what applying and merging them needs to remember.

    Keys are ``<adapter>`` for the module's weight and ``<adapter>:<label>`` for another parameter or a part of one.

    Attributes:
        sites: what each key adapts.
        merged: keys whose updates are in the parameters now.
        kept: parameter to its value before the first merge, if it is kept; as it is stored, so quantised where it is.
        added: parameter to the sum of the updates in it, if its value is not kept.
        shadowed: keys whose updates stand in the place of their parameters during the pass that is under way.
        folded: W + s B A, A, B and s during a pass in which that stands in the weight's place.
        hooks: what applies the updates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Site] = {}
        self.merged: tuple[str, ...] = ()
        self.kept: dict[str, Tensor | QuantisedWeight] = {}
        self.added: dict[str, Tensor] = {}
        self.shadowed: tuple[str, ...] = ()
        self.folded: tuple[Tensor, Tensor, Tensor, float] | None = None
        self.hooks: dict[str, RemovableHandle] = {}

    def named(self, adapter: str) -> dict[str, Adapter]:
        """Return the adapters of one set, by key."""
        return {key: one for key, one in self.each() if key.partition(":")[0] == adapter}

    def each(self) -> list[tuple[str, Adapter]]:
        """Return keys and adapters."""
        return [(key, one) for key, one in self._modules.items() if isinstance(one, Adapter)]

    def active(self) -> dict[str, Adapter]:
        """Return the adapters whose update must be applied now."""
        return {key: one for key, one in self.each() if one.enabled and key not in self.merged and not one.empty}
