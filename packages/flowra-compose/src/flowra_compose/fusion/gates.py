"""Gates: small linear maps that turn a hidden state into one weight for each adapter.

For a hidden state h of one position, k adapters and a temperature τ,

    w = softmax(W_g h / τ) + b,    W_g (k, d), b (k,),

with the bias outside of the softmax: weights may be negative or above 1, and sum to 1 + Σ b. A gate is born with
W_g = 0, so that w = 1/k + b until it has learned.

Source: Wang et al. 2024, *LoRA-Flow* (arXiv:2402.11455), section 3.2, and its code. ``docs/methods.md``, section 29.
Deviations: k ≥ 1 instead of 2; b = onehot(primary) − 1/k, which for k = 2 are the code's values; the gate counts in
float32 at least. Ours, off by default: a normed input, W_g of low rank, top-k routing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

__all__ = ["Gate", "GateOptions", "Gates", "Level"]

Level = Literal["layer", "step", "module"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateOptions:
    """How gates look at the model, and how they begin.

    Raises:
        ValueError: if a value is out of range.
    """

    level: Level = "layer"
    """``layer``: one gate for each repeated block, which looks at the residual stream as it enters the block; its
    weights serve every adapted module in there. ``step``: one gate for all blocks, which looks at what enters the
    first. ``module``: one for each adapted module, which looks at that module's input."""
    initial: Literal["primary", "uniform"] = "primary"
    """``primary``: at birth one adapter has weight 1 and the others 0. ``uniform``: each has 1/k."""
    primary: int = -1
    """Which adapter that is, as an index; by default the last. The paper's order is language, then task. With
    ``uniform`` there is none, and this must be left as it is."""
    temperature: float = 1.0
    """τ, 1e-6 to 1e6. The paper's code generates at 1.1 in two of its six settings and trains at 1."""
    gate_input: Literal["residual", "normed"] = "residual"
    """``normed`` divides h by its root mean square, for the residual stream grows with depth, and so do the scores."""
    rank: int | None = None
    """Of W_g, 1 to min(k, d); None for a full one."""
    top_k: int | None = None
    """Largest number of adapters with a weight other than 0 at one position, those of the largest |w|; None for all.
    Equals of the last of them stay, too, for no order of the adapters is better than another. What stays keeps its
    weight, so the sum is another."""

    def __post_init__(self) -> None:
        _one_of("level", self.level, ("layer", "step", "module"))
        _one_of("initial", self.initial, ("primary", "uniform"))
        _one_of("gate_input", self.gate_input, ("residual", "normed"))
        if isinstance(self.temperature, bool) or not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(f"temperature must be a number from 1e-6 to 1e6, got {self.temperature!r:.40}")
        for name, value in (("rank", self.rank), ("top_k", self.top_k)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number ≥ 1, or None, got {value!r}")
        if type(self.primary) is not int:
            raise ValueError(f"primary must be the index of an adapter, got {self.primary!r}")
        if self.initial == "uniform" and self.primary != -1:
            raise ValueError(f"primary must be left out with a uniform start, where all are alike, got {self.primary}")


class Gate(nn.Module):
    """One gate.

    Parameters are float32: ``weight`` (k, d) and ``bias`` (k,); or ``weight_A`` (q, d) and ``weight_B`` (k, q) with W_g
    = B A. With one adapter its weight is 1 and there is nothing to learn.

    Args:
        adapters: k ≥ 1.
        width: d, the size of h.
        options: of the gate.
        seed: of ``weight_A``.

    Raises:
        ValueError: if ``rank``, ``top_k`` or ``primary`` does not fit k and d.
    """

    def __init__(self, adapters: int, width: int, options: GateOptions, *, seed: int = 0) -> None:
        super().__init__()
        limits = (("rank", options.rank, min(adapters, width)), ("top_k", options.top_k, adapters))
        for name, value, limit in limits:
            if value is not None and value > limit:
                raise ValueError(f"{name} must be at most {limit} with {adapters} adapters, got {value}")
        if not -adapters <= options.primary < adapters:
            raise ValueError(f"primary must be the index of one of {adapters} adapters, got {options.primary}")
        self.options = options
        self.width = width
        bias = torch.zeros(adapters)
        if options.initial == "primary":
            bias -= 1 / adapters
            bias[options.primary] += 1
        self.bias = nn.Parameter(bias, requires_grad=adapters > 1)
        if options.rank is None:
            self.weight = nn.Parameter(torch.zeros(adapters, width), requires_grad=adapters > 1)
        else:
            rows = torch.empty(options.rank, width)
            rows.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=torch.Generator().manual_seed(seed))
            self.weight_A = nn.Parameter(rows, requires_grad=adapters > 1)
            self.weight_B = nn.Parameter(torch.zeros(adapters, options.rank), requires_grad=adapters > 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the adapters at every position.

        Args:
            hidden: h, ``(…, d)``, of any floating dtype.

        Returns:
            w and the softmax in it, each ``(…, k)``, in the dtype of h, at least float32.
        """
        h = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        with torch.autocast(h.device.type, enabled=False):
            shares = torch.softmax(self._scores(h) / self.options.temperature, dim=-1)
        weights = shares + self.bias.to(h.dtype)
        if self.options.top_k is not None and self.options.top_k < weights.shape[-1]:
            sizes = weights.detach().abs()
            weights = weights * (sizes >= sizes.topk(self.options.top_k, dim=-1).values[..., -1:])
        return weights, shares

    def _scores(self, h: Tensor) -> Tensor:
        if self.options.gate_input == "normed":
            h = nn.functional.rms_norm(h, h.shape[-1:], eps=1e-6)
        if self.options.rank is None:
            return nn.functional.linear(h, self.weight.to(h.dtype))
        return nn.functional.linear(h, self.weight_A.to(h.dtype)) @ self.weight_B.to(h.dtype).T


class Gates(nn.Module):
    """The gates of a model, one for each place: a block, a module, or all of it.

    Args:
        places: name of each place to the width d of what its gate looks at; ``""`` for the gate of level ``step``.
        adapters: k ≥ 1.
        options: of every gate.
        seed: of what is drawn for gates of low rank.

    Raises:
        ValueError: if the options do not fit k or a width.
    """

    def __init__(self, places: Mapping[str, int], adapters: int, options: GateOptions, *, seed: int = 0) -> None:
        super().__init__()
        self.places = tuple(places)
        self.adapters = adapters
        self.options = options
        widths = enumerate(places.values())
        self.gates = nn.ModuleList(Gate(adapters, width, options, seed=seed + index) for index, width in widths)
        self._at = {place: index for index, place in enumerate(self.places)}

    def __iter__(self) -> Iterator[Gate]:
        """Go through the gates, in the order of the places."""
        return iter(cast("list[Gate]", list(self.gates)))

    @property
    def widths(self) -> dict[str, int]:
        """Name of each place to d."""
        return {place: gate.width for place, gate in zip(self.places, self, strict=True)}

    @property
    def level(self) -> Level:
        """Where the gates look."""
        return self.options.level

    def weights(self, place: str, hidden: Tensor, coordinates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weigh the adapters at a place, see :meth:`Gate.forward`."""
        weights, shares = self.gates[self._at[place]](hidden)
        return weights, shares

    def num_parameters(self) -> int:
        """Count what can be learned: k d + k for each place, with W_g of full rank."""
        return sum(each.numel() for each in self.parameters())


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
