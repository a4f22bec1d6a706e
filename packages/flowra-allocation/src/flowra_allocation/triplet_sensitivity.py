"""How much the loss feels each triplet, smoothed over steps (Zhang et al. 2023, arXiv:2303.10512, section 3.3).

    I = |θ ∂L/∂θ|        Ī ← β₁ Ī + (1 − β₁) I        Ū ← β₂ Ū + (1 − β₂) |I − Ī|        s(θ) = Ī Ū

for every element θ of A, E and B; Ī and Ū start at 0, and Ū takes the Ī of the same step. A triplet is worth

    S_k = s(E_k) + mean_j s(A_kj) + mean_j s(B_jk).

θ is taken after the optimiser's step and the gradient before it, as in the released code. Deviations: a step with a
gradient that is not finite (one that ``GradScaler`` skips) is left out, where it would poison Ī for good; I itself is
not kept, so the state is two numbers for each element.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowra_allocation.forms import RANK_AXIS
from flowra_allocation.policy import LayerView

__all__ = ["TripletSensitivity"]

KINDS = ("sensitivity", "uncertainty")

Element = tuple[str, str]  # module name, factor name


class TripletSensitivity:
    """Smoothed sensitivity and uncertainty of every element.

    Args:
        beta1: β₁, of the sensitivity, in (0, 1).
        beta2: β₂, of the uncertainty, in (0, 1).

    Raises:
        ValueError: if one is out of range.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name} must be in (0, 1), got {beta}")
        self._beta1, self._beta2 = beta1, beta2
        self._smoothed: dict[Element, Tensor] = {}  # Ī
        self._uncertain: dict[Element, Tensor] = {}  # Ū

    @torch.no_grad()
    def update(self, layers: Mapping[str, LayerView], gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in one step; all tensors at once, in at least float32.

        Args:
            layers: module name to view, after the step.
            gradients: module name to factor name to gradient, shaped as the factor in the view.

        Raises:
            ValueError: if a factor's shape is not the one of the steps before, less what :meth:`follow` was told.
        """
        elements = [(name, factor) for name in layers for factor in gradients[name]]
        if not elements:
            return
        values = [_wide(getattr(layers[name], factor)) for name, factor in elements]
        impact = torch._foreach_mul(values, [_wide(gradients[name][factor]) for name, factor in elements])
        torch._foreach_abs_(impact)
        smoothed = [_held(self._smoothed, key, each) for key, each in zip(elements, impact, strict=True)]
        uncertain = [_held(self._uncertain, key, each) for key, each in zip(elements, impact, strict=True)]
        if _finite(impact):
            torch._foreach_lerp_(smoothed, impact, 1 - self._beta1)
            torch._foreach_sub_(impact, smoothed)
            torch._foreach_abs_(impact)
            torch._foreach_lerp_(uncertain, impact, 1 - self._beta2)
        self._smoothed = dict(zip(elements, smoothed, strict=True))
        self._uncertain = dict(zip(elements, uncertain, strict=True))

    def scores(self) -> dict[str, Tensor]:
        """Return module name to S ``(r,)``, on the CPU; nothing before the first step."""
        if not self._smoothed:
            return {}
        products = torch._foreach_mul(list(self._smoothed.values()), list(self._uncertain.values()))
        parts: dict[str, list[Tensor]] = {}
        for (name, factor), each in zip(self._smoothed, products, strict=True):
            parts.setdefault(name, []).append(each if each.ndim == 1 else each.mean(1 - RANK_AXIS[factor]))
        sums = [torch.stack(each).sum(0) for each in parts.values()]
        together = torch.cat([each.to(sums[0].device) for each in sums]).cpu()  # one copy from the device
        return dict(zip(parts, together.split([len(each) for each in sums]), strict=True))

    def follow(self, *, keep: Mapping[str, Sequence[int]], admitted: Mapping[str, int]) -> None:
        """Follow a change of rank: directions that stay keep what they have, new ones start at 0.

        Args:
            keep: module name to the indices of the directions that stay, in their new order; others keep all.
            admitted: module name to the number of directions appended after that.
        """
        for held in (self._smoothed, self._uncertain):
            for (name, factor), old in held.items():
                axis, value = RANK_AXIS[factor], old
                if name in keep:
                    value = value.index_select(axis, torch.tensor(keep[name], dtype=torch.long, device=old.device))
                if admitted.get(name, 0):
                    shape = list(value.shape)
                    shape[axis] = admitted[name]
                    value = torch.cat([value, value.new_zeros(shape)], axis)
                held[name, factor] = value

    def state(self) -> dict[str, Tensor]:
        """Return copies of Ī and Ū as ``<module name>.<factor>.sensitivity`` and ``….uncertainty``."""
        return {
            f"{name}.{factor}.{kind}": each.clone()
            for kind, held in zip(KINDS, (self._smoothed, self._uncertain), strict=True)
            for (name, factor), each in held.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned, on whatever device it is now.

        Raises:
            ValueError: if it is not such a state; nothing is changed then.
        """
        found: dict[str, dict[Element, Tensor]] = {kind: {} for kind in KINDS}
        for key, value in state.items():
            name, factor, kind = (["", "", *key.rsplit(".", 2)])[-3:]
            if kind not in found or factor not in RANK_AXIS:
                raise ValueError(f"state must be of sensitivities and uncertainties, got the key {key!r}")
            found[kind][name, factor] = value.clone()
        smoothed, uncertain = (found[kind] for kind in KINDS)
        if smoothed.keys() != uncertain.keys():
            alone = sorted(".".join(each) for each in smoothed.keys() ^ uncertain.keys())
            raise ValueError(f"state must have an uncertainty for every sensitivity, got one of them for {alone}")
        self._smoothed, self._uncertain = smoothed, uncertain


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _finite(tensors: tuple[Tensor, ...]) -> bool:
    norms = torch._foreach_norm(tensors)
    return bool(torch.stack([each.to(norms[0]) for each in norms]).isfinite().all())


def _held(held: Mapping[Element, Tensor], key: Element, like: Tensor) -> Tensor:
    """Return what is held of an element, where its factor is now; zeros at first."""
    if key not in held:
        return torch.zeros_like(like)
    if held[key].shape != like.shape:
        raise ValueError(
            f"{key[1]} must have the shape {tuple(held[key].shape)} of earlier steps, got {tuple(like.shape)};"
            f" {key[0]}. Tell follow what moved."
        )
    return held[key].to(like)
