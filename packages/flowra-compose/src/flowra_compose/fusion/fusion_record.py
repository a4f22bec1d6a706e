"""What a fused model did: the weights of every place, call by call."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["FusionRecord"]


@dataclass(slots=True, eq=False)
class FusionRecord:
    """The weights that were used, by place, one tensor for each time that the place was asked."""

    weights: dict[str, list[Tensor]] = field(default_factory=dict)
    """``(batch, positions, k)``, in the order of calls: with a cache, the prompt and then token after token."""
    shares: dict[str, list[Tensor]] = field(default_factory=dict)
    """The softmax in them."""

    def stacked(self) -> Tensor:
        """Return the weights of all places, ``(places, batch, positions, k)``, on the CPU, detached.

        Raises:
            ValueError: if nothing was recorded, or places were asked for other positions.
        """
        joined = [torch.cat([each.detach().cpu() for each in calls], dim=-2) for calls in self.weights.values()]
        if not joined or any(each.shape != joined[0].shape for each in joined):
            got = sorted({tuple(each.shape) for each in joined})
            raise ValueError(f"places must have weights for the same positions, got {got or 'none'}")
        return torch.stack(joined)

    def entropy(self, mask: Tensor | None = None) -> Tensor:
        """Return the mean over places and positions of −Σ p log p of the shares, in nats: 0 picks one, log k mixes all.

        It has a gradient where the weights have one; add it to a loss for gates that decide. At W_g = 0 that gradient
        is 0, for there the entropy is largest.

        Args:
            mask: ``(batch, positions)``, nonzero at real tokens; a place that sees other positions counts whole.

        Raises:
            ValueError: if nothing was recorded.
        """
        shares = [each for calls in self.shares.values() for each in calls]
        if not shares:
            raise ValueError("shares must have been recorded, got none. Run the model inside of `with recording()`.")
        means = []
        for each in shares:
            entropies = torch.special.entr(each).sum(-1)
            if mask is not None and mask.shape == entropies.shape:
                entropies = entropies[mask.bool()]
            means.append(entropies.mean())
        return torch.stack(means).mean()
